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

ZERO = 1e-9  # of |g_A| |ψ_A|
DEAD = 1e-11  # of the module's root mean square: a gradient that is only rounding
LEAST = 1e-4  # of the largest root mean square anywhere: no module's counts as less
N_COTANGENTS = 4
SPARE = 8  # more rows than columns
LARGE = 20_000_000  # parameters: a backward pass takes long


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
        self.axes = tuple(group_axes(self.shapes, self.modules))
        self._axes_of = {name: [axis for other, axis in self.axes if other == name] for name in self.shapes}
        self.reached: set[str] = set()
        self._whole: dict[str, list[float]] = {name: [] for name in self.shapes}
        self.large = sum(map(prod, self.shapes.values())) > LARGE
        self._n_batches = 8
        if self.large:  # their axes are long, so that few losses give enough rows
            self._n_batches = 2
            self._shrink(2)
        self._collect()

    def length(self, axis: Axis) -> int:
        return self.shapes[axis[0]][axis[1]]

    @property
    def n_losses(self) -> int:
        return len(next(iter(self._sums.values())).sq_g)

    def _shrink(self, batch: int) -> None:
        """Draw smaller batches, unless something normalises over them."""
        norms = (m for m in self.probe.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        if self.probe.batch is not None and not any(norms):
            self.probe.batch = batch

    def _collect(self) -> None:
        rows: dict[Axis, list[Tensor]] = {axis: [] for axis in self.axes}
        rms: dict[str, list[float]] = {name: [] for name in self.shapes}
        size = max(p.numel() for p in self.probe.parameters.values())
        self._scratch = torch.empty(size, dtype=torch.float64, device=next(iter(self.probe.parameters.values())).device)
        for batch in range(self._n_batches):
            if batch % 2 == 0:
                self.probe.redraw()
                sq_p = {name: self._sums_of(name, p.detach(), p.detach()) for name, p in self.probe.parameters.items()}
            for gradients in self.probe.gradients(N_COTANGENTS):
                for name, p in self.probe.parameters.items():
                    g = gradients.get(name)
                    if g is not None:
                        self.reached.add(name)
                    self._add(rows, name, p.detach(), torch.zeros_like(p) if g is None else g, sq_p[name])
                    rms[name].append(0.0 if g is None else float(g.square().mean().sqrt()))
            self._progress(0.5 * (batch + 1) / self._n_batches)
        self._sums: dict[Axis, _AxisSums] = {}
        for axis, collected in rows.items():
            shape = self.shapes[axis[0]]
            values = (
                torch.stack(collected, 1)
                if collected
                else torch.zeros(4, 0, shape[axis[1]], dtype=torch.float64, device="cpu")
            )
            products = {Law.TRANSLATION: values[0], Law.NORM: values[1]}
            self._sums[axis] = _AxisSums(products, values[2], values[3], prod(shape) // shape[axis[1]])
        self._usual = _usual({name: torch.tensor(x, dtype=torch.float64, device="cpu") for name, x in rms.items()})

    def _sums_of(self, name: str, a: Tensor, b: Tensor) -> dict[int | None, Tensor]:
        """Sums of the product over all axes but one, by that axis; None: the sum of all."""
        product = torch.mul(a, b, out=self._scratch[: a.numel()].view(a.shape))
        sums: dict[int | None, Tensor] = {axis: _sum_but(product, axis) for axis in self._axes_of[name]}
        return sums | {None: product.sum()}

    def _add(
        self, rows: dict[Axis, list[Tensor]], name: str, p: Tensor, g: Tensor, sq_p: dict[int | None, Tensor]
    ) -> None:
        dot_pg, sq_g = self._sums_of(name, p, g), self._sums_of(name, g, g)
        self._whole[name].append(float(dot_pg[None]))
        for axis in self._axes_of[name]:
            sums = [_sum_but(g, axis), dot_pg[axis], sq_g[axis], sq_p[axis]]
            rows[name, axis].append(torch.stack(sums).cpu())

    # ---- sums of parts ----------------------------------------------------------------------------------------------

    def value(self, part: Part, law: Law) -> Tensor:
        """⟨g, ψ⟩ of each group, [losses, n_groups]."""
        assert part.axis is not None
        return part.gather(self._sums[part.parameter, part.axis].products[law]).sum(-1)

    def alive(self, part: Part) -> Tensor:
        """Whether each group has a gradient that is more than rounding, [losses, n_groups]."""
        assert part.axis is not None
        sums = self._sums[part.parameter, part.axis]
        sq_g = part.gather(sums.sq_g).sum(-1)
        return (sq_g / (part.fold * sums.n_elements)).sqrt() > DEAD * self._usual[part.parameter][:, None]

    def _is_zero(self, part: Part, law: Law) -> Tensor:
        """Whether each group's ⟨g, ψ⟩ is zero up to rounding, [losses, n_groups]."""
        assert part.axis is not None
        sums = self._sums[part.parameter, part.axis]
        sq_g = part.gather(sums.sq_g).sum(-1)
        n_elements = part.fold * sums.n_elements
        sq_psi = part.gather(sums.sq_p).sum(-1) if law == Law.NORM else torch.full_like(sq_g, n_elements)
        return self.value(part, law).abs() <= ZERO * (sq_g * sq_psi).sqrt()

    def vanishes(self, part: Part, law: Law) -> bool:
        """Whether the sums of every group vanish although there is a gradient."""
        alive = self.alive(part)
        if int(alive.any(0).sum()) < min(alive.shape[1], 4):
            return False
        return bool(self._is_zero(part, law)[alive].all())

    def is_idle(self, part: Part, law: Law) -> bool:
        """Whether a part's sums vanish or have no gradient, so that a relation may contain any multiple of it."""
        return not bool((self.alive(part) & ~self._is_zero(part, law)).any())

    # ---- sums of whole tensors --------------------------------------------------------------------------------------

    def whole(self, name: str) -> Part | None:
        """A tensor as one group of one of its axes; None where no axis has groups."""
        axes = self._axes_of[name]
        return Part(name, axes[0], fold=self.shapes[name][axes[0]]) if axes else None

    def whole_products(self, names: Sequence[str]) -> Matrix:
        """⟨θ, g⟩ of these whole tensors, [losses, tensors], for more losses than there are tensors."""
        if self.large:
            self._shrink(1)
        self.probe.redraw()
        if self.large and not callable(self.probe.loss):
            # Where an operation has no forward derivative, the losses are differentiated backward, one by one.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                return self.probe.tangents(names, len(names) + SPARE)
        self._more_losses(names)
        return np.array([self._whole[name] for name in names]).T

    def _more_losses(self, names: Sequence[str]) -> None:
        """A whole tensor gives one number for each loss, so there must be more losses than tensors."""
        have = len(self._whole[names[0]])
        wanted = len(names) + SPARE
        start = have
        while have < wanted:
            before = have
            for gradients in self.probe.gradients(N_COTANGENTS):
                for name in names:
                    p, g = self.probe.parameters[name].detach(), gradients.get(name)
                    self._whole[name].append(0.0 if g is None else float(torch.dot(p.flatten(), g.flatten())))
                have += 1
            if have == before:
                return
            self._progress(0.5 + 0.4 * (have - start) / max(1, wanted - start))


def _usual(rms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The usual size of a gradient for each parameter and loss: the largest root mean square in its module, but not
    less than LEAST of the largest anywhere."""
    top = torch.stack(list(rms.values())).amax(0) if rms else torch.zeros(0, dtype=torch.float64, device="cpu")
    best: dict[str, Tensor] = {}
    for name, x in rms.items():
        module = name.rpartition(".")[0]
        best[module] = torch.maximum(best.get(module, x), x)
    return {name: torch.maximum(best[name.rpartition(".")[0]], LEAST * top) for name in rms}


def _sum_but(x: Tensor, axis: int) -> Tensor:
    return x.sum([i for i in range(x.ndim) if i != axis]) if x.ndim > 1 else x.clone()
