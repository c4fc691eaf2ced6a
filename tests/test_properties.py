"""Whatever model, layout, symmetries and schedule: the CPU engine against the reference, nothing written beside them.

Whatever options change between two steps: torch's trajectory, a budget that closes, a checkpoint that continues. And
whatever JSON: a clear error, or symmetries that a step measures. The same few in every run of the tests; many more,
and others each time, with

    python -m pytest tests/test_properties.py --hypothesis-profile fuzz
"""

import copy
import json
import math
from dataclasses import asdict
from itertools import chain
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from test_engines import CPU_ENGINES, DTYPES, ENGINES, HOST, KITS, Arena, joined
from training import (
    ADAM,
    ADAMW,
    SGD,
    SYMMETRIES,
    Kind,
    assert_identities,
    assert_same,
    assert_same_readout,
    loss_of,
    make_net,
)

import noetherperf as nperf
from bench import oracle
from bench.bounds import assert_close, of_moments, of_step, of_stored, sum_eps
from noetherperf import Norm, Part, Symmetry, Translation
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules.adam import AdamOptions
from noetherperf.rules.given import GivenOptions
from noetherperf.rules.law import Law
from noetherperf.rules.moments import Moment
from noetherperf.rules.sgd import Hyper
from noetherperf.symmetry import from_json, to_json, validate

pytestmark = pytest.mark.skipif(not CPU_ENGINES, reason="noetherperf._cpu is not built")


def examples(n: int) -> int:
    """So many in the tests; in another profile as many times more as it has more than hypothesis' hundred."""
    return n * settings().max_examples // 100


