"""The search: which sums of ⟨θ, g⟩ and of ⟨g, 1⟩ over groups of parameters vanish on every batch.

A symmetry is a linear relation between generator products that holds on every batch. For every parameter and axis the
products are summed for each index, batch after batch. A part whose sums vanish by themselves is a scale or translation
symmetry; for the others, all parts with one number of groups n are the columns of a matrix whose rows are groups ×
batches, and its null space is the list of relations. Parts come from the finest to the coarsest: whole axes, slices
and folds of them, groups of indices a stride apart, at last whole tensors. An index that has a relation is not asked
again for a coarser one, which would only be a consequence.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from noetherperf.detect.probe import Probe
from noetherperf.detect.relations import Matrix, independent, integer_relations, null_space, reduced
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["Relation", "Search"]

ZERO = 1e-9  # of |g_A| |ψ_A|
DEAD = 1e-11  # of the gradient per element in the same module: no gradient but rounding
N_COTANGENTS = 4
MAX_ROWS = 2000
LARGEST_FOLD = 64  # of a group inside a neighbourhood: channels before GroupNorm, query heads of a key head
SPARE = 8  # rows more than columns
N_INVENTIONS = 64
LARGE = 20_000_000  # parameters: a backward pass takes long

Axis = tuple[str, int]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Relation:
    """Σ c ⟨g, ψ⟩ = 0 for each group, over these parts with their coefficients."""

    law: Law
    parts: tuple[Part, ...]
    without_gradient: bool = False


@dataclass
class _Sums:
    """Per index of one axis and per loss, [losses, length]: ⟨g, 1⟩ and ⟨θ, g⟩ by law, and the squares |g|², |θ|²."""

    products: dict[Law, Tensor]
    sq_g: Tensor
    sq_p: Tensor
    n_elements: int  # behind one index


class Search:
    """Collects sums from a probe and finds relations in them.

    Args:
        probe: Where gradients come from.
        progress: Called with how much is done, of 1, as it goes on.
    """

    def __init__(self, probe: Probe, progress: Callable[[float], None]) -> None:
        self.probe, self.progress = probe, progress
        self.shapes = {name: tuple(p.shape) for name, p in probe.parameters.items()}
        self.modules = {name: probe.model.get_submodule(name.rpartition(".")[0]) for name in self.shapes}
        self.relations: list[Relation] = []
        self.fractional: dict[str, str] = {}  # parameters with a relation that is not in small integers, and which
        self.taken = {law: {axis: np.zeros(self._length(axis), bool) for axis in self._axes()} for law in Law}
        n_parameters = sum(map(prod, self.shapes.values()))
        self.n_batches = 8
        self.large = n_parameters > LARGE
        if self.large:  # their axes are long, so that few losses give rows enough
            self.n_batches = 2
            self._shrink(2)
        self._whole: dict[str, list[float]] = {}
        self._axes_of = {name: [axis for other, axis in self._axes() if other == name] for name in self.shapes}
        self._masks: dict[Part, Mask] = {}
        self._inventions: dict[Axis, Tensor] = {}
        self._collect()

    def run(self) -> list[Relation]:
        """Everything there is, the finest first."""
        self.without_gradient()
        for law in Law:
            self.single(law)
            self.levels(law)
            self.folded(law)
        self.whole()
        self.neighbourhoods()
        self.tensors()
        return self.relations

    def _shrink(self, batch: int) -> None:
        """Draw smaller batches, unless something normalises over them."""
        norms = (m for m in self.probe.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
        if self.probe.batch is not None and not any(norms):
            self.probe.batch = batch

    # ---- sums -------------------------------------------------------------------------------------------------------

    def _axes(self) -> Iterator[Axis]:
        """The axes whose indices may be groups: of a kernel its channels, of others every axis."""
        for name, shape in self.shapes.items():
            kernel = isinstance(self.modules[name], nn.modules.conv._ConvNd)
            for axis, length in enumerate(shape[:2] if kernel else shape):
                if length > 1:
                    yield name, axis

    def _length(self, axis: Axis) -> int:
        return self.shapes[axis[0]][axis[1]]

    def _collect(self) -> None:
        rows: dict[Axis, list[Tensor]] = {axis: [] for axis in self._axes()}
        scales: dict[str, list[float]] = {name: [] for name in self.shapes}
        self.reached: set[str] = set()
        size = max(p.numel() for p in self.probe.parameters.values())
        self._scratch = torch.empty(size, dtype=torch.float64, device=next(iter(self.probe.parameters.values())).device)
        for batch in range(self.n_batches):
            if batch % 2 == 0:
                self.probe.redraw()
                sq_p = {name: self._sums_of(name, p.detach(), p.detach()) for name, p in self.probe.parameters.items()}
            for gradients in self.probe.gradients(N_COTANGENTS):
                for name, p in self.probe.parameters.items():
                    g = gradients.get(name)
                    if g is not None:
                        self.reached.add(name)
                    self._add(rows, name, p.detach(), torch.zeros_like(p) if g is None else g, sq_p[name])
                    scales[name].append(0.0 if g is None else float(g.square().mean().sqrt()))
            self.progress(0.5 * (batch + 1) / self.n_batches)
        self.sums: dict[Axis, _Sums] = {}
        for axis, collected in rows.items():
            shape = self.shapes[axis[0]]
            values = (
                torch.stack(collected, 1)
                if collected
                else torch.zeros(4, 0, shape[axis[1]], dtype=torch.float64, device="cpu")
            )
            products = {Law.TRANSLATION: values[0], Law.NORM: values[1]}
            self.sums[axis] = _Sums(products, values[2], values[3], prod(shape) // shape[axis[1]])
        self.scale = self._scales(
            {name: torch.tensor(x, dtype=torch.float64, device="cpu") for name, x in scales.items()}
        )

    def _sums_of(self, name: str, a: Tensor, b: Tensor) -> dict[int | None, Tensor]:
        """Sums of the product over all axes but one, by that axis; None: the sum of all."""
        product = torch.mul(a, b, out=self._scratch[: a.numel()].view(a.shape))
        sums: dict[int | None, Tensor] = {axis: _sum_but(product, axis) for axis in self._axes_of[name]}
        return sums | {None: product.sum()}

    def _add(
        self, rows: dict[Axis, list[Tensor]], name: str, p: Tensor, g: Tensor, sq_p: dict[int | None, Tensor]
    ) -> None:
        dot_pg, sq_g = self._sums_of(name, p, g), self._sums_of(name, g, g)
        self._whole.setdefault(name, []).append(float(dot_pg[None]))
        for axis in self._axes_of[name]:
            sums = [_sum_but(g, axis), dot_pg[axis], sq_g[axis], sq_p[axis]]
            rows[name, axis].append(torch.stack(sums).cpu())

    def _scales(self, rms: dict[str, Tensor]) -> dict[str, Tensor]:
        """For each parameter and loss, the size of a gradient that is none but rounding's neighbour: the largest
        root mean square in its module, but not less than 1e-4 of the largest anywhere."""
        top = torch.stack(list(rms.values())).amax(0) if rms else torch.zeros(0, dtype=torch.float64, device="cpu")
        best: dict[str, Tensor] = {}
        for name, x in rms.items():
            module = name.rpartition(".")[0]
            best[module] = torch.maximum(best.get(module, x), x)
        return {name: torch.maximum(best[name.rpartition(".")[0]], 1e-4 * top) for name in rms}

    def value(self, part: Part, law: Law) -> Tensor:
        """⟨g, ψ⟩ of each group, [losses, n_groups]."""
        assert part.axis is not None
        return part.gather(self.sums[part.parameter, part.axis].products[law]).sum(-1)

    def _size_and_life(self, part: Part, law: Law) -> tuple[Tensor, Tensor]:
        """|g_A| |ψ_A| of each group, and whether it has a gradient that is more than rounding."""
        assert part.axis is not None
        sums = self.sums[part.parameter, part.axis]
        sq_g = part.gather(sums.sq_g).sum(-1)
        n_elements = part.fold * sums.n_elements
        sq_psi = part.gather(sums.sq_p).sum(-1) if law == Law.NORM else torch.full_like(sq_g, n_elements)
        alive = (sq_g / n_elements).sqrt() > DEAD * self.scale[part.parameter][:, None]
        return (sq_g * sq_psi).sqrt(), alive

    def vanishes(self, part: Part, law: Law) -> bool:
        """Whether the sums over every group vanish though there is a gradient."""
        size, alive = self._size_and_life(part, law)
        n_groups = alive.shape[1]
        if int(alive.any(0).sum()) < min(n_groups, 4):
            return False
        return bool((self.value(part, law).abs()[alive] <= ZERO * size[alive]).all())

    # ---- parts ------------------------------------------------------------------------------------------------------

    def _mask(self, part: Part) -> Mask:
        assert part.axis is not None
        if part.fold != 1 or part.weight != 1.0:
            part = replace(part, fold=1, stride=1, weight=1.0)
        if part not in self._masks:
            length = self.shapes[part.parameter][part.axis or 0]
            self._masks[part] = np.zeros(length, bool)
            self._masks[part][part.gather(torch.arange(length, device="cpu")).flatten().numpy()] = True
        return self._masks[part]

    def _untouched(self, part: Part, law: Law) -> bool:
        assert part.axis is not None
        return not (self.taken[law][part.parameter, part.axis] & self._mask(part)).any()

    def _take(self, parts: Iterable[Part], law: Law) -> None:
        for part in parts:
            if part.axis is not None and (part.parameter, part.axis) in self.taken[law]:
                self.taken[law][part.parameter, part.axis] |= self._mask(part)

    def _claim(self, law: Law, parts: Sequence[Part], without_gradient: bool = False) -> None:
        self.relations.append(Relation(law, tuple(parts), without_gradient))
        if any(self._is_grouped(part.parameter) for part in parts):
            # Its blocks of channels and its channels in all blocks are relations of their own, both coarse.
            parts = [part for part in parts if part.fold == 1]
        self._take(parts, law)

    def _pieces(self, axis: Axis) -> list[Part]:
        """An axis as it is, the slices it may be made of, and slices that repeat; each with one index a group."""
        name, number = axis
        length = self._length(axis)
        pieces = [Part(name, number)]
        pieces += [
            Part(name, number, start=start or None, stop=stop if stop < length else None)
            for start, stop in sorted(self.probe.shapes.slices(length), key=lambda s: (s[0] - s[1], s))
        ]
        pieces += [
            Part(name, number, start=start or None, stop=stop if stop < period else None, period=period)
            for period in sorted(self.probe.shapes.periods(length))
            for start, stop in sorted(self.probe.shapes.slices(period), key=lambda s: (s[0] - s[1], s))
        ]
        return pieces

    # ---- single parts that vanish -----------------------------------------------------------------------------------

    def without_gradient(self) -> None:
        """Elements of vectors that something takes out again, so that they have no gradient at all."""
        for name, shape in self.shapes.items():
            axis = (name, 0)
            if len(shape) != 1 or axis not in self.sums or name not in self.reached:
                continue
            alive = self._size_and_life(Part(name, 0), Law.NORM)[1].any(0)
            neighbours = [
                self._size_and_life(Part(*other), Law.NORM)[1].any(0)
                for other in self.sums
                if other[0].rpartition(".")[0] == name.rpartition(".")[0]
                and other[0] != name
                and self._length(other) == shape[0]
            ]
            if not neighbours:
                continue
            idle = ~alive & torch.stack(neighbours).any(0)
            for piece in self._pieces(axis):
                inside = torch.from_numpy(self._mask(piece))
                if (
                    self._untouched(piece, Law.TRANSLATION)
                    and not bool(alive[inside].any())
                    and 2 * int(idle[inside].sum()) >= int(inside.sum())
                ):
                    self._claim(Law.TRANSLATION, [piece], without_gradient=True)
                    self._take([piece], Law.NORM)

    def single(self, law: Law) -> None:
        """Axes and slices whose every index vanishes by itself."""
        for axis in self.sums:
            for piece in self._pieces(axis):
                if self._untouched(piece, law) and self.vanishes(piece, law):
                    self._claim(law, [piece])

    def folded(self, law: Law) -> None:
        """Blocks of neighbouring indices that vanish together, as before GroupNorm; the whole tensor at last."""
        for axis in self.sums:
            for piece in self._pieces(axis):
                if not self._untouched(piece, law):
                    continue
                start, stop = piece.bounds(self.shapes[axis[0]])
                for fold in range(2, stop - start + (piece.period is not None)):
                    if (stop - start) % fold == 0:
                        part = replace(piece, fold=fold)
                        if self.vanishes(part, law):
                            self._claim(law, [part])
                            break

    def whole(self) -> None:
        """Tensors whose elements move together: translations here, norms with all tensors in `tensors`."""
        law = Law.TRANSLATION
        for name in self.shapes:
            axes = [axis for axis in self.sums if axis[0] == name]
            if axes and not any(self.taken[law][axis].any() for axis in axes):
                part = Part(*axes[0], fold=self._length(axes[0]))
                if self.vanishes(part, law):
                    self._claim(law, [Part(name, None)])
                    self._take([part], law)
                else:
                    for piece in self._pieces(axes[0])[1:]:
                        start, stop = piece.bounds(self.shapes[name])
                        part = replace(piece, fold=stop - start)
                        if piece.period is None and self._untouched(part, law) and self.vanishes(part, law):
                            self._claim(law, [part])

    # ---- relations between parts ------------------------------------------------------------------------------------

    def levels(self, law: Law) -> None:
        """Relations between parts with as many groups as some axis has indices, from many to few."""
        counts = {self._length(axis) for axis in self.sums}
        counts |= {int(getattr(self.modules[name], "groups", 1)) for name in self.shapes if self._is_grouped(name)}
        for n in sorted(counts, reverse=True):
            plain = [Part(*axis) for axis in self.sums if self._length(axis) == n]
            plain = [part for part in plain if self._untouched(part, law)]
            others = [part for axis in self.sums for part in self._made_to(n, axis, law)]
            if law == Law.TRANSLATION or not self._solve(plain + others, law):
                self._solve(plain, law)

    def _made_to(self, n: int, axis: Axis, law: Law) -> Iterator[Part]:
        """Parts of n groups that a longer axis may give: slices, folds, every n-th index."""
        length = self._length(axis)
        if length <= n:
            return
        name, number = axis
        if number == 0 and len(self.shapes[name]) > 1 and self._is_grouped(name):
            module = self.modules[name]
            if length % n == 0 and n in (module.groups, module.in_channels, module.out_channels):
                yield Part(name, number, fold=length // n)
                return
        for piece in self._pieces(axis):
            if piece.n_groups(self.shapes[name]) == n and self._untouched(piece, law):
                yield piece
        whole = Part(name, number)
        if self._untouched(whole, law):
            yield from _foldings(whole, self.shapes[name], n, set())

    def neighbourhoods(self) -> None:
        """Relations inside a module that holds other modules, at numbers of groups that no axis has.

        Rotary pairs and grouped queries sum over indices a stride apart; groups of channels before GroupNorm over
        neighbours. Strides and numbers of groups are sizes that the forward pass showed or modules have as attributes.
        """
        sizes = {size for size in self.probe.shapes.sizes if size > 1} | {
            value
            for module in self.probe.model.modules()
            for value in vars(module).values()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1
        }
        prefixes = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in self.shapes)
        for prefix in sorted(prefixes, key=lambda prefix: -prefix.count(".") - bool(prefix)):
            inside = [a for a in self.sums if not prefix or a[0].startswith(prefix + ".")]
            inside = [a for a in inside if a[0].removeprefix(prefix).strip(".").count(".") <= 1]
            pieces = [p for a in inside for p in self._pieces(a) if self._untouched(p, Law.NORM)]
            lengths = {p.n_groups(self.shapes[p.parameter]) for p in pieces}
            counts = {
                x
                for x in sizes | {a * b for a in sizes for b in sizes}
                if any(x < n <= LARGEST_FOLD * x and n % x == 0 for n in lengths)
            }
            for n in sorted(counts, reverse=True):
                columns = [
                    part
                    for piece in pieces
                    if self._untouched(piece, Law.NORM)
                    for part in _foldings(piece, self.shapes[piece.parameter], n, sizes)
                ]
                if len({part.parameter for part in columns}) > 1 or len(columns) > 1:
                    self._solve(columns, Law.NORM)

    def _solve(self, columns: list[Part], law: Law) -> bool:
        """Claim the relations between these parts; False where there are too few rows to tell."""
        columns = [part for part in dict.fromkeys(columns) if not self._idle(part, law)]
        if not columns:
            return True
        n = columns[0].n_groups(self.shapes[columns[0].parameter])
        n_losses = len(next(iter(self.sums.values())).sq_g)
        some = np.random.default_rng(0).permutation(n)[: max(1, MAX_ROWS // max(n_losses, 1))]
        if n_losses * len(some) < len(columns) + SPARE:
            return False
        n_inventions = 2 * (len(columns) + SPARE) // len(some) + 1
        inventions = [self._made_up(part)[:n_inventions, some] for part in columns]
        columns = [columns[i] for i in independent(_matrix(inventions))]
        matrix = _matrix([self.value(part, law)[:, some] for part in columns])
        here = np.flatnonzero(np.linalg.norm(matrix, axis=0))
        columns = [columns[i] for i in here]
        if not columns:
            return True
        found, rest = integer_relations(null_space(matrix[:, here]))
        for coefficients in found:
            parts = [replace(part, weight=float(c)) for part, c in zip(columns, coefficients, strict=True) if c]
            parts = _joined(parts, self.shapes)
            if self._overlap(parts):
                continue
            if law == Law.TRANSLATION:  # what is left of each part may still vanish by itself
                self.relations.append(Relation(law, tuple(parts)))
            else:
                self._claim(law, parts)
        for block in rest:
            for row in block:
                terms = [f"{c:+.4g} {columns[i].parameter}[{columns[i].axis}]" for i, c in enumerate(row) if c]
                for i in np.flatnonzero(row):
                    self.fractional.setdefault(columns[i].parameter, " ".join(terms))
        return True

    def _overlap(self, parts: Sequence[Part]) -> bool:
        """Whether two parts name one index of one axis, which no symmetry may."""
        places = [((part.parameter, part.axis), self._mask(part)) for part in parts]
        return any(a == b and (x & y).any() for (a, x), (b, y) in itertools.combinations(places, 2))

    def _made_up(self, part: Part) -> Tensor:
        """Values of a part as they might be if no relation held: overlapping parts depend on each other even then, and
        so do parts that differ by indices without a gradient only."""
        assert part.axis is not None
        axis = (part.parameter, part.axis)
        if axis not in self._inventions:
            generator = np.random.default_rng([len(part.parameter), *part.parameter.encode(), part.axis])
            alive = self._size_and_life(Part(*axis), Law.NORM)[1].any(0)
            self._inventions[axis] = torch.from_numpy(generator.normal(size=(N_INVENTIONS, self._length(axis)))) * alive
        return part.gather(self._inventions[axis]).sum(-1)

    def _is_grouped(self, name: str) -> bool:
        """Whether the parameter is of a grouped convolution, whose first axis holds inputs and outputs."""
        module = self.modules[name]
        return isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1

    def _idle(self, part: Part, law: Law) -> bool:
        """Whether a part's sums vanish or have no gradient behind them, so that a relation may have any of it."""
        size, alive = self._size_and_life(part, law)
        return not bool((alive & (self.value(part, law).abs() > ZERO * size)).any())

    # ---- whole tensors ----------------------------------------------------------------------------------------------

    def tensors(self) -> None:
        """Relations between the norms of whole tensors that do not follow from those between their parts."""
        names = [name for name in self.shapes if name in self.reached]
        index = {name: i for i, name in enumerate(names)}
        implied = self._consequences(index)
        order = self._elimination_order(index)
        pivots = reduced(implied, order)[1] if len(implied) else []
        kept = [name for name in names if index[name] not in pivots and not self._no_life(name)]
        if not kept:
            return
        matrix = self._whole_products(kept)
        matrix = matrix / np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-300)
        present = [i for i, name in enumerate(kept) if not self._whole_vanishes(name)]
        for i, name in enumerate(kept):
            if i not in present:
                self._claim(Law.NORM, [Part(name, None)])
        if not present:
            return
        found, _ = integer_relations(null_space(matrix[:, present]))
        for coefficients in found:
            self._claim(
                Law.NORM,
                [Part(kept[i], None, weight=float(c)) for i, c in zip(present, coefficients, strict=True) if c],
            )

    def _whole_products(self, kept: Sequence[str]) -> Matrix:
        """⟨θ, g⟩ of these whole tensors, [losses, tensors], for more losses than there are tensors."""
        if self.large:
            self._shrink(1)
        self.probe.redraw()
        if self.large and not callable(self.probe.loss):
            # An operation may have no forward derivative; the losses then go backward, one by one.
            with contextlib.suppress(NotImplementedError, RuntimeError):
                return self.probe.tangents(kept, len(kept) + SPARE)
        self._more_losses(kept)
        return np.array([self._whole[name] for name in kept]).T

    def _more_losses(self, kept: Sequence[str]) -> None:
        """Whole tensors give one number for each loss, so there must be more losses than tensors."""
        have = len(self._whole[kept[0]])
        wanted = len(kept) + SPARE
        start = have
        while have < wanted:
            before = have
            for gradients in self.probe.gradients(N_COTANGENTS):
                for name in kept:
                    p, g = self.probe.parameters[name].detach(), gradients.get(name)
                    self._whole[name].append(0.0 if g is None else float(torch.dot(p.flatten(), g.flatten())))
                have += 1
            if have == before:
                return
            self.progress(0.5 + 0.4 * (have - start) / max(1, wanted - start))

    def _whole_part(self, name: str) -> Part | None:
        axis = next((axis for axis in self.sums if axis[0] == name), None)
        return None if axis is None else Part(*axis, fold=self._length(axis))

    def _no_life(self, name: str) -> bool:
        part = self._whole_part(name)
        return part is not None and not bool(self._size_and_life(part, Law.NORM)[1].any())

    def _whole_vanishes(self, name: str) -> bool:
        part = self._whole_part(name)
        return self.vanishes(part, Law.NORM) if part is not None else False

    def _consequences(self, index: dict[str, int]) -> Matrix:
        """What the relations found so far say of whole tensors: a matrix [k, tensors]."""
        atoms: dict[Part, int] = {}
        vectors: list[dict[int, float]] = []
        n = len(index)

        def column(part: Part) -> int:
            bare = Part(part.parameter, part.axis, start=part.start, stop=part.stop, period=part.period)
            if part.axis is None or (part.start, part.stop, part.period) == (None, None, None):
                return index[part.parameter]
            return n + atoms.setdefault(bare, len(atoms))

        for relation in self.relations:
            if relation.law == Law.NORM and all(part.parameter in index for part in relation.parts):
                vector: dict[int, float] = {}
                for part in relation.parts:
                    vector[column(part)] = vector.get(column(part), 0.0) + part.weight
                vectors.append(vector)
        for name, axis in {(atom.parameter, atom.axis) for atom in atoms}:
            mine = [atom for atom in atoms if (atom.parameter, atom.axis) == (name, axis)]
            covered = np.stack([self._mask(atom) for atom in mine]).sum(0)
            if bool((covered == 1).all()):
                vectors.append({index[name]: -1.0, **{n + atoms[atom]: 1.0 for atom in mine}})
        matrix = np.zeros((len(vectors), n + len(atoms)))
        for row, vector in zip(matrix, vectors, strict=True):
            for at, value in vector.items():
                row[at] = value
        if not len(matrix):
            return np.zeros((0, n))
        rows, pivots = reduced(matrix, [*range(n, n + len(atoms)), *range(n)])
        return rows[[i for i, pivot in enumerate(pivots) if pivot < n]][:, :n]

    def _elimination_order(self, index: dict[str, int]) -> list[int]:
        """Tensors in the order in which relations are solved for them: what enters a unit before what leaves it."""
        outward = {p.parameter for r in self.relations if r.law == Law.NORM for p in r.parts[-1:] if len(r.parts) > 1}
        return sorted(index.values(), key=lambda i: (list(index)[i] in outward, i))


