"""A rule made in one file: its update, moments and laws on the reference backend; and what rows of rules hold."""

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf.engines.rows import Rows
from noetherperf.measure.agreement import Digests
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.arithmetic import Number, exp
from noetherperf.rules.law import Component, Law, Recursion, Shape, Step
from noetherperf.rules.moments import COMMON, Operand, Pair
from noetherperf.rules.rule import Buffers, Rule
from noetherperf.rules.sgd import SGD, Hyper

# ---- Lion: u = sign(β₁ m + (1 − β₁) g), p' = (1 − ηλ) p − η u, m' = β₂ m + (1 − β₂) g  (Chen et al., arXiv:2302.06675)


@dataclass(frozen=True)
class LionOptions:
    lr: Any
    beta1: float
    beta2: float
    weight_decay: float


class LionRule(Rule[LionOptions]):
    """With r = 1 − ηλ: x' = r² x − 2ηr ⟨p, u⟩ + η² |u|² for a norm, x' = r x − η ⟨u, 1⟩ for a translation."""

    name = "lion"
    option_names: ClassVar[tuple[str, ...]] = ("lr", "betas", "weight_decay")
    number_options: ClassVar[tuple[str, ...]] = ("lr", "weight_decay")
    late_options = ()
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg",)
    n_ages = 2
    coefficients: ClassVar[tuple[str, ...]] = ("lr", "keep", "beta1", "beta2")
    moments = (*COMMON, Pair("dot_pu", Operand.P, Operand.U), Pair("sum_u", Operand.U, Operand.ONE))
    idle: ClassVar[Mapping[int, int]] = {}
    laws: ClassVar[Mapping[Law, Shape]] = {
        Law.TRANSLATION: Shape((Component("budget", 1, ("sum_u",), compensated=True, starts=True, jumps=True),)),
        Law.NORM: Shape(
            (
                Component("budget", 1, ("dot_pu", "sq_u"), compensated=True, starts=True, jumps=True),
                Component("forced", 1, ("sq_u",)),
            )
        ),
    }

    def options(self, group: Mapping[str, Any]) -> LionOptions:
        beta1, beta2 = group["betas"]
        return LionOptions(float(group["lr"]), beta1, beta2, float(group["weight_decay"]))

    def with_lr(self, options: LionOptions, lr: Number) -> LionOptions:
        return replace(options, lr=lr)

    def variant(self, options: LionOptions) -> int:
        return 0

    def n_written(self, options: LionOptions) -> int:
        return 1

    def ages_differ(self, options: LionOptions) -> bool:
        return False

    def n_taken(self, options: LionOptions, has_buffers: bool) -> int:
        return len(self.moments)

    def duration(self, options: LionOptions) -> Number:
        lr: Number = options.lr
        return lr

    def coefficients_of(self, options: LionOptions, age: int) -> Sequence[Number]:
        return options.lr, 1.0 - options.lr * options.weight_decay, options.beta1, options.beta2

    def buffer_dtype(self, options: LionOptions, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        return p

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        lr, keep, beta1, beta2 = c
        (m,) = buffers
        assert m is not None
        u = torch.sign(beta1 * m + (1.0 - beta1) * g)
        return keep * p - lr * u, (beta2 * m + (1.0 - beta2) * g,), u

    def steps(self, options: LionOptions, age: int, laws: Collection[Law]) -> dict[Law, Step]:
        return {law: self._step(law, options) for law in laws}

    def _step(self, law: Law, options: LionOptions) -> Step:
        lr, keep = options.lr, 1.0 - options.lr * options.weight_decay
        power = keep if law == Law.TRANSLATION else keep * keep
        drives = (-lr,) if law == Law.TRANSLATION else (-2.0 * lr * keep, lr * lr)
        recursions = {"budget": Recursion(((power - 1.0,),), (drives,), (0.0,), (0.0,) * len(drives))}
        if law == Law.NORM:
            recursions["forced"] = Recursion(((power,),), ((lr * lr,),))
        flow = exp(-(law + 1.0) * lr * options.weight_decay)
        return Step({"free": ((power, 0.0), (0.0, 1.0)), "flow_free": ((flow, 0.0), (0.0, 1.0))}, recursions)


class Lion(nperf.MeasuredOptimizer):
    rule: ClassVar[Rule[Any]] = LionRule()

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        symmetries: Sequence[nperf.Symmetry] = (),
        backend: str = "auto",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, symmetries, backend)


