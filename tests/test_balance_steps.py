"""Matrices of charges, step by step: products in float32, memory that is used again, torn steps, counts on a device."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_balance import CASES, HEAD, detached, largest, loss_of, make, plain, train
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf import Balance, Part
from noetherperf.engines import OnDevice, carry_out
from noetherperf.measure import grams, products
from noetherperf.measure.balances import BalanceReadout
from noetherperf.rules.law import Law, Step, in_common
from noetherperf.rules.sgd import SGD, Hyper

Kind = Callable[..., Any]

KINDS: dict[str, Kind] = {
    "SGD": lambda model, **more: nperf.SGD(
        model.named_parameters(), lr=0.1, **{"momentum": 0.9, "weight_decay": 0.1, **more}
    ),
    "AdamW": lambda model, **more: nperf.AdamW(model.named_parameters(), lr=0.01, **{"weight_decay": 0.1, **more}),
}


class Probed:
    """A Probe with torch's AdamW, as one optimizer."""

    def __init__(self, model: nn.Module, symmetries: Any, **more: Any) -> None:
        named = list(model.named_parameters())
        self.optimizer = torch.optim.AdamW([p for _, p in named], lr=0.01, **{"weight_decay": 0.1, **more})
        self.probe = nperf.Probe(self.optimizer, symmetries, named)
        self.param_groups = self.optimizer.param_groups
        self.zero_grad, self.step = self.optimizer.zero_grad, self.optimizer.step
        self.readout, self.reset_measurement = self.probe.readout, self.probe.reset_measurement


KINDS["Probe"] = Probed
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def predicted(law: BalanceReadout) -> dict[str, Tensor]:
    """All that is predicted of a Balance."""
    found = {f"{of}.{source}": getattr(getattr(law, of), source) for of in ("discrete", "flow") for source in SOURCES}
    split = {"growth": law.growth, "transport": law.transport}
    return {**found, **{name: x for name, x in split.items() if x is not None}}


SOURCES = ("free", "forced", "budget", "total")


# ---- torn steps -----------------------------------------------------------------------------------------------------


def tear(model: nn.Module, optimizer: Any, step: int) -> None:
    """A step in which a bias has no gradient."""
    optimizer.zero_grad()
    loss_of(model, step).backward()
    model.get_parameter("0.bias").grad = None
    optimizer.step()


