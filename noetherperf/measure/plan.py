"""Symmetries and shapes -> views and segments: what is summed together, and which sums belong to each part.

A *view* splits one tensor along one axis into runs of `fold` consecutive indices; each run is a *segment*, the elements
reduced together. All parts on the same axis of a tensor share one view, with the largest fold that fits all of them.
Moments and laws are linear, so a coarser part is a sum of segments, taken at readout. For the same reason a part over a
whole tensor (axis None) uses the segments of any view of the tensor.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherperf.rules import sgd
from noetherperf.rules.law import N_START, PROPAGATED, Law, begin, jump
from noetherperf.rules.moments import Moment
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Part, Symmetry, with_groups

#: The moments in which Engine.measure stores a law's charge x and its y, ⟨v, 1⟩ or ⟨p, v⟩.
CHARGE_AND_MOMENTUM = {
    Law.TRANSLATION: (Moment.SUM_P, Moment.SUM_G),
    Law.NORM: (Moment.SQ_P, Moment.DOT_PG),
}


#: Rows of a law's state in checkpoints of version 2: x₀, y₀, defect's two, and of a norm forced's and the flow's two.
N_STATE_VERSION_2 = {Law.TRANSLATION: 4, Law.NORM: 8}


@dataclass(frozen=True)
class View:
    """One tensor split along one axis: element i of that axis belongs to segment `segment + i // fold`.

    `law_segment[law]` is the index of the first segment's state of that law, −1 if no symmetry needs the law.
    """

    tensor: int
    axis: int
    fold: int
    n_segments: int
    segment: int
    law_segment: tuple[int, int]

    def grouped(self, x: Tensor) -> Tensor:
        """x as [outer, n_segments, inner]: a sum over the outer and inner dims is a sum per segment."""
        shape = x.shape or (1,)
        return x.reshape(prod(shape[: self.axis]), self.n_segments, self.fold * prod(shape[self.axis + 1 :]))


@dataclass(frozen=True)
class PlannedPart:
    """A part, and the view whose segments add up to its groups."""

    part: Part
    view: int
    n_elements: int  # of one group
    fold: int  # of the view

    def reduce(self, values: Tensor) -> Tensor:
        """Sum a view's values [..., view.n_segments] to the part's groups [..., n_groups]; no coefficient applied."""
        return self.part.gather(values, self.fold).sum(-1)


@dataclass(frozen=True)
class Plan:
    """All views of a model's tensors, and every symmetry's parts in terms of them."""

    views: tuple[View, ...]
    parts: Mapping[str, tuple[PlannedPart, ...]]
    n_tensors: int
    laws: tuple[Law, ...]  # that some view needs
    rule: Rule[Any]  # of the step: it defines the moments and the laws' states

    @property
    def n_segments(self) -> int:
        return sum(view.n_segments for view in self.views)

    def n_law_segments(self, law: Law) -> int:
        return sum(view.n_segments for view in self.views if view.law_segment[law] >= 0)

    @cached_property
    def indices(self) -> tuple[Tensor, ...]:
        """The tensor of each segment, [n_segments]; and for each law, the segment of each of its states; int64."""
        views = [(view.tensor, view.segment, view.n_segments, *view.law_segment) for view in self.views]
        tensor, segment, length, *law_segments = np.array(views, dtype=np.int64).reshape(-1, 3 + len(Law)).T
        found = [np.repeat(tensor, length)]
        for law, at in zip(Law, law_segments, strict=True):
            asked = at >= 0
            n = length[asked]
            within = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
            segments = np.zeros(self.n_law_segments(law), np.int64)
            segments[np.repeat(at[asked], n) + within] = np.repeat(segment[asked], n) + within
            found.append(segments)
        return tuple(map(torch.from_numpy, found))

    @cached_property
    def translation_of(self) -> Tensor:
        """For each of the norm's states the translation's state of the same segment, −1 where there is none; int64."""
        _, sums, norms = self.indices
        found = torch.full((self.n_segments,), -1, device="cpu")
        found[sums] = torch.arange(len(sums), device="cpu")
        return found[norms]


@dataclass
class Measurement:
    """The moments that a step measures, and the laws' state: float64, a few numbers per segment, none per element.

    moments: [n moments, n_segments], of the last step. states[law]: [n rows, n segments with that law]; the rule
    defines these rows. propagators: [n_tensors, law, PROPAGATED, 2, 2], the product of all steps' matrices since
    measuring began. clock: [1 + n parameter groups], since measuring began: steps made, and each group's time,
    Σ Rule.duration.
    """

    moments: Tensor
    states: tuple[Tensor, Tensor]
    propagators: Tensor
    clock: Tensor

    @classmethod
    def empty(cls, plan: Plan, device: torch.device | str = "cpu", n_groups: int = 1) -> "Measurement":
        """Zeros for every segment and identity propagators: before anything is measured.

        Args:
            plan: What is measured.
            device: Where.
            n_groups: The number of parameter groups.
        """
        laws = plan.rule.laws
        translation, norm = (_rows(laws[law].n_rows, plan.n_law_segments(law), device) for law in Law)
        shape = (plan.n_tensors, len(Law), len(PROPAGATED), 2, 2)
        propagators = torch.zeros(shape, dtype=torch.float64, device=device)
        propagators.diagonal(dim1=-2, dim2=-1).fill_(1.0)  # torch.eye on the meta device imports sympy, a second
        return cls(
            _rows(len(plan.rule.moments), plan.n_segments, device),
            (translation, norm),
            propagators,
            torch.zeros(1 + n_groups, dtype=torch.float64, device=device),
        )

    def tensors(self) -> list[Tensor]:
        """All its tensors, in a fixed order."""
        return [self.moments, *self.states, self.propagators, self.clock]

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> "Measurement":
        """The measurement with these tensors, in the order of `tensors()`."""
        moments, translation, norm, propagators, clock = tensors
        return cls(moments, (translation, norm), propagators, clock)

    @classmethod
    def of_version_2(cls, tensors: Iterable[Tensor], plan: Plan) -> "Measurement":
        """The measurement of a checkpoint of version 2, whose laws kept forced and defect instead of the budget."""
        old = cls.of(tensors)
        new = cls.empty(plan, old.moments.device, old.clock.numel() - 1)
        new.moments, new.propagators, new.clock = old.moments, old.propagators, old.clock
        for view in plan.views:
            for law in Law:
                if (at := view.law_segment[law]) >= 0:
                    start, sources = old.states[law][:, at : at + view.n_segments].split_with_sizes(
                        [2, old.states[law].shape[0] - 2]
                    )
                    free = old.propagators[view.tensor, law, 0] @ start
                    defect, forced = sources[:2], sources[2:4] if law == Law.NORM else torch.zeros_like(free)
                    state, rows = new.states[law][:, at : at + view.n_segments], plan.rule.laws[law].rows
                    state[:N_START] = start
                    state[rows["budget"]], state[rows["budget"] + 2] = free + forced + defect
                    if law == Law.NORM:
                        state[rows["defect"] :][:2] = defect
                        state[rows["flow"] :][:2] = sources[4:]
        return new

    def clone(self) -> "Measurement":
        """A copy on the same device."""
        return Measurement.of(x.clone() for x in self.tensors())

    def cpu(self) -> "Measurement":
        """A copy on the CPU."""
        return Measurement.of(x.to("cpu", copy=True) for x in self.tensors())

    def start(self, plan: Plan, warm: Sequence[bool]) -> None:
        """Start the laws from the moments that Engine.measure stored.

        x₀ is the charge; y₀ = ⟨v, 1⟩ or ⟨p, v⟩ if the tensor has a momentum buffer, else zero. Sources and the clock
        start at zero, propagators at the identity. The moments of the gradient are zero until the first step.

        Args:
            plan: The plan of this measurement.
            warm: Per tensor, whether it has a momentum buffer.
        """
        if plan.views:
            flags = torch.tensor(warm, dtype=torch.bool, device="cpu")
            device = self.moments.device
            is_warm, tensor, *law_segments = (x.to(device, non_blocking=True) for x in (flags, *plan.indices))
            for (law, (x, y)), segment in zip(CHARGE_AND_MOMENTUM.items(), law_segments, strict=True):
                state, shape = self.states[law], plan.rule.laws[law]
                y0 = torch.where(is_warm[tensor[segment]], self.moments[y, segment], 0.0)
                begin(shape, state, self.moments[x, segment], y0)
        self.moments[Moment.SUM_G :].zero_()
        self.propagators.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
        self.clock.zero_()

    def followed(self, plan: Plan, measured: Tensor, warm: Sequence[bool], changed: Sequence[bool]) -> "Measurement":
        """This measurement after tensors were changed outside steps.

        Their charges become the present ones. The jump counts as defect: for x the difference from the last stored
        charge, for y the difference from the budget. It is added to all components with `jumps`. So rounding remains
        the error of storing, and the identity holds for later steps. All other moments are those of the last step.

        Args:
            plan: The plan of this measurement.
            measured: The present moments, by Engine.measure.
            warm: Per tensor, whether it has a momentum buffer.
            changed: Per tensor, whether it or its buffer was changed.
        """
        device = self.moments.device
        flags = (torch.tensor(x, dtype=torch.bool, device="cpu") for x in (warm, changed))
        # Non-blocking copies: the host must not wait for the steps in flight.
        is_warm, is_changed, tensor, *law_segments = (x.to(device, non_blocking=True) for x in (*flags, *plan.indices))
        here, new = is_changed[tensor], self.clone()
        of_sums = torch.zeros(2, len(tensor), dtype=torch.float64, device=device)  # jumps of translations, by segment
        for moment in (Moment.SUM_P, Moment.SQ_P):
            new.moments[moment] = torch.where(here, measured[moment], self.moments[moment])
        for (law, (x, y)), segment in zip(CHARGE_AND_MOMENTUM.items(), law_segments, strict=True):
            state, jumps, owner = new.states[law], here[segment], tensor[segment]
            shape = plan.rule.laws[law]
            now = torch.where(is_warm[owner], measured[y, segment], 0.0)
            x_jump = torch.where(jumps, measured[x, segment] - self.moments[x, segment], 0.0)
            budget_y = shape.y_row("budget")
            y_jump = torch.zeros_like(x_jump)
            if budget_y is not None:
                y_jump = torch.where(jumps, now - state[budget_y], 0.0)
            if law == Law.TRANSLATION:
                of_sums[:, segment] = torch.stack([x_jump, y_jump])
            of_offset = 2.0 * of_sums[0, segment], of_sums[1, segment]
            jump(shape, state, (x_jump, y_jump), of_offset)
        return new


def _rows(n_rows: int, n: int, device: torch.device | str) -> Tensor:
    """Zeros [n_rows, n], float64, whose rows start at different offsets within a page.

    A step reads and writes all rows at the same column. With a stride of a multiple of 4096 bytes, the rows would map
    to the same cache sets and evict each other, and a load from one row would alias a recent store to another.
    """
    page, line = 512, 8  # in float64 values
    stride = -(-n // page) * page + 5 * line
    return torch.zeros(n_rows, stride, dtype=torch.float64, device=device)[:, :n]


def _fold(parts: Iterable[Part], length: int) -> int:
    """The largest fold that divides the axis and every part's slices, runs and periods."""
    fold = length
    for part in parts:
        fold = gcd(fold, part.run, part.start or 0, part.stop or 0, part.period or 0)
    return fold