# ---- models


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Up to four axes; sizes around those of vectors and tiles, and sizes that divide."""
    sizes = st.one_of(st.integers(0, 9), st.sampled_from([12, 16, 24, 31, 64, 65]))
    shape = draw(st.lists(sizes, max_size=4))
    if draw(st.booleans()) and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([257, 512, 1031]))
    while math.prod(max(1, size) for size in shape) > 60_000:  # an empty tensor has strides too
        shape.pop()
    return tuple(shape)


@st.composite
def arenas(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Arena:
    """A tensor with its axes in any order in memory, each with any gap between its elements, at any address."""
    order = draw(st.permutations(range(len(shape))))
    strides, stride = [0] * len(shape), 1
    for axis in order:
        stride *= draw(st.sampled_from([1, 1, 1, 2, 3]))
        strides[axis] = stride
        stride = stride * max(1, shape[axis]) + draw(st.sampled_from([0, 0, 0, 5]))
    offset = draw(st.integers(1, 17))
    extent = 1 + sum(max(0, size - 1) * s for size, s in zip(shape, strides, strict=True))
    storage = torch.randn(offset + extent + 17, generator=generator, dtype=torch.float64).to(dtype)
    return Arena(storage, storage.as_strided(shape, strides, offset))


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@st.composite
def parts(draw: st.DrawFn, name: str, shape: tuple[int, ...]) -> Part:
    """Any part that fits the shape, with every field."""
    axes = [axis for axis, size in enumerate(shape) if size]
    axis = draw(st.sampled_from([None, *axes]))
    weight = draw(st.sampled_from([1.0, -1.0, 2.0]))
    if axis is None:
        return Part(name, None, weight=weight)
    period = draw(st.sampled_from([None, *divisors(shape[axis])]))
    length = period or shape[axis]
    start = draw(st.integers(0, length - 1))
    stop = draw(st.integers(start + 1, length))
    fold = draw(st.sampled_from(divisors(stop - start)))
    stride = draw(st.sampled_from(divisors((stop - start) // fold))) if fold > 1 else 1
    return Part(name, axis, start=start, stop=stop, fold=fold, stride=stride, period=period, weight=weight)


LRS, DECAYS = st.sampled_from([0.0, 1e-3, 0.1, 1.0]), st.sampled_from([0.0, 5e-4, 0.3])


@st.composite
def hypers(draw: st.DrawFn) -> Hyper:
    """One step of any schedule."""
    momentum = draw(st.sampled_from([0.0, 0.0, 0.5, 0.9, 0.99]))
    nesterov = momentum > 0 and draw(st.booleans())
    return Hyper(
        lr=draw(LRS),
        momentum=momentum,
        dampening=0.0 if nesterov else draw(st.sampled_from([0.0, 0.0, 0.4])),
        weight_decay=draw(DECAYS),
        nesterov=nesterov,
        maximize=draw(st.booleans()),
    )


BETAS = st.sampled_from([0.0, 0.5, 0.9])
STEPS: dict[str, st.SearchStrategy[Any]] = {
    "sgd": hypers(),
    "adam": st.builds(
        AdamOptions,
        lr=LRS,
        beta1=BETAS,
        beta2=st.sampled_from([0.5, 0.99, 0.999]),
        eps=st.sampled_from([1e-8, 1e-3]),
        weight_decay=DECAYS,
        amsgrad=st.booleans(),
        maximize=st.booleans(),
        decoupled=st.booleans(),
    ),
    "given": st.builds(GivenOptions, lr=LRS, decay=DECAYS, carry=BETAS, corrected=st.booleans()),
}


@pytest.mark.parametrize("engine", CPU_ENGINES)
@settings(max_examples=examples(120), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_model_and_schedule(engine: str, data: st.DataObject) -> None:
    """Of any rule; tensors wait, and some come late."""
    which = data.draw(st.sampled_from(sorted(STEPS)))
    kit = KITS[which]
    rule = kit.rule
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    n = data.draw(st.integers(1, 3))
    names = [f"w{i}" for i in range(n)]
    of = [data.draw(shapes()) for _ in names]
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in names]
    p, g, *v = (
        [data.draw(arenas(*x, generator)) for x in zip(of, dtypes, strict=True)] for _ in range(2 + len(rule.buffers))
    )
    symmetries: list[Symmetry] = []
    for i, (name, shape) in enumerate(zip(names, of, strict=True)):
        for j in range(data.draw(st.integers(0, 3))):
            kind = data.draw(st.sampled_from([Norm, Translation]))
            symmetries.append(kind(f"{i}.{j}", [data.draw(parts(name, shape))]))
    validate(symmetries, dict(zip(names, of, strict=True)))
    groups = [data.draw(st.integers(0, 1)) for _ in names]

    plan = make_plan(symmetries, names, of, rule)
    measurement = Measurement.empty(plan, n_groups=2)
    for tensor in measurement.tensors():
        tensor.fill_(torch.nan)
    made = ENGINES[engine](plan, [a.tensor for a in p], names, groups, measurement)
    n_there, ages = [kit.n_needed] * n, [0] * n  # of each tensor: buffers from the first on, and steps that wrote them
    if kit.n_needed == 0:
        for a in chain(*v):
            a.tensor.zero_()
    made.measure([[None] * n for _ in rule.buffers])
    measurement.start(plan, [False] * n)
    for _ in range(data.draw(st.integers(1, 4))):
        schedule = [data.draw(STEPS[which]) for _ in range(2)]
        missing = [data.draw(st.sampled_from([False, False, False, True])) for _ in names]
        of_tensor = [schedule[i] for i in groups]
        n_there = [
            k if m else max(k, rule.n_written(options))
            for k, m, options in zip(n_there, missing, of_tensor, strict=True)
        ]
        if kit.n_needed > 0:  # the buffer is what another optimizer has made of the parameter
            for a, b in zip(p, v[0], strict=True):
                b.tensor.copy_(a.tensor + 0.1 * torch.randn(a.tensor.shape, generator=generator, dtype=torch.float64))
        before = [[a.tensor.to(torch.float64, copy=True) for a in arena] for arena in (p, g, *v)]
        stored = [[a.tensor.clone() for a in arena] for arena in (p, g, *v)]
        outside = [[a.outside().clone() for a in arena] for arena in (p, g, *v)]
        states = [state.clone() for state in measurement.states]
        was = measurement.moments.clone()

        grads = [None if m else a.tensor for a, m in zip(g, missing, strict=True)]
        made.admit(grads)
        of_all = [
            [a.tensor if k < there else None for a, there in zip(a_v, n_there, strict=True)] for k, a_v in enumerate(v)
        ]
        made.step(grads, of_all, schedule, ages, HOST)

        for arena, kept in zip((p, g, *v), outside, strict=True):
            for a, rest in zip(arena, kept, strict=True):
                assert torch.equal(a.outside(), rest), "wrote out of bounds"
        for i, options in enumerate(of_tensor):
            views = [view for view in plan.views if view.tensor == i]
            assert torch.equal(g[i].tensor, stored[1][i])
            if missing[i]:
                assert torch.equal(p[i].tensor, stored[0][i])
                for a_v, kept in zip(v, stored[2:], strict=True):
                    assert torch.equal(a_v[i].tensor, kept[i])
                for view in views:
                    segments = slice(view.segment, view.segment + view.n_segments)
                    assert torch.equal(measurement.moments[: Moment.SUM_G, segments], was[: Moment.SUM_G, segments])
                    assert (measurement.moments[Moment.SUM_G :, segments] == 0).all()
                continue
            c = rule.coefficients_of(options, ages[i])
            p64, g64 = before[0][i], before[1][i]
            v64 = tuple(x[i] if k < n_there[i] else None for k, x in enumerate(before[2:]))
            stepped = oracle.step(rule, p64, g64, v64, c)
            errors = of_step(rule, p64, g64, v64, c, dtypes[i])
            assert_close(p[i].tensor, stepped.p, of_stored(stepped.p, errors.p, dtypes[i]), f"parameter {i}")
            for k, (v_new, of_v) in enumerate(zip(stepped.buffers, errors.buffers, strict=True)):
                if k < rule.n_written(options) and v_new is not None and of_v is not None:
                    bound = of_stored(v_new, of_v, dtypes[i])
                    assert_close(v[k][i].tensor, v_new, bound, f"{rule.buffers[k]} {i}")
                else:
                    assert torch.equal(v[k][i].tensor, stored[2 + k][i])
            for view in views:
                sums = measurement.moments[:, view.segment : view.segment + view.n_segments]
                factors = oracle.operands(p[i].tensor, p64, g64, stepped)
                expected = oracle.moments(rule, options, view, factors)
                bound = of_moments(rule, options, view, factors, errors, sum_eps(engine, dtypes[i]))
                assert_close(sums, expected, bound, f"moments of {view}")
                for law in Law:
                    at = view.law_segment[law]
                    if at >= 0:
                        state = states[law][:, at : at + view.n_segments]
                        oracle.advance(rule, law, state, sums, options, ages[i])
                        actual = measurement.states[law][:, at : at + view.n_segments]
                        torch.testing.assert_close(
                            joined(rule, law, actual), joined(rule, law, state), rtol=1e-13, atol=1e-13
                        )
            if rule.ages(options):
                ages[i] = rule.older(ages[i])
    for symmetry in symmetries:  # what the readout sums over views are the part's own groups
        (planned,) = plan.parts[symmetry.name]
        view, part = plan.views[planned.view], planned.part
        i = names.index(part.parameter)
        groups_of = part.grouped(p[i].tensor.double())
        sums = measurement.moments[:, view.segment : view.segment + view.n_segments]
        bound = max(1e-12, sum_eps(engine, dtypes[i])) * (groups_of * groups_of).sum(1)
        assert_close(planned.reduce(sums[Moment.SQ_P]), (groups_of * groups_of).sum(1), bound, f"charge of {part}")


# ---- optimizers


class Plan(NamedTuple):
    """A run's steps: the options of both parameter groups, and the parameters that have no gradient.

    Fields:
        kind: The optimizer.
        probed: Whether it is torch's, with a Probe.
        amsgrad: Of Adam and AdamW.
        steps: The steps.
    """

    kind: Kind
    probed: bool
    amsgrad: bool
    steps: list[tuple[list[Any], set[str]]]


@st.composite
def runs(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from([SGD, ADAM, ADAMW]))
    options = STEPS["sgd" if kind is SGD else "adam"]
    late = st.sets(st.sampled_from(["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]), max_size=2)
    steps = draw(st.lists(st.tuples(st.lists(options, min_size=2, max_size=2), late), min_size=1, max_size=6))
    return Plan(kind, draw(st.booleans()), draw(st.booleans()), steps)


def as_in_torch(options: Any) -> dict[str, Any]:
    """What a rule's options are in a parameter group, but for those that are the optimizer's for good."""
    group = asdict(options)
    if isinstance(options, AdamOptions):
        group["betas"] = group.pop("beta1"), group.pop("beta2")
        del group["amsgrad"], group["decoupled"]
    return group


class Training:
    """A network in two parameter groups, its optimizer, and what measures."""

    def __init__(self, plan: Plan, measured: bool = True) -> None:
        self.plan, self.net = plan, make_net("cpu")
        named = list(self.net.named_parameters())
        groups = [{"params": named[:2]}, {"params": named[2:]}]
        options: dict[str, Any] = {} if plan.kind is SGD else {"amsgrad": plan.amsgrad}
        self.optimizer: torch.optim.Optimizer
        self.measured: Any = None
        if measured and not plan.probed:
            options |= {"symmetries": SYMMETRIES, "backend": "cpu"}
            self.optimizer = self.measured = plan.kind.ours(groups, **options)
            return
        self.optimizer = plan.kind.theirs(groups, foreach=False, **options)
        if measured:
            self.measured = nperf.Probe(self.optimizer, SYMMETRIES, named, backend="cpu")

    def step(self, number: int) -> None:
        options, late = self.plan.steps[number]
        for group, of_group in zip(self.optimizer.param_groups, options, strict=True):
            group.update(as_in_torch(of_group))
        self.optimizer.zero_grad()
        loss_of(self.net, number).backward()
        for name, p in self.net.named_parameters():
            if name in late:
                p.grad = None
        self.optimizer.step()

    def reloaded(self) -> "Training":
        """Another one, that continues from this one's checkpoint."""
        other = Training(self.plan)
        other.net.load_state_dict(self.net.state_dict())
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        if self.plan.probed:
            other.measured.load_state_dict(self.measured.state_dict())
        return other


