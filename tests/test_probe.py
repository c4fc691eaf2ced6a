"""Probe: optimizers of torch and of others, measured from outside; trajectories to the bit, laws by plain loops."""

import copy
import gc
import importlib
import io
import pickle
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tutorial import assert_prints, blocks
from torch import Tensor, nn
from torch.optim import Optimizer
from training import OnSphere

import noetherperf as nperf
from noetherperf.integrations import unwrap
from noetherperf.integrations.watch import Watch
from noetherperf.optim.adam import AdamW
from noetherperf.optim.known import TABLE
from noetherperf.optim.probe import probes_of
from noetherperf.rules.given import GIVEN, GivenOptions
from noetherperf.rules.law import Law

ROWS, COLUMNS = "0.weight", "2.weight"
SYMMETRIES = (
    nperf.Scale("rows", [nperf.Part(ROWS, 0)]),
    nperf.Translation("columns", [nperf.Part(COLUMNS, 1)]),
)
KAPPA = {"rows": 2, "columns": 1}


def nets(n: int = 2, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """The same net, n times."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).to(dtype)
    return [copy.deepcopy(net) for _ in range(n)]


def closure_of(net: nn.Module, batch: int) -> Callable[[], Tensor]:
    """What sets the gradients of the loss on one of many batches.

    The bias before the BatchNorm, which does not feel it, has a term of its own: else its gradient is rounding alone,
    of which Adam makes steps.
    """
    generator = torch.Generator().manual_seed(batch)
    dtype = next(net.parameters()).dtype
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(4, (32,), generator=generator)

    def closure() -> Tensor:
        net.zero_grad()
        of_bias: Tensor = (net[0].bias - 1.0).square().sum()  # type: ignore[index]
        loss = nn.functional.cross_entropy(net(inputs), targets) + 0.1 * of_bias
        loss.backward()
        return loss

    return closure


def run(net: nn.Module, optimizer: Any, batches: Iterable[int]) -> None:
    for batch in batches:
        closure = closure_of(net, batch)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class Lion(Optimizer):
    """u = sign(β₁ m + (1 − β₁) g), p' = (1 − ηλ) p − η u: an optimizer that nobody knows."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.mul_(0.99).add_(0.01 * p.grad)


def _matrices(net: nn.Module) -> list[Tensor]:
    return [p for p in net.parameters() if p.ndim == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "SGD of all": lambda net: torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, maximize=True
    ),
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1),
    "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True, foreach=False),
    "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=1e-3, momentum=0.9),
    "NAdam": lambda net: torch.optim.NAdam(net.parameters(), weight_decay=0.1, decoupled_weight_decay=True),
    "Adafactor": lambda net: torch.optim.Adafactor(net.parameters(), lr=1e-2, weight_decay=0.1),
    "Adagrad": lambda net: torch.optim.Adagrad(net.parameters()),
    "Muon": lambda net: torch.optim.Muon(_matrices(net), lr=1e-2),
    "LBFGS": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.05, max_iter=3),
    "Lion": lambda net: Lion(net.parameters(), weight_decay=0.1),
}
CLOSED = {"SGD", "AdamW", "RMSprop", "Adafactor", "Adagrad"}
DECAYS = {"AdamW": 0.1, "NAdam": 0.1, "Adafactor": 0.1, "Muon": 0.1}

#: Optimizers of other packages: module, and how to make them.
OTHERS: dict[str, tuple[str, Callable[[Any, nn.Module], Any]]] = {
    "lion_pytorch": ("lion_pytorch", lambda lib, net: lib.Lion(net.parameters(), lr=1e-3, weight_decay=0.1)),
    "Prodigy": ("pytorch_optimizer", lambda lib, net: lib.load_optimizer("prodigy")(net.parameters())),
    "schedulefree": ("schedulefree", lambda lib, net: lib.AdamWScheduleFree(net.parameters(), lr=3e-3)),
    "Adafactor without lr": (
        "transformers.optimization",
        lambda lib, net: lib.Adafactor(net.parameters(), relative_step=True, scale_parameter=True),
    ),
}


