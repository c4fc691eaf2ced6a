"""Relations between the norms of whole tensors: what is coarser than any axis, as a stream read through normalisations.

A whole tensor gives one number ⟨θ, g⟩ for each loss. Relations between parts imply some relations between whole
tensors; those are eliminated first, so that only new ones are found.
"""

from collections.abc import Mapping

import numpy as np

from noetherperf.detect.claims import Claims
from noetherperf.detect.relations import Matrix, integer_relations, null_space, reduced
from noetherperf.detect.sums import Sums
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["relate_tensors"]


def relate_tensors(sums: Sums, claims: Claims) -> None:
    """Claim the relations between norms of whole tensors that do not follow from those between their parts."""
    names = [name for name in sums.shapes if name in sums.reached]
    index = {name: i for i, name in enumerate(names)}
    implied = _consequences(claims, index)
    pivots = reduced(implied, _elimination_order(claims, index))[1] if len(implied) else []
    kept = [name for name in names if index[name] not in pivots and _has_gradient(sums, name)]
    if not kept:
        return
    matrix = sums.whole_products(kept)
    matrix = matrix / np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-300)
    present = [i for i, name in enumerate(kept) if not _vanishes(sums, name)]
    for i, name in enumerate(kept):
        if i not in present:
            claims.claim(Law.NORM, [Part(name, None)])
    if not present:
        return
    relations, _ = integer_relations(null_space(matrix[:, present]))
    for coefficients in relations:
        terms = zip(present, coefficients, strict=True)
        claims.claim(Law.NORM, [Part(kept[i], None, weight=float(c)) for i, c in terms if c])


def _has_gradient(sums: Sums, name: str) -> bool:
    part = sums.whole(name)
    return part is None or bool(sums.alive(part).any())


def _vanishes(sums: Sums, name: str) -> bool:
    part = sums.whole(name)
    return part is not None and sums.vanishes(part, Law.NORM)


def _consequences(claims: Claims, index: Mapping[str, int]) -> Matrix:
    """What the relations found so far imply for whole tensors: a matrix [k, tensors]."""
    atoms: dict[Part, int] = {}
    vectors: list[dict[int, float]] = []
    n = len(index)

    def column(part: Part) -> int:
        bare = Part(part.parameter, part.axis, start=part.start, stop=part.stop, period=part.period)
        if part.axis is None or (part.start, part.stop, part.period) == (None, None, None):
            return index[part.parameter]
        return n + atoms.setdefault(bare, len(atoms))

    for relation in claims.relations:
        if relation.law == Law.NORM and all(part.parameter in index for part in relation.parts):
            vector: dict[int, float] = {}
            for part in relation.parts:
                vector[column(part)] = vector.get(column(part), 0.0) + part.weight
            vectors.append(vector)
    for name, axis in {(atom.parameter, atom.axis) for atom in atoms}:
        own = [atom for atom in atoms if (atom.parameter, atom.axis) == (name, axis)]
        covered = np.stack([claims.mask(atom) for atom in own]).sum(0)
        if bool((covered == 1).all()):
            vectors.append({index[name]: -1.0, **{n + atoms[atom]: 1.0 for atom in own}})
    matrix = np.zeros((len(vectors), n + len(atoms)))
    for row, vector in zip(matrix, vectors, strict=True):
        for at, value in vector.items():
            row[at] = value
    if not len(matrix):
        return np.zeros((0, n))
    rows, pivots = reduced(matrix, [*range(n, n + len(atoms)), *range(n)])
    return rows[[i for i, pivot in enumerate(pivots) if pivot < n]][:, :n]


def _elimination_order(claims: Claims, index: Mapping[str, int]) -> list[int]:
    """Tensors in the order in which relations are solved for them: what enters a unit before what leaves it."""
    norms = (relation for relation in claims.relations if relation.law == Law.NORM)
    outward = {relation.parts[-1].parameter for relation in norms if len(relation.parts) > 1}
    return [i for _, i in sorted(index.items(), key=lambda item: (item[0] in outward, item[1]))]
