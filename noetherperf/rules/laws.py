"""The discrete and the flow law: how a segment's two numbers move in one step, and closed forms.

Both laws are linear recursions of two float64 numbers per segment, driven by the step's moments. κ is 1 for a
translation's sum ⟨p, 1⟩ and 2 for a norm |p|². Coefficients (b, a, c_d, c_v) are those of noetherperf.rules.hyper.

Discrete law, an identity of the update itself. x is the charge, y = ⟨v, 1⟩ or ⟨p, v⟩, δ = s⟨g, 1⟩ or s⟨g, p⟩:

    ŷ  = b y + a (λ x + δ)          m = c_d (λ x + δ) + c_v ŷ
    x' = x − κ η m + [norm] η² |u|²
    y' = ŷ         − [norm] η ⟨u, v'⟩

It splits by source: `free` starts from (x₀, y₀) and has none, `forced` has |u|² and ⟨u, v'⟩, `defect` has δ. Their
sum is the budget. Kept are the budget itself and, of a norm, the defect; forced is the rest. For forced and defect may
grow without bound and cancel, and then their sum is their rounding, while the budget stays as large as the charge. Its
x, and the coefficients of what a step adds to x, are each kept as a rounded number and what its rounding left out:
charge − budget is what storing the parameters lost, after however many steps.

Flow law, the continuous-time dynamics, with ẋ the charge's velocity and T the time of one step:

    β = 0   x' = e^{−κλη} (x + [norm] η² |g|²)
    β > 0   (x, ẋ)' = e^{AT} ((x, ẋ) + (0, T f)),   A = [[0, 1], [−ω², −2γ]]
            γ = (1−β)/(T(1+β)),   ω² = 2κλ/(T(1+β)),   f = [norm] 2|u|²/(1−τ)²
            Nesterov: γ = (1−β+βλη)/(T(1+β)),   f gains −(4β/(1+β)) s⟨g, u⟩/(1−τ)

The free part of a segment is the propagator (the product of all steps' matrices) times its initial state, so it is
kept once per tensor. What is kept per segment are the rows of `State`.

Derivations: docs/theory.md, sections 3 (discrete) and 5 (flow).

Source: discrete law, Nesterov and schedules: this project. Flow law: Kunin et al. (2021),
"Neural Mechanics", arXiv:2012.04728.
"""

import cmath
import math
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from noetherperf.rules.hyper import Coefficients, Hyper
from noetherperf.rules.moments import Moment

T = TypeVar("T", float, Tensor)


class Law(IntEnum):
    """Which quantity a law is about; κ = law + 1."""

    TRANSLATION = 0
    NORM = 1


class State(IntEnum):
    """Rows of a law's state [n rows, n segments]; a translation has no source but δ and keeps the first five."""

    X0 = 0
    Y0 = 1
    X = 2  # the budget's, which is X + X_REST
    X_REST = 3
    Y = 4
    DEFECT_X = 5
    DEFECT_Y = 6
    FLOW_X = 7
    FLOW_V = 8


#: Rows kept per law.
N_STATE = {Law.TRANSLATION: 5, Law.NORM: 9}


class Transition(NamedTuple):
    """One step of the discrete law: (x, y)' = M (x, y) + δ-source + forcing. Mirrored in csrc/laws.h."""

    xx: float
    xy: float
    yx: float
    yy: float
    x_delta: float  # of ⟨g, 1⟩ or ⟨g, p⟩, the sign s included
    y_delta: float
    x_sq_u: float  # η², norms only
    y_sq_u: float  # −η where u = v', so that ⟨u, v'⟩ = |u|², norms only
    y_dot_uv: float  # −η elsewhere, norms only
    x_pull: float  # xx − 1, which xx has lost digits of
    # What rounding left out of x_pull, xy, x_delta, x_sq_u: the same in each step, it would add up.
    x_pull_rest: float
    xy_rest: float
    x_delta_rest: float
    x_sq_u_rest: float


