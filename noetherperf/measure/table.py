"""The rows of a readout's table: one of each symmetry, as plain data; the verdict is that of measure/verdict.py.

    for row in rows(optimizer.readout()):
        print(row.name, row.charge.median, row.verdict)

Everything is computed from a readout's arrays when it is asked for, and from nothing else. `row` makes the row of one
symmetry from arrays, so that a record's last row has the same table.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from noetherperf.measure.balances import BalanceReadout
from noetherperf.measure.defect import Numbers
from noetherperf.measure.verdict import Change, Rank, give, held_to

if TYPE_CHECKING:
    from noetherperf.measure.charges import ChargeReadout
    from noetherperf.measure.readout import Readout

__all__ = ["EpsShares", "Row", "Spread", "row", "rows"]

#: Of the numbers that a difference is made of: what rounding of float64 may leave after many steps; it counts as 0.
RESOLUTION = 64.0 * float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Spread:
    """One quantity over the groups of a symmetry. NaN and infinite groups are left out. NaN if no others are left.

    Attributes:
        median: Of the values.
        lowest, highest: Of the values.
        size: The median of the absolute values: groups of opposite sign do not cancel.
    """

    median: float
    lowest: float
    highest: float
    size: float


@dataclass(frozen=True)
class Row:
    """A symmetry in a readout's table. Plain numbers and text, so that `dataclasses.asdict` gives JSON data.

    Of each group, charge − initial = change = decay + growth + defect + rounding. Medians over groups need not add up.
    The groups of a Balance are the eigenvectors v of its charge. A matrix A counts as vᵀAv, and the residual R as |Rv|.

    Attributes:
        name, kind: Of the symmetry.
        n_groups: How many groups it has.
        charge: Now.
        change: charge − initial.
        decay: free − initial: what weight decay took of the initial charge. It includes what a warm momentum buffer
            added.
        growth: discrete.forced: what steps of finite size added. 0 for a translation. With an offset it also has what
            decay left of the initial charge, because decay draws θ to 0, and not θ + offset.
        defect: discrete.defect: what came in because the law holds only nearly.
        rounding: charge − discrete.budget: what storing lost.
        angular_update: The median angle in radians by which the last step turned a group; NaN where not known.
        effective_lr: The median effective learning rate of the last step; NaN where not known.
        held_to: The largest |residual| of a group, relative to the mean over groups of
            max(|charge|, |initial|, |free| + |forced|); NaN where the law is open.
        defect_share, rounding_share: Σ|defect| and Σ|rounding| over groups, relative to
            Σ (|decay| + |growth| + |defect|); 0 to 1 for the first.
        closed, reason: Whether free + forced is a prediction, and why not. If it is none, and the rule has growth and
            transport (AdamW, Adam, Probe), these two stand here as growth and defect, and decay is the rest. That split
            needs no law.
        verdict: What happened, in words.
        rank: Sorts rows, worst first.
    """

    name: str
    kind: str
    n_groups: int
    charge: Spread
    change: Spread
    decay: Spread
    growth: Spread
    defect: Spread
    rounding: Spread
    angular_update: float
    effective_lr: float
    held_to: float
    defect_share: float
    rounding_share: float
    closed: bool
    reason: str
    verdict: str
    rank: Rank


class EpsShares(Protocol):
    """A `Constraints` of check_constraints: it knows how much of each gradient's defect an eps makes."""

    def eps_share(self, name: str, constraint: str) -> float: ...


def rows(readout: "Readout", constraints: EpsShares | None = None) -> list[Row]:
    """The table's rows, worst first; symmetries of one rank in the readout's order.

    Args:
        readout: From `optimizer.readout()`.
        constraints: From `check_constraints` of the same symmetries; the verdict can then name an eps.

    Raises:
        KeyError: The constraints of a symmetry were not checked.
    """
    found = []
    laws: list[ChargeReadout | BalanceReadout] = [*readout.values(), *readout.balances.values()]
    for law in laws:
        share = math.nan if constraints is None else constraints.eps_share(law.name, "gradient")
        dtypes = {dtype for part in law.symmetry.parts if (dtype := readout.dtypes.get(part.parameter)) is not None}
        found.append(
            row(
                law.name,
                law.symmetry.kind,
                _arrays(law),
                rule=readout.rule,
                step=readout.step,
                reason=law.reason,
                dtypes=dtypes,
                eps_share=share,
            )
        )
    return sorted(found, key=lambda found: found.rank)


