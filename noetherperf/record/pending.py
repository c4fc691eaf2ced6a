"""Rows that wait for the disk, and their effect on the rows before them.

A signal handler may add rows during any of these operations. So each of them changes the list in one instruction, and
writers work on a copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Row = dict[str, NDArray[Any]]  # float64, or the precision of a recorded series


class Entry(NamedTuple):
    """A row, and its effect on the rows before it."""

    row: Row
    keep: float  # rows of later steps are dropped
    initial: NDArray[np.float64] | None = None  # if a measurement begins with the row: its initial charges


class Batch(NamedTuple):
    """The joint effect of several entries, in their order.

    Attributes:
        rows: The rows that remain.
        keep: Rows before the batch that are of later steps are dropped.
        initial: The initial charges, if a measurement begins in the batch.
    """

    rows: list[Row]
    keep: float
    initial: NDArray[np.float64] | None

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Batch":
        rows: list[Row] = []
        for entry in entries:
            rows = [row for row in rows if row["step"] <= entry.keep]
            rows.append(entry.row)
        initial = next((entry.initial for entry in reversed(entries) if entry.initial is not None), None)
        return cls(rows, min(entry.keep for entry in entries), initial)


class Pending:
    """The entries that wait, oldest first."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def copy(self) -> list[Entry]:
        return list(self._entries)

    def remove(self, n: int) -> None:
        """Remove the oldest n entries, which are written."""
        del self._entries[:n]

    def clear(self) -> None:
        self._entries.clear()

    def limit(self, n: int) -> None:
        """Drop the oldest entries down to n. The first one that remains takes over their effect on earlier rows."""
        n_dropped = len(self._entries) - n
        if n_dropped > 0:
            _, keep, initial = Batch.of(self._entries[: n_dropped + 1])
            self._entries[: n_dropped + 1] = [Entry(self._entries[n_dropped].row, keep, initial)]
