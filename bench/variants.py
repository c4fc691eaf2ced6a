"""The variants that a case compares: noetherperf, torch's optimizer, the same measurement written in torch, and the
floor.

Every variant steps the same tensors with the same hyperparameters. A maker returns one callable per input set; it
raises Unavailable, with the reason, if the variant cannot run the case.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import noetherperf as nperf
from bench.cases import Case
from bench.inputs import InputSet, make_input_set
from bench.recipes import LR, WEIGHT_DECAY, Recipe, UpdateOf
from bench.timing import Step
from noetherperf.engines.floor import memory_floor
from noetherperf.measure.plan import View, make_plan
from noetherperf.optim.measured import MeasuredOptimizer

Tensors = Sequence[Tensor]

MAX_COMPILED = 200  # tensors; torch.compile unrolls the loop over them


class Unavailable(Exception):
    """A variant cannot run a case; the message says why."""


def one_line(error: Exception) -> str:
    """An error as the reason why a variant has no time."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# ---- optimizers -----------------------------------------------------------------------------------------------------


def ours(case: Case, inputs: InputSet, *, measuring: bool = True, backend: str = "auto") -> MeasuredOptimizer:
    """noetherperf's optimizer over one input set, its buffers warm."""
    make: Callable[..., MeasuredOptimizer] = case.recipe.ours
    optimizer = make(
        list(zip(case.names, inputs.params, strict=True)),
        **case.recipe.options,
        symmetries=case.symmetries() if measuring else (),
        backend=backend,
    )
    _warm(case, optimizer, inputs)
    return optimizer


def peer(case: Case, inputs: InputSet, **how: bool) -> torch.optim.Optimizer:
    """torch's optimizer over one input set, its buffers warm."""
    make: Callable[..., torch.optim.Optimizer] = case.recipe.torch
    optimizer = make(inputs.params, **case.recipe.options, **how)
    _warm(case, optimizer, inputs)
    return optimizer


def _warm(case: Case, optimizer: torch.optim.Optimizer, inputs: InputSet) -> None:
    if case.recipe.buffers:
        for p, *buffers in zip(inputs.params, *inputs.buffers, strict=True):
            optimizer.state[p].update(case.recipe.state(buffers))


def _ours(case: Case, sets: Sequence[InputSet], **how: Any) -> list[Step]:
    return [ours(case, inputs.alone(), **how).step for inputs in sets]


def _peer(case: Case, sets: Sequence[InputSet], **how: bool) -> list[Step]:
    return [peer(case, inputs, **how).step for inputs in sets]


def _probed(case: Case, sets: Sequence[InputSet]) -> list[Step]:
    """torch's fused step, measured from outside by a Probe.

    It has tensors of its own: a Probe notices the steps that other variants make, and would measure anew each time.
    """

    def step(number: int) -> Step:
        inputs = make_input_set(case, number, sets[number].grads[0].device)
        optimizer = peer(case, inputs, fused=True)
        probe = nperf.Probe(optimizer, case.symmetries(), dict(zip(case.names, inputs.params, strict=True)))
        probe.readout()
        return optimizer.step

    return [step(number) for number in range(len(sets))]


# ---- the same measurement in torch ----------------------------------------------------------------------------------


