"""A step that another optimizer has made: its update, taken from outside, and the laws of its charges.

A step of this rule moves a copy p of a parameter to the parameter itself, which the other optimizer has stepped. The
copy's one buffer is that parameter, v. It is read and not written:

    p' = v         u = (p − v)/η − λ p         so that p' = r p − η u,   r = 1 − ηλ

λ is a decay that the optimizer is known to apply to the parameter alone, otherwise 0. η is its learning rate. Where
that is 0, η counts as 1 in u, which is then the displacement.

The laws are those of rules/carry.py. b is the share of u that the next step carries over:

    a decaying sum of gradients (SGD, RMSprop with momentum)      b = β
    the same with bias correction (Adam)                          b = β c_k/c_{k+1},   c_k = 1 − β^k after k steps
    without memory                                                b = 0

The gradient is in the moments and in no law. u is made of stored numbers, so that the budget's identity holds whatever
the optimizer does: charge − budget is the rounding of the sums alone.

Derived in docs/theory.md, section 8.

Source: this project.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number, choose
from noetherperf.rules.carry import DOT_PU, LAWS, OFFSETS, SUM_U, Carry, step_of
from noetherperf.rules.law import Law, Shape, Step, is_zero
from noetherperf.rules.moments import COMMON
from noetherperf.rules.motion import Motion, decoupled
from noetherperf.rules.numbers import lr_in, number_in
from noetherperf.rules.rule import Buffers, Rule


@dataclass(frozen=True)
class GivenOptions:
    """What is known of the steps of one parameter group: η, λ, b.

    Attributes:
        lr: η; NaN if the learning rate is a tensor on a device, which the host does not read.
        decay: λ, of the parameter alone.
        carry: β.
        corrected: Whether u has Adam's bias correction.
        reason: Why the law is open; empty if it is not.
    """

    lr: float
    decay: float = 0.0
    carry: float = 0.0
    corrected: bool = False
    reason: str = ""

    @property
    def unit(self) -> Number:
        """η of the laws: 1 where the learning rate is 0."""
        (unit,) = choose(self.lr != 0.0, lambda: (self.lr,), lambda: (1.0,))
        return unit  # type: ignore[no-any-return]

    @property
    def moves(self) -> Number:
        """1, and 0 where the learning rate is 0."""
        return self.lr / self.unit

    @property
    def keep(self) -> Number:
        """r."""
        return 1.0 - self.lr * self.decay if self.decay != 0.0 else 1.0

    def correction(self, n_steps: Number) -> Number:
        """c, the bias correction after so many steps."""
        return 1.0 - self.carry**n_steps if self.corrected else 1.0


class Coefficients(NamedTuple):
    """Of u; where the learning rate is 0, 1 and 0. Mirrored by `Coefficients` in csrc/rules/given.h."""

    per_lr: Number  # 1/η
    decay: Number  # λ


class GivenRule(Rule[GivenOptions]):
    """The rule of a step that another optimizer has made."""

    name = "given"
    option_names = ("lr", "decay", "carry", "corrected", "reason")
    number_options = ("lr", "decay", "carry")
    late_options = ()
    buffers = ("live",)
    n_ages = 0
    step_key = "step"
    coefficients = Coefficients._fields
    moments = (*COMMON, DOT_PU, SUM_U)
    lr_degree = None
    idle: ClassVar[Mapping[int, int]] = {}
    laws: ClassVar[Mapping[Law, Shape]] = LAWS
    offset = OFFSETS

    def options(self, group: Mapping[str, Any]) -> GivenOptions:
        return GivenOptions(
            lr_in(group),
            number_in(group, "decay"),
            number_in(group, "carry"),
            bool(group["corrected"]),
            str(group["reason"]),
        )

    def with_lr(self, options: GivenOptions, lr: Number) -> GivenOptions:
        return replace(options, lr=lr)  # type: ignore[arg-type]

    def variant(self, options: GivenOptions) -> int:
        return 0

    def n_written(self, options: GivenOptions) -> int:
        return 0

    def ages(self, options: GivenOptions) -> bool:
        return True

    def ages_differ(self, options: GivenOptions) -> bool:
        return options.corrected and options.carry != 0.0

    def n_taken(self, options: GivenOptions, has_buffers: bool) -> int:
        return len(self.moments)

    def duration(self, options: GivenOptions) -> Number:
        return options.lr

    def coefficients_of(self, options: GivenOptions, age: int) -> Coefficients:
        return Coefficients(1.0 / options.unit, options.decay * options.moves)

    def buffer_dtype(self, options: GivenOptions, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        return p

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        """p' = v, u = (p − v)/η − λ p. The difference comes first: it is exact where p and v are close."""
        per_lr, decay = c
        (v,) = buffers
        assert v is not None, "a step needs the parameter that another optimizer has stepped"
        u = (p - v).mul_(per_lr)
        return v, buffers, u if is_zero(decay) else u.sub_(p * decay)

    def carried(self, buffers: Buffers, options: GivenOptions, age: int) -> Tensor | None:
        """None: what is carried is in the other optimizer's buffers, of which this rule knows nothing."""
        return None

    def motion(self, options: GivenOptions) -> Motion:
        return decoupled(float(options.keep), float(options.unit))

    def open_reason(self, options: GivenOptions, law: Law) -> str:
        return options.reason

    def steps(self, options: GivenOptions, age: int, laws: Collection[Law]) -> dict[Law, Step]:
        kept, after, moves = options.correction(age + 1), options.correction(age + 2), options.moves
        next_share = options.carry * kept / after if options.carry != 1.0 else math.nan  # all is carried: no flow law
        carry = Carry(options.carry / kept, kept, next_share, moves)
        numbers = options.unit, options.keep, options.decay * moves, carry
        return {law: step_of(law, *numbers, offsets=self.has_offsets) for law in laws}


#: The rule.
GIVEN = GivenRule()
