"""The relations found so far, and random sums that satisfy them and nothing else.

A relation between coarse parts may follow from relations between finer ones, or from the parts' overlap. What follows
holds for *any* sums that satisfy the relations found so far. So the search compares the model's sums with invented
ones, and a relation is new if it holds for the model's and not for these.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from noetherperf.detect.parts import Axis, Mask
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part, Shape

__all__ = ["Claims", "Relation"]

CONVERGED = 1e-14
MAX_ITERATIONS = 400
LEAST_INVENTED = 4


@dataclass(frozen=True)
class Relation:
    """Σ c ⟨g, ψ⟩ = 0 for each group, over these parts with their coefficients c."""

    law: Law
    parts: tuple[Part, ...]
    without_gradient: bool = False


class Claims:
    """Relations, and inventions that satisfy them.

    Args:
        shapes: Of all parameters.
        alive: Axis -> which of its indices ever have a gradient, [length].

    Attributes:
        relations: All relations, in the order in which they were found.
    """

    def __init__(self, shapes: Mapping[str, Shape], alive: Mapping[Axis, Tensor]) -> None:
        self._shapes, self._alive = shapes, dict(alive)
        self.relations: list[Relation] = []
        self._masks: dict[Part, Mask] = {}
        lengths = [len(x) for x in self._alive.values()]
        self._offsets = dict(zip(self._alive, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        self._length = sum(lengths)
        self._mask = torch.cat([*self._alive.values(), torch.zeros(0, dtype=torch.bool, device="cpu")]).double()
        self._free = torch.zeros(0, self._length, dtype=torch.float64, device="cpu")
        self._invented: dict[tuple[Law, int], Tensor] = {}  # by law and number of relations

    def mask(self, part: Part) -> Mask:
        """The indices that a part covers on its axis."""
        if part.fold != 1 or part.weight != 1.0:
            part = replace(part, fold=1, stride=1, weight=1.0)
        if part not in self._masks:
            assert part.axis is not None
            length = self._shapes[part.parameter][part.axis]
            self._masks[part] = np.zeros(length, bool)
            self._masks[part][part.gather(torch.arange(length, device="cpu")).flatten().numpy()] = True
        return self._masks[part]

    def claim(self, law: Law, parts: Iterable[Part], without_gradient: bool = False) -> None:
        self.relations.append(Relation(law, tuple(parts), without_gradient))

    def overlap(self, parts: Sequence[Part]) -> bool:
        """Whether two parts have an index of one axis in common, which no symmetry may."""
        if len({(part.parameter, part.axis) for part in parts}) == len(parts):
            return False
        places = [((part.parameter, part.axis), self.mask(part)) for part in parts]
        return any(a == b and (x & y).any() for (a, x), (b, y) in itertools.combinations(places, 2))

    def known_groups(self, law: Law, parts: Sequence[Part]) -> Mask:
        """Which groups of a relation between these parts follow from the relations found so far, [n groups]."""
        terms = [part.weight * self.invented(part, law, LEAST_INVENTED) for part in parts]
        size = sum((term.abs() for term in terms), torch.zeros((), dtype=torch.float64, device="cpu"))
        total = sum(terms, torch.zeros((), dtype=torch.float64, device="cpu"))
        return np.asarray((total.abs() <= 1e-7 * size.clamp(min=1.0)).all(0).numpy())

    def random(self, part: Part, n: int) -> Tensor:
        """Sums of a part as if no relation held, [n, n groups]: parts that overlap depend on each other even so."""
        return self._gathered(part, self._random(n))

    def invented(self, part: Part, law: Law, n: int) -> Tensor:
        """Sums of a part that satisfy the relations found so far, else random, [n, n groups]."""
        key = (law, sum(relation.law == law for relation in self.relations))
        known = self._invented.get(key)
        if known is None or len(known) < n:
            self._invented = {other: x for other, x in self._invented.items() if other[0] != law}
            known = self._invented[key] = self._consistent(law, self._random(max(n, LEAST_INVENTED)))
        return self._gathered(part, known[:n])

    def _gathered(self, part: Part, vectors: Tensor) -> Tensor:
        assert part.axis is not None
        start = self._offsets[part.parameter, part.axis]
        own = vectors[:, start : start + self._shapes[part.parameter][part.axis]]
        return part.gather(own).sum(-1)

    def _random(self, n: int) -> Tensor:
        if len(self._free) < n:
            generator = torch.Generator("cpu").manual_seed(0)
            shape = (n, self._length)
            self._free = self._mask * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return self._free[:n]

    # ---- projection on the relations --------------------------------------------------------------------------------

    def _consistent(self, law: Law, vectors: Tensor) -> Tensor:
        """The nearest sums that satisfy A x = 0, by conjugate gradients on A Aᵀ y = A x, x ← x − Aᵀ y."""
        rows, columns, values, n_rows = self._equations(law)
        if not n_rows:
            return vectors

        def apply(x: Tensor) -> Tensor:
            y = torch.zeros(n_rows, x.shape[1], dtype=x.dtype, device="cpu")
            return y.index_add_(0, rows, x[columns] * values)

        def transposed(y: Tensor) -> Tensor:
            x = torch.zeros(self._length, y.shape[1], dtype=y.dtype, device="cpu")
            return x.index_add_(0, columns, y[rows] * values)

        x = vectors.T.contiguous()
        for _ in range(2):  # the second pass takes out what rounding left
            residual = apply(x)
            y, direction = torch.zeros_like(residual), residual.clone()
            size = residual.square().sum(0)
            least = CONVERGED**2 * (1 + size)
            for _ in range(MAX_ITERATIONS):
                if bool((size <= least).all()):
                    break
                image = apply(transposed(direction))
                step = size / (direction * image).sum(0).clamp(min=1e-300)
                y += step * direction
                residual -= step * image
                before, size = size, residual.square().sum(0)
                direction = residual + size / before.clamp(min=1e-300) * direction
            x = x - transposed(y)
        return x.T.contiguous()

    def _equations(self, law: Law) -> tuple[Tensor, Tensor, Tensor, int]:
        """A as rows, columns and values: an equation for each group of each relation, and for each pair of totals."""
        blocks: list[list[tuple[Tensor, float]]] = []  # of one block: columns [equations, terms], and their coefficient
        for relation in self.relations:
            if relation.law == law:
                blocks.append([(self._places(part), part.weight) for part in relation.parts if self._has_axis(part)])
        for name in self._shapes:
            axes = [axis for axis in self._alive if axis[0] == name]
            totals = [self._places(Part(*axis, fold=self._shapes[name][axis[1]])) for axis in axes]
            blocks += [[(totals[0], 1.0), (other, -1.0)] for other in totals[1:]]
        rows, columns, values = [], [], []
        n_rows = 0
        for block in blocks:
            if not block:
                continue
            n = len(block[0][0])
            for places, weight in block:
                rows.append(torch.arange(n_rows, n_rows + n, device="cpu")[:, None].expand_as(places).flatten())
                columns.append(places.flatten())
                values.append(torch.full((places.numel(),), weight, dtype=torch.float64, device="cpu"))
            n_rows += n
        if not n_rows:
            nothing = torch.zeros(0, dtype=torch.long, device="cpu")
            return nothing, nothing, nothing.double(), 0
        row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
        value = value * self._mask[column]
        norm = torch.zeros(n_rows, dtype=torch.float64, device="cpu").index_add_(0, row, value.square()).sqrt()
        return row, column, (value / norm.clamp(min=1e-300)[row])[:, None], n_rows

    def _has_axis(self, part: Part) -> bool:
        return part.axis is not None or any(axis[0] == part.parameter for axis in self._alive)

    def _places(self, part: Part) -> Tensor:
        """The columns of the sums of each group, [n groups, indices of one]."""
        axis = part.axis
        if axis is None:
            axis = next(axis for name, axis in self._alive if name == part.parameter)
            part = Part(part.parameter, axis, fold=prod(self._shapes[part.parameter][axis : axis + 1]))
        length = self._shapes[part.parameter][axis]
        return part.gather(torch.arange(length, device="cpu") + self._offsets[part.parameter, axis])