class FlowTransition(NamedTuple):
    """One step of the flow law: (x, ẋ)' = E ((x, ẋ) + (x_sq_g |g|², v_sq_u |u|² + v_dot_gu ⟨g, u⟩))."""

    xx: float
    xv: float
    vx: float
    vv: float
    x_sq_g: float
    v_sq_u: float
    v_dot_gu: float


def two_sum(a: T, b: T) -> tuple[T, T]:
    """a + b as the rounded sum and what its rounding left out, exactly.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2.
    """
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def two_product(a: float, b: float) -> tuple[float, float]:
    """a · b as the rounded product and what its rounding left out; exactly, unless that is too small or the halves
    overflow: then no number, or 0.

    Source: Dekker (1971), "A floating-point technique for extending the available precision", Numer. Math. 18.
    """
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, rest if math.isfinite(rest) else 0.0


def _halves(a: float) -> tuple[float, float]:
    """A number as the sum of two of 26 bits."""
    scaled = 134217729.0 * a  # 2²⁷ + 1
    high = scaled - (scaled - a)
    return high, a - high


def discrete_transition(law: Law, c: Coefficients) -> Transition:
    """The discrete law's step for one set of coefficients (docs/theory.md, section 3). Valid for any λ, η, β, τ."""
    kappa_lr = (law + 1.0) * c.lr
    norm = float(law == Law.NORM)
    same = c.mix_d == 0.0
    mix, mix_rest = two_sum(c.mix_d, c.mix_v * c.buffer_gain)
    x_delta, x_delta_rest = _times((mix, mix_rest), -kappa_lr * c.sign)
    x_pull, x_pull_rest = _times((x_delta, x_delta_rest), c.sign * c.decay)
    xy, xy_rest = _times(_times((c.mix_v, 0.0), c.buffer_decay), -kappa_lr)
    x_sq_u, x_sq_u_rest = _times((c.lr, 0.0), norm * c.lr)
    return Transition(
        xx=1.0 + x_pull,
        xy=xy,
        yx=c.buffer_gain * c.decay,
        yy=c.buffer_decay,
        x_delta=x_delta,
        y_delta=c.buffer_gain * c.sign,
        x_sq_u=x_sq_u,
        y_sq_u=-norm * c.lr if same else 0.0,
        y_dot_uv=0.0 if same else -norm * c.lr,
        x_pull=x_pull,
        x_pull_rest=x_pull_rest,
        xy_rest=xy_rest,
        x_delta_rest=x_delta_rest,
        x_sq_u_rest=x_sq_u_rest,
    )


def _times(a: tuple[float, float], b: float) -> tuple[float, float]:
    """A number and its rest times a number, in as many digits."""
    product, rest = two_product(a[0], b)
    return product, rest + a[1] * b


def oscillator(mu: float, w: float) -> tuple[float, float]:
    """e^{−μ}(C + μS) and e^{−μ}S, with C = cosh √Δ, S = sinh √Δ / √Δ and Δ = μ² − w: the entries of e^{AT}.

    μ = γT and w = ω²T². Accurate in all regimes: by the roots for Δ ≫ 0, the small one taken without cancellation (so
    that w = 0 conserves the charge exactly), trigonometric for Δ ≪ 0, the common power series in Δ between them.
    """
    delta = mu * mu - w
    if delta > 0.01:
        fast = -(mu + math.copysign(math.sqrt(delta), mu))  # below zero where the oscillator is damped
        slow = w / fast
        s = (math.exp(slow) - math.exp(fast)) / (slow - fast)
        return math.exp(slow) - slow * s, s
    decay = math.exp(-mu)
    if delta < -0.01:
        root = math.sqrt(-delta)
        s = decay * math.sin(root) / root
        return decay * math.cos(root) + mu * s, s
    cosh, sinh, even, odd = 0.0, 0.0, 1.0, 1.0
    for k in range(8):
        cosh, sinh = cosh + even, sinh + odd
        even *= delta / ((2 * k + 1) * (2 * k + 2))
        odd *= delta / ((2 * k + 2) * (2 * k + 3))
    return decay * (cosh + mu * sinh), decay * sinh


