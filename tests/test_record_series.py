"""Records: the choice of series and precisions, logged values, reading a part, and records of the version before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from test_recorder import N_GROUPS, FakeSGD, contents, eager, fake, recorded, train

import noetherperf as nperf
import noetherperf.record.layout
from noetherperf.record import SERIES, Recorder, open_record, relative_error
from noetherperf.record.chunks import CHAINS, Coding, Damaged
from noetherperf.record.collect import _rounded
from noetherperf.record.layout import FIRST_SERIES
from noetherperf.record.series import DEFAULT, INITIAL, derivations
from noetherperf.symmetry import Norm, Part, Rescale, Scale, Translation

__all__ = ["eager"]

#: What was recorded by default once.
BEFORE = ("charge", "residual", "rounding", "discrete_free", "flow_residual", "flow_free", "growth", "transport")
VERSION_1 = Path(__file__).with_name("record_version_1.zip")


class SmallSGD(FakeSGD):
    """Charges of about 1, and differences from them of 1e-9 and less."""

    def reading(self, index: int, symmetry: Any) -> Any:
        data = super().reading(index, symmetry)
        groups = torch.arange(self.n_groups[index], dtype=torch.float64)
        data.charge = 1.1 + 0.1 * groups + 1e-3 * self.step_count
        data.rounding, data.residual = 1.3e-12 * (groups + 1), 1.7e-9 * (groups + 1)
        data.flow.free, data.flow.forced = data.charge - 0.3, 0.3 - 1.9e-7 * (groups + 1)
        data.discrete.free, data.discrete.forced = data.charge - 0.2, 0.2 - data.residual
        data.discrete.defect, data.discrete.budget = data.residual - data.rounding, data.charge - data.rounding
        return data


@pytest.mark.parametrize("n_units", [1, 3])
def test_a_record_of_a_probe_keeps_its_decay_and_its_hyperparameters_apart(tmp_path: Path, n_units: int) -> None:
    model = torch.nn.Linear(2, n_units).double()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    probe = nperf.Probe(inner, [Norm("w", [Part("weight", 0)])], model.named_parameters())
    laws = []
    with Recorder(probe, tmp_path / "a") as recorder:
        for _ in range(3):
            recorder.log(loss=1.0)
            model(torch.ones(1, 2).double()).square().sum().backward()
            inner.step()
            laws.append(probe.readout()["w"])
    data, record = open_record(tmp_path / "a")["w"], open_record(tmp_path / "a")
    for law, i in zip(laws, range(-3, 0), strict=True):
        assert law.growth is not None
        assert law.transport is not None
        decayed = law.charge - law.initial - law.growth - law.transport - law.rounding
        np.testing.assert_allclose(data.decayed[i], decayed, rtol=1e-5)
        assert (decayed < 0).all()
    assert record.hyperparameters["decay"].to_numpy().tolist() == [[0.5]] * len(record.steps)


def test_small_differences_keep_their_digits(tmp_path: Path) -> None:
    """Although nothing but the charge is recorded in float64."""
    optimizer: Any = SmallSGD()
    with Recorder(optimizer, tmp_path / "a") as recorder:
        train(optimizer, 3)
    assert recorder.series == DEFAULT
    data, law = open_record(tmp_path / "a")["head"], optimizer.readout()["head"]
    last = data.isel(step=-1)
    np.testing.assert_array_equal(last.charge, law.charge)
    flow_residual = 1.9e-7 * np.arange(1, 5)
    for name, value in {"rounding": law.rounding, "residual": law.residual, "flow_residual": flow_residual}.items():
        np.testing.assert_allclose(last[name], value, rtol=1e-6)
    np.testing.assert_allclose(last.charge - last.discrete_budget, law.rounding, rtol=1e-3)  # 1e-16 of a charge of 1
    np.testing.assert_allclose(last.charge - last.discrete_total, law.residual, rtol=1e-6)
    np.testing.assert_allclose(last.discrete_defect, law.residual - law.rounding, rtol=1e-6)
    np.testing.assert_allclose(last.discrete_free + last.discrete_forced, last.discrete_total, rtol=1e-7)
    size = np.maximum(law.charge.numpy(), (abs(law.discrete.free) + abs(law.discrete.forced)).numpy())
    np.testing.assert_allclose(relative_error(data, "budget")[-1], law.rounding.numpy() / size, rtol=1e-6)
    np.testing.assert_allclose(relative_error(data, "discrete")[-1], law.residual.numpy() / size, rtol=1e-6)


def test_small_parts_of_the_change_keep_their_digits(tmp_path: Path) -> None:
    """Decay and growth of 1e-8 of the charge and less, the smaller beside the larger."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    rows = [Norm("rows", [Part("weight", axis=0)])]
    for make, lr, decay in ((nperf.SGD, 1e-4, 1e-6), (nperf.SGD, 1e-9, 0.3), (nperf.AdamW, 1e-5, 1e-6)):
        optimizer: Any = make([("weight", weight)], lr=lr, weight_decay=decay, symmetries=rows)
        with Recorder(optimizer, tmp_path / "a", exists="overwrite"):
            for _ in range(5):
                weight.grad = torch.randn_like(weight)
                optimizer.step()
        data, law = open_record(tmp_path / "a")["rows"].isel(step=-1), optimizer.readout()["rows"]
        in_float32 = law.discrete.free.float().double() - law.initial
        lost = 0.0
        for name, prediction in (("discrete", law.discrete), ("flow", law.flow)):
            part, forced = prediction.free - law.initial, prediction.forced
            assert 0 < part.abs().max() < 1e-8 * law.charge.max()
            lost = max(lost, float(((in_float32 - part) / part).abs().max()))
            exact: Any = {"rtol": 1e-6, "atol": 1e-15}  # the readout itself is a difference of float64
            np.testing.assert_allclose(data[f"{name}_decay"], part, **exact)
            np.testing.assert_allclose(data[f"{name}_free"] - data.initial, part, **exact)
            np.testing.assert_allclose(data[f"{name}_forced"], forced, **exact)
        assert lost > 0.1, "so small that float32 of the free term loses it"
        np.testing.assert_allclose(data.discrete_defect, law.discrete.defect, rtol=1e-6, atol=1e-15)
        if law.growth is not None:
            np.testing.assert_allclose(data.decayed, law.discrete.free - law.initial, **exact)
            np.testing.assert_allclose(data.growth, law.growth, **exact)
            np.testing.assert_allclose(data.transport, law.transport, **exact)


