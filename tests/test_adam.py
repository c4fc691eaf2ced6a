"""Adam and AdamW: torch's trajectories and checkpoints, counts of steps, and their laws by plain loops."""

import copy
import io
import math
import pickle
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_checkpoint import same, spoil
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf import Adam, AdamW
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.law import Law

SYMMETRIES = (
    nperf.Scale("rows", [nperf.Part("0.weight", 0)]),
    nperf.Translation("columns", [nperf.Part("2.weight", 1)]),
)
ROWS, COLUMNS = "0.weight", "2.weight"
TORCHS = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}


def nets(n: int = 2) -> list[nn.Module]:
    """The same net, n times."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)).double()
    return [copy.deepcopy(net) for _ in range(n)]


def gradients(net: nn.Module, batch: int) -> None:
    """Set the gradients of a loss on one of many batches.

    The bias before the BatchNorm, which does not feel it, has a term of its own: else its gradient is rounding alone,
    of which Adam makes steps.
    """
    generator = torch.Generator().manual_seed(batch)
    inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (32,), generator=generator)
    net.zero_grad()
    loss_of(net, inputs, targets).backward()


def loss_of(net: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    of_bias: Tensor = (net[0].bias - 1.0).square().sum()
    return nn.functional.cross_entropy(net(inputs), targets) + 0.1 * of_bias


def run(
    net: nn.Module, optimizer: Any, batches: Iterator[int] | range, after: Callable[[int], None] | None = None
) -> None:
    for batch in batches:
        gradients(net, batch)
        optimizer.step()
        if after is not None:
            after(batch)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)


def assert_closed_budget(readout: nperf.Readout) -> None:
    for law in readout.values():
        terms = law.initial.abs() + sum(x.abs() for x in (law.discrete.free, law.discrete.forced, law.discrete.defect))
        assert (law.rounding.abs() <= 1e-11 * terms).all(), law.name


def splits(*laws: nperf.ChargeReadout) -> tuple[list[Tensor], list[Tensor]]:
    """Growth and transport of each."""
    growth, transport = [law.growth for law in laws], [law.transport for law in laws]
    return [x for x in growth if x is not None], [x for x in transport if x is not None]


# ---- the step is torch's ---------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "amsgrad": {"lr": 3e-3, "amsgrad": True, "betas": (0.9, 0.7)},
    "maximize": {"lr": 1e-3, "maximize": True},
    "no first moment": {"lr": 2e-3, "betas": (0.0, 0.99)},
    "no second moment": {"lr": 1e-3, "betas": (0.9, 0.0), "eps": 1e-2},  # ε holds back chaos: u is nearly a sign
    "large eps": {"lr": 1e-2, "eps": 0.1},
    "weight decay": {"lr": 3e-3, "weight_decay": 0.3},
    "no weight decay": {"lr": 3e-3, "weight_decay": 0.0},
    "all": {"lr": 3e-3, "weight_decay": 0.3, "amsgrad": True, "maximize": True, "betas": (0.8, 0.95), "eps": 1e-3},
}


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_trajectory_is_torchs(kind: type[Adam], name: str) -> None:
    ours, theirs = nets()
    optimizer = kind(ours.named_parameters(), symmetries=SYMMETRIES, **OPTIONS[name])
    torchs = TORCHS[kind](theirs.named_parameters(), foreach=False, **OPTIONS[name])
    run(ours, optimizer, range(60))
    run(theirs, torchs, range(60))
    assert_same(ours, theirs)
    assert_closed_budget(optimizer.readout())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine, others = optimizer.state[p], torchs.state[q]
        assert list(mine) == list(others)
        for key, x in others.items():
            torch.testing.assert_close(mine[key], x, rtol=1e-11, atol=1e-13)


def test_it_goes_torchs_way_to_the_bit_in_float32() -> None:
    ours, theirs = (net.float() for net in nets())
    optimizer = AdamW(ours.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True, backend="reference")
    torchs = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=0.1, amsgrad=True, foreach=False)
    for step in range(20):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_groups_schedules_and_late_tensors() -> None:
    """Two groups, a cosine schedule, and a bias that is frozen for the first ten steps and every third later one."""
    ours, theirs = nets()

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        named = dict(net.named_parameters())
        return [
            {"params": [(name, p) for name, p in named.items() if p.ndim > 1], "weight_decay": 0.2},
            {"params": [(name, p) for name, p in named.items() if p.ndim == 1], "lr": 3e-4, "betas": (0.5, 0.9)},
        ]

    optimizer = AdamW(groups(ours), lr=3e-3, weight_decay=0.0, symmetries=SYMMETRIES)
    torchs = torch.optim.AdamW(groups(theirs), lr=3e-3, weight_decay=0.0, foreach=False)
    for net, stepper in ((ours, optimizer), (theirs, torchs)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, 40)
        for batch in range(40):
            gradients(net, batch)
            if batch < 10 or batch % 3 == 0:
                net[2].bias.grad = None  # type: ignore[index]
            stepper.step()
            schedule.step()
    assert_same(ours, theirs)
    assert_closed_budget(optimizer.readout())
    assert optimizer.state[ours[2].bias]["step"].item() == 20.0  # type: ignore[index]
    assert optimizer.state[ours[2].weight]["step"].item() == 40.0  # type: ignore[index]
    assert all(law.closed for law in optimizer.readout().values())


def test_a_learning_rate_that_is_a_tensor() -> None:
    ours, theirs = nets()
    lr = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = AdamW(ours.named_parameters(), lr=lr, symmetries=SYMMETRIES)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=1e-3, foreach=False)
    run(ours, optimizer, range(5))
    run(theirs, torchs, range(5))
    lr.fill_(4e-3)
    torchs.param_groups[0]["lr"] = 4e-3
    run(ours, optimizer, range(5, 10))
    run(theirs, torchs, range(5, 10))
    assert_same(ours, theirs)
    assert_closed_budget(optimizer.readout())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_betas_that_are_tensors(shape: tuple[int, ...]) -> None:
    """The host reads them in every step, so that no change is missed."""
    ours, theirs = nets()

    def betas() -> Any:
        return tuple(torch.full(shape, beta, dtype=torch.float64) for beta in (0.9, 0.99))

    optimizer = AdamW(ours.named_parameters(), betas=betas(), symmetries=SYMMETRIES)
    torchs = torch.optim.AdamW(theirs.parameters(), betas=betas(), foreach=False)
    for net, stepper in ((ours, optimizer), (theirs, torchs)):
        noise = torch.Generator().manual_seed(0)

        def steps(n: int, net: nn.Module = net, stepper: Any = stepper, noise: torch.Generator = noise) -> None:
            for _ in range(n):
                for p in net.parameters():
                    p.grad = torch.randn(p.shape, generator=noise, dtype=p.dtype)
                stepper.step()

        given = stepper.param_groups[0]["betas"]
        assert [beta.shape for beta in given] == [(), ()]
        steps(5)
        given[0].fill_(0.5)
        steps(3)
        given[1].fill_(0.8)
        steps(4)
        loaded = copy.deepcopy(stepper.state_dict())
        stepper.load_state_dict(loaded)
        stepper.param_groups[0]["betas"][0].fill_(0.7)
        steps(3)
        stepper.param_groups[0]["betas"] = (0.8, 0.9)
        steps(3)
    assert_same(ours, theirs)
    assert_closed_budget(optimizer.readout())


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.0, 0.0)}], ids=str)
def test_scalars_empty_tensors_and_sixteen_bits(kind: type[Adam], options: dict[str, Any]) -> None:
    """16-bit parameters are stepped in float32 and rounded once: an independent loop."""

    def parameters() -> list[nn.Parameter]:
        torch.manual_seed(0)
        shapes = [((), torch.float64), ((0, 3), torch.float32), ((7,), torch.bfloat16), ((2, 5), torch.float16)]
        return [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in shapes]

    ours, whole = parameters(), [nn.Parameter(p.detach().double()) for p in parameters()]
    optimizer = kind(ours, lr=0.1, weight_decay=0.1, eps=1e-3, **options)
    for _ in range(3):
        for p, q in zip(ours, whole, strict=True):
            p.grad = torch.randn(p.shape).to(p.dtype)
            q.grad = p.grad.double()
            # One step of torch's from what is stored.
            torchs = TORCHS[kind]([q], lr=0.1, weight_decay=0.1, eps=1e-3, foreach=False, **options)
            torchs.state[q] = {key: x.double() for key, x in optimizer.state[p].items()} or torchs.state[q]
            q.data = p.detach().double()
            torchs.step()
        optimizer.step()
        for p, q in zip(ours, whole, strict=True):
            assert p.isfinite().all()
            eps = max(torch.finfo(p.dtype).eps, torch.finfo(torch.float32).eps if p.ndim else 0.0)
            torch.testing.assert_close(p.double(), q.detach(), rtol=2.0 * eps, atol=2.0 * eps)
    assert {tuple(x.shape) for p in ours[2:3] for key, x in optimizer.state[p].items() if key != "step"} == {(7,)}


# ---- rows on a device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("what", ["ages", "lr", "betas", "all"])
def test_rows_of_numbers_that_are_on_a_device(decoupled: bool, what: str) -> None:
    """Ages, learning rate and betas may be tensors: the same formulas, for all tensors of a group at once."""
    plain = AdamOptions(3e-3, 0.9, 0.99, 1e-8, 0.1, decoupled=decoupled)
    ages, options = torch.tensor([0.0, 1.0, 2.0, 30.0, 1e4, 0.0, 1e6]), plain
    if what in ("lr", "all"):
        options = ADAM.with_lr(options, torch.tensor(3e-3, dtype=torch.float64))
    if what in ("betas", "all"):
        beta1, beta2 = (torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99))
        options = replace(options, beta1=beta1, beta2=beta2)
    rows = ADAM.rows(options, ages)
    assert rows.shape == (7, ADAM.n_numbers)
    assert rows.dtype == torch.float64
    for age, row in zip(ages.tolist(), rows, strict=True):
        expected = torch.tensor(ADAM.row(plain, int(age)), dtype=torch.float64)
        # 1 − β₂ cancels two digits, and the numbers that compensate roundings are roundings
        torch.testing.assert_close(row, expected, rtol=1e-13, atol=1e-19)


# ---- the laws --------------------------------------------------------------------------------------------------------


class Loop:
    """The laws of a norm and of a sum in plain loops, w' = b (r w − η q) and w' = b w, with b of the next step."""

    def __init__(self, x_norm: Tensor, x_sum: Tensor, carried: tuple[Tensor, Tensor] | None = None) -> None:
        zero = torch.zeros_like(x_norm)
        self.free, self.forced, self.flow = x_norm.clone(), zero.clone(), x_norm.clone()
        self.budget, self.budget_sum = x_norm.clone(), x_sum.clone()
        self.free_sum = x_sum.clone()
        self.growth, self.transport, self.transport_sum = zero.clone(), zero.clone(), torch.zeros_like(x_sum)
        # ⟨θ, m/D⟩ and ⟨m/D, 1⟩; times β₁/c_{k+1} the w of the first step
        self.carried, self.carried_sum = carried or (zero.clone(), torch.zeros_like(x_sum))
        self.after: tuple[Tensor, Tensor, Tensor] | None = None  # r w − η q of free and forced, and w of the sum
        self.last_beta = 0.0

    def step(self, k: int, lr: float, decay: float, beta: float, sums: tuple[Tensor, Tensor, Tensor]) -> None:
        """Step k (from 1) of the tensor; sums: ⟨p, u⟩, |u|² of the norm, and ⟨u, 1⟩ of the sum."""
        r, (dot, q, total) = 1.0 - lr * decay, sums
        if self.after is None:
            share = beta / (1.0 - beta**k)
            w_free, w_forced, w_sum = share * self.carried, torch.zeros_like(q), share * self.carried_sum
        else:
            b = beta * (1.0 - self.last_beta ** (k - 1)) / (1.0 - beta**k)
            w_free, w_forced, w_sum = (b * x for x in self.after)
        self.free = r * r * self.free - 2.0 * lr * r * w_free
        self.forced = r * r * self.forced - 2.0 * lr * r * w_forced + lr * lr * q
        self.free_sum = r * self.free_sum - lr * w_sum
        self.budget = r * r * self.budget - 2.0 * lr * r * dot + lr * lr * q
        self.budget_sum = r * self.budget_sum - lr * total
        self.growth = r * r * self.growth + lr * lr * q
        self.transport = r * r * self.transport - 2.0 * lr * r * dot
        self.transport_sum = r * self.transport_sum - lr * total
        b_next = beta * (1.0 - beta**k) / (1.0 - beta ** (k + 1))
        self.flow = math.exp(-2.0 * lr * decay) * self.flow + lr * lr * q * (1.0 + b_next) / (1.0 - b_next)
        self.after, self.last_beta = (r * w_free, r * w_forced - lr * q, w_sum), beta


def updates(net: nn.Module, optimizer: Any, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Make a step; ⟨p, u⟩ and |u|² of the rows, ⟨u, 1⟩ of the columns, with u from torch's own formula."""
    named = dict(net.named_parameters())
    before = {name: named[name].detach().clone() for name in (ROWS, COLUMNS)}
    optimizer.step()
    group = optimizer.param_groups[0]
    (beta1, beta2), found = group["betas"], {}
    for name in before:
        slot = optimizer.state[named[name]]
        k = slot["step"].item()
        scale = slot["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        found[name] = slot["exp_avg"] / (1.0 - beta1**k) / ((scale / (1.0 - beta2**k)).sqrt() + group["eps"])
        torch.testing.assert_close(
            named[name].detach(),
            (1.0 - group["lr"] * decay) * before[name] - group["lr"] * found[name],
            rtol=1e-10,
            atol=1e-12,
        )
    u = found[ROWS]
    return (before[ROWS] * u).sum(1), u.square().sum(1), found[COLUMNS].sum(0)


def assert_laws(readout: nperf.Readout, loop: Loop) -> None:
    rows, columns = readout["rows"], readout["columns"]
    for found, expected in (
        (rows.discrete.free, loop.free),
        (rows.discrete.forced, loop.forced),
        (rows.discrete.budget, loop.budget),
        (rows.discrete.defect, loop.budget - loop.free - loop.forced),
        (rows.flow.total, loop.flow),
        (columns.discrete.free, loop.free_sum),
        (columns.discrete.budget, loop.budget_sum),
        (columns.discrete.defect, loop.budget_sum - loop.free_sum),
        (rows.growth, loop.growth),
        (rows.transport, loop.transport),
        (columns.growth, torch.zeros_like(loop.free_sum)),
        (columns.transport, loop.transport_sum),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_closed_budget(readout)


def charges(net: nn.Module) -> tuple[Tensor, Tensor]:
    named = dict(net.named_parameters())
    return named[ROWS].detach().square().sum(1), named[COLUMNS].detach().sum(0)


@pytest.mark.parametrize("cycled", [False, True], ids=["constant", "OneCycle"])
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_laws_are_those_of_plain_loops(kind: type[Adam], cycled: bool) -> None:
    (net,) = nets(1)
    decay = 0.3 if kind is AdamW else 0.0
    optimizer = kind(net.named_parameters(), lr=3e-3, weight_decay=decay, symmetries=SYMMETRIES)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=80) if cycled else None
    loop, betas = Loop(*charges(net)), set()
    for k in range(1, 71):
        gradients(net, k)
        (beta1, _), lr = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["lr"]
        betas.add(beta1)
        loop.step(k, lr, decay, beta1, updates(net, optimizer, decay))
        if schedule is not None:
            schedule.step()
    assert (len(betas) > 50) == cycled
    assert loop.forced.abs().min() > 1e-3
    assert_laws(optimizer.readout(), loop)


def test_coupled_decay_is_in_the_defect() -> None:
    (net,) = nets(1)
    optimizer = Adam(net.named_parameters(), lr=3e-3, weight_decay=0.3, symmetries=SYMMETRIES)
    loop = Loop(*charges(net))
    for k in range(1, 31):
        gradients(net, k)
        loop.step(k, 3e-3, 0.0, 0.9, updates(net, optimizer, 0.0))
    assert_laws(optimizer.readout(), loop)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("reading", ["at once", "later"])
def test_laws_that_begin_with_warm_buffers(amsgrad: bool, reading: str) -> None:
    """w₀ = β₁ ⟨θ₀, m/D⟩/c_{k+1}, with the D that is stored; k = 12."""
    (net,) = nets(1)
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-4, "amsgrad": amsgrad}
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES, **options)
    run(net, optimizer, range(12))
    named = dict(net.named_parameters())
    carried = {}
    for name in (ROWS, COLUMNS):
        slot = optimizer.state[named[name]]
        scale = slot["max_exp_avg_sq" if amsgrad else "exp_avg_sq"]
        carried[name] = slot["exp_avg"] / ((scale / (1.0 - 0.95**12)).sqrt() + 1e-4)
    loop = Loop(*charges(net), ((carried[ROWS] * named[ROWS].detach()).sum(1), carried[COLUMNS].sum(0)))
    optimizer.reset_measurement()
    if reading == "at once":
        torch.testing.assert_close(optimizer.readout()["rows"].discrete.free, loop.free, rtol=1e-13, atol=0.0)
    for k in range(13, 40):
        gradients(net, k)
        loop.step(k, 3e-3, 0.3, 0.8, updates(net, optimizer, 0.3))
    assert (loop.free - (1.0 - 9e-4) ** 54 * optimizer.readout()["rows"].initial).abs().min() > 1e-6
    assert_laws(optimizer.readout(), loop)