def _sum_but(x: Tensor, axis: int) -> Tensor:
    return x.sum([i for i in range(x.ndim) if i != axis]) if x.ndim > 1 else x.clone()


def _matrix(values: Sequence[Tensor]) -> Matrix:
    """Columns of a matrix from tensors [losses, groups]."""
    return np.stack([x.flatten().numpy() for x in values], axis=1)


def _foldings(piece: Part, shape: Sequence[int], n: int, sizes: set[int]) -> Iterator[Part]:
    """Ways to make n groups of a piece: as it is, of neighbours, of indices a stride apart."""
    length = piece.n_groups(shape)
    if length == n:
        yield piece
    if length <= n or length % n:
        return
    fold = length // n
    start, stop = piece.bounds(shape)
    for stride in sorted({1} | {size for size in itertools.chain(sizes, (n,)) if n % size == 0}):
        if (stop - start) % (fold * stride) == 0:
            yield replace(piece, fold=fold, stride=stride)


def _joined(parts: Sequence[Part], shapes: Mapping[str, Sequence[int]]) -> list[Part]:
    """Slices that tile their axis or its periods, and have one coefficient, as one part of indices a stride apart."""
    joined: list[Part] = []
    for key, group in itertools.groupby(parts, lambda part: (part.parameter, part.axis, part.period, part.weight)):
        slices = list(group)
        name, axis, period, weight = key
        whole = Part(name, axis, weight=weight)
        if len(slices) > 1 and axis is not None and all(part.fold == 1 for part in slices):
            bounds = sorted(part.bounds(shapes[name]) for part in slices)
            width = bounds[0][1]
            tiles = [(i * width, (i + 1) * width) for i in range((period or shapes[name][axis]) // width)]
            if bounds == tiles:
                slices = [replace(whole, fold=len(tiles), stride=width if width > 1 else 1)]
        joined += slices
    return joined
