"""The gate before every timing: one step against its rule (oracle.py) in float64 on the same rounded inputs."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import oracle
from bench.bounds import assert_close, of_moments, of_step, of_stored, sum_eps
from bench.cases import Case
from bench.inputs import InputSet, make_input_set
from bench.variants import ours
from noetherperf.measure.plan import View, make_plan
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.rules.rule import Rule

CHUNK = 1 << 18  # elements compared at a time on a CPU: their temporary copies in float64 stay in the cache
GPU_CHUNK = 1 << 24  # and on a GPU, where a launch takes as long as a million elements
IN_FLOAT64 = 1 << 20  # elements of a case that check_in_float64 takes
TENSORS_IN_FLOAT64 = 200


class Mismatch(AssertionError):
    """A step differs from its rule, so its time means nothing."""


def _rows(x: Tensor) -> Iterator[slice]:
    """Ranges of the first axis, a chunk of elements each."""
    n = x.shape[0]
    step = max(1, (GPU_CHUNK if x.is_cuda else CHUNK) // max(1, prod(x.shape[1:])))
    return (slice(at, min(at + step, n)) for at in range(0, n, step))


def _chunk(view: View, rows: slice) -> tuple[View, slice]:
    """The view of some rows alone, and which of its segments they belong to."""
    n = rows.stop - rows.start
    if view.axis > 0:
        return view, slice(0, view.n_segments)
    if view.n_segments == 1:
        return replace(view, fold=n), slice(0, 1)
    return replace(view, n_segments=n), rows


class _Tensors(NamedTuple):
    """One parameter with its gradient and buffers; None for buffers that it does not have."""

    p: Tensor
    g: Tensor
    buffers: tuple[Tensor | None, ...]

    def part(self, rows: slice) -> "_Tensors":
        """Some rows, in float64."""
        buffers = tuple(None if v is None else v[rows].double() for v in self.buffers)
        return _Tensors(self.p[rows].double(), self.g[rows].double(), buffers)


def _tensors(rule: Rule[Any], inputs: InputSet) -> list[_Tensors]:
    missing = (None,) * (len(rule.buffers) - len(inputs.buffers))
    held = zip(*inputs.buffers, strict=True) if inputs.buffers else [()] * len(inputs.params)
    whose = zip(inputs.params, inputs.grads, held, strict=True)
    return [_Tensors(p.detach(), g, (*its, *missing)) for p, g, its in whose]


def check(case: Case, inputs: InputSet, optimizer: MeasuredOptimizer) -> None:
    """Make one step and compare parameters, buffers and every symmetry's moments.

    Raises:
        Mismatch: Something is beyond its bound.
    """
    rule = optimizer.rule
    options, age = rule.options(optimizer.param_groups[0]), 1
    if rule.step_key is not None:
        age = int(optimizer.state[inputs.params[0]][rule.step_key])
    after = _tensors(rule, inputs)
    before = [_Tensors(p.clone(), g, tuple(None if v is None else v.clone() for v in held)) for p, g, held in after]
    optimizer.step()
    readout = optimizer.readout()
    plan, backend = make_plan(optimizer.symmetries, case.names, case.shapes), optimizer.backend
    moments: dict[View, tuple[Tensor, Tensor]] = {}
    views: dict[int, list[View]] = {}
    for view in plan.views:
        views.setdefault(view.tensor, []).append(view)
    for i, name in enumerate(case.names):
        sums_eps = sum_eps(backend, before[i].p.dtype)
        moments |= _check_tensor(name, before[i], after[i], rule, options, age, views.get(i, []), sums_eps)
    for symmetry in optimizer.symmetries:
        (part,) = plan.parts[symmetry.name]
        expected, bound = moments[plan.views[part.view]]
        told = readout[symmetry.name].moments
        rows = [rule.moment_rows[moment] for moment in told]
        actual = torch.stack(list(told.values()))
        _close(actual, part.reduce(expected)[rows], part.reduce(bound)[rows], f"moments of {symmetry.name}")


def check_in_float64(case: Case) -> None:
    """The same in float64, whose kernels have other widths than those that are timed.

    It takes the first of the case's tensors, as many as fit into IN_FLOAT64 elements, the large ones with
    fewer rows, and longer rows cut.

    Raises:
        Mismatch: Something is beyond its bound.
    """
    cut = [
        (min(n_rows, max(1, IN_FLOAT64 // (4 * prod(rest)))), *(min(n, IN_FLOAT64) for n in rest))
        for n_rows, *rest in case.shapes[:TENSORS_IN_FLOAT64]
    ]
    n = max(1, sum(size <= IN_FLOAT64 for size in accumulate(map(prod, cut))))
    small = replace(case, dtype="float64", shapes=tuple(cut[:n]))
    inputs = make_input_set(small, 0)
    check(small, inputs, ours(small, inputs))


def _check_tensor(
    name: str,
    before: _Tensors,
    after: _Tensors,
    rule: Rule[Any],
    options: Any,
    age: int,
    views: list[View],
    sums_eps: float,
) -> dict[View, tuple[Tensor, Tensor]]:
    """Compare one tensor's p and buffers; returns its views' expected moments and their bounds [n moments,
    n_segments]."""
    dtype, device, c = before.p.dtype, before.p.device, rule.coefficients_of(options, age)
    shapes = {view: (len(rule.moments), view.n_segments) for view in views}
    empty = {view: torch.zeros(shape, dtype=torch.float64, device=device) for view, shape in shapes.items()}
    found = {view: (x, x.clone()) for view, x in empty.items()}
    for rows in _rows(before.p):
        here, stored = before.part(rows), after.p[rows]
        stepped, errors = oracle.step(rule, *here, c), of_step(rule, *here, c, dtype)
        _close(stored, stepped.p, of_stored(stepped.p, errors.p, dtype), f"parameter {name}")
        for key, v, v_new, of_v in zip(rule.buffers, after.buffers, stepped.buffers, errors.buffers, strict=True):
            if v is not None and v_new is not None and of_v is not None:
                _close(v[rows], v_new, of_stored(v_new, of_v, dtype), f"buffer {key} of {name}")
        factors = oracle.operands(stored, here.p, here.g, stepped)
        for view in views:
            part, segments = _chunk(view, rows)
            expected, bound = found[view]
            expected[:, segments] += oracle.moments(rule, options, part, factors)
            bound[:, segments] += of_moments(rule, options, part, factors, errors, sums_eps)
    return {view: (expected.cpu(), bound.cpu()) for view, (expected, bound) in found.items()}


def _close(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    try:
        assert_close(actual, expected, bound, what)
    except AssertionError as error:
        raise Mismatch(str(error)) from error