def test_one_preconditioner_for_all_makes_the_law_exact() -> None:
    """With a huge ε, D is one number, constant in time: then there is no defect where the symmetry holds."""
    (net,) = nets(1)
    net[1].eps = 1e-14  # type: ignore[index]
    optimizer = AdamW(net.named_parameters(), lr=1e7, weight_decay=1e-9, eps=1e8, symmetries=SYMMETRIES)
    run(net, optimizer, range(50))
    law = optimizer.readout()["rows"]
    assert law.discrete.forced.min() > 1e-7
    assert (law.discrete.defect.abs() < 1e-5 * law.discrete.forced).all()


def test_changes_between_steps_are_defect() -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters(), weight_decay=0.1, symmetries=SYMMETRIES)
    run(net, optimizer, range(10))
    before = optimizer.readout()["rows"]
    with torch.no_grad():
        net[0].weight.mul_(1.5)  # type: ignore[index]
    after = optimizer.readout()["rows"]
    assert after.reason.startswith("0.weight was changed outside step() after step 10")
    torch.testing.assert_close(after.discrete.defect - before.discrete.defect, after.charge - before.charge)
    assert torch.equal(after.discrete.forced, before.discrete.forced)
    assert torch.equal(*splits(before, after)[0])
    old, new = splits(before, after)[1]
    torch.testing.assert_close(new - old, after.charge - before.charge)
    optimizer.state[net[2].weight]["exp_avg"].mul_(2.0)  # type: ignore[index]
    run(net, optimizer, range(10, 20))
    assert "a buffer of 2.weight was changed" in optimizer.readout()["columns"].reason
    assert_closed_budget(optimizer.readout())