class TestTornSteps:
    case = CASES["linear pair"]

    @each_kind
    def test_leave_nothing_that_is_finite_and_wrong(self, kind: Kind) -> None:
        model = make(self.case)
        optimizer = kind(model, symmetries=self.case.balances)
        train(model, optimizer, range(3))
        tear(model, optimizer, 3)
        train(model, optimizer, range(4, 6))
        law = optimizer.readout().balances["pair"]
        assert "0.bias had no gradient" in law.reason
        for name, x in predicted(law).items():
            assert x.isnan().all(), name
        assert torch.allclose(law.charge, plain(self.case.by_hand(detached(model))["pair"]), rtol=0, atol=1e-13)
        assert law.defect.isfinite().all()
        assert (law.relative_defect < 1e-12).all()  # of the last step, which was whole
        assert law.initial.isfinite().all()
        assert str(law).endswith(f"open: {law.reason}")
        assert "nan" not in str(law)

    @each_kind
    def test_reset_measurement_starts_anew(self, kind: Kind) -> None:
        """With counts of steps that differ from then on, the share that a step carries over is unknown, and no more."""
        model = make(self.case)
        optimizer = kind(model, symmetries=self.case.balances)
        train(model, optimizer, range(3))
        tear(model, optimizer, 3)
        optimizer.reset_measurement()
        train(model, optimizer, range(4, 9))
        law = optimizer.readout().balances["pair"]
        scale = largest(self.case.by_hand(detached(model))["pair"])
        assert float(law.rounding.abs().max()) <= 1e-13 * scale
        if kind is KINDS["SGD"]:
            assert law.closed
            assert float(law.residual.abs().max()) <= 1e-12 * scale
            return
        assert "different numbers of steps" in law.reason or kind is KINDS["Probe"]
        assert law.growth is not None
        assert law.transport is not None
        split = (1.0 - 0.01 * 0.1) ** 10 * law.initial + law.growth + law.transport
        assert torch.allclose(split, law.charge, rtol=0, atol=1e-13 * scale)
        assert float(law.growth.abs().max()) > 1e-6
        assert law.discrete.free.isfinite().all() == (kind is KINDS["Probe"] and law.closed)

    def test_what_does_not_move_without_a_gradient_is_right(self) -> None:
        """Without decay, the identity and the growth of AdamW's steps need nobody's share."""
        model = make(self.case)
        optimizer = KINDS["AdamW"](model, symmetries=self.case.balances, weight_decay=0.0)
        grown = torch.zeros(1, 5, 5, dtype=torch.float64)
        for step in range(4):
            before = [p.detach().clone() for p in model.parameters()]
            if step == 2:
                tear(model, optimizer, step)
            else:
                train(model, optimizer, range(step, step + 1))
            names = [name for name, _ in model.named_parameters()]
            moved = dict(
                zip(names, (b - p.detach() for b, p in zip(before, model.parameters(), strict=True)), strict=True)
            )
            grown += plain(self.case.by_hand(moved)["pair"])
        law = optimizer.readout().balances["pair"]
        scale = largest(self.case.by_hand(detached(model))["pair"])
        assert float(law.rounding.abs().max()) <= 1e-13 * scale
        assert law.growth is not None
        assert torch.allclose(law.growth, grown, rtol=0, atol=1e-13 * scale)
        assert law.discrete.forced.isnan().all()

    def test_a_buffer_that_only_some_parts_have(self) -> None:
        """Momentum that ends leaves buffers, which the law still counts; a part without a buffer has one of zeros."""
        model = make(self.case)
        optimizer = KINDS["SGD"](model, symmetries=self.case.balances)
        tear(model, optimizer, 0)
        assert "momentum_buffer" not in optimizer.state[model.get_parameter("0.bias")]
        optimizer.param_groups[0]["momentum"] = 0.0
        optimizer.reset_measurement()
        train(model, optimizer, range(1, 4))
        law = optimizer.readout().balances["pair"]
        assert law.closed, law.reason
        assert float(law.residual.abs().max()) <= 1e-13 * largest(self.case.by_hand(detached(model))["pair"])

    def test_a_step_in_common(self) -> None:
        """Numbers that all have are kept, and the others are NaN; floats and tensors alike."""
        shape = SGD.laws[Law.NORM]
        one, other = (SGD.steps(Hyper(0.1, momentum=0.9, dampening=0.5), age, (Law.NORM,))[Law.NORM] for age in (0, 1))
        assert in_common(shape, [one, one]) is one
        assert in_common(shape, [None, None]) is None
        both = in_common(shape, [one, other])
        assert both is not None
        both.check(shape)
        pairs = list(zip(both.numbers(shape), one.numbers(shape), other.numbers(shape), strict=True))
        assert all(x == a if a == b else x != x for x, a, b in pairs)
        assert any(a != b for _, a, b in pairs)

        def on_device(step: Step) -> Step:
            def row(numbers: Any) -> Any:
                return [torch.tensor(x, dtype=torch.float64) for x in numbers]

            found = {
                name: type(x)(list(map(row, x.a)), list(map(row, x.b)), row(x.a_rest), row(x.b_rest))
                for name, x in step.recursions.items()
            }
            return Step({name: list(map(row, x)) for name, x in step.propagated.items()}, found)

        there = in_common(shape, [on_device(one), on_device(other)])
        assert there is not None
        expected = torch.tensor(both.numbers(shape), dtype=torch.float64)
        assert torch.equal(torch.stack(there.numbers(shape)).nan_to_num(7.0), expected.nan_to_num(7.0))  # type: ignore[arg-type]
        still = in_common(shape, [one, None])
        assert still is not None
        still.check(shape)
        assert still.recursions["budget"].b == [list(row) for row in one.recursions["budget"].b]
        assert still.recursions["budget"].a[1][1] != still.recursions["budget"].a[1][1]


