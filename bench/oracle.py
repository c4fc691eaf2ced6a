"""A rule's step, its moments and laws, as the rule itself has them: engines are tested against these in float64."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherperf.measure.plan import View
from noetherperf.rules import law as laws
from noetherperf.rules.law import Law
from noetherperf.rules.moments import Operand, take
from noetherperf.rules.rule import Buffers, Rule

__all__ = ["Stepped", "advance", "moments", "operands", "step"]


class Stepped(NamedTuple):
    """p', the buffers after the step, and u; or a number for each element of them, such as its error."""

    p: Tensor
    buffers: Buffers
    u: Tensor


def step(rule: Rule[Any], p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> Stepped:
    """A step with coefficients c."""
    return Stepped(*rule.update(p, g, buffers, c))


def operands(stored: Tensor, p: Tensor, g: Tensor, after: Stepped) -> dict[Operand, Tensor]:
    """The factors of a step's moments; stored: p' as an engine has stored it."""
    found = {Operand.P_NEW: stored, Operand.P: p, Operand.G: g, Operand.U: after.u}
    if after.buffers and (v := after.buffers[0]) is not None:
        found[Operand.V] = v
    return found


def moments(rule: Rule[Any], options: Any, view: View, factors: Mapping[Operand, Tensor]) -> Tensor:
    """The moments of a view's segments, zeros where a step takes none, [n moments, n_segments]."""
    taken = take(view.grouped, rule.moments[: rule.n_taken(options, Operand.V in factors)], factors)
    return torch.cat([taken, taken.new_zeros(len(rule.moments) - len(taken), taken.shape[1])])


def advance(rule: Rule[Any], law: Law, state: Tensor, sums: Tensor, options: Any, age: int) -> None:
    """Advance a law's state by a step with these moments."""
    by_name = dict(zip(rule.moment_rows, sums, strict=True))
    laws.advance(rule.laws[law], rule.steps(options, age, (law,))[law], state, by_name)