def test_rows_differ_by_age_alone_where_the_rule_says_so() -> None:
    assert ADAM.ages_differ(AdamOptions(1e-3))
    options = AdamOptions(1e-3, beta1=0.0, beta2=0.0)
    assert not ADAM.ages_differ(options)
    assert ADAM.row(options, 3) == ADAM.row(options, 4)
    assert ADAM.row(AdamOptions(1e-3), 3, (Law.NORM,)) != ADAM.row(AdamOptions(1e-3), 4, (Law.NORM,))


@pytest.mark.parametrize("laws", [(), (Law.TRANSLATION,), (Law.NORM,), tuple(Law)])
def test_rows_of_many_ages_have_the_bits_of_single_ones(laws: tuple[Law, ...]) -> None:
    for options in (
        AdamOptions(1e-3),
        AdamOptions(3e-2, 0.95, 0.98, 1e-6, 0.1, amsgrad=True, maximize=True, decoupled=True),
        AdamOptions(1e-3, 0.0, 0.5, weight_decay=1e-2),
        AdamOptions(-1e6, weight_decay=1e3, decoupled=True),  # the flow law leaves the range of float64
    ):
        row_of_age = ADAM.row_of_age(options, laws)
        for age in (0, 1, 7, 100_000):
            assert np.array(row_of_age(age)).tobytes() == np.array(ADAM.row(options, age, laws)).tobytes()