class Loop:
    """What a Probe must find, in plain loops: copies before and after each step, and sums of their difference."""

    def __init__(self, net: nn.Module, optimizer: Any, decay: float) -> None:
        self.named, self.optimizer, self.decay = dict(net.named_parameters()), optimizer, decay
        self.start = {"rows": self._charge(ROWS, 2), "columns": self._charge(COLUMNS, 1)}
        self.kept = {name: x.clone() for name, x in self.start.items()}
        self.growth = {name: torch.zeros_like(x) for name, x in self.start.items()}
        self.transport = {name: torch.zeros_like(x) for name, x in self.start.items()}
        self.size = {name: x.abs() for name, x in self.start.items()}  # Σ |terms|
        self.before = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: self.named[name].detach().double().clone() for name in (ROWS, COLUMNS)}

    def _charge(self, name: str, power: int) -> Tensor:
        p = self.named[name].detach().double()
        return p.square().sum(1) if power == 2 else p.sum(0)

    def stepped(self) -> None:
        after, lr = self._copy(), self.optimizer.param_groups[0]["lr"] or 1.0
        r = 1.0 - lr * self.decay
        for name, of in (("rows", ROWS), ("columns", COLUMNS)):
            p, u = self.before[of], (self.before[of] - after[of]) / lr - self.decay * self.before[of]
            if name == "rows":
                along, square, keep = 2.0 * lr * r * (p * u), lr * lr * u.square().sum(1), r * r
                sums = along.sum(1), along.abs().sum(1)
            else:
                along, square, keep = lr * u, torch.zeros(5, dtype=torch.float64), r
                sums = along.sum(0), along.abs().sum(0)
            self.kept[name] *= keep
            self.growth[name] = keep * self.growth[name] + square
            self.transport[name] = keep * self.transport[name] - sums[0]
            self.size[name] += self.kept[name].abs() + sums[1] + square  # each is rounded once a step
        self.before = after

    def check(self, readout: nperf.Readout, eps: float) -> None:
        """eps: the rounding of u, relative to its elements."""
        for name, charge in (("rows", self._charge(ROWS, 2)), ("columns", self._charge(COLUMNS, 1))):
            law, bound = readout[name], eps * self.size[name]
            assert law.growth is not None
            assert law.transport is not None
            assert (law.charge - charge).abs().max() <= 1e-14 * charge.abs().max()
            assert (law.initial - self.start[name]).abs().max() <= 1e-14 * self.start[name].abs().max()
            assert (law.rounding.abs() <= bound).all(), (name, law.rounding, bound)
            assert ((law.growth - self.growth[name]).abs() <= bound).all(), name
            assert ((law.transport - self.transport[name]).abs() <= bound).all(), name
            split = self.kept[name] + law.growth + law.transport
            assert ((law.charge - split).abs() <= bound).all(), name


def check(make: Callable[[nn.Module], Any], dtype: torch.dtype, n_steps: int, known: float, **by_hand: Any) -> Any:
    """The trajectory with a Probe is that without, and the Probe finds what a plain loop finds.

    Args:
        make: Makes the optimizer.
        dtype: Of the net.
        n_steps: How many.
        known: The decay that the Probe is to know of.
        by_hand: For the Probe.

    Returns:
        The readout.
    """
    net, bare = nets(dtype=dtype)
    optimizer, peer = make(net), make(bare)
    probe = nperf.Probe(optimizer, SYMMETRIES, net.named_parameters(), **by_hand)
    assert probe.backend in ("reference", "cpu")
    loop = Loop(net, optimizer, known)
    for batch in range(n_steps):
        run(net, optimizer, [batch])
        loop.stepped()
        run(bare, peer, [batch])
    for p, q in zip(net.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q)
        mine, others = optimizer.state.get(p, {}), peer.state.get(q, {})
        assert list(mine) == list(others)
        assert all(torch.equal(mine[k], x) for k, x in others.items() if isinstance(x, Tensor))
    readout = probe.readout()
    assert readout.step == n_steps
    loop.check(readout, 2.0**-50 if dtype == torch.float64 else 2.0**-21)
    return readout


