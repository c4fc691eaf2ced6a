"""Every claim put to the test on parameters and batches that it was not found with."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from noetherperf.checks.groups import groups_of
from noetherperf.detect.probe import Probe
from noetherperf.measure.defect import floored, mean_square, relative_defect
from noetherperf.symmetry import Symmetry

__all__ = ["defects_of"]

N_BATCHES = 2


def defects_of(symmetries: Sequence[Symmetry], probe: Probe, n_losses: int) -> dict[str, float]:
    """The largest |⟨g, ψ⟩| / (|g_A| |ψ_A|) of each symmetry, by name, over its groups or the entries of its matrices.

    It is taken over a few losses of each of some batches, with parameters drawn for each.
    """
    shapes = {name: p.shape for name, p in probe.parameters.items()}
    groups = {symmetry.name: groups_of(symmetry, shapes) for symmetry in symmetries}
    zero, one = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (0.0, 1.0))
    ones = {name: one.to(p.device).expand_as(p) for name, p in probe.parameters.items()}
    n_elements = {name: of.sq_norm(ones) for name, of in groups.items()}
    largest = dict.fromkeys(groups, 0.0)
    for _ in range(N_BATCHES):
        probe.redraw()
        values = {name: p.detach() for name, p in probe.parameters.items()}
        for gradients in probe.gradients(n_losses):
            for name, p in values.items():  # into the same, which is emptied before the next
                gradients.setdefault(name, zero.to(p.device).expand_as(p))
            usual = _mean_square(gradients)
            for name, of in groups.items():
                base = ones if of.symmetry.law == "translation" else _counted(of.symmetry, values)  # ψ_A = C_A base
                sq_gradient = floored(of.sq_norm(gradients), n_elements[name], usual)
                defect = relative_defect(of.along(gradients, base), sq_gradient, of.sq_generator(base))
                largest[name] = float(np.maximum(largest[name], defect.max()))  # NaN stays
    return largest


def _counted(symmetry: Symmetry, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a norm counts of its parts' parameters: from their offsets on."""
    offsets = {part.parameter: part.offset for part in symmetry.parts}
    return {name: values[name] + offset if offset else values[name] for name, offset in offsets.items()}


def _mean_square(gradients: Mapping[str, Tensor]) -> float:
    """Of one element of the whole gradient; one that no loss reaches is zero."""
    sq_norms = [float(g.square().sum()) for g in gradients.values()]
    return mean_square(np.array(sq_norms), np.array([g.numel() for g in gradients.values()]))
