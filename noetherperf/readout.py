"""Readout: charges, predictions and residuals of every symmetry, from one copy of what the steps measured.

What free, forced, defect and rounding are is derived in docs/theory.md, section 3.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from noetherperf.laws import Law, State
from noetherperf.moments import N_MOMENTS, READOUT_MOMENTS, Moment
from noetherperf.plan import Measurement, Plan, PlannedPart
from noetherperf.symmetry import Symmetry

FLOOR = 1e-3  # of the average, below which a group's own gradient is no measure: it may be rounding and nothing else


@dataclass(frozen=True)
class Prediction:
    """A law's prediction of a charge, by source; float64 [n groups] each.

    Fields:
        free: From the initial charge (and a warm momentum buffer) alone: decay, oscillation.
        forced: From the finite steps: |u|² (discrete law), |g|² or |θ̇|² (flow law); zero for a translation.
        defect: From the gradient constraint's violation, and from what others wrote between steps; zero where the
            symmetry holds and nobody did, and always in the flow law.
        budget: free + forced + defect: in the discrete law an identity of the update, up to rounding, for any set of
            parameters. It is kept by itself, for its parts may be large and cancel.
    """

    free: Tensor
    forced: Tensor
    defect: Tensor
    budget: Tensor

    @property
    def total(self) -> Tensor:
        """free + forced: what the law predicts where the symmetry holds."""
        return self.budget - self.defect


@dataclass(frozen=True)
class ChargeReadout:
    """One symmetry after a step; arrays are float64 CPU tensors [n groups].

    Fields:
        symmetry: What was measured.
        charge: Q now: Σ c⟨θ, 1⟩ for a translation, Σ c|θ|² else, of the values as stored.
        initial: Q when measuring began.
        discrete: The discrete law's prediction, exact to rounding where the symmetry holds.
        flow: The flow law's, the continuous-time dynamics of the paper.
        defect: The last step's gradient constraint, Σ c⟨g, 1⟩ or Σ c⟨g, θ⟩; zero where the symmetry holds.
        relative_defect: |defect| / (|g_A| |ψ_A|), ψ the generator (c or cθ, θ taken after the step); 0 where g is 0.
            What a symmetry cancels altogether, as BatchNorm does a bias before it, has g_A = 0 but for rounding: so
            |g_A| counts as no less than a thousandth of what a group of that size has on average in all that is
            measured.
        moments: sum_p, sq_p, sum_g, sq_g, dot_pg, sq_u of the last step, summed over parts with their coefficients.
        closed: Whether free + forced is a prediction.
        reason: Why not, empty if it is.
    """

    symmetry: Symmetry
    charge: Tensor
    initial: Tensor
    discrete: Prediction
    flow: Prediction
    defect: Tensor
    relative_defect: Tensor
    moments: dict[str, Tensor]
    closed: bool
    reason: str

    @property
    def name(self) -> str:
        """The symmetry's name."""
        return self.symmetry.name

    @property
    def residual(self) -> Tensor:
        """charge − discrete.total: the defect's part and rounding."""
        return self.charge - self.discrete.total

    @property
    def rounding(self) -> Tensor:
        """charge − discrete.budget: what rounding to the stored dtype lost."""
        return self.charge - self.discrete.budget


