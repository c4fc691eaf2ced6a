"""Some hundred rows of a record in memory, which follow the record as it grows.

A picture is not wider than some hundred pixels, so no view needs more. The rows lie at even distances, a power of two:
when the record grows, rows only go or come at the end, and only new ones are read.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from noetherperf.record.metadata import ROOT
from noetherperf.record.reader import Record, read_record

MOST_ROWS = 512
MOST_VALUES = 2**22  # of one series in memory, 32 MiB; a record of very many groups has fewer rows
BLOCK_VALUES = 2**23  # read at once

Stamp = tuple[int, int, int] | None


def spread_rows(n_rows: int, most: int) -> NDArray[np.int64]:
    """Rows 0, k, 2k, … and the last; k is the smallest power of two that leaves at most `most` of them, and the last."""
    k = 1
    while n_rows > most * k:
        k *= 2
    return np.union1d(np.arange(0, n_rows, k), np.arange(max(n_rows - 1, 0), n_rows))


class Sampled:
    """Rows of one record.

    Args:
        path: The record's directory.
        label: What the page calls it.
        most_rows: How many rows to take, at most, and the last.

    Attributes:
        record: As it was when it was last opened.
        version: Increases whenever there is something new to see.
        probes: Of the rows, by name; those that are a number a row.
        options: The update rule's options in the first and the last row, [parameter groups] each.
        faults: What is wrong with the record on disk, in sentences.

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """

    def __init__(self, path: Path, label: str, most_rows: int = MOST_ROWS) -> None:
        self.path, self.label, self._most = path, label, most_rows
        self.version, self.faults = 0, dict[str, None]()
        self._kept: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}  # series -> its steps and values
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
            self.faults = {str(error): None}

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
        self.faults = {fault: None} if fault else {}
        grown = np.array_equal(record.steps[: len(before.steps)], before.steps)
        same = all(record.attrs.get(key) == before.attrs.get(key) for key in ("record", "measurement", "writer"))
        if not (grown and same):  # it was begun anew, or set back, and rows may have been written again
            self._kept.clear()
        most = max(16, min(self._most, MOST_VALUES // max(1, self.n_groups)))
        self.rows = spread_rows(len(record.steps), most)
        self.probes = self._read_probes()
        ends = sorted({0, len(record.steps) - 1} if len(record.steps) else ())
        options = record.hyperparameters.items()
        self.options = {str(name): [self._watched(values.isel(step=row)) for row in ends] for name, values in options}

    @property
    def n_groups(self) -> int:
        return int(self.record.dataset.sizes["group"])

    @property
    def steps(self) -> NDArray[np.int64]:
        """Of the rows."""
        return self.record.steps[self.rows]

    def groups(self, symmetry: int) -> slice:
        """A symmetry's columns among all groups; -1: all."""
        if symmetry < 0:
            return slice(None)
        stops = np.cumsum([0, *self.record.attrs["n_groups"]]).tolist()
        return slice(stops[symmetry], stops[symmetry + 1])

    def has(self, needs: tuple[str, ...]) -> bool:
        """Whether these series are recorded."""
        return all(name in self.record.dataset or name == "discrete_budget" for name in needs)

    def data(self, needs: tuple[str, ...], groups: slice) -> xr.Dataset:
        """Series of some groups, dims (step, group); `initial` is [group]."""
        columns = {name: (("step", "group"), self._series(name)[:, groups]) for name in needs}
        initial = self.record.dataset["initial"].to_numpy()[groups]
        return xr.Dataset({**columns, "initial": (("group",), initial)})

    def last(self, needs: tuple[str, ...]) -> xr.Dataset:
        """Series of all groups in the last row, dims (step, group), a single step. No other rows are read."""
        columns = {}
        for name in needs:
            steps, values = self._kept.get(name, (self.steps[:0], None))
            is_kept = values is not None and np.array_equal(steps, self.steps)
            columns[name] = ("step", "group"), values[-1:] if is_kept else self._read(name, self.rows[-1:])
        return xr.Dataset(columns)

    def _series(self, name: str) -> NDArray[np.float64]:
        """A recorded series, [rows, all groups]. Only rows that are not in memory are read."""
        if name == "discrete_budget" and name not in self.record.dataset:  # the first records
            free, forced, defect = (self._series(f"discrete_{source}") for source in ("free", "forced", "defect"))
            return free + forced + defect
        steps = self.steps
        old_steps, old = self._kept.get(name, (steps[:0], np.empty((0, self.n_groups))))
        if np.array_equal(old_steps, steps):
            return old
        known = np.isin(steps, old_steps)
        values = np.empty((len(steps), self.n_groups))
        values[known] = old[np.isin(old_steps, steps)]
        values[~known] = self._read(name, self.rows[~known])
        self._kept[name] = steps, values
        return values

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows from disk, a block at a time: what lies between them is read too, and dropped."""
        array = self.record.dataset[name]
        span = max(1, BLOCK_VALUES // max(1, self.n_groups))
        values, start = np.empty((len(rows), self.n_groups)), 0
        while start < len(rows):
            stop = int(np.searchsorted(rows, rows[start] + span))
            values[start:stop] = self._watched(array.isel(step=rows[start:stop]))
            start = stop
        return values

    def _read_probes(self) -> dict[str, NDArray[np.float64]]:
        """The probes that are a number a row, at the rows."""
        numbers = {name: probe for name, probe in self.record.probes.items() if probe.dims == ("step",)}
        return {name: self._watched(probe.isel(step=self.rows)) for name, probe in numbers.items()}

    def _watched(self, array: xr.DataArray) -> NDArray[Any]:
        """Numbers from disk; what is damaged there is NaN, and a fault of this record."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = array.to_numpy()
        self.faults |= {str(warning.message): None for warning in caught}
        return values