def flow_transition(law: Law, h: Hyper) -> FlowTransition:
    """The flow law's step of time T for hyperparameters held over that step (docs/theory.md, section 5).

    With momentum and dampening 1 a step takes no time and its velocity −u/(1−τ) is infinite: the forcing is NaN, so
    that the law's prediction of a norm says it does not exist. So is all of it where the flow itself does not exist
    (an infinite learning rate, momentum −1) or leaves float64 in one step.
    """
    try:
        return _flow_transition(law, h)
    except (ArithmeticError, ValueError):
        return FlowTransition(*[math.nan] * len(FlowTransition._fields))


def _flow_transition(law: Law, h: Hyper) -> FlowTransition:
    kappa = law + 1.0
    norm = float(law == Law.NORM)
    if h.momentum == 0.0:
        return FlowTransition(math.exp(-kappa * h.weight_decay * h.lr), 0.0, 0.0, 1.0, norm * h.lr * h.lr, 0.0, 0.0)
    inertia = 1.0 + h.momentum
    extra = h.momentum * h.weight_decay * h.lr if h.nesterov else 0.0
    mu = (1.0 - h.momentum + extra) / inertia
    stiffness = 2.0 * kappa * h.weight_decay / inertia  # ω²T
    xx, s = oscillator(mu, stiffness * h.duration)
    undamped = 1.0 - h.dampening
    v_sq_u = norm * 2.0 * h.lr / undamped if undamped != 0.0 else math.nan * norm
    v_dot_gu = -norm * h.sign * h.lr * 4.0 * h.momentum / inertia if h.nesterov else 0.0
    return FlowTransition(xx, h.duration * s, -stiffness * s, xx - 2.0 * mu * s, 0.0, v_sq_u, v_dot_gu)


def advance(law: Law, state: Tensor, moments: Tensor, step: Transition, flow: FlowTransition) -> None:
    """Advance a law's state [N_STATE[law], n] in place by one step with moments [N_MOMENTS, n]; all float64."""
    delta = moments[Moment.SUM_G if law == Law.TRANSLATION else Moment.DOT_PG]
    x, y = state[State.X].clone(), state[State.Y].clone()
    x_added = step.x_pull * x + step.xy * y + step.x_delta * delta + state[State.X_REST]
    x_added += step.x_pull_rest * x + step.xy_rest * y + step.x_delta_rest * delta
    y_new = step.yx * x + step.yy * y + step.y_delta * delta
    if law == Law.NORM:
        x_added += step.x_sq_u * moments[Moment.SQ_U] + step.x_sq_u_rest * moments[Moment.SQ_U]
        y_new += step.y_sq_u * moments[Moment.SQ_U] + step.y_dot_uv * moments[Moment.DOT_UV]
    state[State.X], state[State.X_REST] = two_sum(x, x_added)
    state[State.Y] = y_new
    if law == Law.TRANSLATION:
        return
    x, y = state[State.DEFECT_X].clone(), state[State.DEFECT_Y].clone()
    state[State.DEFECT_X] = step.xx * x + step.xy * y + step.x_delta * delta
    state[State.DEFECT_Y] = step.yx * x + step.yy * y + step.y_delta * delta
    x = state[State.FLOW_X] + flow.x_sq_g * moments[Moment.SQ_G]
    v = state[State.FLOW_V] + flow.v_sq_u * moments[Moment.SQ_U] + flow.v_dot_gu * moments[Moment.DOT_GU]
    state[State.FLOW_X] = flow.xx * x + flow.xv * v
    state[State.FLOW_V] = flow.vx * x + flow.vv * v


def propagate(propagator: Tensor, step: Transition | FlowTransition) -> None:
    """Multiply a propagator [2, 2] in place, from the left, by one step's matrix."""
    propagator.copy_(torch.tensor(step[:4], dtype=torch.float64, device="cpu").view(2, 2) @ propagator.cpu())


