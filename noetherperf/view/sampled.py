"""Some hundred rows of a record in memory, which follow the record as it grows.

A picture is not wider than some hundred pixels, so no view needs more. The rows lie at even distances, a power of two:
when the record grows, rows only go or come at the end, and only new ones are read.
"""

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from noetherperf.record.layout import probe_key
from noetherperf.record.metadata import ROOT
from noetherperf.record.reader import Record, read_record
from noetherperf.record.series import INITIAL, Terms, derivations

MOST_ROWS = 512
MOST_VALUES = 2**22  # of one series in memory, 32 MiB; a record of very many groups has fewer rows

Stamp = tuple[int, int, int] | None
Numbers = NDArray[Any]  # float64 or float32, as it is recorded
Data = Mapping[str, NDArray[np.float64]]


def spread_rows(n_rows: int, most: int) -> NDArray[np.int64]:
    """Rows 0, k, 2k, … and the last, for the smallest power of two k that leaves `most` of them or fewer."""
    k = 1
    while n_rows > most * k:
        k *= 2
    return np.union1d(np.arange(0, n_rows, k), np.arange(max(n_rows - 1, 0), n_rows))


def stretches(rows: NDArray[np.int64]) -> Iterator[slice]:
    """Slices that are the rows together: one for each stretch of rows at even distances."""
    start = 0
    while start < len(rows):
        step = int(rows[start + 1] - rows[start]) if start + 1 < len(rows) else 1
        stop = start + 1
        while stop < len(rows) and rows[stop] - rows[stop - 1] == step:
            stop += 1
        yield slice(int(rows[start]), int(rows[stop - 1]) + 1, step)
        start = stop


