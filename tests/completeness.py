"""How complete a list of symmetries is, measured against the gradients themselves.

    report = completeness(model, inputs, loss, symmetries)
    report.missed    # laws along axes that hold on every batch and follow from no claim, in words
    report.false     # claims that do not hold

For many random parameters and batches, the sums of θ g (norms) and of g (translations) along every axis of every tensor
are one row of a matrix. A norm may count a vector from an offset, Σ (θ + c) g = Σ θ g + c Σ g, so a row of norms ends
with the sums of g of vectors. The matrix' null space holds all laws along axes. Three kinds of vectors in it are known:
identities (two axes of one tensor have the same total), the claims, and indices that never have a gradient. What is
left was missed.

A law of matrices has its diagonal among these laws. For each pair of different units i, j of each claim with two sides,
the entry ⟨g_i, W_j⟩ of the one side less ⟨V_i, h_j⟩ of the other is taken over the same gradients. One that vanishes
although its terms do not is a law, and missed if no claimed Balance has it. One that a Balance has and that does not
vanish is false. Nothing here knows how `find_symmetries` searches.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from noetherperf import Balance, Part, Rescale, Symmetry
from noetherperf.checks.exact import evaluation

Matrix = NDArray[np.float64]
Loss = str | Callable[[Any], Tensor] | None
Inputs = Callable[[int, torch.Generator], Any]  # (batch, generator) -> one tensor or a tuple of them

N_DRAWS = 12  # of parameters and of a batch, at least
SPARE = 20  # more rows than columns
N_OF_ENTRIES = 2  # gradients of one draw that entries of matrices are taken of
EPS = 1e-20  # a weight that a normalisation divides out has a gradient in proportion to eps / variance: none here


@dataclass(frozen=True)
class Completeness:
    """What was missed and what is false, each law as text: `+1 a.weight[0]:3 −1 b.weight[1]:3`."""

    missed: list[str]
    false: list[str]


def completeness(
    model: nn.Module, inputs: Inputs, loss: Loss, symmetries: Iterable[Symmetry], seed: int = 0
) -> Completeness:
    """Compare the claims with the null space of all axis sums.

    Args:
        model: In float32 or float64; a copy is evaluated in float64 and training mode, eps 1e-20.
        inputs: Gives a batch.
        loss: "cross_entropy" (classes on the last axis), "mse", None, or a function of the output.
        symmetries: The claims.
        seed: Of everything drawn.
    """
    symmetries = list(symmetries)
    missed: list[str] = []
    false: list[str] = []
    columns = _columns(model)
    places = _places(model, columns)
    entries = [_Entries(s) for s in symmetries if isinstance(s, Rescale | Balance)]
    for law, (matrix, scale) in _axis_sums(model, inputs, loss, columns, entries, seed).items():
        own = places if law == "norm" else columns
        alive = scale > 1e-9 * max(scale.max(), 1e-300)
        claims = [v for s in symmetries if s.claimed and s.law == law for v in _vectors(s, own)]
        for vector in claims:
            seen = vector * alive  # what else it holds has no gradient but rounding, so that each law is true of it
            if np.linalg.norm(matrix @ seen) > 1e-8 * max(scale @ np.abs(seen), 1e-3 * scale.max()):
                false.append(f"{law}: {_text(vector, own)}")
        known = [*_identities(own), *claims]
        if law == "norm":  # sums of vectors that vanish, and that the other law counts
            known += [v for s in symmetries if s.law != law for v in _of_vectors(s, own)]
        null = _null_space((matrix / np.where(alive, scale, 1.0))[:, alive]) / scale[alive]
        missed += [
            f"{law}: {_text(v, own)}" for v in _beyond(null, np.array(known).reshape(-1, len(own))[:, alive], alive)
        ]
    known_pairs = {pair for one in entries if isinstance(one.symmetry, Balance) for pair in one.pairs()}
    for one in entries:
        missed += [f"matrix: {pair}" for pair in one.vanishing() if pair not in known_pairs]
        if isinstance(one.symmetry, Balance):
            false += [f"matrix: {pair}" for pair in one.pairs() if pair not in one.vanishing(dead=True)]
    return Completeness(missed, list(dict.fromkeys(false)))


class _Entries:
    """The products of different units of a claim with two sides, over all gradients."""

    def __init__(self, symmetry: Rescale | Balance) -> None:
        self.symmetry = symmetry
        self._largest: Matrix | None = None  # |entry| over all gradients, [units, units]
        self._size: Matrix | None = None  # the magnitudes of its terms, summed

    def add(self, parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        self._first = {part: _indices(part, parameters[part.parameter])[:, 0].tolist() for part in self.symmetry.parts}
        total, size = [], []
        for part in self.symmetry.parts:
            w, g = (_units(part, x[part.parameter]) for x in (parameters, gradients))
            a, b = (g, w + part.offset) if part.weight > 0 else (w + part.offset, g)
            total.append(part.weight * (a @ b.T))
            size.append(abs(part.weight) * (a.abs() @ b.abs().T))
        entry, terms = torch.stack(total).sum(0).abs().numpy(), torch.stack(size).sum(0).numpy()
        self._largest = entry if self._largest is None else np.maximum(self._largest, entry)
        self._size = terms if self._size is None else self._size + terms

    def pairs(self) -> list[str]:
        """What a Balance claims."""
        assert self._size is not None
        n = len(self._size)
        size = getattr(self.symmetry, "size", None) or n
        return [self._named(i, j) for i in range(n) for j in range(n) if i != j and i // size == j // size]

    def vanishing(self, dead: bool = False) -> list[str]:
        """The entries that vanish on every batch; dead: those without terms, too."""
        assert self._size is not None
        assert self._largest is not None
        zero = self._largest <= 1e-9 * self._size
        if not dead:
            zero &= self._size > 1e-6 * np.median(self._size)
        return [self._named(i, j) for i, j in np.argwhere(zero).tolist() if i != j]

    def _named(self, i: int, j: int) -> str:
        """By the first indices of both units in all parts, whatever the parts' order, sign and slices."""
        sides = []
        for positive in (True, False):
            own = [(part, self._first[part]) for part in self.symmetry.parts if (part.weight > 0) == positive]
            sides.append(sorted(f"{part.parameter}[{part.axis}]:{first[i]},{first[j]}" for part, first in own))
        return " = ".join(" + ".join(side) for side in sides)


