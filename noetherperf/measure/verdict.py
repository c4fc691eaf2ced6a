"""Verdicts: what happened to a symmetry's charges, in words, and which measured numbers prove each sentence.

All sums are over the groups of one symmetry, of absolute values, so that nothing cancels:

    did     Σ (|decay| + |growth| + |defect|)              all that the steps did to the charges
    size    Σ max(|charge|, |initial|, |free| + |forced|)    the numbers that the charges are made of

A part of the change counts if its sum is more than NOTABLE of `did` and more than NOISE of `size`: less is rounding of
float32, or a group whose charge hardly moved. The sentences, and what proves each:

    "NaN or infinite in 3 of 16 groups"
        The charge, the budget or a part of it is not finite there; of an open law, the charge.
    "no step yet", "unchanged"
        The readout's step is 0; or charge = initial, and decay, growth, defect and residual are 0, in all groups.
    "changed, but not by steps"
        Rounding counts and did = 0: the stored values are others than those that steps without effect have left.
    "bfloat16 lost 9 % of the decay"
        Σ|rounding| / did, of opposite sign to what the steps did ("added" if of the same sign). All parameters are
        stored as bfloat16 ("rounding" if not, or not known). Decay is DOMINANT of `did` ("change" if neither it nor
        growth is). Where the share is more than ALL: "bfloat16 moved it 2.6 times as far as the steps".
    "the gradient breaks it: 0.3 %"
        Σ|defect| / did, in SGD's law, whose defect nothing but ⟨g, ψ⟩ ≠ 0 drives.
    "eps of a normalisation: 0.3 %"
        The same, and `check_constraints` found that an eps makes DOMINANT of ⟨g, ψ⟩, on the batch that it was given.
    "Adam's preconditioner: 12 %"
        Σ|defect| / did, in Adam's law, whose defect three things drive. One is the preconditioner. One is ⟨g, ψ⟩ ≠ 0,
        but the gradient of the last step is too nearly orthogonal to ψ to have made it (`_reach`). One is what storing
        loses of Adam's buffers, but these are stored in 32 or 64 bits.
    "the steps break it: 12 %"
        The same where one of the others may be the cause, and where a Probe measures, which sees no preconditioner.
    "open"
        free + forced is no prediction; the row's reason says why.
    "grew by 12 %", "shrank by 12 %", "grew to 3 times", "grew from 0"
        Σ charge / Σ initial, where no symmetry is claimed and no charge is negative.
    "holds to 2e-6"
        The largest |residual|, relative to size / n groups, and nothing of the above.

A gradient's sentence says what broke the law, not why the gradient did: an eps, a GELU, or its own rounding.
`check_constraints` separates these.
"""

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from noetherperf.measure.defect import Numbers

__all__ = ["Change", "Rank", "Verdict", "give"]

#: A part of what the steps did to the charges that a verdict mentions.
NOTABLE = 1e-3
#: Of the charges' size: what rounding of float32 may add up to.
NOISE = 1e-6
#: Of a whole, a part that is nearly all of it.
DOMINANT = 0.9
#: Of a whole, more than can be called lost.
ALL = 1.5
#: A cosine that rounding of float32 leaves of zero.
ORTHOGONAL = 1e-6
#: Of the defect, what the gradient may have made if the sentence names the preconditioner.
MINOR = 0.2
#: The least number that a verdict promises: rounding of float64.
EPSILON = float(np.finfo(np.float64).eps)

#: The dtypes of which rounding is too small for a verdict.
_WIDE = frozenset({"float32", "float64"})

Rank = tuple[int, float]


class Verdict(NamedTuple):
    """A verdict in words, and its rank: lower ones are worse."""

    rank: Rank
    text: str


