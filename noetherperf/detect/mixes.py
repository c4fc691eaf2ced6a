"""Laws of matrices: where units are read linearly, any invertible mix of them does nothing, not only a rescale of each.

No Part can express them beyond the diagonal, which the search claims. They are measured, so that they can be told.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from noetherperf.detect.probe import Probe
from noetherperf.symmetry import Symmetry

__all__ = ["mixing_units"]

ZERO = 1e-9  # of the sum of |terms|
ALIVE = 1e-6  # of the usual size: what a dead unit leaves tells nothing
MOST_UNITS = 4096  # whose products with each other are taken


def mixing_units(symmetries: Sequence[Symmetry], probe: Probe) -> dict[str, int]:
    """Name of each rescale that also holds for mixes of units -> how many units mix; measured on one fresh batch.

    With W the rows of a unit's writers and V those of its readers, W → A W and V → A⁻ᵀ V do nothing if, entry by entry,

        Σ g_W Wᵀ = (Σ g_V Vᵀ)ᵀ      [units, units],

    of which the rescale is the diagonal. In attention the matrix has a block for each head.
    """
    probe.redraw()
    found: dict[str, int] = {}
    for gradients in probe.gradients(1):
        for symmetry in symmetries:
            if symmetry.kind == "rescale" and (n := _n_mixing(symmetry, probe.parameters, gradients)) > 1:
                found[symmetry.name] = n
    return found


def _n_mixing(symmetry: Symmetry, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> int:
    """The fewest units that a unit mixes with, itself included; 1 where it is only rescaled."""
    first = symmetry.parts[0]
    if not 1 < first.n_groups(tuple(parameters[first.parameter].shape)) <= MOST_UNITS:
        return 1
    totals, sizes = [], []
    for part in symmetry.parts:
        if part.parameter not in gradients:
            continue
        g, w = part.grouped(gradients[part.parameter]), part.grouped(parameters[part.parameter].detach()) + part.offset
        total, size = part.weight * (g @ w.T), abs(part.weight) * torch.outer(g.norm(dim=1), w.norm(dim=1))
        totals.append(total if part.weight > 0 else total.T)
        sizes.append(size if part.weight > 0 else size.T)
    if not totals:
        return 1
    total, size = torch.stack(totals).sum(0), torch.stack(sizes).sum(0)
    vanishes = (total.abs() <= ZERO * size) & (size > ALIVE * size.median())
    return int(vanishes.sum(1).min())