class Readout(Mapping[str, ChargeReadout]):
    """All symmetries after a step, by name.

    Attributes:
        step: Steps since measuring began.
        time: Σ lr·(1 − dampening) over those steps (without momentum Σ lr), of the first parameter group.
    """

    def __init__(self, charges: Mapping[str, ChargeReadout], step: int, time: float) -> None:
        self._charges = dict(charges)
        self.step = step
        self.time = time

    def __getitem__(self, name: str) -> ChargeReadout:
        try:
            return self._charges[name]
        except KeyError:
            known = ", ".join(self._charges) or "none; give SGD symmetries to measure"
            raise KeyError(f"no symmetry {name!r} is measured; there are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._charges)

    def __len__(self) -> int:
        return len(self._charges)

    def __repr__(self) -> str:
        return f"Readout(step={self.step}, time={self.time:g}, symmetries=[{', '.join(self._charges)}])"

    def scalars(self) -> dict[str, float]:
        """A few numbers per symmetry for a logger, as a flat dict.

        "<name>/charge" is the mean over groups; "<name>/residual", "<name>/rounding" and "<name>/relative_defect" are
        the largest absolute values over groups.
        """
        flat: dict[str, float] = {"step": float(self.step), "time": self.time}
        for name, law in self._charges.items():
            flat[f"{name}/charge"] = law.charge.mean().item()
            flat[f"{name}/residual"] = law.residual.abs().max().item()
            flat[f"{name}/rounding"] = law.rounding.abs().max().item()
            flat[f"{name}/relative_defect"] = law.relative_defect.max().item()
        return flat


class Source(NamedTuple):
    """One device's plan and a CPU copy of what was measured there."""

    plan: Plan
    measurement: Measurement


class _Sums(NamedTuple):
    """Sums over parts [n groups]: the moments and the laws' components with coefficients, and three without."""

    moments: Tensor  # [N_MOMENTS, n]
    components: Tensor  # [7, n]: initial; discrete free, forced, defect, budget; flow free, forced
    sq_gradient: Tensor
    sq_generator: Tensor
    n_elements: Tensor


def _part_sums(law: Law, planned: PlannedPart, source: Source) -> _Sums:
    """One part's contribution, reduced from segments to groups."""
    plan, measured = source
    view = plan.views[planned.view]
    moments = measured.moments[:, view.segment : view.segment + view.n_segments]
    at = view.law_segment[law]
    state = measured.states[law][:, at : at + view.n_segments]
    (xx, xy), _ = measured.propagators[view.tensor, law, 0]
    flow_xx = measured.propagators[view.tensor, law, 1, 0, 0]
    x0 = state[State.X0]
    none = torch.zeros_like(x0)
    free = xx * x0 + xy * state[State.Y0]
    budget = state[State.X] + state[State.X_REST]
    if law == Law.TRANSLATION:
        forced, defect, flow_forced = none, budget - free, none
    else:
        defect, flow_forced = state[State.DEFECT_X], state[State.FLOW_X]
        forced = budget - free - defect
    components = torch.stack([x0, free, forced, defect, budget, flow_xx * x0, flow_forced])
    sums = planned.reduce(torch.cat([moments, components]))
    weight = planned.part.weight
    n_elements = torch.full_like(sums[0], float(planned.n_elements))
    return _Sums(
        weight * sums[:N_MOMENTS],
        weight * sums[N_MOMENTS:],
        sums[Moment.SQ_G],
        weight * weight * (n_elements if law == Law.TRANSLATION else sums[Moment.SQ_P]),
        n_elements,
    )


def _sums(symmetry: Symmetry, sources: Sequence[Source]) -> _Sums:
    law = Law[symmetry.law.upper()]
    parts = [_part_sums(law, planned, source) for source in sources for planned in source.plan.parts[symmetry.name]]
    return _Sums(*(torch.stack(column).sum(0) for column in zip(*parts, strict=True)))


def _mean_square_gradient(totals: Iterable[_Sums]) -> float:
    """Of one element, over all that is measured; groups with a gradient that is not finite are left out."""
    sq_gradient = n_elements = 0.0
    for total in totals:
        finite = total.sq_gradient.isfinite()
        sq_gradient += total.sq_gradient[finite].sum().item()
        n_elements += total.n_elements[finite].sum().item()
    return sq_gradient / n_elements if n_elements else 0.0


def _read_one(symmetry: Symmetry, total: _Sums, mean_square_gradient: float, reason: str) -> ChargeReadout:
    translation = Law[symmetry.law.upper()] == Law.TRANSLATION
    initial, free, forced, defect, budget, flow_free, flow_forced = total.components
    constraint = total.moments[Moment.SUM_G if translation else Moment.DOT_PG]
    sq_gradient = torch.maximum(total.sq_gradient, FLOOR**2 * mean_square_gradient * total.n_elements)
    scale = (sq_gradient * total.sq_generator).sqrt()
    return ChargeReadout(
        symmetry,
        total.moments[Moment.SUM_P if translation else Moment.SQ_P],
        initial,
        Prediction(free, forced, defect, budget),
        Prediction(flow_free, flow_forced, torch.zeros_like(flow_free), flow_free + flow_forced),
        constraint,
        torch.where(scale == 0.0, 0.0, constraint.abs() / scale),
        {name: total.moments[moment] for name, moment in READOUT_MOMENTS.items()},
        not reason,
        reason,
    )


def read(
    symmetries: Sequence[Symmetry], sources: Sequence[Source], reasons: Mapping[str, str], step: int, time: float
) -> Readout:
    """Combine measurements of parts into a Readout; reasons names the open laws and why they are."""
    totals = {s.name: _sums(s, sources) for s in symmetries}
    mean = _mean_square_gradient(totals.values())
    return Readout(
        {s.name: _read_one(s, totals[s.name], mean, reasons.get(s.name, "")) for s in symmetries}, step, time
    )
