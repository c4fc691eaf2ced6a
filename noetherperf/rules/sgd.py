"""Stochastic gradient descent with momentum: torch.optim.SGD's update, and the laws of its charges.

The update is one linear recursion, whatever the options:

    d  = s g + λ p              s = +1, or −1 with maximize
    v' = b v + a d              the momentum buffer
    u  = c_d d + c_v v'         the update
    p' = p − η u

    option                      b    a         c_d   c_v
    momentum β                  β    1 − τ     0     1       (a = 1 at age 0: the buffer is written for the first time)
    with nesterov               β    1 − τ     1     β
    momentum 0                  1    0         1     0       (a buffer left from earlier stays as it is)

Discrete law, an identity of the update itself. x is the charge, y = ⟨v, 1⟩ or ⟨p, v⟩, δ = s⟨g, 1⟩ or s⟨g, p⟩, κ is 1
for a translation's sum and 2 for a norm:

    ŷ  = b y + a (λ x + δ)          m = c_d (λ x + δ) + c_v ŷ
    x' = x − κ η m + [norm] η² |u|²
    y' = ŷ         − [norm] η ⟨u, v'⟩

It splits by source: `free` starts from (x₀, y₀) and has no source, `forced` has |u|² and ⟨u, v'⟩, `defect` has δ. Their
sum is the budget. The state keeps the budget, compensated, and for a norm the defect; forced is the difference.
Forced and defect may grow without bound and cancel, and then their sum is only rounding error. The budget stays as
large as the charge, so charge − budget is the error of storing the parameters, after any number of steps.

Flow law, the continuous-time dynamics, with ẋ the charge's velocity and T the time of one step:

    β = 0   x' = e^{−κλη} (x + [norm] η² |g|²)
    β > 0   (x, ẋ)' = e^{AT} ((x, ẋ) + (0, T f)),   A = [[0, 1], [−ω², −2γ]] (oscillator.py),   f = [norm] 2|u|²/(1−τ)²
            Nesterov: f gains −(4β/(1+β)) s⟨g, u⟩/(1−τ)

A norm with an offset, x = |p + c|² and y = ⟨p + c, v⟩, obeys the same with δ = s⟨g, p + c⟩, and λ(x − c⟨p + c, 1⟩) in
the place of λx, because decay draws p to 0. That source is in `forced`. The defect is c times what ⟨g, 1⟩ drives more
than |p|²'s; f gains ω²c⟨p + c, 1⟩.

Derivations: docs/theory.md, sections 2 (update), 3 (discrete law) and 5 (flow law).

Source: discrete law, Nesterov and schedules: this project. Flow law: Kunin et al. (2021), "Neural Mechanics",
arXiv:2012.04728.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number, exp, times, two_sum
from noetherperf.rules.law import OFFSET, OFFSET_FLOW, Component, Law, Matrix, Recursion, Shape, Step, drawn
from noetherperf.rules.moments import COMMON, Operand, Pair
from noetherperf.rules.motion import CARRIED, Motion
from noetherperf.rules.numbers import lr_in, number_in
from noetherperf.rules.oscillator import oscillators
from noetherperf.rules.rule import Buffers, Rule


@dataclass(frozen=True)
class Hyper:
    """Options of one parameter group in one step, named as in torch.optim.SGD: η, β, τ, λ.

        d = s g + λ θ,   v ← β v + (1 − τ) d,   θ ← θ − η u,   u = v, or d + β v with nesterov, or d where β = 0

    Valid for any values that torch takes; the first step that writes v does not have τ. Time is in units
    of lr · (1 − dampening) · steps: a step takes `duration`.

    Attributes:
        lr: η; NaN if the learning rate is a tensor on a device, which the host does not read.
        momentum: β.
        dampening: τ.
        weight_decay: λ.
        nesterov: As in torch.
        maximize: As in torch.

    Source: Sutskever et al. (2013); docs/theory.md, section 2.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Hyper":
        """The hyperparameters that an optimizer's parameter group holds now.

        Args:
            group: One of `optimizer.param_groups`.

        Returns:
            They, as numbers; a tensor on a device is waited for.

        Raises:
            TypeError, ValueError: One is no number.
        """
        return cls(
            lr_in(group),
            number_in(group, "momentum"),
            number_in(group, "dampening"),
            number_in(group, "weight_decay"),
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )

    @property
    def sign(self) -> float:
        """s: +1 to descend, −1 with maximize."""
        return -1.0 if self.maximize else 1.0

    @property
    def duration(self) -> float:
        """T, the time of one step in units of the learning rate: η(1 − τ) with momentum, η without."""
        return self.lr * (1.0 - self.dampening) if self.momentum != 0.0 else self.lr

    def coefficients(self, age: int = 1) -> "Coefficients":
        """The step's coefficients; at age 0 it writes the momentum buffer for the first time."""
        if self.momentum == 0.0:
            buffer = (1.0, 0.0, 1.0, 0.0)
        else:
            gain = 1.0 if age == 0 else 1.0 - self.dampening
            buffer = (self.momentum, gain, *((1.0, self.momentum) if self.nesterov else (0.0, 1.0)))
        return Coefficients(self.lr, self.weight_decay, self.sign, *buffer)


