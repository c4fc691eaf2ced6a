"""How a step moves a group of elements, as far as a rule's moments tell."""

from collections.abc import Mapping
from typing import NamedTuple

#: In `Motion.along` and `Motion.total`, the second number of the norm's or the translation's budget in the place of a
#: moment.
CARRIED = "y"


class Motion(NamedTuple):
    """One step p' = r p − η w of any group of elements; w is the update, or what remains of it if decay is in r.

    Attributes:
        keep: r.
        lr: η.
        square: The moment |w|².
        along: ⟨p', w⟩ as a sum of moments of the step, or CARRIED, each times its coefficient.
        total: ⟨w, 1⟩ likewise.
    """

    keep: float
    lr: float
    square: str
    along: Mapping[str, float]
    total: Mapping[str, float]


#: Of a tensor that took no part in the step, and of one whose step is not known.
STILL = Motion(1.0, 0.0, "sq_u", {}, {})
UNKNOWN = Motion(float("nan"), float("nan"), "sq_u", {}, {})


def decoupled(keep: float, lr: float) -> Motion:
    """p' = r p − η u with the update u itself: ⟨p', u⟩ = r ⟨p, u⟩ − η |u|²."""
    return Motion(keep, lr, "sq_u", {"dot_pu": keep, "sq_u": -lr}, {"sum_u": 1.0})
