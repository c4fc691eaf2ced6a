"""Every claim put to the test on parameters and batches that it was not found with."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from noetherperf.detect.mixes import mixing_units
from noetherperf.detect.probe import Probe
from noetherperf.measure.defect import Numbers, floored, mean_square, relative_defect
from noetherperf.symmetry import Symmetry

__all__ = ["Verified", "verified"]

N_BATCHES = 2


class Verified(NamedTuple):
    """What fresh gradients tell of each symmetry, by name.

    Attributes:
        defects: The largest |⟨g, ψ⟩| / (|g_A| |ψ_A|).
        mixing: How many units mix, where it is the diagonal of a law of matrices.
    """

    defects: Mapping[str, float]
    mixing: Mapping[str, int]


def verified(symmetries: Sequence[Symmetry], probe: Probe, n_losses: int) -> Verified:
    """Test the symmetries on a few losses of each of some batches, with parameters drawn for each."""
    defects = dict.fromkeys((symmetry.name for symmetry in symmetries), 0.0)
    mixing: Mapping[str, int] | None = None
    for _ in range(N_BATCHES):
        probe.redraw()
        for gradients in probe.gradients(n_losses):
            usual = _mean_square(probe.parameters, gradients)
            for symmetry in symmetries:
                defect = _relative_defect(symmetry, probe.parameters, gradients, usual)
                defects[symmetry.name] = float(np.maximum(defects[symmetry.name], defect.max()))  # NaN stays
            if mixing is None:
                mixing = mixing_units(symmetries, probe.parameters, gradients)
    return Verified(defects, mixing or {})


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
        n = g.shape[1]
        if symmetry.law == "translation":
            dot, sq_psi = g.sum(1), torch.full_like(g[:, 0], n)
        else:
            psi = part.grouped(p) + part.offset
            dot, sq_psi = torch.linalg.vecdot(g, psi), torch.linalg.vecdot(psi, psi)
        terms.append(torch.stack([part.weight * dot, torch.linalg.vecdot(g, g), part.weight**2 * sq_psi]))
        n_elements += n
    defect, sq_gradient, sq_generator = torch.stack(terms).sum(0).cpu().numpy()
    return relative_defect(defect, floored(sq_gradient, np.full(len(defect), float(n_elements)), usual), sq_generator)
