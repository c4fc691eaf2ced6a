"""Sums of ⟨g, 1⟩ and ⟨θ, g⟩ for each index of each axis, over random parameters and batches.

All that the search asks of the model is in them: a symmetry is a linear relation between such sums that holds for every
loss.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

from noetherperf.detect.parts import Axis, group_axes
from noetherperf.detect.probe import Probe
from noetherperf.detect.relations import Matrix
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["SPARE", "Sums"]

ZERO = 1e-7  # of |g_A| |ψ_A|: rounding, and what an eps leaves where activations are small; a claim is verified
DEAD = 1e-11  # of the module's root mean square, and of the largest anywhere: a gradient that is only rounding
SMALLEST = 1e-2
LEAST = 1e-4  # of the largest root mean square anywhere: no module's counts as less
N_COTANGENTS = 4
N_LOSSES = 32
SPARE = 8  # more rows than columns
LARGE = 20_000_000  # parameters: a backward pass takes long
N_LOSSES_LARGE = 8
MOST_LOSSES = 1024
WORK = 50_000_000  # parameters × losses that are spent where the first losses are too few
MEMORY = 25_000_000  # numbers that the sums may take


@dataclass
class _AxisSums:
    """Per index of one axis and per loss, [losses, length]: ⟨g, 1⟩ and ⟨θ, g⟩ by law, and the squares |g|², |θ|²."""

    products: dict[Law, Tensor]
    sq_g: Tensor
    sq_p: Tensor
    n_elements: int  # of one index


class Sums:
    """Collects sums from a probe.

    Args:
        probe: Source of gradients.
        progress: Called with the fraction done.

    Attributes:
        shapes: Shape of each parameter.
        modules: The module that owns each parameter.
        axes: The axes whose indices may be groups.
        reached: The parameters that have a gradient.
        large: Whether a backward pass takes so long that few are made.
    """

    def __init__(self, probe: Probe, progress: Callable[[float], None]) -> None:
        self.probe, self._progress = probe, progress
        self.shapes = {name: tuple(p.shape) for name, p in probe.parameters.items()}
        self.modules = {name: probe.model.get_submodule(name.rpartition(".")[0]) for name in self.shapes}
        self.axes = tuple(group_axes(self.shapes))
        self._axes_of: dict[str, list[int | None]] = {name: [None] for name in self.shapes}  # None: the whole tensor
        for name, axis in self.axes:
            self._axes_of[name].append(axis)
        self.reached: set[str] = set()
        n_parameters = sum(map(prod, self.shapes.values()))
        self.large = n_parameters > LARGE
        if self.large:  # their axes are long, so that few losses give enough rows
            self._shrink(2)
        lengths = sum(self.length(axis) for axis in self.axes)
        first = N_LOSSES_LARGE if self.large else N_LOSSES
        self._most_losses = max(first, min(MOST_LOSSES, WORK // n_parameters, MEMORY // (4 * max(lengths, 1))))
        size = max(p.numel() for p in probe.parameters.values())
        self._scratch = torch.empty(size, dtype=torch.float64, device=next(iter(probe.parameters.values())).device)
        self._rows: dict[tuple[str, int | None], list[Tensor]] = {
            (name, axis): [] for name, axes in self._axes_of.items() for axis in axes
        }
        self._rms: dict[str, list[float]] = {name: [] for name in self.shapes}
        self._sums: dict[tuple[str, int | None], _AxisSums] = {}
        self._idle: dict[tuple[Part, Law], bool] = {}
        self._n_batches = 0
        self.n_losses = 0
        self._collect(first)

    def length(self, axis: Axis) -> int:
        return self.shapes[axis[0]][axis[1]]

    def is_kernel(self, axis: Axis) -> bool:
        """Whether an axis holds places of a convolution's kernel, which belong to no unit."""
        return axis[1] > 1 and isinstance(self.modules[axis[0]], nn.modules.conv._ConvNd)

    def at_least(self, n_losses: int) -> bool:
        """Take more losses if there are fewer; False where that would take too long."""
        if n_losses > self._most_losses:
            return False
        if n_losses > self.n_losses:
            self._collect(n_losses)
        return n_losses <= self.n_losses

    def _shrink(self, batch: int) -> None:
        """Draw smaller batches, unless something normalises over them."""
        norms = (m for m in self.probe.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        if self.probe.batch is not None and not any(norms):
            self.probe.batch = batch

    def _collect(self, n_losses: int) -> None:
        while self.n_losses < n_losses:
            if self._n_batches % 2 == 0 or not self.n_losses:
                self.probe.redraw()
                self._sq_p = {
                    name: self._sums_of(name, p.detach(), p.detach()) for name, p in self.probe.parameters.items()
                }
            before = self.n_losses
            for gradients in self.probe.gradients(N_COTANGENTS):
                self.n_losses += 1
                for name, p in self.probe.parameters.items():
                    g = gradients.get(name)
                    if g is not None:
                        self.reached.add(name)
                    self._add(name, p.detach(), torch.zeros_like(p) if g is None else g)
            if self.n_losses == before:  # nothing depends on the parameters
                break
            self._n_batches += 1
            self._progress(0.5 * min(1.0, self.n_losses / n_losses))
        self._idle.clear()
        for (name, axis), rows in self._rows.items():
            length = 1 if axis is None else self.shapes[name][axis]
            values = torch.stack(rows, 1) if rows else torch.zeros(4, 0, length, dtype=torch.float64, device="cpu")
            products = {Law.TRANSLATION: values[0], Law.NORM: values[1]}
            self._sums[name, axis] = _AxisSums(products, values[2], values[3], prod(self.shapes[name]) // length)
        rms = torch.tensor(list(self._rms.values()), dtype=torch.float64, device="cpu")
        self._top = rms.amax(0) if rms.numel() else torch.zeros(0, dtype=torch.float64, device="cpu")
        self._usual = _usual(
            {name: torch.tensor(x, dtype=torch.float64, device="cpu") for name, x in self._rms.items()}
        )

    def _sums_of(self, name: str, a: Tensor, b: Tensor) -> dict[int | None, Tensor]:
        """Sums of the product over all axes but one, by that axis; None: the sum of all."""
        product = torch.mul(a, b, out=self._scratch[: a.numel()].view(a.shape))
        return {axis: _sum_but(product, axis) for axis in self._axes_of[name]}

    def _add(self, name: str, p: Tensor, g: Tensor) -> None:
        dot_pg, sq_g = self._sums_of(name, p, g), self._sums_of(name, g, g)
        for axis in self._axes_of[name]:
            sums = [_sum_but(g, axis), dot_pg[axis], sq_g[axis], self._sq_p[name][axis]]
            self._rows[name, axis].append(torch.stack(sums).cpu())
        self._rms[name].append(float((sq_g[None] / g.numel()).sqrt()))

    # ---- sums of parts ----------------------------------------------------------------------------------------------

    def value(self, part: Part, law: Law, n_losses: int | None = None) -> Tensor:
        """⟨g, ψ⟩ of each group, [losses, n_groups]."""
        return part.gather(self._sums[part.parameter, part.axis].products[law][:n_losses]).sum(-1)

    def _mean_sq_g(self, part: Part, n_losses: int | None = None) -> tuple[Tensor, int]:
        """|g|² of each group, [losses, n_groups], and its number of elements."""
        sums = self._sums[part.parameter, part.axis]
        sq_g = part.gather(sums.sq_g[:n_losses])
        return sq_g.sum(-1), sq_g.shape[-1] * sums.n_elements

    def alive(self, part: Part, n_losses: int | None = None) -> Tensor:
        """Whether each group has a gradient that is more than rounding, [losses, n_groups]."""
        sq_g, n_elements = self._mean_sq_g(part, n_losses)
        least = DEAD * torch.maximum(self._usual[part.parameter], SMALLEST * self._top)
        return (sq_g / n_elements).sqrt() > least[:n_losses, None]

    def rounding(self, part: Part) -> Tensor:
        """Whether each group ever has a gradient at all, be it rounding, [n_groups]."""
        return (self._mean_sq_g(part)[0] > 0).any(0)

    def _is_zero(self, part: Part, law: Law, n_losses: int | None = None) -> Tensor:
        """Whether each group's ⟨g, ψ⟩ is zero up to rounding, [losses, n_groups]."""
        sq_g, n_elements = self._mean_sq_g(part, n_losses)
        sq_p = part.gather(self._sums[part.parameter, part.axis].sq_p[:n_losses]).sum(-1)
        sq_psi = sq_p if law == Law.NORM else torch.full_like(sq_g, n_elements)
        return self.value(part, law, n_losses).abs() <= ZERO * (sq_g * sq_psi).sqrt()

    def vanishes(self, part: Part, law: Law) -> bool:
        """Whether the sums of every group vanish although there is a gradient."""
        if bool((self.alive(part, 1) & ~self._is_zero(part, law, 1)).any()):  # as a rule, one loss tells
            return False
        alive = self.alive(part)
        if int(alive.any(0).sum()) < min(alive.shape[1], 4):
            return False
        return bool(self._is_zero(part, law)[alive].all())

    def is_idle(self, part: Part, law: Law) -> bool:
        """Whether a part's sums vanish or have no gradient, so that a relation may contain any multiple of it."""
        if (part, law) not in self._idle:
            live = bool((self.alive(part, 1) & ~self._is_zero(part, law, 1)).any())  # as a rule, one loss tells
            self._idle[part, law] = not live and not bool((self.alive(part) & ~self._is_zero(part, law)).any())
        return self._idle[part, law]

    # ---- sums of whole tensors and slices ---------------------------------------------------------------------------

    def totals(self, parts: Sequence[Part], law: Law) -> Matrix:
        """⟨g, ψ⟩ of parts of one group, [losses, parts], where possible for more losses than there are parts."""
        wanted = len(parts) + SPARE
        if self.large:
            self._shrink(1)
            self.probe.redraw()
            if law == Law.NORM and not callable(self.probe.loss):
                # Where an operation has no forward derivative, the losses are differentiated backward, one by one.
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    return self.probe.tangents(parts, wanted, self._progress)
        if law == Law.NORM or self.at_least(wanted):
            rows = [self.value(part, law).flatten() for part in parts]
            missing = wanted - self.n_losses
            more = self._more_losses(parts, law, missing) if missing > 0 else []
            return np.vstack([torch.stack(rows, 1).numpy(), *more])
        return np.stack([self.value(part, law).flatten().numpy() for part in parts], 1)

    def _more_losses(self, parts: Sequence[Part], law: Law, n: int) -> list[Matrix]:
        rows: list[Matrix] = []
        while len(rows) < n:
            before = len(rows)
            if before % (2 * N_COTANGENTS) == 0:
                self.probe.redraw()
            for gradients in self.probe.gradients(N_COTANGENTS):
                row = np.zeros(len(parts))
                for i, part in enumerate(parts):
                    if (g := gradients.get(part.parameter)) is not None:
                        p, g = part.grouped(self.probe.parameters[part.parameter].detach()), part.grouped(g)
                        row[i] = float((p * g).sum() if law == Law.NORM else g.sum())
                rows.append(row)
            if len(rows) == before:
                break
            self._progress(0.5 + 0.4 * min(1.0, len(rows) / n))
        return rows


def _usual(rms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The usual size of a gradient for each parameter and loss: the largest root mean square in its module, but not
    less than LEAST of the largest anywhere."""
    top = torch.stack(list(rms.values())).amax(0) if rms else torch.zeros(0, dtype=torch.float64, device="cpu")
    best: dict[str, Tensor] = {}
    for name, x in rms.items():
        module = name.rpartition(".")[0]
        best[module] = torch.maximum(best.get(module, x), x)
    return {name: torch.maximum(best[name.rpartition(".")[0]], LEAST * top) for name in rms}


def _sum_but(x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return x.sum().reshape(1)
    return x.sum([i for i in range(x.ndim) if i != axis]) if x.ndim > 1 else x.clone()
