"""Differential equations for the parameters, and the discrete steps that they model.

With d = s∇L + λθ, the direction of SGD with weight decay, H = s∇∇L + λ its derivative, and T the time of one step:

    gradient flow    (1−β) θ̇ = −d
    modified loss    (1−β) θ̇ = −d − c T H d                c = (1+β)/(2(1−β)²)
    modified flow    (1−β) θ̇ = −d − ½(1+β) T θ̈
    the steps         θ' = θ − η u                           (rules/sgd.py)

Modified flow is the step's own Taylor series: with θ(t ± T) = θ ± T θ̇ + ½T² θ̈, the heavy ball's
(θ(t+T) − θ(t)) − β(θ(t) − θ(t−T)) = −T d is that line. Modified loss eliminates θ̈ along the slow motion, where
θ̇ = −d/(1−β) and θ̈ = H d/(1−β)², and so knows no oscillation. Nesterov's step looks ahead, which adds −βT Hθ̇ to the
right of modified flow and takes β/(1−β) from c.

Over a fixed time, the error of gradient flow is O(T). That of modified loss is O(T²) without momentum. With momentum it
is so only once the buffer is warm, because the slow motion does not describe how the buffer fills. The error of
modified flow is O(T²) from a cold buffer, too, if it starts with the right velocity: the distance covered while the
buffer fills must come out right. This one does.

Source: Kunin et al. (2021), arXiv:2012.04728: equations of learning; momentum in the modified loss, Nesterov and the
starting velocity: derived here (docs/theory.md, section 4).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.func import grad

from noetherperf.rules.oscillator import start_weights
from noetherperf.rules.sgd import SGD, Hyper

__all__ = ["descent", "gradient_flow", "modified_flow", "modified_loss"]

Loss = Callable[[Tensor], Tensor]
Field = Callable[[Tensor], Tensor]
Times = Tensor | NDArray[np.float64] | Sequence[float]

#: Neither decay nor momentum; the flow of the loss alone.
PLAIN = Hyper(lr=0.0)
#: Of the integrator, relative and absolute, per step. Conserved quantities stay so to about a hundred times this.
RTOL, ATOL = 1e-11, 1e-13
#: Evaluations before giving up: a flow that slides along a kink (of a ReLU) or explodes would take ever smaller steps.
MAX_EVALUATIONS = 100_000


def gradient_flow(loss: Loss, theta_0: Tensor, times: Times, hyper: Hyper = PLAIN) -> Tensor:
    """Gradient flow with weight decay and momentum, (1−β) θ̇ = −s∇L(θ) − λθ: SGD in the limit η → 0.

    Valid to O(η) over a fixed time. With λ = 0 every charge is conserved exactly. Momentum only rescales time.

    Args:
        loss: Differentiable function of θ [n] with a scalar value, in torch.
        theta_0: θ(0), [n]; computed in float64.
        times: Where to give θ, [n times], increasing from 0 or later, in units of lr · (1 − dampening) · steps.
        hyper: Its momentum, weight_decay and maximize; the flow knows no learning rate.

    Returns:
        θ at these times, [n times, n], float64.

    Raises:
        ValueError: times are not increasing from 0 or later, or theta_0 is no vector.
        ArithmeticError: The solution explodes, or slides along a kink, as the flow of a ReLU network can.

    Source: Kunin et al. (2021), arXiv:2012.04728, modeling weight decay and momentum.
    Derived in docs/theory.md, section 4.
    """
    d = _direction(loss, hyper)
    return _solve(lambda theta: -d(theta) / (1.0 - hyper.momentum), theta_0, times)


def modified_loss(loss: Loss, theta_0: Tensor, times: Times, hyper: Hyper) -> Tensor:
    """The flow on the loss that finite steps descend, (1−β) θ̇ = −d − c T H d, c = (1+β)/(2(1−β)²).

    Without momentum, it is the gradient flow of L + η|∇L|²/4. It is valid to O(η²) over a fixed time while ηh < 1 for
    all curvatures h. With momentum, it is valid where the motion is slow (overdamped), and after the buffer has filled.

    Args:
        loss: Twice differentiable function of θ [n] with a scalar value, in torch.
        theta_0: θ(0), [n]; computed in float64.
        times: Where to give θ, [n times], in units of lr · (1 − dampening) · steps.
        hyper: Of every step.

    Returns:
        θ at these times, [n times, n], float64.

    Raises:
        ValueError, ArithmeticError: As in gradient_flow.

    Source: Kunin et al. (2021), arXiv:2012.04728, modified loss; with momentum and Nesterov derived here.
    Derived in docs/theory.md, section 4.
    """
    d = _direction(loss, hyper)
    beta = hyper.momentum
    c = (1.0 + beta) / (2.0 * (1.0 - beta) ** 2) - (beta / (1.0 - beta) if hyper.nesterov else 0.0)

    def velocity(theta: Tensor) -> Tensor:
        direction = d(theta)
        return -(direction + c * hyper.duration * _derivative(d, theta, direction)) / (1.0 - beta)

    return _solve(velocity, theta_0, times)


def modified_flow(loss: Loss, theta_0: Tensor, times: Times, hyper: Hyper, *, buffer_0: Tensor | None = None) -> Tensor:
    """The step's Taylor series to second order, (1−β) θ̇ = −d − ½(1+β) T θ̈ [Nesterov: − βT Hθ̇]: a ball with mass.

    The flow starts with a velocity that covers the same distance as the steps while a fresh buffer fills:

        fresh buffer     θ̇(0) = −(2/(1−τ) − 1) d/(1+β)       with Nesterov  −(1+2β) d/(1+β)
        warm buffer v    θ̇(0) = −(d + 2βv/(1−τ))/(1+β)       with Nesterov  −((1+2β)d + 2β²v)/(1+β)

    Valid to O(η²) over a fixed time, with momentum's oscillations.

    Args:
        loss: Differentiable function of θ [n] with a scalar value, in torch; with Nesterov twice differentiable.
        theta_0: θ(0), [n]; computed in float64.
        times: Where to give θ, [n times], in units of lr · (1 − dampening) · steps.
        hyper: Of every step; its steps must take time.
        buffer_0: The momentum buffer before the first step, [n]; None if that step makes it.

    Returns:
        θ at these times, [n times, n], float64.

    Raises:
        ValueError: As in gradient_flow; or lr is 0 or dampening 1, so that no time passes; or buffer_0 is not [n].
        ArithmeticError: As in gradient_flow.

    Source: Kunin et al. (2021), arXiv:2012.04728, modified flow; starting velocity and Nesterov derived here.
    Derived in docs/theory.md, section 4.
    """
    if hyper.duration <= 0.0:
        raise ValueError(
            f"hyper: modified flow needs steps that take time, not lr {hyper.lr} and dampening {hyper.dampening}; set "
            "lr above 0 and dampening below 1"
        )
    d = _direction(loss, hyper)
    beta, mass = hyper.momentum, 0.5 * (1.0 + hyper.momentum) * hyper.duration
    theta_0, buffer_0 = _vector(theta_0), _buffer(buffer_0, theta_0)
    w, w_v = start_weights(hyper, warm=buffer_0 is not None)
    velocity_0 = -w * d(theta_0)
    if buffer_0 is not None:
        velocity_0 = velocity_0 - w_v * buffer_0

    def rate(state: Tensor) -> Tensor:
        theta, velocity = state.chunk(2)
        force = -d(theta) - (1.0 - beta) * velocity
        if hyper.nesterov:
            force = force - beta * hyper.duration * _derivative(d, theta, velocity)
        return torch.cat([velocity, force / mass])

    return _solve(rate, torch.cat([theta_0, velocity_0]), times)[:, : len(theta_0)]


def descent(loss: Loss, theta_0: Tensor, n_steps: int, hyper: Hyper, *, buffer_0: Tensor | None = None) -> Tensor:
    """The discrete steps of SGD on the whole loss, θ' = θ − η u: what the flows model. Exact, as SGD itself.

    Args:
        loss: Differentiable function of θ [n] with a scalar value, in torch.
        theta_0: θ before the first step, [n]; computed in float64.
        n_steps: How many steps.
        hyper: Of every step.
        buffer_0: The momentum buffer before the first step, [n]; None if that step makes it.

    Returns:
        θ after 0, 1, …, n_steps steps, [n_steps + 1, n], float64; step k is at time k · hyper.duration.

    Raises:
        ValueError: theta_0 is no vector, or buffer_0 is not [n].

    Source: torch.optim.SGD's update, `rules.sgd.SGD.update`; docs/theory.md, section 2.
    """
    gradient, p = grad(loss), _vector(theta_0)
    buffer_0 = _buffer(buffer_0, p)
    v: Tensor | None = torch.zeros_like(p) if buffer_0 is None else buffer_0
    path = [p]
    for k in range(n_steps):
        age = 0 if k == 0 and buffer_0 is None else 1
        p, (v,), _ = SGD.update(p, gradient(p), (v,), hyper.coefficients(age))
        path.append(p)
    return torch.stack(path)


def _direction(loss: Loss, hyper: Hyper) -> Field:
    """d = s∇L + λθ, what a step descends along."""
    gradient = grad(loss)
    return lambda theta: hyper.sign * gradient(theta) + hyper.weight_decay * theta


def _derivative(field: Field, theta: Tensor, along: Tensor) -> Tensor:
    """H times a vector, the derivative of a gradient field: symmetric, so that backward mode serves."""
    product: Tensor = grad(lambda p: field(p) @ along)(theta)
    return product


def _vector(theta: Tensor) -> Tensor:
    if theta.ndim != 1:
        raise ValueError(f"theta_0 must be a vector [n], not of shape {tuple(theta.shape)}; flatten it")
    return theta.detach().to("cpu", torch.float64)


def _buffer(buffer_0: Tensor | None, theta_0: Tensor) -> Tensor | None:
    if buffer_0 is None:
        return None
    if buffer_0.shape != theta_0.shape:
        raise ValueError(f"buffer_0 must have theta_0's shape {tuple(theta_0.shape)}, not {tuple(buffer_0.shape)}")
    return _vector(buffer_0)


def _solve(rate: Field, state_0: Tensor, times: Times) -> Tensor:
    """Integrate ẋ = rate(x) from x(0) = state_0, by an explicit Runge–Kutta method of order 8 with error control."""
    at = np.asarray(times, dtype=np.float64)
    if at.ndim != 1 or not at.size or at[0] < 0.0 or np.any(np.diff(at) <= 0.0):
        raise ValueError("times must be a sequence of numbers that increase from 0 or later")

    evaluations = itertools.count()

    def right_hand_side(t: float, state: NDArray[Any]) -> NDArray[Any]:
        if next(evaluations) == MAX_EVALUATIONS:
            raise ArithmeticError(
                f"the flow is stuck at time {t:g} of {at[-1]:g}: it explodes, or slides along a kink of the loss, as "
                "ReLU networks can; ask for an earlier time, or follow descent with a small lr"
            )
        return rate(torch.from_numpy(state)).detach().numpy()

    first = _vector(state_0).numpy()
    end = max(float(at[-1]), np.finfo(np.float64).tiny)
    solution = solve_ivp(right_hand_side, (0.0, end), first, "DOP853", t_eval=at, rtol=RTOL, atol=ATOL)
    if not solution.success or not np.isfinite(solution.y).all():
        raise ArithmeticError(
            f"the flow could not be followed to time {at[-1]:g}: {solution.message}; ask for an earlier time, or "
            "follow descent with a small lr"
        )
    return torch.from_numpy(np.ascontiguousarray(solution.y.T))
