"""Which units mix: where units are read linearly, any invertible mix of them does nothing, not only a rescale of each.

The search finds the diagonal of such a law of matrices, a rescale. Some of its rows tell how many units mix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from noetherperf.detect.probe import Probe
from noetherperf.symmetry import Rescale, Symmetry

__all__ = ["mixing_units"]

ZERO = 1e-9  # of the sum of |terms|
ALIVE = 1e-6  # of the usual size: what a dead unit leaves tells nothing
N_ROWS = 64  # of a matrix, from everywhere in it, which tell of all


def mixing_units(symmetries: Sequence[Symmetry], probe: Probe) -> dict[str, int]:
    """Name of each rescale that also holds for mixes of units -> how many units mix, as one gradient has it.

    With W the rows of a unit's writers and V those of its readers, W → A W and V → A⁻ᵀ V do nothing if, entry by entry,

        Σ g_W Wᵀ = (Σ g_V Vᵀ)ᵀ      [units, units],

    of which the rescale is the diagonal. In attention the matrix has a block for each head.
    """
    found: dict[str, int] = {}
    probe.redraw()
    for gradients in probe.gradients(1):
        rescales = [symmetry for symmetry in symmetries if isinstance(symmetry, Rescale)]
        found |= {symmetry.name: _n_mixing(symmetry, probe.parameters, gradients) for symmetry in rescales}
    return {name: n for name, n in found.items() if n > 1}


def _n_mixing(symmetry: Symmetry, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> int:
    """The fewest units that one of these units mixes with, itself included; 1 where it is only rescaled."""
    totals, sizes = [], []
    for part in symmetry.parts:
        if part.parameter not in gradients:
            continue
        g, w = part.grouped(gradients[part.parameter]), part.grouped(parameters[part.parameter].detach()) + part.offset
        rows = torch.linspace(0, len(g) - 1, min(len(g), N_ROWS), device=g.device).round().long()
        left, right = (g[rows], w) if part.weight > 0 else (w[rows], g)
        totals.append(part.weight * (left @ right.T))
        sizes.append(abs(part.weight) * torch.outer(left.norm(dim=1), right.norm(dim=1)))
    if not totals:
        return 1
    total, size = torch.stack(totals).sum(0), torch.stack(sizes).sum(0)
    vanishes = (total.abs() <= ZERO * size) & (size > ALIVE * size.median())
    return int(vanishes.sum(1).min())
