"""The damped oscillator of a charge under momentum: one step of it, its coefficients, and closed forms.

    ẍ + 2γẋ + ω²x = T f(t)      γ = (1−β)/(T(1+β))      ω² = 2κλ/(T(1+β))

with T the time of one step, κ = 1 for a translation's sum and 2 for a norm. Nesterov adds βλη to γ's numerator.

Two flow laws are made of it. The paper's starts from rest, ẋ(0) = 0, and is ẋ = −κλx without momentum. The modified
flow law keeps the inertia of finite steps where β = 0, and starts as the steps do (`start_weights`). Derivation:
docs/theory.md, sections 4 (start) and 5.

Source: Kunin et al. (2021), "Neural Mechanics", arXiv:2012.04728.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number, choose, copysign, cos, exp, sin, sqrt
from noetherperf.rules.law import Law

if TYPE_CHECKING:
    from noetherperf.rules.sgd import Hyper


def oscillator(mu: Number, w: Number) -> tuple[Number, Number]:
    """e^{−μ}(C + μS) and e^{−μ}S, with C = cosh √Δ, S = sinh √Δ / √Δ and Δ = μ² − w: the entries of e^{AT}.

    μ = γT and w = ω²T². Accurate in all regimes: by the roots for Δ ≫ 0, the small one taken without cancellation (so
    that w = 0 conserves the charge exactly), trigonometric for Δ ≪ 0, the common power series in Δ between them.
    """
    delta = mu * mu - w

    def overdamped() -> tuple[Number, Number]:
        fast = -(mu + copysign(sqrt(delta), mu))  # below zero where the oscillator is damped
        slow = w / fast
        s = (exp(slow) - exp(fast)) / (slow - fast)
        return exp(slow) - slow * s, s

    def underdamped() -> tuple[Number, Number]:
        decay, root = exp(-mu), sqrt(-delta)
        s = decay * sin(root) / root
        return decay * cos(root) + mu * s, s

    def near_critical() -> tuple[Number, Number]:
        decay = exp(-mu)
        cosh: Number = 0.0
        sinh: Number = 0.0
        even: Number = 1.0
        odd: Number = 1.0
        for k in range(8):
            cosh, sinh = cosh + even, sinh + odd
            even = even * (delta / ((2 * k + 1) * (2 * k + 2)))
            odd = odd * (delta / ((2 * k + 2) * (2 * k + 3)))
        return decay * (cosh + mu * sinh), decay * sinh

    xx, s = choose(delta > 0.01, overdamped, lambda: choose(delta < -0.01, underdamped, near_critical))
    return xx, s


def oscillators(mu: Number, ws: Sequence[Number]) -> list[tuple[Number, Number]]:
    """`oscillator` of several w; of tensors in one go."""
    tensors = [w for w in ws if isinstance(w, Tensor)]
    if not tensors:
        return [oscillator(mu, w) for w in ws]
    xx, s = oscillator(mu, torch.stack(tensors))
    assert isinstance(xx, Tensor)
    assert isinstance(s, Tensor)
    return list(zip(xx.unbind(), s.unbind(), strict=True))


def damping(law: Law, h: "Hyper") -> tuple[float, float]:
    """γ and ω² of the oscillator, per unit of time (docs/theory.md, section 5)."""
    kappa, inertia = law + 1.0, h.duration * (1.0 + h.momentum)
    if inertia == 0.0:
        raise ValueError(
            f"hyper: steps with lr {h.lr} and dampening {h.dampening} take no time; set lr above 0 and "
            "dampening below 1"
        )
    extra = h.momentum * h.weight_decay * h.lr if h.nesterov else 0.0
    return (1.0 - h.momentum + extra) / inertia, 2.0 * kappa * h.weight_decay / inertia


def start_weights(h: "Hyper", *, warm: bool = False) -> tuple[float, float]:
    """w and w_v of the velocity θ̇(0) = −w d − w_v v with which modified flow follows the steps to O(η²).

    d is the first step's direction, s g + λθ, and v the momentum buffer before it. In all, that flow goes as far beyond
    (or short of) the slow motion −d/(1−β) as the steps do while the buffer settles.

                    fresh buffer (v = 0)        warm buffer
        momentum    w = (2/(1−τ) − 1)/(1+β)     w = 1/(1+β),        w_v = 2β/((1−τ)(1+β))
        Nesterov    w = (1+2β)/(1+β)            w = (1+2β)/(1+β),   w_v = 2β²/(1+β)
        plain       w = 1                       w = 1,              w_v = 0

    Source: this project; derived in docs/theory.md, section 4.
    """
    beta = h.momentum
    if beta == 0.0:
        return 1.0, 0.0
    if h.nesterov:
        return (1.0 + 2.0 * beta) / (1.0 + beta), 2.0 * beta * beta / (1.0 + beta)
    undamped = 1.0 - h.dampening
    if undamped == 0.0:
        raise ValueError(f"hyper: steps with dampening {h.dampening} take no time; set dampening below 1")
    w_v = 2.0 * beta / (undamped * (1.0 + beta))
    # A fresh buffer is written with d, not with (1−τ)d: as one that held τd/β.
    return 1.0 / (1.0 + beta) + (0.0 if warm else w_v * h.dampening / beta), w_v


def _free(law: Law, charge_0: Tensor, t: float, h: "Hyper") -> Tensor:
    if h.momentum == 0.0:
        return charge_0 * math.exp(-(law + 1.0) * h.weight_decay * t)
    return charge_0 * _motion(law, t, h)[0]


def _motion(law: Law, t: float, h: "Hyper") -> tuple[float, float]:
    """What the undriven oscillator makes in a time t of a unit of x at rest, and of a unit of velocity at x = 0."""
    gamma, omega_squared = damping(law, h)
    xx, s = oscillator(gamma * t, omega_squared * t * t)
    return float(xx), t * float(s)


def free_from_start(law: Law, charge_0: Tensor, carried: Tensor | None, t: float, h: "Hyper") -> Tensor:
    """Charge after time t, undriven, from the steps' own start ẋ(0) = −κ(wλx₀ + w_v y₀), and with inertia if β = 0.

    Solves ẍ + 2γẋ + ω²x = 0, with w and w_v of `start_weights`: what modified flow makes of the charge, where nothing
    drives it. Valid to O(η²) over a fixed time.

    Args:
        law: κ = 1 or 2.
        charge_0: x₀, [n], float64.
        carried: y₀ of a buffer that is warm, ⟨v, 1⟩ or Σ c⟨θ, v⟩, [n]; None if it is fresh.
        t: Time in units of lr · (1 − dampening) · steps.
        h: Hyperparameters, constant over [0, t].

    Source: this project; docs/theory.md, section 5.
    """
    w, w_v = start_weights(h, warm=carried is not None)
    velocity = w * h.weight_decay * charge_0
    if carried is not None:
        velocity = velocity + w_v * carried
    of_x, of_velocity = _motion(law, t, h)
    return of_x * charge_0 - of_velocity * (law + 1.0) * velocity


def free_translation(charge_0: Tensor, t: float, hyper: "Hyper") -> Tensor:
    """Charge of a translation symmetry after time t, undriven.

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


def free_norm(charge_0: Tensor, t: float, hyper: "Hyper") -> Tensor:
    """Squared norm after time t, undriven: e^{−2λt} |θ(0)|² when β = 0, else the same oscillator.

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


def norm_response(t: float, hyper: "Hyper") -> float:
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
    return _motion(Law.NORM, t, hyper)[1]