SYMMETRIES = (
    nperf.Scale("rows", [nperf.Part("0.weight", 0)]),
    nperf.Translation("columns", [nperf.Part("2.weight", 1)]),
)


def trained(n_steps: int) -> tuple[nn.Module, Lion, nn.Module]:
    """A net after steps of Lion, its optimizer, and a peer after the same steps by hand."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    peer = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    peer.load_state_dict(net.state_dict())
    optimizer = Lion(net.named_parameters(), lr=3e-3, weight_decay=0.1, symmetries=SYMMETRIES)
    moving = [torch.zeros_like(p) for p in peer.parameters()]
    inputs, targets = torch.randn(32, 6).double(), torch.randint(4, (32,))
    for _ in range(n_steps):
        for model in (net, peer):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        with torch.no_grad():
            for p, m in zip(peer.parameters(), moving, strict=True):
                assert p.grad is not None
                p.mul_(1.0 - 3e-4).sub_(3e-3 * torch.sign(0.9 * m + 0.1 * p.grad))
                m.mul_(0.99).add_(0.01 * p.grad)
    return net, optimizer, peer


def test_a_rule_says_that_a_law_is_open() -> None:
    """From the first readout on, or from the first step with such options; checkpoints keep it."""

    class Doubtful(LionRule):
        def open_reason(self, options: LionOptions, law: Law) -> str:
            return "norms lose their law to betas" if law == Law.NORM and options.beta1 > 0.95 else ""

    class DoubtfulLion(Lion):
        rule = Doubtful()

    def made(beta1: float) -> tuple[nn.Module, DoubtfulLion]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
        return net, DoubtfulLion(net.named_parameters(), betas=(beta1, 0.99), symmetries=SYMMETRIES)

    def stepped(net: nn.Module, optimizer: DoubtfulLion) -> dict[str, str]:
        net(torch.randn(32, 6).double()).square().sum().backward()
        optimizer.step()
        return {name: law.reason for name, law in optimizer.readout().items()}

    assert made(0.99)[1].readout()["rows"].reason == "norms lose their law to betas"
    net, optimizer = made(0.9)
    assert stepped(net, optimizer) == {"rows": "", "columns": ""}
    optimizer.param_groups[0]["betas"] = (0.99, 0.99)
    opened = {"rows": "norms lose their law to betas", "columns": ""}
    assert stepped(net, optimizer) == opened
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    assert stepped(net, optimizer) == opened, "it stays open"
    again = made(0.9)[1]
    again.load_state_dict(optimizer.state_dict())
    assert {name: law.reason for name, law in again.readout().items()} == opened
    again.reset_measurement()
    assert again.readout()["rows"].closed


def test_a_new_rule_steps_and_its_laws_close() -> None:
    net, optimizer, peer = trained(150)
    assert optimizer.backend == "reference"
    for p, q in zip(net.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    readout = optimizer.readout()
    for name, charge in (("rows", net[0].weight.square().sum(1)), ("columns", net[2].weight.sum(0))):  # type: ignore[index]
        law = readout[name]
        torch.testing.assert_close(law.charge, charge.detach(), rtol=1e-13, atol=1e-14)
        terms = sum(x.abs() for x in (law.discrete.free, law.discrete.forced, law.discrete.defect))
        assert (law.rounding.abs() <= 1e-13 * terms).all(), name
        power = 2 if name == "rows" else 1
        torch.testing.assert_close(law.discrete.free, law.initial * (1.0 - 3e-4) ** (150 * power), rtol=1e-12, atol=0.0)
    forced = 9e-6 * 6 * sum((1.0 - 3e-4) ** (2 * k) for k in range(150))  # |u|² of a row is 6 in each step
    torch.testing.assert_close(
        readout["rows"].discrete.forced, torch.full((5,), forced, dtype=torch.float64), rtol=1e-12, atol=0.0
    )


def test_a_checkpoint_of_a_new_rule_goes_on() -> None:
    net, optimizer, _ = trained(20)
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"exp_avg"}
    other = Lion(net.named_parameters(), symmetries=SYMMETRIES)
    other.load_state_dict(state)
    assert other.readout()["rows"].discrete.forced.tolist() == optimizer.readout()["rows"].discrete.forced.tolist()


def test_a_checkpoint_of_another_rule_is_refused() -> None:
    net, lion, _ = trained(2)
    saved = nperf.SGD(net.named_parameters(), lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['betas'\] is missing; it is the checkpoint of another"):
        lion.load_state_dict(saved)
    assert lion.param_groups[0]["betas"] == (0.9, 0.99)


def test_another_rule_of_a_known_name_is_not_stepped_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(type(SGD)):  # type: ignore[misc]
        def coefficients_of(self, options: Hyper, age: int) -> Sequence[Number]:
            return SGD.coefficients_of(replace(options, lr=2.0 * options.lr), age)

    monkeypatch.setattr(nperf.SGD, "rule", Doubled())
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = nperf.SGD([p], lr=0.25)
    optimizer.step()
    assert optimizer.backend == "reference"
    assert p.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["control", "distributed"])
def test_public_modules_are_imported_by_their_public_names(name: str) -> None:
    assert importlib.import_module(f"noetherperf.{name}") is getattr(nperf, name)


def test_a_backend_without_kernels_of_a_rule_says_so() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="backend=\"cpu\" has no kernels of the update rule 'lion'"):
        Lion(net.named_parameters(), backend="cpu")


class AdaptiveRule(LionRule):
    """Two buffers: u = m / (√s + 1e-8), each a decaying mean."""

    name = "adaptive"
    buffers: ClassVar[tuple[str, ...]] = ("mean", "mean_square")

    def n_written(self, options: LionOptions) -> int:
        return 2

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        lr, keep, beta1, beta2 = c
        m, s = buffers
        assert m is not None
        assert s is not None
        m, s = beta1 * m + (1.0 - beta1) * g, beta2 * s + (1.0 - beta2) * g * g
        u = m / (s.sqrt() + 1e-8)
        return keep * p - lr * u, (m, s), u


def test_a_rule_of_two_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint holds, what others write to a buffer, and that laws close."""
    rule = AdaptiveRule()
    monkeypatch.setattr(Lion, "rule", rule)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    optimizer = Lion(net.named_parameters(), lr=3e-3, weight_decay=0.1, symmetries=SYMMETRIES)
    inputs, targets = torch.randn(32, 6).double(), torch.randint(4, (32,))
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    for law in optimizer.readout().values():
        terms = sum(x.abs() for x in (law.discrete.free, law.discrete.forced, law.discrete.defect))
        assert (law.rounding.abs() <= 1e-13 * terms).all()
        assert law.closed
    state = optimizer.state_dict()
    assert all(set(slot) == set(rule.buffers) for slot in state["state"].values())
    assert len(state["state"]) == 6
    other = Lion(net.named_parameters(), symmetries=SYMMETRIES)
    other.load_state_dict(state)
    assert torch.equal(other.readout()["rows"].discrete.budget, optimizer.readout()["rows"].discrete.budget)
    for key in rule.buffers:
        optimizer.state[net[0].weight][key].mul_(2.0)  # type: ignore[index]
        assert "0.weight" in optimizer.readout()["rows"].reason


