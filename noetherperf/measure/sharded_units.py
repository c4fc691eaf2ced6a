"""The units of a part in a shard: for products that are sums over ranks.

A product of two units is a sum over their elements, so each rank can add up those that it has, if it has the same ones
of both units. So a tensor may be cut along every axis but the part's, and along the part's between two blocks. Else
there are units of one block on different ranks, and their product is on none of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from noetherperf.measure.shards import Indices
from noetherperf.symmetry import Balance, Part


class ShardedUnits(NamedTuple):
    """The units of a part in a shard.

    Attributes:
        axis: The part's; None: the whole tensor is one unit.
        places: The shard's index along the axis of each unit's elements, [blocks, n, fold]; 0 where it has none.
        present: Whether it has them, [blocks, 1, fold, 1].
    """

    axis: int | None
    places: Tensor
    present: Tensor

    @classmethod
    def of(
        cls, balance: Balance, part: Part, shape: Sequence[int], indices: Indices, device: torch.device | str
    ) -> "ShardedUnits":
        """The units of a part of a tensor of this shape, in the shard with these indices.

        Raises:
            ValueError: It has some units of a block and not the others.
        """
        nothing = torch.zeros(0, device=device)
        if part.axis is None:
            return cls(None, nothing, nothing)
        index = indices[part.axis]
        place_of = torch.full((shape[part.axis],), -1, device="cpu")
        place_of[index] = torch.arange(len(index), device="cpu")
        of_units = part.gather(place_of)  # [units, fold]
        places = of_units.unflatten(0, (-1, balance.size or len(of_units)))
        present = places[:, :1] >= 0
        if not torch.equal(present.expand_as(places), places >= 0):
            raise ValueError(
                f"symmetry {balance.name!r}: {part.parameter!r} is sharded so that units of one block are on several "
                f"ranks, and their products with each other are on none of them; shard it along another axis than "
                f"{part.axis} or between blocks of {places.shape[1]} units, or measure its diagonal: "
                "balance.diagonal(), or find_symmetries(matrix=False)"
            )
        return cls(part.axis, places.clamp(min=0).to(device), present[..., None].to(device))

    def units(self, x: Tensor) -> Tensor:
        """A shard of the tensor as [blocks, n, rest], with zeros where other ranks have the elements."""
        if self.axis is None:
            return x.reshape(1, 1, -1)
        blocks, n, fold = self.places.shape
        if x.numel() == 0:
            return x.new_zeros(blocks, n, 0)
        elements = x.movedim(self.axis, 0)[self.places].reshape(blocks, n, fold, -1)
        return torch.where(self.present, elements, 0.0).flatten(2)