def test_samples_of_one_step_keep_four_digits(tmp_path: Path) -> None:
    optimizer: Any = SmallSGD()
    optimizer.offset = 1 / 3
    kept = {}
    choices: dict[str, dict[str, Any]] = {"default": {}, "asked": {"dtype": {"angular_update": "float32"}}}
    for name, options in choices.items():
        with Recorder(optimizer, tmp_path / name, **options):
            pass
        kept[name] = open_record(tmp_path / name)["head"].angular_update[0]
    exact = optimizer.readout()["head"].angular_update
    np.testing.assert_array_equal(kept["asked"], exact.float())
    np.testing.assert_allclose(kept["default"], exact, rtol=2.0**-14)
    bits = kept["default"].to_numpy().astype(np.float32).view(np.uint32)
    assert not (bits & 0x3FF).any()
    odd = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4e38, -1e-45, 1.0], np.float32)
    np.testing.assert_allclose(_rounded(odd, 13), odd, rtol=2.0**-14, atol=2e-39)
    np.testing.assert_array_equal(np.signbit(_rounded(odd, 13)), np.signbit(odd))


@pytest.mark.parametrize("dtype", ["float64", torch.float64, dict.fromkeys(SERIES, "float64"), np.dtype("float64")])
def test_everything_in_double_precision(tmp_path: Path, dtype: Any) -> None:
    optimizer: Any = SmallSGD()
    with Recorder(optimizer, tmp_path / "a", series="all", dtype=dtype) as recorder:
        train(optimizer, 2)
    assert recorder.series == dict.fromkeys(SERIES, "float64")
    for name, law in optimizer.readout().items():
        data = open_record(tmp_path / "a")[name]
        for series, how in SERIES.items():
            np.testing.assert_array_equal(data[series][-1], how.read(law), err_msg=series)


