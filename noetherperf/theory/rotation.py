"""Rotational equilibrium: the norm at which decay and growth of a scale-invariant group balance, and how fast it turns.

The loss does not depend on the length of such a group. So noise makes θ walk on a sphere. Decay and finite steps decide
its radius. With independent gradients that are orthogonal to θ on average, and r = 1 − ηλ,

    θ' = rθ − ηu     q = |u|²     ρ_l = E⟨u_k, u_{k+l}⟩/q     K = 1 + 2 Σ_{l≥1} r^l ρ_l

    |θ|² = η² q K/(1 − r²)        cos φ = r + (1 − r²)(K − 1)/(2rK)

K says how much further steps get if they repeat each other. Rules differ only in q and ρ:

    momentum β, Adam's β₁    ρ_l = b^l,  K = (1 + br)/(1 − br),  cos φ = (r + b)/(1 + br)
    a sign of a mean         ρ_l = (2/π) arcsin(correlation of the means), by Price's theorem for Gaussian gradients

Coupled decay, as in torch.optim.SGD, passes through the buffer. It has formulas of its own.

Source: van Laarhoven (2017), arXiv:1706.05350; Wan et al. (2021), arXiv:2006.08419, spherical motion dynamics; Kosson
et al. (2023), arXiv:2305.17212, rotational equilibrium: all to first order in ηλ. K and the exact angles: derived here
(docs/theory.md, section 6).
"""

import cmath
import math
from dataclasses import dataclass

from noetherperf.rules.sgd import Hyper

__all__ = ["RotationalEquilibrium", "adamw_equilibrium", "equilibrium", "sgd_equilibrium", "sign_equilibrium"]

#: Correlations of updates are summed until they are below this.
NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class RotationalEquilibrium:
    """The equilibrium of a scale-invariant group: |θ|² ∝ |u|², cos φ, and how fast r^k and r^{2k} fall.

    Valid for gradients that are independent and orthogonal to θ on average, as the function that gives it says.

    Attributes:
        sq_norm: |θ|². sq_norm/sq_update depends on the hyperparameters alone. So even if gradients are not as assumed,
            a measured |u|² gives |θ|².
        sq_update: |u|², of the update without decoupled decay.
        angle: φ, the angle between θ before and after a step, in radians. Over many steps or groups it is the root of
            the mean square, which is more than the mean.
        decorrelation: Steps in which the cosine of θ with its past falls by a factor e, once the buffer has forgotten.
        relaxation: Steps in which |θ|² comes nearer to equilibrium by a factor e. Valid near equilibrium, and for
            ηλ ≪ 1 − β.

    Source: Kosson et al. (2023), arXiv:2305.17212. Derived in docs/theory.md, section 6.
    """

    sq_norm: float
    sq_update: float
    angle: float
    decorrelation: float
    relaxation: float