# ---- trajectories and identities -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trajectory_is_untouched_and_the_identity_exact(name: str, dtype: torch.dtype) -> None:
    readout = check(OPTIMIZERS[name], dtype, 12, DECAYS.get(name, 0.0))
    for law in readout.values():
        assert law.closed == (name in CLOSED), law.reason


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_of_other_packages(name: str) -> None:
    module, make = OTHERS[name]
    pytest.importorskip(module.split(".")[0])
    library = importlib.import_module(module)

    def made(net: nn.Module) -> Any:
        optimizer = make(library, net)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    readout = check(made, torch.float32, 12, 0.0)
    assert all("carry= or like=" in law.reason for law in readout.values())


def test_decay_and_carry_by_hand() -> None:
    readout = check(OPTIMIZERS["Lion"], torch.float64, 30, 0.1, decay=lambda group: group["weight_decay"])
    assert all("Lion is a decaying sum" in law.reason for law in readout.values())
    readout = check(OPTIMIZERS["Lion"], torch.float64, 30, 0.1, decay=0.1, carry=0.97)
    assert all(law.closed for law in readout.values())


def test_a_subclass_is_known_by_its_step() -> None:
    class Renamed(torch.optim.AdamW):
        pass

    class Another(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for kind, is_closed in ((Renamed, True), (Another, False)):
        (net,) = nets(1)
        probe = nperf.Probe(kind(net.parameters()), SYMMETRIES, net.named_parameters())
        assert probe.readout()["rows"].closed == is_closed
        probe = nperf.Probe(probe.optimizer, SYMMETRIES, net.named_parameters(), like=torch.optim.AdamW)
        assert probe.readout()["rows"].closed


# ---- laws ------------------------------------------------------------------------------------------------------------

SGDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.4},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.02},
    "nesterov": {"momentum": 0.8, "nesterov": True, "maximize": True},
}


@pytest.mark.parametrize("name", SGDS)
def test_sgd_as_measured_by_sgd(name: str) -> None:
    options = SGDS[name]
    net, bare = nets()
    own = nperf.SGD(net.named_parameters(), lr=0.05, symmetries=SYMMETRIES, **options)
    probe = nperf.Probe(
        torch.optim.SGD(bare.parameters(), lr=0.05, **options), SYMMETRIES, bare.named_parameters(), backend="reference"
    )
    run(net, own, range(25))
    run(bare, probe.optimizer, range(25))
    for law, other in zip(own.readout().values(), probe.readout().values(), strict=True):
        torch.testing.assert_close(other.charge, law.charge, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(other.discrete.budget, law.discrete.budget, rtol=1e-13, atol=1e-14)
        for moment, value in law.moments.items():
            if name != "decay" or moment not in ("sq_u", "dot_pu", "sum_u"):  # there u is the gradient alone
                torch.testing.assert_close(other.moments[moment], value, rtol=1e-10, atol=1e-14)
        assert other.closed == (name not in ("momentum and decay", "nesterov"))
        if other.closed:
            power = 1 if law.name == "columns" else 2
            torch.testing.assert_close(other.discrete.total, law.discrete.total, rtol=3e-3**power, atol=3e-3)
            gap = (other.discrete.defect - law.discrete.defect).abs().max()
            assert gap <= 1e-3 * law.initial.abs().max()
        else:
            assert "noetherperf.SGD knows the law" in other.reason


SPHERE = (nperf.Scale("rows", [nperf.Part("weight", 0)]),)

#: Preconditioners that are one number, constant in time; and no weight decay that goes through the buffer.
EXACT: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "plain": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "alpha": 1.0, "eps": 1.0}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e13, "eps": 1e14, "weight_decay": 1e-15, "betas": (0.9, 0.99)}),
    "Adamax": (torch.optim.Adamax, {"lr": 1e13, "eps": 1e14, "betas": (0.8, 0.99)}),
}