def make_plan(
    symmetries: Sequence[Symmetry],
    names: Sequence[str | None],
    shapes: Sequence[tuple[int, ...]],
    rule: Rule[Any] = sgd.SGD,
) -> Plan:
    """Plan the views that the symmetries' parts need.

    Args:
        symmetries: Validated against these names and shapes (noetherperf.symmetry.validate). Balances belong to
            measure/grams.py.
        names: One name per tensor, None if a parameter has none. Parts of other names belong to other plans.
        shapes: One shape per tensor.
        rule: The update rule.
    """
    index = {name: i for i, name in enumerate(names) if name is not None}
    if any(part.offset and part.parameter in index for symmetry in symmetries for part in symmetry.parts):
        rule = rule.with_offsets()
    wanted: dict[tuple[int, int | None], list[tuple[Part, Law]]] = {}
    symmetries = with_groups(symmetries)
    for symmetry in symmetries:
        law = Law[symmetry.law.upper()]
        for part in symmetry.parts:
            if part.parameter in index:
                # A norm with an offset is a sum of norms and translations (measure/offset.py).
                laws = {law, Law.TRANSLATION} if part.offset else {law}
                wanted.setdefault((index[part.parameter], part.axis), []).extend((part, one) for one in laws)

    # A part over a whole tensor uses the tensor's first wanted axis; without one, it is one segment along axis 0.
    home: dict[tuple[int, int | None], tuple[int, int]] = {}
    guests: dict[tuple[int, int], list[tuple[Part, Law]]] = {}
    first_axis: dict[int, int] = {}
    for tensor, axis in sorted(wanted, key=lambda key: (key[0], key[1] is None, key[1] or 0)):
        place_axis = axis if axis is not None else first_axis.get(tensor, 0)
        first_axis.setdefault(tensor, place_axis)
        home[tensor, axis] = (tensor, place_axis)
        guests.setdefault((tensor, place_axis), []).extend(wanted[tensor, axis])

    views: list[View] = []
    view_of: dict[tuple[int, int], int] = {}
    offset, law_offset = 0, dict.fromkeys(Law, 0)
    for (tensor, axis), asked in sorted(guests.items(), key=lambda item: item[0]):
        length = (shapes[tensor] or (1,))[axis]
        fold = max(1, _fold((part for part, _ in asked if part.axis is not None), length))
        n_segments = length // fold
        wanted_laws = {law for _, law in asked}
        view_of[tensor, axis] = len(views)
        translation, norm = (law_offset[law] if law in wanted_laws else -1 for law in Law)
        views.append(View(tensor, axis, fold, n_segments, offset, (translation, norm)))
        offset += n_segments
        for law in wanted_laws:
            law_offset[law] += n_segments

    def place(part: Part) -> PlannedPart:
        tensor = index[part.parameter]
        number = view_of[home[tensor, part.axis]]
        view = views[number]
        if part.axis is None:
            return PlannedPart(part, number, prod(shapes[tensor]), view.fold)
        return PlannedPart(part, number, part.fold * prod(shapes[tensor]) // shapes[tensor][part.axis], view.fold)

    parts = {s.name: tuple(place(part) for part in s.parts if part.parameter in index) for s in symmetries}
    asked_for = tuple(law for law in Law if any(view.law_segment[law] >= 0 for view in views))
    return Plan(tuple(views), parts, len(names), asked_for, rule)
