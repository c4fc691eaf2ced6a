"""Laws of matrices: where units are read linearly, any invertible mix of them does nothing, not only a rescale of each.

No Part can express them beyond the diagonal, which the search claims. They are measured, so that they can be told.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from noetherperf.symmetry import Symmetry

__all__ = ["mixing_units"]

ZERO = 1e-9  # of the sum of |terms|
ALIVE = 1e-6  # of the usual size: what a dead unit leaves tells nothing
MOST_UNITS = 4096  # whose products with each other are taken
FIRST_UNITS = 8


def mixing_units(
    symmetries: Sequence[Symmetry], parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]
) -> dict[str, int]:
    """Name of each rescale that also holds for mixes of units -> how many units mix, as these gradients have it.

    With W the rows of a unit's writers and V those of its readers, W → A W and V → A⁻ᵀ V do nothing if, entry by entry,

        Σ g_W Wᵀ = (Σ g_V Vᵀ)ᵀ      [units, units],

    of which the rescale is the diagonal. In attention the matrix has a block for each head.
    """
    found: dict[str, int] = {}
    for symmetry in symmetries:
        first = symmetry.parts[0]
        if symmetry.kind != "rescale":
            continue
        n_units = first.n_groups(tuple(parameters[first.parameter].shape))
        if not 1 < n_units <= MOST_UNITS:
            continue
        # A few rows of the matrix tell of most laws that a unit mixes with none.
        for rows in (slice(FIRST_UNITS), slice(None)):
            n_mixing = _n_mixing(symmetry, parameters, gradients, rows)
            if n_mixing <= 1:
                break
        if n_mixing > 1:
            found[symmetry.name] = n_mixing
    return found


def _n_mixing(
    symmetry: Symmetry, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], rows: slice
) -> int:
    """The fewest units that one of these units mixes with, itself included; 1 where it is only rescaled."""
    totals, sizes = [], []
    for part in symmetry.parts:
        if part.parameter not in gradients:
            continue
        g, w = part.grouped(gradients[part.parameter]), part.grouped(parameters[part.parameter].detach()) + part.offset
        left, right = (g, w) if part.weight > 0 else (w, g)
        totals.append(part.weight * (left[rows] @ right.T))
        sizes.append(abs(part.weight) * torch.outer(left[rows].norm(dim=1), right.norm(dim=1)))
    if not totals:
        return 1
    total, size = torch.stack(totals).sum(0), torch.stack(sizes).sum(0)
    vanishes = (total.abs() <= ZERO * size) & (size > ALIVE * size.median())
    return int(vanishes.sum(1).min())