def plain_sums(view: View, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Σ x, or Σ x y, of every segment."""
    return (view.grouped(x) if y is None else view.grouped(x) * view.grouped(y)).sum((0, 2))


def norm_sums(view: View, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same, squares of contiguous runs by torch's norm, which is faster there and slower anywhere else."""
    grouped = view.grouped(x)
    if x is y and grouped.shape[0] == 1 and grouped.shape[2] > 1:
        norms: Tensor = torch.linalg.vector_norm(grouped[0], dim=1)
        return norms.square()
    return plain_sums(view, x, y)


def measured(
    recipe: Recipe,
    step: Step,
    p: Tensors,
    g: Tensors,
    buffers: Sequence[Tensors],
    views: Sequence[View],
    sums: Callable[..., Tensor],
) -> list[tuple[Tensor, ...]]:
    """Step and measure: ⟨p, g⟩ before, the charges after, as the law needs them; in float32 for 16-bit tensors.

    Args:
        recipe: The update rule.
        step: Makes the step on these parameters p, gradients g and buffers.
        views: What to measure.
        sums: plain_sums or norm_sums.

    Returns:
        Per view Σ p, Σ p², Σ g, Σ g², Σ p g, Σ u², and Σ p' u, Σ u where the law needs ⟨p, u⟩ and ⟨u, 1⟩: ⟨p, u⟩ is
        known from Σ p' u and Σ u². Each is [n_segments].
    """

    def updates(find: UpdateOf) -> dict[int, Tensor]:
        return {i: find(wide(p[i]), wide(g[i]), [wide(x[i]) for x in buffers]) for i in tensors}

    tensors = sorted({view.tensor for view in views})
    dots = [sums(view, wide(p[view.tensor]), wide(g[view.tensor])) for view in views]
    before = {} if recipe.before is None else updates(recipe.before)
    step()
    after = before if recipe.after is None else updates(recipe.after)
    found: list[tuple[Tensor, ...]] = []
    for view, dot in zip(views, dots, strict=True):
        x, y, u = wide(p[view.tensor]), wide(g[view.tensor]), after[view.tensor]
        common = (sums(view, x), sums(view, x, x), sums(view, y), sums(view, y, y), dot, sums(view, u, u))
        found.append((*common, sums(view, x, u), sums(view, u)) if recipe.sums_of_update else common)
    return found


def wide(x: Tensor) -> Tensor:
    """In float32 at least: what a sum of 16-bit numbers needs."""
    return x.float() if x.dtype.itemsize == 2 else x


def views_of(case: Case) -> tuple[View, ...]:
    """The views that noetherperf plans for the case."""
    return make_plan(case.symmetries(), case.names, case.shapes).views


def _after_fused(case: Case, sets: Sequence[InputSet], *, sums: Callable[..., Tensor]) -> list[Step]:
    views = views_of(case)

    def step(inputs: InputSet) -> Step:
        p, update = [p.detach() for p in inputs.params], peer(case, inputs, fused=True).step
        return lambda: measured(case.recipe, update, p, inputs.grads, inputs.buffers, views, sums)

    return [step(inputs) for inputs in sets]


def _norms(case: Case, sets: Sequence[InputSet]) -> list[Step]:
    match case.view:
        case "columns":
            raise Unavailable("torch's norms have nothing faster to offer along columns")
        case "whole":
            return _foreach_norms(case, sets)
        case _:
            return _after_fused(case, sets, sums=norm_sums)


def _foreach_norms(case: Case, sets: Sequence[InputSet]) -> list[Step]:
    """Whole tensors at once: torch._foreach_norm for the squares, one sum or dot product per tensor for the rest."""
    if case.rule not in ("b0.9", "b0"):
        raise Unavailable("written for SGD alone")

    def step(inputs: InputSet) -> Step:
        p, g, v = [p.detach() for p in inputs.params], inputs.grads, inputs.buffers[0] if inputs.buffers else []
        update = peer(case, inputs, fused=True).step
        dtype = wide(p[0]).dtype

        def run() -> list[object]:
            dots = [torch.dot(wide(x).flatten(), wide(y).flatten()) for x, y in zip(p, g, strict=True)]
            u = v or torch._foreach_add(g, p, alpha=WEIGHT_DECAY)
            update()
            norms = [torch._foreach_norm(x, 2, dtype) for x in (p, g, u)]
            return [dots, norms, [x.sum(dtype=dtype) for x in (*p, *g)]]

        return run

    return [step(inputs) for inputs in sets]


def _paper(case: Case, sets: Sequence[InputSet]) -> list[Step]:
    """A buffer per parameter decays and takes in the squared gradient at every step; sums are left to the end."""
    if case.rule not in ("b0.9", "b0"):
        raise Unavailable("the paper has SGD alone")
    integrals = [torch.zeros_like(p) for p in sets[0].params]
    decay = 1.0 - 2.0 * WEIGHT_DECAY * LR

    def step(inputs: InputSet) -> Step:
        update = peer(case, inputs, fused=True).step

        def run() -> None:
            torch._foreach_mul_(integrals, decay)
            torch._foreach_addcmul_(integrals, inputs.grads, inputs.grads, value=LR * LR)
            update()

        return run

    return [step(inputs) for inputs in sets]


# ---- torch.compile --------------------------------------------------------------------------------------------------


def _step_each(recipe: Recipe, p: Tensors, g: Tensors, buffers: Sequence[Tensors]) -> None:
    """The step in the plainest torch, for torch.compile to fuse."""
    for i, (parameter, gradient) in enumerate(zip(p, g, strict=True)):
        recipe.step(parameter, gradient, [x[i] for x in buffers])


def _compiled(case: Case, sets: Sequence[InputSet], *, measuring: bool) -> list[Step]:
    if len(case.shapes) > MAX_COMPILED:
        raise Unavailable(f"unrolled over {len(case.shapes)} tensors it would compile for too long")
    views = views_of(case) if measuring else ()

    def step(p: Tensors, g: Tensors, buffers: Sequence[Tensors]) -> list[tuple[Tensor, ...]]:
        make = functools.partial(_step_each, case.recipe, p, g, buffers)
        return measured(case.recipe, make, p, g, buffers, views, plain_sums)

    torch.compiler.reset()
    compiled: Callable[..., object] = torch.compile(step, fullgraph=True, dynamic=False)
    return [
        functools.partial(compiled, [p.detach() for p in inputs.params], inputs.grads, inputs.buffers)
        for inputs in sets
    ]


# ---- the machine's floor --------------------------------------------------------------------------------------------


def floor(case: Case, sets: Sequence[InputSet]) -> dict[str, list[Step]]:
    """What memory alone allows: as many bytes as the case moves, in one call, in streams of their own.

    "floor" reads as many streams as the step and writes all but one of them in place (memory_floor), "copy" is torch's
    copy_, half of the bytes read and half of them written.
    """
    n_read, n_written = case.recipe.passes
    n = max(1, case.bytes_moved // (4 * (n_read + n_written)))  # float32 in each stream
    streams = [torch.ones(n_read * n) for _ in sets]
    n_threads = torch.get_num_threads()

    def copy(x: Tensor, y: Tensor) -> Step:
        half = (n_read + n_written) * n // 2
        source, target = x[:half], y[:half]
        return lambda: target.copy_(source)

    steps: dict[str, list[Step]] = {"floor": [memory_floor(x.view(n_read, n), n_written, n_threads) for x in streams]}
    if len(streams) > 1:
        steps["copy"] = [copy(x, y) for x, y in zip(streams, [*streams[1:], streams[0]], strict=True)]
    return steps


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One contender.

    Attributes:
        make: Makes its steps, one for each input set.
        how: Keyword arguments of make.
        note: What a reader of its figures must know.
        compiles: Whether torch.compile takes long before the first step.
    """

    make: Callable[..., list[Step]]
    how: dict[str, Any]
    note: str = ""
    compiles: bool = False


FUSED_NOTE = (
    "in bfloat16 and float16 torch 2.13's fused CPU step leaves parameters unchanged: there it is a peer in speed only"
)

VARIANTS: dict[str, Variant] = {
    "ours": Variant(_ours, {"measuring": True}),
    "unmeasured": Variant(_ours, {"measuring": False}),
    "fused": Variant(_peer, {"fused": True}, FUSED_NOTE),
    "foreach": Variant(_peer, {"foreach": True}),
    "forloop": Variant(_peer, {"foreach": False}),
    "compiled": Variant(_compiled, {"measuring": False}, compiles=True),
    "eager": Variant(_after_fused, {"sums": plain_sums}, FUSED_NOTE),
    "norms": Variant(_norms, {}, FUSED_NOTE),
    "probed": Variant(_probed, {}, FUSED_NOTE),
    "compiled_measured": Variant(_compiled, {"measuring": True}, compiles=True),
    "paper": Variant(
        _paper,
        {},
        "the integral of |g|² alone, at the price of one more number per parameter; " + FUSED_NOTE,
    ),
}

OURS = ("ours", "unmeasured")
FLOORS = ("floor", "copy")
STEPPING = ("ours", "fused", "foreach", "forloop", "compiled")
MEASURING = ("ours", "unmeasured", "fused", "probed", "eager", "norms", "compiled_measured", "paper")


def names_for(case: Case) -> tuple[str, ...]:
    """The variants that a case compares: other steps, or other measurements."""
    match case.suite:
        case "step":
            return STEPPING if case.view == "none" else MEASURING
        case "host":
            return tuple(name for name in STEPPING if name != "compiled")
        case _:
            return ("ours", "fused") if case.view == "none" else ("ours", "unmeasured", "fused")
