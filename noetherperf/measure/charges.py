"""Charges of symmetries after a step, and what the laws predict of them: what a readout is made of.

Free, forced, defect and rounding are derived in docs/theory.md, section 3. Growth, transport and a step's angle are
derived in docs/theory.md, section 7.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.rules.moments import Moment
from noetherperf.symmetry import Symmetry


@dataclass(frozen=True)
class Prediction:
    """A law's prediction of a charge, by source; float64 [n groups] each.

    Attributes:
        free: What the initial charge alone has become, with a momentum buffer that was warm at the start. It decays, or
            oscillates.
        forced: What steps of finite size have added, by |u|² (discrete law), or by |g|² or |θ̇|² (flow law). Zero for a
            translation. With an offset it also has what decay leaves, because decay draws θ to 0, and not θ + offset.
        defect: What came in because the gradient constraint did not hold, and what other code changed between steps.
            Zero if the symmetry holds and no other code changed anything. Always zero in the flow law.
        budget: free + forced + defect. In the discrete law it is an identity of the update, up to rounding, for any set
            of parameters. It is accumulated separately, because its parts may be large and cancel.
    """

    free: Tensor
    forced: Tensor
    defect: Tensor
    budget: Tensor

    @property
    def total(self) -> Tensor:
        """free + forced: the law's prediction if the symmetry holds."""
        return self.budget - self.defect


N_MOMENTS = len(Moment)


class Row(IntEnum):
    """Rows of a readout's table after its first rows, the moments."""

    INITIAL = N_MOMENTS
    FREE = N_MOMENTS + 1
    FORCED = N_MOMENTS + 2
    DEFECT_SOURCE = N_MOMENTS + 3
    BUDGET = N_MOMENTS + 4
    FLOW_FREE = N_MOMENTS + 5
    FLOW_FORCED = N_MOMENTS + 6
    GROWTH = N_MOMENTS + 7
    TRANSPORT = N_MOMENTS + 8
    CHARGE = N_MOMENTS + 9
    DEFECT = N_MOMENTS + 10
    RELATIVE_DEFECT = N_MOMENTS + 11
    RELATIVE_UPDATE = N_MOMENTS + 12
    ANGULAR_UPDATE = N_MOMENTS + 13
    EFFECTIVE_LR = N_MOMENTS + 14


N_SUMS = Row.CHARGE  # rows that are sums over segments; derived rows follow
N_ROWS = N_MOMENTS + len(Row)


class Predicted:
    """A charge and what the laws predict of it, from rows of a table; `Charges` says what each one is."""

    _has_growth: bool

    def _row(self, number: int) -> Tensor:
        raise NotImplementedError

    @property
    def charge(self) -> Tensor:
        return self._row(Row.CHARGE)

    @property
    def initial(self) -> Tensor:
        return self._row(Row.INITIAL)

    @property
    def discrete(self) -> Prediction:
        return Prediction(*map(self._row, (Row.FREE, Row.FORCED, Row.DEFECT_SOURCE, Row.BUDGET)))

    @property
    def flow(self) -> Prediction:
        free, forced = map(self._row, (Row.FLOW_FREE, Row.FLOW_FORCED))
        return Prediction(free, forced, torch.zeros_like(free), free + forced)

    @property
    def growth(self) -> Tensor | None:
        return self._row(Row.GROWTH) if self._has_growth else None

    @property
    def transport(self) -> Tensor | None:
        return self._row(Row.TRANSPORT) if self._has_growth else None

    @property
    def defect(self) -> Tensor:
        return self._row(Row.DEFECT)

    @property
    def residual(self) -> Tensor:
        return self.charge - self.discrete.total

    @property
    def rounding(self) -> Tensor:
        return self.charge - self.discrete.budget


