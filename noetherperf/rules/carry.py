"""The laws of a step with decoupled decay, p' = r p − η u, whose update carries a share of itself into the next one.

Budget, an identity of the step, for any u and any group of elements:

    norm          x' = r² x − 2ηr ⟨p, u⟩ + η² |u|²
    translation   x' = r x − η ⟨u, 1⟩

Law: where u is a decaying sum of gradients, ⟨p, u⟩ and ⟨u, 1⟩ are what the step before has left in the buffer, because
gradients add nothing to them where the symmetry holds. w is what is left, y what is kept of it from step to step:

    w = a y
    norm          x' = r² x − 2ηr w + η² |u|²        y' = c (r w − η |u|²)
    translation   x' = r x − η w                     y' = c w

a is the step's share of y, and c turns its u into what is kept; for a plain momentum a is β, and c is 1. `free` starts
from (x₀, y₀) without |u|², `forced` from zero with it. The rest of the budget is `defect`: what breaks the symmetry,
and what the buffer does not carry as the law says.

A split that assumes nothing of u: with R the product of all r (of all r², for a norm),

    charge = R x₀ + growth + transport + rounding

    growth      r² growth + η² |u|²                         of a norm; a translation has none
    transport   r² transport − 2ηr ⟨p, u⟩, or r transport − η ⟨u, 1⟩: the rest of the budget

R is the first entry of the product of `free`'s matrices, since they are upper triangular.

Flow law, the overdamped limit, with b the share of u that the next step carries:

    norm          x' = e^{−2λη} x + η² |u|² (1 + b)/(1 − b)
    translation   x' = e^{−λη} x                                λ = (1 − r)/η

It leaves out y₀, and takes w as settled while the buffer still fills, which adds 2bη²|u|²/(1 − b)² too much in all.

A norm with an offset, x = |p + c|² and w for ⟨p + c, u⟩, gains what decay does, because it draws p to 0. In `forced`

    x' gains 2(1 − r) c⟨p', 1⟩ + (1 − r²) c²n        y' gains c_k (1 − r) c⟨u, 1⟩        (c_k: the c of above)
    flow: x' gains (1 − e^{−2λη}) c⟨p' + c, 1⟩

Derived in docs/theory.md, section 8.

Source: this project.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from noetherperf.rules.arithmetic import Number, exp, times, two_sum
from noetherperf.rules.law import OFFSET, OFFSET_FLOW, Component, Law, Matrix, Recursion, Shape, Step, drawn
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
            Component("growth", 1, ("sq_u",)),
            Component("flow", 1, ("sq_u",)),
        )
    ),
}

#: What a norm's law has besides, where some norm counts from an offset.
OFFSETS = (Component(OFFSET, 2, ("sum_p", "sum_u")), Component(OFFSET_FLOW, 1, ("sum_p",)))


class Carry(NamedTuple):
    """What a step carries over.

    Attributes:
        share: a.
        kept: c.
        next: b; not 1.
        moves: 1; 0 in a step with the learning rate 0, in which w moves no parameter.
    """

    share: Number
    kept: Number
    next: Number
    moves: Number = 1.0


#: Where a step has the numbers that `_carried` gives, as arguments of `Shape.place`.
_PLACES: Mapping[Law, tuple[tuple[tuple[str, int, int], ...], ...]] = {
    Law.TRANSLATION: ((("free", 0, 1),), (("free", 1, 1),)),
    Law.NORM: (
        (("free", 0, 1), ("forced", 0, 1)),
        (("free", 1, 1), ("forced", 1, 1)),
        (("forced", 1, 2),),
        (("flow", 0, 1),),
    ),
}
_OFFSET_PLACES = ((OFFSET, 0, 1), (OFFSET, 1, 1), (OFFSET, 1, 3))  # of w's share, and of ⟨u, 1⟩ in y'


def _carried(law: Law, lr: Number, keep: Number, carry: Carry) -> tuple[Number, ...]:
    """The numbers of a step that depend on what it carries: w's share in x' and y', and for a norm that of |u|² in
    y', and in x' of the flow law."""
    share, kept, next_share, moves = carry
    if law == Law.TRANSLATION:
        return -lr * moves * share, kept * share
    grown = lr * lr * ((1.0 + next_share) / (1.0 - next_share))
    return keep * (-2.0 * lr) * moves * share, keep * kept * share, -lr * kept, grown


def carried_numbers(
    law: Law, lr: Number, keep: Number, carry: Carry, *, offsets: bool = False
) -> list[tuple[int, Number]]:
    """The numbers of `step_of` that depend on what the step carries, each with its place in `Step.numbers`."""
    values = _carried(law, lr, keep, carry)
    found = [(at, x) for places, x in zip(_AT[law], values, strict=True) for at in places]
    if offsets and law == Law.NORM:
        found += zip(_OFFSETS_AT, (*values[:2], carry.kept * (1.0 - keep)), strict=True)
    return found


_AT = {law: [[LAWS[law].place(*x) for x in places] for places in of_law] for law, of_law in _PLACES.items()}
_OFFSETS_AT = [Shape((*LAWS[Law.NORM].components, *OFFSETS)).place(*x) for x in _OFFSET_PLACES]


def step_of(law: Law, lr: Number, keep: Number, decay: Number, carry: Carry, *, offsets: bool = False) -> Step:
    """One step of a law.

    Args:
        law: Which.
        lr: η.
        keep: r.
        decay: λ, of the flow law.
        carry: What the step carries over.
        offsets: Whether norms may count from an offset.
    """
    carried = _carried(law, lr, keep, carry)
    flow_free = _flow_decay(law, lr, decay)
    flow = ((flow_free, 0.0), (0.0, 1.0))
    if law == Law.TRANSLATION:
        lost, lost_rest = two_sum(keep, -1.0)  # type: ignore[type-var]
        budget = Recursion(((lost,),), ((-lr,),), (lost_rest,), (0.0,))
        of_x, of_y = carried
        free: Matrix = ((keep, of_x), (0.0, of_y))
        return Step({"free": free, "flow_free": flow}, {"budget": budget})
    sq_keep, sq_keep_rest = times((keep, 0.0), keep)
    lost, lost_rest = two_sum(sq_keep, -1.0)  # type: ignore[type-var]
    of_pu, of_pu_rest = times((keep, 0.0), -2.0 * lr)
    sq_lr, sq_lr_rest = times((lr, 0.0), lr)
    of_x, of_y, of_sq_u, grown = carried
    free = ((sq_keep, of_x), (0.0, of_y))
    recursions = {
        "budget": Recursion(((lost,),), ((of_pu, sq_lr),), (lost_rest + sq_keep_rest,), (of_pu_rest, sq_lr_rest)),
        "forced": Recursion(free, ((sq_lr,), (of_sq_u,))),
        "growth": Recursion(((sq_keep,),), ((sq_lr,),)),
        "flow": Recursion(((flow_free,),), ((grown,),)),
    }
    if offsets:
        drawn_to_0 = 1.0 - keep
        recursions[OFFSET] = Recursion(free, ((2.0 * drawn_to_0, 0.0), (0.0, carry.kept * drawn_to_0)))
        recursions[OFFSET_FLOW] = drawn(flow, 1)
    return Step({"free": free, "flow_free": flow}, recursions)


def _flow_decay(law: Law, lr: Number, decay: Number) -> Number:
    """e^{−κλη}; NaN if it leaves the range of float64."""
    try:
        return exp(-(law + 1.0) * decay * lr)
    except OverflowError:
        return math.nan
