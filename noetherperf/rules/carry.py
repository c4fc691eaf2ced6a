"""The laws of a step with decoupled decay, p' = r p − η u, whose update carries a share of itself into the next one.

Budget, an identity of the step, for any u and any group of elements:

    norm          x' = r² x − 2ηr ⟨p, u⟩ + η² |u|²
    translation   x' = r x − η ⟨u, 1⟩

Law: where u is a decaying sum of gradients, ⟨p, u⟩ and ⟨u, 1⟩ are what the step before has left in the buffer, because
gradients add nothing to them where the symmetry holds. w is what is left, y what is kept of it from step to step:

    w = a y + λ_c x
    norm          x' = r² x − 2ηr w + η² |u|²        y' = c (r w − η |u|²)
    translation   x' = r x − η w                     y' = c w

a is the next step's share of y, c what turns a step's u into y (1 where y is of u itself), and λ_c weight decay that
goes into the buffer with the gradient. `free` starts from (x₀, y₀) without |u|², `forced` from zero with it. The rest
of the budget is `defect`: a broken symmetry, or a buffer that does not carry as the law says.

Flow law, the overdamped limit, with b the share of u that the next step carries:

    norm          x' = e^{−2λη} x + η² |u|² (1 + b)/(1 − b)
    translation   x' = e^{−λη} x                                λ = (1 − r)/η + λ_c/(1 − b)

Source: this project.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from noetherperf.rules.arithmetic import Number, exp, times, two_sum
from noetherperf.rules.law import Component, Law, Matrix, Recursion, Shape, Step
from noetherperf.rules.moments import Operand, Pair

DOT_PU = Pair("dot_pu", Operand.P, Operand.U)
SUM_U = Pair("sum_u", Operand.U, Operand.ONE)

#: The shapes of these laws; they are driven by DOT_PU, SUM_U and the common moment sq_u.
LAWS: Mapping[Law, Shape] = {
    Law.TRANSLATION: Shape((Component("budget", 1, ("sum_u",), compensated=True, starts=True, jumps=True),)),
    Law.NORM: Shape(
        (
            Component("budget", 1, ("dot_pu", "sq_u"), compensated=True, starts=True, jumps=True),
            Component("forced", 2, ("sq_u",)),
            Component("flow", 1, ("sq_u",)),
        )
    ),
}


class Carry(NamedTuple):
    """What a step carries over.

    Fields:
        share: a, the step's share of y.
        kept: c, what turns u into y.
        next: b, the share of u that the next step carries.
        coupled: λ_c, weight decay that goes into the buffer.
        moves: 1; 0 in a step with the learning rate 0, in which w stays in the buffer and moves no parameter.
    """

    share: float
    kept: float
    next: float
    coupled: float = 0.0
    moves: Number = 1.0


def step_of(law: Law, lr: Number, keep: Number, decay: Number, carry: Carry) -> Step:
    """One step of a law.

    Args:
        law: Which.
        lr: η.
        keep: r.
        decay: λ of the decoupled decay, (1 − r)/η.
        carry: What the step carries over.
    """
    share, kept, next_share, coupled, moves = carry
    flow_free = _flow_decay(law, lr, decay, carry)
    flow = ((flow_free, 0.0), (0.0, 1.0))
    if law == Law.TRANSLATION:
        lost, lost_rest = two_sum(keep, -1.0)  # type: ignore[type-var]
        budget = Recursion(((lost,),), ((-lr,),), (lost_rest,), (0.0,))
        of_w: Number = -lr * moves
        free: Matrix = ((keep + of_w * coupled, of_w * share), (kept * coupled, kept * share))
        return Step({"free": free, "flow_free": flow}, {"budget": budget})
    sq_keep, sq_keep_rest = times((keep, 0.0), keep)
    lost, lost_rest = two_sum(sq_keep, -1.0)  # type: ignore[type-var]
    of_pu, of_pu_rest = times((keep, 0.0), -2.0 * lr)
    sq_lr, sq_lr_rest = times((lr, 0.0), lr)
    of_w, left = of_pu * moves, kept * keep
    free = ((sq_keep + of_w * coupled, of_w * share), (left * coupled, left * share))
    grown = sq_lr * ((1.0 + next_share) / (1.0 - next_share)) if next_share != 1.0 else math.nan
    recursions = {
        "budget": Recursion(((lost,),), ((of_pu, sq_lr),), (lost_rest + sq_keep_rest,), (of_pu_rest, sq_lr_rest)),
        "forced": Recursion(free, ((sq_lr,), (-lr * kept,))),
        "flow": Recursion(((flow_free,),), ((grown,),)),
    }
    return Step({"free": free, "flow_free": flow}, recursions)


def _flow_decay(law: Law, lr: Number, decay: Number, carry: Carry) -> Number:
    """e^{−κλη}; NaN if it leaves the range of float64, or if all is carried over."""
    if carry.next == 1.0 and carry.coupled != 0.0:
        return math.nan
    total = decay + (carry.moves * (carry.coupled / (1.0 - carry.next)) if carry.coupled != 0.0 else 0.0)
    try:
        return exp(-(law + 1.0) * total * lr)
    except OverflowError:
        return math.nan