def sgd_equilibrium(hyper: Hyper, sq_gradient: float, *, decoupled: bool = False) -> RotationalEquilibrium:
    """Equilibrium of SGD on a scale-invariant group, whose gradient is |g| = G/|θ|.

        coupled     |θ|⁴ = ηaG²(1+β)/(2λ(1−β)(1+β−½ηaλ))     2aλ|θ|² = η(1+β)|u|²    cos φ = 1 − ηaλ/(1+β)
        decoupled   |θ|⁴ = η²a²G²/(1−β²) · K/(1−r²)          |u|² = a²|g|²/(1−β²)    cos φ = (r+β)/(1+βr)

    a = 1 − τ, or 1 without momentum. |u|² and the angle of coupled decay hold for any gradients that are orthogonal to
    θ. The rest holds for gradients that are independent, too. Relaxation is of first order in ηλ. It is a quarter of
    the decorrelation, because |g| falls as |θ| grows.

    Args:
        hyper: lr, momentum, dampening, weight_decay; without Nesterov.
        sq_gradient: G² = |g|²|θ|², measured at any |θ|, mean over steps.
        decoupled: Whether decay acts on θ alone, θ' = (1 − ηλ)θ − ηu, and not through the buffer as in torch.optim.SGD.

    Returns:
        The equilibrium: |θ|², |u|², φ in radians, times in steps.

    Raises:
        ValueError: hyper is Nesterov's, or sq_gradient is not positive. Or there is no equilibrium, because there is no
            decay or because decay alone overshoots.

    Source: Wan et al. (2021), arXiv:2006.08419, and Kosson et al. (2023), arXiv:2305.17212, to first order in ηλ.
    Derived in docs/theory.md, section 6.
    """
    beta, lr, share = hyper.momentum, hyper.lr, 1.0 - hyper.dampening if hyper.momentum else 1.0
    _positive("sq_gradient", sq_gradient)
    if decoupled:
        if hyper.nesterov:
            raise ValueError("hyper: with Nesterov the update is no decaying sum of gradients; set nesterov=False")
        keep = _keep(lr, hyper.weight_decay)
        sq_update = share * share * sq_gradient / (1.0 - beta * beta)  # at |θ| = 1
        return _decoupled(lr, keep, sq_update, (1.0 + beta * keep) / (1.0 - beta * keep), shrinks=True)
    relative = equilibrium(hyper)
    decay = hyper.duration * hyper.weight_decay  # ηaλ
    if not 0.0 < decay < 2.0 * (1.0 + beta):
        raise ValueError(
            f"hyper: no equilibrium with lr·(1 − dampening)·weight_decay = {decay:g}; "
            f"it must be between 0 and 2(1 + momentum) = {2.0 * (1.0 + beta):g}"
        )
    fourth = lr * share * sq_gradient * (1.0 + beta)
    fourth /= 2.0 * hyper.weight_decay * (1.0 - beta) * (1.0 + beta - 0.5 * decay)
    sq_norm = math.sqrt(fourth)
    trace = 1.0 + beta - decay  # E θ'' = trace · E θ' − β E θ
    slowest = abs((abs(trace) + cmath.sqrt(trace * trace - 4.0 * beta)) / 2.0)
    decorrelation = -1.0 / math.log(slowest)
    angle = 2.0 * math.asin(0.5 * relative)
    return RotationalEquilibrium(sq_norm, (relative / lr) ** 2 * sq_norm, angle, decorrelation, decorrelation / 4.0)


def adamw_equilibrium(n_elements: int, lr: float, weight_decay: float, beta1: float = 0.9) -> RotationalEquilibrium:
    """Equilibrium of AdamW on a scale-invariant group: |u|² = n(1−β₁)/(1+β₁), ρ_l = β₁^l.

        |θ|² = η²|u|²(1+β₁r)/((1−β₁r)(1−r²)) ≈ nη/(2λ)        cos φ = (r+β₁)/(1+β₁r),  φ ≈ √(2ηλ(1−β₁)/(1+β₁))

    Valid for independent gradients of constant variance, up to O(1−β₂), with ε ≪ |g|. Elements that never have a
    gradient do not count.

    Args:
        n_elements: n, elements of the group.
        lr: η.
        weight_decay: λ.
        beta1: β₁.

    Returns:
        The equilibrium: |θ|², |u|², φ in radians, times in steps.

    Raises:
        ValueError: n_elements is not positive, beta1 is not in [0, 1), or lr·weight_decay is not between 0 and 1.

    Source: Kosson et al. (2023), arXiv:2305.17212, to first order in ηλ. Derived in docs/theory.md, section 6.
    """
    _positive("n_elements", n_elements)
    _below_one(beta1=beta1)
    keep = _keep(lr, weight_decay)
    sq_update = n_elements * (1.0 - beta1) / (1.0 + beta1)
    return _decoupled(lr, keep, sq_update, (1.0 + beta1 * keep) / (1.0 - beta1 * keep))


