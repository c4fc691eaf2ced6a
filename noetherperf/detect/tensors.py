"""Relations between whole tensors, or slices of one: what is coarser than any axis, as a stream that is read through
normalisations.

Each of them gives one number ⟨ψ, g⟩ for each loss. Relations between finer parts imply some relations between these
numbers; the tensors that they determine are left out, so that only new relations are found.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from noetherperf.detect.claims import Claims, Relation
from noetherperf.detect.parts import Axis
from noetherperf.detect.relations import Matrix, decomposed, independent, integer_relations, null_space, present
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["relate_tensors"]

MOST_SLICES = 8

Colours = NDArray[np.int64]


def relate_tensors(sums: Sums, claims: Claims, law: Law) -> bool:
    """Claim the relations between whole tensors and slices that do not follow from those between finer parts.

    Returns:
        False where there are too few losses to decide.
    """
    parts = [part for name in sums.shapes if name in sums.reached for part in _parts(name, sums, claims, law)]
    parts = [part for part in parts if bool(sums.alive(part).any())]
    invented = _invented(parts, claims, law)
    free = np.linalg.norm(invented, axis=0) > 1e-7
    single = [part for part, is_free in zip(parts, free, strict=True) if is_free and sums.vanishes(part, law)]
    for group in _wholes(single, sums):
        claims.claim(law, [group])
    # Of laws with as many terms the first is taken: that of what leaves a unit, which comes later in the model.
    rest = [i for i, part in reversed(list(enumerate(parts))) if free[i] and part not in single]
    parts, invented = [parts[i] for i in rest], invented[:, rest]
    kept = independent(invented)  # they determine the others, which need not be measured
    if len(kept) < 2:
        return True
    matrix = sums.totals([parts[i] for i in kept], law)
    if len(matrix) < len(kept) + SPARE:
        return False
    matrix = matrix / np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-300)
    live = present(matrix)
    null = null_space(matrix[:, live])
    if not len(null):
        return True
    new = np.zeros((len(null), len(parts)))
    new[:, [kept[i] for i in live]] = null
    known = null_space(invented)
    relations, _ = integer_relations(np.vstack([new, known]), known)
    for coefficients in relations:
        terms = reversed(list(zip(parts, coefficients, strict=True)))
        claims.claim(law, _wholes([replace(part, weight=float(c)) for part, c in terms if c], sums))
    return True


def _parts(name: str, sums: Sums, claims: Claims, law: Law) -> list[Part]:
    """A tensor as one group, or the slices of it that the forward pass or relations have told apart."""
    for axis in (axis for axis in sums.axes if axis[0] == name):
        length = sums.length(axis)
        bounds = {0, length}
        if not sums.large:
            bounds.update(x for cut in sums.probe.shapes.cuts.get(length, ()) if not cut.period for x in cut[:2])
        for relation in claims.relations:
            for part in relation.parts:
                if (part.parameter, part.axis) == axis and part.period is None:
                    bounds.update(part.bounds(sums.shapes[name]))
        cuts = sorted(bounds)
        if 2 < len(cuts) <= MOST_SLICES + 1:
            return [
                Part(name, axis[1], start=start or None, stop=stop if stop < length else None, fold=stop - start)
                for start, stop in itertools.pairwise(cuts)
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


def _invented(parts: Sequence[Part], claims: Claims, law: Law) -> Matrix:
    """Random sums of these parts that satisfy the relations between finer ones, [more than parts, parts].

    The unknowns are the sums over indices of one *colour*. Each relation gives an equation for the groups of each
    colour, and each axis one for the total of its tensor.
    """
    relations = [relation for relation in claims.relations if relation.law == law]
    colours = _colours(parts, relations, claims)
    names = dict.fromkeys(part.parameter for part in [*parts, *(part for r in relations for part in r.parts)])
    unknowns: dict[str | int, int] = {name: i for i, name in enumerate(names)}
    for colour in np.unique(np.concatenate([*colours.values(), np.zeros(0, np.int64)])).tolist():
        unknowns[colour] = len(unknowns)
    equations: list[dict[int, float]] = []
    for (name, _), own in colours.items():
        equations.append({unknowns[name]: -1.0} | {unknowns[colour]: 1.0 for colour in np.unique(own).tolist()})
    for relation in relations:
        groups = _group_colours(relation, colours, 0)
        for colour in np.unique(groups):
            equation: dict[int, float] = {}
            for part in relation.parts:
                inside = _gathered(part, colours)[groups == colour] if part.axis is not None else [part.parameter]
                for place in {unknowns[x] for x in np.unique(inside).tolist()}:
                    equation[place] = equation.get(place, 0.0) + part.weight
            equations.append(equation)
    matrix = np.zeros((max(len(equations), 1), len(unknowns)))
    for row, equation in zip(matrix, equations, strict=False):
        for place, value in equation.items():
            row[place] = value
    _, values, basis = decomposed(matrix)
    free = basis[int((values > 1e-9).sum()) :]
    random = np.random.default_rng(0).normal(size=(len(parts) + SPARE, len(free))) @ free
    columns = []
    for part in parts:
        if part.axis is None:
            columns.append(random[:, unknowns[part.parameter]])
        else:
            inside = np.unique(colours[part.parameter, part.axis][claims.mask(part)])
            columns.append(random[:, [unknowns[colour] for colour in inside.tolist()]].sum(1))
    return np.stack(columns, 1) if columns else np.zeros((SPARE, 0))


def _colours(parts: Sequence[Part], relations: Sequence[Relation], claims: Claims) -> dict[Axis, Colours]:
    """A number for each index of each axis: indices that parts and relations do not tell apart have the same.

    Numbers are hashes. An index takes the colours of the groups that it is in, until no more colours appear.
    """
    colours: dict[Axis, Colours] = {}
    for part in [*parts, *(part for relation in relations for part in relation.parts)]:
        if part.axis is not None:
            start = np.full(len(claims.mask(part)), hash((part.parameter, part.axis)))
            own = colours.setdefault((part.parameter, part.axis), start)
            own += claims.mask(part) * hash(("mask", part))
    n_colours = 0
    while (n := sum(len(np.unique(own)) for own in colours.values())) > n_colours:
        n_colours = n
        for number, relation in enumerate(relations):
            groups = _group_colours(relation, colours, number)
            for part in relation.parts:
                if part.axis is not None:
                    indices = part.gather(torch.arange(len(claims.mask(part)), device="cpu")).numpy()
                    own = colours[part.parameter, part.axis]
                    own[indices] = _mixed(own[indices] + _mixed(groups + number)[:, None])
    return colours


def _group_colours(relation: Relation, colours: Mapping[Axis, Colours], number: int) -> Colours:
    """A number for each group of a relation, [n groups], by the colours of its indices."""
    groups = np.zeros(1, np.int64)
    for place, part in enumerate(relation.parts):
        if part.axis is not None:
            groups = groups + _mixed(_mixed(_gathered(part, colours)).sum(1) + number + place)
    return groups


def _gathered(part: Part, colours: Mapping[Axis, Colours]) -> Colours:
    assert part.axis is not None
    return np.asarray(part.gather(torch.from_numpy(colours[part.parameter, part.axis])).numpy())


def _mixed(x: Colours) -> Colours:
    """A hash of each number (SplitMix64)."""
    y = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    y = (y ^ (y >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    y = (y ^ (y >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (y ^ (y >> np.uint64(31))).astype(np.int64)