def _indices(part: Part, x: Tensor) -> Tensor:
    """The indices of each unit, [units, indices of one]."""
    return torch.zeros(1, 1).long() if part.axis is None else part.gather(torch.arange(x.shape[part.axis]))


def _units(part: Part, x: Tensor) -> Tensor:
    """[units, elements of one]."""
    if part.axis is None:
        return x.reshape(1, -1)
    return torch.stack([x.index_select(part.axis, own).flatten() for own in _indices(part, x)])


Column = tuple[str, int, int]  # parameter, axis, index
OFFSET = -1  # in the place of an axis: the sums of g


def _columns(model: nn.Module) -> dict[Column, int]:
    found: dict[Column, int] = {}
    for name, p in model.named_parameters():
        shape = p.shape or (1,)
        for axis, length in enumerate(shape):
            if p.requires_grad and not p.is_complex() and (length > 1 or axis == 0):
                found.update({(name, axis, i): len(found) + i for i in range(length)})
    return found


def _places(model: nn.Module, columns: dict[Column, int]) -> dict[Column, int]:
    """The columns, then those of the sums of g of vectors, whose axis is OFFSET."""
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1}
    offsets = [(name, OFFSET, i) for name, _, i in columns if name in vectors]
    return columns | {column: len(columns) + at for at, column in enumerate(offsets)}


