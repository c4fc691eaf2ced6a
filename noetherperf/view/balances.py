"""Balances on the page: spectra, how far their laws are off, and matrices.

A Balance has a row in the map of layers, as every symmetry: the median of its |eigenvalues|, and the worst of its
blocks. Its own map shows eigenvalues, or blocks, in the place of units.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from noetherperf.measure.table import Row, Spread
from noetherperf.measure.verdict import EPSILON, NOTABLE, Rank, number, percent
from noetherperf.view.quantities import Quantity, largest, median_size
from noetherperf.view.sampled import Sampled

__all__ = ["MOST_LINES", "NOT_RECORDED", "Matrices", "balances_of", "row_of"]

NOT_RECORDED = "the matrices are not recorded; Recorder(..., matrices=True) records them"
MOST_LINES = 24  # eigenvalues of a block in one picture, the outermost among them
MOST_UNITS = 256  # of a matrix in one picture
MOST_FILED = 9  # rows whose matrices are in a file without a server
FILE_ENTRIES = 2**17  # of the matrices of one Balance in such a file
Numbers = NDArray[np.float64]
_UNKNOWN = Spread(math.nan, math.nan, math.nan, math.nan)


class Errors(NamedTuple):
    """How far a law is off in each block, [rows, blocks], relative to the size of its terms."""

    residual: Numbers
    rounding: Numbers


class Matrices:
    """What the page asks of one Balance of a record.

    Args:
        sampled: The record's rows.
        index: Of the Balance in `record.balances`.

    Attributes:
        name: The Balance's.
        index: As given.
        blocks: Their number.
        n: Units of a block.
        reason: Why its law is open; empty if it is closed.
    """

    def __init__(self, sampled: Sampled, index: int) -> None:
        attributes = sampled.record.attrs
        self._sampled, self.name, self.index = sampled, list(sampled.record.balances)[index], index
        self.blocks, self.n = attributes["balance_shapes"][index]
        self.reason: str = attributes["balance_reasons"][index]

    @property
    def closed(self) -> bool:
        return not self.reason

    @property
    def is_start(self) -> bool:
        """Whether the last row is of step 0."""
        return bool(self._sampled.steps[-1] == 0)

    @property
    def has_matrices(self) -> bool:
        return f"{self.name}: charge" in self._sampled.record.attrs["probes"]

    def eigenvalues(self, which: str = "eigenvalues") -> Numbers:
        """[rows, blocks · n]; which: "eigenvalues" or "predicted eigenvalues"."""
        return self._sampled.probe(f"{self.name}: {which}")

    def errors(self) -> Errors:
        """How far the law, and the identity, are off."""
        norms = self._sampled.probe(f"{self.name}: norms")
        size, residual, rounding = norms.reshape(len(norms), 3, self.blocks).transpose(1, 0, 2)
        size = np.where(size == 0.0, 1.0, size)
        return Errors(residual / size if self.closed else np.full_like(size, np.nan), rounding / size)

    def of_layer(self, name: str) -> Numbers:
        """A quantity of all blocks together, [rows]; NaN where a Balance has no such quantity."""
        match name:
            case "charge":
                key, values = f"balance {self.index}", self.eigenvalues()
                return self._sampled.once(key, lambda new: median_size(values[new])[:, None])[:, 0]
            case "residual" | "rounding":
                return largest(getattr(self.errors(), name))
        return np.full(len(self._sampled.rows), np.nan)

    def map(self, name: str, quantity: Quantity) -> tuple[Numbers, list[int]] | str:
        """A quantity of every eigenvalue or block, [rows, lines], and the block of each line; or why there is none."""
        if name == "charge":
            return self.eigenvalues(), np.repeat(np.arange(self.blocks), self.n).tolist()
        if name == "residual" and not self.closed:
            return f"{quantity.title}: the law is open, and predicts nothing"
        if name in ("residual", "rounding"):
            return getattr(self.errors(), name), list(range(self.blocks))
        return f"a Balance has no {quantity.title}"

    def spectrum(self, block: int) -> dict[str, Any]:
        """Eigenvalues of a block over time, [lines, rows] each: measured and predicted; and the errors, [1, rows]."""
        lines = np.unique(np.linspace(0, self.n - 1, min(self.n, MOST_LINES)).round().astype(np.int64))
        columns = block * self.n + lines
        found = {"measured": self.eigenvalues()[:, columns].T}
        if self.closed:
            found["law"] = self.eigenvalues("predicted eigenvalues")[:, columns].T
        for error, values in zip(Errors._fields, self.errors(), strict=True):
            found[error] = values[:, block][None]
        return found

    def rows_in_a_file(self) -> list[int]:
        """The sampled rows whose matrices a file without a server holds: a few at even distances, and the last."""
        most = FILE_ENTRIES // max(1, 3 * self.blocks * min(self.n, MOST_UNITS) ** 2) if self.has_matrices else 0
        n_rows = len(self._sampled.rows)
        spread = np.linspace(n_rows - 1, 0, min(most, MOST_FILED, n_rows)).round()
        return [int(row) for row in np.unique(spread)]

    def matrix(self, block: int, row: int) -> dict[str, Numbers]:
        """One block's matrices in one of the sampled rows, [n, n]: charge, law and residual."""
        names = ("charge", "predicted charge") if self.closed else ("charge",)
        entries = slice(block * self.n**2, (block + 1) * self.n**2)
        at = self._sampled.rows[row]
        read = (self._sampled.entries(f"{self.name}: {name}", at, entries) for name in names)
        units = np.unique(np.linspace(0, self.n - 1, min(self.n, MOST_UNITS)).round().astype(np.int64))
        matrices = [values.reshape(self.n, self.n)[np.ix_(units, units)] for values in read]
        found = {"charge": matrices[0]}
        return found | ({"law": matrices[1], "residual": matrices[0] - matrices[1]} if self.closed else {})