def test_tensors_of_other_ages_open_a_law() -> None:
    (net,) = nets(1)
    optimizer = AdamW(
        net.named_parameters(),
        symmetries=[nperf.Scale("together", [nperf.Part("0.weight", 0), nperf.Part("0.bias", 0)]), *SYMMETRIES],
    )
    gradients(net, 0)
    net[0].bias.grad = None  # type: ignore[index]
    optimizer.step()
    assert "0.bias had no gradient" in optimizer.readout()["together"].reason
    optimizer.reset_measurement()
    run(net, optimizer, range(3))
    readout = optimizer.readout()
    assert readout["together"].reason == "in step 1 0.weight and 0.bias had made different numbers of steps before"
    assert readout["rows"].closed


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("saved_by", ["ours", "torch"])
@pytest.mark.parametrize("goes_on", ["ours", "torch"])
def test_checkpoints_go_both_ways(kind: type[Adam], saved_by: str, goes_on: str) -> None:
    whole, first, second = nets(3)
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "amsgrad": True}

    def make(net: nn.Module, which: str, **options: Any) -> Any:
        named = net.named_parameters()
        if which == "ours":
            return kind(named, symmetries=SYMMETRIES, **options)
        return TORCHS[kind](named, foreach=False, **options)

    run(whole, make(whole, "torch", **options), range(25))
    saving = make(first, saved_by, **options)
    run(first, saving, range(12))
    file = io.BytesIO()
    torch.save((first.state_dict(), saving.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    loading = make(second, goes_on)
    if goes_on == "torch":
        state.pop("measurement", None)
    loading.load_state_dict(state)
    run(second, loading, range(12, 25))
    assert_same(second, whole)
    assert loading.state[second[0].weight]["step"].item() == 25.0  # type: ignore[index]
    if goes_on == "ours":
        readout = loading.readout()
        assert readout.step == (25 if saved_by == "ours" else 13)
        assert_closed_budget(readout)
        assert all(law.closed == (kind is AdamW) for law in readout.values())


def test_resumed_laws_are_those_of_one_run() -> None:
    whole, net = nets()
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "symmetries": SYMMETRIES}
    one = AdamW(whole.named_parameters(), **options)
    run(whole, one, range(25))
    optimizer = AdamW(net.named_parameters(), **options)
    run(net, optimizer, range(12))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
    optimizer.load_state_dict(state)
    run(net, optimizer, range(12, 25))
    a, b = one.readout(), optimizer.readout()
    for name in a:
        for x, y in ((a[name].discrete, b[name].discrete), (a[name].flow, b[name].flow)):
            assert torch.equal(x.free, y.free)
            assert torch.equal(x.forced, y.forced)
            assert torch.equal(x.budget, y.budget)


def test_copies_go_on_alone() -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
    run(net, optimizer, range(5))
    for other_net, other in (copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))):
        run(other_net, other, range(5, 8))
        assert other.readout().step == 8
        assert_closed_budget(other.readout())
    assert optimizer.state[net[0].weight]["step"].item() == 5.0  # type: ignore[index]