def _axis_sums(
    model: nn.Module,
    inputs: Inputs,
    loss: Loss,
    columns: dict[Column, int],
    entries: Sequence[_Entries],
    seed: int,
) -> dict[str, tuple[Matrix, Matrix]]:
    """Law -> the sums, [rows, columns], and the size of their terms over all rows, [columns]."""
    twin = copy.deepcopy(model).double().train()
    for module in twin.modules():
        for name, value in vars(module).items():
            if "eps" in name and isinstance(value, float):
                setattr(module, name, EPS)
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad and not p.is_complex()}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    embeddings = (x for x in twin.modules() if isinstance(x, (nn.Embedding, nn.EmbeddingBag)))
    padding = [
        (x.weight, x.padding_idx, x.weight[x.padding_idx].detach().clone())  # no gradient reaches it
        for x in embeddings
        if x.padding_idx is not None
    ]
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Matrix]] = {"translation": [], "norm": []}
    squares = {law: np.zeros(len(columns)) for law in rows}
    places = list(_places(model, columns))
    wanted = len(places) + SPARE
    with evaluation("no_eps", eps=EPS):
        while len(rows["norm"]) < wanted:
            with torch.no_grad():
                for name, p in parameters.items():
                    if p.ndim < 2:  # bounded: behind a unit that is dead, a normalisation divides rounding by √eps
                        p.copy_(start[name] + 0.4 * (2 * torch.rand(p.shape, generator=generator, dtype=p.dtype) - 1))
                    else:
                        size = max(0.3, float(start[name].std(correction=0)))
                        p.copy_(start[name] + size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
                for weight, at, stays in padding:
                    weight[at] = stays
            batch = inputs(4, generator)
            batch = batch if isinstance(batch, tuple) else (batch,)
            out = twin(*(x.double() if x.is_floating_point() else x for x in batch))
            target = loss(out) if callable(loss) else out
            # one draw gives no more independent rows than half its outputs
            per_draw = 1 if callable(loss) else min(-(-wanted // N_DRAWS), max(1, target.numel() // 2))
            for i in range(per_draw):
                v = torch.randn(target.shape, generator=generator, dtype=target.dtype)
                v = v - v.mean(-1, keepdim=True) if loss == "cross_entropy" else v
                grads = torch.autograd.grad(
                    target, list(parameters.values()), v, retain_graph=i + 1 < per_draw, allow_unused=True
                )
                gradients = {
                    name: torch.zeros_like(p) if gradient is None else gradient
                    for (name, p), gradient in zip(parameters.items(), grads, strict=True)
                }
                for one in entries if i < N_OF_ENTRIES else ():
                    one.add({name: p.detach() for name, p in parameters.items()}, gradients)
                for law, found in rows.items():
                    row = np.zeros(len(columns))
                    for name, p in parameters.items():
                        g = gradients[name]
                        product = (g if law == "translation" else g * p.detach()).reshape(p.shape or (1,))
                        for axis, length in enumerate(product.shape):
                            if length > 1 or axis == 0:
                                at = columns[name, axis, 0]
                                terms = product.movedim(axis, 0).reshape(length, -1)
                                row[at : at + length] = terms.sum(1).numpy()
                                squares[law][at : at + length] += terms.square().sum(1).numpy()
                    found.append(row)
    of_g = [columns[name, 0, i] for name, axis, i in places if axis == OFFSET]
    sums, norms = np.array(rows["translation"]), np.array(rows["norm"])
    scales = {law: np.sqrt(of_law) for law, of_law in squares.items()}
    return {
        "translation": (sums, scales["translation"]),
        "norm": (
            np.concatenate([norms, sums[:, of_g]], 1),
            np.concatenate([scales["norm"], scales["translation"][of_g]]),
        ),
    }


def _vectors(symmetry: Symmetry, columns: dict[Column, int], place: int | None = None) -> list[Matrix]:
    """A row for each group; place: in the place of each part's axis."""
    vectors: list[Matrix] = []
    for part in symmetry.parts:
        axis = part.axis or 0
        length = sum(1 for name, number, _ in columns if (name, number) == (part.parameter, axis))
        groups = part.gather(torch.arange(length)).flatten(1) if part.axis is not None else torch.arange(length)[None]
        vectors = vectors or [np.zeros(len(columns)) for _ in groups]
        for vector, group in zip(vectors, groups, strict=True):
            for i in group.tolist():
                vector[columns[part.parameter, axis if place is None else place, i]] += part.weight
                if part.offset:
                    vector[columns[part.parameter, OFFSET, i]] += part.weight * part.offset
    return vectors


def _of_vectors(symmetry: Symmetry, columns: dict[Column, int]) -> list[Matrix]:
    """A row for each group of a law of vectors alone, among the sums of g."""
    if any((part.parameter, OFFSET, 0) not in columns for part in symmetry.parts):
        return []
    return _vectors(symmetry, columns, OFFSET)


def _identities(columns: dict[Column, int]) -> list[Matrix]:
    """The totals of two axes of one tensor are equal."""
    totals: dict[str, dict[int, Matrix]] = {}
    for (name, axis, _), at in columns.items():
        if axis != OFFSET:
            totals.setdefault(name, {}).setdefault(axis, np.zeros(len(columns)))[at] = 1.0
    return [other - first for axes in totals.values() for first, *rest in [list(axes.values())] for other in rest]


def _null_space(matrix: Matrix) -> Matrix:
    _, values, basis = np.linalg.svd(np.linalg.qr(matrix, mode="r"))
    rank = int((values > 1e-9 * values[0]).sum()) if len(values) else 0
    return np.asarray(basis[rank:])


def _rank(matrix: Matrix) -> int:
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return int(np.linalg.matrix_rank(matrix / np.where(norms > 0, norms, 1.0), tol=1e-7)) if matrix.size else 0


def _beyond(null: Matrix, known: Matrix, alive: NDArray[np.bool_]) -> list[Matrix]:
    """Sparse vectors of the null space that, with the known ones, span it."""
    n_missing = len(null) - _rank(known)
    found: list[Matrix] = []
    if n_missing <= 0:
        return found
    candidates = [row for order in _orders(null.shape[1]) for row in _reduced(null, order)]
    span = known
    for row in sorted(candidates, key=np.count_nonzero):
        if len(found) == n_missing:
            break
        longer = np.vstack([span, row])
        if _rank(longer) > _rank(span):
            full = np.zeros(len(alive))
            full[alive] = row
            span, found = longer, [*found, full]
    return found


def _orders(n: int) -> Sequence[Sequence[int]]:
    generator = np.random.default_rng(0)
    return [range(n), range(n)[::-1], *(generator.permutation(n).tolist() for _ in range(6))]


def _reduced(matrix: Matrix, order: Sequence[int]) -> Matrix:
    """Reduced row echelon form."""
    rows = matrix / np.abs(matrix).max(axis=1, keepdims=True)
    at = 0
    for column in order:
        if at == len(rows):
            break
        best = at + int(np.abs(rows[at:, column]).argmax())
        if abs(rows[best, column]) < 1e-6:
            continue
        rows[[at, best]] = rows[[best, at]]
        rows[at] /= rows[at, column]
        rows -= np.outer(np.where(np.arange(len(rows)) == at, 0.0, rows[:, column]), rows[at])
        at += 1
    rows[np.abs(rows) < 1e-6] = 0.0
    return np.asarray(rows[:at])


def _text(vector: Matrix, columns: dict[Column, int]) -> str:
    names = list(columns)
    at = np.flatnonzero(vector)
    smallest = np.abs(vector[at]).min()
    terms: dict[tuple[str, int, float], list[int]] = {}
    for i in at:
        name, axis, index = names[i]
        terms.setdefault((name, axis, round(vector[i] / smallest, 3)), []).append(index)
    return " ".join(
        f"{c:+g} {name}[{axis}]:{','.join(map(str, indices)) if len(indices) < 9 else f'{len(indices)} indices'}"
        for (name, axis, c), indices in terms.items()
    )