class Charges(Predicted):
    """Charges after a step: float64 CPU tensors [n groups], of one symmetry or of all side by side.

    Attributes:
        charge: Q now, of the values as stored: Σ c⟨θ, 1⟩ for a translation, and Σ c|θ|² otherwise. Here and below, θ
            counts with its part's offset.
        initial: Q when measuring began.
        discrete: The discrete law's prediction, exact to rounding where the symmetry holds.
        flow: The flow law's prediction, from the continuous-time dynamics of the paper.
        growth: What the squares of the updates added to the charge, whatever the law. With weight decay θ' = r θ − η u
            and R the product of all r² (of all r, for a translation), charge = R initial + growth + transport +
            rounding;

                growth      r² growth + η² |u|²;                0 for a translation
                transport   r² transport − 2ηr Σ c⟨θ, u⟩;       r transport − η Σ c⟨u, 1⟩ for a translation

            The growth of a rescale is that of its inward parts minus that of its outward parts. It is None for a rule
            whose decay passes through the momentum buffer (SGD). Such a rule has no r, and discrete.forced is exactly
            what |u|² drove.
        transport: What the overlap of the updates with the generator added, and what other code changed between steps.
            None if growth is None.
        defect: The last step's gradient constraint, Σ c⟨g, 1⟩ or Σ c⟨g, θ⟩; zero where the symmetry holds.
        relative_defect: |defect| / (|g_A| |ψ_A|), ψ the generator (c or cθ, θ taken after the step); 0 where g is 0.
            |g_A| counts as no less than a thousandth of the average |g| of a group of that size, over all that is
            measured (measure/defect.py explains why).
        relative_update: η|u| / |θ| of the last step, θ taken after it. The parameters of all parts are one vector θ,
            without coefficients. Each part has its own η. A part without a gradient did not move.
        angular_update: The angle in radians by which the last step turned that vector, as computed (not as rounded to
            the stored dtype). NaN where θ was nearly zero: |θ| or |θ'| a thousandth of the other.
        effective_lr: The last step's learning rate for a loss that does not depend on the length of θ. It is η/Q for
            SGD, whose update falls as 1/|θ|, and η/√Q for Adam; Q is the charge. NaN for a rescale, and if parts have
            different η.
            It is NaN for a translation, and so are relative_update and angular_update. All three are also NaN while the
            last step is not known: before the first step, after loading, after other code changed parameters, and while
            a device has skipped every step since options changed.
        moments: sum_p, sq_p, sum_g, sq_g, dot_pg, sq_u of the last step, summed over parts with their coefficients.
        residual: charge − discrete.total, which is defect and rounding.
        rounding: charge − discrete.budget: what rounding to the stored dtype changed.
    """

    def __init__(self, rows: NDArray[np.float64], *, has_growth: bool) -> None:
        self._rows = rows  # [N_ROWS, n groups]
        self._has_growth = has_growth

    def _row(self, number: int) -> Tensor:
        return torch.from_numpy(self._rows[number])

    @property
    def relative_defect(self) -> Tensor:
        return self._row(Row.RELATIVE_DEFECT)

    @property
    def relative_update(self) -> Tensor:
        return self._row(Row.RELATIVE_UPDATE)

    @property
    def angular_update(self) -> Tensor:
        return self._row(Row.ANGULAR_UPDATE)

    @property
    def effective_lr(self) -> Tensor:
        return self._row(Row.EFFECTIVE_LR)

    @property
    def moments(self) -> dict[str, Tensor]:
        return {moment.name.lower(): self._row(moment) for moment in Moment}


class OfSymmetry:
    """What a readout of one symmetry says of it; `ChargeReadout` explains the attributes."""

    symmetry: Symmetry
    reason: str

    @property
    def name(self) -> str:
        return self.symmetry.name

    @property
    def closed(self) -> bool:
        return not self.reason


class ChargeReadout(OfSymmetry, Charges):
    """One symmetry after a step: its charges (see `Charges`), and whether its law is closed.

    Attributes:
        symmetry: The measured symmetry.
        name: Its name.
        closed: Whether free + forced is a prediction.
        reason: Why it is not; empty if it is.
    """

    def __init__(self, symmetry: Symmetry, rows: NDArray[np.float64], reason: str, *, has_growth: bool) -> None:
        super().__init__(rows, has_growth=has_growth)
        self.symmetry, self.reason = symmetry, reason

    def __repr__(self) -> str:
        return f"ChargeReadout({self.name!r}, charge={self.charge}, closed={self.closed})"