# ---- precision ------------------------------------------------------------------------------------------------------


def test_the_error_of_products_is_that_of_a_steps_terms() -> None:
    """A step of float32 numbers against float64 products of the same: an error of float32, of |terms| of the step."""
    case = CASES["plain"]
    model = make(case, torch.float32)
    lr = 0.3
    optimizer = nperf.SGD(model.named_parameters(), lr=lr, symmetries=case.balances)
    optimizer.readout()
    loss_of(model, 0).backward()
    before = {
        name: (p.detach().double(), p.grad.double()) for name, p in model.named_parameters() if p.grad is not None
    }
    optimizer.step()
    epsilon = torch.finfo(torch.float32).eps
    of_p, of_g = ({name: x[k] for name, x in before.items()} for k in (0, 1))
    for name, law in optimizer.readout().balances.items():
        p, g = (case.by_hand(of)[name] for of in (of_p, of_g))
        pairs = list(zip(p, g, strict=True))
        exact, terms = torch.zeros_like(law.charge), torch.zeros_like(law.charge)
        for block, (w, grad) in enumerate(pairs):
            for sign, x, y in zip((1.0, -1.0), w, grad, strict=True):
                crossed = x @ y.T
                exact[block] += sign * (lr**2 * (y @ y.T) - lr * (crossed + crossed.T))
                crossed = x.abs() @ y.abs().T
                terms[block] += lr**2 * (y.abs() @ y.abs().T) + lr * (crossed + crossed.T)
        error = (law.discrete.budget - law.initial - exact).abs()
        assert (error <= 4 * epsilon * terms).all()
        assert (error > 0).any()  # they are not float64 products
        assert torch.equal(law.initial, law.discrete.free)
        assert torch.allclose(law.initial, plain(p), rtol=0, atol=1e-14 * largest(p))


