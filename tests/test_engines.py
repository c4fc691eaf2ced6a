"""Every engine against its rule in float64 on the same rounded inputs: the step, its moments, the laws.

One table of cases: rule × engine × dtype × tensor (shape and layout) × views × options. The error bounds are those of
bench/bounds.py.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import cpu_stand_in
import cuda_emulation
import pytest
import torch
from guarded import guarded
from on_gpu import OnGpu
from torch import Tensor

from bench import oracle
from bench.bounds import assert_close, of_moments, of_step, of_stored, sum_eps
from noetherperf import Norm, Part, Symmetry, Translation
from noetherperf.engines import Engine, OnDevice
from noetherperf.engines.backends import BACKENDS, backends
from noetherperf.engines.cuda import CudaEngine
from noetherperf.engines.reference import ReferenceEngine
from noetherperf.measure.plan import Measurement, Plan, make_plan
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.given import GIVEN, GivenOptions
from noetherperf.rules.law import N_START, PROPAGATED, Law, propagate
from noetherperf.rules.moments import Moment
from noetherperf.rules.rule import Rule
from noetherperf.rules.sgd import SGD, Hyper

MakeEngine = Callable[..., Engine]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests/test_triton.py runs this file so


def engines() -> Iterator[tuple[str, MakeEngine]]:
    yield "reference", ReferenceEngine
    if backends()["cpu"] == "available":
        from noetherperf import _cpu
        from noetherperf.engines.cpu import CpuEngine

        for isa in _cpu.isas():
            yield f"cpu-{isa}", partial(CpuEngine, isa=isa)
        if cpu_stand_in.missing() is None:
            for isa in cpu_stand_in.wanted():
                yield f"cpu-{isa}-stand-in", partial(stand_in, isa)
    for name in ("cuda", "triton"):
        if backends().get(name) == "available":
            yield name, partial(OnGpu, BACKENDS[name].engine)
    if cuda_emulation.missing() is None:
        yield "cuda-emulated", emulated_cuda
    if INTERPRETED:
        from noetherperf.engines.triton import TritonEngine

        yield "triton", TritonEngine


def stand_in(isa: str, *args: Any) -> Engine:
    from noetherperf.engines.cpu import CpuEngine

    make: MakeEngine = CpuEngine
    return make(*args, isa, cpu_stand_in.load())


def emulated_cuda(*args: Any) -> Engine:
    return CudaEngine(*args, module=cuda_emulation.load())


ENGINES = dict(engines())
CPU_ENGINES = [name for name in ENGINES if name.startswith("cpu")]
HOST = OnDevice([None])  # nothing is left to read on a device
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# ---- tensors: shape and layout, each inside a larger storage whose other elements must stay as they are ----------


@dataclass
class Arena:
    """A tensor of some layout inside a storage with room around it."""

    storage: Tensor
    tensor: Tensor

    def outside(self) -> Tensor:
        """The storage's elements that are not the tensor's."""
        mine = torch.zeros(self.storage.shape, dtype=torch.bool)
        mine.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset()).fill_(True)
        return self.storage[~mine]


def arena(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Arena:
    numel = torch.Size(shape).numel()
    storage = torch.randn(4 * numel + 64, generator=generator, dtype=torch.float64).to(dtype)
    strides = torch.empty(shape).stride()
    offset = 8
    if layout == "misaligned":
        offset = 3
    elif layout == "transposed":
        strides = torch.empty(shape[::-1]).stride()[::-1]
    elif layout == "channels_last":
        strides = torch.empty(shape).contiguous(memory_format=torch.channels_last).stride()
    elif layout == "every_second":
        strides = tuple(2 * s for s in strides)
    elif layout == "padded_rows":
        strides = (strides[0] + 5, *strides[1:])
    return Arena(storage, storage.as_strided(shape, strides, offset))


# name: shape, layout of parameter and buffer, layout of the gradient
TENSORS = {
    "empty": ((0,), "plain", "plain"),
    "no rows": ((0, 5), "plain", "plain"),
    "scalar": ((), "plain", "plain"),
    "one": ((1,), "plain", "plain"),
    "bias": ((37,), "plain", "plain"),
    "bias misaligned": ((513,), "misaligned", "plain"),
    "column": ((67, 1), "plain", "plain"),
    "row": ((1, 67), "plain", "misaligned"),
    "prime": ((13, 17), "plain", "plain"),
    "vector minus": ((8, 15), "plain", "plain"),
    "vector": ((9, 16), "plain", "plain"),
    "vector plus": ((7, 33), "misaligned", "misaligned"),
    "chunk minus": ((5, 511), "plain", "plain"),
    "chunk": ((4, 512), "plain", "plain"),
    "chunk plus": ((3, 513), "plain", "plain"),
    "near": ((5, 768), "plain", "plain"),  # the widest that a CPU walks row by row
    "far": ((7, 769), "plain", "misaligned"),
    "page": ((7, 1024), "plain", "plain"),  # rows as far apart as pages, or halves of them
    "tall": ((1031, 19), "plain", "plain"),
    "many tiles": ((523, 771), "plain", "plain"),
    "convolution": ((12, 10, 3, 3), "plain", "plain"),
    "depthwise": ((21, 1, 3, 3), "plain", "plain"),
    "channels last": ((12, 10, 3, 3), "channels_last", "channels_last"),
    "channels last, plain gradient": ((6, 10, 3, 3), "channels_last", "plain"),
    "transposed": ((30, 22), "transposed", "transposed"),
    "transposed gradient": ((30, 22), "plain", "transposed"),
    "strided": ((11, 29), "every_second", "plain"),
    "padded": ((11, 600), "padded_rows", "padded_rows"),
    "volume": ((6, 4, 5, 3, 2), "plain", "plain"),
}

PART_SETS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "rows": [{"axis": 0}],
    "columns": [{"axis": 1}],
    "rows and columns": [{"axis": 0}, {"axis": 1}],
    "whole": [{"axis": None}],
    "all axes": [{"axis": 0}, {"axis": 1}, {"axis": 2}, {"axis": None}],
    "folds": [{"axis": 0, "fold": 2, "stop": 4}, {"axis": 1, "fold": 2, "start": 2, "stop": 6}],
    "slices": [{"axis": 0, "start": 1, "stop": 5}, {"axis": 0, "start": 2, "stop": 3}, {"axis": 1, "start": 3}],
}

HYPERS = {
    "plain": Hyper(lr=0.1),
    "decay, maximize": Hyper(lr=0.07, weight_decay=0.3, maximize=True),
    "momentum": Hyper(lr=0.1, momentum=0.9, weight_decay=0.02),
    "dampening": Hyper(lr=0.1, momentum=0.9, dampening=0.4, maximize=True),
    "nesterov": Hyper(lr=0.1, momentum=0.8, weight_decay=0.05, nesterov=True),
}
ADAMS = {
    "decoupled": AdamOptions(lr=0.1, weight_decay=0.3, decoupled=True),
    "coupled": AdamOptions(lr=0.07, beta1=0.8, beta2=0.99, weight_decay=0.05),
    "amsgrad": AdamOptions(lr=0.1, beta2=0.95, eps=1e-3, weight_decay=0.02, amsgrad=True, decoupled=True),
    "maximize": AdamOptions(lr=0.1, beta1=0.95, beta2=0.9, maximize=True),
    "amsgrad, coupled, maximize": AdamOptions(lr=0.02, weight_decay=0.1, amsgrad=True, maximize=True),
    "no first moment": AdamOptions(lr=0.1, beta1=0.0, beta2=0.9, weight_decay=0.1, decoupled=True),
}

GIVENS = {
    "plain": GivenOptions(lr=0.1),
    "decay": GivenOptions(lr=0.1, decay=0.3, carry=0.9, corrected=True),
    "no learning rate": GivenOptions(lr=0.0, decay=0.1, carry=0.5),
}


@dataclass(frozen=True)
class Kit:
    """How a rule is tested.

    Attributes:
        rule: The rule.
        options: Cases of its options.
        most: The label of one that writes all buffers and takes all moments.
        paths: Labels of one for each of the ways through the kernels.
        ages: Of tensors: new, and older. With odd ages there are also buffers that these options do not write.
        signed: Whether each buffer may have negative numbers.
        every: Whether a step is tested with all options, else with one, another each time.
        n_needed: How many of the buffers, from the first on, there must be, whatever the options.
    """

    rule: Rule[Any]
    options: dict[str, Any]
    most: str
    paths: tuple[str, ...]
    ages: tuple[int, ...]
    signed: tuple[bool, ...]
    every: bool
    n_needed: int = 0

    @property
    def usual(self) -> Any:
        return self.options[self.most]

    def has(self, buffer: int, options: Any, age: int) -> bool:
        """Whether a tensor of an age has one of the buffers."""
        return buffer < max(self.n_needed, self.rule.n_written(options)) or age % 2 == 1


KITS = {
    "sgd": Kit(SGD, HYPERS, "nesterov", ("plain", "momentum", "nesterov"), (0, 1), (True,), every=True),
    "adam": Kit(ADAM, ADAMS, "amsgrad", ("decoupled", "amsgrad"), (0, 1, 6, 4999), (True, False, False), every=False),
    "given": Kit(GIVEN, GIVENS, "decay", ("decay",), (0, 1, 6, 4999), (True,), every=False, n_needed=1),
}


def steps(engine: str, rule: Rule[Any]) -> bool:
    """Whether an engine has kernels of a rule."""
    backend = BACKENDS.get(engine.split("-")[0])
    return backend is None or backend.steps(rule)


def each(*engines: str, rules: Iterable[str] = KITS) -> Callable[..., Any]:
    """Runs a test for every rule on every engine, or on some, that steps by it."""
    pairs = [(kit, engine) for kit in rules for engine in engines or ENGINES if steps(engine, KITS[kit].rule)]
    return pytest.mark.parametrize(("rule", "engine"), pairs, ids=["-".join(pair) for pair in pairs])


def symmetries_for(shape: tuple[int, ...], which: str) -> list[Symmetry]:
    """Symmetries over the parts of a set that fit the shape, so that every view carries one law, the other or both."""
    found: list[Symmetry] = []
    for number, fields in enumerate(PART_SETS[which]):
        part = Part("w", **fields)
        try:
            part.n_groups(shape)
        except ValueError:
            continue
        if number % 2 == 0:
            found.append(Norm(f"norm {number}", [part]))
        if number < 2:
            found.append(Translation(f"translation {number}", [part]))
    return found


def poisoned(plan: Plan) -> Measurement:
    measurement = Measurement.empty(plan)
    for tensor in measurement.tensors():
        tensor.fill_(torch.nan)
    return measurement


def cases(kit: Kit, turn: int, sparing: bool) -> list[tuple[str, Any]]:
    """All options, or where a step takes long only one, another each turn."""
    every = list(kit.options.items())
    return [every[turn % len(every)]] if sparing else every


@pytest.mark.parametrize("tensor", TENSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@each()
def test_step_moments_and_laws(rule: str, engine: str, dtype: torch.dtype, tensor: str) -> None:
    kit, shape = KITS[rule], TENSORS[tensor][0]
    large = torch.Size(shape).numel() > 10_000
    sparing = large or INTERPRETED or not kit.every
    both = dtype == torch.float32 and not sparing  # of a buffer's first and later steps; in others they take turns
    place = list(TENSORS).index(tensor) + (0 if kit.every else DTYPES.index(dtype))
    checked = 0
    for turn, which in enumerate(PART_SETS):
        symmetries = symmetries_for(shape, which)
        if which != "none" and not symmetries:
            continue
        for number, (label, options) in enumerate(cases(kit, turn + (0 if kit.every else place), sparing)):
            for age in kit.ages if both else [kit.ages[(place + turn + number) % len(kit.ages)]]:
                checked += 1
                where = f"{which}, {label}, age {age}"
                check_step(kit, engine, dtype, tensor, symmetries, options, age, where)
    assert checked >= (4 if large else 2 if sparing else (1 + both) * len(kit.options))


def check_step(
    kit: Kit,
    engine: str,
    dtype: torch.dtype,
    tensor: str,
    symmetries: list[Symmetry],
    options: Any,
    age: int,
    where: str,
) -> None:
    """One step of one tensor."""
    rule, (shape, layout, grad_layout) = kit.rule, TENSORS[tensor]
    generator = torch.Generator().manual_seed(len(where) + len(tensor))
    p, g = arena(shape, dtype, layout, generator), arena(shape, dtype, grad_layout, generator)
    arenas = [arena(shape, dtype, layout, generator) for _ in rule.buffers]
    for a, signed in zip(arenas, kit.signed, strict=True):
        if not signed:
            a.tensor.abs_()
        if age == 0 and kit.n_needed == 0:
            a.tensor.zero_()
    buffers = [a.tensor if kit.has(k, options, age) else None for k, a in enumerate(arenas)]
    first = buffers[0]
    c = rule.coefficients_of(options, age)
    p64, g64 = p.tensor.to(torch.float64, copy=True), g.tensor.double()
    before = tuple(None if v is None else v.to(torch.float64, copy=True) for v in buffers)
    expected_step = oracle.step(rule, p64, g64, before, c)
    errors = of_step(rule, p64, g64, before, c, dtype)
    everything = [p, g, *arenas]
    surroundings = [a.outside().clone() for a in everything]
    kept = [a.tensor.clone() for a in everything]
    sums_eps = sum_eps(engine, dtype)

    plan = make_plan(symmetries, ["w"], [shape], rule)
    measurement = poisoned(plan)
    made = ENGINES[engine](plan, [p.tensor], ["w"], [0], measurement)
    made.measure([[v] for v in buffers])
    assert torch.equal(p64, p.tensor.double()), where
    for view in plan.views:
        x, sums = view.grouped(p64), measurement.moments[:, view.segment : view.segment + view.n_segments]
        assert_close(sums[Moment.SUM_P], x.sum((0, 2)), sums_eps * x.abs().sum((0, 2)), where)
        if before[0] is not None:
            y = view.grouped(before[0])
            assert_close(sums[Moment.SUM_G], y.sum((0, 2)), sums_eps * y.abs().sum((0, 2)), where)
            assert_close(sums[Moment.DOT_PG], (x * y).sum((0, 2)), sums_eps * (x * y).abs().sum((0, 2)), where)
    measurement.start(plan, [first is not None])
    states = [state.clone() for state in measurement.states]

    made.admit([g.tensor])
    made.step([g.tensor], [[v] for v in buffers], [options], [age], HOST)

    assert_close(p.tensor, expected_step.p, of_stored(expected_step.p, errors.p, dtype), f"parameters, {where}")
    assert torch.equal(g.tensor, kept[1]), where
    for k, (a, after, error) in enumerate(zip(arenas, expected_step.buffers, errors.buffers, strict=True)):
        if k < rule.n_written(options):
            assert after is not None
            assert error is not None
            assert_close(a.tensor, after, of_stored(after, error, dtype), f"{rule.buffers[k]}, {where}")
        else:
            assert torch.equal(a.tensor, kept[2 + k]), where
    for a, outside in zip(everything, surroundings, strict=True):
        assert torch.equal(a.outside(), outside), f"wrote out of bounds, {where}"

    factors = oracle.operands(p.tensor, p64, g64, expected_step)
    for view in plan.views:
        sums = measurement.moments[:, view.segment : view.segment + view.n_segments]
        expected = oracle.moments(rule, options, view, factors)
        assert_close(sums, expected, of_moments(rule, options, view, factors, errors, sums_eps), f"moments, {where}")
        for law in Law:
            at = view.law_segment[law]
            if at < 0:
                continue
            state = states[law][:, at : at + view.n_segments].clone()
            oracle.advance(rule, law, state, sums, options, age)
            actual = measurement.states[law][:, at : at + view.n_segments]
            torch.testing.assert_close(joined(rule, law, actual), joined(rule, law, state), rtol=1e-13, atol=1e-13)
    if plan.n_segments:
        for law in Law:
            expected = torch.eye(2, dtype=torch.float64).repeat(len(PROPAGATED), 1, 1)
            if law in plan.laws:  # the others' stand still
                propagate(expected, rule.steps(options, age, (law,))[law])
            actual = measurement.propagators[0, law]
            torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-15)


def joined(rule: Rule[Any], law: Law, state: Tensor) -> Tensor:
    """A law's state with the budget's x as one number: which part of it is the rest hangs on x's last bit."""
    x, rest = rule.laws[law].rows["budget"], rule.laws[law].rows["budget"] + 1
    assert (state[rest].abs() <= torch.finfo(torch.float64).eps * state[x].abs()).all()
    return torch.cat([state[:x], (state[x] + state[rest])[None], state[rest + 1 :]])


