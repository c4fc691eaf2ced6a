"""Figure: gradient flow, modified loss and modified flow against the discrete steps, on a quadratic."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data, slope
from noetherperf.rules.sgd import Hyper

__all__ = ["MODELS", "claims", "compute"]

MODELS: dict[str, Callable[..., Tensor]] = {
    "gradient flow": theory.gradient_flow,
    "modified loss": theory.modified_loss,
    "modified flow": theory.modified_flow,
}
#: Settings of the paths in the picture, without and with momentum.
SHOWN = {"plain": Hyper(lr=0.48), "momentum": Hyper(lr=0.1, momentum=0.8)}
TIME = {"plain": 9.6, "momentum": 3.0}
ERROR_TIME = 1.2
CURVATURES = (1.0, 0.3)
TURN = math.pi / 6
START = (1.8, 0.75)  # along the axes of the quadratic


def quadratic(theta: Tensor) -> Tensor:
    """½ Σ hᵢ xᵢ² in axes rotated by 30°."""
    c, s = math.cos(TURN), math.sin(TURN)
    x, y = c * theta[0] + s * theta[1], c * theta[1] - s * theta[0]
    return 0.5 * (CURVATURES[0] * x * x + CURVATURES[1] * y * y)


def compute(quick: bool) -> Data:
    """Paths of steps and models, and each model's largest distance from the steps over learning rates.

    Arrays, for "plain" and "momentum": /steps [n, 2] and /lr [n lr]; for each model, /<model> [n times, 2],
    /<model>/at_steps [n, 2] and /<model>/error [n lr]. Of the landscape: axis and loss.
    """
    c, s = math.cos(TURN), math.sin(TURN)
    start = torch.tensor([c * START[0] - s * START[1], s * START[0] + c * START[1]], dtype=torch.float64)
    axis = np.linspace(-1.6, 2.0, 40 if quick else 120)
    landscape = [[float(quadratic(torch.tensor([x, y], dtype=torch.float64))) for x in axis] for y in axis]
    data: dict[str, np.ndarray] = {"axis": axis, "loss": np.array(landscape)}
    lrs = 0.04 * 0.5 ** np.arange(3 if quick else 5)
    for name, hyper in SHOWN.items():
        n_steps = round(TIME[name] / hyper.lr)
        data[f"{name}/steps"] = theory.descent(quadratic, start, n_steps, hyper).numpy()
        data[f"{name}/lr"] = lrs
        for model, solve in MODELS.items():
            n_fine = 8 * n_steps
            path = solve(quadratic, start, np.linspace(0.0, TIME[name], n_fine + 1), hyper)
            data[f"{name}/{model}"] = path.numpy()
            data[f"{name}/{model}/at_steps"] = path[::8].numpy()
            data[f"{name}/{model}/error"] = np.array([_error(solve, hyper, lr, start) for lr in lrs])
    return data


def _error(solve: Callable[..., Tensor], shown: Hyper, lr: float, start: Tensor) -> float:
    """Largest distance between model and steps in the second half of a fixed time, when the buffer is warm."""
    hyper = Hyper(lr=lr, momentum=0.4 if shown.momentum else 0.0)
    n_steps = round(ERROR_TIME / lr)
    path = solve(quadratic, start, lr * np.arange(n_steps + 1), hyper)
    distance = (path - theory.descent(quadratic, start, n_steps, hyper)).norm(dim=1)
    return float(distance[n_steps // 2 :].max())


def claims(data: Data) -> list[Claim]:
    """The order of each model's error in η; the modified models stay closer to the steps than gradient flow."""
    orders = {
        "plain": {"gradient flow": 1, "modified loss": 2, "modified flow": 2},
        "momentum": {"gradient flow": 1, "modified loss": 1, "modified flow": 2},
    }
    found = []
    for name, expected in orders.items():
        for model, order in expected.items():
            power = slope(data[f"{name}/lr"][1:], data[f"{name}/{model}/error"][1:])
            found.append(Claim(f"{name}: error of {model} grows as η^p, p", power, order - 0.2, order + 0.2))
    for name, models in (("plain", ("modified loss", "modified flow")), ("momentum", ("modified flow",))):
        worst = {
            model: np.linalg.norm(data[f"{name}/{model}/at_steps"] - data[f"{name}/steps"], axis=1).max()
            for model in MODELS
        }
        for model in models:
            ratio = float(worst["gradient flow"] / worst[model])
            found.append(Claim(f"{name}: gradient flow's distance from the steps over that of {model}", ratio, low=2.0))
    return found
