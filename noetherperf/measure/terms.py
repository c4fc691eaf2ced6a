"""Terms: which segments add up to each group of each symmetry, over the plans of all devices."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from noetherperf.measure.plan import Measurement, Plan
from noetherperf.measure.turning import LastStep
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part, Symmetry


class Source(NamedTuple):
    """One device's plan, a CPU copy of its measurement, and how its tensors made the last step (None: not known)."""

    plan: Plan
    measurement: Measurement
    last: LastStep | None = None


_NONE = np.empty(0, np.int64)


class Terms(NamedTuple):
    """The terms of all groups' sums, ordered by group, then by part.

    A share is the contribution of one part to one group. Its terms are segments.

    Attributes:
        segment: Index of each term in the moments of all sources side by side, [n terms].
        state: Index of each term in the laws' components of all sources, translations first in each, [n terms].
        share: First term of each share, [n shares].
        weight, offset, n_elements: Of each share, [n shares].
        group: First share of each group that has shares.
        filled: Those groups.
        n_groups: Number of all groups.
    """

    segment: NDArray[np.int64]
    state: NDArray[np.int64]
    share: NDArray[np.int64]
    weight: NDArray[np.float64]
    offset: NDArray[np.float64]
    n_elements: NDArray[np.float64]
    group: NDArray[np.int64]
    filled: NDArray[np.int64]
    n_groups: int

    def shares(self, terms: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., n terms] summed to [..., n shares]; no coefficient applied."""
        return _sums(terms, self.share)

    def groups(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., n shares] summed to [..., n groups]; zero for a group of no elements."""
        sums = np.zeros((*shares.shape[:-1], self.n_groups))
        sums[..., self.filled] = _sums(shares, self.group)
        return sums

    def smallest(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """The smallest of each group's values [n shares], [n groups]; NaN for a group of no elements."""
        found = np.full(self.n_groups, np.nan)
        if len(self.filled):
            found[self.filled] = np.minimum.reduceat(shares, self.group)
        return found


def _sums(values: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums over the last dimension, of each run of values that begins at an index in `first`."""
    if len(first) == values.shape[-1]:
        return values
    total: NDArray[np.float64] = np.add.reduceat(values, first, axis=-1)
    return total


def _changes(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """The rows in which any column differs from the row before; the first row is one of them."""
    new = np.zeros(len(columns[0]), dtype=bool)
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    new[:1] = True
    return np.flatnonzero(new)


@functools.lru_cache(4096)
def _groups(shape: "tuple[Any, ...]", fold: int, n_segments: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """For parts of one shape: their segments, counted from the view's first; each one's group; the number of groups."""
    axis, start, stop, run, stride, period = shape
    part = Part("any", axis, start=start, stop=stop, fold=run, stride=stride, period=period)
    segments = part.gather(torch.arange(n_segments, device="cpu"), fold).numpy()
    return segments.ravel(), np.repeat(np.arange(len(segments)), segments.shape[1]), len(segments)


def find_terms(symmetries: Sequence[Symmetry], sources: Sequence[Source]) -> tuple[Terms, list[int]]:
    """The terms, and each symmetry's number of groups."""
    n_groups: list[int] = []
    segments: list[NDArray[np.int64]] = []
    groups: list[NDArray[np.int64]] = []
    parts: list[tuple[int, ...]] = []
    coefficients: list[tuple[float, float]] = []
    n_measured = np.cumsum([0, *(source.measurement.moments.shape[1] for source in sources)]).tolist()
    n_states = np.cumsum([0, *(state.shape[1] for source in sources for state in source.measurement.states)]).tolist()
    for number, symmetry in enumerate(symmetries):
        law = Law[symmetry.law.upper()]
        for i, plan in enumerate(source.plan for source in sources):
            for planned in plan.parts[symmetry.name]:
                part, view = planned.part, plan.views[planned.view]
                shape = (part.axis, part.start, part.stop, part.fold, part.stride, part.period)
                own, group, n = _groups(shape, planned.fold, view.n_segments)
                segments.append(own)
                groups.append(group)
                state = n_states[len(Law) * i + law] + view.law_segment[law]
                parts.append((number, len(own), n_measured[i] + view.segment, state, planned.n_elements))
                coefficients.append((part.weight, part.offset))
        n_groups.append(n)
    symmetry_of, lengths, *starts, n_elements = np.array(parts, dtype=np.int64).reshape(-1, 5).T
    first_group = np.cumsum([0, *n_groups])
    group = np.concatenate([_NONE, *groups]) + np.repeat(first_group[symmetry_of], lengths)
    order = np.argsort(group, kind="stable")
    group, of_part = group[order], np.repeat(np.arange(len(parts)), lengths)[order]
    segment, state = ((np.concatenate([_NONE, *segments]) + np.repeat(start, lengths))[order] for start in starts)
    share = _changes(group, of_part)
    shares_group, shares_part = group[share], of_part[share]
    first_share = _changes(shares_group)
    weights, offsets = np.array(coefficients, dtype=np.float64).reshape(-1, 2).T
    terms = Terms(
        segment,
        state,
        share,
        weights[shares_part],
        offsets[shares_part],
        n_elements.astype(np.float64)[shares_part],
        first_share,
        shares_group[first_share],
        int(first_group[-1]),
    )
    return terms, n_groups