def test_a_count_that_early_versions_of_torch_saved_as_a_number() -> None:
    first, second = nets()
    saving = AdamW(first.named_parameters())
    run(first, saving, range(4))
    state = copy.deepcopy(saving.state_dict())
    for slot in state["state"].values():
        slot["step"] = 4
    second.load_state_dict(first.state_dict())
    loading = AdamW(second.named_parameters())
    loading.load_state_dict(state)
    run(first, saving, range(4, 8))
    run(second, loading, range(4, 8))
    assert_same(first, second)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda slot: slot.pop("step"), "'step' is missing; it counts the steps"),
        (lambda slot: slot.update(step=torch.tensor(2.5)), "step must be a whole number of steps, got 2.5"),
        (lambda slot: slot.update(step=torch.tensor(-1.0)), "step must be a whole number of steps, got -1.0"),
        (lambda slot: slot.update(step=torch.tensor(float("nan"))), "step must be a whole number of steps, got nan"),
        (lambda slot: slot.update(step=torch.ones(2)), "step must be a number, got torch.float32 of 2"),
        (lambda slot: slot.update(step="3"), "step must be a whole number of steps, got '3'"),
        (lambda slot: slot.update(step=10**400), "step must be a whole number of steps, got"),
        (lambda slot: slot.pop("exp_avg_sq"), "exp_avg_sq is missing, but its 'step' counts steps"),
    ],
    ids=["missing", "fraction", "negative", "nan", "vector", "text", "huge", "without a moment"],
)
def test_a_damaged_count_is_refused(damage: Callable[[dict[str, Any]], object], says: str) -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters())
    run(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    damage(state["state"][0])
    with pytest.raises(ValueError, match=re.escape(says)):
        optimizer.load_state_dict(state)
    assert optimizer.state[net[0].weight]["step"].item() == 2.0  # type: ignore[index]


@pytest.mark.parametrize(
    ("betas", "says"),
    [
        (0.9, " must be two numbers, got 0.9"),
        ((0.9,), " must be two numbers, got (0.9,)"),
        ((0.9, "0.99"), "[1] must be a number, got '0.99'"),
        ((torch.ones(2), torch.tensor(0.99)), "[0] must be a number, got torch.float32 of 2"),
    ],
    ids=str,
)
def test_damaged_betas_are_refused(betas: object, says: str) -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters())
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["betas"] = betas
    with pytest.raises(ValueError, match=re.escape(f"state_dict: param_groups[0]['betas']{says}")):
        optimizer.load_state_dict(state)
    del state["param_groups"][0]["betas"]
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['betas'\] is missing; it is the checkpoint of another kind"
    ):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_spoilt_checkpoints_are_refused_or_go_torchs_way(kind: type[Adam]) -> None:
    """With something in torch's part spoilt: refused with all as it was, or the step is torch's, where it makes one."""

    def make(kind: Any, **options: Any) -> tuple[nn.Module, Any]:
        (net,) = nets(1)
        optimizer = kind(net.named_parameters(), amsgrad=True, **options)
        run(net, optimizer, range(2))
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        return net, optimizer

    outcomes = Counter[str]()
    for seed in range(60):
        net, optimizer = make(kind)
        before, state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
        how = spoil(state, random.Random(seed))
        try:
            optimizer.load_state_dict(copy.deepcopy(state))
        except (ValueError, TypeError):
            assert same(optimizer.state_dict(), before), how
            outcomes["refused"] += 1
            continue
        other, torchs = make(TORCHS[kind], foreach=False)
        torchs.load_state_dict(state)
        if torchs.param_groups[0]["differentiable"]:  # with counts of float32 in its formulas
            continue
        try:
            torchs.step()
        except Exception:  # a number of the wrong type, or no max_exp_avg_sq, which begins at zero here
            continue
        optimizer.step()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, equal_nan=True, msg=how)
        outcomes["the same"] += 1
    assert outcomes["refused"] > 20
    assert outcomes["the same"] > 10


