"""Linear relations between columns of numbers, with small integer coefficients."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Matrix", "decomposed", "independent", "integer_relations", "null_space", "nullity", "present", "reduced"]

Matrix = NDArray[np.float64]

# Singular values of unit columns below this are zero: true relations give 1e-16 to 1e-12, others 1e-6 and more.
ZERO = 1e-10
LARGEST = 12  # coefficient
N_ORDERS = 64


def null_space(columns: Matrix) -> Matrix:
    """All c with columns @ c = 0: a basis [k, m] for columns [rows, m], none of them zero, rows >= m."""
    norms = np.linalg.norm(columns, axis=0)
    _, values, basis = decomposed(triangle(columns / norms))
    return np.asarray(basis[_rank(values) :] / norms)


def present(columns: Matrix) -> NDArray[np.int64]:
    """The numbers of the columns that are more than rounding, [k]."""
    norms = np.linalg.norm(columns, axis=0)
    return np.flatnonzero(norms > ZERO * norms.max(initial=0.0))


def nullity(columns: Matrix) -> int:
    """The number of rows of the null space; a fraction of its cost."""
    values = torch.linalg.svdvals(torch.from_numpy(triangle(columns / np.linalg.norm(columns, axis=0)))).numpy()
    return int(columns.shape[1]) - _rank(values)


# In torch, whose number of threads is set with that of the rest. NumPy's threads wait for each other beside busy
# processes.


def triangle(columns: Matrix) -> Matrix:
    """R of the decomposition QR."""
    return np.asarray(torch.linalg.qr(torch.from_numpy(columns), mode="r").R.numpy())


def decomposed(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """U, the values, and Vᵀ with all its rows."""
    u, values, basis = torch.linalg.svd(torch.from_numpy(matrix))
    return u.numpy(), values.numpy(), basis.numpy()


def _rank(singular_values: Matrix) -> int:
    return int((singular_values > ZERO * singular_values[0]).sum()) if len(singular_values) else 0


def reduced(matrix: Matrix, order: list[int]) -> tuple[Matrix, list[int]]:
    """The reduced row echelon form with pivots taken in this order of columns, and the pivots."""
    rows = matrix / np.maximum(np.abs(matrix).max(axis=1, keepdims=True), 1e-300)
    pivots: list[int] = []
    for column in order:
        at = len(pivots)
        if at == len(rows):
            break
        best = at + int(np.abs(rows[at:, column]).argmax())
        if abs(rows[best, column]) < 1e-7:
            continue
        rows[[at, best]] = rows[[best, at]]
        rows[at] /= rows[at, column]
        others = np.arange(len(rows)) != at
        rows[others] -= np.outer(rows[others, column], rows[at])
        pivots.append(column)
    rows[np.abs(rows) < 1e-7] = 0.0
    return rows[: len(pivots)], pivots


def independent(columns: Matrix) -> list[int]:
    """The columns that are not linear combinations of earlier ones; more rows than columns."""
    diagonal = np.diag(triangle(columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)))
    return np.flatnonzero(np.abs(diagonal) > 1e-8).tolist()


def integer_relations(
    null: Matrix, known: Matrix | None = None, valid: Callable[[NDArray[np.int64]], bool] = lambda _: True
) -> tuple[list[NDArray[np.int64]], Matrix]:
    """Integer relations with few terms that, together with the known ones, span a null space.

    Args:
        null: A basis [k, m].
        known: Rows that lie in the null space, [j, m]; what they span is not told again.
        valid: Which relations are of use.

    Returns:
        The relations, each without common divisor; and vectors of the null space that these do not span.
    """
    span = _Span(null.shape[1])
    for row in known if known is not None else ():
        span.add(row)
    found: list[NDArray[np.int64]] = []
    if not len(null):
        return found, null
    plain, _ = reduced(null, list(range(null.shape[1])))
    for rows in _components(plain):
        block = plain[rows]
        if all(span.has(row) for row in block):
            continue
        support = np.flatnonzero(np.abs(block).sum(0))
        generator = np.random.default_rng(0)
        orders = [list(support), list(support[::-1])]
        if len(rows) > 1:
            orders += [list(generator.permutation(support)) for _ in range(N_ORDERS)]
        candidates: dict[tuple[int, ...], NDArray[np.int64]] = {}
        for order in orders:
            for row in reduced(block, order)[0]:
                whole = _integers(row)
                if whole is not None:
                    candidates.setdefault(tuple(whole.tolist()), whole)
        ranked = sorted(candidates.values(), key=lambda c: (np.count_nonzero(c), np.abs(c).sum(), *(-np.abs(c))))
        for candidate in ranked:
            if not span.has(candidate) and valid(candidate):
                span.add(candidate)
                found.append(candidate)
    return found, plain[[not span.has(row) for row in plain]]


class _Span:
    """What vectors of one length span."""

    def __init__(self, length: int) -> None:
        self._basis = np.zeros((0, length))

    def _rest(self, vector: NDArray[Any]) -> Matrix:
        rest = vector / np.linalg.norm(vector)
        for _ in range(2):
            rest = rest - (self._basis @ rest) @ self._basis
        return np.asarray(rest)

    def has(self, vector: NDArray[Any]) -> bool:
        return bool(np.linalg.norm(self._rest(vector)) < 1e-6)

    def add(self, vector: NDArray[Any]) -> None:
        rest = self._rest(vector)
        if (size := np.linalg.norm(rest)) > 1e-6:
            self._basis = np.vstack([self._basis, rest / size])


def _components(matrix: Matrix) -> list[list[int]]:
    """The rows, sorted into sets that have no column in common."""
    label = list(range(len(matrix)))
    for column in matrix.T:
        touching = [label[i] for i in np.flatnonzero(column)]
        label = [min(touching) if x in touching else x for x in label]
    return [[i for i, x in enumerate(label) if x == name] for name in dict.fromkeys(label)]


def _integers(row: Matrix) -> NDArray[np.int64] | None:
    """The row as integers without common divisor, the first one positive; None if small integers do not fit."""
    terms = row[row != 0]
    if not len(terms):
        return None
    scaled = row / np.abs(terms).min()
    for multiple in range(1, 7):
        whole = np.rint(scaled * multiple)
        if np.abs(scaled * multiple - whole).max() < 1e-5 and np.abs(whole).max() <= LARGEST:
            integers = whole.astype(np.int64)
            divisor = math.gcd(*integers.tolist())
            first = next(itertools.dropwhile(lambda x: x == 0, integers.tolist()))
            return np.asarray(integers // (divisor if first > 0 else -divisor))
    return None