class Coefficients(NamedTuple):
    """η, λ, s and (b, a, c_d, c_v) of the module's recursion. Mirrored by `Coefficients` in csrc/rules/sgd.h."""

    lr: float
    decay: float
    sign: float
    buffer_decay: float
    buffer_gain: float
    mix_d: float
    mix_v: float


class Variant(IntEnum):
    """Kernels of the update."""

    PLAIN = 0  # no buffer: u = d
    MOMENTUM = 1  # u = v'
    NESTEROV = 2  # u = d + β v'
    IDLE = 3  # momentum 0, but a buffer from earlier steps: u = d, v is only read


DOT_UV = Pair("dot_uv", Operand.U, Operand.V)  # Nesterov, and an idle buffer; zero elsewhere
DOT_GU = Pair("dot_gu", Operand.G, Operand.U)  # Nesterov; zero elsewhere


class SgdRule(Rule[Hyper]):
    """torch.optim.SGD's rule."""

    name = "sgd"
    option_names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    number_options = ("lr", "momentum", "dampening", "weight_decay")
    late_options = (
        ("nesterov", False),
        ("maximize", False),
        ("differentiable", False),
        ("foreach", None),
        ("fused", None),
    )
    buffers = ("momentum_buffer",)
    n_ages = 2
    first_step = "wrote its momentum_buffer for the first time, without dampening"
    coefficients = Coefficients._fields
    moments = (*COMMON, DOT_UV, DOT_GU)
    lr_degree = 2
    idle: ClassVar[Mapping[int, int]] = {Variant.PLAIN: Variant.IDLE}
    laws: ClassVar[Mapping[Law, Shape]] = {
        Law.TRANSLATION: Shape((Component("budget", 2, ("sum_g",), compensated=True, starts=True, jumps=True),)),
        Law.NORM: Shape(
            (
                Component("budget", 2, ("dot_pg", "sq_u", "dot_uv"), compensated=True, starts=True, jumps=True),
                Component("defect", 2, ("dot_pg",), jumps=True),
                Component("flow", 2, ("sq_g", "sq_u", "dot_gu")),
            )
        ),
    }
    offset = (Component(OFFSET, 2, ("sum_g",), jumps=True), Component(OFFSET_FLOW, 2, ("sum_p",)))

    def options(self, group: Mapping[str, Any]) -> Hyper:
        return Hyper.of(group)

    def with_lr(self, options: Hyper, lr: Number) -> Hyper:
        return replace(options, lr=lr)  # type: ignore[arg-type]

    def variant(self, options: Hyper) -> int:
        return Variant.PLAIN if options.momentum == 0.0 else Variant.NESTEROV if options.nesterov else Variant.MOMENTUM

    def n_written(self, options: Hyper) -> int:
        return 0 if options.momentum == 0.0 else 1

    def ages_differ(self, options: Hyper) -> bool:
        return options.momentum != 0.0 and options.dampening != 0.0

    def n_taken(self, options: Hyper, has_buffers: bool) -> int:
        if options.momentum == 0.0:
            return len(COMMON) + has_buffers
        return len(COMMON) + (2 if options.nesterov else 0)

    def duration(self, options: Hyper) -> Number:
        return options.duration

    def coefficients_of(self, options: Hyper, age: int) -> Coefficients:
        return options.coefficients(age)

    def buffer_dtype(self, options: Hyper, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        """That of the first g, or g + λp."""
        return torch.promote_types(p, g) if options.weight_decay != 0.0 else g

    def time_may_fall(self, options: Hyper) -> bool:
        return options.dampening > 1.0 or options.lr < 0.0

    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        """d = s g + λ p, v' = b v + a d, u = c_d d + c_v v', p' = p − η u (docs/theory.md, section 2)."""
        after, u = self.direction(p, g, buffers, c)
        return p - c[0] * u, after, u

    def direction(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Buffers, Tensor]:
        _, decay, sign, buffer_decay, buffer_gain, mix_d, mix_v = c
        (v,) = buffers
        d = g if sign > 0.0 else -g
        if decay != 0.0:
            d = torch.add(d, p, alpha=decay)
        if mix_v == 0.0:
            return (v,), d
        assert v is not None, "a step with momentum needs a buffer"
        v = torch.mul(v, buffer_decay).add_(d, alpha=buffer_gain)
        return (v,), v if mix_d == 0.0 else torch.add(d, v, alpha=mix_v)

    def motion(self, options: Hyper) -> Motion:
        """Without momentum p' = r p − η s g, r = 1 − ηλ, and ⟨p', s g⟩ = r s ⟨p, g⟩ − η |g|². With momentum u = v', and
        the budget's y is ⟨p', v'⟩; with Nesterov u = d + β v', and

            (1 − ηλ) ⟨p', u⟩ = s (⟨p, g⟩ − η ⟨g, u⟩) + λ |p'|² + β y        (1 − ηλ) ⟨u, 1⟩ = s ⟨g, 1⟩ + λ ⟨p', 1⟩ + β y
        """
        lr, beta, decay, sign = options.lr, options.momentum, options.weight_decay, options.sign
        keep = 1.0 - lr * decay
        if beta == 0.0:
            return Motion(keep, lr, "sq_g", {"dot_pg": keep * sign, "sq_g": -lr}, {"sum_g": sign})
        if not options.nesterov:
            return Motion(1.0, lr, "sq_u", {CARRIED: 1.0}, {CARRIED: 1.0})
        share = 1.0 / keep if keep != 0.0 else math.nan
        along = {"dot_pg": sign, "dot_gu": -sign * lr, "sq_p": decay, CARRIED: beta}
        total = {"sum_g": sign, "sum_p": decay, CARRIED: beta}
        return Motion(1.0, lr, "sq_u", *({name: share * x for name, x in of.items()} for of in (along, total)))

    def steps(self, options: Hyper, age: int, laws: Collection[Law]) -> dict[Law, Step]:
        if not laws:
            return {}
        c = options.coefficients(age)
        added, flows = increments(c), flow_laws(laws, options)
        found = {}
        for law in laws:
            free, recursions = _discrete_law(law, c, added)
            flow_free, flow = flows[law]
            if law == Law.NORM:
                recursions["flow"] = flow
                if self.has_offsets:
                    recursions |= {OFFSET: recursions["defect"], OFFSET_FLOW: drawn(flow_free, 2)}
            found[law] = Step({"free": free, "flow_free": flow_free}, recursions)
        return found


#: The rule.
SGD = SgdRule()


class Increments(NamedTuple):
    """What one step adds to a translation's x, each number with what its rounding left out; a norm's is the double."""

    of_x: tuple[Number, Number]  # per x: what x loses by itself
    of_y: tuple[Number, Number]
    of_delta: tuple[Number, Number]  # per ⟨g, 1⟩, the sign s included
    sq_lr: tuple[Number, Number]  # η², what |u|² adds to a norm


def increments(c: Coefficients) -> Increments:
    """What one step with these coefficients adds to x."""
    of_delta = times(two_sum(c.mix_d, c.mix_v * c.buffer_gain), -c.lr * c.sign)
    of_x = times(of_delta, c.sign * c.decay)
    of_y = times(times((c.mix_v, 0.0), c.buffer_decay), -c.lr)
    return Increments(of_x, of_y, of_delta, times((c.lr, 0.0), c.lr))


def discrete_law(law: Law, c: Coefficients) -> tuple[Matrix, dict[str, Recursion]]:
    """The discrete law's matrix, and its components, for one set of coefficients; valid for any λ, η, β, τ.

    Returns:
        M of (x, y)' = M (x, y) without source; and the recursions of "budget" and, for a norm, "defect".
    """
    return _discrete_law(law, c, increments(c))


def _discrete_law(law: Law, c: Coefficients, added: Increments) -> tuple[Matrix, dict[str, Recursion]]:
    yx, yy, y_delta = c.buffer_gain * c.decay, c.buffer_decay, c.buffer_gain * c.sign
    if law == Law.TRANSLATION:
        (xx, xx_rest), (xy, xy_rest), (to_x, to_rest), _ = added
        budget = Recursion(((xx, xy), (yx, yy)), ((to_x,), (y_delta,)), (xx_rest, xy_rest), (to_rest,))
        return ((1.0 + xx, xy), (yx, yy)), {"budget": budget}
    # κ = 2: twice as much, exactly.
    (xx, xx_rest), (xy, xy_rest), (to_x, to_rest) = ((2.0 * x, 2.0 * rest) for x, rest in added[:3])
    (sq_lr, sq_lr_rest), y_uv = added.sq_lr, -c.lr
    # With c_d = 0 the update is the buffer, and ⟨u, v'⟩ is |u|².
    y_sq_u, y_dot_uv = (y_uv, 0.0) if c.mix_d == 0.0 else (0.0, y_uv)
    budget = Recursion(
        ((xx, xy), (yx, yy)),
        ((to_x, sq_lr, 0.0), (y_delta, y_sq_u, y_dot_uv)),
        (xx_rest, xy_rest),
        (to_rest, sq_lr_rest, 0.0),
    )
    free = ((1.0 + xx, xy), (yx, yy))
    return free, {"budget": budget, "defect": Recursion(free, ((to_x,), (y_delta,)))}


def flow_law(law: Law, h: Hyper) -> tuple[Matrix, Recursion]:
    """The flow law's step of time T for options held over that step: its matrix, and what drives a norm.

    With momentum and dampening 1 a step takes no time and its velocity −u/(1−τ) is infinite: the forcing is NaN,
    because the law has no prediction of a norm. All coefficients are NaN if the flow itself does not exist (an infinite
    learning rate, momentum −1) or leaves the range of float64 in one step.
    """
    return flow_laws((law,), h)[law]


def flow_laws(laws: Collection[Law], h: Hyper) -> dict[Law, tuple[Matrix, Recursion]]:
    """`flow_law` of several laws."""
    try:
        if h.momentum == 0.0:
            return {law: _plain_flow(law, h) for law in laws}
        return _flows(laws, h)
    except (ArithmeticError, ValueError):
        if len(laws) > 1:  # one may exist where the other does not
            return {law: flow_law(law, h) for law in laws}
        nothing = ((math.nan,) * 2,) * 2
        return dict.fromkeys(laws, (nothing, Recursion(nothing, ((math.nan,) * 3,) * 2)))


def _plain_flow(law: Law, h: Hyper) -> tuple[Matrix, Recursion]:
    """x' = e^{−κλη} (x + η² |g|²)."""
    decay = exp(-(law + 1.0) * h.weight_decay * h.lr)
    matrix: Matrix = ((decay, 0.0), (0.0, 1.0))
    return matrix, Recursion(matrix, ((decay * (h.lr * h.lr), 0.0, 0.0), (0.0, 0.0, 0.0)))


def modified_flow_law(law: Law, h: Hyper) -> tuple[Matrix, Recursion]:
    """The modified flow law's step of time T: `flow_law`, but with inertia, and driven by |u|², for β = 0 too.

    Its start is that of the steps (`oscillator.free_from_start`).

    Raises:
        ValueError, ArithmeticError: The law does not exist, or leaves the range of float64 in one step.

    Source: this project; docs/theory.md, section 5.
    """
    return _flows((law,), h)[law]


def _flows(laws: Collection[Law], h: Hyper) -> dict[Law, tuple[Matrix, Recursion]]:
    """(x, ẋ)' = e^{AT} ((x, ẋ) + (0, kick))."""
    inertia, duration = 1.0 + h.momentum, h.duration
    extra = h.momentum * h.weight_decay * h.lr if h.nesterov else 0.0
    mu = (1.0 - h.momentum + extra) / inertia
    undamped = 1.0 - h.dampening if h.momentum != 0.0 else 1.0
    kick_u = 2.0 * h.lr / undamped if undamped != 0.0 else math.nan  # of the velocity
    kick_gu = -h.sign * h.lr * 4.0 * h.momentum / inertia if h.nesterov else 0.0
    stiffness = [2.0 * (law + 1.0) * h.weight_decay / inertia for law in laws]  # ω²T
    found: dict[Law, tuple[Matrix, Recursion]] = {}
    for law, k, (xx, s) in zip(laws, stiffness, oscillators(mu, [k * duration for k in stiffness]), strict=True):
        xv, vv = duration * s, xx - 2.0 * mu * s
        matrix = ((xx, xv), (-k * s, vv))
        found[law] = (
            matrix,
            Recursion(matrix, ((0.0, xv * kick_u, xv * kick_gu), (0.0, vv * kick_u, vv * kick_gu))),
        )
    return found