@pytest.mark.parametrize("warm", [0, 1, 7])
@pytest.mark.parametrize("name", EXACT)
def test_the_law_is_exact_where_the_preconditioner_is_one_number(name: str, warm: int) -> None:
    """From the first step, and from warm buffers; under a schedule."""
    kind, options = EXACT[name]
    net = OnSphere()
    optimizer = kind(net.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    for batch in range(warm):
        net.gradients(batch)
        optimizer.step()
    probe = nperf.Probe(optimizer, SPHERE, net.named_parameters())
    for batch in range(warm, 40):
        net.gradients(batch)
        optimizer.step()
        schedule.step()
    law = probe.readout()["rows"]
    assert law.closed
    terms = law.discrete.free.abs() + law.discrete.forced.abs()
    assert (law.residual.abs() <= 1e-12 * terms).all()
    assert (law.discrete.forced.abs() > 1e-2 * terms).all()


def forced_loop(probe: nperf.Probe, steps: list[tuple[Tensor, Tensor]], lr: float, decay: float, beta: float) -> None:
    """Compare with section 8's law: w' = b (r w − η q), b = β c_k/c_{k+1}, from fresh buffers."""
    r = 1.0 - lr * decay
    x, w = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for k, (before, after) in enumerate(steps, start=1):
        q = ((r * before - after) / lr).square().sum(1)
        x = r * r * x - 2.0 * lr * r * w + lr * lr * q
        w = beta * (1.0 - beta**k) / (1.0 - beta ** (k + 1)) * (r * w - lr * q)
    law = probe.readout()["rows"]
    torch.testing.assert_close(law.discrete.forced, x, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(law.discrete.free, law.initial * r ** (2 * len(steps)), rtol=1e-12, atol=0.0)


def test_adamw_by_a_plain_loop_and_as_measured_by_adamw() -> None:
    """The bias is frozen for the first ten steps: its count of steps is its own."""
    net, bare = nets()
    late = [*SYMMETRIES, nperf.Scale("bias", [nperf.Part("0.bias", 0)])]
    own = AdamW(net.named_parameters(), lr=3e-3, weight_decay=0.2, symmetries=late)
    probe = nperf.Probe(torch.optim.AdamW(bare.parameters(), lr=3e-3, weight_decay=0.2), late, bare.named_parameters())
    steps = []
    for batch in range(40):
        for model, optimizer in ((net, own), (bare, probe.optimizer)):
            closure_of(model, batch)()
            if batch < 10:
                model[0].bias.grad = None  # type: ignore[index]
            before = model[0].weight.detach().clone()  # type: ignore[index]
            optimizer.step()
        steps.append((before, bare[0].weight.detach().clone()))  # type: ignore[index]
    forced_loop(probe, steps, 3e-3, 0.2, 0.9)
    for law, other in zip(own.readout().values(), probe.readout().values(), strict=True):
        assert other.closed
        scale = law.initial.abs().max().item()
        for part in ("free", "forced", "defect", "budget"):
            found, expected = getattr(other.discrete, part), getattr(law.discrete, part)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * scale)
        torch.testing.assert_close(other.flow.total, law.flow.total, rtol=1e-10, atol=0.0)
        torch.testing.assert_close(other.moments["sum_g"], law.moments["sum_g"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("lr", [3e-3, 0.0])
def test_rows_of_numbers_that_are_on_a_device(lr: float) -> None:
    """Ages and the learning rate may be tensors."""
    options = GivenOptions(lr, 0.1, 0.9, corrected=True)
    ages = torch.tensor([0.0, 1.0, 30.0, 1e4])
    rows = GIVEN.rows(GIVEN.with_lr(options, torch.tensor(lr, dtype=torch.float64)), ages)
    for age, row in zip(ages.tolist(), rows, strict=True):
        expected = torch.tensor(GIVEN.row(options, int(age)), dtype=torch.float64)
        assert expected.isfinite().all()
        torch.testing.assert_close(row, expected, rtol=1e-13, atol=1e-19)


def test_a_step_with_learning_rate_zero_moves_nothing_that_is_carried() -> None:
    free = GIVEN.steps(GivenOptions(0.0, 0.1, 0.9), 5, (Law.NORM,))[Law.NORM].propagated["free"]
    assert free == ((1.0, -0.0), (0.0, 0.9))


def test_groups_of_other_options_open_a_law() -> None:
    (net,) = nets(1)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    unit = nperf.Scale("units", [nperf.Part(ROWS, 0), nperf.Part("0.bias", 0)])
    probe = nperf.Probe(torch.optim.AdamW(groups), [unit, *SYMMETRIES], net.named_parameters())
    run(net, probe.optimizer, range(3))
    readout = probe.readout()
    assert "had different decay (0.1 and 0.0)" in readout["units"].reason
    assert readout["rows"].closed


# ---- steps and what is between them ----------------------------------------------------------------------------------


def made(kind: str = "AdamW") -> tuple[nn.Module, Any, nperf.Probe]:
    (net,) = nets(1)
    optimizer = OPTIMIZERS[kind](net)
    return net, optimizer, nperf.Probe(optimizer, SYMMETRIES, net.named_parameters())


def assert_identity(readout: nperf.Readout) -> None:
    for law in readout.values():
        assert law.growth is not None
        terms = law.initial.abs() + law.growth.abs() + law.charge.abs()
        assert (law.rounding.abs() <= 1e-13 * terms).all(), law.name


def test_changes_between_steps_are_noticed() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(5))
    before = probe.readout()["rows"]
    with torch.no_grad():
        net[0].weight.mul_(1.5)  # type: ignore[index]
    after = probe.readout()["rows"]
    assert after.reason.startswith("0.weight was changed outside step() after step 5")
    jump = after.charge - before.charge
    assert (jump > 0.1).all()
    torch.testing.assert_close(after.transport - before.transport, jump)  # type: ignore[operator]
    run(net, optimizer, range(5, 8))
    assert_identity(probe.readout())
    assert probe.readout()["columns"].closed
    probe.reset_measurement()
    assert probe.readout()["rows"].closed
    assert probe.readout().step == 0


def test_changes_that_raise_no_counter_are_in_the_next_update() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(5))
    net[0].weight.data.mul_(1.5)  # type: ignore[index]
    run(net, optimizer, range(5, 6))
    law = probe.readout()["rows"]
    assert law.closed
    assert (law.moments["sq_u"] > 1e3).all()
    assert_identity(probe.readout())


def test_learning_rates_are_those_before_the_step() -> None:
    """A schedule that changes them after it, tensors, none, and zero."""
    net, optimizer, probe = made()
    lrs: list[Any] = [1e-3, torch.tensor(2e-3), 0.0, 3e-3]
    charge, keep = probe.readout()["rows"].charge, 1.0
    for batch, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        before = net[0].weight.detach().clone()  # type: ignore[index]
        run(net, optimizer, [batch])
        optimizer.param_groups[0]["lr"] = 7.0
        r = 1.0 - float(lr) * 0.1
        keep *= r * r
        u = (r * before - net[0].weight.detach()) / (float(lr) or 1.0)  # type: ignore[index]
        law = probe.readout()["rows"]
        torch.testing.assert_close(law.moments["sq_u"], u.square().sum(1), rtol=1e-10, atol=1e-20)
        torch.testing.assert_close(law.discrete.free, keep * charge, rtol=1e-12, atol=0.0)
    assert probe.readout().time == pytest.approx(6e-3, rel=1e-7)
    assert_identity(probe.readout())


def test_a_group_without_learning_rate_counts_displacements() -> None:
    class Halving(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)

    (net,) = nets(1)
    optimizer = Halving(net.parameters(), {})
    probe = nperf.Probe(optimizer, SYMMETRIES, net.named_parameters())
    for _ in range(3):
        optimizer.step()
    readout = probe.readout()
    law = readout["rows"]
    assert (readout.step, readout.time) == (3, 3.0)
    torch.testing.assert_close(law.charge, law.initial * 0.5**6)
    torch.testing.assert_close(law.moments["sq_u"], law.initial * 0.5**6)
    assert not law.moments["sq_g"].any(), "there was no gradient"
    assert_identity(readout)


def test_a_parameter_without_gradient_that_stays_takes_no_part() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(3))
    before = probe.readout()
    closure_of(net, 3)()
    net[0].weight.grad = None  # type: ignore[index]
    optimizer.step()
    after = probe.readout()
    assert torch.equal(after["rows"].discrete.free, before["rows"].discrete.free)
    assert torch.equal(after["rows"].discrete.forced, before["rows"].discrete.forced)
    assert not torch.equal(after["columns"].charge, before["columns"].charge)


