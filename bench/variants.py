"""The variants that a case compares: noetherperf, torch's SGD, the same measurement written in torch, and the floor.

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
from bench.cases import LR, WEIGHT_DECAY, Case
from bench.inputs import InputSet
from bench.timing import Step
from noetherperf.engines.floor import memory_floor
from noetherperf.measure.plan import View, make_plan

Tensors = Sequence[Tensor]

MAX_COMPILED = 200  # tensors; torch.compile unrolls the loop over them


class Unavailable(Exception):
    """A variant cannot run a case; the message says why."""


def one_line(error: Exception) -> str:
    """An error as the reason why a variant has no time."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


# ---- optimizers -----------------------------------------------------------------------------------------------------


def ours(case: Case, inputs: InputSet, *, measuring: bool = True, backend: str = "auto") -> nperf.SGD:
    """noetherperf's optimizer over one input set, its momentum buffers warm."""
    optimizer = nperf.SGD(
        list(zip(case.names, inputs.params, strict=True)),
        lr=LR,
        momentum=case.momentum,
        weight_decay=WEIGHT_DECAY,
        symmetries=case.symmetries() if measuring else (),
        backend=backend,
    )
    _warm(optimizer, inputs)
    return optimizer


def peer(case: Case, inputs: InputSet, **how: bool) -> torch.optim.SGD:
    """torch's optimizer over one input set, its momentum buffers warm."""
    optimizer = torch.optim.SGD(inputs.params, lr=LR, momentum=case.momentum, weight_decay=WEIGHT_DECAY, **how)
    _warm(optimizer, inputs)
    return optimizer


def _warm(optimizer: torch.optim.Optimizer, inputs: InputSet) -> None:
    for p, v in zip(inputs.params, inputs.buffers, strict=False):
        optimizer.state[p]["momentum_buffer"] = v


def _ours(case: Case, sets: Sequence[InputSet], **how: Any) -> list[Step]:
    return [ours(case, inputs, **how).step for inputs in sets]


def _peer(case: Case, sets: Sequence[InputSet], **how: bool) -> list[Step]:
    return [peer(case, inputs, **how).step for inputs in sets]


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
    update: Step, p: Tensors, g: Tensors, v: Tensors, views: Sequence[View], sums: Callable[..., Tensor]
) -> list[tuple[Tensor, ...]]:
    """Step and measure: ⟨p, g⟩ before, the charges after, as the law needs them; in float32 for 16-bit tensors.

    Args:
        update: Makes the step on these parameters p, gradients g and buffers v (none without momentum).
        views: What to measure.
        sums: plain_sums or norm_sums.

    Returns:
        Per view Σ p, Σ p², Σ g, Σ g², Σ p g, Σ u², each [n_segments].
    """

    tensors = sorted({view.tensor for view in views})
    dots = [sums(view, wide(p[view.tensor]), wide(g[view.tensor])) for view in views]
    updates = {} if v else {i: wide(g[i]) + WEIGHT_DECAY * wide(p[i]) for i in tensors}
    update()
    updates = updates or {i: wide(v[i]) for i in tensors}
    found: list[tuple[Tensor, ...]] = []
    for view, dot in zip(views, dots, strict=True):
        x, y, u = wide(p[view.tensor]), wide(g[view.tensor]), updates[view.tensor]
        found.append((sums(view, x), sums(view, x, x), sums(view, y), sums(view, y, y), dot, sums(view, u, u)))
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
        return lambda: measured(update, p, inputs.grads, inputs.buffers, views, sums)

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

    def step(inputs: InputSet) -> Step:
        p, g, v = [p.detach() for p in inputs.params], inputs.grads, inputs.buffers
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


def _update(momentum: float, p: Tensors, g: Tensors, v: Tensors) -> None:
    """The step in the plainest torch, for torch.compile to fuse."""
    for i, (parameter, gradient) in enumerate(zip(p, g, strict=True)):
        u = gradient + WEIGHT_DECAY * parameter
        if v:
            u = momentum * v[i] + u
            v[i].copy_(u)
        parameter.copy_(parameter - LR * u)


def _compiled(case: Case, sets: Sequence[InputSet], *, measuring: bool) -> list[Step]:
    if len(case.shapes) > MAX_COMPILED:
        raise Unavailable(f"unrolled over {len(case.shapes)} tensors it would compile for too long")
    views = views_of(case) if measuring else ()

    def step(p: Tensors, g: Tensors, v: Tensors) -> list[tuple[Tensor, ...]]:
        return measured(functools.partial(_update, case.momentum, p, g, v), p, g, v, views, plain_sums)

    torch.compiler.reset()
    compiled: Callable[..., object] = torch.compile(step, fullgraph=True, dynamic=False)
    return [
        functools.partial(compiled, [p.detach() for p in inputs.params], inputs.grads, inputs.buffers)
        for inputs in sets
    ]


# ---- the machine's floor --------------------------------------------------------------------------------------------


def floor(case: Case, sets: Sequence[InputSet]) -> dict[str, list[Step]]:
    """What memory alone allows: as many bytes as the case moves, in one call, in streams of their own.

    "floor" reads three streams and writes two of them in place (memory_floor), "copy" is torch's copy_, half of the
    bytes read and half of them written.
    """
    n = max(1, case.bytes_moved // 20)  # float32 in each stream, five passes
    streams = [torch.ones(3 * n) for _ in sets]
    n_threads = torch.get_num_threads()

    def copy(x: Tensor, y: Tensor) -> Step:
        source, target = x[: 5 * n // 2], y[: 5 * n // 2]
        return lambda: target.copy_(source)

    steps: dict[str, list[Step]] = {"floor": [memory_floor(x.view(3, n), 2, n_threads) for x in streams]}
    if len(streams) > 1:
        steps["copy"] = [copy(x, y) for x, y in zip(streams, [*streams[1:], streams[0]], strict=True)]
    return steps


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One contender.

    Fields:
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
MEASURING = ("ours", "unmeasured", "fused", "eager", "norms", "compiled_measured", "paper")


def names_for(case: Case) -> tuple[str, ...]:
    """The variants that a case compares: other steps, or other measurements."""
    match case.suite:
        case "step":
            return STEPPING if case.view == "none" else MEASURING
        case "host":
            return tuple(name for name in STEPPING if name != "compiled")
        case _:
            return ("ours", "fused") if case.view == "none" else ("ours", "unmeasured", "fused")