def _arrays(law: "ChargeReadout | BalanceReadout") -> dict[str, Numbers]:
    """What `row` takes, of a readout's symmetry."""
    discrete = law.discrete
    values = {
        "charge": law.charge,
        "initial": law.initial,
        "discrete_free": discrete.free,
        "discrete_forced": discrete.forced,
        "discrete_defect": discrete.defect,
        "discrete_budget": discrete.budget,
        "growth": law.growth,
        "transport": law.transport,
    }
    known = {name: value for name, value in values.items() if value is not None}
    if isinstance(law, BalanceReadout):
        found = _along_eigenvectors(known | {"residual": law.residual})
        found["relative_defect"] = law.relative_defect.repeat_interleave(law.charge.shape[-1])
    else:
        found = known | {
            "relative_defect": law.relative_defect,
            "angular_update": law.angular_update,
            "effective_lr": law.effective_lr,
            "sq_g": law.moments["sq_g"],
        }
    return {name: value.numpy() for name, value in found.items()}


def _along_eigenvectors(matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """vᵀAv of each matrix A [blocks, n, n], and |Av| of the residual; v: the charge's eigenvectors; [blocks · n]."""
    charge = matrices["charge"]
    vectors = torch.linalg.eigh(torch.where(charge.isfinite(), charge, 0.0)).eigenvectors
    found = {}
    for name, matrix in matrices.items():
        images = matrix @ vectors
        along = torch.linalg.vector_norm(images, dim=-2) if name == "residual" else (vectors * images).sum(-2)
        found[name] = along.flatten()
    return found


@np.errstate(all="ignore")
def row(
    name: str,
    kind: str,
    values: Mapping[str, Numbers],
    *,
    rule: str,
    step: int,
    reason: str = "",
    dtypes: Collection[str] = (),
    eps_share: float = math.nan,
) -> Row:
    """The row of one symmetry.

    Args:
        name: The symmetry's.
        kind: Its kind: "translation", "scale", "rescale", "balance" or "norm".
        values: Arrays [n groups], float64, under the names that they have in a record: charge, initial, discrete_free,
            discrete_forced, discrete_defect, discrete_budget; growth and transport where the rule has them, and decayed
            (else it is the rest); relative_defect, angular_update, effective_lr and sq_g where they are known;
            residual where it is not charge − (discrete_budget − discrete_defect).
        rule: "sgd", "adam" or "given" (Probe).
        step: Steps since measuring began.
        reason: Why free + forced is no prediction; empty if it is one.
        dtypes: Those in which the parameters are stored, such as "bfloat16"; empty: not known.
        eps_share: How much of the gradient's defect an eps makes; NaN: not known.
    """
    change, closed = _change(values, closed=not reason), not reason
    verdict = give(change, kind=kind, rule=rule, step=step, closed=closed, dtypes=dtypes, eps_share=eps_share)
    unknown = np.full(len(change.charge), np.nan)
    return Row(
        name,
        kind,
        len(change.charge),
        _spread(change.charge),
        _spread(change.charge - change.initial),
        _spread(change.decay),
        _spread(change.growth),
        _spread(change.defect),
        _spread(change.rounding),
        _spread(values.get("angular_update", unknown)).median,
        _spread(values.get("effective_lr", unknown)).median,
        held_to(change) if closed else math.nan,
        change.share(change.defect),
        change.share(change.rounding),
        closed,
        reason,
        verdict.text,
        verdict.rank,
    )


def _change(values: Mapping[str, Numbers], *, closed: bool) -> Change:
    """The charges' change by source."""
    charge, initial = values["charge"], values["initial"]
    free, forced, defect, budget = (values[f"discrete_{x}"] for x in ("free", "forced", "defect", "budget"))
    terms = [initial, charge, free, forced, defect]
    decay, growth = free - initial, forced
    if not closed and "growth" in values:
        growth, defect = values["growth"], values["transport"]
        decay = values.get("decayed", budget - growth - defect - initial)
        terms += [growth, defect]
    least = RESOLUTION * sum(map(np.abs, terms))

    def resolved(x: Numbers) -> Numbers:
        return np.where(np.abs(x) <= least, 0.0, x)

    unknown = np.full(len(charge), np.nan)
    return Change(
        charge=charge,
        initial=initial,
        decay=resolved(decay),
        growth=resolved(growth),
        defect=resolved(defect),
        rounding=resolved(charge - budget),
        predicted=np.abs(free) + np.abs(forced),
        residual=values.get("residual", charge - (budget - values["discrete_defect"])),
        cosine=values.get("relative_defect", unknown),
        angle=values.get("angular_update", unknown),
        sq_gradient=values.get("sq_g", values.get("relative_defect", unknown)),  # this, too, is 0 where the gradient is
    )


def _spread(values: Numbers) -> Spread:
    known = values[np.isfinite(values)]
    if not len(known):
        return Spread(math.nan, math.nan, math.nan, math.nan)
    middle, size = np.median(known), np.median(np.abs(known))
    return Spread(float(middle), float(known.min()), float(known.max()), float(size))
