"""Laws of matrices, claimed: a rescale whose units may also be mixed becomes a Balance, which holds in every entry."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from noetherperf.checks.groups import groups_of
from noetherperf.detect.probe import Probe
from noetherperf.measure.defect import Numbers, floored, mean_square, relative_defect
from noetherperf.symmetry import Balance, Rescale, Symmetry

__all__ = ["balances_of"]

N_BATCHES = 2


def balances_of(
    symmetries: Sequence[Symmetry], mixing: Mapping[str, int], probe: Probe, n_losses: int, tolerance: float
) -> dict[str, tuple[Balance, float]]:
    """Of each rescale that is the diagonal of a law of matrices, the whole law, and its largest relative defect.

    Blocks are runs of as many neighbouring units as mix with each other. Every entry is tested on parameters and
    batches that it was not found with.

    Args:
        symmetries: Those that hold.
        mixing: How many units mix, by the rescale's name (`mixing_units`).
        probe: Source of gradients.
        n_losses: How many losses of each batch test it.
        tolerance: The largest relative defect of an entry.

    Returns:
        By the rescale's name.
    """
    shapes = {name: p.shape for name, p in probe.parameters.items()}
    candidates = {
        symmetry.name: candidate
        for symmetry in symmetries
        if isinstance(symmetry, Rescale) and (candidate := _candidate(symmetry, mixing.get(symmetry.name, 1), shapes))
    }
    groups = {name: groups_of(balance, shapes) for name, balance in candidates.items()}
    ones = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}
    n_elements = {name: of.sq_norm(ones) for name, of in groups.items()}
    largest = dict.fromkeys(candidates, 0.0)
    for _ in range(N_BATCHES if candidates else 0):
        probe.redraw()
        for found in probe.gradients(n_losses):
            values = {name: p.detach() for name, p in probe.parameters.items()}
            gradients = {name: found.get(name, torch.zeros_like(p)) for name, p in values.items()}
            usual = mean_square(
                np.array([float(g.square().sum()) for g in gradients.values()]),
                np.array([g.numel() for g in gradients.values()]),
            )
            for name, of in groups.items():
                sq_gradient: Numbers = floored(of.sq_norm(gradients), n_elements[name], usual)
                defect = relative_defect(of.along(gradients, values), sq_gradient, of.sq_generator(values))
                largest[name] = float(np.maximum(largest[name], defect.max()))  # NaN stays
    return {name: (candidates[name], defect) for name, defect in largest.items() if defect <= tolerance}


def _candidate(rescale: Rescale, n: int, shapes: Mapping[str, torch.Size]) -> Balance | None:
    """The Balance of a rescale's parts whose units mix in blocks of n; None if there is none."""
    part = rescale.parts[0]
    n_units = part.n_groups(shapes[part.parameter])
    if n < 2 or n_units % n or any(abs(part.weight) != 1.0 or part.offset for part in rescale.parts):
        return None
    size = None if n == n_units else n
    return Balance(rescale.name.replace("->", "<->"), rescale.inward, rescale.outward, size=size)