class Sampled:
    """Rows of one record.

    Args:
        path: The record's directory.
        label: What the page calls it.
        most_rows: How many rows to take, at most, and the last.

    Attributes:
        record: As it was when it was last opened.
        rows: Which of the record's, [n].
        steps: Of the rows, [n].
        version: Increases whenever there is something new to see.
        probes: Of the rows, by name; those that are a number a row.
        options: The update rule's options in the first and the last row, [parameter groups] each.

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """

    def __init__(self, path: Path, label: str, most_rows: int = MOST_ROWS) -> None:
        self.path, self.label, self._most = path, label, most_rows
        self.version, self._fault = 0, ""
        self._derivations: dict[tuple[str, ...], Mapping[str, Terms]] = {}
        self._damage: dict[str, None] = {}
        self._kept: dict[str, tuple[NDArray[np.int64], Numbers]] = {}  # name -> steps and values
        self._part: tuple[tuple[int, int, int], Sampled] | None = None  # what `within` gave last
        self._seen = self._stamp()
        self._open()

    def follow(self) -> None:
        """Open the record again if it has changed on disk. One that cannot be read stays as it was, with the fault."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        self.version += 1
        try:
            self._open()
        except (OSError, ValueError) as error:
            self._fault = str(error)

    def _stamp(self) -> Stamp:
        """Of the file that commits rows: it is replaced whenever some are."""
        try:
            status = (self.path / ROOT).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _open(self) -> None:
        record, fault = read_record(self.path)
        before, self.record = getattr(self, "record", record), record
        self._fault = fault
        self._known, self._derivations = {*record.series}, {}
        self._initial = record.dataset[INITIAL].to_numpy()
        self._stops: list[int] = np.cumsum([0, *record.attrs["n_groups"]]).tolist()
        if not self._has_grown(before):
            self._kept.clear()
            self._damage.clear()
        self._rows_shown = max(16, min(self._most, MOST_VALUES // max(1, self.n_groups)))
        self._show(spread_rows(len(record.steps), self._rows_shown))
        self.probes = self._read_probes()
        ends = sorted({0, len(record.steps) - 1} if len(record.steps) else ())
        options = record.hyperparameters.items()
        self.options = {str(name): [self._watched(values.isel(step=row)) for row in ends] for name, values in options}

    def _has_grown(self, before: Record) -> bool:
        """Whether the record is the one from before with more rows: not begun anew, not set back and written again."""
        record = self.record
        if any(record.attrs.get(key) != before.attrs.get(key) for key in ("record", "measurement", "writer")):
            return False
        if not np.array_equal(record.steps[: len(before.steps)], before.steps):
            return False
        kept = ((x, *kept) for x, kept in self._kept.items() if x in record.dataset and len(kept[0]))
        for name, steps, values in itertools.islice(kept, 1):  # a run that went back has other numbers in this row
            row = np.flatnonzero(record.steps == steps[-1])
            return np.array_equal(self._watched(record.dataset[name].isel(step=row))[0], values[-1], equal_nan=True)
        return True

    def _show(self, rows: NDArray[np.int64]) -> None:
        self.rows, self.steps = rows, self.record.steps[rows]

    def within(self, first: int, last: int) -> "Sampled":
        """The rows from one step to another, and one row beside each, at smaller distances than this one's."""
        wanted = (self.version, first, last)
        if self._part is None or self._part[0] != wanted:
            start = max(0, int(np.searchsorted(self.record.steps, first, side="right")) - 1)
            stop = min(len(self.record.steps), int(np.searchsorted(self.record.steps, last)) + 1)
            part = copy.copy(self)
            part._kept = {}
            part._show(start + spread_rows(max(0, stop - start), self._rows_shown))
            self._part = wanted, part
        return self._part[1]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the record on disk, in sentences."""
        return [*filter(None, [self._fault]), *self._damage]

    @property
    def n_groups(self) -> int:
        return int(self.record.dataset.sizes["group"])

    def groups(self, symmetry: int) -> slice:
        """A symmetry's columns among all groups."""
        return slice(self._stops[symmetry], self._stops[symmetry + 1])

    def has(self, needs: Sequence[str]) -> bool:
        """Whether these series are recorded, or follow from recorded ones."""
        return all(name in self._known for name in needs)

    def recorded(self, needs: Sequence[str]) -> list[str]:
        """The recorded series that these are, or follow from."""
        return [name for name, terms in self._terms(needs).items() if not terms]

    def _terms(self, needs: Sequence[str]) -> Mapping[str, Terms]:
        """How to get series from the recorded ones, computed once."""
        if (key := tuple(needs)) not in self._derivations:
            self._derivations[key] = derivations(self.record.recorded, needs)
        return self._derivations[key]

    def data(
        self,
        needs: Sequence[str],
        groups: slice,
        *,
        rows: slice | NDArray[np.bool_] = slice(None),
        last: bool = False,
    ) -> Data:
        """Series of some groups by name, [rows, groups], float64; `initial` is [groups].

        Args:
            needs: Names of series.
            groups: Columns among all groups.
            rows: Which of the rows.
            last: Only the last row; the others are not read for it.
        """
        values: dict[str, NDArray[np.float64]] = {INITIAL: self._initial[groups]}
        for name, terms in self._terms(needs).items():
            if terms:
                (_, first), *others = terms
                values[name] = sum((sign * values[term] for sign, term in others), values[first])
            else:
                found = self._last(name) if last else self.series(name)[rows]
                values[name] = found[:, groups].astype(np.float64)
        return {name: values[name] for name in (INITIAL, *needs)}

    def series(self, name: str) -> Numbers:
        """A recorded array, [rows, its width], as precise as it is recorded. Only rows not in memory are read."""
        return self.once(name, lambda new: self._read(name, self.rows[new]))

    def probe(self, name: str) -> Numbers:
        """A recorded vector, [rows, its length], float64."""
        return self.series(self._key(name))

    def entries(self, name: str, row: int, entries: slice) -> Numbers:
        """Some of a vector's entries in one row of the record, not kept in memory."""
        return self._watched(self.record.dataset[self._key(name)].isel(step=int(row))[entries])

    def _key(self, name: str) -> str:
        return probe_key(self.record.attrs["probes"].index(name))

    def once(self, name: str, compute: Callable[[NDArray[np.bool_]], Numbers]) -> Numbers:
        """Numbers of every row, [rows, any], computed once for each row and kept while the record grows.

        Args:
            name: Of the numbers: a recorded series, or a name that no series has.
            compute: From which of the rows are new, [rows], to their numbers.
        """
        steps = self.steps
        old_steps, old = self._kept.get(name, (steps[:0], None))
        if old is not None and np.array_equal(old_steps, steps):
            return old
        known = np.isin(steps, old_steps)
        new = compute(~known)
        values = np.empty((len(steps), new.shape[1]), new.dtype)
        values[~known] = new
        if old is not None:
            values[known] = old[np.isin(old_steps, steps)]
        self._kept[name] = steps, values
        return values

    def _last(self, name: str) -> Numbers:
        """Its last row, [1, all groups]."""
        steps, values = self._kept.get(name, (self.steps[:0], None))
        is_kept = values is not None and np.array_equal(steps, self.steps)
        return values[-1:] if is_kept and values is not None else self._read(name, self.rows[-1:])

    def _read(self, name: str, rows: NDArray[np.int64]) -> Numbers:
        """Rows from disk, [rows, width]."""
        array = self.record.dataset[name]
        found = [self._watched(array.isel(step=stretch)) for stretch in stretches(rows)]
        return np.concatenate([np.empty((0, *array.shape[1:]), array.dtype), *found])

    def _read_probes(self) -> dict[str, NDArray[np.float64]]:
        """The probes that are a number a row, at the rows."""
        numbers = {name: probe for name, probe in self.record.probes.items() if probe.dims == ("step",)}
        return {name: self._watched(probe.isel(step=self.rows)) for name, probe in numbers.items()}

    def _watched(self, array: xr.DataArray) -> NDArray[Any]:
        """Numbers from disk; what is damaged there is NaN, and a fault of this record."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = array.to_numpy()
        self._damage |= {str(warning.message): None for warning in caught}
        return values
