"""What the continuous models say of the charges: oscillators and closed forms.

Projecting modified flow on a symmetry's generator removes the gradient and leaves an equation for the charge alone,

    ẍ + 2γẋ + ω²x = f      γ = (1−β)/(T(1+β))     ω² = 2κλ/(T(1+β))     f = 0 (κ = 1),  2|θ̇|² (κ = 2)

with κ = 1 for a sum ⟨θ, 1⟩ and 2 for a norm |θ|². That is a mass ½(1+β)T with friction 1−β and a spring κλ: the finite
step is the mass and the drive, momentum takes the friction away, and weight decay is the spring. Two flow laws are made
of it:

    paper      starts from rest, ẋ(0) = 0; without momentum the first-order ẋ = −κλx + η|g|²         error O(η)
    modified   starts as the steps do, ẋ(0) = −κ(wλx(0) + w_v y(0)); has inertia for β = 0 too       error O(η²)

The formulas themselves are those of noetherperf.rules; this file gives them names, times and regimes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from noetherperf.rules.law import Law
from noetherperf.rules.oscillator import damping, free_from_start, free_norm, free_translation
from noetherperf.rules.sgd import Hyper, discrete_law, flow_law, modified_flow_law
from noetherperf.symmetry import Quantity

__all__ = [
    "Flow",
    "Oscillator",
    "Quantity",
    "critical_decay",
    "discrete_frequency",
    "driven",
    "free",
    "oscillator",
]

Regime = Literal["underdamped", "critical", "overdamped"]
#: Which flow law: the paper's, or the projection of modified flow, with the steps' own start.
Flow = Literal["paper", "modified"]


@dataclass(frozen=True)
class Oscillator:
    """ẍ + 2γẋ + ω²x = f, the motion of a charge under momentum.

    Both flow laws are this equation. A mass ½(1+β)T, a friction 1−β and a spring κλ, divided by the mass. Valid as the
    flow law is. It is of second order in the learning rate if it starts as the steps do, and of first order if it
    starts from rest.

    Attributes:
        gamma: γ, per unit of time lr · (1 − dampening) · steps.
        omega: ω, radians per unit of time.

    Source: Kunin et al. (2021), arXiv:2012.04728, harmonic oscillation with momentum.
    Derived in docs/theory.md, section 5.
    """

    gamma: float
    omega: float

    @property
    def regime(self) -> Regime:
        """Underdamped (γ < ω): swings through zero. Overdamped: creeps. Critical (γ = ω to 1e-9): returns fastest."""
        if math.isclose(self.gamma, self.omega, rel_tol=1e-9):
            return "critical"
        return "underdamped" if self.gamma < self.omega else "overdamped"

    @property
    def frequency(self) -> float:
        """√(ω² − γ²), radians per unit of time, at which an underdamped charge swings; 0 in the other regimes."""
        return math.sqrt(self.omega**2 - self.gamma**2) if self.regime == "underdamped" else 0.0


def oscillator(quantity: Quantity, hyper: Hyper) -> Oscillator:
    """γ = (1−β)/(T(1+β)), with Nesterov (1−β+βλη)/(T(1+β)), and ω² = 2κλ/(T(1+β)) of a charge's flow law.

    Args:
        quantity: "translation" (κ = 1) or "norm" (κ = 2; scale and rescale charges too).
        hyper: With momentum above 0. Without momentum, the law is of first order.

    Returns:
        γ and ω, per unit of time lr · (1 − dampening) · steps.

    Raises:
        ValueError: There is no momentum, or steps take no time.

    Source: Kunin et al. (2021), arXiv:2012.04728, harmonic oscillation with momentum; Nesterov: derived here.
    Derived in docs/theory.md, section 5.
    """
    if hyper.momentum == 0.0:
        raise ValueError(
            "hyper: without momentum a charge has no inertia and is no oscillator; set momentum above 0, or take "
            "theory.free"
        )
    gamma, omega_squared = damping(_law(quantity), hyper)
    return Oscillator(gamma, math.sqrt(omega_squared))


def critical_decay(quantity: Quantity, hyper: Hyper) -> float:
    """The weight decay λ = (1−β)²/(2κT(1+β)) at which γ = ω. Above it charges swing, below it they creep.

    Args:
        quantity: "translation" or "norm".
        hyper: lr, momentum and dampening, without Nesterov. Its weight_decay is ignored.

    Returns:
        λ, as SGD's weight_decay.

    Raises:
        ValueError: As in oscillator; or hyper is Nesterov's, whose damping grows with λ.

    Source: γ = ω in Kunin et al. (2021), arXiv:2012.04728, harmonic oscillation with momentum.
    Derived in docs/theory.md, section 5.
    """
    if hyper.nesterov:
        raise ValueError("hyper: with Nesterov γ depends on λ; compare oscillator(...).gamma and .omega instead")
    beta, kappa = hyper.momentum, _law(quantity) + 1.0
    if beta == 0.0 or hyper.duration <= 0.0:
        raise ValueError(
            "hyper: a critical decay needs momentum and steps that take time; set momentum and lr above 0, and "
            "dampening below 1"
        )
    return (1.0 - beta) ** 2 / (2.0 * kappa * hyper.duration * (1.0 + beta))


def discrete_frequency(quantity: Quantity, hyper: Hyper) -> float:
    """Radians a step at which a charge swings under the discrete law, φ = arccos((1 + β − κTλ)/(2√β)).

    Exact for steps of any size. The free part of the law is a recursion x'' = (1 + β − κTλ) x' − βx. If its eigenvalues
    are complex, they are √β e^{±iφ}. So charges swing, and shrink by √β a step. For small steps φ is T√(ω² − γ²), the
    frequency of `oscillator`. With Nesterov, φ follows from trace and determinant of the law's own matrix. If decay is
    so strong that the larger eigenvalue is real and below 0, the sign changes at every step: φ = π.

    Args:
        quantity: "translation" (κ = 1) or "norm" (κ = 2; scale and rescale charges too).
        hyper: Constant over all steps.

    Returns:
        φ, radians per step, 0 to π. It is 0 if nothing swings, because there is too little momentum or decay.

    Source: The discrete law, derived in docs/theory.md, section 3.
    """
    law = _law(quantity)
    (xx, xy), (yx, yy) = discrete_law(law, hyper.coefficients())[0]
    if hyper.momentum == 0.0:  # x alone moves
        return math.pi if xx < 0.0 else 0.0
    trace, determinant = xx + yy, xx * yy - xy * yx
    if trace * trace >= 4.0 * determinant:
        return math.pi if trace < 0.0 else 0.0
    return math.acos(trace / (2.0 * math.sqrt(determinant)))


def free(
    quantity: Quantity,
    charge_0: Tensor,
    times: Tensor | Sequence[float],
    hyper: Hyper,
    *,
    flow: Flow = "paper",
    carried: Tensor | None = None,
) -> Tensor:
    """Charges that nothing drives: for a translation the whole flow law, for a norm what the initial charge becomes.

        paper      e^{−κλt} x₀ for β = 0, else the oscillator released from rest
        modified   the oscillator, for β = 0 too, with ẋ(0) = −κ(wλx₀ + w_v y₀), w and w_v of
                   `rules.oscillator.start_weights`

    Valid to first order in the learning rate, and the modified one to second order.

    Args:
        quantity: "translation" or "norm".
        charge_0: Charges at time 0, [n].
        times: [n times], in units of lr · (1 − dampening) · steps.
        hyper: Constant over these times.
        flow: "paper" or "modified".
        carried: y₀, of a momentum buffer v that is warm at time 0: ⟨v, 1⟩, or ⟨θ, v⟩ for a norm (differences for a
            rescale), [n]. For the modified flow law; None if the first step makes the buffer.

    Returns:
        [n times, n], float64.

    Raises:
        ValueError: flow is neither of these; or the paper's law, which starts from rest, is given carried; or
            hyper's steps take no time.

    Source: `free_translation`, `free_norm`, of Kunin et al. (2021), arXiv:2012.04728, exact dynamics; the modified law:
    this project. Derived in docs/theory.md, section 5.
    """
    law = _law(quantity)
    charge_0 = charge_0.to(torch.float64)
    if _modified(flow):
        carried = None if carried is None else carried.to(torch.float64)
        return torch.stack([free_from_start(law, charge_0, carried, float(t), hyper) for t in times])
    if carried is not None:
        raise ValueError("carried: the paper's flow law starts from rest; take flow='modified' for a warm buffer")
    solve = free_translation if law == Law.TRANSLATION else free_norm
    return torch.stack([solve(charge_0, float(t), hyper) for t in times])


def driven(
    charge_0: Tensor,
    sq_update: Tensor,
    hyper: Hyper,
    *,
    flow: Flow = "paper",
    carried: Tensor | None = None,
    dot_gu: Tensor | None = None,
) -> Tensor:
    """Squared norms under a flow law, driven by the updates of finite size: the poster's formula step by step.

        β = 0, paper   |θ(t)|² = e^{−2λt} |θ(0)|² + η ∫₀ᵗ e^{−2λ(t−s)} |g|² ds
        else           ẍ + 2γẋ + ω²x = f,  f = 2|θ̇|²,  |θ̇|² = |u|²/(1−τ)²   [Nesterov: + (4β/(1+β))⟨g, θ̇⟩]

    Valid to first order in the learning rate, and the modified law to second order. The drive acts at the beginning of
    each step. Over- and underdamped are one formula (rules/oscillator.py).

    Args:
        charge_0: Squared norms, or their differences, at time 0, [n].
        sq_update: |u_k|², [n steps, n] (differences for a rescale). For the paper's law with β = 0, |g_k|² of the
            loss's gradient alone.
        hyper: Constant over the steps.
        flow: As in `free`.
        carried: As in `free`.
        dot_gu: ⟨g_k, u_k⟩, [n steps, n], with Nesterov. Ignored without.

    Returns:
        Charges after 0, 1, … steps, [n steps + 1, n], float64.

    Raises:
        ValueError: As in `free`; or hyper is Nesterov's, and dot_gu is missing.

    Source: Kunin et al. (2021), arXiv:2012.04728, exact dynamics; the modified law and Nesterov: this project.
    Derived in docs/theory.md, section 5.
    """
    nesterov = hyper.nesterov and hyper.momentum != 0.0
    if nesterov and dot_gu is None:
        raise ValueError("dot_gu: with Nesterov the drive needs ⟨g, u⟩ of each step too")
    charge_0, sq_update = charge_0.to(torch.float64), sq_update.to(torch.float64)
    modified = _modified(flow)
    _, recursion = (modified_flow_law if modified else flow_law)(Law.NORM, hyper)
    a, b = (torch.tensor(matrix, dtype=torch.float64, device=charge_0.device) for matrix in recursion[:2])
    of_gradient, of_update, of_gu = b.T[:, :, None]  # each moment's kick of x and ẋ, [2, 1]
    kicks = (of_update if modified or hyper.momentum != 0.0 else of_gradient) * sq_update[:, None]
    if nesterov and dot_gu is not None:
        kicks = kicks + of_gu * dot_gu.to(torch.float64)[:, None]
    state = torch.zeros(2, len(charge_0), dtype=torch.float64, device=charge_0.device)  # x and ẋ
    forced = [state[0]]
    for kick in kicks:
        state = a @ state + kick
        forced.append(state[0])
    times = [hyper.duration * k for k in range(len(sq_update) + 1)]
    return free("norm", charge_0, times, hyper, flow=flow, carried=carried) + torch.stack(forced)


def _modified(flow: Flow) -> bool:
    if flow not in get_args(Flow):
        raise ValueError(f"flow must be 'paper' or 'modified', not {flow!r}")
    return flow == "modified"


def _law(quantity: Quantity) -> Law:
    try:
        return Law[quantity.upper()]
    except KeyError:
        raise ValueError(f"quantity must be 'translation' or 'norm', not {quantity!r}") from None
