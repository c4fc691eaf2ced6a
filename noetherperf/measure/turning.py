"""Turning: how far a step moved and turned the parameters of a group, seen as one vector.

A part's step p' = r p − η w moves it by Δ = p' − p = (1 − 1/r) p' − (η/r) w, so that

    |Δ|²    = (1 − 1/r)² |p'|² − 2 (1 − 1/r) (η/r) ⟨p', w⟩ + (η/r)² |w|²
    ⟨p', Δ⟩ = (1 − 1/r) |p'|² − (η/r) ⟨p', w⟩

Both are sums over elements, so they add up over parts with their own η and r. A rule gives ⟨p', w⟩ (`Rule.motion`).
Where a part counts from an offset c, ⟨p' + c, Δ⟩ has c⟨Δ, 1⟩ too, which follows from ⟨w, 1⟩ as Δ from w. With
A = ⟨θ', Δ⟩ of the whole group, |θ'|² |Δ|² − A² is the squared area between its vectors before and after, and

    angular update = atan2(√(|θ'|² |Δ|² − A²), |θ'|² − A)

which keeps its digits for small angles, as the arc cosine of ⟨θ, θ'⟩/(|θ| |θ'|) would not.

Derived in docs/theory.md, section 7.

Source: Kosson et al. (2023), "Rotational Equilibrium", arXiv:2305.17212, for the quantities; formulas: this project.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from noetherperf.measure.defect import Numbers
from noetherperf.measure.plan import Measurement, Plan
from noetherperf.rules.law import Law
from noetherperf.rules.moments import Moment
from noetherperf.rules.motion import CARRIED, UNKNOWN, Motion

#: |θ|²/|θ'|² below which rounding of the stored parameters may hide the direction of θ.
SMALLEST = 1e-6


class LastStep(NamedTuple):
    """How a plan's tensors made their last step.

    Attributes:
        motions: The different ones.
        of: The index of each tensor's motion.
    """

    motions: Sequence[Motion]
    of: Sequence[int]

    @classmethod
    def unknown(cls, plan: Plan) -> "LastStep":
        return cls([UNKNOWN], [0] * plan.n_tensors)


class Moved(IntEnum):
    """What `moved` gives of each segment."""

    SQ = 0  # |Δ|²
    ALONG = 1  # ⟨θ', Δ⟩
    SQ_UPDATE = 2  # η² |u|²
    LR = 3  # η
    TOTAL = 4  # ⟨Δ, 1⟩, where norms may count from an offset; else 0


def moved(plan: Plan, measurement: Measurement, last: LastStep, law: Law) -> Numbers:
    """What the last step did to each segment of a law, [len(Moved), n segments]; NaN for translations.

    Args:
        plan: What is measured.
        measurement: Its measurement, on the CPU.
        last: How its tensors made the last step.
        law: Which law's segments, in the order of its states.
    """
    tensor, *law_segments = (x.numpy() for x in plan.indices)
    segments = law_segments[law]
    if law != Law.NORM:
        return np.full((len(Moved), len(segments)), np.nan)
    which = np.array(last.of, np.int64)[tensor[segments]]
    moments, state = measurement.moments.numpy()[:, segments], measurement.states[law].numpy()
    rows, y_row = plan.rule.moment_rows, plan.rule.laws[law].y_row("budget")

    def total(of_motions: Sequence[Mapping[str, float]], carried: Callable[[], Numbers]) -> Numbers:
        """Σ coefficient · moment; terms without coefficient are left out, because they may be NaN."""
        found = np.zeros(len(segments))
        for name in sorted({name for of_motion in of_motions for name in of_motion}):
            factor = np.array([of_motion.get(name, 0.0) for of_motion in of_motions])[which]
            value = carried() if name == CARRIED else moments[rows[name]]
            found += np.where(factor == 0.0, 0.0, factor * value)
        return found

    def carried() -> Numbers:
        assert y_row is not None, "the budget of this rule has no second number"
        return np.asarray(state[y_row])

    def carried_sums() -> Numbers:
        y = plan.rule.laws[Law.TRANSLATION].y_row("budget")
        assert y is not None, "the budget of this rule has no second number"
        return np.asarray(measurement.states[Law.TRANSLATION][y, plan.translation_of].numpy())

    square = total([{m.square: 1.0} for m in last.motions], carried)
    along = total([m.along for m in last.motions], carried)
    sums = total([m.total for m in last.motions], carried_sums) if plan.rule.has_offsets else np.zeros(len(segments))
    keep, lr = np.array([(m.keep, m.lr) for m in last.motions]).T[:, which]
    lost, step, sq_p = 1.0 - 1.0 / keep, lr / keep, moments[Moment.SQ_P]
    return np.stack(
        [
            lost * lost * sq_p - 2.0 * lost * step * along + step * step * square,
            lost * sq_p - step * along,
            lr * lr * moments[Moment.SQ_U],
            lr,
            lost * moments[Moment.SUM_P] - step * sums if plan.rule.has_offsets else sums,
        ]
    )


def angular_update(sq_p: Numbers, sq_moved: Numbers, along: Numbers) -> Numbers:
    """The angle between θ and θ' in radians, [n groups]; NaN where one of them is (nearly) zero.

    Args:
        sq_p: |θ'|².
        sq_moved: |Δ|².
        along: ⟨θ', Δ⟩.
    """
    sq_before = sq_p - 2.0 * along + sq_moved
    area = np.sqrt(np.maximum(sq_p * sq_moved - along * along, 0.0))
    has_direction = (sq_p > SMALLEST * sq_before) & (sq_before > SMALLEST * sq_p)
    return np.where(has_direction, np.arctan2(area, sq_p - along), np.nan)


def effective_lr(lowest: Numbers, highest: Numbers, sq_p: Numbers, degree: int | None) -> Numbers:
    """η/|θ|^degree, [n groups]; NaN where parts have different η, or where the degree is not known.

    Args:
        lowest, highest: Of the η of each group's parts.
        sq_p: |θ|².
        degree: `Rule.lr_degree`.
    """
    if degree is None:
        return np.full(len(sq_p), np.nan)
    return np.where(lowest == highest, highest / sq_p ** (0.5 * degree), np.nan)
