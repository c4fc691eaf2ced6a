"""Which translations are the loss's: a constant added to all logits, which a softmax in the loss takes out."""

from collections.abc import Iterable

import torch

from noetherperf.detect.claims import Relation
from noetherperf.detect.probe import Probe
from noetherperf.rules.law import Law

__all__ = ["of_the_loss"]

SEEN = 1e-7  # of |g_A| √n: more than rounding


def of_the_loss(relations: Iterable[Relation], probe: Probe) -> set[Relation]:
    """The translations of one part that hold for cross entropy, and not for a loss that sees such a constant."""
    alone = [r for r in relations if r.law == Law.TRANSLATION and len(r.parts) == 1 and not r.without_gradient]
    if probe.loss != "cross_entropy" or not alone:
        return set()
    found = set()
    for gradients in probe.gradients(1, constants=True):
        for relation in alone:
            (part,) = relation.parts
            g = part.grouped(gradients[part.parameter]) if part.parameter in gradients else torch.zeros(1, 1)
            largest = torch.linalg.vector_norm(g, dim=1) * g.shape[1] ** 0.5
            if bool((g.sum(1).abs() > SEEN * largest).any()):
                found.add(relation)
    return found