@settings(max_examples=examples(60))
@given(plan=runs(), data=st.data())
def test_any_schedule_of_any_optimizer(plan: Plan, data: st.DataObject) -> None:
    """Torch's trajectory, a budget that closes, and the same bits from a checkpoint at any step."""
    reload_at = data.draw(st.integers(0, len(plan.steps)))
    run, other, peer = Training(plan), Training(plan), Training(plan, measured=False)
    for number in range(len(plan.steps)):
        if number == reload_at:
            other = other.reloaded()
        for one in (run, other, peer):
            one.step(number)
        assert_identities(run.measured)
    if plan.probed:
        assert all(map(torch.equal, run.net.parameters(), peer.net.parameters()))
    else:
        assert_same(run.net, run.optimizer, peer.net, peer.optimizer, tolerance=1e-11)
    assert all(map(torch.equal, run.net.parameters(), other.net.parameters()))
    assert_same_readout(run.measured.readout(), other.measured.readout())


# ---- symmetries by strangers

VALID = json.loads(
    to_json(
        [
            nperf.Rescale("r", inward=[Part("a", 0), Part("b", 0)], outward=[Part("c", 1, weight=2.0)]),
            Translation("t", [Part("c", 1, start=2, stop=6, fold=2, stride=2, period=6)]),
            Norm("n", [Part("a", None)]),
        ]
    )
)
MODEL = {"a": (6, 5), "b": (6,), "c": (3, 6)}
ODD = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 5, 6, 2**31, 2**63, 10**30, -(2**63)]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "c", "__class__", "\ud800", "\0", "scale"]),
    st.sampled_from([[], {}, [[]], [{}], {"parameter": "a", "axis": 0}, [{"parameter": "b", "axis": 0}]]),
).map(copy.deepcopy)  # what is drawn becomes part of data that is changed again


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container of the data with each of its keys."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(data, key), *places(value)]]


