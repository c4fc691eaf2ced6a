"""The relations found so far, and random sums that satisfy them and nothing else.

A relation between coarse parts may follow from relations between finer ones, or from the parts' overlap. What follows
holds for *any* sums that satisfy the relations found so far. So the search compares the model's sums with invented
ones, and a relation is new if it holds for the model's and not for these.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from noetherperf.detect.layout import Layout
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
        self._shapes = shapes
        self.layout = Layout({axis: len(x) for axis, x in alive.items()})
        self.relations: list[Relation] = []
        self._masks: dict[Part, Mask] = {}
        self._alive = torch.zeros(self.layout.size, dtype=torch.float64, device="cpu")
        self._axes_of: dict[str, list[Axis]] = {}
        for axis, x in alive.items():
            self._alive[self.layout.own(axis)] = x.double()
            self._axes_of.setdefault(axis[0], []).append(axis)
        self._drawn = torch.zeros(0, self.layout.size, dtype=torch.float64, device="cpu")
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._invented = {law: _Invented(self._drawn, 0) for law in Law}

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
        terms = [part.weight * self._of_part(part, self.invented(law, LEAST_INVENTED)) for part in parts]
        size = sum((term.abs() for term in terms), torch.zeros((), dtype=torch.float64, device="cpu"))
        total = sum(terms, torch.zeros((), dtype=torch.float64, device="cpu"))
        return np.asarray((total.abs() <= 1e-7 * size.clamp(min=1.0)).all(0).numpy())

    def live_groups(self, parts: Sequence[Part]) -> Mask:
        """Which groups of a relation between these parts have a gradient, [n groups]."""
        sizes = [self._of_part(part, self._alive[None])[0] for part in parts if part.parameter in self._axes_of]
        return np.asarray((torch.stack(sizes).sum(0) > 0).numpy())

    def random(self, part: Part, n: int) -> Tensor:
        """Sums of a part as if no relation held, [n, n groups]: parts that overlap depend on each other even so."""
        return self._of_part(part, self._random(n))

    def alive(self, axis: Axis) -> Tensor:
        """Which indices have a gradient, [length]."""
        return self._alive[self.layout.own(axis)] > 0

    def full(self, grouping: Part, length: int) -> Tensor:
        """Of which axes every group has a gradient, [axes]."""
        return (self.layout.sums(self._alive, grouping, length) > 0).all(-1)

    def _of_part(self, part: Part, vectors: Tensor) -> Tensor:
        return part.gather(vectors[:, self.layout.own((part.parameter, part.axis))]).sum(-1)

    def _random(self, n: int) -> Tensor:
        missing = n - len(self._drawn)
        if missing > 0:
            shape = (missing, self.layout.size)
            drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")
            self._drawn = torch.cat([self._drawn, self._alive * drawn])
        return self._drawn[:n]

    # ---- projection on the relations --------------------------------------------------------------------------------

    def invented(self, law: Law, n: int) -> Tensor:
        """Sums that satisfy the relations found so far and are else random, [n, size of the layout].

        Projections on one relation after another are the projection on all, as each is on a part of the space before.
        So a new relation changes only what is connected with it.
        """
        known = self._invented[law]
        own = [relation for relation in self.relations if relation.law == law]
        if len(own) > known.n_relations:
            changed = _connected([{part.parameter for part in relation.parts} for relation in own], known.n_relations)
            self._project(known.vectors, own, changed)
            known.n_relations = len(own)
        if len(known.vectors) < n:
            added = self._random(max(n, LEAST_INVENTED))[len(known.vectors) :].clone()
            self._project(added, own, set(self._axes_of))
            known.vectors = torch.cat([known.vectors, added])
        return known.vectors[:n]

    def _project(self, vectors: Tensor, relations: Sequence[Relation], names: Collection[str]) -> None:
        """Take the nearest vectors with A x = 0, by conjugate gradients on A Aᵀ y = A x, x ← x − Aᵀ y; in place.

        A holds the equations of what these parameters have.
        """
        rows, columns, values, n_rows = self._equations(relations, names)
        if not n_rows or not len(vectors):
            return
        used, columns = columns.unique(return_inverse=True)

        def apply(x: Tensor) -> Tensor:
            y = torch.zeros(n_rows, x.shape[1], dtype=x.dtype, device="cpu")
            return y.index_add_(0, rows, x[columns] * values)

        def transposed(y: Tensor) -> Tensor:
            x = torch.zeros(len(used), y.shape[1], dtype=y.dtype, device="cpu")
            return x.index_add_(0, columns, y[rows] * values)

        x = vectors[:, used].T.contiguous()
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
        vectors[:, used] = x.T

    def _equations(self, relations: Sequence[Relation], names: Collection[str]) -> tuple[Tensor, Tensor, Tensor, int]:
        """A as rows, columns and values: an equation for each group of each relation, and for each pair of totals."""
        blocks: list[list[tuple[Tensor, float]]] = []  # of one block: columns [equations, terms], and their coefficient
        for relation in relations:
            if relation.parts[0].parameter in names:
                parts = [part for part in relation.parts if part.parameter in self._axes_of]
                blocks.append([(self._indices(part), part.weight) for part in parts])
        for name in filter(names.__contains__, self._axes_of):
            totals = [self._all(axis) for axis in self._axes_of[name]]
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
        value = value * self._alive[column]
        norm = torch.zeros(n_rows, dtype=torch.float64, device="cpu").index_add_(0, row, value.square()).sqrt()
        return row, column, (value / norm.clamp(min=1e-300)[row])[:, None], n_rows

    def _indices(self, part: Part) -> Tensor:
        """The columns of the sums of each group, [n groups, indices of one]."""
        if part.axis is None:
            return self._all(self._axes_of[part.parameter][0])
        return part.gather(self._all((part.parameter, part.axis))[0])

    def _all(self, axis: Axis) -> Tensor:
        """The columns of an axis, [1, length]."""
        own = self.layout.own(axis)
        return torch.arange(own.start, own.stop, device="cpu")[None]


@dataclass
class _Invented:
    """Vectors that satisfy the first of the relations of one law."""

    vectors: Tensor
    n_relations: int


def _connected(sets: Sequence[set[str]], first: int) -> set[str]:
    """All that is connected by these sets with one of the sets from the first on."""
    reached: set[str] = set().union(*sets[first:])
    rest = list(sets[:first])
    while touching := [x for x in rest if not reached.isdisjoint(x)]:
        rest = [x for x in rest if reached.isdisjoint(x)]
        reached.update(*touching)
    return reached
