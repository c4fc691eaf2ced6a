"""Figure: how the noise of minibatches makes a norm grow, over batch size and momentum."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data, slope
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.rules.sgd import Hyper
from noetherperf.symmetry import Part, Scale

__all__ = ["claims", "compute"]

BATCHES = (1, 4, 16, 64)
#: T/(1−β), and so the predicted growth a step, is the same.
SETTINGS = {"plain": Hyper(lr=0.002), "momentum": Hyper(lr=0.0002, momentum=0.9)}
N_EXAMPLES, N_CLASSES = 256, 10


def compute(quick: bool) -> Data:
    """|θ|² of a normalised weight at the minimum of its loss, where batches are all that moves it.

    Arrays, for "plain" and "momentum": /batch [n]; /steps [n rows]; /growth [n rows, n], |θ|² over its initial value,
    less 1; /noise [n rows, n], the same as predicted, ∫ (T/S) tr GGᵀ/(1−β)² dt with G along the measured path; /lr and
    /momentum.
    """
    images, labels = _examples()
    n_steps, every = (1000, 250) if quick else (3000, 100)
    theta = _at_minimum(images, labels)
    data: dict[str, NDArray[np.float64]] = {}
    for name, hyper in SETTINGS.items():
        runs = [_run(theta, images, labels, hyper, batch, n_steps, every) for batch in BATCHES]
        data[f"{name}/growth"], data[f"{name}/noise"] = np.array(runs).transpose(1, 2, 0)
        data[f"{name}/batch"] = np.array(BATCHES, dtype=np.float64)
        data[f"{name}/steps"] = np.arange(0.0, n_steps + 1, every)
        data[f"{name}/lr"], data[f"{name}/momentum"] = np.array(hyper.lr), np.array(hyper.momentum)
    return data


def _examples() -> tuple[Tensor, Tensor]:
    data = digits.load(dtype=torch.float64)
    return data.train_images[:N_EXAMPLES].flatten(1), data.train_labels[:N_EXAMPLES]


def _losses(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a linear classifier that does not feel the length of its weight, of each example [N]."""
    weight = (theta / theta.norm()).view(N_CLASSES, -1)
    each: Tensor = nn.functional.cross_entropy(images @ weight.T, labels, reduction="none")
    return each


def _at_minimum(images: Tensor, labels: Tensor) -> Tensor:
    """A weight of length 1 at which the mean gradient vanishes."""
    gradient = grad(lambda p: _losses(p, images, labels).mean())
    theta: Tensor = torch.randn(
        N_CLASSES * images.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    theta /= theta.norm()
    for _ in range(150):
        theta = theta - 0.1 * gradient(theta)
        theta /= theta.norm()
    return theta


def _run(
    theta: Tensor, images: Tensor, labels: Tensor, hyper: Hyper, batch: int, n_steps: int, every: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Growth of |θ|² under batches drawn with replacement, measured and predicted, every few steps."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(theta.clone())
    symmetry = Scale("weight", [Part("weight", axis=None)])
    optimizer = SGD([("weight", weight)], lr=hyper.lr, momentum=hyper.momentum, symmetries=[symmetry])
    charges, rates = [], []
    for step in range(n_steps + 1):
        if step % every == 0:
            _, factor = theory.noise(lambda p: _losses(p, images, labels), weight.detach())
            charges.append(float(optimizer.readout()["weight"].charge))
            rates.append(hyper.duration / batch * float(factor.square().sum()) / (1.0 - hyper.momentum) ** 2)
        drawn = torch.randint(len(images), (batch,), generator=generator)
        optimizer.zero_grad()
        _losses(weight, images[drawn], labels[drawn]).mean().backward()
        optimizer.step()
    charge, rate = np.array(charges), np.array(rates)
    gained = 0.5 * every * hyper.duration * (rate[1:] + rate[:-1])  # between two rows
    return charge / charge[0] - 1.0, np.concatenate([[0.0], gained.cumsum()]) / charge[0]


def claims(data: Data) -> list[Claim]:
    """The noise makes |θ|² grow as Itô's formula says, in proportion to 1/S, and momentum amplifies it."""
    found = []
    for name in SETTINGS:
        beta, batches = float(data[f"{name}/momentum"]), data[f"{name}/batch"]
        growth, noise = data[f"{name}/growth"][-1], data[f"{name}/noise"][-1]
        for batch, ratio in zip(batches, growth / noise, strict=True):
            text = f"β = {beta:g}, S = {batch:g}: growth of |θ|², of ∫ (T/S) tr GGᵀ/(1−β)² dt"
            found.append(Claim(text, float(ratio), 0.9, 1.1))
        found.append(Claim(f"β = {beta:g}: growth goes as S^p, p", slope(batches, growth), -1.1, -0.9))
    return found