def test_a_step_that_fails() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(3))

    def failing() -> Tensor:
        raise KeyError("no batch")

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert probe.readout().step == 3
    run(net, optimizer, range(3, 4))
    assert probe.readout().step == 4
    assert probe.readout()["rows"].closed
    assert_identity(probe.readout())


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips(fused: bool) -> None:
    """A fused optimizer divides by the scale, and skips, itself."""
    (net,) = nets(1)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.1, fused=fused)
    probe = nperf.Probe(optimizer, SYMMETRIES, net.named_parameters())
    run(net, optimizer, range(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for batch, factor in ((3, 1.0), (4, torch.inf), (5, 1.0)):
        closure_of(net, batch)()
        unscaled = net[0].weight.grad.square().sum(1)  # type: ignore[index]
        for p in net.parameters():
            assert p.grad is not None
            p.grad.mul_(scaler.get_scale() * factor)
        scaler.scale(torch.ones(1))  # makes its scale
        scaler.step(optimizer)
        scaler.update()
    readout = probe.readout()
    assert readout.step == 5
    torch.testing.assert_close(readout["rows"].moments["sq_g"], unscaled)
    assert all(law.closed for law in readout.values())
    assert_identity(readout)


def test_a_readout_inside_a_step_is_of_the_step_before() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(3))
    inside = []

    def closure() -> Tensor:
        loss = closure_of(net, 3)()
        with torch.no_grad():
            net[0].weight.mul_(1.01)  # type: ignore[index]
        inside.append(probe.readout())
        return loss

    last = probe.readout()
    optimizer.step(closure)
    assert inside[0].step == 3
    assert torch.equal(inside[0]["rows"].charge, last["rows"].charge)
    readout = probe.readout()
    assert readout.step == 4
    assert readout["rows"].closed
    assert_identity(readout)


def test_a_closure_that_is_evaluated_several_times() -> None:
    """The gradient is the last one that the closure left."""
    net, optimizer, probe = made("LBFGS")
    run(net, optimizer, range(2))
    assert net[0].weight.grad is not None  # type: ignore[index]
    left = net[0].weight.grad.square().sum(1)  # type: ignore[index]
    torch.testing.assert_close(probe.readout()["rows"].moments["sq_g"], left)


# ---- more than one, copies, checkpoints ------------------------------------------------------------------------------


def test_two_probes_and_one_on_an_optimizer_that_measures_itself() -> None:
    (net,) = nets(1)
    own = nperf.SGD(net.named_parameters(), lr=0.1, momentum=0.9, symmetries=SYMMETRIES)
    one, two = (nperf.Probe(own, SYMMETRIES, dict(net.named_parameters())) for _ in range(2))
    run(net, own, range(5))
    assert set(probes_of(own)) == {one, two}
    readouts = own.readout(), one.readout(), two.readout()
    for name in ("rows", "columns"):
        assert torch.equal(readouts[1][name].discrete.budget, readouts[2][name].discrete.budget)
        torch.testing.assert_close(readouts[1][name].charge, readouts[0][name].charge, rtol=1e-14, atol=1e-15)
        assert readouts[0][name].closed
        assert readouts[1][name].closed


def test_remove() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(3))
    last = probe.readout()
    probe.remove()
    probe.remove()
    run(net, optimizer, range(3, 5))
    assert probe.readout().step == 3
    assert torch.equal(probe.readout()["rows"].charge, last["rows"].charge)
    assert probes_of(optimizer) == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_nothing_keeps_an_optimizer_with_a_probe_alive() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(2))
    gone = weakref.ref(optimizer), weakref.ref(probe)
    del optimizer, probe
    gc.collect()
    assert [x() for x in gone] == [None, None]


