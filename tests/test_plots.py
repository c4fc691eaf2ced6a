"""Figures: they show what was recorded, say what was not, and never fail on a record."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from noetherperf import plots
from noetherperf.checks.constraints import check_constraints
from noetherperf.optim.sgd import SGD
from noetherperf.plots import reading
from noetherperf.plots.panels import thinned
from noetherperf.record import Record, Recorder, open_record, relative_error
from noetherperf.symmetry import Balance, Norm, Part, Rescale, Scale, Symmetry, Translation

SYMMETRIES: dict[str, Symmetry] = {
    "translation": Translation("fc2", [Part("fc2.weight", axis=1)]),
    "scale": Scale("fc1 → norm", [Part("fc1.weight", axis=0)]),
    "rescale": Rescale(
        "norm->fc2",
        inward=[Part("norm.weight", axis=0), Part("norm.bias", axis=0)],
        outward=[Part("fc2.weight", axis=1)],
    ),
    "norm": Norm("fc2.bias", [Part("fc2.bias", axis=None)]),
}
N_UNITS = 15
N_STEPS = 40


class Network(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(6, N_UNITS, bias=False, dtype=dtype)
        self.norm = torch.nn.BatchNorm1d(N_UNITS, eps=1e-12, dtype=dtype)
        self.fc2 = torch.nn.Linear(N_UNITS, 3, dtype=dtype)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc2(self.norm(self.fc1(images)).relu())
        return logits


def make_record(
    path: Path,
    kinds: tuple[str, ...] = tuple(SYMMETRIES),
    *,
    n_steps: int = N_STEPS,
    probes: bool = True,
    spoil: float | None = None,
    lr: float = 0.1,
    dtype: torch.dtype = torch.float64,
) -> Record:
    torch.manual_seed(0)
    network = Network(dtype)
    optimizer = SGD(
        network.named_parameters(),
        lr=lr,
        momentum=0.9,
        weight_decay=1e-2,
        symmetries=[SYMMETRIES[kind] for kind in kinds],
        backend="reference",
    )
    loss = torch.tensor(torch.nan)
    watch = {"loss": lambda: loss, "parameters": lambda: network.fc1.weight[0]} if probes else {}
    with Recorder(optimizer, path, probes=watch):
        for step in range(n_steps):
            images = torch.randn(16, 6, dtype=dtype)
            labels = images[:, :3].argmax(1)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            if spoil is not None and step == n_steps // 2:
                loss = loss * spoil
            loss.backward()
            optimizer.step()
    return open_record(path)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return make_record(tmp_path_factory.mktemp("plots") / "a")


def panels(figure: Figure) -> list[Axes]:
    """All axes but the key of the colours."""
    return [axes for axes in figure.get_axes() if axes.get_label() != "<colorbar>"]


def texts(axes: Axes) -> str:
    return " ".join([axes.get_title("left"), *(text.get_text() for text in axes.texts)])


def curves(axes: Axes) -> tuple[list[Line2D], list[Line2D]]:
    """The solid (measured) and the dotted (flow law) lines of a panel."""
    lines = list(axes.get_lines())
    return [line for line in lines if line.get_linestyle() == "-"], [
        line for line in lines if line.get_linestyle() != "-"
    ]


def y_data(lines: list[Line2D]) -> list[list[float]]:
    return sorted(np.asarray(line.get_ydata(), dtype=float).tolist() for line in lines)


def test_charges_shows_measurement_and_flow_law(record: Record) -> None:
    drawn = panels(plots.charges(record))
    assert len(drawn) == 4
    for axes, kind in zip(drawn, ("translation", "scale", "rescale"), strict=False):
        name = SYMMETRIES[kind].name
        assert axes.get_title("left") == f"{name}\n{kind}, 10 of 15 groups"
        measured, law = curves(axes)
        data = record[name]
        initial = data.initial.to_numpy()
        chosen = np.argsort(initial)[np.linspace(0, 14, 10).round().astype(int)]
        assert y_data(measured) == sorted(data.charge[:, chosen].T.to_numpy().tolist())
        assert y_data(law) == sorted(data.flow_total[:, chosen].T.to_numpy().tolist())
        assert axes.get_xlabel() == "step"
        lightness = [np.mean(line.get_color()[:3]) for line in measured]  # type: ignore[arg-type]
        assert lightness == sorted(lightness)


def test_the_legend_tells_measured_from_law(record: Record) -> None:
    for draw in (plots.charges, plots.parameters):
        (legend,) = draw(record).legends
        assert [text.get_text() for text in legend.get_texts()] == [
            "measured, coloured by the initial charge, small to large",
            "flow law, free + forced",
        ]


def test_time_axis_follows_the_schedule(record: Record) -> None:
    figure = plots.charges(record)
    figure.draw_without_rendering()
    (time,) = panels(figure)[0].child_axes
    assert time.get_xlabel() == "time η·steps"
    left, right = panels(figure)[0].get_xlim()
    assert time.get_xlim() == pytest.approx((0.1 * left, 0.1 * right))  # η = 0.1 throughout


def test_no_time_axis_where_time_stands_still(tmp_path: Path) -> None:
    figure = plots.charges(make_record(tmp_path / "a", n_steps=3, lr=0.0))
    figure.draw_without_rendering()
    assert [axes.child_axes for axes in panels(figure)] == [[], [], [], []]


def test_residuals_shows_the_worst_group(record: Record) -> None:
    figure = plots.residuals(record)
    drawn = panels(figure)
    laws: tuple[Any, ...] = ("flow", "discrete", "budget")
    for axes, law in zip(drawn, laws, strict=True):
        lines = axes.get_lines()
        for line, kind in zip(lines, ("translation", "scale", "rescale"), strict=False):
            worst = relative_error(record[SYMMETRIES[kind].name], law).max("group")
            np.testing.assert_array_equal(line.get_ydata(), worst)
        assert np.asarray(lines[-1].get_ydata()).tolist() == [torch.finfo(torch.float64).eps] * 2
        assert "float64 ε" in texts(axes)
        assert axes.get_yscale() == "log"
    low, high = drawn[0].get_ylim()
    assert low < torch.finfo(torch.float64).eps < 1e-3 < high


def test_residuals_takes_the_worst_of_several_symmetries(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", ("scale", "translation"))
    two = Record(record.path, record.dataset)
    one, other = record.symmetries
    two.symmetries = (one, Scale(other.name, one.parts))  # the translation's data, as if it were another scale's
    (line, *_) = panels(plots.residuals(two))[0].get_lines()
    errors = [relative_error(record[which.name], "flow").max("group").to_numpy() for which in (one, other)]
    np.testing.assert_array_equal(line.get_ydata(), np.maximum(*errors))


def test_parameters_stand_beside_charges(record: Record) -> None:
    left, right = panels(plots.parameters(record))
    assert y_data(list(left.get_lines())) == sorted(record.probes["parameters"].T.to_numpy().tolist())
    assert right.get_title("left").startswith("fc2\ntranslation")


def test_loss(record: Record) -> None:
    (axes,) = panels(plots.loss(record))
    (measured,) = axes.get_lines()  # of few rows no mean
    recorded = record.probes["loss"].to_numpy()
    np.testing.assert_array_equal(measured.get_ydata(), recorded[~np.isnan(recorded)])
    assert axes.get_ylabel() == "training loss of the batch"


LOSSES = np.random.default_rng(0).uniform(1.0, 2.0, 1200)
LOSSES[[400, 700]] = np.nan, np.inf


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """1,201 rows of a weight that never moves, and a loss."""
    network = torch.nn.Linear(2, 3)
    symmetries = [Scale("rows", [Part("weight", 0)]), Translation("columns", [Part("weight", 1)])]
    optimizer = SGD(network.named_parameters(), lr=0.0, symmetries=symmetries)
    path = tmp_path_factory.mktemp("long") / "a"
    with Recorder(optimizer, path) as recorder:
        for value in LOSSES:
            recorder.log(loss=value)
            network.weight.grad = torch.zeros_like(network.weight)
            optimizer.step()
    return open_record(path)


def test_the_mean_of_a_long_loss(long: Record) -> None:
    values, figure = LOSSES, plots.loss(long)
    measured, smooth = panels(figure)[0].get_lines()
    assert [np.nanmin(measured.get_ydata()), np.nanmax(measured.get_ydata())] == [np.nanmin(values), np.inf]
    rows, means = (np.asarray(x, dtype=float) for x in smooth.get_data())
    logged = [(step, x) for step, x in enumerate(values, 1) if not np.isnan(x)]
    place = {step: i for i, (step, _) in enumerate(logged)}
    for step, mean in zip(rows.astype(int), means, strict=True):
        window = [x for _, x in logged[max(0, place[step] - 11) : place[step] + 12]]
        assert mean == pytest.approx(sum(window) / len(window))
    assert any("Thinned: of every 6 of 1,199 rows" in text.get_text() for text in figure.texts)


def test_a_loss_that_is_logged_seldom_is_one_line(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 3)
    optimizer = SGD(network.named_parameters(), lr=0.0, symmetries=[Scale("rows", [Part("weight", 0)])])
    with Recorder(optimizer, tmp_path / "a") as recorder:
        for step in range(60):
            if step % 5 == 4:
                recorder.log(loss=1.0 / (step + 1))
            network.weight.grad = torch.zeros_like(network.weight)
            optimizer.step()
    (axes,) = panels(plots.loss(open_record(tmp_path / "a")))
    (line,) = axes.get_lines()
    steps, losses = (np.asarray(x, dtype=float) for x in line.get_data())
    np.testing.assert_array_equal(steps, range(5, 61, 5))
    np.testing.assert_allclose(losses, 1.0 / steps)


@pytest.mark.parametrize("missing", ["translation", "scale", "rescale"])
def test_a_missing_kind_has_no_panel(tmp_path: Path, missing: str) -> None:
    kinds = [kind for kind in ("translation", "scale", "rescale") if kind != missing]
    record = make_record(tmp_path / "a", tuple(kinds))
    assert [axes.get_title("left").split("\n")[1].split(",")[0] for axes in panels(plots.charges(record))] == kinds
    (legend,) = plots.residuals(record).legends
    assert [text.get_text() for text in legend.get_texts()] == kinds
    assert f"\n{kinds[0]}" in panels(plots.parameters(record))[1].get_title("left")


def test_missing_probes_are_told(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", probes=False)
    with pytest.raises(plots.NothingToDraw, match=r"no 'loss' was recorded; .*recorder\.log\(loss=loss\)"):
        plots.loss(record)
    with pytest.raises(plots.NothingToDraw, match=r"no 'parameters' was recorded"):
        plots.parameters(record)


def test_an_open_law_is_told(record: Record) -> None:
    opened = Record(record.path, record.dataset)
    opened.attrs = {**record.attrs, "closed": [False] * 4, "reason": ["two rates"] * 4}
    titles = [axes.get_title("left") for axes in panels(plots.charges(opened))]
    assert all(title.endswith("open law") for title in titles)
    with pytest.raises(plots.NothingToDraw, match=r"no law is closed \(two rates\)"):
        plots.residuals(opened)


@pytest.mark.parametrize(
    "options",
    [
        {"kinds": ()},
        {"kinds": ("norm",)},
        {"n_steps": 0},
        {"n_steps": 1},
        {"spoil": np.nan},
        {"spoil": np.inf},
        {"spoil": 1e200},
        {"lr": 0.0},
        {"dtype": torch.float32},
        {"kinds": (), "probes": False, "n_steps": 0},
    ],
    ids=str,
)
def test_any_record_is_drawn(tmp_path: Path, options: dict[str, Any]) -> None:
    """Warnings are errors here, so this also says that matplotlib has nothing to object to."""
    record = make_record(tmp_path / "a", **options)
    for draw in (*plots.FIGURES, plots.layers):
        try:
            made: Any = draw(record)
        except plots.NothingToDraw:
            continue
        for figure in made if isinstance(made, list) else [made]:
            figure.draw_without_rendering()
            assert all(axes.get_lines() for axes in panels(figure))


def test_save_all(record: Record, tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    files = plots.save_all(record, tmp_path / "new" / "figures", left_out=left_out.__setitem__)
    assert left_out == {"layers": "the figure charges shows all symmetries"}
    assert [file.name for file in files] == [
        f"{name}{suffix}" for name in ("charges", "residuals", "parameters", "loss") for suffix in (".png", ".pdf")
    ]
    assert sorted(files) == sorted((tmp_path / "new" / "figures").iterdir())
    assert files[0].read_bytes().startswith(b"\x89PNG")
    assert files[1].read_bytes().startswith(b"%PDF")
    again = plots.save_all(record, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_the_users_settings_stay(record: Record) -> None:
    before = dict(matplotlib.rcParams)
    plots.charges(record)
    assert dict(matplotlib.rcParams) == before


def test_pictures_do_not_depend_on_the_users_settings(record: Record, tmp_path: Path) -> None:
    plain = plots.save_all(record, tmp_path / "plain")
    theirs: dict[Any, Any] = {
        "text.usetex": True,
        "axes.facecolor": "red",
        "savefig.bbox": "tight",
        "font.family": "monospace",
    }
    theirs |= {"pdf.use14corefonts": True, "savefig.transparent": True, "axes.formatter.use_mathtext": True}
    with matplotlib.rc_context(theirs):
        styled = plots.save_all(record, tmp_path / "styled")
        assert matplotlib.rcParams["text.usetex"]
    assert [file.read_bytes() for file in styled] == [file.read_bytes() for file in plain]


@pytest.mark.parametrize(
    ("backend", "then"), [("module://matplotlib_inline.backend_inline", None), ("nonsense", None), ("svg", "svg")]
)
def test_a_backend_that_is_not_there_is_in_nobodys_way(backend: str, then: str | None) -> None:
    code = (
        "import os, sys; sys.modules['matplotlib_inline'] = None; import noetherperf.plots, matplotlib;"
        "print(os.environ['MPLBACKEND'], matplotlib.get_backend(auto_select=False))"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.stdout.split() == [backend, str(then)], shown.stderr


@pytest.mark.parametrize("name", ["$\\frac{$", "a$b$c", "two\nlines", "conv_1^2", "n" * 200, "[red]"], ids=range(6))
def test_any_name_is_drawn(name: str, tmp_path: Path) -> None:
    network = Network(torch.float64)
    optimizer = SGD(network.named_parameters(), symmetries=[Scale(name, SYMMETRIES["scale"].parts)])
    Recorder(optimizer, tmp_path / "record").close()
    (panel,) = panels(plots.charges(open_record(tmp_path / "record")))
    title = panel.get_title("left").removesuffix("\nscale, 10 of 15 groups")
    expected = {"two\nlines": "two\\nlines", "n" * 200: f"{'n' * 15}…{'n' * 14}"}.get(name, name)
    assert title == (title if name == "n" * 200 else expected)
    assert len(title) < 60
    labels = torch.zeros(4, dtype=torch.long)
    checked = check_constraints(
        network,
        lambda: torch.nn.functional.cross_entropy(network(torch.ones(4, 6, dtype=torch.float64)), labels),
        optimizer.symmetries,
        hessian=False,
    )
    figure = plots.constraints(checked)
    figure.draw_without_rendering()
    assert [label.get_text() for label in panels(figure)[0].get_yticklabels()] == [expected]


def test_no_pyplot() -> None:
    code = "import noetherperf.plots, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- all symmetries


def test_layers_has_a_row_for_each_layer(record: Record) -> None:
    (page,) = plots.layers(record)
    drawn = panels(page)
    rows = {axes.get_ylabel(): axes.get_position().y0 for axes in drawn if axes.get_ylabel()}
    assert list(rows) == ["fc2", "fc1", "norm"]  # of the first part of each symmetry
    assert sorted(rows.values(), reverse=True) == list(rows.values())
    titles = [axes.get_title("left").split("\n")[0] for axes in drawn]
    assert titles == ["fc2", "fc2.bias", "fc1 → norm", "norm->fc2"]
    assert [axes.texts[-1].get_text() for axes in drawn] == ["a", "b", "c", "d"]
    page.draw_without_rendering()
    edges = [axes.title.get_window_extent().x1 for axes in drawn]
    assert max(edges) <= page.bbox.x1


def test_chosen_symmetries_groups_and_quantities(record: Record) -> None:
    (page,) = plots.layers(record, "effective_lr", symmetries=["fc2.bias"], modules=["fc1"], groups=[7, 0])
    for axes, name, groups in zip(panels(page), ("fc1 → norm", "fc2.bias"), ([7, 0], [0]), strict=True):  # one has one
        drawn = np.array([line.get_ydata() for line in axes.get_lines()])
        np.testing.assert_array_equal(drawn, record[name].effective_lr[:, groups].T)
    labels = [text.get_text() for legend in page.legends for text in legend.get_texts()]
    assert labels == ["group 7", "group 0"]
    (legend,) = page.legends
    key = {name: line.get_color() for name, line in zip(labels, legend.get_lines(), strict=True)}
    assert [tuple(line.get_color()) for axes in panels(page) for line in axes.get_lines()] == [
        tuple(key[name]) for name in ("group 7", "group 0", "group 0")
    ]
    assert "effective learning rate: η/Q" in page.texts[0].get_text()
    with pytest.raises(plots.NothingToDraw, match="has a group 99; the last index is "):
        plots.layers(record, groups=[99])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantity": "chrage"}, r"quantity: 'chrage' is not in this record; did you mean 'charge'"),
        ({"quantity": "sq_g"}, r"quantity: 'sq_g' is not in this record; record it with Recorder"),
        ({"symmetries": ["fc3"]}, r"symmetry: the record has no 'fc3'; there are: fc2, "),
        ({"modules": ["fc3"]}, r"layer: no recorded symmetry has a part in 'fc3'; there are: fc1, fc2, norm"),
        ({"groups": 0}, "groups: must be a number of groups"),
        ({"groups": [-1]}, "groups: must be"),
    ],
)
def test_what_layers_cannot_draw(record: Record, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plots.layers(record, **options)


def test_many_layers_make_several_pages(tmp_path: Path) -> None:
    network = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(9)))
    norms = [Norm(f"rows of {i}", [Part(f"{i}.weight", axis=0)]) for i in range(9)]
    Recorder(SGD(network.named_parameters(), symmetries=norms), tmp_path / "a").close()
    record = open_record(tmp_path / "a")
    assert [len(panels(page)) for page in plots.layers(record)] == [7, 2]
    files = plots.save_all(record, tmp_path / "new", ["svg"])
    assert [file.name for file in files] == ["charges.svg", "layers.svg", "layers-2.svg"]
    again = plots.save_all(record, tmp_path / "again", ["svg"])
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_thinned_curves_keep_their_peaks() -> None:
    steps, values = np.arange(0, 100_030, 10), np.random.default_rng(0).standard_normal((10_003, 3))
    values[5000:6000, 1] = np.nan
    values[7777, 2] = np.inf
    x, y = thinned(steps, values)
    assert len(x) < 420
    assert (np.diff(x, axis=0) >= 0).all()
    np.testing.assert_array_equal(y, np.take_along_axis(values, x // 10, axis=0))
    for curve in range(3):
        for best in (np.nanmin, np.nanmax):
            assert best(y[:, curve]) == best(values[:, curve])
        assert {x[0, curve], x[-1, curve]} == {0, 100_020}
    assert np.isnan(y[:, 1]).any()
    small = thinned(steps[:9], values[:9])
    np.testing.assert_array_equal(small[1], values[:9])
    assert small[0].shape == (9, 3)


def test_no_single_error_of_a_long_record_is_lost(long: Record) -> None:
    """The worst row of the worst group is drawn, wherever it is."""
    spoiled = long.dataset.compute()
    spoiled["rounding"][777, 1] = 1e-3
    drawn = panels(plots.residuals(Record(long.path, spoiled)))[2].get_lines()
    worst = max(np.nanmax(np.asarray(line.get_ydata(), dtype=float)) for line in drawn)
    assert worst == pytest.approx(1e-3 / float(spoiled["charge"][777, 1]), rel=1e-6)


def test_blocks_are_the_whole(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SPAN", 7)
    monkeypatch.setattr(reading, "BLOCK", 100)
    wanted = [45, 3, 3, 20, 0, 31]
    found = reading.read_columns(record, ["charge", "flow_total"], wanted)
    for name, values in found.items():
        whole = np.concatenate([record[symmetry][name].to_numpy() for symmetry in record], axis=1)
        np.testing.assert_array_equal(values, whole[:, wanted])
    place = reading.columns_of(record, "norm->fc2")
    np.testing.assert_array_equal(record.numbers(["charge"], groups=place)["charge"], record["norm->fc2"].charge)


@pytest.mark.parametrize("name", ["W" * 60, "model.encoder.layers.11.attention.self -> output", "i" * 120])
def test_titles_end_before_the_page(name: str, tmp_path: Path) -> None:
    network = Network(torch.float64)
    parts = [Part("fc1.weight", axis=0)]
    symmetries: list[Symmetry] = [Norm(f"{name}{i}", parts) for i in range(3)]
    Recorder(SGD(network.named_parameters(), symmetries=symmetries), tmp_path / "a").close()
    record = open_record(tmp_path / "a")
    for figure in (plots.charges(record), *plots.layers(record)):
        figure.draw_without_rendering()
        for axes, after in zip(drawn := panels(figure), [*drawn[1:], None], strict=True):
            title = next(text for text in axes.get_children() if text is axes._left_title)  # type: ignore[attr-defined]
            edge = figure.bbox.x1 if after is None else after.get_window_extent().x0
            assert title.get_window_extent().x1 <= edge


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    record = make_record(tmp_path / "a", ("scale",), spoil=np.nan)
    (axes,) = panels(plots.charges(record))
    first = N_STEPS // 2 + 1
    assert np.isnan(record["fc1 → norm"].charge[first]).all()
    assert f"not finite at step {first}" in texts(axes)
    assert axes.get_xlim()[1] > N_STEPS


def test_a_single_row_is_dots(tmp_path: Path) -> None:
    (axes,) = panels(plots.charges(make_record(tmp_path / "a", ("scale",), n_steps=0)))
    assert {line.get_marker() for line in axes.get_lines()} == {"o"}


def test_reading_and_drawing_need_no_torch() -> None:
    code = "import noetherperf.plots, noetherperf.record, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_picture_inside_a_record(record: Record) -> None:
    with pytest.raises(ValueError, match=r"directory: .* is inside the record .* choose a place beside it"):
        plots.save_all(record, record.path / "new")
    assert not (record.path / "new").exists()


# --- Balances

HEADS, HEAD = 3, 4


@pytest.fixture(scope="module", params=[True, False], ids=["matrices", "spectra"])
def balances(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Record:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(5, HEADS * HEAD, bias=False), torch.nn.Linear(HEADS * HEAD, 2)
    ).double()
    balance = Balance("0, 1", [Part("0.weight", 0)], [Part("1.weight", 1)], size=HEAD)
    optimizer = SGD(network.named_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, symmetries=[balance])
    path = tmp_path_factory.mktemp("balances") / "a"
    with Recorder(optimizer, path, matrices=request.param):
        for _ in range(6):
            optimizer.zero_grad()
            network(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    return open_record(path)


def test_spectra_show_eigenvalues_and_the_discrete_law(balances: Record) -> None:
    (page,) = plots.spectra(balances, groups=[5, 0])
    (axes,) = panels(page)
    assert axes.get_title("left") == "0, 1\nbalance, 2 of 12 eigenvalues of 3 blocks"
    assert axes.get_ylabel() == "0"
    measured, law = curves(axes)
    data = balances.balance("0, 1")
    for lines, which in ((measured, "eigenvalues"), (law, "predicted_eigenvalues")):
        values = data[which].to_numpy()
        np.testing.assert_array_equal([line.get_ydata() for line in lines], [values[:, 1, 1], values[:, 0, 0]])
    assert "discrete law, free + forced" in [text.get_text() for text in page.legends[0].get_texts()]
    with pytest.raises(plots.NothingToDraw, match="are matrices: draw its eigenvalues"):
        plots.layers(balances)
    with pytest.raises(ValueError, match=r"symmetry: the record has no '0, 2'; .*'?0, 1"):
        plots.spectra(balances, symmetries=["0, 2"])
    with pytest.raises(plots.NothingToDraw, match=r"has the eigenvalues \[12\]"):
        plots.spectra(balances, groups=[12])


def test_matrices_stand_side_by_side(balances: Record) -> None:
    if "0, 1: charge" not in balances.probes:
        with pytest.raises(plots.NothingToDraw, match=r"to record them, Recorder\(\.\.\., matrices=True\)"):
            plots.matrices(balances)
        return
    data = balances.balance("0, 1").isel(step=-1)
    charge, law = data["charge"].to_numpy(), data["predicted_charge"].to_numpy()
    worst = int(np.abs(charge - law).max((1, 2)).argmax())
    for block, (page,) in ((worst, plots.matrices(balances)), (2, plots.matrices(balances, blocks=[2]))):
        shown = [axes.get_images()[0] for axes in panels(page)]
        expected = (charge[block], law[block], charge[block] - law[block])
        for image, values in zip(shown, expected, strict=True):
            np.testing.assert_array_equal(image.get_array(), values)
        assert shown[0].get_clim() == shown[1].get_clim()
        assert f"block {block} of 3" in texts(panels(page)[0])


def test_save_all_has_what_a_balance_has(balances: Record, tmp_path: Path) -> None:
    left_out: dict[str, str] = {}
    files = plots.save_all(balances, tmp_path, ["svg"], left_out=left_out.__setitem__)
    recorded = "0, 1: charge" in balances.probes
    assert [file.stem for file in files] == ["spectra", "matrices"][: 1 + recorded]
    assert left_out["charges"] == "only Balances were recorded"
    assert ("matrices" in left_out) == (not recorded)
