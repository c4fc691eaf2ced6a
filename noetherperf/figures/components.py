"""For each symmetry, the simplest component of a network that has it: two parameters, and losses of a few examples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["COMPONENTS", "Component"]


@dataclass(frozen=True)
class Component:
    """A component whose loss has one symmetry.

    Attributes:
        kind: Kind of the symmetry.
        losses: θ [2] -> loss of each example, [N]; the training loss is their mean.
        generator: θ [2] -> ψ [2], the direction in which the symmetry moves θ.
        generator_rate: The constant matrix ∂ψ/∂θ, [2, 2]; ψ is affine in θ.
        charge: θ [..., 2] -> Q [...], the conserved quantity.
    """

    kind: str
    losses: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    generator_rate: Tensor
    charge: Callable[[Tensor], Tensor]

    def loss(self, theta: Tensor) -> Tensor:
        """The training loss at θ [2], a scalar."""
        return self.losses(theta).mean()


def _double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SHARES = _double([0.98, 0.9, 0.75, 0.45])  # target probability of the first of two classes
ANGLES = torch.deg2rad(_double([5.0, 40.0, 70.0, 105.0]))
INPUTS, TARGETS = _double([1.6, 1.1, 0.7, 1.2]), _double([1.0, 1.5, -0.4, 0.7])


def _softmax(theta: Tensor) -> Tensor:
    """Two logits and cross-entropy: log Σ e^θ − ⟨share, θ⟩."""
    return theta.logsumexp(0) - SHARES * theta[0] - (1.0 - SHARES) * theta[1]


def _normalised(theta: Tensor) -> Tensor:
    """A weight divided by its length, as normalisation does, and targets on the circle: ½|θ/|θ| − t|²."""
    direction: Tensor = theta / theta.norm()
    return 1.0 - direction[0] * ANGLES.cos() - direction[1] * ANGLES.sin()


def _unit(theta: Tensor) -> Tensor:
    """An active ReLU unit with one weight in and one out: ½(θ₂θ₁x − y)²."""
    return 0.5 * (theta[1] * theta[0] * INPUTS - TARGETS).square()


MIRROR = _double([1.0, -1.0])

COMPONENTS = (
    Component(
        "translation", _softmax, torch.ones_like, torch.zeros(2, 2, dtype=torch.float64), lambda theta: theta.sum(-1)
    ),
    Component(
        "scale",
        _normalised,
        lambda theta: theta,
        torch.eye(2, dtype=torch.float64),
        lambda theta: theta.square().sum(-1),
    ),
    Component(
        "rescale",
        _unit,
        lambda theta: MIRROR * theta,
        torch.diag(MIRROR),
        lambda theta: (MIRROR * theta.square()).sum(-1),
    ),
)