def test_chosen_series(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3, series=["angular_update", "charge", "sq_g"], dtype={"sq_g": "float64"})
    record = open_record(path)
    assert record.recorded == {"charge": "float64", "sq_g": "float64", "angular_update": "float32"}
    assert record.series == ("charge", "sq_g", "angular_update")
    assert {*record["head"]} == {*record.series, "initial"}
    assert {folder.name for folder in path.iterdir()} >= {"charge", "sq_g", "angular_update"}
    assert not (path / "residual").exists()
    with pytest.raises(ValueError, match=r"has no 'residual'; it has to be asked for: Recorder.*'residual'"):
        record.read("head", ["residual"])
    with pytest.raises(ValueError, match=r"has no 'angular_updates'; there are: charge, sq_g, angular_update"):
        record.read("head", ["angular_updates"])


def test_terms_without_a_budget(tmp_path: Path) -> None:
    series = ("charge", "discrete_forced", "discrete_total")
    record = open_record(recorded(tmp_path / "a", 3, series=series))
    found = ("charge", "discrete_free", "discrete_decay", "discrete_forced", "discrete_total", "residual")
    assert record.series == found
    data = record["head"]
    np.testing.assert_array_equal(data.discrete_free, data.discrete_total - data.discrete_forced)
    np.testing.assert_array_equal(data.residual, data.charge - data.discrete_total)


def test_what_follows_is_in_an_order_that_can_be_computed() -> None:
    for recorded_series in (DEFAULT, BEFORE, FIRST_SERIES, ("charge", "residual"), (), tuple(SERIES)):
        known: set[str] = set()
        for name, terms in derivations(recorded_series).items():
            assert (name in recorded_series) == (not terms)
            assert {term for _, term in terms} <= known | {INITIAL}
            known.add(name)
        assert known >= {*recorded_series}
    assert {*derivations(BEFORE, ["discrete_forced"])} == {
        "charge",
        "residual",
        "discrete_free",
        "discrete_total",
        "discrete_forced",
    }
    assert {*derivations(DEFAULT, ["discrete_free", "residual"])} == {
        "discrete_decay",
        "discrete_free",
        "discrete_defect",
        "rounding",
        "residual",
    }
    assert {*derivations(DEFAULT)} >= {*derivations(BEFORE)} >= {*derivations(FIRST_SERIES)} & {*derivations(BEFORE)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series": ["charge", "chrage"]}, r"series: there is no series 'chrage'; did you mean 'charge'"),
        ({"series": []}, "series: is empty"),
        ({"matrices": "x"}, "matrices: must be True or False, got 'x'"),
        ({"dtype": "float16"}, "dtype: must be 'float32' or 'float64', got 'float16'"),
        ({"dtype": {"charge": "int"}}, "dtype: must be 'float32' or 'float64' for 'charge', got 'int'"),
        ({"dtype": {"chrage": "float32"}}, "dtype: there is no series 'chrage'"),
        ({"series": ["charge"], "dtype": {"growth": "float32"}}, "dtype: has 'growth', which is not among the series"),
    ],
)
def test_choices_that_cannot_be_made(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(fake(), tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_rule_without_growth_records_none(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    norms = [Norm("rows", [Part("weight", axis=0)])]
    for make, has_growth in ((nperf.SGD, False), (nperf.AdamW, True)):
        optimizer: Any = make(net.named_parameters(), lr=0.1, symmetries=norms)
        path = tmp_path / make.__name__
        with Recorder(optimizer, path):
            net(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        assert ({"growth", "transport"} <= {*open_record(path).series}) == has_growth


# --- resume


@pytest.mark.parametrize("choice", [{}, {"series": ["charge", "rounding"]}, {"series": "all", "dtype": "float64"}])
def test_a_record_is_resumed_with_its_own_series(tmp_path: Path, choice: dict[str, Any], eager: None) -> None:
    optimizer, path = fake(), tmp_path / "a"
    for again in (choice, {}, choice):
        with Recorder(optimizer, path, exists="resume", **again):
            train(optimizer, 3)
    np.testing.assert_equal(contents(path), contents(recorded(tmp_path / "whole", 9, **choice)))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"series": ["charge"]}, r"series: .* records charge, rounding, and exists='resume' cannot .* to charge;"),
        ({"series": "all"}, "series: .* leave it out to go on as the record is"),
        ({"dtype": "float32"}, "dtype: .* records 'charge' in float64, and exists='resume' cannot .* to float32"),
        ({"dtype": {"rounding": "float64"}}, "dtype: .* records 'rounding' in float32"),
    ],
)
def test_another_choice_is_no_resume(tmp_path: Path, choice: dict[str, Any], message: str) -> None:
    path = recorded(tmp_path / "a", 3, series=["charge", "rounding"])
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message):
        Recorder(fake(), path, exists="resume", **choice)
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- a part of a record


