"""Reading what a figure draws: some columns at all rows, or a reduction over all columns, in blocks of bounded memory.

Neighbouring columns are read together, since a chunk on disk may hold the groups of several symmetries.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from noetherperf.record import Record

__all__ = ["columns_of", "read_blocks", "read_columns"]

SPAN = 1024  # columns read together
BLOCK = 2**19  # numbers of one series in memory

Block = tuple[slice, slice, dict[str, NDArray[np.float64]]]  # rows, columns, [n rows, n columns] by series


def columns_of(record: Record, name: str) -> slice:
    """A symmetry's columns among the groups of all symmetries."""
    index = list(record).index(name)
    start = sum(record.attrs["n_groups"][:index])
    return slice(start, start + record.attrs["n_groups"][index])


def read_blocks(record: Record, series: Sequence[str], wanted: Iterable[int]) -> Iterator[Block]:
    """All rows of columns, in blocks of neighbouring columns and rows.

    Args:
        record: The record.
        series: Names among `record.series`.
        wanted: Columns that the blocks have to cover, among the groups of all symmetries.
    """
    columns = np.unique(np.fromiter(wanted, np.int64))
    n_rows = len(record.steps)
    of_chunk = record.dataset[next(iter(record.recorded))].encoding.get("preferred_chunks", {}).get("step", 1)
    for span in np.unique(columns // SPAN).tolist():
        inside = columns[columns // SPAN == span]
        groups = slice(int(inside[0]), int(inside[-1]) + 1)
        height = of_chunk * max(1, BLOCK // (of_chunk * (groups.stop - groups.start)))
        for start in range(0, n_rows, height):
            rows = slice(start, min(start + height, n_rows))
            yield rows, groups, record.numbers(series, groups=groups, rows=rows)


def read_columns(record: Record, series: Sequence[str], wanted: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Columns among the groups of all symmetries, [n rows, n wanted] by series."""
    columns = np.asarray(wanted, np.int64)
    found = {name: np.empty((len(record.steps), len(columns))) for name in series}
    for rows, groups, values in read_blocks(record, series, wanted):
        here = np.flatnonzero((columns >= groups.start) & (columns < groups.stop))
        for name, array in found.items():
            array[rows, here] = values[name][:, columns[here] - groups.start]
    return found