def damping(law: Law, h: Hyper) -> tuple[float, float]:
    """γ and ω² of the oscillator, per unit of time (docs/theory.md, section 5)."""
    kappa, inertia = law + 1.0, h.duration * (1.0 + h.momentum)
    if inertia == 0.0:
        raise ValueError(f"hyper: steps that take no time have no oscillator (lr {h.lr}, dampening {h.dampening})")
    extra = h.momentum * h.weight_decay * h.lr if h.nesterov else 0.0
    return (1.0 - h.momentum + extra) / inertia, 2.0 * kappa * h.weight_decay / inertia


def _roots(law: Law, h: Hyper) -> tuple[complex, complex]:
    """Roots −γ ± √(γ² − ω²) of the oscillator, per unit of time."""
    gamma, omega_squared = damping(law, h)
    root = cmath.sqrt(gamma * gamma - omega_squared)
    return -gamma + root, -gamma - root


def _free(law: Law, charge_0: Tensor, t: float, h: Hyper) -> Tensor:
    if h.momentum == 0.0:
        return charge_0 * math.exp(-(law + 1.0) * h.weight_decay * t)
    r1, r2 = _roots(law, h)
    if r1 == r2:
        return charge_0 * (cmath.exp(r1 * t) * (1.0 - r1 * t)).real
    return charge_0 * ((r1 * cmath.exp(r2 * t) - r2 * cmath.exp(r1 * t)) / (r1 - r2)).real


def free_translation(charge_0: Tensor, t: float, hyper: Hyper) -> Tensor:
    """Charge of a translation symmetry after time t with nothing driving it.

    Solves ẍ + 2γẋ + ω²x = 0 from rest, γ = (1−β)/(T(1+β)), ω² = 2λ/(T(1+β)); e^{−λt} x₀ when β = 0.

    Args:
        charge_0: ⟨θ_A(0), 1⟩ per group, [n], float64.
        t: Time in units of lr · (1 − dampening) · steps.
        hyper: Hyperparameters, constant over [0, t].

    Returns:
        ⟨θ_A(t), 1⟩ per group, [n], float64.

    Source: Kunin et al. (2021), arXiv:2012.04728, harmonic oscillation with momentum; docs/theory.md, section 5.
    """
    return _free(Law.TRANSLATION, charge_0, t, hyper)


def free_norm(charge_0: Tensor, t: float, hyper: Hyper) -> Tensor:
    """Squared norm after time t with nothing driving it: e^{−2λt} |θ(0)|² when β = 0, else the same oscillator.

    As free_translation with ω² = 4λ/(T(1+β)).

    Args:
        charge_0: Σ c|θ_A(0)|² per group, [n], float64.
        t: Time in units of lr · (1 − dampening) · steps.
        hyper: Hyperparameters, constant over [0, t].

    Returns:
        The charge per group at time t, [n], float64.

    Source: Kunin et al. (2021), arXiv:2012.04728; docs/theory.md, section 5.
    """
    return _free(Law.NORM, charge_0, t, hyper)


def norm_response(t: float, hyper: Hyper) -> float:
    """Squared norm at time t that a unit kick at time 0 leaves: the Green's function of the norm's flow law.

    β = 0: e^{−2λt}, the kick being one of the charge (η²|g|²); β > 0: (e^{r₁t} − e^{r₂t})/(r₁ − r₂) with
    r = −γ ± √(γ² − ω²), the kick being one of its velocity (T f).

    Args:
        t: Time since the kick, in units of lr · (1 − dampening) · steps.
        hyper: Hyperparameters, constant over [0, t].

    Source: Kunin et al. (2021), arXiv:2012.04728; docs/theory.md, section 5.
    """
    if hyper.momentum == 0.0:
        return math.exp(-2.0 * hyper.weight_decay * t)
    r1, r2 = _roots(Law.NORM, hyper)
    if r1 == r2:
        return (cmath.exp(r1 * t) * t).real
    return ((cmath.exp(r1 * t) - cmath.exp(r2 * t)) / (r1 - r2)).real