def balances_of(run: Sampled) -> list[Matrices]:
    """All Balances of a record."""
    return [Matrices(run, index) for index in range(len(run.record.balances))]


def row_of(matrices: Matrices) -> Row:
    """A Balance's row in the table, of the last recorded step: its eigenvalues, and a verdict on its law."""
    values = matrices.eigenvalues()[-1]
    known = values[np.isfinite(values)]
    spread = _UNKNOWN
    if len(known):
        spread = Spread(*map(float, (np.median(known), known.min(), known.max(), np.median(np.abs(known)))))
    rank, verdict = _verdict(matrices, values)
    parts: Any = dict.fromkeys(("change", "decay", "growth", "defect", "rounding"), _UNKNOWN)
    shares: Any = dict.fromkeys(
        ("angular_update", "effective_lr", "held_to", "defect_share", "rounding_share"), math.nan
    )
    return Row(
        name=matrices.name, kind="balance", n_groups=len(values), charge=spread, **parts, **shares,
        closed=matrices.closed, reason=matrices.reason, verdict=verdict, rank=rank,
    )  # fmt: skip


def _verdict(matrices: Matrices, eigenvalues: Numbers) -> tuple[Rank, str]:
    """As measure/verdict.py has them: worst first."""
    lost = int((~np.isfinite(eigenvalues.reshape(-1, matrices.n))).any(axis=1).sum())
    if lost:
        return (0, -lost / matrices.blocks), f"NaN or infinite in {lost} of {matrices.blocks} blocks"
    if matrices.is_start:
        return (5, 0.0), "no step yet"
    if not matrices.closed:
        return (2, 0.0), "open"
    error = float(np.max(matrices.errors().residual[-1], initial=0.0))
    if error > NOTABLE:
        return (1, -error), f"the law misses {percent(error)} of the matrix"
    return (3, -error), f"holds to {number(max(error, EPSILON), '.0e')}"