# ---- rows -----------------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": Hyper(0.1, weight_decay=0.02),
    "momentum": Hyper(0.1, momentum=0.9, weight_decay=0.02),
    "dampening": Hyper(0.1, momentum=0.9, dampening=0.4, maximize=True),
    "nesterov": Hyper(0.1, momentum=0.8, weight_decay=0.05, nesterov=True),
    "underdamped": Hyper(0.5, momentum=0.99, weight_decay=0.4),
    "near critical": Hyper(0.1, momentum=0.5, weight_decay=0.8),
    "no time": Hyper(0.1, momentum=0.9, dampening=1.0),
    "nothing": Hyper(0.0),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_is_one_formula_on_the_host_and_on_a_device(name: str) -> None:
    options = OPTIONS[name]
    rows = Rows(SGD, [0], 1, tuple(Law))
    rows.find([options], range(SGD.n_ages))
    unread = Rows(SGD, [0], 1, tuple(Law))
    unread.find([SGD.with_lr(options, np.nan)], range(SGD.n_ages))
    there = torch.from_numpy(unread.numbers.copy())
    unread.find_on_device(0, torch.tensor([options.lr], dtype=torch.float64), there)
    torch.testing.assert_close(there, torch.from_numpy(rows.numbers), rtol=1e-15, atol=1e-300, equal_nan=True)


