"""The stochastic equation: gradient flow with the noise that minibatches bring.

    (1−β) dθ = −(g + λθ) dt + √(T/S) G(θ) dW,      G Gᵀ = covariance of one example's gradient

A batch of S examples drawn with replacement has a gradient of mean g and covariance G Gᵀ/S. A step lasts a time T:
η(1−τ) with momentum and η without. In all, its gradient moves the parameters by T/(1−β) times itself. Most of this
happens in later steps, through the buffer. So the noise of one step has covariance T² G Gᵀ/S, times 1/(1−β)². In a
time T, √(T/S) G dW/(1−β) gathers as much.

No factoring is needed to find G: its columns are the examples' own deviations (gᵢ − g)/√N. Each of them obeys the
gradient constraint ⟨gᵢ, ψ⟩ = 0, so the noise does, too, to rounding. So a sum ⟨θ, 1⟩ feels no noise at all. A norm |θ|²
does, although the noise is tangent to the sphere: Itô's formula gives it (T/S) tr G Gᵀ/(1−β)² a unit of time.

Source: Kunin et al. (2021), arXiv:2012.04728, modeling stochasticity; momentum and dampening: derived here
(docs/theory.md, section 4).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev

from noetherperf.rules.sgd import Hyper

__all__ = ["noise", "stochastic_flow"]

Losses = Callable[[Tensor], Tensor]


def noise(losses: Losses, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Mean gradient and noise factor at θ: g = Σ gᵢ/N and G with G Gᵀ = Σ (gᵢ − g)(gᵢ − g)ᵀ/N.

    Exact for batches that are drawn with replacement.

    Args:
        losses: Differentiable function of θ [n] that gives the loss of each example, [N], in torch. It may give
            the losses of B batches instead; their spread is then that of a batch, to be used with batch_size 1.
        theta: θ, [n].

    Returns:
        g [n] and G [n, N], in the loss per unit of θ.

    Source: Kunin et al. (2021), arXiv:2012.04728, modeling stochasticity; columns of deviations: derived here.
    Derived in docs/theory.md, section 4.
    """
    gradients: Tensor = jacrev(losses)(theta)  # [N, n]
    mean = gradients.mean(0)
    return mean, (gradients - mean).T / math.sqrt(len(gradients))


def stochastic_flow(
    losses: Losses,
    theta_0: Tensor,
    n_steps: int,
    hyper: Hyper,
    batch_size: int,
    *,
    substeps: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One path of (1−β) dθ = −(g + λθ) dt + √(T/S) G dW, by Euler–Maruyama with dt = T/substeps.

    As substeps grow the path becomes one of the continuous equation; with substeps = 1 and β = 0 it is SGD with
    Gaussian gradients. Valid for small η; the strong error is O(√dt).

    Args:
        losses: As in `noise`.
        theta_0: θ(0), [n]; computed in float64.
        n_steps: Time of the path in steps, of T = hyper.duration each.
        hyper: Of every step.
        batch_size: S, examples in a batch, drawn with replacement.
        substeps: Steps of the integrator in each step of the optimizer.
        generator: Draws W; torch's own by default.

    Returns:
        θ at times 0, T, …, n_steps · T, [n_steps + 1, n], float64.

    Raises:
        ValueError: batch_size or substeps is below 1.

    Source: Kunin et al. (2021), arXiv:2012.04728, modeling stochasticity.
    Derived in docs/theory.md, section 4.
    """
    for name, value in (("batch_size", batch_size), ("substeps", substeps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    theta = theta_0.detach().to("cpu", torch.float64)
    dt, inverse = hyper.duration / substeps, 1.0 / (1.0 - hyper.momentum)
    size = math.sqrt(hyper.duration / batch_size * dt)
    path = [theta]
    for _ in range(n_steps):
        for _ in range(substeps):
            g, factor = noise(losses, theta)
            kick = factor @ torch.randn(factor.shape[1], generator=generator, dtype=torch.float64, device=theta.device)
            drift = hyper.sign * g + hyper.weight_decay * theta
            theta = theta - inverse * (dt * drift - size * kick)
        path.append(theta)
    return torch.stack(path)
