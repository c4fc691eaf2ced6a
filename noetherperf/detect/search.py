"""The search: which sums of ⟨θ, g⟩ and of ⟨g, 1⟩ over groups of parameters vanish for every loss.

For every parameter and axis the products are summed for each index, batch after batch (sums.py). A part whose sums
vanish by themselves is a scale or translation symmetry. Of the others, all parts with n groups are the columns of a
matrix with groups × losses as rows; its null space holds the relations between them. The number of groups goes from
many to few, and for each number parts come from the finest to the coarsest (parts.py): whole axes, slices and folds of
them, groups of indices a stride apart; at last whole tensors (tensors.py). Of the relations that hold, those that
follow from earlier ones are left out (claims.py).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.detect.claims import Claims, Relation
from noetherperf.detect.layout import ANY, Layout, placed
from noetherperf.detect.offsets import relate_offsets
from noetherperf.detect.parts import Axis, crosses_periods, divisors, foldings, joined, pieces
from noetherperf.detect.probe import Probe
from noetherperf.detect.progress import Report, Stage
from noetherperf.detect.relations import Matrix, independent, integer_relations, null_space, nullity, present
from noetherperf.detect.sums import SPARE, Sums
from noetherperf.detect.tensors import relate_tensors
from noetherperf.detect.threads import threads
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part

__all__ = ["Search"]

MAX_ROWS = 2000
MAX_COLUMNS = 500  # of a matrix; where there are more, neighbourhoods and coarser choices of parts are tried
MOST_TERMS = 8  # of a relation without small integers that is told; longer ones are sums of others
LARGEST_FOLD = 64  # of a group at a number of groups that no axis has: query heads of a key head, rotary pairs


class Column(NamedTuple):
    """The sums of the groups of one axis, as a column of a matrix."""

    rank: tuple[bool, int, bool, bool]  # finer ones first; later those that mix groups with and without gradient
    axis: Axis
    grouping: Part

    @property
    def part(self) -> Part:
        return placed(self.grouping, self.axis)


Columns = Mapping[Axis, Sequence[Column]]


class Search:
    """Finds the relations between the sums of a probe's gradients.

    Args:
        probe: Source of gradients.
        progress: Called with the stage and the fraction of it that is done.

    Attributes:
        sums: What was measured.
        fractional: Parameter name -> a relation that it has, but not in small integers.
        undecided: What was not searched to the end -> the reason: too few losses to tell relations from chance, or
            linear algebra that failed.
    """

    def __init__(self, probe: Probe, progress: Report) -> None:
        self.probe, self._progress = probe, progress
        self.sums = Sums(probe, progress)
        self.shapes = self.sums.shapes
        self.fractional: dict[str, str] = {}
        self.undecided: dict[str, str] = {}
        alive = {axis: self.sums.alive(Part(*axis)).any(0) for axis in self.sums.axes}
        self._claims = Claims(self.shapes, alive)
        self._pieces = {length: pieces(length, probe.shapes) for length in map(self.sums.length, self.sums.axes)}
        self._sizes = {size for size in probe.shapes.sizes if size > 1} | {
            value
            for module in probe.model.modules()
            for value in vars(module).values()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1
        }
        self._waiting: list[tuple[Law, list[Part]]] = []
        self._scopes = dict(self._neighbourhoods())
        self._kept: dict[tuple[int, tuple[Part, ...], bytes], list[int]] = {}

    def run(self) -> list[Relation]:
        """All relations, the finest first."""
        with self._attempt("elements without gradient"):
            self._without_gradient()
        related = self._counts()
        blocks = {n for length in self._pieces for n in divisors(length)}
        numbers = sorted((related | blocks) - {1}, reverse=True)
        with threads(1):
            for i, n in enumerate(numbers):
                self._progress(Stage.RELATIONS, i / len(numbers))
                for law in Law:
                    with self._attempt(_what(n, law)):
                        self._single(n, law)
                    if n in related:
                        self._relate(n, law)
        for law, parts in self._waiting:
            with self._attempt(f"{_what(parts[0].n_groups(self.shapes[parts[0].parameter]), law)} of {parts}"):
                if not self._claims.known_groups(law, parts).all():
                    self._claims.claim(law, parts)
        for law in Law:
            with self._attempt(_what(1, law)):
                if not relate_tensors(self.sums, self._claims, law):
                    self._too_few(1, law)
        with self._attempt("laws that count from an offset"):
            relate_offsets(self.sums, self._claims, self.probe.flow)
        return [self._counted(relation) for relation in self._claims.relations]

    def _counted(self, relation: Relation) -> Relation:
        """The relation with the offsets that the sums counted from."""
        if relation.law == Law.TRANSLATION:
            return relation
        offsets = [(part, self.probe.flow.offset(part.parameter)) for part in relation.parts]
        return replace(relation, parts=tuple(replace(part, offset=c) if c else part for part, c in offsets))

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """Where linear algebra fails, go on with the rest, and tell."""
        try:
            yield
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            self.undecided[what] = f"its linear algebra failed, so that laws may be missing: {error}"

    def _counts(self) -> set[int]:
        """The numbers of groups at which parts of different tensors may be related."""
        lengths = {piece.n_groups((length,)) for length, found in self._pieces.items() for piece in found}
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
            candidates = [plain]
            if axis is not None:
                candidates = [placed(piece, (name, axis)) for piece in self._pieces[shape[axis]]]
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
        for length, found in self._pieces.items():
            for grouping in dict.fromkeys(x for piece in found for x in foldings(piece, length, n, ())):
                if grouping.stride != 1:
                    continue
                for number in self.sums.vanish(grouping, length, law).nonzero().flatten().tolist():
                    part = placed(grouping, self.sums.layout.places[length][number])
                    if not self._claims.known_groups(law, [part]).all():
                        self._claims.claim(law, [part])

    # ---- relations between parts ------------------------------------------------------------------------------------

    def _neighbourhoods(self) -> Iterator[tuple[str, tuple[Axis, ...]]]:
        """The axes of each module that contains modules, two levels deep; at last, without a name, all axes."""
        axes = [axis for axis in self.sums.axes if not self.sums.is_kernel(axis)]
        prefixes = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in self.shapes)
        for prefix in sorted(filter(None, prefixes), key=lambda prefix: -prefix.count(".")):
            inside = [axis for axis in axes if axis[0].startswith(prefix + ".")]
            yield prefix, tuple(a for a in inside if a[0].removeprefix(prefix + ".").count(".") <= 1)
        yield "", tuple(axes)

    def _relate(self, n: int, law: Law) -> None:
        """Relations between parts with n groups: of the whole model if there are rows enough, else of each module."""
        columns = self._columns(n, law, self._sizes)
        if self._solve(columns, "", n, law):
            return
        for scope in self._scopes:
            if scope:
                self._solve(columns, scope, n, law)
        if not any(self.sums.length(axis) == n for axis in self._scopes[""]):
            return
        columns = self._columns(n, law, set())
        plain = {axis: [x for x in found if x.grouping == Part(ANY, 0)] for axis, found in columns.items()}
        if not self._solve(columns, "", n, law) and not self._solve(plain, "", n, law):
            self._too_few(n, law)

    def _too_few(self, n: int, law: Law) -> None:
        self.undecided.setdefault(
            _what(n, law),
            f"{self.sums.n_losses} losses are too few to tell relations between so many tensors from chance",
        )

    def _columns(self, n: int, law: Law, sizes: set[int]) -> Columns:
        """What a relation between parts with n groups may contain of each axis.

        Left out are parts whose sums vanish, and those that are sums of finer ones on whatever sums.
        """
        columns = {}
        for length, found in self._pieces.items():
            groupings = list(dict.fromkeys(x for piece in found for x in foldings(piece, length, n, sizes)))
            if not groupings:
                continue
            live = torch.stack([~self.sums.idle(grouping, length, law) for grouping in groupings], 1).tolist()
            full = torch.stack([self._claims.full(grouping, length) for grouping in groupings], 1).tolist()
            for axis in (axis for axis in self.sums.axes if self.sums.length(axis) == length):
                number = self.sums.layout.number[axis]
                own = [
                    Column(
                        (crosses_periods(grouping, length), grouping.fold, not is_full, grouping.stride != 1),
                        axis,
                        grouping,
                    )
                    for grouping, is_live, is_full in zip(groupings, live[number], full[number], strict=True)
                    if is_live
                ]
                columns[axis] = self._distinct(sorted(own, key=_rank), n)
        return columns

    def _distinct(self, columns: Sequence[Column], n: int) -> Sequence[Column]:
        """Those of one axis that are not sums of earlier ones."""
        if len(columns) < 2:
            return columns
        alive = self._claims.alive(columns[0].axis)
        key = (len(alive), tuple(column.grouping for column in columns), alive.numpy().tobytes())
        if key not in self._kept:
            n_random = -(-(len(columns) + SPARE) // n)
            rows = [self._claims.random(column.part, n_random).flatten().numpy() for column in columns]
            self._kept[key] = independent(np.stack(rows, 1))
        return [columns[i] for i in self._kept[key]]

    def _solve(self, columns_of: Columns, scope: str, n: int, law: Law) -> bool:
        """Claim the relations between groups inside a module; False where it cannot be decided."""
        with self._attempt(_what(n, law) + (f" in {scope}" if scope else "")):
            chosen = (column for axis in self._scopes[scope] for column in columns_of.get(axis, ()))
            if self._solved(sorted(chosen, key=_rank), n, law):
                return True
        return False

    def _solved(self, columns: Sequence[Column], n: int, law: Law) -> bool:
        """Claim the relations between these columns; False where there are too few rows."""
        if len(columns) < 2:
            return True
        wanted = len(columns) + SPARE
        if len(columns) > MAX_COLUMNS or not self.sums.at_least(-(-wanted // n)):
            return False
        some = torch.from_numpy(np.random.default_rng(0).permutation(n)[: MAX_ROWS // self.sums.n_losses])
        matrix = _matrix(columns, some, self.sums.layout, self.sums.products(law))
        invented = _matrix(columns, some, self._claims.layout, self._claims.invented(law, -(-wanted // len(some))))
        live = np.intersect1d(present(matrix), np.flatnonzero(np.linalg.norm(invented, axis=0) > 1e-7))
        columns = [columns[i] for i in live.tolist()]
        if len(columns) < 2:
            return True
        matrix, invented = matrix[:, live], invented[:, live]
        if nullity(matrix) == nullity(invented):  # the known relations hold in both
            return True
        null, known = null_space(matrix), null_space(invented)

        def parts_of(coefficients: NDArray[np.int64]) -> list[Part]:
            terms = zip(columns, coefficients, strict=True)
            return [replace(column.part, weight=float(c)) for column, c in terms if c]

        relations, rest = integer_relations(null, known, lambda c: not self._claims.overlap(parts_of(c)))
        for parts in [joined(parts_of(c), self.shapes) for c in relations]:
            if (self._claims.known_groups(law, parts) & self._claims.live_groups(parts)).any():
                # there may be one between finer parts for the groups that are new
                self._waiting.append((law, parts))
            else:
                self._claims.claim(law, parts)
        for row in rest:
            at = np.flatnonzero(row).tolist()
            if len(at) <= MOST_TERMS:
                terms = ["{:+.4g} {}[{}]".format(row[i], *columns[i].axis) for i in at]
                for i in at:
                    self.fractional.setdefault(columns[i].axis[0], " ".join(terms))
        return True


def _what(n: int, law: Law) -> str:
    what = "norms" if law == Law.NORM else "sums"
    return f"{what} of {n} groups" if n > 1 else f"{what} of whole tensors"


def _rank(column: Column) -> tuple[bool, int, bool, bool]:
    return column.rank


def _matrix(columns: Sequence[Column], some: Tensor, layout: Layout, vectors: Tensor) -> Matrix:
    """[rows, columns] from the sums of some groups, taken for all axes with one grouping at once."""
    alike: dict[tuple[Part, int], list[int]] = {}
    for i, column in enumerate(columns):
        alike.setdefault((column.grouping, layout.lengths[column.axis]), []).append(i)
    parts = []
    for (grouping, length), places in alike.items():
        numbers = torch.tensor([layout.number[columns[i].axis] for i in places], device="cpu")
        parts.append(layout.sums(vectors, grouping, length, numbers)[:, :, some].transpose(0, 1).flatten(1))
    matrix = torch.empty(len(columns), parts[0].shape[1], dtype=torch.float64, device="cpu")
    matrix[list(itertools.chain(*alike.values()))] = torch.cat(parts)
    return np.ascontiguousarray(matrix.T.numpy())