@st.composite
def hostile(draw: st.DrawFn) -> str:
    data = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(data)))
        what = draw(st.sampled_from(["set", "set", "delete", "add"]))
        if what == "set":
            container[key] = draw(ODD)
        elif what == "delete":
            del container[key]
        elif isinstance(container, dict):
            container[draw(st.sampled_from(["start", "stop", "fold", "stride", "period", "weight", "x"]))] = draw(ODD)
        else:
            container.append(copy.deepcopy(container[key]))
        if not places(data):
            break
    return json.dumps(data)


def measured(text: str, kind: Kind) -> nperf.MeasuredOptimizer:
    """Steps that measure the symmetries of a text, guards around the parameters; ValueError where they do not fit."""
    torch.manual_seed(0)
    symmetries = from_json(text)
    assert tuple(from_json(json.dumps(json.loads(to_json(symmetries))))) == symmetries
    storages = {name: torch.full((64,), 7.5) for name in MODEL}
    params = {}
    for name, shape in MODEL.items():
        params[name] = storages[name][16 : 16 + torch.Size(shape).numel()].view(shape)
        params[name].copy_(torch.randn(shape))
        params[name].grad = torch.randn(shape)
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if kind is SGD else {})}
    optimizer: nperf.MeasuredOptimizer = kind.ours(params.items(), symmetries=symmetries, backend="cpu", **options)
    for _ in range(2):
        optimizer.step()
    for name, storage in storages.items():
        assert (storage[:16] == 7.5).all(), name
        assert (storage[16 + params[name].numel() :] == 7.5).all(), name
    return optimizer


@settings(max_examples=examples(400))
@given(text=hostile(), kind=st.sampled_from([SGD, ADAMW]))
@example(text=json.dumps(VALID), kind=SGD)
@example(text=json.dumps(VALID), kind=ADAMW)
def test_hostile_symmetries(text: str, kind: Kind) -> None:
    try:
        optimizer = measured(text, kind)
    except ValueError:
        return
    for name, law in optimizer.readout().items():
        terms = law.moments["sq_p"].abs() + law.discrete.free.abs() + law.discrete.forced.abs() + 1.0
        scale = max(1.0, *(abs(part.weight) for part in law.symmetry.parts))
        if scale < 1e300:
            assert (law.rounding.abs() <= 1e-5 * scale * terms).all(), name


@settings(max_examples=examples(200))
@given(
    text=st.one_of(st.text(), st.recursive(ODD, lambda x: st.lists(x) | st.dictionaries(st.text(), x)).map(json.dumps))
)
def test_json_of_any_kind(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (which message depends on the text)
        from_json(text)
