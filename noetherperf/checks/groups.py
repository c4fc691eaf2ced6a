"""The groups of a symmetry in vectors over all parameters of a model: a generator for each, and sums over it.

With one charge for each group A, the generator is C_A θ (1 in the place of θ for a translation), C_A = diag(c_j). For a
Balance, there is one generator for each entry [i, j] of each block, with the units' rows W₁ and W₂ (`Balance.units`):

    ψ_ij(W)      row i of W₁ gets W₁[j], and row j of W₂ gets −W₂[i]
    its drift    row j of W₁ gets g₁[i], and row i of W₂ gets −g₂[j]        (∂ψ_ij/∂W)ᵀ g
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from noetherperf.checks.derivatives import Vector
from noetherperf.measure.defect import Numbers
from noetherperf.symmetry import Balance, Part, Symmetry

__all__ = ["Groups", "groups_of"]


def groups_of(symmetry: Symmetry, shapes: Mapping[str, torch.Size]) -> "Groups":
    """The groups of a symmetry in a model of these shapes."""
    return Entries(symmetry, shapes) if isinstance(symmetry, Balance) else Groups(symmetry, shapes)


class Groups:
    """The groups of a symmetry with one charge each, in a model of these shapes."""

    def __init__(self, symmetry: Symmetry, shapes: Mapping[str, torch.Size]) -> None:
        self.symmetry = symmetry
        self.n_groups = symmetry.parts[0].n_groups(shapes[symmetry.parts[0].parameter])

    def along(self, a: Vector, b: Vector) -> Numbers:
        """⟨a, ψ_A(b)⟩ of every group, [n groups], float64."""
        return self._total(1, a, b)

    def sq_norm(self, a: Vector) -> Numbers:
        """|a_A|², over the elements that the generator moves."""
        return self._total(0, a, a)

    def sq_generator(self, b: Vector) -> Numbers:
        """|ψ_A(b)|²."""
        return self._total(2, b, b)

    def sq_drift(self, g: Vector) -> Numbers:
        """|(∂ψ_A/∂θ)ᵀ g|²."""
        return self._total(2, g, g)

    def _total(self, power: int, a: Vector, b: Vector) -> Numbers:
        """Σ_parts c^power ⟨a, b⟩."""
        of_parts = [
            part.weight**power * torch.linalg.vecdot(*(part.grouped(x[part.parameter]).double() for x in (a, b))).cpu()
            for part in self.symmetry.parts
        ]
        return np.asarray(torch.stack(of_parts).sum(0).numpy())

    def add_generator(self, to: Vector, group: int, b: Vector) -> None:
        """Add ψ_A(b) to a vector, in place."""
        for part in self.symmetry.parts:
            _add(part, to[part.parameter], group, b[part.parameter], group)

    def add_drift(self, to: Vector, group: int, g: Vector) -> None:
        """Add (∂ψ_A/∂θ)ᵀ g to a vector, in place."""
        self.add_generator(to, group, g)


class Entries(Groups):
    """The entries of a Balance, block by block and row by row."""

    symmetry: Balance

    def __init__(self, symmetry: Balance, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(symmetry, shapes)
        self._n = symmetry.size or self.n_groups
        self.n_groups *= self._n

    def along(self, a: Vector, b: Vector) -> Numbers:
        products = []
        for part in self.symmetry.parts:
            of_a, of_b = (self.symmetry.units(part, x[part.parameter]).double() for x in (a, b))
            products.append(of_a @ of_b.mT if part.weight > 0 else -(of_b @ of_a.mT))
        return _flat(torch.stack(products).sum(0))

    def _rows(self, a: Vector) -> tuple[Tensor, Tensor]:
        """|row|² of W₁ and of W₂, [blocks, n]."""
        of_sides = []
        for side in (self.symmetry.inward, self.symmetry.outward):
            units = [self.symmetry.units(part, a[part.parameter]).double() for part in side]
            of_sides.append(torch.stack([x.square().sum(-1) for x in units]).sum(0))
        inward, outward = of_sides
        return inward, outward

    def sq_norm(self, a: Vector) -> Numbers:
        inward, outward = self._rows(a)
        return _flat(inward[:, :, None] + outward[:, None, :])

    def sq_generator(self, b: Vector) -> Numbers:
        inward, outward = self._rows(b)
        return _flat(inward[:, None, :] + outward[:, :, None])

    def sq_drift(self, g: Vector) -> Numbers:
        return self.sq_norm(g)

    def _units(self, group: int) -> tuple[int, int]:
        """The two units of an entry."""
        row, j = divmod(group, self._n)
        return row, row - row % self._n + j

    def add_generator(self, to: Vector, group: int, b: Vector) -> None:
        self._add_units(to, *self._units(group), b)

    def add_drift(self, to: Vector, group: int, g: Vector) -> None:
        i, j = self._units(group)
        self._add_units(to, j, i, g)

    def _add_units(self, to: Vector, i: int, j: int, b: Vector) -> None:
        for part in self.symmetry.parts:
            at, of = (i, j) if part.weight > 0 else (j, i)
            _add(part, to[part.parameter], at, b[part.parameter], of)


def _add(part: Part, to: Tensor, group: int, values: Tensor, of: int) -> None:
    """Add a part's weight times the elements of group `of` to those of another group, in place."""
    if part.axis is None:
        to += part.weight * values
        return
    indices = part.gather(torch.arange(to.shape[part.axis], device=to.device))
    to.index_add_(part.axis, indices[group], part.weight * values.index_select(part.axis, indices[of]))


def _flat(matrices: Tensor) -> Numbers:
    return np.asarray(matrices.flatten().cpu().numpy())
