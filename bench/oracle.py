"""SGD's step, moments and laws as its rule has them: engines are tested against these in float64."""

import torch
from torch import Tensor

from noetherperf.measure.plan import View
from noetherperf.rules import law as laws
from noetherperf.rules.law import Law
from noetherperf.rules.moments import Operand, take
from noetherperf.rules.sgd import SGD, Coefficients, Hyper

__all__ = ["advance", "moments", "step"]


def step(p: Tensor, g: Tensor, v: Tensor | None, c: Coefficients) -> tuple[Tensor, Tensor | None, Tensor]:
    """p', v' and u."""
    p_new, (v_new,), u = SGD.update(p, g, (v,), c)
    return p_new, v_new, u


def moments(view: View, hyper: Hyper, stored: Tensor, p: Tensor, g: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
    """The moments of a view's segments, zeros where a step takes none, [n moments, n_segments]."""
    operands = {Operand.P_NEW: stored, Operand.P: p, Operand.G: g, Operand.U: u}
    if v is not None:
        operands[Operand.V] = v
    taken = take(view.grouped, SGD.moments[: SGD.n_taken(hyper, v is not None)], operands)
    return torch.cat([taken, taken.new_zeros(len(SGD.moments) - len(taken), taken.shape[1])])


def advance(law: Law, state: Tensor, sums: Tensor, hyper: Hyper, age: int) -> None:
    """Advance a law's state by a step with these moments."""
    by_name = dict(zip(SGD.moment_rows, sums, strict=True))
    laws.advance(SGD.laws[law], SGD.steps(hyper, age, (law,))[law], state, by_name)
