"""The gate before every timing: one step against its rule (oracle.py) in float64 on the same rounded inputs."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

import noetherperf as nperf
from bench import oracle
from bench.bounds import assert_close, of_moments, of_step, of_stored, sum_eps
from bench.cases import Case
from bench.inputs import InputSet, make_input_set
from bench.variants import ours
from noetherperf.measure.plan import View, make_plan
from noetherperf.rules.moments import Moment
from noetherperf.rules.sgd import SGD, Hyper

CHUNK = 1 << 22  # elements compared at a time: float64 copies of a large model would not fit


class Mismatch(AssertionError):
    """A step differs from its rule, so its time means nothing."""


def _rows(x: Tensor) -> Iterator[slice]:
    """Ranges of the first axis, CHUNK elements each."""
    n = x.shape[0]
    step = max(1, CHUNK // max(1, prod(x.shape[1:])))
    return (slice(at, min(at + step, n)) for at in range(0, n, step))


def _chunk(view: View, rows: slice) -> tuple[View, slice]:
    """The view of some rows alone, and which of its segments they belong to."""
    n = rows.stop - rows.start
    if view.axis > 0:
        return view, slice(0, view.n_segments)
    if view.n_segments == 1:
        return replace(view, fold=n), slice(0, 1)
    return replace(view, n_segments=n), rows


def check(case: Case, inputs: InputSet, optimizer: nperf.SGD) -> None:
    """Make one step and compare parameters, buffers and every symmetry's moments.

    Raises:
        Mismatch: Something is beyond its bound.
    """
    before = [p.detach().clone() for p in inputs.params]
    buffers = [v.clone() for v in inputs.buffers]
    optimizer.step()
    readout = optimizer.readout()
    plan, backend = make_plan(optimizer.symmetries, case.names, case.shapes), optimizer.backend
    moments: dict[View, tuple[Tensor, Tensor]] = {}
    views: dict[int, list[View]] = {}
    for view in plan.views:
        views.setdefault(view.tensor, []).append(view)
    for i, name in enumerate(case.names):
        v, v_new = (buffers[i], inputs.buffers[i]) if buffers else (None, None)
        after = inputs.params[i].detach(), v_new
        sums_eps = sum_eps(backend, before[i].dtype)
        moments |= _check_tensor(name, (before[i], inputs.grads[i], v), after, case.hyper, views.get(i, []), sums_eps)
    rows = list(Moment)
    for symmetry in optimizer.symmetries:
        (part,) = plan.parts[symmetry.name]
        expected, bound = moments[plan.views[part.view]]
        actual = torch.stack([readout[symmetry.name].moments[moment.name.lower()] for moment in Moment])
        _close(actual, part.reduce(expected)[rows], part.reduce(bound)[rows], f"moments of {symmetry.name}")


def check_in_float64(case: Case) -> None:
    """The same in float64, whose kernels have other widths than those that are timed.

    It takes as many of the case's tensors as fit into CHUNK elements, the large ones with fewer rows.

    Raises:
        Mismatch: Something is beyond its bound.
    """
    cut = [(min(shape[0], max(1, CHUNK // (4 * prod(shape[1:])))), *shape[1:]) for shape in case.shapes]
    n = max(1, sum(size <= CHUNK for size in accumulate(map(prod, cut))))
    small = replace(case, dtype="float64", shapes=tuple(cut[:n]))
    inputs = make_input_set(small, 0)
    check(small, inputs, ours(small, inputs))


def _check_tensor(
    name: str,
    before: tuple[Tensor, Tensor, Tensor | None],
    after: tuple[Tensor, Tensor | None],
    hyper: Hyper,
    views: list[View],
    sums_eps: float,
) -> dict[View, tuple[Tensor, Tensor]]:
    """Compare one tensor's p and v; returns its views' expected moments and their bounds [n moments, n_segments]."""
    dtype, device, c = before[0].dtype, before[0].device, hyper.coefficients()
    shapes = {view: (len(SGD.moments), view.n_segments) for view in views}
    empty = {view: torch.zeros(shape, dtype=torch.float64, device=device) for view, shape in shapes.items()}
    found = {view: (x, x.clone()) for view, x in empty.items()}
    for rows in _rows(before[0]):
        p, g = (x[rows].double() for x in before[:2])
        v = None if before[2] is None else before[2][rows].double()
        stored = after[0][rows]
        stepped, errors = oracle.step(SGD, p, g, (v,), c), of_step(SGD, p, g, (v,), c, dtype)
        _close(stored, stepped.p, of_stored(stepped.p, errors.p, dtype), f"parameter {name}")
        (v_new,), (of_v,) = stepped.buffers, errors.buffers
        if v_new is not None and of_v is not None and after[1] is not None:
            _close(after[1][rows], v_new, of_stored(v_new, of_v, dtype), f"buffer of {name}")
        factors = oracle.operands(stored, p, g, stepped)
        for view in views:
            part, segments = _chunk(view, rows)
            expected, bound = found[view]
            expected[:, segments] += oracle.moments(SGD, hyper, part, factors)
            bound[:, segments] += of_moments(SGD, hyper, part, factors, errors, sums_eps)
    return {view: (expected.cpu(), bound.cpu()) for view, (expected, bound) in found.items()}


def _close(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    try:
        assert_close(actual, expected, bound, what)
    except AssertionError as error:
        raise Mismatch(str(error)) from error
