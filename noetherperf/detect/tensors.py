"""Relations between whole tensors, or slices of one: what is coarser than any axis, as a stream that is read through
normalisations.

Each of them gives one number ⟨ψ, g⟩ for each loss. Relations between finer parts imply some relations between these
numbers; the tensors that they determine are left out, so that only new relations are found.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from noetherperf.detect.claims import Claims
from noetherperf.detect.parts import Axis
from noetherperf.detect.relations import Matrix, independent, integer_relations, null_space
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["relate_tensors"]

MOST_SLICES = 8


def relate_tensors(sums: Sums, claims: Claims, law: Law) -> bool:
    """Claim the relations between whole tensors and slices that do not follow from those between finer parts.

    Returns:
        False where there are too few losses to decide.
    """
    parts = [part for name in sums.shapes if name in sums.reached for part in _parts(name, sums, claims, law)]
    parts = [part for part in parts if bool(sums.alive(part).any())]
    parts = [part for part, free in zip(parts, _determined(parts, claims, law, []), strict=True) if not free]
    single = [part for part in parts if sums.vanishes(part, law)]
    for group in _wholes(single, sums):
        claims.claim(law, [group])
    order = _order(parts, claims, law)
    known = _determined(parts, claims, law, order)
    parts = [part for part, implied in zip(parts, known, strict=True) if not implied and part not in single]
    if len(parts) < 2:
        return True
    matrix = sums.totals(parts, law)
    if len(matrix) < len(parts) + SPARE:
        return False
    matrix = matrix / np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-300)
    present = np.flatnonzero(np.linalg.norm(matrix, axis=0))
    relations, _ = integer_relations(null_space(matrix[:, present]))
    for coefficients in relations:
        terms = zip(present, coefficients, strict=True)
        claims.claim(law, _wholes([replace(parts[i], weight=float(c)) for i, c in terms if c], sums))
    return True


def _parts(name: str, sums: Sums, claims: Claims, law: Law) -> list[Part]:
    """A tensor as one group, or the slices of it that relations have told apart."""
    for axis in (axis for axis in sums.axes if axis[0] == name):
        length = sums.length(axis)
        bounds = {0, length}
        for relation in claims.relations:
            for part in relation.parts:
                if (part.parameter, part.axis) == axis and part.period is None:
                    bounds.update(part.bounds(sums.shapes[name]))
        cuts = sorted(bounds)
        if 2 < len(cuts) <= MOST_SLICES + 1:
            return [
                Part(name, axis[1], start=start or None, stop=stop if stop < length else None, fold=stop - start)
                for start, stop in zip(cuts, cuts[1:], strict=False)
            ]
    return [Part(name, None)]


def _wholes(parts: Sequence[Part], sums: Sums) -> list[Part]:
    """The same parts; neighbouring slices with one coefficient are one, and all slices of a tensor are the tensor."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        shape = sums.shapes[part.parameter]
        if (
            last is not None
            and part.axis is not None
            and (last.parameter, last.axis, last.weight) == (part.parameter, part.axis, part.weight)
            and last.bounds(shape)[1] == part.bounds(shape)[0]
        ):
            result[-1] = replace(last, stop=part.stop, fold=last.fold + part.fold)
            if result[-1].fold == shape[part.axis]:
                result[-1] = Part(part.parameter, None, weight=part.weight)
        else:
            result.append(part)
    return result


def _order(parts: Sequence[Part], claims: Claims, law: Law) -> list[int]:
    """What leaves a unit before what enters it: of tensors that determine each other, the first stay."""
    relations = (relation for relation in claims.relations if relation.law == law)
    outward = {relation.parts[-1].parameter for relation in relations if len(relation.parts) > 1}
    return sorted(range(len(parts)), key=lambda i: (parts[i].parameter not in outward, -i))


def _determined(parts: Sequence[Part], claims: Claims, law: Law, order: Sequence[int]) -> list[bool]:
    """Whether relations determine each part: by the parts before it in an order, or as zero where there is none."""
    invented = _invented(parts, claims, law)
    zero = np.linalg.norm(invented, axis=0) < 1e-7
    kept = set(np.flatnonzero(~zero).tolist())
    if order:
        order = [i for i in order if i in kept]
        kept = {order[i] for i in independent(invented[:, order])} if order else kept
    return [i not in kept for i in range(len(parts))]


def _invented(parts: Sequence[Part], claims: Claims, law: Law) -> Matrix:
    """Random sums of these parts that satisfy the relations between finer ones, [more than parts, parts].

    The unknowns are the sums of *cells*: of the indices of an axis that no part tells apart.
    """
    relations = [relation for relation in claims.relations if relation.law == law]
    all_parts = [*parts, *(part for relation in relations for part in relation.parts)]
    by_axis: dict[Axis, list[Part]] = {}
    n_unknowns = 0
    wholes: dict[str, int] = {}
    for part in all_parts:
        if part.parameter not in wholes:
            wholes[part.parameter] = n_unknowns
            n_unknowns += 1
        if part.axis is not None:
            by_axis.setdefault((part.parameter, part.axis), []).append(part)
    cells: dict[Part, list[int]] = {}
    equations: list[dict[int, float]] = []
    for axis, own in by_axis.items():
        masks = np.stack([claims.mask(part) for part in own])
        patterns, _ = np.unique(masks, axis=1, return_inverse=True)
        places = list(range(n_unknowns, n_unknowns + patterns.shape[1]))
        n_unknowns += len(places)
        for part, pattern in zip(own, patterns, strict=True):
            cells[part] = [place for place, inside in zip(places, pattern, strict=True) if inside]
        equations.append({wholes[axis[0]]: -1.0} | dict.fromkeys(places, 1.0))
    for relation in relations:
        equation: dict[int, float] = {}
        for part in relation.parts:
            for place in cells.get(part, [wholes[part.parameter]]):
                equation[place] = equation.get(place, 0.0) + part.weight
        equations.append(equation)
    matrix = np.zeros((max(len(equations), 1), n_unknowns))
    for row, equation in zip(matrix, equations, strict=False):
        for place, value in equation.items():
            row[place] = value
    _, values, basis = np.linalg.svd(matrix)
    free = basis[int((values > 1e-9).sum()) :]
    random = np.random.default_rng(0).normal(size=(len(parts) + SPARE, len(free))) @ free
    columns = [random[:, cells.get(part, [wholes[part.parameter]])].sum(1) for part in parts]
    return np.stack(columns, 1) if columns else np.zeros((SPARE, 0))