class Change(NamedTuple):
    """The charges of a symmetry, and their change since measuring began by source; [n groups] each.

        charge − initial = decay + growth + defect + rounding

    Attributes:
        charge, initial: As in a readout.
        decay, growth, defect, rounding: The parts; see `Row` (measure/table.py).
        predicted: |free| + |forced|.
        residual: charge − discrete.total.
        cosine, angle, sq_gradient: relative_defect, angular_update and moment sq_g of the last step; NaN: not known.
    """

    charge: Numbers
    initial: Numbers
    decay: Numbers
    growth: Numbers
    defect: Numbers
    rounding: Numbers
    predicted: Numbers
    residual: Numbers
    cosine: Numbers
    angle: Numbers
    sq_gradient: Numbers

    @property
    def finite(self) -> NDArray[np.bool_]:
        """The groups without NaN and infinity, [n groups], bool; what is of the last step may be NaN."""
        found: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(np.stack(self[:8])))
        return found

    @property
    def size(self) -> Numbers:
        """max(|charge|, |initial|, |free| + |forced|)."""
        return np.maximum(np.maximum(np.abs(self.charge), np.abs(self.initial)), self.predicted)

    @property
    def did(self) -> Numbers:
        """|decay| + |growth| + |defect|: what the steps did."""
        return np.abs(self.decay) + np.abs(self.growth) + np.abs(self.defect)

    def share(self, part: Numbers) -> float:
        """Σ|part| / did; 0 where the part is 0, infinite where the steps did nothing."""
        total, did = float(np.abs(part).sum()), float(self.did.sum())
        return 0.0 if total == 0.0 else total / did if did else math.inf

    def counts(self, part: Numbers) -> bool:
        """Whether a part of the change is worth a sentence."""
        return self.share(part) > NOTABLE and float(np.abs(part).sum()) > NOISE * float(self.size.sum())


@np.errstate(all="ignore")
def give(
    change: Change,
    *,
    kind: str,
    rule: str,
    step: int,
    closed: bool,
    dtypes: Collection[str] = (),
    eps_share: float = math.nan,
) -> Verdict:
    """The verdict on one symmetry.

    Args:
        change: What happened to its charges.
        kind: Of the symmetry; "norm" claims nothing.
        rule: "sgd", "adam" or "given" (Probe).
        step: Steps since measuring began.
        closed: Whether free + forced is a prediction.
        dtypes: Those in which its parameters are stored; empty: not known.
        eps_share: How much of the gradient's defect an eps makes, by `Constraints.eps_share`; NaN: not known.
    """
    known = change.finite if closed else np.isfinite(change.charge) & np.isfinite(change.initial)
    n, lost = len(change.charge), int((~known).sum())
    if n == 0:
        return Verdict((5, 0.0), "no groups")
    if lost:
        where = "" if n == 1 else f" in all {n} groups" if lost == n else f" in {lost} of {n} groups"
        return Verdict((0, -lost / n), f"NaN or infinite{where}")
    if step == 0:
        return Verdict((5, 0.0), "no step yet")
    causes = _causes(change, kind, rule, closed, dtypes, eps_share)
    if causes:
        state = [] if closed else ["open"] if kind != "norm" else [_grown(change)]
        return Verdict((1, -max(causes.values())), "; ".join([*causes, *filter(None, state)]))
    if not any(part.any() for part in (change.charge - change.initial, change.did, change.residual)):
        return Verdict((5, 0.0), "unchanged")
    if not closed:
        return Verdict((4, 0.0), _grown(change) or "no claim") if kind == "norm" else Verdict((2, 0.0), "open")
    error = held_to(change)
    return Verdict((3, -error), f"holds to {number(max(error, EPSILON), '.0e')}")


def held_to(change: Change) -> float:
    """The largest |residual| relative to the mean size of the groups; 0 where there is none."""
    if not len(change.charge):
        return math.nan
    largest = float(np.abs(change.residual).max())
    return 0.0 if largest == 0.0 else largest / float(change.size.mean())


