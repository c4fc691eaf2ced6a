"""Figure: loss, gradient field and generator field of two-parameter components with each symmetry."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.func import grad, jacrev, vmap

from noetherperf.figures.claims import Claim, Data
from noetherperf.figures.components import COMPONENTS

__all__ = ["claims", "compute"]

REACH = 2.0
N_FINE, N_ARROWS = 160, 6


def compute(quick: bool) -> Data:
    """Losses on a fine grid; gradients, generators and the Hessian constraint's defect on a coarse one.

    Arrays, for each kind: /axis [fine]; /loss and /charge [fine, fine], rows are y; /points, /gradient and /generator
    [n, 2]; /hessian_defect [n], |Hψ + (∂ψ)ᵀg| / (|H||ψ|).
    """
    data: dict[str, NDArray[np.float64]] = {}
    for component in COMPONENTS:
        fine = torch.linspace(-REACH, REACH, N_FINE // 4 if quick else N_FINE, dtype=torch.float64)
        grid = torch.stack(torch.meshgrid(fine, fine, indexing="xy"), -1)
        coarse = torch.linspace(-0.84 * REACH, 0.84 * REACH, N_ARROWS, dtype=torch.float64)
        points = torch.stack(torch.meshgrid(coarse, coarse, indexing="xy"), -1).reshape(-1, 2)
        gradient = vmap(grad(component.loss))(points)
        generator = vmap(component.generator)(points)
        curvature = vmap(jacrev(grad(component.loss)))(points)
        curved = torch.einsum("nij,nj->ni", curvature, generator)
        turned = gradient @ component.generator_rate
        left = (curved + turned).norm(dim=1) / (curvature.flatten(1).norm(dim=1) * generator.norm(dim=1))
        arrays = {
            "axis": fine,
            "loss": vmap(vmap(component.loss))(grid),
            "charge": component.charge(grid),
            "points": points,
            "gradient": gradient,
            "generator": generator,
            "hessian_defect": left,
        }
        data |= {f"{component.kind}/{name}": array.numpy() for name, array in arrays.items()}
    return data


def claims(data: Data) -> list[Claim]:
    """Gradients are orthogonal to generators, and Hessians obey their constraint, to rounding at all points."""
    found = []
    for component in COMPONENTS:
        kind = component.kind
        g, psi = data[f"{kind}/gradient"], data[f"{kind}/generator"]
        cosine = np.abs((g * psi).sum(1)) / (np.linalg.norm(g, axis=1) * np.linalg.norm(psi, axis=1))
        found.append(Claim(f"{kind}: largest |cos(g, ψ)|", float(cosine.max()), high=1e-13))
        defect = float(data[f"{kind}/hessian_defect"].max())
        found.append(Claim(f"{kind}: largest relative defect of Hψ + (∂ψ)ᵀg = 0", defect, high=1e-12))
    return found