def test_a_moment_that_is_missing_is_not_begun_anew() -> None:
    """Its bias correction would be that of a tensor that has made steps."""
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters())
    run(net, optimizer, range(2))
    before = [p.detach().clone() for p in net.parameters()]
    del optimizer.state[net[2].weight]["exp_avg"]  # type: ignore[index]
    with pytest.raises(
        RuntimeError, match=r"2\.weight: 'exp_avg' is missing .* counts 2 steps; to start anew, delete its whole"
    ):
        run(net, optimizer, range(2, 3))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    optimizer.state[net[2].weight].clear()  # type: ignore[index]
    run(net, optimizer, range(2, 3))
    assert [slot["step"].item() for slot in optimizer.state.values()] == [3.0, 3.0, 3.0, 3.0, 1.0, 3.0]


def test_adamw_loads_adams_checkpoint_as_its_own() -> None:
    first, second = nets()
    saving = Adam(first.named_parameters(), weight_decay=0.1)
    run(first, saving, range(2))
    loading = AdamW(second.named_parameters())
    loading.load_state_dict(saving.state_dict())
    assert loading.param_groups[0]["decoupled_weight_decay"] is True
    assert loading.param_groups[0]["weight_decay"] == 0.1


# ---- the count of steps ----------------------------------------------------------------------------------------------