def _causes(
    change: Change, kind: str, rule: str, closed: bool, dtypes: Collection[str], eps_share: float
) -> Mapping[str, float]:
    """The parts of the change that no law predicts and that count: a sentence, and the part's share; largest first."""
    found: dict[str, float] = {}
    if closed and change.counts(change.defect):
        share = change.share(change.defect)
        found[f"{_driver(change, kind, rule, dtypes, eps_share)}: {percent(share)}"] = share
    if change.counts(change.rounding):
        share = change.share(change.rounding)
        found[_of_rounding(change, dtypes, share)] = share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _driver(change: Change, kind: str, rule: str, dtypes: Collection[str], eps_share: float) -> str:
    """What drives the defect."""
    if rule == "sgd":
        return "eps of a normalisation" if eps_share >= DOMINANT else "the gradient breaks it"
    wide = bool(dtypes) and _WIDE.issuperset(dtypes)
    if rule == "adam" and wide and _reach(change, kind) <= MINOR * np.abs(change.defect).sum():
        return "Adam's preconditioner"
    return "the steps break it"


def _reach(change: Change, kind: str) -> float:
    """How much of the defect the gradients may have made, if all were like the last one; unknown counts as all.

    With one number D for a preconditioner, ⟨θ, u⟩ = ⟨θ, m⟩/D, and |⟨θ, m⟩| is at most c|θ||g|, c the gradient's cosine.
    A step adds 2η|⟨θ, u⟩| by it, and grows by η²|u|², |u| = |m|/D. The quotient is

        2 c |θ|/(η|u|) · |g|/|m|  ≤  10 c / angle

    where |g|/|m| is at most √((1 + β₁)/(1 − β₁)), for gradients that are mere noise: 4.4 for β₁ = .9. Of a rescale the
    growth is a difference, and a translation has none: there only a gradient that is orthogonal counts as known.
    """
    made = 10.0 * change.cosine / change.angle * np.abs(change.growth) if kind == "scale" else np.inf
    of_groups = np.where(change.cosine <= ORTHOGONAL, 0.0, made)
    known = ~np.isnan(of_groups) & (np.abs(change.sq_gradient) > 0.0)  # a gradient of zero says nothing of others
    return float(np.minimum(np.where(known, of_groups, np.inf), np.abs(change.defect)).sum())


def _of_rounding(change: Change, dtypes: Collection[str], share: float) -> str:
    if math.isinf(share):
        return "changed, but not by steps"
    stored = next(iter(dtypes)) if len(dtypes) == 1 else "rounding"
    if share > ALL:
        return f"{stored} moved it {number(share)} times as far as the steps"
    steps = change.decay + change.growth + change.defect
    verb = "lost" if float((change.rounding * steps).sum()) < 0.0 else "added"
    parts = {"decay": change.decay, "growth": change.growth}
    what = next((name for name, part in parts.items() if change.share(part) >= DOMINANT), "change")
    return f"{stored} {verb} {percent(share)} of the {what}"


def _grown(change: Change) -> str:
    """How norms have grown or shrunk, all groups together; "" if that says nothing."""
    before, after = float(change.initial.sum()), float(change.charge.sum())
    if (change.initial < 0.0).any() or (change.charge < 0.0).any() or before == after:
        return ""
    if before == 0.0:
        return "grew from 0"
    grown = after / before - 1.0
    if grown > 1.0:
        return f"grew to {number(1.0 + grown)} times"
    return f"{'grew' if grown > 0.0 else 'shrank'} by {percent(abs(grown))}"


def percent(share: float) -> str:
    """A share for people: 0.003 is "0.3 %", 0.123 is "12 %"."""
    return f"{number(100.0 * share) if share < 0.0995 else f'{100.0 * share:.0f}'} %"


def number(x: float, form: str = ".2g") -> str:
    """A number of a few digits, its exponent without zeros: "2e-6"; "2.0e-6" in the form "#.2g"."""
    mantissa, e, exponent = f"{x:{form}}".partition("e")
    return mantissa.removesuffix(".") + (f"e{int(exponent)}" if e else "")