def test_rows_are_found_for_the_laws_that_somebody_asks_for() -> None:
    rows = Rows(SGD, [0], 1, (Law.NORM,))
    rows.find([OPTIONS["momentum"]], (1,))
    start, end = SGD.law_numbers[Law.TRANSLATION], SGD.law_numbers[Law.NORM]
    assert rows.numbers[1, start:end].tolist() == [1.0, 0.0, 0.0, 1.0] * 2 + [0.0] * (end - start - 8)
    assert rows.numbers[1, end:].any()


def test_a_rule_that_counts_ages_has_a_row_for_each_that_occurs() -> None:
    groups, options = [0, 0, 1, 1, 2], [AdamOptions(0.1), AdamOptions(0.2), AdamOptions(0.3)]
    rows = Rows(ADAM, groups, len(options), tuple(Law))
    for ages, part in [
        ([4, 4, 4, 0, 9], [1, 1, 1, 1, 0]),
        ([5, 5, 5, 1, 9], [1, 1, 1, 1, 0]),
        ([6, 6, 6, 2, 9], [1] * 5),
        ([1, 1, 9, 9, 9], [1, 1, 0, 0, 0]),
        ([9, 9, 2, 2, 9], [0, 0, 1, 1, 0]),  # as many others, of other ages
        ([9, 9, 9, 2, 0], [0, 0, 0, 1, 1]),
        ([5, 9, 9, 5, 9], [1, 0, 0, 1, 0]),
        ([9, 5, 5, 9, 9], [0, 1, 1, 0, 0]),  # as many others, of the same ages and parameter groups
        ([9, 3, 3, 9, 9], [0, 1, 1, 0, 0]),  # younger than before
        ([9] * 5, [0] * 5),
    ]:
        rows.find_counted(options, ages, np.array(part, bool))
        for group, age, takes_part, first in zip(groups, ages, part, rows.first.tolist(), strict=True):
            if takes_part:
                assert rows.numbers[first].tolist() == ADAM.row(options[group], age)
        occurring = {(group, age) for group, age, takes_part in zip(groups, ages, part, strict=True) if takes_part}
        n_absent = len({*groups} - {group for group, _ in occurring})
        assert len(rows.numbers) == len(occurring) + n_absent
        times = rows.numbers[rows.groups["row"], len(ADAM.coefficients)]
        assert times.tolist() == rows.tick[1:].tolist() == [0.1, 0.2, 0.3]
    ages, part = [6, 6, 6, 2, 9], [1] * 5
    rows.find_counted(options, ages, np.array(part, bool))
    unread = Rows(ADAM, groups, len(options), tuple(Law))
    unread.find_counted([options[0], options[1], ADAM.with_lr(options[2], np.nan)], ages, np.array(part, bool))
    there = torch.from_numpy(unread.numbers.copy())
    unread.find_on_device(2, torch.tensor([0.3], dtype=torch.float64), there)
    torch.testing.assert_close(there, torch.from_numpy(rows.numbers), rtol=1e-15, atol=1e-300)


@dataclass(frozen=True)
class OddOptions:
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    decoupled: bool = True
    mode: str | None = None


def test_ranks_compare_options_of_any_kind() -> None:
    def digest(options: Any) -> list[int]:
        return Digests(1, 1).after([options], [], b"\x00").options

    here = digest(OddOptions(0.1))
    assert here == digest(OddOptions(0.1 + 1e-12, (0.9 - 1e-12, 0.99)))
    others = [
        OddOptions(0.2),
        OddOptions(0.1, (0.9, 0.999)),
        OddOptions(0.1, decoupled=False),
        OddOptions(0.1, mode="a"),
    ]
    assert here not in map(digest, others)


# ---- a rule without a buffer, and rules with mistakes ----------------------------------------------------------------


@dataclass(frozen=True)
class SignOptions:
    lr: Any