def test_a_step_that_fails_counts_nothing() -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
    gradients(net, 0)
    net[2].weight.grad = net[2].weight.grad.to_sparse()  # type: ignore[index]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert all("step" not in slot for slot in optimizer.state.values())
    run(net, optimizer, range(3))
    gradients(net, 0)
    net[2].weight.grad = net[2].weight.grad.to_sparse()  # type: ignore[index]
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert {slot["step"].item() for slot in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_counts_when_it_is_carried_out(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a step writes, its counts too, it writes in one go: an interrupt before that changes nothing."""
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
    optimizer.readout()
    run(net, optimizer, range(steps))
    gradients(net, steps)

    def numbers() -> list[Any]:
        tensors = [*net.parameters(), *(x for slot in optimizer.state.values() for x in slot.values())]
        return [[x.tolist() for x in tensors], optimizer.step_count, optimizer.readout()["rows"].discrete.free.tolist()]

    def interrupted(calls: object) -> None:
        raise KeyboardInterrupt

    before = numbers()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("noetherperf.optim.measured.carry_out", interrupted)
        optimizer.step()
    assert numbers() == before
    optimizer.step()
    assert numbers() != before
    assert {slot["step"].item() for slot in optimizer.state.values()} == {steps + 1.0}


def test_steps_that_a_scaler_skips_are_not_counted() -> None:
    ours, theirs = nets()
    optimizer = AdamW(ours.named_parameters(), fused=True, symmetries=SYMMETRIES)
    torchs = torch.optim.AdamW(theirs.parameters(), foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for batch in range(6):
        ours.zero_grad()
        generator = torch.Generator().manual_seed(batch)
        inputs = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        targets = torch.randint(4, (32,), generator=generator)
        scaler.scale(loss_of(ours, inputs, targets)).backward()
        if batch in (0, 3):
            ours[0].weight.grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        gradients(theirs, batch)
        if batch not in (0, 3):
            torchs.step()
    assert {slot["step"].item() for slot in optimizer.state.values()} == {4.0}
    assert_same(ours, theirs)
    assert optimizer.readout().step == 4


def test_amsgrad_switched_on_later_starts_from_zero() -> None:
    (net,) = nets(1)
    optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
    run(net, optimizer, range(5))
    optimizer.param_groups[0]["amsgrad"] = True
    run(net, optimizer, range(5, 10))
    slot = optimizer.state[net[0].weight]  # type: ignore[index]
    assert slot["step"].item() == 10.0
    assert (slot["max_exp_avg_sq"] >= slot["exp_avg_sq"]).all()
    assert_closed_budget(optimizer.readout())
    assert all(law.closed for law in optimizer.readout().values())


def move(x: Tensor, to: Tensor) -> Tensor:
    """As code that moves an optimizer to another device does: it raises no version counter."""
    x.data = to
    return x


class TestCounts:
    """Torch's "step" tensors are views of one tensor, and the host counts along; other code may do what it likes."""

    @staticmethod
    def both() -> Iterator[tuple[nn.Module, Any]]:
        """The same net with our optimizer, and with torch's."""
        ours, theirs = nets()
        yield ours, AdamW(ours.named_parameters(), lr=3e-3, symmetries=SYMMETRIES)
        yield theirs, torch.optim.AdamW(theirs.parameters(), lr=3e-3, foreach=False)

    @staticmethod
    def steps(optimizer: Any) -> list[float]:
        return [optimizer.state[p]["step"].item() for p in optimizer.param_groups[0]["params"]]

    def test_one_memory_and_one_addition(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (net,) = nets(1)
        optimizer = AdamW(net.named_parameters())
        run(net, optimizer, range(1))
        counts = [slot["step"] for slot in optimizer.state.values()]
        assert [(x.shape, x.dtype, x.device.type) for x in counts] == [((), torch.float32, "cpu")] * 6
        assert len({x.untyped_storage().data_ptr() for x in counts}) == 1
        assert len({x.data_ptr() for x in counts}) == 6
        gradients(net, 1)
        for name in ("item", "tolist", "__int__", "__float__"):
            monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"a step reads a count by {name}"))
        for _ in range(3):
            optimizer.step()
        monkeypatch.undo()
        assert all(slot["step"] is x for slot, x in zip(optimizer.state.values(), counts, strict=True))
        assert self.steps(optimizer) == [4.0] * 6

    @pytest.mark.parametrize(
        "change",
        [
            lambda net, state: state[net[0].weight]["step"].fill_(9.0),
            lambda net, state: state[net[0].weight]["step"].add_(-3.0),
            lambda net, state: state[net[2].bias].update(step=torch.tensor(7.0)),
            lambda net, state: state[net[2].bias].update(step=torch.tensor(7)),
            lambda net, state: state[net[2].bias].update(step=torch.tensor([7.0], dtype=torch.float64)),
            lambda net, state: torch._foreach_add_([slot["step"] for slot in state.values()], 2.0),
            lambda net, state: [slot.update(step=slot["step"].clone()) for slot in state.values()],
            lambda net, state: [move(x, x.clone()) for slot in state.values() for x in slot.values()],
            lambda net, state: move(state[net[0].weight]["step"], torch.tensor(9.0)),
            lambda net, state: state.pop(net[0].bias),
            lambda net, state: state.clear(),
        ],
        ids=[
            "filled",
            "added",
            "replaced",
            "whole",
            "vector",
            "all",
            "clones",
            "moved",
            "elsewhere",
            "one gone",
            "all gone",
        ],
    )
    @pytest.mark.parametrize("reads", [False, True])
    def test_changes_by_other_code(self, change: Callable[[Any, Any], object], reads: bool) -> None:
        results = []
        for net, optimizer in self.both():
            run(net, optimizer, range(5))
            change(net, optimizer.state)
            if reads and isinstance(optimizer, AdamW):
                optimizer.readout()
            run(net, optimizer, range(5, 9))
            results.append((net, self.steps(optimizer)))
        assert_same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]

    def test_a_state_dict_taken_before_is_left_alone(self) -> None:
        """Counts that have left the state belong to who has them."""
        (net,) = nets(1)
        optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
        run(net, optimizer, range(3))
        taken = optimizer.state_dict()
        other = copy.deepcopy(taken)
        for slot in other["state"].values():
            slot["step"].fill_(50.0)
        optimizer.load_state_dict(other)
        optimizer.state[net[2].bias].clear()  # type: ignore[index]
        run(net, optimizer, range(3, 5))
        assert {slot["step"].item() for slot in taken["state"].values()} == {3.0}
        assert self.steps(optimizer) == [52.0] * 5 + [2.0]
        run(net, optimizer, range(5, 6))
        assert self.steps(optimizer) == [53.0] * 5 + [3.0]
        assert {slot["step"].item() for slot in other["state"].values()} == {50.0}

    def test_counts_that_are_replaced_belong_to_who_keeps_them(self) -> None:
        (net,) = nets(1)
        optimizer = AdamW(net.named_parameters())
        run(net, optimizer, range(3))
        kept = [slot["step"] for slot in optimizer.state.values()]
        for i in (1, 4):
            optimizer.state[[*net.parameters()][i]]["step"] = torch.tensor(10.0 + i)
        optimizer.state[[*net.parameters()][3]].clear()
        run(net, optimizer, range(3, 5))
        assert [x.item() for x in kept] == [5.0, 3.0, 5.0, 3.0, 3.0, 5.0]
        assert self.steps(optimizer) == [5.0, 13.0, 5.0, 2.0, 16.0, 5.0]

    def test_gradients_that_come_late_and_go(self) -> None:
        """Each tensor has its own count, whenever it begins."""

        def drop(net: Any, batch: int) -> None:
            for i, p in enumerate(net.parameters()):
                if batch < 2 * i or batch % (3 + i) == 0:
                    p.grad = None

        results = []
        for net, optimizer in self.both():
            for batch in range(25):
                gradients(net, batch)
                drop(net, batch)
                optimizer.step()
            results.append((net, self.steps(optimizer)))
        assert_same(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert len(set(results[0][1])) >= 4

    @pytest.mark.parametrize(
        ("count", "error", "says"),
        [
            (2.5, ValueError, "2.bias: its 'step' in the optimizer's state must be a whole number of steps, got 2.5"),
            (torch.tensor(-1.0), ValueError, "must be a whole number of steps, got -1.0"),
            (torch.tensor(float("nan")), ValueError, "must be a whole number of steps, got nan"),
            (
                torch.ones(2),
                RuntimeError,
                "2.bias: its 'step' in the optimizer's state must be a tensor of one element",
            ),
            (3, RuntimeError, "got int; use torch.tensor(float(steps))"),
        ],
        ids=str,
    )
    def test_a_count_that_is_none_is_refused(self, count: Any, error: type[Exception], says: str) -> None:
        (net,) = nets(1)
        optimizer = AdamW(net.named_parameters(), symmetries=SYMMETRIES)
        run(net, optimizer, range(2))
        slot = optimizer.state[net[2].bias]  # type: ignore[index]
        kept = slot["step"]
        if isinstance(count, float):
            kept.fill_(count)
        else:
            slot["step"] = count
        gradients(net, 2)
        before = [p.detach().clone() for p in net.parameters()]
        for _ in range(2):
            with pytest.raises(error, match=re.escape(says)):
                optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        slot["step"] = kept.fill_(2.0)
        optimizer.step()
        assert self.steps(optimizer) == [3.0] * 6

    @pytest.mark.parametrize("fused", [None, True])
    def test_dtype_and_place_are_torchs(self, fused: bool | None) -> None:
        torch.set_default_dtype(torch.float64)
        found = []
        for kind in (AdamW, torch.optim.AdamW):
            (net,) = nets(1)
            optimizer = kind(net.parameters(), fused=fused)
            run(net, optimizer, range(2))
            state = copy.deepcopy(optimizer.state_dict())
            for slot in state["state"].values():
                slot["step"] = 2  # as early versions of torch have it
            dtypes = [slot["step"].dtype for slot in optimizer.state.values()]
            optimizer.load_state_dict(state)
            run(net, optimizer, range(2, 4))
            found.append([*dtypes, *(slot["step"].dtype for slot in optimizer.state.values()), self.steps(optimizer)])
        assert found[0] == found[1]

    def test_a_group_of_each_kind(self) -> None:
        """Counts of two dtypes, one group of which is added later."""
        torch.set_default_dtype(torch.float64)
        (net,) = nets(1)
        first, *rest = net.parameters()
        optimizer = AdamW([{"params": [first], "fused": True}, {"params": rest[:2]}])
        run(net, optimizer, range(3))
        optimizer.add_param_group({"params": rest[2:], "fused": True})
        run(net, optimizer, range(3, 5))
        assert [slot["step"].dtype for slot in optimizer.state.values()] == [
            *[torch.float32, torch.float64, torch.float64],
            *[torch.float32] * 3,
        ]
        assert [slot["step"].item() for slot in optimizer.state.values()] == [5.0] * 3 + [2.0] * 3

    def test_a_checkpoint_has_each_number_once(self) -> None:
        """torch.save writes the memory that views share once, and a loaded optimizer shares it with nobody."""
        params = [nn.Parameter(torch.ones(1)) for _ in range(300)]
        for p in params:
            p.grad = torch.ones(1)
        optimizer = AdamW(params)
        optimizer.step()
        file, steps = io.BytesIO(), io.BytesIO()
        torch.save([slot["step"] for slot in optimizer.state.values()], steps)
        torch.save([slot["step"].clone() for slot in optimizer.state.values()], file)
        assert len(steps.getvalue()) < len(file.getvalue()) / 2
        first, second = AdamW(params), AdamW(params)
        for loading in (first, second):
            loading.load_state_dict(optimizer.state_dict())
        first.step()
        first.step()
        second.step()
        assert [{slot["step"].item() for slot in x.state.values()} for x in (optimizer, first, second)] == [
            {1.0},
            {3.0},
            {2.0},
        ]


# ---- arguments -------------------------------------------------------------------------------------------------------

AS_IN_TORCH: Sequence[dict[str, Any]] = (
    {"lr": -1.0},
    {"lr": torch.ones(2)},
    {"lr": torch.tensor(1e-3), "foreach": True},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, torch.tensor(0.9))},
    {"betas": (torch.tensor(0.9), 0.9)},
    {"betas": (0, 0.9)},
    {"betas": (torch.tensor(1.5), torch.tensor(0.9))},
    {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    {"lr": float("nan")},
    {"weight_decay": -0.1},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("options", AS_IN_TORCH, ids=str)
def test_errors_are_torchs(kind: type[Adam], options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        TORCHS[kind]([p], **options)
    with pytest.raises(theirs.type) as ours:
        kind([p], **options)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_what_is_not_supported_is_refused(kind: type[Adam]) -> None:
    p = nn.Parameter(torch.ones(2))
    name = kind.__name__
    with pytest.raises(
        RuntimeError, match=rf"use torch\.optim\.{name} for that, and noetherperf\.Probe\(torch\.optim\."
    ):
        kind([p], differentiable=True)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_capturable_on_the_cpu_is_as_in_torch(kind: type[Adam]) -> None:
    """Refused when it steps, unless it is fused; a parameter without gradient matters to neither."""
    with pytest.raises(AssertionError) as theirs:
        stepped(TORCHS[kind], capturable=True, foreach=False)
    with pytest.raises(AssertionError) as ours:
        stepped(kind, capturable=True)
    first_words = "If capturable=True, params and state_steps must be on supported devices"
    assert str(theirs.value).startswith(first_words)
    assert str(ours.value).startswith(first_words)
    assert "parameter 0 of group 0 is on cpu; set capturable=False" in str(ours.value)
    torch.testing.assert_close(
        stepped(kind, capturable=True, fused=True), stepped(TORCHS[kind], lr=1e-3, foreach=False)
    )
    p = nn.Parameter(torch.ones(2))
    optimizer = kind([p], capturable=True)
    optimizer.step()
    assert "step" not in optimizer.state[p]


def stepped(kind: Any, **options: Any) -> Tensor:
    """A parameter after one step."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, -2.0])
    kind([p], **options).step()
    return p.detach()


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_parameter_groups_are_torchs(kind: type[Adam]) -> None:
    p = nn.Parameter(torch.ones(2))
    ours, theirs = kind([p]), TORCHS[kind]([p])
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0].items()) == list(theirs.param_groups[0].items())


@pytest.mark.parametrize("betas", [(0.9, 1.5), (1.0, 0.9), (0.9, math.nan), (-0.1, 0.9)])
def test_betas_that_are_set_late_are_checked(betas: tuple[float, float]) -> None:
    ours, _ = nets()
    optimizer = AdamW(ours.named_parameters(), symmetries=SYMMETRIES)
    run(ours, optimizer, range(1))
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match=r"betas\[[01]\] of a parameter group is"):
        optimizer.step()
    assert all(map(torch.equal, before, ours.parameters()))
