"""Figure: gradient flow stays on a line, a circle and a hyperbola; training leaves them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf import theory
from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.components import COMPONENTS, Component
from noetherperf.rules.sgd import Hyper

__all__ = ["MOTIONS", "claims", "compute"]

#: The motions of the parameters, in the order of drawing.
MOTIONS = ("flow", "decay", "momentum", "noise", "steps")

STARTS = {"translation": (-1.5, 0.9), "scale": (-0.75, -0.8), "rescale": (1.25, -0.95)}
TIME = 6.0
DECAY = 0.15
LR = {"translation": 1.5, "scale": 0.75, "rescale": 0.45}  # of the steps; large, to make them visible
BETA, LR_MOMENTUM = 0.6, 0.12
BATCH, LR_NOISE = 1, 0.15


def compute(quick: bool) -> Data:
    """θ and the charge over time under each motion.

    Arrays, for each kind and motion: kind/motion/time [n], kind/motion/path [n, 2], kind/motion/charge [n]. For each
    kind: kind/steps/law [n], the discrete law's charge of the finite steps.
    """
    data: dict[str, NDArray[Any]] = {}
    times = np.linspace(0.0, TIME, 61 if quick else 241)
    for component in COMPONENTS:
        start = torch.tensor(STARTS[component.kind], dtype=torch.float64)
        lr = LR[component.kind]
        n_steps, n_noise = round(TIME / lr), round(TIME / LR_NOISE)
        generator = torch.Generator().manual_seed(4)
        paths = {
            "flow": (times, theory.gradient_flow(component.loss, start, times)),
            "decay": (
                times,
                theory.gradient_flow(component.loss, start, times, Hyper(lr=0.0, weight_decay=DECAY)),
            ),
            "momentum": (
                times,
                theory.modified_flow(component.loss, start, times, Hyper(lr=LR_MOMENTUM, momentum=BETA)),
            ),
            "noise": (
                LR_NOISE * np.arange(n_noise + 1),
                theory.stochastic_flow(
                    component.losses, start, n_noise, Hyper(lr=LR_NOISE), BATCH, substeps=4, generator=generator
                ),
            ),
            "steps": (lr * np.arange(n_steps + 1), theory.descent(component.loss, start, n_steps, Hyper(lr=lr))),
        }
        for motion in MOTIONS:
            at, path = paths[motion]
            stem = f"{component.kind}/{motion}"
            data |= {f"{stem}/time": at, f"{stem}/path": path.numpy(), f"{stem}/charge": component.charge(path).numpy()}
        data[f"{component.kind}/steps/law"] = _discrete_law(component, paths["steps"][1])
    return data


def _discrete_law(component: Component, path: Tensor) -> NDArray[np.float64]:
    """A step does not change a sum. It adds η²|g|² = |Δθ|² to |θ|², and Δθ₁² − Δθ₂² to θ₁² − θ₂²."""
    moved = path.diff(dim=0)
    growth = moved.new_zeros(len(moved)) if component.kind == "translation" else component.charge(moved)
    law: NDArray[np.float64] = (component.charge(path[:1]) + torch.cat([growth.new_zeros(1), growth.cumsum(0)])).numpy()
    return law


def claims(data: Data) -> list[Claim]:
    """Motions that conserve do so to rounding or the integrator's tolerance; the others change the charge visibly."""

    def change(kind: str, motion: str) -> float:
        charge = data[f"{kind}/{motion}/charge"]
        return float(np.abs(charge - charge[0]).max())

    def grown(kind: str, motion: str) -> float:
        charge = data[f"{kind}/{motion}/charge"]
        return float(charge[-1] - charge[0])

    found = [
        Claim(
            f"{component.kind}: largest change of the charge under gradient flow",
            change(component.kind, "flow"),
            high=1e-9,
        )
        for component in COMPONENTS
    ]
    for kind, kappa in (("translation", 1.0), ("scale", 2.0), ("rescale", 2.0)):
        charge, time = data[f"{kind}/decay/charge"], data[f"{kind}/decay/time"]
        error = np.abs(charge - charge[0] * np.exp(-kappa * DECAY * time)).max()
        found.append(
            Claim(f"{kind}: weight decay, largest distance from e^(−{kappa:g}λt) Q(0)", float(error), high=1e-8)
        )
    for motion, bound in (("momentum", 1e-9), ("noise", 1e-12), ("steps", 1e-12)):
        found.append(Claim(f"translation: largest change under {motion}", change("translation", motion), high=bound))
    for component in COMPONENTS:
        charge, law = (data[f"{component.kind}/steps/{name}"] for name in ("charge", "law"))
        error = float(np.abs(charge - law).max())
        found.append(Claim(f"{component.kind}: finite steps, distance from the discrete law", error, high=1e-13))
    for motion in ("momentum", "noise", "steps"):
        found.append(Claim(f"scale: growth of |θ|² under {motion}", grown("scale", motion), low=0.05))
        found.append(Claim(f"rescale: largest change under {motion}", change("rescale", motion), low=0.01))
    return found
