"""The search: which sums of ⟨θ, g⟩ and of ⟨g, 1⟩ over groups of parameters vanish for every loss.

For every parameter and axis the products are summed for each index, batch after batch (sums.py). A part whose sums
vanish by themselves is a scale or translation symmetry. Of the others, all parts with n groups are the columns of a
matrix with groups × losses as rows; its null space holds the relations between them. The number of groups goes from
many to few, and for each number parts come from the finest to the coarsest (parts.py): whole axes, slices and folds of
them, groups of indices a stride apart; at last whole tensors (tensors.py). Of the relations that hold, those that
follow from earlier ones are left out (claims.py).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.detect.claims import Claims, Relation
from noetherperf.detect.parts import Axis, divisors, foldings, joined, pieces
from noetherperf.detect.probe import Probe
from noetherperf.detect.relations import Matrix, independent, integer_relations, null_space
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.detect.tensors import relate_tensors
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["Search"]

MAX_ROWS = 2000
MAX_COLUMNS = 500  # of a matrix; where there are more, neighbourhoods and coarser choices of parts are tried
LARGEST_FOLD = 64  # of a group at a number of groups that no axis has: query heads of a key head, rotary pairs


class Search:
    """Finds the relations between the sums of a probe's gradients.

    Args:
        probe: Source of gradients.
        progress: Called with the fraction done.

    Attributes:
        sums: What was measured.
        fractional: Parameter name -> a relation that it has, but not in small integers.
        with_offset: Parameter name -> a law in c + θ, which no symmetry can express.
        undecided: Where there were too few losses to tell relations from chance -> the reason.
    """

    def __init__(self, probe: Probe, progress: Callable[[float], None]) -> None:
        self.probe = probe
        self.sums = Sums(probe, progress)
        self.shapes = self.sums.shapes
        self.fractional: dict[str, str] = {}
        self.with_offset: dict[str, str] = {}
        self.undecided: dict[str, str] = {}
        alive = {axis: self.sums.alive(Part(*axis)).any(0) for axis in self.sums.axes}
        self._claims = Claims(self.shapes, alive)
        self._pieces = {axis: pieces(axis, self.sums.length(axis), probe.shapes) for axis in self.sums.axes}
        self._sizes = {size for size in probe.shapes.sizes if size > 1} | {
            value
            for module in probe.model.modules()
            for value in vars(module).values()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1
        }
        self._waiting: list[tuple[Law, list[Part]]] = []
        self._scopes = list(self._neighbourhoods())

    def run(self) -> list[Relation]:
        """All relations, the finest first."""
        self._without_gradient()
        related = self._counts()
        blocks = {n for axis in self.sums.axes for n in divisors(self.sums.length(axis))}
        for n in sorted(related | blocks, reverse=True):
            if n == 1:
                continue
            for law in Law:
                self._single(n, law)
                if n in related:
                    self._relate(n, law)
        for law, parts in self._waiting:
            if not self._claims.known_groups(law, parts).all():
                self._claims.claim(law, parts)
        for law in Law:
            if not relate_tensors(self.sums, self._claims, law):
                self._undecided(1, law)
        self._offsets()
        return self._claims.relations

    def _counts(self) -> set[int]:
        """The numbers of groups at which parts of different tensors may be related."""
        lengths = {part.n_groups(self.shapes[part.parameter]) for parts in self._pieces.values() for part in parts}
        sizes = self._sizes | {a * b for a in self._sizes for b in self._sizes}
        return lengths | {
            n for n in sizes if any(n < length <= LARGEST_FOLD * n and length % n == 0 for length in lengths)
        }

    # ---- single parts that vanish -----------------------------------------------------------------------------------

    def _without_gradient(self) -> None:
        """Elements of vectors that a later operation cancels, so that they have no gradient but rounding.

        Where even that is missing, no loss may reach them; but if another tensor of their unit has one, it does.
        """
        for name, shape in self.shapes.items():
            if name not in self.sums.reached or prod(shape) != max(shape, default=1):
                continue
            axis = next((axis for axis, length in enumerate(shape) if length > 1), None)
            plain = Part(name, axis)
            alive = self.sums.alive(plain).any(0)
            cancelled = self.sums.rounding(plain) & ~alive
            for other in self.sums.axes if len(shape) == 1 else ():
                same_unit = (
                    other[0].rpartition(".")[0] == name.rpartition(".")[0] and self.sums.length(other) == shape[0]
                )
                if same_unit and other[0] != name:
                    cancelled |= ~alive & self.sums.alive(Part(*other)).any(0)
            taken = torch.zeros_like(alive)
            candidates = [plain] if axis is None else self._pieces[name, axis]
            masks = [
                (piece, torch.ones(1, dtype=torch.bool) if axis is None else self._inside(piece))
                for piece in candidates
            ]
            for piece, inside in sorted(masks, key=lambda pair: -int(pair[1].sum())):
                if not bool((taken | alive)[inside].any()) and 2 * int(cancelled[inside].sum()) >= int(inside.sum()):
                    self._claims.claim(Law.TRANSLATION, [piece], without_gradient=True)
                    taken |= inside

    def _inside(self, part: Part) -> Tensor:
        return torch.from_numpy(self._claims.mask(part))

    def _single(self, n: int, law: Law) -> None:
        """Parts with n groups that vanish by themselves: slices of an axis, or blocks as before GroupNorm."""
        for axis in self.sums.axes:
            for piece in self._pieces[axis]:
                for part in foldings(piece, self.shapes[axis[0]], n, set()):
                    if (
                        part.stride == 1
                        and self.sums.vanishes(part, law)
                        and not self._claims.known_groups(law, [part]).all()
                    ):
                        self._claims.claim(law, [part])

    # ---- relations between parts ------------------------------------------------------------------------------------

    def _neighbourhoods(self) -> Iterator[tuple[Axis, ...]]:
        """The axes of each module that contains modules, two levels deep; at last all axes."""
        axes = [axis for axis in self.sums.axes if not self.sums.is_kernel(axis)]
        prefixes = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in self.shapes)
        for prefix in sorted(filter(None, prefixes), key=lambda prefix: -prefix.count(".")):
            inside = [axis for axis in axes if axis[0].startswith(prefix + ".")]
            yield tuple(a for a in inside if a[0].removeprefix(prefix + ".").count(".") <= 1)
        yield tuple(axes)

    def _relate(self, n: int, law: Law) -> None:
        """Relations between parts with n groups: of the whole model if there are rows enough, else of each module."""
        if self._solve(self._columns(n, self._scopes[-1], self._sizes), law):
            return
        for scope in self._scopes[:-1]:
            self._solve(self._columns(n, scope, self._sizes), law)
        everything = self._scopes[-1]
        if not any(self.sums.length(axis) == n for axis in everything):
            return
        plain = [Part(*axis) for axis in everything if self.sums.length(axis) == n]
        if not self._solve(self._columns(n, everything, set()), law) and not self._solve(plain, law):
            self._undecided(n, law)

    def _undecided(self, n: int, law: Law) -> None:
        what = "norms" if law == Law.NORM else "sums"
        self.undecided[f"{what} of {n} groups" if n > 1 else f"{what} of whole tensors"] = (
            f"{self.sums.n_losses} losses are too few to tell relations between so many tensors from chance"
        )

    def _columns(self, n: int, scope: tuple[Axis, ...], sizes: set[int]) -> list[Part]:
        """The parts with n groups, the finest first; those that mix groups with and without gradient later."""
        parts = [
            part
            for axis in scope
            for piece in self._pieces[axis]
            for part in foldings(piece, self.shapes[axis[0]], n, sizes)
        ]
        return sorted(
            dict.fromkeys(parts),
            key=lambda part: (part.fold, not bool(self._claims.random(part, 1).all()), part.stride != 1),
        )

    def _solve(self, columns: list[Part], law: Law) -> bool:
        """Claim the relations between these parts; False where there are too few rows to decide."""
        columns = [part for part in columns if not self.sums.is_idle(part, law)]
        if len(columns) < 2:
            return True
        n = columns[0].n_groups(self.shapes[columns[0].parameter])
        columns = self._distinct(columns, n)
        wanted = len(columns) + SPARE
        if len(columns) > MAX_COLUMNS or not self.sums.at_least(-(-wanted // n)):
            return False
        some = np.random.default_rng(0).permutation(n)[
            : max(-(-wanted // self.sums.n_losses), MAX_ROWS // self.sums.n_losses)
        ]
        n_invented = -(-wanted // len(some))
        invented = _matrix([self._claims.invented(part, law, n_invented)[:, some] for part in columns])
        matrix = _matrix([self.sums.value(part, law)[:, some] for part in columns])
        present = np.flatnonzero((np.linalg.norm(matrix, axis=0) > 0) & (np.linalg.norm(invented, axis=0) > 1e-7))
        columns = [columns[i] for i in present]
        if len(columns) < 2:
            return True
        null, known = null_space(matrix[:, present]), null_space(invented[:, present])
        if len(null) == len(known):
            return True

        def parts_of(coefficients: NDArray[np.int64]) -> list[Part]:
            terms = zip(columns, coefficients, strict=True)
            return [replace(part, weight=float(c)) for part, c in terms if c]

        relations, rest = integer_relations(null, known, lambda c: not self._claims.overlap(parts_of(c)))
        for parts in [joined(parts_of(c), self.shapes) for c in relations]:
            if self._claims.known_groups(law, parts).any():
                # there may be one between finer parts for the groups that are new
                self._waiting.append((law, parts))
            else:
                self._claims.claim(law, parts)
        for row in rest:
            terms = [f"{c:+.4g} {columns[i].parameter}[{columns[i].axis}]" for i, c in enumerate(row) if c]
            for i in np.flatnonzero(row):
                self.fractional.setdefault(columns[i].parameter, " ".join(terms))
        return True

    def _offsets(self) -> None:
        """Tell the laws of vectors that count from an offset, as the gain 1 + w of a normalisation.

        Their generator is c + θ, so that ⟨g, c⟩ + ⟨g, θ⟩ enters a relation. Part has no offset, so none is claimed.
        """
        claimed = {part.parameter for relation in self._claims.relations for part in relation.parts}
        for name, shape in self.shapes.items():
            if len(shape) != 1 or name in claimed or (name, 0) not in self.sums.axes:
                continue
            own = Part(name, 0)
            others = [Part(*a) for a in self._scopes[-1] if a[0] != name and self.sums.length(a) == shape[0]]
            others = [part for part in others if not self.sums.is_idle(part, Law.NORM)]
            columns = [self.sums.value(part, Law.NORM) for part in (own, *others)]
            matrix = _matrix([self.sums.value(own, Law.TRANSLATION), *columns])
            if self.sums.is_idle(own, Law.TRANSLATION) or len(matrix) < len(columns) + 1 + SPARE:
                continue
            for relation in integer_relations(null_space(matrix[:MAX_ROWS]))[0]:
                offset, weight = int(relation[0]), int(relation[1])
                if offset and weight:
                    terms = zip(relation[2:], others, strict=True)
                    rest = " ".join(f"{c:+d} |{part.parameter}|² along axis {part.axis}" for c, part in terms if c)
                    self.with_offset[name] = (
                        f"a law holds for each index: {weight:+d} |{offset / weight:g} + {name}|² {rest}; "
                        "no Part counts from an offset, so it is not claimed"
                    )

    def _distinct(self, columns: list[Part], n: int) -> list[Part]:
        """The parts that are not sums of finer ones, on whatever sums."""
        by_axis: dict[Axis, list[Part]] = {}
        for part in columns:
            assert part.axis is not None
            by_axis.setdefault((part.parameter, part.axis), []).append(part)
        kept: set[Part] = set()
        for parts in by_axis.values():
            rows = [self._claims.random(part, -(-(len(parts) + SPARE) // n)) for part in parts]
            kept |= {parts[i] for i in independent(_matrix(rows))}
        return [part for part in columns if part in kept]


def _matrix(values: list[Tensor]) -> Matrix:
    """Columns of a matrix from tensors [losses, groups]."""
    return np.stack([x.flatten().numpy() for x in values], axis=1)
