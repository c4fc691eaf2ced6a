"""Which units mix: where units are read linearly, any invertible mix of them does nothing, not only a rescale of each.

The search finds the diagonal of such a law of matrices, a rescale. Some of its rows tell how many units mix.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from noetherperf.detect.probe import Probe
from noetherperf.symmetry import Rescale, Symmetry

__all__ = ["Mix", "mixing_units"]

ZERO = 1e-9  # of the sum of |terms|
ALIVE = 1e-6  # of the usual size: what a dead unit leaves tells nothing
N_ROWS = 64  # of a matrix of many units, from everywhere in it, which tell of all where blocks are alike
MANY = 512  # units; of fewer all rows are taken
MOST_BATCHES = 8  # that agree where blocks differ: behind a ReLU, units mix on some by chance


class Mix(NamedTuple):
    """Units that mix with each other: n neighbours each, from start to stop; with a period, one in each period."""

    start: int
    stop: int
    n: int
    period: int | None = None


def mixing_units(symmetries: Sequence[Symmetry], probe: Probe, large: bool) -> dict[str, list[Mix]]:
    """Name of each rescale that also holds for mixes of units -> which units mix, as some batches have it.

    With W the rows of a unit's writers and V those of its readers, W → A W and V → A⁻ᵀ V do nothing if, entry by entry,

        Σ g_W Wᵀ = (Σ g_V Vᵀ)ᵀ      [units, units],

    of which the rescale is the diagonal. In attention the matrix has a block for each head.

    Args:
        symmetries: What was found.
        probe: Source of gradients.
        large: Whether a backward pass takes so long that blocks which differ are not looked for.
    """
    shapes = {name: tuple(p.shape) for name, p in probe.parameters.items()}
    waiting = {symmetry.name: symmetry for symmetry in symmetries if isinstance(symmetry, Rescale)}
    mixing: dict[str, Tensor] = {}
    found: dict[str, list[Mix]] = {}
    for _ in range(1 if large else MOST_BATCHES):
        probe.redraw()
        for gradients in probe.gradients(1):
            for name, rescale in waiting.items():
                rows = _rows(rescale.parts[0].n_groups(shapes[rescale.parts[0].parameter]))
                now = _mixing(rescale, probe.parameters, gradients, rows)
                mixing[name] = now & mixing.get(name, now)
        waiting = {name: one for name, one in waiting.items() if bool((mixing[name].sum(1) > 1).any())}
        found = {name: mixes for name in waiting if (mixes := _alike(mixing[name]))}
        if len(found) == len(waiting):
            return found
    of_few = [name for name in waiting if not large and name not in found and mixing[name].shape[1] <= MANY]
    return found | {name: mixes for name in of_few if (mixes := list(_classes(mixing[name])))}


def _rows(n_units: int) -> Tensor:
    """The units whose mixes with all are looked at."""
    return torch.linspace(0, n_units - 1, n_units if n_units <= MANY else N_ROWS, device="cpu").round().long()


def _alike(mixing: Tensor) -> list[Mix]:
    """All units in blocks of equal size; none where blocks differ."""
    n, n_units = int(mixing[0].sum()), mixing.shape[1]
    if n < 2 or n_units % n:
        return []
    units = torch.arange(n_units, device="cpu")
    blocks = units // n == (_rows(n_units) // n)[:, None]
    return [Mix(0, n_units, n)] if torch.equal(mixing, blocks) else []


def _mixing(
    symmetry: Symmetry, parameters: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], rows: Tensor
) -> Tensor:
    """Whether each of some units mixes with each unit, [rows, units]; all do with themselves."""
    totals, sizes = [], []
    for part in symmetry.parts:
        if part.parameter not in gradients:
            continue
        g, w = part.grouped(gradients[part.parameter]), part.grouped(parameters[part.parameter].detach()) + part.offset
        left, right = (g[rows.to(g.device)], w) if part.weight > 0 else (w[rows.to(g.device)], g)
        totals.append((part.weight * (left @ right.T)).cpu())
        sizes.append((abs(part.weight) * torch.outer(left.norm(dim=1), right.norm(dim=1))).cpu())
    if not totals:
        return torch.zeros(len(rows), 0, dtype=torch.bool, device="cpu")
    total, size = torch.stack(totals).sum(0), torch.stack(sizes).sum(0)
    return (total.abs() <= ZERO * size) & (size > ALIVE * size.median())


def _classes(mixing: Tensor) -> Iterator[Mix]:
    """The units that mix, of a whole matrix whose blocks differ, [units, units]."""
    n_units, at = len(mixing), 0
    waiting: Mix | None = None  # may be longer
    while at < n_units:
        own = mixing[at].nonzero().flatten().tolist()
        n = 1  # neighbours from here on
        while at + n in own and bool(mixing[at : at + n + 1, at : at + n + 1].all()):
            n += 1
        apart = own[1] - own[0] if len(own) > 1 else 1
        if n > 1 and waiting is not None and (waiting.stop, waiting.n) == (at, n):
            waiting = waiting._replace(stop=at + n)
        elif n > 1:
            if waiting is not None:
                yield waiting
            waiting = Mix(at, at + n, n)
        elif apart > 1 and n_units % apart == 0 and own == list(range(at, n_units, apart)):
            yield Mix(at, at + 1, len(own), apart)
        at += n
    if waiting is not None:
        yield waiting
