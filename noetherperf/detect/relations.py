"""Linear relations between columns of numbers, with small integer coefficients."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Matrix", "independent", "integer_relations", "null_space", "reduced"]

Matrix = NDArray[np.float64]

# Singular values of unit columns below this are zero: true relations give 1e-16 to 1e-12, others 1e-6 and more.
ZERO = 1e-10
LARGEST = 12  # coefficient
N_ORDERS = 64


def null_space(columns: Matrix) -> Matrix:
    """All c with columns @ c = 0: a basis [k, m] for columns [rows, m], none of them zero, rows >= m."""
    norms = np.linalg.norm(columns, axis=0)
    triangle = np.linalg.qr(columns / norms, mode="r")
    _, values, basis = np.linalg.svd(triangle)
    rank = int((values > ZERO * values[0]).sum()) if len(values) else 0
    return np.asarray(basis[rank:] / norms)


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
    """The columns that are not linear combinations of earlier ones."""
    kept: list[int] = []
    basis = np.zeros((columns.shape[0], 0))
    for i, column in enumerate((columns / np.linalg.norm(columns, axis=0)).T):
        rest = column - basis @ (basis.T @ column)
        rest -= basis @ (basis.T @ rest)
        if np.linalg.norm(rest) > 1e-8:
            kept.append(i)
            basis = np.column_stack([basis, rest / np.linalg.norm(rest)])
    return kept


def integer_relations(null: Matrix) -> tuple[list[NDArray[np.int64]], list[Matrix]]:
    """A basis of a null space [k, m] in small integers, with few terms.

    Returns:
        The integer relations, each without common divisor; and the blocks of the null space that have none.
    """
    if not len(null):
        return [], []
    plain, _ = reduced(null, list(range(null.shape[1])))
    found: list[NDArray[np.int64]] = []
    rest: list[Matrix] = []
    for rows in _components(plain):
        block = plain[rows]
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
        chosen: list[NDArray[np.int64]] = []
        for candidate in ranked:
            if len(chosen) < len(rows) and np.linalg.matrix_rank(np.array([*chosen, candidate])) > len(chosen):
                chosen.append(candidate)
        found += chosen
        if len(chosen) < len(rows):
            rest.append(block)
    return found, rest


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