@pytest.fixture
def files_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Chunks that are read."""
    read: list[Path] = []
    load = Coding.load

    def loading(self: Coding, path: Path, *rest: Any) -> Any:
        read.append(path)
        return load(self, path, *rest)

    monkeypatch.setattr(Coding, "load", loading)
    return read


def test_one_symmetry_is_read_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_read: list[Path]
) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)  # chunks of 16 rows
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_GROUPS", 2)
    monkeypatch.setattr(noetherperf.record.layout, "CHUNKS_WIDE", 16)
    record = open_record(recorded(tmp_path / "a", 99))
    whole = record["fc1->fc2"]
    files_read.clear()
    data = record.read("fc1->fc2", ["charge", "discrete_budget"])
    assert {file.relative_to(record.path).parts[0] for file in files_read} == {"charge", "rounding", "time"}
    chunks = [file for file in files_read if "time" not in file.parts]
    assert {file.name for file in chunks} == {"2", "3"}  # groups 5 to 7 of 8
    assert len(chunks) == 2 * 2 * 7
    assert [*data] == ["initial", "charge", "discrete_budget"]
    xr.testing.assert_identical(data, whole[[*data]])
    files_read.clear()
    part = record.read("head", ["growth"], rows=slice(20, 80, 40))
    assert part.step.values.tolist() == [20, 60]
    of_growth = [file.relative_to(record.path).as_posix() for file in files_read if "time" not in file.parts]
    assert sorted(of_growth) == [f"growth/c/{row}/{column}" for row in (1, 3) for column in (0, 1)]
    np.testing.assert_array_equal(part.growth, record["head"].growth[[20, 60]])


def test_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    record = open_record(recorded(tmp_path / "a", 50))
    for rows in (slice(None), slice(7, None, 3), slice(40, 5, -9), slice(3, 3), slice(-1, None), slice(16, 32, 16)):
        xr.testing.assert_identical(record.read("head", rows=rows), record["head"].isel(step=rows))


@pytest.mark.parametrize(("n_groups", "width"), [(1, 1), (64, 64), (65, 64), (1024, 64), (5377, 337)])
def test_chunks_are_as_narrow_as_can_be_without_many_files(n_groups: int, width: int) -> None:
    kind = noetherperf.record.layout.KINDS["charge"]
    assert noetherperf.record.layout.chunk_width(kind, (n_groups,)) == (width,)
    assert -(-n_groups // width) <= 16 or width == 64


# --- logged values


def test_logged_values(tmp_path: Path, eager: None) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a", every=2, probes={"one": lambda: 1.0}) as recorder:
        for step in range(1, 7):
            recorder.log(loss=torch.tensor(step / 2, requires_grad=True))
            if step == 4:
                recorder.log({"validation/loss → %": np.float32(0.25)}, accuracy=1)
            optimizer.step()
    record = open_record(tmp_path / "a")
    assert list(record.probes) == ["one", "loss", "validation/loss → %", "accuracy"]
    np.testing.assert_array_equal(record.probes["loss"], [np.nan, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(record.probes["validation/loss → %"], [np.nan, np.nan, 0.25, np.nan])
    np.testing.assert_array_equal(record.probes["accuracy"], [np.nan, np.nan, 1.0, np.nan])
    assert record.probes["loss"].name == "loss"
    assert xr.open_zarr(tmp_path / "a", chunks=None).attrs["logged"] == ["loss", "validation/loss → %", "accuracy"]


def test_logged_values_are_resumed(tmp_path: Path) -> None:
    path, optimizer = tmp_path / "a", fake()
    for name in ("loss", "accuracy", "loss"):
        with Recorder(optimizer, path, exists="resume") as recorder:
            recorder.log({name: float(optimizer.step_count)})
            train(optimizer, 2)
    probes = open_record(path).probes
    np.testing.assert_array_equal(probes["loss"], [np.nan, 0, np.nan, np.nan, np.nan, 4, np.nan])
    np.testing.assert_array_equal(probes["accuracy"], [np.nan] * 3 + [2] + [np.nan] * 3)


def test_many_names_logged_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eager: None) -> None:
    monkeypatch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a") as recorder:
        train(optimizer, 40)
        recorder.log({f"value {n}": n for n in range(40)})
        train(optimizer, 2)
    probes = open_record(tmp_path / "a").probes  # a missing chunk would be told
    assert [float(probes[f"value {n}"][41]) for n in range(40)] == list(range(40))
    assert all(np.isfinite(values).sum() == 1 for values in probes.values())


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_a_logged_value_is_that_of_the_call(tmp_path: Path, make: Callable[[int], Any]) -> None:
    """A running sum goes on before the row is taken."""
    optimizer, total = fake(), make(1)
    with Recorder(optimizer, tmp_path / "a") as recorder:
        total += 5
        recorder.log(total=total)
        total *= 0
        train(optimizer, 1)
    np.testing.assert_array_equal(open_record(tmp_path / "a").probes["total"], [np.nan, 5.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": torch.ones(2)}, r"log: 'loss' must be a number .* got tensor"),
        ({"loss": "0.5"}, "log: 'loss' must be a number .* got '0.5'"),
        ({"loss": None}, "log: 'loss' must be a number .* got None"),
        ({"loss": 10**400}, "log: 'loss' must be a number .* got 1000"),
        ({"loss": torch.ones((), device="meta")}, "log: 'loss' must be a number .* got tensor"),
        ({"one": 1.0}, "log: 'one' is the name of a probe"),
        ({3: 1.0}, "log: names must be text, got 3"),
    ],
)
def test_what_cannot_be_logged(tmp_path: Path, values: Any, message: str) -> None:
    optimizer = fake()
    with Recorder(optimizer, tmp_path / "a", probes={"one": lambda: 1.0}) as recorder:
        with pytest.raises(ValueError, match=message):
            recorder.log(values)
        train(optimizer, 2)
    assert list(open_record(tmp_path / "a").probes) == ["one"]


# ---- matrices


def attention(path: Path, *, matrices: bool, n_steps: int = 3, **options: Any) -> Any:
    """A record of a Balance of two heads of four units, beside a norm."""
    torch.manual_seed(0)
    q, k = (torch.nn.Parameter(torch.randn(8, 5)) for _ in range(2))
    rows = [Part("q", axis=0)], [Part("k", axis=0)]
    symmetries = [Norm("rows", rows[0]), nperf.Balance("attn", *rows, size=4)]
    optimizer = nperf.SGD([("q", q), ("k", k)], lr=0.1, weight_decay=0.1, symmetries=symmetries)
    x = torch.randn(6, 5)
    with Recorder(optimizer, path, matrices=matrices, **options):
        for _ in range(n_steps):
            optimizer.zero_grad()
            heads = [(x @ w.T).unflatten(-1, (2, 4)) for w in (q, k)]
            torch.einsum("ihu,jhu->hij", *heads).square().mean().backward()
            optimizer.step()
    return optimizer


def test_a_balance_comes_back_with_its_dimensions(tmp_path: Path) -> None:
    optimizer = attention(tmp_path / "a", matrices=True)
    record, law = open_record(tmp_path / "a"), optimizer.readout().balances["attn"]
    assert record.balances == {"attn": law.symmetry}
    assert list(record) == ["rows"]
    data = record.balance("attn")
    last = data.isel(step=-1)
    assert dict(data.sizes) == {"step": 4, "block": 2, "unit": 4, "other_unit": 4}
    assert data.attrs == {"name": "attn", "kind": "balance", "closed": True, "reason": ""}
    exact = {"charge": law.charge, "predicted_charge": law.discrete.total, "eigenvalues": law.eigenvalues}
    for name, expected in (exact | {"predicted_eigenvalues": law.predicted_eigenvalues}).items():
        np.testing.assert_array_equal(last[name], expected)
    for name, matrix in {"residual": law.residual, "rounding": law.rounding}.items():
        np.testing.assert_allclose(last[name], matrix.square().sum((1, 2)).sqrt(), rtol=1e-12)
    free, forced = (x.square().sum((1, 2)).sqrt() for x in (law.discrete.free, law.discrete.forced))
    np.testing.assert_allclose(
        last["size"], torch.maximum(law.charge.square().sum((1, 2)).sqrt(), free + forced), rtol=1e-12
    )
    part = record.balance("attn", ["eigenvalues"], rows=slice(1, None, 2))
    assert part.step.values.tolist() == [1, 3]
    np.testing.assert_array_equal(part.eigenvalues, data.eigenvalues[[1, 3]])


def test_what_a_balance_has_not(tmp_path: Path) -> None:
    attention(tmp_path / "a", matrices=False)
    record = open_record(tmp_path / "a")
    assert "charge" not in record.balance("attn")
    with pytest.raises(ValueError, match=r"no 'charge'; matrices have to be asked for: Recorder\(..., matrices=True\)"):
        record.balance("attn", ["charge"])
    with pytest.raises(ValueError, match="no 'eigenvalue'; there are: eigenvalues"):
        record.balance("attn", ["eigenvalue"])
    with pytest.raises(KeyError, match=r"no Balance 'attm' is recorded .* there are: attn"):
        record.balance("attm")
    with pytest.raises(KeyError, match=r"'attn' is a Balance, whose charges are matrices: record.balance\('attn'\)"):
        record["attn"]
    assert open_record(recorded(tmp_path / "b", 1)).balances == {}


def test_names_of_a_balance_are_taken(tmp_path: Path) -> None:
    message = "'attn: norms' is the name under which the Balance 'attn' is recorded; choose another"
    with pytest.raises(ValueError, match=f"probes: {message}"):
        attention(tmp_path / "a", matrices=False, probes={"attn: norms": lambda: 1.0})
    assert not (tmp_path / "a").exists()
    optimizer = attention(tmp_path / "b", matrices=False, probes={"attn: charge": lambda: 1.0})
    with Recorder(optimizer, tmp_path / "c") as recorder, pytest.raises(ValueError, match=f"log: {message}"):
        recorder.log({"attn: norms": 1.0})


@pytest.mark.parametrize("shapes", [None, [], [[2, 3]], [[2]], [[-2, 4]], [["2", 4]], [[2, 4], [2, 4]]])
def test_made_up_shapes_of_a_balance_are_damage(tmp_path: Path, shapes: Any) -> None:
    attention(tmp_path / "a", matrices=True, n_steps=1)
    root = json.loads((tmp_path / "a" / "zarr.json").read_text())
    root["attributes"]["balance_shapes"] = shapes
    (tmp_path / "a" / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ValueError, match="is damaged"):
        open_record(tmp_path / "a").balance("attn")


@pytest.mark.parametrize("named", [True, False])
def test_a_run_that_began_with_other_matrices_is_another(tmp_path: Path, named: bool) -> None:
    def run(scale: float) -> Any:
        torch.manual_seed(0)
        q, k = (torch.nn.Parameter(scale * torch.randn(8, 5)) for _ in range(2))
        balance = nperf.Balance("attn", [Part("q", axis=0)], [Part("k", axis=0)], size=4)
        return nperf.SGD([("q", q), ("k", k)], lr=0.1, symmetries=[balance])

    path = tmp_path / "a"
    with Recorder(optimizer := run(1.0), path):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    if not named:  # as of ranks after the first
        root = json.loads((path / "zarr.json").read_text())
        root["attributes"]["measurement"] = None
        (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ValueError, match="is of another measurement"):
        Recorder(run(2.0), path, exists="resume")
    assert open_record(path).steps.tolist() == [0, 1]
    Recorder(run(1.0), path, exists="resume").close()


# --- asking wrongly


def test_one_series_may_be_asked_for_by_its_name(tmp_path: Path) -> None:
    record = open_record(recorded(tmp_path / "a", 3))
    xr.testing.assert_identical(record.read("head", "charge"), record.read("head", ["charge"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"series": []}, "series: is empty; leave it out"),
        ({"series": "chrage"}, "has no 'chrage'; did you mean 'charge'"),
        ({"series": [3]}, "has no 3; there are"),
        ({"rows": 3}, r"rows: must be a slice of positions in `steps`, such as slice\(0, None, 10\), got 3"),
        ({"rows": [1, 2]}, r"rows: must be a slice .* got \[1, 2\]"),
        ({"rows": slice(0.5, 2)}, "rows: must be a slice .* got slice"),
        ({"rows": slice(0, 2, 0)}, "rows: a slice must not have the step 0"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    record = open_record(recorded(tmp_path / "a", 3))
    with pytest.raises(ValueError, match=message):
        record.read("head", **arguments)


# --- what is on disk


def test_arrays_say_what_they_are(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a", 3, series="all")
    plain = xr.open_zarr(path, chunks=None)
    for name, series in SERIES.items():
        assert plain[name].attrs == {"long_name": series.meaning, "formula": series.formula, "units": series.units}
        assert plain[name].attrs["units"] == ("rad" if name == "angular_update" else "1")
    data = open_record(recorded(tmp_path / "b", 3))["head"]
    assert data.discrete_forced.attrs["formula"] == "forced"
    assert data.rounding.attrs["formula"] == "charge - discrete_budget"


def test_a_recorder_tells_its_size(tmp_path: Path) -> None:
    n = sum(N_GROUPS)
    with Recorder(fake(), tmp_path / "a", every=5, series=["charge", "growth"]) as recorder:
        others = 8 * (2 + 6)  # step, time, hyperparameters
        assert recorder.bytes_per_row == n * (8 + 4) + others
        assert "2 series every 5 steps, 0.2 kB a row" in repr(recorder)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
@pytest.mark.parametrize("codecs", CHAINS)
def test_any_chain_of_codecs_comes_back(tmp_path: Path, dtype: str, codecs: tuple[str, ...]) -> None:
    if codecs == ("gzip",):
        return  # only read, of records that other tools rewrote
    values = np.random.default_rng(0).standard_normal((37, 5)).cumsum(0) * 1e3
    for transpose in ((), ("transpose",)):
        coding = Coding(dtype, (*transpose, "bytes", *codecs, "crc32c"), "<")
        data = coding.encode(values.astype(dtype), b"")
        (tmp_path / "c").write_bytes(data)
        np.testing.assert_array_equal(coding.load(tmp_path / "c", values.shape, b""), values.astype(dtype))
        for changed in (data[:-5] + data[-4:], data[:9] + bytes([data[9] ^ 1]) + data[10:]):
            (tmp_path / "c").write_bytes(changed)
            with pytest.raises(Damaged):
                coding.load(tmp_path / "c", values.shape, b"")


# --- the version before


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    shutil.unpack_archive(VERSION_1, tmp_path)
    return tmp_path / "record"


def version_1_training() -> tuple[torch.nn.Module, nperf.SGD, Callable[[], None]]:
    """The training that `record_version_1.zip` is a record of: 6 steps, a row after every second one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    symmetries = [
        Translation("head", [Part("2.weight", axis=1)]),
        Rescale("unit → unit", [Part("0.weight", 0), Part("0.bias", 0)], [Part("2.weight", 1)]),
        Scale("no symmetry", [Part("0.weight", axis=0)]),
    ]
    optimizer = nperf.SGD(
        net.named_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, symmetries=symmetries, backend="reference"
    )

    def step() -> None:
        draw = torch.Generator().manual_seed(optimizer.step_count)
        optimizer.zero_grad()
        net(torch.randn(5, 3, generator=draw).double()).logsumexp(1).sum().backward()
        optimizer.step()

    return net, optimizer, step