SHAPES = [(523, 771), (64, 64), (1031, 19), (300, 7, 3, 3), (77,), (1, 70_001), (2000, 3), (0, 4), (131_101,)]
if INTERPRETED:  # where each block of a few hundred elements takes milliseconds
    SHAPES = [(6, 771), (67, 131), (9, 64), (5, 7, 3, 3), (7,), (1, 301), (40, 3), (0, 4), (131,)]


Tensors = list[Tensor]


def model(dtype: torch.dtype, kit: Kit = KITS["sgd"]) -> tuple[Tensors, Tensors, list[Tensors], Plan, list[str]]:
    """Parameters, gradients, all buffers of a rule, a plan of norms along every axis, and names."""
    generator = torch.Generator().manual_seed(0)
    names = [f"w{i}" for i in range(len(SHAPES))]
    symmetries: list[Symmetry] = []
    for name, shape in zip(names, SHAPES, strict=True):
        for axis in [*range(len(shape)), None]:
            if axis is None or shape[axis]:
                symmetries.append(Norm(f"{name}[{axis}]", [Part(name, axis)]))
    p, g, *buffers = (
        [torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(2 + len(kit.rule.buffers))
    )
    buffers = [of if signed else [v.abs_() for v in of] for of, signed in zip(buffers, kit.signed, strict=True)]
    return p, g, buffers, make_plan(symmetries, names, SHAPES, kit.rule), names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each(*CPU_ENGINES)
def test_bitwise_the_same_for_any_number_of_threads(rule: str, engine: str, dtype: torch.dtype) -> None:
    before, kit = torch.get_num_threads(), KITS[rule]
    results = []
    try:
        for n_threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(n_threads)
            p, g, buffers, plan, names = model(dtype, kit)
            measurement = poisoned(plan)
            made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
            made.measure(buffers)
            measurement.start(plan, [True] * len(p))
            for _ in range(3):
                made.admit(g)
                made.step(g, buffers, [kit.usual], [1] * len(p), HOST)
            results.append([*p, *chain(*buffers), *measurement.tensors()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert not torch.isnan(one).any()
            assert torch.equal(one, two)


@each()
def test_a_tensor_without_gradient_waits(rule: str, engine: str) -> None:
    kit = KITS[rule]
    p, g, buffers, plan, names = model(torch.float64, kit)
    measurement = poisoned(plan)
    made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
    made.measure(buffers)
    measurement.start(plan, [True] * len(p))
    made.admit(g)
    made.step(g, buffers, [kit.usual], [1] * len(p), HOST)
    p_before, v_before = p[0].clone(), [of[0].clone() for of in buffers]
    m_before = [x.clone() for x in measurement.tensors()]
    grads = [None, *g[1:]]
    made.admit(grads)
    made.step(grads, buffers, [kit.usual], [1] * len(p), HOST)
    assert torch.equal(p[0], p_before)
    assert all(torch.equal(of[0], v) for of, v in zip(buffers, v_before, strict=True))
    assert not torch.equal(p[1], p_before)
    for view in plan.views:
        segments = slice(view.segment, view.segment + view.n_segments)
        at = slice(view.law_segment[Law.NORM], view.law_segment[Law.NORM] + view.n_segments)
        waits = view.tensor == 0
        assert torch.equal(measurement.states[Law.NORM][:, at], m_before[2][:, at]) == (
            waits or p[view.tensor].numel() == 0
        )
        if waits:
            assert torch.equal(measurement.moments[: Moment.SUM_G, segments], m_before[0][: Moment.SUM_G, segments])
            assert (measurement.moments[Moment.SUM_G :, segments] == 0).all()
    assert torch.equal(measurement.propagators[0], m_before[3][0])
    assert not torch.equal(measurement.propagators[1], m_before[3][1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_buffer_that_momentum_zero_leaves_keeps_its_law(engine: str) -> None:
    p, g, (v,), plan, names = model(torch.float64)
    measurement = poisoned(plan)
    made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
    made.measure([v])
    measurement.start(plan, [True] * len(p))
    for hyper in (HYPERS["momentum"], HYPERS["plain"], HYPERS["decay, maximize"], HYPERS["nesterov"]):
        made.admit(g)
        made.step(g, [v], [hyper], [1] * len(p), HOST)
    for view in plan.views:
        at = view.law_segment[Law.NORM]
        state = measurement.states[Law.NORM][:, at : at + view.n_segments]
        free = measurement.propagators[view.tensor, Law.NORM, 0] @ state[:N_START]
        at, defect = SGD.laws[Law.NORM].rows["budget"], SGD.laws[Law.NORM].rows["defect"]
        budget = torch.stack([state[at] + state[at + 1], state[at + 2]])
        terms = torch.stack([free, state[defect : defect + 2], budget])
        x, y = view.grouped(p[view.tensor]), view.grouped(v[view.tensor])
        truth = torch.stack([(x * x).sum((0, 2)), (x * y).sum((0, 2))])
        assert_close(budget, truth, 1e-13 * terms.abs().amax((1, 2)).sum(), f"view {view}")


@pytest.mark.parametrize("measured", [False, True], ids=["alone", "measured"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_number_of_16_bits_is_rounded_as_torch_rounds_it(engine: str, dtype: torch.dtype, measured: bool) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    p = every[~every.isinf()].clone()  # an infinite weight has no decay, not even one of 0
    g = p.roll(12_345).clone()
    g[::1000], g[1::1000] = torch.inf, torch.nan
    expected = (p.float() - g.float()).to(dtype)
    plan = make_plan([Norm("all", [Part("w", 0, fold=p.numel())])] if measured else [], ["w"], [tuple(p.shape)])
    made = ENGINES[engine](plan, [p], ["w"], [0], Measurement.empty(plan, "cpu", 1))
    made.admit([g])
    made.step([g], [[None]], [Hyper(1.0)], [1], HOST)
    assert expected.isnan().sum() > 100
    assert torch.equal(p.isnan(), expected.isnan())
    assert torch.equal(p[~p.isnan()], expected[~p.isnan()])


# ---- 16-bit numbers whose products leave the range of float32 --------------------------------------------------------


def sizes(pattern: str, shape: tuple[int, int], which: int, power: int) -> Tensor:
    """What the elements of a tensor are multiplied by: of the parameter (which = 0), the gradient (1) or a buffer."""
    row, col = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None]
    small, large = 2.0**-power, 2.0**power
    every = torch.ones(shape, dtype=torch.float64)
    where = {
        "small": (every > 0, small, 1.0),
        "large": (every > 0, large, 1.0),
        "small rows": (row % 3 == 1, small, 1.0),
        "small columns": (col % 3 == 1, small, 1.0),
        "large at last": (row + col == sum(shape) - 2, large, 1.0),
        "small at first": (row < 20, small, 1.0),
        # Squares are large enough, products of two tensors are not.
        "small where others are not": ((row + col + which) % 2 == 0, 2.0**-120, 2.0**-30),
        "no gradient": ((which == 1) & ((row % 3 == 1) | (col % 4 == 1)), 0.0, 1.0),
    }
    return torch.where(*where[pattern]) * every


@pytest.mark.parametrize(
    "pattern",
    [
        "small",
        "large",
        "small rows",
        "small columns",
        "large at last",
        "small at first",
        "small where others are not",
        "no gradient",
    ],
)
@each(*CPU_ENGINES)
def test_products_that_float32_does_not_hold(rule: str, engine: str, pattern: str) -> None:
    """Squares of bfloat16 numbers of 2⁻⁸³ and 2⁸³, within the same bounds; Adam squares gradients in float32 itself."""
    kit = KITS[rule]
    dtype, power = torch.bfloat16, 55 if rule == "adam" else 83
    for shape, which in [
        ((37, 272), "rows and columns"),
        ((5, 1024), "rows and columns"),
        ((3, 530), "rows"),
        ((70, 21), "columns"),
    ]:
        tensors = [
            (torch.randn(shape, dtype=torch.float64) * sizes(pattern, shape, i, power)).to(dtype)
            for i in range(2 + len(kit.signed))
        ]
        check_sums(kit, engine, tensors, which, kit.usual, f"{shape}, {which}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lr", [1e-30, 1e30])
@each(*CPU_ENGINES, rules=["given"])
def test_squares_of_updates_that_float32_does_not_hold(rule: str, engine: str, lr: float, dtype: torch.dtype) -> None:
    """An update is not stored: it may have any size whatever the dtype."""
    for which in ("rows", "columns", "rows and columns"):
        tensors = [torch.randn(37, 272).to(dtype) for _ in range(3)]
        check_sums(KITS[rule], engine, tensors, which, GivenOptions(lr=lr), which)


def check_sums(kit: Kit, engine: str, tensors: Tensors, parts: str, options: Any, where: str) -> None:
    """The moments of a step of one tensor, and of the pass that only measures it."""
    rule, age = kit.rule, 1
    for x, signed in zip(tensors[2:], kit.signed, strict=True):
        x.copy_(x if signed else x.abs())
    p, g, *buffers = tensors
    p64, g64, *before = (x.double() for x in tensors)
    expected = oracle.step(rule, p64, g64, tuple(before), rule.coefficients_of(options, age))
    errors = of_step(rule, p64, g64, tuple(before), rule.coefficients_of(options, age), p.dtype)
    shape = tuple(p.shape)
    plan = make_plan(symmetries_for(shape, parts), ["w"], [shape], rule)
    measurement, eps = poisoned(plan), sum_eps(engine, p.dtype)
    made = ENGINES[engine](plan, [p], ["w"], [0], measurement)
    made.measure([[x] for x in buffers])
    for view in plan.views:
        sums = measurement.moments[:, view.segment : view.segment + view.n_segments]
        for moment, terms in (
            (Moment.SQ_P, p64 * p64),
            (Moment.SQ_G, before[0] ** 2),
            (Moment.DOT_PG, p64 * before[0]),
        ):
            x = view.grouped(terms)
            assert_close(sums[moment], x.sum((0, 2)), eps * x.abs().sum((0, 2)), f"measured {moment}, {where}")
    measurement.start(plan, [True])
    made.admit([g])
    made.step([g], [[x] for x in buffers], [options], [age], HOST)
    factors = oracle.operands(p, p64, g64, expected)
    for view in plan.views:
        sums = measurement.moments[:, view.segment : view.segment + view.n_segments]
        bound = of_moments(rule, options, view, factors, errors, eps)
        assert_close(sums, oracle.moments(rule, options, view, factors), bound, f"moments, {where}")


# ---- rules that count steps -----------------------------------------------------------------------------------------


@each(*(name for name in ENGINES if name != "reference"))
def test_tensors_of_many_ages_in_several_groups(rule: str, engine: str) -> None:
    """Tensors that come late, or wait a step, have rows of their own."""
    kit = KITS[rule]
    p, g, buffers, plan, names = model(torch.float64, kit)
    groups = [i % 3 % 2 for i in range(len(p))]
    options = [kit.usual, replace(kit.options[kit.paths[0]], lr=0.03)]
    ages = [kit.ages[i % len(kit.ages)] for i in range(len(p))]
    q, w = [x.clone() for x in p], [[x.clone() for x in of] for of in buffers]
    measured, expected = Measurement.empty(plan, n_groups=2), Measurement.empty(plan, n_groups=2)
    made: Engine = ENGINES[engine](plan, p, names, groups, measured)
    peer: Engine = ReferenceEngine(plan, q, names, groups, expected)
    for turn in range(4):
        grads = [None if turn == 1 and i % 2 else x for i, x in enumerate(g)]
        for one, of_all in ((made, buffers), (peer, w)):
            one.admit(grads)
            one.step(grads, of_all, options, ages, OnDevice([None, None]))
        ages = [age if x is None else kit.rule.older(age) for age, x in zip(ages, grads, strict=True)]
    for one_x, two_x in zip((*p, *chain(*buffers)), (*q, *chain(*w)), strict=True):
        torch.testing.assert_close(one_x, two_x, rtol=1e-12, atol=1e-12)
    for one_x, two_x in zip(measured.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(one_x, two_x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("beta2", [0.999, 0.0], ids=["adam", "sign"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(rules=["adam"])
def test_a_division_by_zero_is_a_parameters_own(rule: str, engine: str, dtype: torch.dtype, beta2: float) -> None:
    """With ε = 0 an element without a gradient so far becomes NaN, as in torch, and nothing beside it."""
    options = AdamOptions(lr=0.5, beta1=0.9 if beta2 else 0.0, beta2=beta2, eps=0.0)
    for shape in ((3, 7), (5, 37), (2, 129), (33,)):
        for axes in ((), (0,), (1,), (0, 1)):
            plan = make_plan(
                [Norm(str(a), [Part("w", a)]) for a in axes if a < len(shape)], ["w"], [shape], KITS[rule].rule
            )
            p, g = torch.randn(shape).to(dtype), torch.ones(shape, dtype=dtype)
            g.view(-1)[5] = 0.0
            expected = p - 0.5 * g / g
            measurement = poisoned(plan)
            made = ENGINES[engine](plan, [p], ["w"], [0], measurement)
            made.admit([g])
            made.step([g], [[torch.zeros_like(p)], [torch.zeros_like(p)], [None]], [options], [0], HOST)
            torch.testing.assert_close(p, expected, equal_nan=True)
            for view in plan.views:
                sums = measurement.moments[Moment.SQ_P, view.segment : view.segment + view.n_segments]
                hit = (view.grouped(g) == 0.0).any(2).any(0)
                assert torch.equal(sums.isnan(), hit)


EDGES = [(8, 16), (3, 7), (5, 37), (2, 129), (4, 776), (33,), (1, 5), (64, 1)]


@pytest.mark.parametrize("at_end", [False, True], ids=["at a page's begin", "at a page's end"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each(*CPU_ENGINES, *(name for name in ENGINES if name == "cuda-emulated"))
def test_nothing_outside_of_a_tensor_is_touched(rule: str, engine: str, dtype: torch.dtype, at_end: bool) -> None:
    """What lies beside each tensor is a page that cannot be read."""
    kit = KITS[rule]
    names = [f"w{i}" for i in range(len(EDGES))]
    parts = [(name, axis) for name, shape in zip(names, EDGES, strict=True) for axis in range(len(shape))]
    for wanted in ([], [p for p in parts if p[1] == 0], [p for p in parts if p[1] == 1], parts):
        symmetries = [Norm(f"{name}[{axis}]", [Part(name, axis)]) for name, axis in wanted]
        plan = make_plan(symmetries, names, EDGES, kit.rule)
        for label in kit.paths:
            tensors = [[torch.randn(shape).to(dtype) for shape in EDGES] for _ in range(2 + len(kit.signed))]
            for of, signed in zip(tensors[2:], kit.signed, strict=True):
                of[:] = of if signed else [x.abs_() for x in of]
            results = []
            for copies in (tensors, [[guarded(x, at_end=at_end) for x in of] for of in tensors]):
                p, g, *buffers = copies
                measurement = poisoned(plan)
                made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
                made.measure(buffers)
                measurement.start(plan, [True] * len(p))
                made.admit(g)
                made.step(g, buffers, [kit.options[label]], [1] * len(p), HOST)
                results.append(([*p, *g, *chain(*buffers)], measurement.tensors()))
            (written, sums), (beside, sums_beside) = results
            assert all(map(torch.equal, written, beside))
            for one, two in zip(sums, sums_beside, strict=True):
                if engine.startswith("cpu"):
                    assert torch.equal(one, two)
                else:  # aligned tensors are summed in another order
                    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each()
def test_what_is_not_finite_stays_in_its_own_segments(rule: str, engine: str, bad: float, dtype: torch.dtype) -> None:
    kit = KITS[rule]
    p, g, buffers, plan, names = model(dtype, kit)
    g[0][5, 700] = bad
    measurement = poisoned(plan)
    made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
    made.measure(buffers)
    measurement.start(plan, [True] * len(p))
    made.admit(g)
    made.step(g, buffers, [kit.usual], [1] * len(p), HOST)
    for view in plan.views:
        sq_g = measurement.moments[Moment.SQ_G, view.segment : view.segment + view.n_segments]
        hit = {0: 5, 1: 700}.get(view.axis) if view.tensor == 0 else None
        assert [i for i, x in enumerate(sq_g.isfinite().tolist()) if not x] == ([] if hit is None else [hit])


@each(*(name for name in ENGINES if name != "reference"))
def test_gradients_may_change_their_layout_between_steps(rule: str, engine: str) -> None:
    kit = KITS[rule]
    p, g, v, plan, names = model(torch.float64, kit)
    q, w = [x.clone() for x in p], [[x.clone() for x in of] for of in v]
    measured, expected = Measurement.empty(plan), Measurement.empty(plan)
    made: Engine = ENGINES[engine](plan, p, names, [0] * len(p), measured)
    peer: Engine = ReferenceEngine(plan, q, names, [0] * len(p), expected)
    for turn in range(4):
        grads = [x.t().contiguous().t() if x.dim() == 2 and turn % 2 else x for x in g]
        for one, buffers in ((made, v), (peer, w)):
            one.admit(grads)
            one.step(grads, buffers, [kit.usual], [1] * len(p), HOST)
    for one_p, two_p in zip(p, q, strict=True):
        torch.testing.assert_close(one_p, two_p, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(measured.moments, expected.moments, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_clock_counts_steps_and_each_groups_time(engine: str) -> None:
    p, g, (v,), plan, names = model(torch.float32)
    measurement = Measurement.empty(plan, n_groups=2)
    made = ENGINES[engine](plan, p, names, [i % 2 for i in range(len(p))], measurement)
    for lr in (0.1, 0.1, 0.025):
        made.admit(g)
        hypers = [Hyper(lr), Hyper(2 * lr, momentum=0.9, dampening=0.5)]
        made.step(g, [v], hypers, [1] * len(p), OnDevice([None, None]))
    assert measurement.clock.tolist() == pytest.approx([3.0, 0.225, 0.225], rel=1e-15)
    measurement.start(plan, [True] * len(p))
    assert measurement.clock.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each()
def test_scaled_gradients_are_divided_and_left_divided(rule: str, engine: str, dtype: torch.dtype) -> None:
    """By a power of two, so that every number is exactly what it is without a scale."""
    kit = KITS[rule]
    results = []
    for scale in (None, 1024.0):
        p, g, buffers, plan, names = model(dtype, kit)
        for x in g:
            x.mul_(scale or 1.0)
        measurement = Measurement.empty(plan)
        made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
        made.admit(g)
        on_device = OnDevice([None], None if scale is None else torch.tensor(scale))
        made.step(g, buffers, [kit.usual], [0] * len(p), on_device)
        results.append([*p, *g, *chain(*buffers), *measurement.tensors()])
    for plain, scaled in zip(*results, strict=True):
        assert torch.equal(plain, scaled)


def on_device_engines() -> list[str]:
    """Those that read learning rates and flags themselves."""
    return [name for name in ENGINES if not name.startswith("cpu")]


@each(*on_device_engines())
def test_a_learning_rate_on_the_device(rule: str, engine: str) -> None:
    results, kit = [], KITS[rule]
    for on_device in (False, True):
        p, g, buffers, plan, names = model(torch.float64, kit)
        measurement = Measurement.empty(plan)
        made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
        made.admit(g)
        lr = torch.tensor([0.1], dtype=torch.float64)
        options = replace(kit.usual, lr=torch.nan if on_device else 0.1)
        made.step(g, buffers, [options], [0] * len(p), OnDevice([lr if on_device else None]))
        results.append([*p, *chain(*buffers), *measurement.tensors()])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("flag", [1.0, 2.0])  # a sum over devices is more than one
@pytest.mark.parametrize("engine", on_device_engines())
def test_a_step_that_overflows_writes_nothing(engine: str, flag: float) -> None:
    """And does not use up the first step, which is not dampened."""
    results = []
    for skipped in (False, True):
        p, g, (v,), plan, names = model(torch.float64)
        for x in v:
            x.zero_()
        measurement = Measurement.empty(plan)
        made = ENGINES[engine](plan, p, names, [0] * len(p), measurement)
        made.measure([v])
        measurement.start(plan, [False] * len(p))
        ages = [0] * len(p)
        if skipped:
            overflowed = [torch.full_like(x, torch.inf) for x in g]
            before = [x.clone() for x in (*p, *v, *measurement.tensors())]
            made.admit(overflowed)
            found_inf, scale = torch.tensor(flag), torch.tensor(8.0)
            made.step(overflowed, [v], [HYPERS["dampening"]], ages, OnDevice([None], scale, found_inf))
            after = (*p, *v, *measurement.tensors())
            assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
            ages = [1] * len(p)
        for _ in range(2):
            made.admit(g)
            made.step(g, [v], [HYPERS["dampening"]], ages, OnDevice([None], None, torch.tensor(0.0)))
            ages = [1] * len(p)
        results.append([*p, *v, *measurement.tensors()])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)
