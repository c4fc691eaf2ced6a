"""The search: which sums of ⟨θ, g⟩ and of ⟨g, 1⟩ over groups of parameters vanish for every loss.

For every parameter and axis the products are summed for each index, batch after batch (sums.py). A part whose sums
vanish by themselves is a scale or translation symmetry. Of the others, all parts with n groups are the columns of a
matrix with groups × losses as rows; its null space holds the relations between them. Parts come from the finest to the
coarsest (parts.py): whole axes, slices and folds of them, groups of indices a stride apart, and at last whole tensors
(tensors.py). What has a relation is not tried again (claims.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from noetherperf.detect.claims import Claims, Relation
from noetherperf.detect.parts import Axis, foldings, is_grouped, joined, pieces
from noetherperf.detect.probe import Probe
from noetherperf.detect.relations import Matrix, independent, integer_relations, null_space
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.detect.tensors import relate_tensors
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["Search"]

MAX_ROWS = 2000
LARGEST_FOLD = 64  # of a group inside a neighbourhood: channels before GroupNorm, query heads of a key head
N_INVENTIONS = 64


class Search:
    """Finds the relations between the sums of a probe's gradients.

    Args:
        probe: Source of gradients.
        progress: Called with the fraction done.

    Attributes:
        sums: What was measured.
        fractional: Parameter name -> a relation that it has, but not in small integers.
    """

    def __init__(self, probe: Probe, progress: Callable[[float], None]) -> None:
        self.probe = probe
        self.sums = Sums(probe, progress)
        self.shapes = self.sums.shapes
        self.fractional: dict[str, str] = {}
        self._grouped = {name for name, module in self.sums.modules.items() if is_grouped(module)}
        self._claims = Claims(self.shapes, self.sums.axes, self._grouped)
        self._inventions: dict[Axis, Tensor] = {}

    def run(self) -> list[Relation]:
        """All relations, the finest first."""
        self._without_gradient()
        for law in Law:
            self._single(law)
            self._levels(law)
            self._folded(law)
        self._whole_translations()
        self._neighbourhoods()
        relate_tensors(self.sums, self._claims)
        return self._claims.relations

    def _pieces(self, axis: Axis) -> list[Part]:
        return pieces(axis, self.sums.length(axis), self.probe.shapes)

    # ---- single parts that vanish -----------------------------------------------------------------------------------

    def _without_gradient(self) -> None:
        """Elements of vectors that a later operation cancels, so that they have no gradient at all."""
        for name, shape in self.shapes.items():
            axis = (name, 0)
            if len(shape) != 1 or axis not in self.sums.axes or name not in self.sums.reached:
                continue
            alive = self.sums.alive(Part(name, 0)).any(0)
            neighbours = [
                self.sums.alive(Part(*other)).any(0)
                for other in self.sums.axes
                if other[0].rpartition(".")[0] == name.rpartition(".")[0]
                and other[0] != name
                and self.sums.length(other) == shape[0]
            ]
            if not neighbours:
                continue
            cancelled = ~alive & torch.stack(neighbours).any(0)
            for piece in self._pieces(axis):
                inside = torch.from_numpy(self._claims.mask(piece))
                if (
                    self._claims.is_free(piece, Law.TRANSLATION)
                    and not bool(alive[inside].any())
                    and 2 * int(cancelled[inside].sum()) >= int(inside.sum())
                ):
                    self._claims.claim(Law.TRANSLATION, [piece], without_gradient=True)
                    self._claims.take([piece], Law.NORM)

    def _single(self, law: Law) -> None:
        """Axes and slices whose every index vanishes by itself."""
        for axis in self.sums.axes:
            for piece in self._pieces(axis):
                if self._claims.is_free(piece, law) and self.sums.vanishes(piece, law):
                    self._claims.claim(law, [piece])

    def _folded(self, law: Law) -> None:
        """Blocks of neighbouring indices that vanish together, as before GroupNorm; the whole tensor at last."""
        for axis in self.sums.axes:
            for piece in self._pieces(axis):
                if not self._claims.is_free(piece, law):
                    continue
                start, stop = piece.bounds(self.shapes[axis[0]])
                for fold in range(2, stop - start + (piece.period is not None)):
                    if (stop - start) % fold == 0:
                        part = replace(piece, fold=fold)
                        if self.sums.vanishes(part, law):
                            self._claims.claim(law, [part])
                            break

    def _whole_translations(self) -> None:
        """Tensors, or slices of one, whose elements move together; `relate_tensors` finds the norms of tensors."""
        law = Law.TRANSLATION
        for name, shape in self.shapes.items():
            axes = [axis for axis in self.sums.axes if axis[0] == name]
            whole = self.sums.whole(name)
            if whole is None or not all(self._claims.is_free(Part(*axis), law) for axis in axes):
                continue
            if self.sums.vanishes(whole, law):
                self._claims.claim(law, [Part(name, None)])
                self._claims.take([whole], law)
                continue
            for piece in self._pieces(axes[0])[1:]:
                start, stop = piece.bounds(shape)
                part = replace(piece, fold=stop - start)
                if piece.period is None and self._claims.is_free(part, law) and self.sums.vanishes(part, law):
                    self._claims.claim(law, [part])

    # ---- relations between parts ------------------------------------------------------------------------------------

    def _levels(self, law: Law) -> None:
        """Relations between parts with as many groups as some axis has indices, from many to few."""
        counts = {self.sums.length(axis) for axis in self.sums.axes}
        counts |= {int(getattr(self.sums.modules[name], "groups", 1)) for name in self._grouped}
        for n in sorted(counts, reverse=True):
            plain = [Part(*axis) for axis in self.sums.axes if self.sums.length(axis) == n]
            plain = [part for part in plain if self._claims.is_free(part, law)]
            others = [part for axis in self.sums.axes for part in self._with_groups(n, axis, law)]
            if law == Law.TRANSLATION or not self._solve(plain + others, law):
                self._solve(plain, law)

    def _with_groups(self, n: int, axis: Axis, law: Law) -> Iterator[Part]:
        """Parts with n groups of a longer axis: slices, folds, every n-th index."""
        length = self.sums.length(axis)
        if length <= n:
            return
        name, number = axis
        if number == 0 and len(self.shapes[name]) > 1 and name in self._grouped:
            module = self.sums.modules[name]
            if length % n == 0 and n in (module.groups, module.in_channels, module.out_channels):
                yield Part(name, number, fold=length // n)
                return
        for piece in self._pieces(axis):
            if piece.n_groups(self.shapes[name]) == n and self._claims.is_free(piece, law):
                yield piece
        whole = Part(name, number)
        if self._claims.is_free(whole, law):
            yield from foldings(whole, self.shapes[name], n, set())

    def _neighbourhoods(self) -> None:
        """Relations inside a module that contains other modules, at numbers of groups that no axis has.

        Rotary pairs and grouped queries sum over indices a stride apart; groups of channels before GroupNorm over
        neighbours. Strides and numbers of groups are sizes that the forward pass showed, or attributes of modules.
        """
        sizes = {size for size in self.probe.shapes.sizes if size > 1} | {
            value
            for module in self.probe.model.modules()
            for value in vars(module).values()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1
        }
        prefixes = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in self.shapes)
        for prefix in sorted(prefixes, key=lambda prefix: -prefix.count(".") - bool(prefix)):
            inside = [a for a in self.sums.axes if not prefix or a[0].startswith(prefix + ".")]
            inside = [a for a in inside if a[0].removeprefix(prefix).strip(".").count(".") <= 1]
            free = [p for a in inside for p in self._pieces(a) if self._claims.is_free(p, Law.NORM)]
            lengths = {p.n_groups(self.shapes[p.parameter]) for p in free}
            counts = {
                x
                for x in sizes | {a * b for a in sizes for b in sizes}
                if any(x < n <= LARGEST_FOLD * x and n % x == 0 for n in lengths)
            }
            for n in sorted(counts, reverse=True):
                columns = [
                    part
                    for piece in free
                    if self._claims.is_free(piece, Law.NORM)
                    for part in foldings(piece, self.shapes[piece.parameter], n, sizes)
                ]
                if len(columns) > 1:
                    self._solve(columns, Law.NORM)

    def _solve(self, columns: list[Part], law: Law) -> bool:
        """Claim the relations between these parts; False where there are too few rows to decide."""
        columns = [part for part in dict.fromkeys(columns) if not self.sums.is_idle(part, law)]
        if not columns:
            return True
        n = columns[0].n_groups(self.shapes[columns[0].parameter])
        n_losses = self.sums.n_losses
        some = np.random.default_rng(0).permutation(n)[: max(1, MAX_ROWS // max(n_losses, 1))]
        if n_losses * len(some) < len(columns) + SPARE:
            return False
        n_inventions = 2 * (len(columns) + SPARE) // len(some) + 1
        inventions = [self._invented(part)[:n_inventions, some] for part in columns]
        columns = [columns[i] for i in independent(_matrix(inventions))]
        matrix = _matrix([self.sums.value(part, law)[:, some] for part in columns])
        present = np.flatnonzero(np.linalg.norm(matrix, axis=0))
        columns = [columns[i] for i in present]
        if not columns:
            return True
        relations, rest = integer_relations(null_space(matrix[:, present]))
        for coefficients in relations:
            parts = [replace(part, weight=float(c)) for part, c in zip(columns, coefficients, strict=True) if c]
            parts = joined(parts, self.shapes)
            if self._claims.overlap(parts):
                continue
            if law == Law.TRANSLATION:
                self._claims.add(law, parts)
            else:
                self._claims.claim(law, parts)
        for block in rest:
            for row in block:
                terms = [f"{c:+.4g} {columns[i].parameter}[{columns[i].axis}]" for i, c in enumerate(row) if c]
                for i in np.flatnonzero(row):
                    self.fractional.setdefault(columns[i].parameter, " ".join(terms))
        return True

    def _invented(self, part: Part) -> Tensor:
        """Random sums of a part, as if no relation held, [N_INVENTIONS, n groups].

        Parts that overlap depend on each other even then, as do parts that differ only by indices without a gradient.
        """
        assert part.axis is not None
        axis = (part.parameter, part.axis)
        if axis not in self._inventions:
            generator = np.random.default_rng([len(part.parameter), *part.parameter.encode(), part.axis])
            alive = self.sums.alive(Part(*axis)).any(0)
            values = torch.from_numpy(generator.normal(size=(N_INVENTIONS, self.sums.length(axis))))
            self._inventions[axis] = values * alive
        return part.gather(self._inventions[axis]).sum(-1)


def _matrix(values: list[Tensor]) -> Matrix:
    """Columns of a matrix from tensors [losses, groups]."""
    return np.stack([x.flatten().numpy() for x in values], axis=1)