def one_step(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    case = CASES["plain"]
    model = make(case, dtype)
    optimizer = KINDS["SGD"](model, symmetries=case.balances)
    for step in range(3):  # with gradients that no setting changes
        for p in model.parameters():
            p.grad = 0.1 * step + 0.3 * p.detach()
        optimizer.step()
    return predicted(optimizer.readout().balances["q, k"])


@pytest.fixture
def settings() -> Iterator[None]:
    backends: Any = torch.backends  # types leave much of it out
    given = torch.get_float32_matmul_precision()
    with backends.__allow_nonbracketed_mutation():  # torch's own test utilities, once imported, forbid it
        yield
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(given)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("way", ["torch.set_float32_matmul_precision", "torch.backends.fp32_precision"])
def test_no_setting_rounds_factors(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = torch.backends
    seen, add, setting = [], products.Sums.add, backends.mkldnn.matmul

    def seeing(self: products.Sums, *x: Any) -> None:
        seen.append(setting.fp32_precision)
        add(self, *x)

    monkeypatch.setattr(products.Sums, "add", seeing)
    expected = one_step()
    if way == "torch.backends.fp32_precision":
        setting.fp32_precision = "none"
        backends.fp32_precision = "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    given = setting.fp32_precision
    assert given != "ieee"
    found = one_step()
    assert set(seen) <= {"none", "ieee"}
    assert setting.fp32_precision == given
    if way == "torch.backends.fp32_precision":
        backends.fp32_precision = "ieee"  # which the other setting still follows
        assert setting.fp32_precision == "ieee"
    else:
        assert torch.get_float32_matmul_precision() == "medium"
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_autocast_rounds_no_factors() -> None:
    expected = one_step()
    with torch.autocast("cpu", torch.bfloat16):
        found = one_step()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(found[name], x) for name, x in expected.items())


# ---- memory ---------------------------------------------------------------------------------------------------------


def grams_of(optimizer: Any) -> grams.Grams:
    (meter,) = (
        (optimizer.probe._shadows._measuring.meters or []) if isinstance(optimizer, Probed) else optimizer._prepare()
    )
    found: grams.Grams = meter.grams
    return found


@pytest.mark.parametrize("name", ["grouped", "by heads", "low rank"])
@each_kind
def test_what_is_left_in_memory_does_not_count(name: str, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a step writes is poisoned before; pieces of a few elements give what whole units give."""
    case = CASES[name]
    found = []
    for poisoned in (False, True):
        model = make(case)
        optimizer = kind(model, symmetries=case.balances)
        for step in range(4):
            if poisoned and step:
                measured = grams_of(optimizer)
                for x in (*measured._next, *measured._sums._memory.values()):
                    x.fill_(torch.nan)
                monkeypatch.setattr(products, "PIECE", HEAD * 2**step)
                monkeypatch.setattr(products, "LEAST", step)
            train(model, optimizer, range(step, step + 1))
        found.append(predicted(optimizer.readout().balances[case.balances[0].name]))
    for what, x in found[0].items():
        assert x.isfinite().all(), what
        assert torch.allclose(found[1][what], x, rtol=0, atol=1e-13), what


def test_a_prepared_step_changes_nothing() -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = KINDS["SGD"](model, symmetries=case.balances)
    train(model, optimizer, range(2))
    (meter,) = optimizer._prepare()
    before, there = [x.clone() for x in meter.grams.tensors()], meter.grams.tensors()
    arguments = [p.grad for p in model.parameters()], optimizer._gather().here, optimizer._measuring.options.options
    with torch.no_grad():
        for fixed in (False, True, False):  # once a graph knows the places, they stay
            calls = meter.grams.prepare(*arguments, [1] * 9, [None], None, None, fixed=fixed)
            assert all(torch.equal(a, b) for a, b in zip(before, meter.grams.tensors(), strict=True))
        for call in calls:  # those of a graph leave all in its place
            call()
    assert all(a is b for a, b in zip(there, meter.grams.tensors(), strict=True))
    assert not torch.equal(before[0], there[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_memory_on_paper(dtype: torch.dtype, momentum: float) -> None:
    case = CASES["plain"]
    model = make(case, dtype)
    optimizer = KINDS["SGD"](model, symmetries=case.balances, momentum=momentum, weight_decay=0.0)
    train(model, optimizer, range(2))
    measured = grams_of(optimizer)
    kept = [*measured._next, *measured._sums._memory.values()]
    found, without = (nperf.cost(model, balances, momentum=momentum > 0.0) for balances in (case.balances, ()))
    assert found.workspace - without.workspace == sum(x.numel() * x.element_size() for x in kept)


# ---- counts on the device -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_counts_that_the_host_does_not_know(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a CUDA graph, whose replays the device counts; here the CPU is in its place."""
    case = CASES["plain"]
    found = []
    for there in (False, True):
        model = make(case)
        optimizer = KINDS["AdamW"](model, symmetries=case.balances)
        train(model, optimizer, range(3))
        (meter,) = optimizer._prepare()
        ages = [3 + apart * (i % 2) for i in range(9)]
        grads = [p.grad for p in model.parameters()]
        grads[5] = None if apart else grads[5]
        on_device = OnDevice([None], counts=torch.tensor(ages, dtype=torch.float64) if there else None)
        buffers, options = optimizer._gather().here, optimizer._measuring.options.options
        places = meter.grams.tensors()
        with torch.no_grad(), monkeypatch.context() as patched:
            patched.setattr(type(meter.engine), "prepare", lambda *_: [])  # which takes no counts on a CPU
            carry_out(meter.prepare(grads, grads, buffers, options, [9] * 9 if there else ages, on_device))
        assert all(a is b for a, b in zip(places, meter.grams.tensors(), strict=True)) == there
        found.append([x.clone() for x in meter.grams.tensors()])
    for host, device in zip(*found, strict=True):
        assert torch.equal(host.isnan(), device.isnan())
        assert torch.allclose(host.nan_to_num(), device.nan_to_num(), rtol=1e-13, atol=1e-15)
    assert bool(found[0][0].isnan().any()) == apart


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_captured_step_is_replayed(kind: str) -> None:
    case = CASES["plain"]
    more: dict[str, Any] = {"capturable": True} if kind == "AdamW" else {}
    nets = [make(case, torch.float32).cuda() for _ in range(2)]
    eager, captured = (KINDS[kind](net, symmetries=case.balances, **more) for net in nets)

    def set_gradients(step: int) -> None:
        random = torch.Generator("cuda").manual_seed(step)
        for p, q in zip(*(net.parameters() for net in nets), strict=True):
            g = torch.randn(p.shape, generator=random, device="cuda")
            for x in (p, q):
                x.grad = g.clone() if x.grad is None else x.grad.copy_(g)

    set_gradients(0)
    for _ in range(3):
        eager.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 5):
        set_gradients(step)
        eager.step()
        graph.replay()
    eager.step()
    captured.step()  # and eagerly again
    for name, law in eager.readout().balances.items():
        other = captured.readout().balances[name]
        assert float(law.rounding.abs().max()) <= 1e-5
        for what, x in predicted(law).items():
            assert x.isfinite().all(), what
            assert torch.allclose(predicted(other)[what], x, rtol=1e-6, atol=1e-7), what


# ---- the readout ----------------------------------------------------------------------------------------------------


def test_defects_of_very_large_and_very_small_numbers() -> None:
    """|W|²|g|² leaves the range of float64, and |W||g| does not."""
    for scale in (1e-120, 1e120):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
        balance = Balance("pair", [Part("0.weight", 0)], [Part("1.weight", 1)])
        optimizer = nperf.SGD(model.named_parameters(), lr=0.0, symmetries=[balance])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        for p in model.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        law = optimizer.readout().balances["pair"]
        assert ((law.relative_defect > 1e-3) & (law.relative_defect <= 1.0)).all()


def test_the_line_of_what_is_not_finite() -> None:
    case = CASES["plain"]
    model = make(case)
    optimizer = KINDS["SGD"](model, symmetries=case.balances)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.get_parameter("q.weight")[0, 0] = torch.inf
    law = optimizer.readout().balances["q, k"]
    assert "2 blocks of 3 units: charges of 1 of them are not finite numbers; open: q.weight was changed" in str(law)
    assert "nan" not in str(law)
    one = Balance("one", [Part("0.bias", 0, stop=1)], [Part("1.weight", 1, stop=1)])
    pair = make(CASES["linear pair"])
    assert ": 1 block of 1 unit, " in str(
        nperf.SGD(pair.named_parameters(), symmetries=[one]).readout().balances["one"]
    )


@pytest.mark.parametrize("size", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_sizes_of_other_libraries(size: Any) -> None:
    balance = Balance("pair", [Part("a", 0)], [Part("b", 1)], size=size)
    assert type(balance.size) is int
    assert balance == Balance("pair", [Part("a", 0)], [Part("b", 1)], size=3)
    assert copy.deepcopy(balance) == balance


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_a_relative_defect_beyond_the_range_of_float32_is_not_known(scale: float) -> None:
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5, 3)))
    optimizer = nperf.SGD([("a", a), ("b", b)], lr=1e-30, symmetries=[Balance("a, b", [Part("a", 0)], [Part("b", 1)])])
    a.grad, b.grad = torch.randn(3, 4) * scale, torch.randn(5, 3) * scale
    optimizer.step()
    law = optimizer.readout().balances["a, b"]
    assert law.relative_defect.isnan().all()
    assert (law.defect != 0).any()
