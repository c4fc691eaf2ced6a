"""A readout's table: its rows are what plain loops say, its verdicts what was done to the network, and it prints."""

import dataclasses
import json
import math
import pickle
import re
import statistics
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_readout_tells import SYMMETRIES, draw_gradients, net
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf.common.table import ReportTable, as_text
from noetherperf.integrations.tensorboard import QUANTITIES, add_readout
from noetherperf.measure import table
from noetherperf.measure.logged import quantiles
from noetherperf.measure.printed import COLUMNS, ReadoutTable, cells
from noetherperf.measure.table import Row, row, rows
from noetherperf.symmetry import Part, Symmetry

# ---- rows ------------------------------------------------------------------------------------------------------------


def stepped(kind: Any, n_steps: int = 5, **options: Any) -> nperf.Readout:
    """A readout after some steps along random gradients, which break every symmetry."""
    model = net()
    optimizer = kind(model.named_parameters(), symmetries=SYMMETRIES, **options)
    for step in range(n_steps):
        draw_gradients(model, step)
        optimizer.step()
    readout: nperf.Readout = optimizer.readout()
    return readout


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (nperf.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "AdamW": (nperf.AdamW, {"lr": 0.01, "weight_decay": 1.0}),
    "Adam, open": (nperf.Adam, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_what_a_loop_over_groups_says(name: str) -> None:
    kind, options = KINDS[name]
    readout = stepped(kind, **options)
    found = {row.name: row for row in rows(readout)}
    assert found.keys() == readout.keys()
    for law in readout.values():
        of, n = found[law.name], len(law.charge)
        parts: dict[str, list[float]] = {part: [] for part in ("decay", "growth", "defect", "rounding")}
        did = 0.0
        for i in range(n):
            group = {
                "decay": law.discrete.free[i] - law.initial[i],
                "growth": law.discrete.forced[i],
                "defect": law.discrete.defect[i],
                "rounding": law.charge[i] - law.discrete.budget[i],
            }
            if not law.closed:
                assert law.growth is not None
                assert law.transport is not None
                group |= {"decay": torch.zeros(()), "growth": law.growth[i], "defect": law.transport[i]}
            for part, x in group.items():
                parts[part].append(float(x))
            assert sum(map(float, group.values())) == pytest.approx(float(law.charge[i] - law.initial[i]), abs=1e-13)
            did += sum(abs(float(group[part])) for part in ("decay", "growth", "defect"))
        for part, values in parts.items():
            spread = getattr(of, part)
            assert spread.median == pytest.approx(statistics.median(values), abs=1e-13)
            assert spread.size == pytest.approx(statistics.median(map(abs, values)), abs=1e-13)
            assert (spread.lowest, spread.highest) == pytest.approx((min(values), max(values)), abs=1e-13)
        assert of.charge.median == statistics.median(law.charge.tolist())
        assert of.change.size == pytest.approx(statistics.median((law.charge - law.initial).abs().tolist()))
        assert of.defect_share == pytest.approx(sum(map(abs, parts["defect"])) / did)
        assert (of.kind, of.n_groups, of.closed, of.reason) == (law.symmetry.kind, n, law.closed, law.reason)
        if law.symmetry.kind != "translation":
            assert of.angular_update == statistics.median(law.angular_update.tolist())
        if law.closed:
            sizes = [
                max(abs(float(law.charge[i])), abs(float(law.initial[i])), abs(float(free)) + abs(float(forced)))
                for i, (free, forced) in enumerate(zip(law.discrete.free, law.discrete.forced, strict=True))
            ]
            assert of.held_to == pytest.approx(law.residual.abs().max().item() / statistics.mean(sizes), rel=1e-9)
        else:
            assert math.isnan(of.held_to)


def test_rows_are_data() -> None:
    (first, *_) = rows(stepped(nperf.SGD, lr=0.1))
    data = json.loads(json.dumps(dataclasses.asdict(first)))
    assert data["charge"]["median"] == first.charge.median
    assert data["verdict"] == first.verdict


def test_the_worst_comes_first() -> None:
    found = rows(stepped(nperf.SGD, lr=0.1, weight_decay=0.1))
    shares = [row.defect_share for row in found]
    assert shares == sorted(shares, reverse=True)
    assert found != rows(stepped(nperf.SGD, n_steps=0, lr=0.1))


def pair_of(dtype: torch.dtype = torch.float64, between: nn.Module | None = None, **options: Any) -> nperf.Readout:
    """SGD's readout of a Balance, of blocks of three units, between two linear layers, and of a Rescale after it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), between or nn.Identity(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).to(
        dtype
    )
    pair = nperf.Balance("pair", [Part("0.weight", 0), Part("0.bias", 0)], [Part("2.weight", 1)], size=3)
    unit = nperf.Rescale("unit", [Part("2.weight", 0), Part("2.bias", 0)], [Part("4.weight", 1)])
    optimizer = nperf.SGD(net.named_parameters(), symmetries=[unit, pair], **options)
    x, y = torch.randn(7, 5, dtype=dtype), torch.arange(7) % 3
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return optimizer.readout()


def test_the_row_of_a_balance_is_what_its_eigenvectors_say() -> None:
    readout = pair_of(between=nn.Tanh(), lr=0.1, momentum=0.9, weight_decay=0.01)
    found = {row.name: row for row in rows(readout)}
    of, law = found["pair"], readout.balances["pair"]
    values: dict[str, list[float]] = {part: [] for part in ("charge", "decay", "growth", "defect", "rounding")}
    largest = 0.0
    for block in range(2):
        _, vectors = np.linalg.eigh(law.charge[block].numpy())
        matrices = {
            "charge": law.charge,
            "decay": law.discrete.free - law.initial,
            "growth": law.discrete.forced,
            "defect": law.discrete.defect,
            "rounding": law.rounding,
        }
        for v in vectors.T:
            for part, matrix in matrices.items():
                values[part].append(float(v @ matrix[block].numpy() @ v))
            largest = max(largest, float(np.linalg.norm(law.residual[block].numpy() @ v)))
    sizes = [abs(x) for x in values["charge"]]
    assert (of.kind, of.n_groups, of.closed) == ("balance", 6, True)
    for part in ("charge", "decay", "growth", "defect"):
        spread = getattr(of, part)
        expected = (statistics.median(values[part]), min(values[part]), max(values[part]))
        assert (spread.median, spread.lowest, spread.highest) == pytest.approx(expected, abs=1e-12), part
    assert of.rounding.size == 0.0  # in float64 it is below what can be resolved
    assert largest / max(sizes) < of.held_to <= largest / statistics.mean(sizes) * (1 + 1e-9)
    assert of.verdict.startswith("the gradient breaks it")
    assert found["pair"].defect_share > 0.1
    assert [row.name for row in rows(readout)] == ["pair", "unit"], "the worst first"
    assert "balance" in str(readout)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_balance_of_which_a_step_was_not_whole_is_open_not_diverged(weight_decay: float) -> None:
    torch.manual_seed(0)
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 3))
    pair = nperf.Balance("pair", [Part("a", 0)], [Part("b", 1)])
    optimizer = nperf.AdamW([("a", a), ("b", b)], weight_decay=weight_decay, symmetries=[pair])
    for step in range(3):
        a.grad, b.grad = torch.randn(3, 4), None if step == 1 else torch.randn(5, 3)
        optimizer.step()
    (found,) = rows(optimizer.readout())
    assert (found.verdict, found.closed) == ("open", False)
    assert math.isfinite(found.charge.median)


def test_a_balance_that_holds_or_has_diverged_says_so() -> None:
    held = {row.name: row for row in rows(pair_of(lr=0.1, weight_decay=0.01))}["pair"]
    assert held.verdict.startswith("holds to ")
    assert held.held_to < 1e-13
    assert "float32" not in held.verdict
    lost = {row.name: row for row in rows(pair_of(torch.float32, lr=1e30))}["pair"]
    assert lost.verdict == "NaN or infinite in all 6 groups"
    assert math.isnan(lost.charge.median)


# ---- verdicts: from arrays -------------------------------------------------------------------------------------------


def arrays(**given: float | Sequence[float]) -> dict[str, np.ndarray]:
    """Two groups with a charge of 1 and −1 at first, and the change that is given; nothing else happened."""
    parts = {name: np.array(given.pop(name, 0.0)) * np.ones(2) for name in ("decay", "forced", "defect", "rounding")}
    initial = np.array([1.0, -1.0]) if "initial" not in given else np.array(given.pop("initial")) * np.ones(2)
    free = initial + parts["decay"]
    budget = free + parts["forced"] + parts["defect"]
    values = {
        "initial": initial,
        "discrete_free": free,
        "discrete_forced": parts["forced"],
        "discrete_defect": parts["defect"],
        "discrete_budget": budget,
        "charge": budget + parts["rounding"],
    }
    return values | {name: np.array(x) * np.ones(2) for name, x in given.items()}


def verdict(
    rule: str = "sgd",
    kind: str = "scale",
    *,
    step: int = 10,
    reason: str = "",
    dtypes: Sequence[str] = ("float32",),
    eps_share: float = math.nan,
    **given: float | Sequence[float],
) -> str:
    return row(
        "x", kind, arrays(**given), rule=rule, step=step, reason=reason, dtypes=dtypes, eps_share=eps_share
    ).verdict


def test_a_law_that_holds() -> None:
    assert verdict(forced=0.5, defect=1e-7) == "holds to 7e-8"  # of charges of 1.5
    assert verdict(forced=0.5, rounding=-1e-7) == "holds to 7e-8"
    assert verdict(forced=0.5) == "holds to 2e-16"
    assert verdict(forced=1e-9, rounding=1e-7) == "holds to 1e-7"  # more than the change, but rounding of float32
    assert verdict(forced=0.5, defect=(4e-4, -4e-4)).startswith("holds to 3e-4")


@pytest.mark.parametrize(
    ("change", "dtypes", "expected"),
    [
        ({"decay": -0.1, "rounding": 0.009}, ["bfloat16"], "bfloat16 lost 9 % of the decay"),
        ({"decay": -0.1, "rounding": -0.009}, ["bfloat16"], "bfloat16 added 9 % of the decay"),
        ({"forced": 0.1, "rounding": -0.095}, ["float16"], "float16 lost 95 % of the growth"),
        ({"decay": (0.05, -0.05), "forced": 0.05, "rounding": -0.01}, [], "rounding lost 10 % of the change"),
        ({"forced": 0.1, "rounding": -0.009}, ["bfloat16", "float32"], "rounding lost 9 % of the growth"),
        ({"decay": -0.1, "rounding": 0.106}, ["bfloat16"], "bfloat16 lost 106 % of the decay"),
        ({"decay": -0.1, "rounding": 0.26}, ["bfloat16"], "bfloat16 moved it 2.6 times as far as the steps"),
        ({"rounding": 0.1}, ["float32"], "changed, but not by steps"),
    ],
)
def test_a_verdict_on_rounding(change: dict[str, Any], dtypes: list[str], expected: str) -> None:
    assert verdict(dtypes=dtypes, **change) == expected
    assert verdict(dtypes=dtypes, reason="a part has another lr", **change) == f"{expected}; open"


@pytest.mark.parametrize(
    ("rule", "kind", "more", "expected"),
    [
        ("sgd", "scale", {}, "the gradient breaks it"),
        ("sgd", "scale", {"eps_share": 0.95}, "eps of a normalisation"),
        ("sgd", "scale", {"eps_share": 0.5}, "the gradient breaks it"),
        ("adam", "scale", {}, "the steps break it"),  # nothing is known of the last gradient
        ("adam", "scale", {"relative_defect": 1e-7, "sq_g": 1.0}, "Adam's preconditioner"),
        ("adam", "scale", {"relative_defect": 0.0, "sq_g": 0.0}, "the steps break it"),
        ("adam", "scale", {"relative_defect": 1e-5, "angular_update": 0.01, "sq_g": 1.0}, "Adam's preconditioner"),
        (
            "adam",
            "scale",
            {"relative_defect": 1e-3, "angular_update": 0.01, "sq_g": 1.0},
            "the steps break it",
        ),
        (
            "adam",
            "rescale",
            {"relative_defect": 1e-5, "angular_update": 0.01, "sq_g": 1.0},
            "the steps break it",
        ),
        ("adam", "rescale", {"relative_defect": 1e-7, "sq_g": -1.0}, "Adam's preconditioner"),
        ("adam", "rescale", {"relative_defect": 1e-7, "sq_g": 1.0, "dtypes": ["bfloat16"]}, "the steps break it"),
        ("adam", "rescale", {"relative_defect": 1e-7, "sq_g": 1.0, "dtypes": []}, "the steps break it"),
        ("given", "translation", {"relative_defect": 1e-7, "sq_g": 1.0}, "the steps break it"),
    ],
)
def test_a_verdict_on_a_defect(rule: str, kind: str, more: dict[str, Any], expected: str) -> None:
    assert verdict(rule, kind, forced=0.88, defect=(0.12, -0.12), **more) == f"{expected}: 12 %"


def test_both_causes_are_named_the_larger_first() -> None:
    found = verdict(forced=0.9, defect=0.1, rounding=-0.4, dtypes=["bfloat16"])
    assert found == "bfloat16 lost 40 % of the growth; the gradient breaks it: 10 %"


def test_verdicts_on_what_is_no_law() -> None:
    nan = float("nan")
    assert verdict(step=0) == "no step yet"
    assert verdict() == "unchanged"
    assert verdict(forced=(nan, 1.0)) == "NaN or infinite in 1 of 2 groups"
    assert verdict(rounding=(math.inf, -math.inf)) == "NaN or infinite in all 2 groups"
    assert verdict(forced=1.0, reason="parts have other learning rates") == "open"
    norm: dict[str, Any] = {"kind": "norm", "reason": "no symmetry is claimed", "initial": 1.0}
    assert verdict(defect=0.123, **norm) == "grew by 12 %"
    assert verdict(decay=-0.004, **norm) == "shrank by 0.4 %"
    assert verdict(defect=2.5, **norm) == "grew to 3.5 times"
    assert verdict(defect=0.1, rounding=-0.05, **norm) == "float32 lost 50 % of the change; grew by 5 %"
    assert verdict(defect=0.1, **{**norm, "initial": 0.0}) == "grew from 0"
    assert verdict(defect=0.1, **{**norm, "initial": (1.0, -1.0)}) == "no claim"
    empty = {name: x[:0] for name, x in arrays(forced=1.0).items()}
    nothing = row("x", "scale", empty, rule="sgd", step=3)
    assert (nothing.verdict, nothing.n_groups) == ("no groups", 0)
    assert math.isnan(nothing.charge.median)
    one = {name: x[:1] for name, x in arrays(forced=nan).items()}
    assert row("x", "scale", one, rule="sgd", step=3).verdict == "NaN or infinite"


def test_without_a_law_growth_and_transport_split_the_change() -> None:
    values = arrays(forced=9.0, defect=-8.5, growth=0.2, transport=0.6)
    values |= {"charge": values["discrete_budget"]}
    found = row("x", "scale", values, rule="adam", step=3, reason="its weight decay has no law")
    assert found.growth.median == 0.2
    assert found.defect.median == 0.6
    assert found.decay.median == pytest.approx(-0.3)
    closed = row("x", "scale", values, rule="adam", step=3)
    assert (closed.growth.median, closed.defect.median, closed.decay.median) == (9.0, -8.5, 0.0)


# ---- verdicts: from trainings ----------------------------------------------------------------------------------------


def mlp(act: type[nn.Module] = nn.ReLU, eps: float = 1e-12, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 16, bias=False), nn.BatchNorm1d(16, eps=eps), nn.ReLU(), nn.Linear(16, 8), act()]
    return nn.Sequential(*layers, nn.Linear(8, 4)).to(dtype)


LAWS: tuple[Symmetry, ...] = (
    nperf.Scale("first", [Part("0.weight", 0)]),
    nperf.Rescale("hidden", [Part("3.weight", 0), Part("3.bias", 0)], [Part("5.weight", 1)]),
    nperf.Translation("softmax", [Part("5.weight", 1)]),
)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)), x[:, :4].argmax(1))


def trained(model: nn.Module, optimizer: Any, n_steps: int) -> nperf.Readout:
    for step in range(n_steps):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    readout: nperf.Readout = optimizer.readout()
    return readout


def verdicts(readout: nperf.Readout, **options: Any) -> dict[str, str]:
    return {row.name: row.verdict for row in readout.table(**options).rows}


def test_exact_laws_hold() -> None:
    model = mlp()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, symmetries=LAWS)
    assert set(verdicts(optimizer.readout()).values()) == {"no step yet"}
    for found in trained(model, optimizer, 60).table().rows:
        assert found.verdict.startswith("holds to ")
        assert float(found.verdict.removeprefix("holds to ")) < 1e-10


def test_what_breaks_a_law_is_found() -> None:
    """A GELU where a ReLU was claimed: that law and no other."""
    model = mlp(nn.GELU)
    found = verdicts(trained(model, nperf.SGD(model.named_parameters(), lr=0.1, symmetries=LAWS), 60))
    assert re.fullmatch(r"the gradient breaks it: \d+ %", found["hidden"])
    assert next(iter(found)) == "hidden"
    assert found["first"].startswith("holds to ")
    assert found["softmax"].startswith("holds to ")


def test_constraints_name_the_eps() -> None:
    model = mlp(eps=1e-3)
    readout = trained(model, nperf.SGD(model.named_parameters(), lr=0.1, symmetries=LAWS), 60)
    assert verdicts(readout)["first"].startswith("the gradient breaks it: ")

    def closure() -> Tensor:
        return loss_of(model, 1000)

    report = nperf.check_constraints(model, closure, LAWS, hessian=False, progress=False)
    found = verdicts(readout, constraints=report)
    assert found["first"].startswith("eps of a normalisation: ")
    assert found["softmax"].startswith("holds to ")


def test_adam_breaks_its_laws_and_its_gradients_do_not() -> None:
    model = mlp()
    found = verdicts(trained(model, nperf.AdamW(model.named_parameters(), lr=1e-2, symmetries=LAWS), 60))
    for verdict in found.values():
        assert re.fullmatch(r"Adam's preconditioner: \d+ %", verdict)
    model = mlp(nn.GELU)
    found = verdicts(trained(model, nperf.AdamW(model.named_parameters(), lr=1e-2, symmetries=LAWS), 60))
    assert re.fullmatch(r"the steps break it: \d+ %", found["hidden"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_loses_and_says_how_much(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    optimizer = nperf.AdamW(model.named_parameters(), lr=1e-4, weight_decay=0.0, symmetries=nperf.layers(model))
    readout = trained(model, optimizer, 60)
    found = verdicts(readout)
    if dtype == torch.float32:
        assert not any("lost" in verdict for verdict in found.values())
        return
    lost = {name: re.match(r"bfloat16 lost (\d+) % of the change; ", verdict) for name, verdict in found.items()}
    told = {name: int(match[1]) / 100 for name, match in lost.items() if match}
    assert len(told) >= 2
    for name, share in told.items():
        law = readout[name]
        assert law.growth is not None
        assert law.transport is not None
        assert share == pytest.approx((law.rounding.abs() / (law.growth.abs() + law.transport.abs())).item(), abs=0.006)


def test_a_write_that_nobody_saw_is_no_rounding() -> None:
    model = mlp()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.0, symmetries=LAWS)
    assert set(verdicts(trained(model, optimizer, 2)).values()) == {"unchanged"}
    dict(model.named_parameters())["0.weight"].data.mul_(1.5)  # raises no version counter
    found = verdicts(trained(model, optimizer, 1))
    assert found["first"] == "changed, but not by steps"
    assert found["hidden"] == "unchanged"


def test_open_laws_say_why() -> None:
    model = mlp()
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [(name, p) for name, p in parameters.items() if name != "5.weight"]},
        {"params": [("5.weight", parameters["5.weight"])], "lr": 0.01},
    ]
    readout = trained(model, nperf.SGD(groups, lr=0.1, symmetries=LAWS), 3)
    assert verdicts(readout)["hidden"] == "open"
    text = str(readout)
    assert f"open: hidden: {readout['hidden'].reason}" in text.replace("\n", " ")
    assert text.count("open:") == 1


def test_a_probe_has_a_table_too() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    probe = nperf.Probe(optimizer, LAWS, model.named_parameters())
    trained(model, SimpleNamespace(step=optimizer.step, readout=probe.readout), 20)
    assert all(verdict.startswith("holds to ") for verdict in verdicts(probe.readout()).values())


def test_training_that_diverged_has_a_table() -> None:
    model = mlp()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=LAWS)
    loss_of(model, 0).backward()
    gradient = dict(model.named_parameters())["0.weight"].grad
    assert gradient is not None
    gradient[3, 0] = float("nan")
    optimizer.step()
    first, *others = optimizer.readout().table().rows
    assert (first.name, first.verdict) == ("first", "NaN or infinite in 1 of 16 groups")
    assert math.isfinite(first.charge.highest)
    assert all(other.verdict.startswith("holds") for other in others)


def test_groups_without_elements_are_unchanged() -> None:
    parameters = {"hollow": nn.Parameter(torch.ones(3, 0)), "w": nn.Parameter(torch.ones(2, 2))}
    symmetries = [nperf.Scale(name, [Part(name, 0)]) for name in parameters]
    optimizer = nperf.SGD(parameters.items(), lr=0.1, symmetries=symmetries)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    readout = optimizer.readout()
    assert verdicts(readout) == {"hollow": "unchanged", "w": "unchanged"}
    assert " 2 " in str(readout)
    scalars = readout.scalars()
    assert scalars["w/abs_charge"] == 2.0
    assert scalars["hollow/abs_charge"] == 0.0


# ---- printing --------------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The cells of a table's rows, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and data.strip():
            self.rows[-1][-1] += data


def many(n: int, name: Callable[[int], str] = "s{}".format) -> nperf.Readout:
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    symmetries = [nperf.Scale(name(i), [Part("weight", 0)]) for i in range(n)]
    optimizer = nperf.SGD([("weight", weight)], lr=0.1, symmetries=symmetries)
    weight.grad = torch.randn(4, 3, dtype=torch.float64)
    optimizer.step()
    return optimizer.readout()


def test_a_readout_prints_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    model = mlp()
    readout = trained(model, nperf.SGD(model.named_parameters(), lr=0.1, symmetries=LAWS), 20)
    text = str(readout)
    title, heading, line, *lines = text.splitlines()
    assert title.startswith("Step 20: ")
    assert heading.split() == " ".join(COLUMNS).split()
    assert set(line) == {"─"}
    assert [line.split()[0] for line in lines] == [row.name for row in rows(readout)]
    for line, found in zip(lines, rows(readout), strict=True):
        assert line.split() == " ".join(cells(found)).split()
    assert max(map(len, text.splitlines())) <= 120
    assert repr(readout) == f"Readout(step=20, time={readout.time:g}, symmetries=[first, hidden, softmax])"


@pytest.mark.parametrize("width", [120, 80, 60, 40, 20])
def test_a_narrow_terminal_cuts_nothing_off(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = mlp()
    readout = trained(model, nperf.SGD(model.named_parameters(), lr=0.1, symmetries=LAWS), 20)
    text = str(readout)
    assert max(map(len, text.splitlines())) <= width
    for cell in (cell for found in rows(readout) for cell in cells(found)):
        assert all(word in text for word in cell.split())
    assert "\x1b" not in text


def test_columns_without_room_go_below_and_rows_become_blocks_only_then() -> None:
    report = ReportTable("A title", stacks=True)
    for heading in ("name", "one", "two", "three"):
        report.add_column(heading, justify="left" if heading == "name" else "right")
    report.add_row("conv1", "1.5", "20", "-3")
    assert [line.split() for line in as_text(report, 40).splitlines()] == [
        ["A", "title"],
        ["name", "one", "two", "three"],
        ["─" * 19],
        ["conv1", "1.5", "20", "-3"],
    ]
    assert [line.split() for line in as_text(report, 14).splitlines()] == [
        ["A", "title"],
        ["name", "one", "two"],
        ["─" * 13],
        ["conv1", "1.5", "20"],
        [],
        ["name", "three"],
        ["─" * 11],
        ["conv1", "-3"],
    ]
    assert as_text(report, 10).splitlines() == ["A title", "conv1", "  one 1.5", "  two 20", "  three -3"]


def test_many_symmetries_are_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    readout = many(60)
    text = str(readout)
    assert sum(line.startswith("s") for line in text.splitlines()) == 20 + 1  # and the heading
    assert text.splitlines()[-1] == "and 40 more: print(readout.table(rows=None))"
    assert "more" not in str(readout.table(rows=None))
    assert sum(line.startswith("s") for line in str(readout.table(rows=60)).splitlines()) == 61
    assert len(readout.table(rows=3).rows) == 60
    for wrong in (-1, 1.5, True, "all"):
        with pytest.raises(ValueError, match=r"rows: must be a number of rows, or None for all, got "):
            readout.table(rows=wrong)  # type: ignore[arg-type]


def test_nothing_measured_says_so() -> None:
    readout = nperf.SGD(net().named_parameters()).readout()
    assert str(readout) == "Step 0: nothing is measured; give the optimizer symmetries"
    assert "nothing is measured" in readout._repr_html_()
    assert readout.table().rows == []


def test_html_has_the_same_cells_and_names_are_only_text() -> None:
    names = ["<img src=x onerror=alert(1)>", 'a"b&c', "two\nlines"]
    readout = many(3, names.__getitem__)
    page = Cells(readout._repr_html_())
    shown = [[text.replace("\n", "\\n").replace(" %", "\xa0%") for text in cells(found)] for found in rows(readout)]
    assert page.rows == [list(COLUMNS), *shown]
    assert page.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert "two\\nlines" in str(readout)
    longer = ReadoutTable(rows(many(30)), 1, 20)._repr_html_()
    assert "<p>and 10 more: print(readout.table(rows=None))</p>" in longer


def test_numbers_are_short_and_signs_are_those_of_all_groups() -> None:
    def shown(**given: Any) -> list[str]:
        return cells(row("x", "scale", arrays(**given), rule="sgd", step=3))

    found = shown(forced=0.123456, decay=-2.34e-6, defect=(1e-4, -3e-4), initial=(-1.5, 2.5))
    assert found[3:8] == ["0.62 (-1.4 … 2.6)", "-2.3e-6", "+0.12", "±0.00020", "0"]
    assert found[8:10] == ["–", "–"]
    assert shown(initial=0.0)[3] == "0"
    assert shown(forced=float("nan"))[3] == "–"


def test_the_table_is_made_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("made without being asked for")

    monkeypatch.setattr(table, "row", fail)
    readout = many(3)
    readout.scalars()
    repr(readout)
    with pytest.raises(AssertionError, match="without being asked"):
        str(readout)


def test_a_pickled_readout_has_its_table() -> None:
    readout = many(3)
    again = pickle.loads(pickle.dumps(readout))
    assert again.table().rows == readout.table().rows
    assert again.dtypes == {"weight": "float64"}


# ---- for loggers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_quantiles_are_numpys(at: float) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 12, 50)
    values = generator.normal(size=lengths.sum())
    values[generator.random(len(values)) < 0.2] = np.nan
    values[: lengths[0]] = np.nan
    stops = np.cumsum(lengths)
    found = quantiles(values, stops - lengths, stops, at)
    for i, (stop, n) in enumerate(zip(stops, lengths, strict=True)):
        known = [x for x in values[stop - n : stop] if not math.isnan(x)]
        expected = np.quantile(known, at) if known else math.nan
        np.testing.assert_allclose(found[i], expected, rtol=1e-13)


def test_an_infinite_value_has_only_its_own_quantiles() -> None:
    values, ends = np.array([1.0, 2.0, np.inf]), (np.array([0]), np.array([3]))
    assert [quantiles(values, *ends, at)[0] for at in (0.0, 0.5, 0.9, 1.0)] == [1.0, 2.0, np.inf, np.inf]


def test_scalars_do_not_cancel() -> None:
    readout = stepped(nperf.SGD, lr=0.1, weight_decay=0.1)
    scalars = readout.scalars()
    for name, law in readout.items():
        sizes = law.charge.abs().tolist()
        assert scalars[f"{name}/abs_charge"] == pytest.approx(statistics.median(sizes), rel=1e-14)
        assert scalars[f"{name}/abs_charge_p90"] == pytest.approx(np.quantile(sizes, 0.9), rel=1e-14)
        assert f"{name}/charge" not in scalars


class Written:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[Any, int]] = {}
        self.histograms: dict[str, tuple[Any, int]] = {}

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> None:
        self.scalars[tag] = (scalar_value, global_step)

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None:
        self.histograms[tag] = (values, global_step)


def test_histograms_are_over_groups() -> None:
    readout, writer = stepped(nperf.SGD, lr=0.1), Written()
    add_readout(writer, readout)
    assert writer.histograms == {}
    add_readout(writer, readout, step=7, histograms=QUANTITIES)
    for name, law in readout.items():
        values, step = writer.histograms[f"{name}/groups/charge"]
        assert step == 7
        assert values.tolist() == law.charge.tolist()
    assert "columns/groups/angular_update" not in writer.histograms  # a translation has none
    assert "rescale/groups/effective_lr" not in writer.histograms
    assert len(writer.histograms["one part/groups/angular_update"][0]) == 5
    for wrong, named in ((["charge", "loss"], "'loss'"), ("charge", "'charge'")):
        with pytest.raises(ValueError, match=rf"histograms: must be a sequence of charge, .*; got {named}"):
            add_readout(writer, readout, histograms=wrong)


def test_tensorboard_reads_a_histogram_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (the extra [integrations])")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    readout = stepped(nperf.SGD, lr=0.1)
    with SummaryWriter(tmp_path) as writer:
        add_readout(writer, readout, histograms=["charge"])
    (event,) = EventAccumulator(str(tmp_path)).Reload().Histograms("columns/groups/charge")
    charge = readout["columns"].charge
    assert event.histogram_value.num == len(charge)
    assert event.histogram_value.sum == pytest.approx(charge.sum().item())


def test_rows_take_a_records_arrays(tmp_path: Path) -> None:
    """The last row of a record has the same table as the readout."""
    model = net()
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, weight_decay=0.1, symmetries=SYMMETRIES)
    with nperf.Recorder(optimizer, tmp_path / "record", dtype="float64"):
        draw_gradients(model, 0)
        optimizer.step()
    record, expected = nperf.open_record(tmp_path / "record"), {row.name: row for row in rows(optimizer.readout())}
    for name, data in record.items():
        last = data.isel(step=-1)
        values = {str(key): last[key].to_numpy() for key in last.data_vars}
        attrs = data.attrs
        found: Row = row(
            name,
            attrs["kind"],
            values,
            rule=record.rule,
            step=int(last["step"]),
            reason=attrs["reason"],
            dtypes=record.attrs["dtypes"],
        )
        assert found.verdict == expected[name].verdict
        assert found.charge == expected[name].charge
        # A record leaves out what follows from the rest, in another order of additions.
        assert found.defect_share == pytest.approx(expected[name].defect_share, rel=1e-14)


def test_text_is_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a Console of rich shows what it prints, and its file stays empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    readout = many(2)
    assert "s0" in str(readout)
    assert "scale" in str(nperf.detect.Symmetries([nperf.Scale("s", [Part("weight", 0)])]))