def test_copies_of_the_optimizer_have_no_probe() -> None:
    net, optimizer, probe = made()
    run(net, optimizer, range(3))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert probes_of(other) == []
        for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()
        other.step()
    assert probe.readout().step == 3
    with pytest.raises(TypeError, match="a Probe cannot be copied or pickled"):
        copy.deepcopy(probe)


def test_a_checkpoint_goes_on() -> None:
    whole, net, other = nets(3)

    def probed(net: nn.Module) -> nperf.Probe:
        return nperf.Probe(OPTIMIZERS["AdamW"](net), SYMMETRIES, net.named_parameters())

    one, first, second = map(probed, (whole, net, other))
    run(whole, one.optimizer, range(10))
    run(net, first.optimizer, range(6))
    file = io.BytesIO()
    torch.save((net.state_dict(), first.optimizer.state_dict(), first.state_dict()), file)
    file.seek(0)
    weights, state, measured = torch.load(file, weights_only=True)
    run(other, second.optimizer, range(2))
    other.load_state_dict(weights)
    second.optimizer.load_state_dict(state)
    second.load_state_dict(measured)
    assert second.measurement_id == first.measurement_id
    run(other, second.optimizer, range(6, 10))
    for law, expected in zip(second.readout().values(), one.readout().values(), strict=True):
        assert law.closed
        for part in ("free", "forced", "defect", "budget"):
            assert torch.equal(getattr(law.discrete, part), getattr(expected.discrete, part)), part
    with pytest.raises(ValueError, match="'measurement' is missing"):
        second.load_state_dict(state)
    others = (nperf.Scale("rows", [nperf.Part(ROWS, 1)]), SYMMETRIES[1])
    with pytest.raises(ValueError, match="measured with other symmetries"):
        nperf.Probe(one.optimizer, others, whole.named_parameters()).load_state_dict(measured)


