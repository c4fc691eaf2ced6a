"""Every claim put to the test on parameters and batches that it was not found with."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from noetherperf.detect.probe import Probe
from noetherperf.measure.defect import Numbers, floored, mean_square, relative_defect
from noetherperf.symmetry import Symmetry

__all__ = ["largest_defects"]

N_BATCHES = 2


def largest_defects(symmetries: Sequence[Symmetry], probe: Probe, n_losses: int) -> dict[str, float]:
    """The largest |⟨g, ψ⟩| / (|g_A| |ψ_A|) of each symmetry over fresh parameters and batches."""
    largest = dict.fromkeys((symmetry.name for symmetry in symmetries), 0.0)
    for _ in range(N_BATCHES):
        probe.redraw()
        for gradients in probe.gradients(n_losses):
            usual = _mean_square(probe.parameters, gradients)
            for symmetry in symmetries:
                defect = _relative_defect(symmetry, probe.parameters, gradients, usual)
                largest[symmetry.name] = float(np.maximum(largest[symmetry.name], defect.max()))  # NaN stays
    return largest


def _mean_square(parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> float:
    """Of one element of the whole gradient; one that no loss reaches is zero."""
    sq_norms = [float(gradients[name].square().sum()) if name in gradients else 0.0 for name in parameters]
    return mean_square(np.array(sq_norms), np.array([p.numel() for p in parameters.values()]))


def _relative_defect(
    symmetry: Symmetry, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], usual: float
) -> Numbers:
    """Of each group, [n groups]."""
    terms = []
    n_elements = 0
    for part in symmetry.parts:
        p = parameters[part.parameter].detach()
        g = gradients.get(part.parameter)
        g = part.grouped(torch.zeros_like(p) if g is None else g)
        psi = part.weight * (torch.ones_like(g) if symmetry.law == "translation" else part.grouped(p) + part.offset)
        terms.append(torch.stack([(g * psi).sum(1), g.square().sum(1), psi.square().sum(1)]))
        n_elements += g.shape[1]
    defect, sq_gradient, sq_generator = torch.stack(terms).sum(0).cpu().numpy()
    return relative_defect(defect, floored(sq_gradient, np.full(len(defect), float(n_elements)), usual), sq_generator)