def sign_equilibrium(
    n_elements: int, lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.99
) -> RotationalEquilibrium:
    """Equilibrium of Lion, u = sign(β₁m + (1−β₁)g), m' = β₂m + (1−β₂)g, on a scale-invariant group: |u|² = n.

        ρ_l = (2/π) arcsin(c_l/c_0)     c_0 = (1−β₁)² + β₁²(1−β₂)/(1+β₂)
        c_l = β₁(1−β₂)β₂^{l−1}(1−β₁ + β₁β₂/(1+β₂))

    With β₁ = β₂ it is signSGD with momentum β₁ (Signum), with both 0 signSGD: |θ|² = nη²/(1−r²), cos φ = r. Valid for
    independent Gaussian gradients of constant variance; exact in ηλ.

    Args:
        n_elements: n, elements of the group.
        lr: η.
        weight_decay: λ.
        beta1: Lion's β₁.
        beta2: Lion's β₂.

    Returns:
        The equilibrium: |θ|², |u|², φ in radians, times in steps.

    Raises:
        ValueError: n_elements is not positive, a beta is not in [0, 1), or lr·weight_decay is not between 0 and 1.

    Source: Chen et al. (2023), arXiv:2302.06675, Lion; Kosson et al. (2023), arXiv:2305.17212, its equilibrium to first
    order. Derived in docs/theory.md, section 6.
    """
    _positive("n_elements", n_elements)
    _below_one(beta1=beta1, beta2=beta2)
    keep = _keep(lr, weight_decay)
    fresh = 1.0 - beta2
    variance = (1.0 - beta1) ** 2 + beta1**2 * fresh / (1.0 + beta2)
    correlation = beta1 * fresh * (1.0 - beta1 + beta1 * beta2 / (1.0 + beta2)) / variance
    persistence, weight = 1.0, keep
    while weight * correlation > NEGLIGIBLE:
        persistence += 2.0 * weight * (2.0 / math.pi) * math.asin(min(correlation, 1.0))
        weight, correlation = weight * keep, correlation * beta2
    return _decoupled(lr, keep, float(n_elements), persistence)


def equilibrium(hyper: Hyper) -> float:
    """The relative update η|u|/|θ| = √(2η(1−τ)λ/(1+β)) at which the norm of a scale-symmetric group stands still.

    Decay shrinks such a norm, and finite steps make it grow. At the discrete law's fixed point, x' = x and y' = y,
    2(1−τ)λ|θ|² = η(1+β)|u|², exactly and at any learning rate. As |θ'| = |θ| there, the update is the chord of an angle
    2 arcsin(η|u|/2|θ|), the angular update. With |u| ∝ 1/|θ| the fixed point attracts.

    Args:
        hyper: lr, momentum, dampening, weight_decay; without Nesterov.

    Returns:
        η|u|/|θ|, no unit; close to the angular update in radians.

    Raises:
        ValueError: hyper is Nesterov's, whose equilibrium depends on ⟨u, v⟩ as well.

    Source: The discrete law's fixed point (docs/theory.md, section 6). To first order in ηλ also Wan et al. (2021),
    arXiv:2006.08419.
    """
    if hyper.nesterov:
        raise ValueError("hyper: with Nesterov the equilibrium depends on ⟨u, v⟩ as well; set nesterov=False")
    return math.sqrt(2.0 * hyper.duration * hyper.weight_decay / (1.0 + hyper.momentum))


def _decoupled(
    lr: float, keep: float, sq_update: float, persistence: float, *, shrinks: bool = False
) -> RotationalEquilibrium:
    """From |u|² and K; `shrinks`: |u|² falls as 1/|θ|², and sq_update is that at |θ| = 1."""
    ratio = lr * lr * persistence / (1.0 - keep * keep)  # |θ|²/|u|²
    sq_norm = math.sqrt(ratio * sq_update) if shrinks else ratio * sq_update
    cosine = keep + (1.0 - keep * keep) * (persistence - 1.0) / (2.0 * keep * persistence)
    decorrelation = -1.0 / math.log(keep)
    relaxation = decorrelation / (4.0 if shrinks else 2.0)
    return RotationalEquilibrium(sq_norm, sq_norm / ratio, math.acos(cosine), decorrelation, relaxation)


def _keep(lr: float, weight_decay: float) -> float:
    """r = 1 − ηλ."""
    if not 0.0 < lr * weight_decay < 1.0:
        raise ValueError(f"lr·weight_decay must be between 0 and 1 for an equilibrium, not {lr * weight_decay:g}")
    return 1.0 - lr * weight_decay


def _positive(name: str, value: float) -> None:
    if not value > 0.0:
        raise ValueError(f"{name} must be positive, not {value:g}")


def _below_one(**betas: float) -> None:
    for name, beta in betas.items():
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} must be in [0, 1), not {beta:g}")
