"""Adam and AdamW: the update of torch.optim.Adam and torch.optim.AdamW, and the laws of their charges.

The update of a tensor that has made k steps; s = −1 with maximize and +1 otherwise:

    decoupled decay (AdamW)   r = 1 − ηλ   d = s g
    coupled decay (Adam)      r = 1        d = s g + λ p

    m' = β₁ m + (1 − β₁) d       c = 1 − β₁^{k+1}                 exp_avg
    n' = β₂ n + (1 − β₂) d²      e = 1 − β₂^{k+1}                 exp_avg_sq
    D  = √n'/√e + ε              with amsgrad the largest n' so far in the place of n'
    u  = m'/(c D)                p' = r p − η u

Laws: those of rules/carry.py. Where D is one number in the group, the same in both steps, m carries ⟨p, u⟩ and ⟨u, 1⟩
from one step to the next, and no more comes in. y is the carried ⟨p', m'/D⟩ or ⟨m'/D, 1⟩ after a step, and the next
step with its own β₁ and c expects w = (β₁/c) y. y has neither in it, so that β₁ may follow a schedule.

`defect` is what the preconditioner lets in, because it is not one number in the group and changes from step to step,
and what breaks the symmetry. Coupled decay goes through the preconditioner, and is in the defect too: r = 1, and λ = 0
in the flow law. There, b = β₁ (1 − β₁^{k+1})/(1 − β₁^{k+2}).

Source: Kingma & Ba (2015), arXiv:1412.6980; Loshchilov & Hutter (2019), arXiv:1711.05101; Reddi et al. (2018),
arXiv:1904.09237 (amsgrad). Laws: this project; docs/theory.md, section 8.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number
from noetherperf.rules.carry import DOT_PU, LAWS, OFFSETS, SUM_U, Carry, carried_numbers, step_of
from noetherperf.rules.law import Law, Shape, Step
from noetherperf.rules.moments import COMMON
from noetherperf.rules.motion import Motion, decoupled
from noetherperf.rules.numbers import betas_in, lr_in, number_in
from noetherperf.rules.rule import Buffers, Rule


@dataclass(frozen=True)
class AdamOptions:
    """Options of one parameter group in one step, named as in torch.optim.Adam: η, β₁, β₂, ε, λ.

    Attributes:
        lr: η; NaN if the learning rate is a tensor on a device, which the host does not read.
        beta1, beta2: β₁, β₂. Like η, they may be float64 tensors of no dimensions, and rows are then computed where
            these are.
        eps, weight_decay: ε, λ.
        amsgrad, maximize: As in torch.
        decoupled: Whether weight decay acts on the parameter alone, as in AdamW.
    """

    lr: float
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "AdamOptions":
        """The options that an optimizer's parameter group holds now; of betas on a device, the host waits for it.

        Raises:
            TypeError, ValueError: One is no number; a beta is not in [0, 1).
        """
        beta1, beta2 = betas_in(group)
        return cls(
            lr_in(group),
            beta1,
            beta2,
            number_in(group, "eps"),
            number_in(group, "weight_decay"),
            bool(group["amsgrad"]),
            bool(group["maximize"]),
            bool(group["decoupled_weight_decay"]),
        )

    @property
    def flow_decay(self) -> float:
        """λ of the laws: coupled decay is none."""
        return self.weight_decay if self.decoupled else 0.0

    @property
    def keep(self) -> float:
        """r."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled and self.weight_decay != 0.0 else 1.0

    def correction(self, n_steps: Number) -> Number:
        """c, the first moment's bias correction after so many steps."""
        return 1.0 - self.beta1**n_steps

    def sq_correction(self, n_steps: Number) -> Number:
        """e, the second moment's."""
        return 1.0 - self.beta2**n_steps


class Coefficients(NamedTuple):
    """η, r, λ of d, s, β₁, β₂, ε, c, √e, and whether amsgrad is on (1 or 0)."""

    lr: Number
    keep: Number
    decay: float
    sign: float
    beta1: Number
    beta2: Number
    eps: float
    correction: Number
    root_sq_correction: Number
    amsgrad: float


class Variant(IntEnum):
    """Kernels of the update."""

    PLAIN = 0
    AMSGRAD = 1  # the largest n' so far in the place of n'


