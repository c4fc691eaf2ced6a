"""All axes side by side in one long vector, those of one length next to each other.

Which groups an axis may be cut into depends on its length alone. So a *grouping*, a Part of no parameter in particular,
is summed for all axes of one length in one operation.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from torch import Tensor

from noetherperf.symmetry import Part

__all__ = ["ANY", "WHOLE", "Layout", "grouping_of", "placed"]

ANY = "any"
WHOLE = Part(ANY, None)  # the one grouping of whole tensors, whose length here is 0

Place = tuple[str, int | None]  # a parameter's name and one of its axes; None: the whole tensor


@lru_cache(1 << 16)
def placed(grouping: Part, place: Place) -> Part:
    """The part that a grouping makes of an axis."""
    return replace(grouping, parameter=place[0], axis=place[1])


@lru_cache(1 << 16)
def grouping_of(part: Part) -> Part:
    """The groups of a part, whatever its parameter and weight."""
    return replace(part, parameter=ANY, axis=None if part.axis is None else 0, weight=1.0)


class Layout:
    """Where the numbers of each axis stand in one vector.

    Args:
        lengths: Of each axis; 0 of a whole tensor, which has one number.

    Attributes:
        places: Length -> the axes of this length, in the order in which they stand.
        start: Axis -> its first number in the vector.
        number: Axis -> its number among those of its length.
        size: Of the vector.
        lengths: As given.
    """

    def __init__(self, lengths: Mapping[Place, int]) -> None:
        self.places: dict[int, list[Place]] = {}
        for place, length in lengths.items():
            self.places.setdefault(length, []).append(place)
        self.number = {place: i for places in self.places.values() for i, place in enumerate(places)}
        ordered = [place for places in self.places.values() for place in places]
        ends = [0, *accumulate(max(lengths[place], 1) for place in ordered)]
        self.start = dict(zip(ordered, ends, strict=False))
        self.size = ends[-1]
        self.lengths = dict(lengths)

    def own(self, place: Place) -> slice:
        """Where the numbers of an axis stand."""
        start = self.start[place]
        return slice(start, start + max(self.lengths[place], 1))

    def table(self, vectors: Tensor, length: int) -> Tensor:
        """The numbers of all axes of one length: [..., size] -> [..., axes, length]."""
        places = self.places[length]
        start, width = self.start[places[0]], max(length, 1)
        own = vectors[..., start : start + width * len(places)]
        table: Tensor = own.unflatten(-1, (len(places), width))
        return table

    def sums(self, vectors: Tensor, grouping: Part, length: int, numbers: Tensor | slice = slice(None)) -> Tensor:
        """The sums over each group of some axes of one length: [..., size] -> [..., axes, groups]."""
        gathered = grouping.gather(self.table(vectors, length)[..., numbers, :])
        return gathered.squeeze(-1) if gathered.shape[-1] == 1 else gathered.sum(-1)
