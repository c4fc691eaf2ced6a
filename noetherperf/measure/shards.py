"""Shards: the local part of a plan when tensors are sharded over ranks, and the place of its sums in the whole plan.

Moments and laws are linear in the elements that they sum over. So a rank plans and steps its shards like whole tensors,
without the other ranks, and keeps partial sums; added up over the ranks, they are the sums of the whole. A *shard* is
the elements of a tensor at some indices along each axis. If a cut divides a segment of the whole plan, each side has
one or more segments of its own: no local segment has elements of two segments of the whole.

A checkpoint keeps the sums of the whole, which do not depend on the cut. After loading, the shard with a segment's
first element starts with the whole sum, and the other shards with zero.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from noetherperf.measure.plan import Measurement, Plan, View

#: For each axis, the shard's indices in the whole tensor: ascending, int64, on the CPU. A scalar has one axis.
Indices = Sequence[Tensor]

#: The groups of ranks that a tensor is cut over, one for each sharded dimension of its mesh; empty if replicated.
Cut = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Links:
    """Links columns of a local array [rows, n_local] to those of the whole array [rows, n_whole].

    Attributes:
        local, whole: A local column, and the column of the whole that it is a part of.
        owned: Whether the local column has the first element of the whole's segment.
    """

    local: Tensor
    whole: Tensor
    owned: Tensor

    @classmethod
    def join(cls, links: Iterable["_Links"]) -> "_Links":
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        columns = zip((none, none, none.bool()), *((x.local, x.whole, x.owned) for x in links), strict=True)
        return cls(*map(torch.cat, columns))

    def shifted(self, local: int, whole: int) -> "_Links":
        return _Links(self.local + local, self.whole + whole, self.owned)


def _shard(view: View, indices: Indices) -> tuple[int, _Links] | None:
    """A view's fold in a shard, and the links of its segments; None if the shard is empty."""
    if any(len(index) == 0 for index in indices):
        return None
    index = indices[view.axis]
    segments = index // view.fold
    _, runs = segments.unique_consecutive(return_counts=True)
    fold = int(np.gcd.reduce(runs.numpy()))
    first_elsewhere = all(int(other[0]) == 0 for axis, other in enumerate(indices) if axis != view.axis)
    owned = (index % view.fold == 0).view(-1, fold)[:, 0]
    return fold, _Links(torch.arange(len(owned), device="cpu"), segments[::fold], owned & first_elsewhere)


class Shards:
    """A plan, and the local part of it.

    Args:
        plan: Of the whole tensors.
        indices: For each tensor, the indices of its shard.
        cuts: For each tensor, the ranks that it is cut over.

    Attributes:
        whole: The plan of the whole tensors.
        local: The plan of the shards: the same views, except those of empty shards, and no parts.
        cuts: The distinct cuts; sums over one cut are taken together.
        has_first: Per tensor, whether this rank has its first element.
    """

    def __init__(self, plan: Plan, indices: Sequence[Indices], cuts: Sequence[Cut]) -> None:
        self.whole = plan
        self.cuts = list(dict.fromkeys(cuts))
        self._members = {cut: [i for i, other in enumerate(cuts) if other == cut] for cut in self.cuts}
        # Propagators are taken from the shard with the tensor's first element; an empty shard has none.
        self.has_first = [all(len(index) > 0 and int(index[0]) == 0 for index in shard) for shard in indices]

        views: list[View] = []
        links: dict[Cut, list[list[_Links]]] = {cut: [[], [], []] for cut in self.cuts}
        ends = [0, 0, 0]  # of the moments and of the two laws' states
        for view in plan.views:
            shard = _shard(view, indices[view.tensor])
            if shard is None:
                continue
            fold, link = shard
            n_segments = len(link.local)
            starts = [-1, -1, -1]
            for array, start in enumerate((view.segment, *view.law_segment)):
                if start >= 0:
                    starts[array] = ends[array]
                    ends[array] += n_segments
                    links[cuts[view.tensor]][array].append(link.shifted(starts[array], start))
            segment, translation, norm = starts
            law_segment = (translation, norm)
            views.append(replace(view, fold=fold, n_segments=n_segments, segment=segment, law_segment=law_segment))
        self.local = Plan(tuple(views), {}, plan.n_tensors, plan.laws, plan.rule)
        self._links: Mapping[Cut, list[_Links]] = {cut: list(map(_Links.join, arrays)) for cut, arrays in links.items()}

    def partial(self, measurement: Measurement, cut: Cut) -> Measurement:
        """The local measurement of the tensors of one cut, at its place in the whole measurement; zero elsewhere.

        Args:
            measurement: Of the local plan; on the CPU.
            cut: One of `cuts`.
        """
        whole = Measurement.empty(self.whole)
        for to, array, links in zip(_columns(whole), _columns(measurement), self._links[cut], strict=True):
            to.index_add_(1, links.whole, array[:, links.local])
        whole.propagators.zero_()
        own = [i for i in self._members[cut] if self.has_first[i]]
        whole.propagators[own] = measurement.propagators[own]
        return whole

    def scatter(self, whole: Measurement) -> Measurement:
        """The measurement of the local plan that continues a whole one; on the CPU.

        Summed over the ranks of a cut, `partial` is exactly the whole one again.
        """
        local = replace(Measurement.empty(self.local), propagators=whole.propagators, clock=whole.clock)
        for joined in self._links.values():
            for to, array, links in zip(_columns(local), _columns(whole), joined, strict=True):
                to[:, links.local[links.owned]] = array[:, links.whole[links.owned]]
        return local


def _columns(measurement: Measurement) -> tuple[Tensor, ...]:
    """The arrays whose columns are segments."""
    return measurement.moments, *measurement.states