def test_a_loaded_optimizer_has_lost_its_buffers() -> None:
    net, optimizer, probe = made()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    run(net, optimizer, range(3))
    assert probe.readout()["rows"].closed, "no step had been made"
    optimizer.load_state_dict(state)
    assert "a buffer of 0.weight was changed outside step() after step 3" in probe.readout()["rows"].reason


def test_parameters_that_come_and_go() -> None:
    net, optimizer, probe = made()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    run(net, optimizer, range(2))
    assert probe.readout()["rows"].closed
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(5, 6).double())
    with pytest.raises(RuntimeError, match="param_groups hold other parameters than those that its Probe measures"):
        optimizer.step()
    net, optimizer, _ = made()
    net.float()
    with pytest.raises(RuntimeError, match=r"0\.weight was torch\.float64 .* and is now torch\.float32"):
        optimizer.step()


# ---- what asks for a readout -----------------------------------------------------------------------------------------


def test_a_recorder_takes_a_probe(tmp_path: Path) -> None:
    net, optimizer, probe = made()
    with nperf.Recorder(probe, tmp_path / "run.zarr", every=2):
        run(net, optimizer, range(6))
    record = nperf.open_record(tmp_path / "run.zarr")
    assert record.steps.tolist() == [0, 2, 4, 6]
    charges = record.dataset["charge"].to_numpy()[-1]
    assert charges[:5].tolist() == probe.readout()["rows"].charge.tolist()
    assert record.dataset["decay"].to_numpy()[-1].tolist() == [0.1]
    assert unwrap(optimizer) is probe
    assert unwrap(probe) is probe