def test_a_record_of_version_1_opens(version_1: Path) -> None:
    record = open_record(version_1)
    assert record.attrs["noetherperf_record"] == 1
    assert record.recorded == dict.fromkeys(FIRST_SERIES, "float64")
    assert {*record.series} == {*SERIES} - {"relative_update"}
    _, optimizer, step = version_1_training()
    readouts = [optimizer.readout()]
    for _ in range(6):
        step()
        readouts.append(optimizer.readout())
    assert record.steps.tolist() == [0, 2, 4, 6]
    for name, data in record.items():
        laws = [readout[name] for readout in readouts[::2]]
        for series in record.series:
            values = [SERIES[series].read(law) for law in laws]
            expected = [
                torch.full_like(law.charge, torch.nan) if x is None else x for x, law in zip(values, laws, strict=True)
            ]
            np.testing.assert_allclose(data[series], torch.stack(expected), rtol=1e-12, atol=1e-14, err_msg=series)
        assert relative_error(data, "budget").max() < 1e-14
        assert data.residual.attrs["units"] == "1"
    np.testing.assert_array_equal(record.probes["loss"], [0.0, 2.0, 4.0, 6.0])
    assert record.probes["w"].shape == (4, 2)


def test_a_record_of_version_1_is_resumed(version_1: Path) -> None:
    _, optimizer, step = version_1_training()
    for _ in range(4):
        step()
    probes: dict[str, Callable[[], Any]] = {"loss": lambda: optimizer.step_count, "w": lambda: torch.ones(2)}
    before = open_record(version_1)
    optimizer.load_state_dict(with_name(optimizer.state_dict(), before.attrs["measurement"]))
    with pytest.raises(ValueError, match=r"series: .* cannot change that to charge"):
        Recorder(optimizer, version_1, 2, exists="resume", probes=probes, series=["charge"])
    with Recorder(optimizer, version_1, 2, exists="resume", probes=probes) as recorder:
        with pytest.raises(ValueError, match="log: this record was begun by an earlier version"):
            recorder.log(accuracy=1.0)
        for _ in range(4):
            step()
    record = open_record(version_1)
    assert record.steps.tolist() == [0, 2, 4, 6, 8]
    assert json.loads((version_1 / "zarr.json").read_text())["attributes"]["noetherperf_record"] == 1
    law = optimizer.readout()["head"]
    np.testing.assert_array_equal(record["head"].charge[-1], law.charge)
    np.testing.assert_array_equal(record["head"].discrete_forced[-1], law.discrete.forced)
    np.testing.assert_array_equal(record["head"].sq_g[-1], law.moments["sq_g"])


def with_name(state: dict[str, Any], name: str) -> dict[str, Any]:
    """A checkpoint, as if it were of the measurement of this name."""
    return {**state, "measurement": {**state["measurement"], "id": name}}