class SignRule(LionRule):
    """u = sign(g), p' = p − η u: of one option and one age, without a buffer."""

    name = "sign"
    option_names = ("lr",)
    number_options = ("lr",)
    buffers: ClassVar[tuple[str, ...]] = ()
    n_ages = 1
    coefficients = ("lr",)

    def options(self, group: Mapping[str, Any]) -> Any:
        return SignOptions(float(group["lr"]))

    def n_written(self, options: Any) -> int:
        return 0

    def coefficients_of(self, options: Any, age: int) -> Sequence[Number]:
        assert 0 <= age < self.n_ages
        return (options.lr,)

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        assert buffers == ()
        u = torch.sign(g)
        return p - c[0] * u, buffers, u

    def steps(self, options: Any, age: int, laws: Collection[Law]) -> dict[Law, Step]:
        assert 0 <= age < self.n_ages
        return super().steps(LionOptions(options.lr, 0.0, 0.0, 0.0), 0, laws)


def stepped(update_rule: Rule[Any]) -> tuple[nn.Linear, nperf.MeasuredOptimizer]:
    """A layer after steps by a rule, every parameter in a group of its own, and its optimizer."""

    class Optimizer(nperf.MeasuredOptimizer):
        rule: ClassVar[Rule[Any]] = update_rule

    net = nn.Linear(4, 3).double()
    symmetries = [nperf.Scale("rows", [nperf.Part("weight", 0), nperf.Part("bias", 0)])]
    symmetries += [nperf.Translation("columns", [nperf.Part("weight", 1)])]  # type: ignore[list-item]
    groups = [{"params": [named]} for named in net.named_parameters()]
    optimizer = Optimizer(groups, {"lr": 0.01}, symmetries, "auto")
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 4).double()).square().sum().backward()
        optimizer.step()
    return net, optimizer


def test_a_rule_without_a_buffer() -> None:
    net, optimizer = stepped(SignRule())
    assert not any(optimizer.state.values())
    for name, law in optimizer.readout().items():
        assert law.closed
        assert law.rounding.abs().max() < 1e-14, name
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.readout()["columns"].charge.tolist() == pytest.approx(net.weight.sum(0).tolist(), rel=1e-12)


BUDGET = Component("budget", 1, ("sum_u",), starts=True, jumps=True)


def with_translation(*components: Component) -> dict[str, Any]:
    return {"laws": {**SignRule.laws, Law.TRANSLATION: Shape(components)}}


def a_step(**components: Recursion) -> dict[str, Any]:
    still = {"free": ((1.0, 0.0), (0.0, 1.0)), "flow_free": ((1.0, 0.0), (0.0, 1.0))}
    return {"steps": lambda self, options, age, laws: dict.fromkeys(laws, Step(still, components))}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "ages": ({"n_ages": 3}, "n_ages is 3"),
    "no moments of its own first": ({"moments": SignRule.moments[::-1]}, "moments must begin with the common ones"),
    "a moment twice": ({"moments": (*COMMON, COMMON[0])}, "two of its moments have one name"),
    "no law": ({"laws": {Law.NORM: SignRule.laws[Law.NORM]}}, "the translation law is missing in laws"),
    "no budget": (with_translation(Component("forced", 1, ())), "the translation law needs a component 'budget'"),
    "a budget from nowhere": (with_translation(Component("budget", 1, ())), "starts=True"),
    "a component twice": (with_translation(BUDGET, BUDGET), "two components of one name"),
    "three numbers": (with_translation(replace(BUDGET, size=3)), "'budget' has size 3, which must be 1 or 2"),
    "an unknown moment": (with_translation(replace(BUDGET, moments=("sum_v",))), "driven by 'sum_v', which is none of"),
    "coefficients": ({"coefficients": ("lr", "keep")}, r"gives 1 numbers, but coefficients names 2 \(lr, keep\)"),
    "no recursion": (a_step(), "'sign': the translation law: there is no recursion of its component 'budget'"),
    "too many moments": (a_step(budget=Recursion(((0.0,),), ((0.1, 0.1),), (0.0,), (0.0,))), "b of 'budget' needs 1"),
    "no rests": (a_step(budget=Recursion(((0.0,),), ((0.1,),))), "'budget' is compensated, so a_rest and b_rest need"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_rule_is_named(mistake: str) -> None:
    changed, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        stepped(type("Mistaken", (SignRule,), changed)())


def test_an_optimizer_without_a_rule_says_so() -> None:
    class Bare(nperf.MeasuredOptimizer):
        pass

    with pytest.raises(TypeError, match="Bare has no update rule"):
        Bare([nn.Parameter(torch.zeros(1))], {"lr": 0.1}, (), "auto")
