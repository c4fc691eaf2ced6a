"""The relations found so far, and the indices that already have one.

The search goes from fine to coarse. An index that has a relation is not tried again in a coarser part, for what would
be found is a consequence.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from noetherperf.detect.parts import Axis, Mask
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part, Shape

__all__ = ["Claims", "Relation"]


@dataclass(frozen=True)
class Relation:
    """Σ c ⟨g, ψ⟩ = 0 for each group, over these parts with their coefficients c."""

    law: Law
    parts: tuple[Part, ...]
    without_gradient: bool = False


class Claims:
    """Relations, and the indices that they take.

    Args:
        shapes: Of all parameters.
        axes: Whose indices are groups.
        grouped: The weights and biases of grouped convolutions.

    Attributes:
        relations: All relations, in the order in which they were found.
    """

    def __init__(self, shapes: Mapping[str, Shape], axes: Iterable[Axis], grouped: Collection[str]) -> None:
        self._shapes, self._grouped = shapes, grouped
        lengths = {axis: shapes[axis[0]][axis[1]] for axis in axes}
        self._taken = {law: {axis: np.zeros(length, bool) for axis, length in lengths.items()} for law in Law}
        self._masks: dict[Part, Mask] = {}
        self.relations: list[Relation] = []

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

    def add(self, law: Law, parts: Sequence[Part], without_gradient: bool = False) -> None:
        """A relation whose parts may each still vanish by themselves."""
        self.relations.append(Relation(law, tuple(parts), without_gradient))

    def claim(self, law: Law, parts: Sequence[Part], without_gradient: bool = False) -> None:
        """A relation that takes the indices of its parts."""
        self.add(law, parts, without_gradient)
        if any(part.parameter in self._grouped for part in parts):
            # Its blocks of channels and its channels in all blocks are relations of their own, both coarse.
            parts = [part for part in parts if part.fold == 1]
        self.take(parts, law)

    def take(self, parts: Iterable[Part], law: Law) -> None:
        for part in parts:
            if part.axis is not None and (part.parameter, part.axis) in self._taken[law]:
                self._taken[law][part.parameter, part.axis] |= self.mask(part)

    def is_free(self, part: Part, law: Law) -> bool:
        """Whether no index of a part is taken."""
        assert part.axis is not None
        return not (self._taken[law][part.parameter, part.axis] & self.mask(part)).any()

    def overlap(self, parts: Sequence[Part]) -> bool:
        """Whether two parts have an index of one axis in common, which no symmetry may."""
        places = [((part.parameter, part.axis), self.mask(part)) for part in parts]
        return any(a == b and (x & y).any() for (a, x), (b, y) in itertools.combinations(places, 2))