def test_a_callback_finds_the_probe_of_an_optimizer(tmp_path: Path) -> None:
    net, optimizer, probe = made()
    watch = Watch(2, tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"no optimizer with a noetherperf\.Probe.*; it has: Lion\. Do this"):
        watch.start([Lion(net.parameters())], 0, "Do this")
    watch.start([optimizer], 0, "Do this")
    run(net, optimizer, range(2))
    scalars = watch.scalars()
    assert scalars["rows/abs_charge"] == pytest.approx(sorted(probe.readout()["rows"].charge.tolist())[2])
    watch.stop()
    assert nperf.open_record(tmp_path / "run.zarr").steps.tolist() == [0, 2]
    second = nperf.Probe(optimizer, SYMMETRIES, net.named_parameters())
    with pytest.raises(ValueError, match="AdamW has 2 Probes; use the one you mean"):
        unwrap(optimizer)
    second.remove()
    assert unwrap(optimizer) is probe


# ---- errors ----------------------------------------------------------------------------------------------------------


def wrong() -> Iterator[tuple[str, type[Exception], str, dict[str, Any]]]:
    yield "no optimizer", TypeError, "list is no torch.optim.Optimizer with hooks", {"optimizer": []}
    yield "no symmetries", ValueError, "there are none", {"symmetries": []}
    yield "an unknown name", ValueError, "'nothing'", {"symmetries": [nperf.Scale("s", [nperf.Part("nothing", 0)])]}
    yield "not stepped", ValueError, r"'0\.weight' is in none of the optimizer's", {"leave_out": 1}
    yield "carry", ValueError, r"carry must be at least 0 and below 1, got 1\.0", {"carry": 1.0}
    yield "decay", ValueError, r"decay must be at least 0, got -0\.1", {"decay": lambda group: -0.1}
    yield "like", ValueError, "like=.*LBFGS.* is not known", {"like": torch.optim.LBFGS}
    yield "backend", ValueError, "backend='fast' is unknown", {"backend": "fast"}


@pytest.mark.parametrize(("error", "match", "given"), [pytest.param(*case[1:], id=case[0]) for case in wrong()])
def test_what_is_wrong_is_named(error: type[Exception], match: str, given: dict[str, Any]) -> None:
    (net,) = nets(1)
    options = dict(given)
    optimizer = torch.optim.SGD(list(net.parameters())[options.pop("leave_out", 0) :], lr=0.1)
    target, symmetries = options.pop("optimizer", optimizer), options.pop("symmetries", SYMMETRIES)
    with pytest.raises(error, match=match):
        nperf.Probe(target, symmetries, net.named_parameters(), **options)
    assert not optimizer._optimizer_step_post_hooks


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "probe.md").read_text(encoding="utf-8")


def test_the_page_runs_and_prints_what_it_says() -> None:
    for block in blocks(PAGE):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, "docs/probe.md", "exec"), {})
        assert_prints(printed.getvalue(), block.printed)


def test_the_page_names_what_is_known() -> None:
    listed = re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE)
    assert {kind.__name__ for kind in TABLE} == {name for row in listed[2:-1] for name in re.findall(r"[A-Z]\w+", row)}
