"""Laws of vectors that count from an offset which no addition shows, as the gain w in x + w x.

The generator is c + θ, so that ⟨g, c⟩ + ⟨g, θ⟩ enters a relation: ⟨g, 1⟩ of a vector is one more column.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod

import numpy as np
import torch

from noetherperf.detect.claims import Claims
from noetherperf.detect.flow import Flow
from noetherperf.detect.relations import integer_relations, null_space
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["relate_offsets"]

MAX_ROWS, MAX_COLUMNS = 2000, 500  # of a matrix


def relate_offsets(sums: Sums, claims: Claims, flow: Flow) -> None:
    """Claim the laws of vectors that are in no other: of their elements, then of whole vectors and scalars."""
    vectors = [name for name, shape in sums.shapes.items() if len(shape) <= 1 and name in sums.reached]
    lengths = {prod(sums.shapes[name]) for name in vectors}
    for n in sorted(lengths | {1}, reverse=True) if vectors else ():
        claimed = {part.parameter for relation in claims.relations for part in relation.parts}
        axes = [axis for axis in sums.axes if not sums.is_kernel(axis) and sums.length(axis) == n]
        places: Sequence[tuple[str, int | None]] = axes if n > 1 else [(name, None) for name in sums.shapes]
        parts = [part for place in places if not sums.is_idle(part := Part(*place), Law.NORM)]
        own = [part for part in parts if part.parameter in vectors and part.parameter not in claimed]
        own = [part for part in own if not flow.offset(part.parameter) and not sums.is_idle(part, Law.TRANSLATION)]
        if own:
            _relate(sums, claims, own, parts, n)


def _relate(sums: Sums, claims: Claims, vectors: Sequence[Part], parts: Sequence[Part], n: int) -> None:
    """Claim the relations between ⟨g, 1⟩ of some vectors and ⟨g, θ⟩ of all parts that have both of a vector."""
    n_columns = len(vectors) + len(parts)
    wanted = -(-(n_columns + SPARE) // n)
    worth = n > 1 or any(prod(sums.shapes[part.parameter]) == 1 for part in vectors)  # of more backward passes
    if n_columns > MAX_COLUMNS or not (sums.at_least(wanted) if worth else wanted <= sums.n_losses):
        return
    columns = [sums.value(part, Law.TRANSLATION) for part in vectors] + [sums.value(part, Law.NORM) for part in parts]
    matrix = torch.stack([x.flatten() for x in columns], 1).numpy()[:MAX_ROWS]
    known = integer_relations(null_space(matrix[:, len(vectors) :]))[0]
    padded = np.array([[0] * len(vectors) + row.tolist() for row in known]).reshape(-1, n_columns)
    for relation in integer_relations(null_space(matrix), padded)[0]:
        counted = dict(zip(vectors, map(float, relation), strict=False))  # ⟨g, 1⟩ of each vector
        weights = dict(zip(parts, map(float, relation[len(vectors) :]), strict=True))
        if any(counted.values()) and all(weights[part] for part, c in counted.items() if c):
            common = gcd(*map(int, weights.values()))  # an offset may be a fraction
            terms = [(part, c) for part, c in weights.items() if c]
            claims.claim(
                Law.NORM, [replace(part, weight=c / common, offset=counted.get(part, 0.0) / c) for part, c in terms]
            )