class AdamRule(Rule[AdamOptions]):
    """The rule of torch.optim.Adam and torch.optim.AdamW."""

    name = "adam"
    option_names = (
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "maximize",
        "decoupled_weight_decay",
    )
    number_options = ("lr", "eps", "weight_decay")
    pair_options = ("betas",)
    late_options = (
        ("amsgrad", False),
        ("maximize", False),
        ("foreach", None),
        ("capturable", False),
        ("differentiable", False),
        ("decoupled_weight_decay", False),
        ("fused", None),
    )
    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    late_buffers = ("max_exp_avg_sq",)
    n_ages = 0
    step_key = "step"
    coefficients = Coefficients._fields
    moments = (*COMMON, DOT_PU, SUM_U)
    lr_degree = 1
    idle: ClassVar[Mapping[int, int]] = {}
    laws: ClassVar[Mapping[Law, Shape]] = LAWS
    offset = OFFSETS

    def options(self, group: Mapping[str, Any]) -> AdamOptions:
        return AdamOptions.of(group)

    def with_lr(self, options: AdamOptions, lr: Number) -> AdamOptions:
        return replace(options, lr=lr)  # type: ignore[arg-type]

    def variant(self, options: AdamOptions) -> int:
        return Variant.AMSGRAD if options.amsgrad else Variant.PLAIN

    def n_written(self, options: AdamOptions) -> int:
        return 3 if options.amsgrad else 2

    def ages_differ(self, options: AdamOptions) -> bool:
        return any(isinstance(beta, Tensor) or beta != 0.0 for beta in (options.beta1, options.beta2))

    def n_taken(self, options: AdamOptions, has_buffers: bool) -> int:
        return len(self.moments)

    def duration(self, options: AdamOptions) -> Number:
        return options.lr

    def coefficients_of(self, options: AdamOptions, age: int) -> Coefficients:
        return Coefficients(
            options.lr,
            options.keep,
            0.0 if options.decoupled else options.weight_decay,
            -1.0 if options.maximize else 1.0,
            options.beta1,
            options.beta2,
            options.eps,
            options.correction(age + 1),
            options.sq_correction(age + 1) ** 0.5,
            float(options.amsgrad),
        )

    def open_reason(self, options: AdamOptions, law: Law) -> str:
        if options.weight_decay == 0.0 or options.decoupled:
            return ""
        return (
            f"the weight decay ({options.weight_decay:g}) is added to the gradient and divided with it, which no law "
            "predicts; that of AdamW (decoupled_weight_decay=True) has a law"
        )

    def buffer_dtype(self, options: AdamOptions, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        return p

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        """The module's update, in torch's order of operations."""
        x: Any = Coefficients(*c)
        after, mean, denominator = self._divided(p, g, buffers, x)
        kept = p if x.keep == 1.0 else p * x.keep
        p_new = torch.addcdiv(kept, mean, denominator, value=-(x.lr / x.correction))
        return p_new, after, (mean / denominator).div_(x.correction)

    def direction(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Buffers, Tensor]:
        x: Any = Coefficients(*c)
        after, mean, denominator = self._divided(p, g, buffers, x)
        return after, (mean / denominator).div_(x.correction)

    def _divided(self, p: Tensor, g: Tensor, buffers: Buffers, c: Any) -> tuple[Buffers, Tensor, Tensor]:
        """buffers', m', and D."""
        mean, mean_sq, largest = buffers
        assert mean is not None, "a step needs exp_avg"
        assert mean_sq is not None, "a step needs exp_avg_sq"
        d = g if c.sign > 0.0 else -g
        if c.decay != 0.0:
            d = d.add(p, alpha=c.decay)
        mean = torch.lerp(mean, d, 1.0 - c.beta1)
        mean_sq = mean_sq.mul(c.beta2).addcmul_(d, d, value=1.0 - c.beta2)
        if c.amsgrad:
            assert largest is not None, "a step with amsgrad needs max_exp_avg_sq"
            largest = torch.maximum(largest, mean_sq)
        scale = largest if c.amsgrad and largest is not None else mean_sq
        denominator = scale.sqrt().div_(c.root_sq_correction).add_(c.eps)
        return (mean, mean_sq, largest), mean, denominator

    def carried(self, buffers: Buffers, options: AdamOptions, age: int) -> Tensor | None:
        """m/D, of which the next step's update has the share β₁/c."""
        mean, mean_sq, largest = buffers
        if mean is None or mean_sq is None or age == 0:
            return None
        scale = largest if options.amsgrad and largest is not None else mean_sq
        dtype = torch.promote_types(mean.dtype, torch.float32)
        # In place, since new memory costs more than the arithmetic.
        found = scale.to(dtype).sqrt().div_(options.sq_correction(age) ** 0.5).add_(options.eps)
        torch.div(mean.to(dtype), found, out=found)
        # An element that never had a gradient carries nothing, also where ε = 0.
        return found.masked_fill_(mean == 0.0, 0.0).to(mean.dtype)

    def motion(self, options: AdamOptions) -> Motion:
        return decoupled(options.keep, options.lr)

    def steps(self, options: AdamOptions, age: int, laws: Collection[Law]) -> dict[Law, Step]:
        numbers = options.lr, options.keep, options.flow_decay, _carry(options, age)
        return {law: step_of(law, *numbers, offsets=self.has_offsets) for law in laws}

    def row_of_age(self, options: AdamOptions, laws: Collection[Law]) -> Callable[[int], list[Number]]:
        fixed, starts = self.row(options, 0, laws), [(law, self.law_numbers[law]) for law in laws]
        offsets = self.has_offsets

        def row(age: int) -> list[Number]:
            numbers = fixed.copy()
            numbers[_CORRECTION] = options.correction(age + 1)
            numbers[_ROOT] = options.sq_correction(age + 1) ** 0.5
            carry = _carry(options, age)
            for law, start in starts:
                for at, x in carried_numbers(law, options.lr, options.keep, carry, offsets=offsets):
                    numbers[start + at] = x
            return numbers

        return row


_CORRECTION, _ROOT = map(Coefficients._fields.index, ("correction", "root_sq_correction"))


def _carry(options: AdamOptions, age: int) -> Carry:
    """What a step of tensors of an age carries over."""
    kept, after = options.correction(age + 1), options.correction(age + 2)
    return Carry(options.beta1 / kept, kept, options.beta1 * kept / after)


#: The rule.
ADAM = AdamRule()
