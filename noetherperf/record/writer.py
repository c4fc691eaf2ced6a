"""Time series of readouts on disk, written while training runs: safe to kill at any moment, and to resume.

`record.py` says what a record is, `chunks.py` how its numbers are stored. What is committed is what the root's
`zarr.json` says; it is replaced atomically after the rows are written. Chunks are replaced atomically too, so a process
that is killed between any two instructions leaves a record that ends with its last commit. Losing power is another
matter: nothing waits for the disk.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Self
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import ChargeReadout, Charges, Readout
from noetherperf.optim.distributed import rank
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.record.chunks import Array, replace_file
from noetherperf.record.lock import Lock
from noetherperf.record.reader import (
    COORDINATES,
    FORMAT,
    HYPERPARAMETERS,
    KINDS,
    SERIES,
    TERMS,
    Law,
    Record,
    arrays_of,
    open_record,
    positions,
    probe_key,
    probe_kind,
    read_metadata,
    read_record,
    relative_error,
)

__all__ = ["SERIES", "TERMS", "Law", "Record", "Recorder", "open_record", "relative_error"]

FLUSH_SECONDS = 10.0
CHUNK_VALUES = 2**18  # a chunk is 2 MiB of float64, and the rows of one chunk are what memory holds at most
CHUNK_GROUPS = 2**14

_NOTHING = torch.empty(0, dtype=torch.float64, device="cpu")

Probe = Callable[[], Any]
Row = dict[str, NDArray[np.float64]]


class Entry(NamedTuple):
    """A row that waits for the disk, and what becomes of those before it."""

    row: Row
    keep: float  # rows of later steps go
    initial: NDArray[np.float64] | None = None  # where a measurement begins with the row: what its laws start from


class Writer:
    """The record on disk, and the rows that wait for it; it knows nothing of the optimizer, and so may outlive it.

    Any thread may flush, and a signal handler amid a flush: another thread waits, while a call from within a flush
    returns at once, and the flush that it came upon writes its rows too.

    Args:
        path: Of a record that is there and in order.
        lock: On it.
        attributes: What the next commit says of the record.
    """

    def __init__(self, path: Path, lock: Lock, attributes: dict[str, Any]) -> None:
        self.path, self.attributes, self.closed = path, attributes, False
        self.id: str = attributes["writer"]
        self.last_flush = time.monotonic()
        self._lock = lock
        self._waiting: list[Entry] = []
        self._mutex = threading.RLock()  # reentrant, for no signal handler can wait for the code that it interrupts
        self._is_busy = self._again = self._warned = self._forked = False
        arrays = arrays_of(path, read_metadata(path))
        self._initial = arrays["initial"]
        self._arrays = {name: array for name, array in arrays.items() if array.dims[0] == "step"}
        self.n_rows_chunk = arrays["charge"].chunk[0]
        steps, _ = arrays["step"].read()
        self._n_rows, self._last = len(steps), int(steps[-1]) if len(steps) else -1
        _writers.add(self)

    def append(self, entry: Entry) -> None:
        """Take a row; it reaches the disk with the next flush, and soon."""
        self._waiting.append(entry)
        if len(self._waiting) % self.n_rows_chunk == 0 or time.monotonic() - self.last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all rows taken so far to disk and commit them. Warns, once, where the disk refuses."""
        with self._mutex:
            self._again = True
            if self._is_busy:
                return
            self._is_busy = True
            try:
                while self._again:
                    self._again = False
                    self._attempt()
            finally:
                self._is_busy = False
                if self.closed:
                    self._lock.release()

    def claim(self) -> None:
        """Make the record that was resumed this writer's, so that no earlier one goes on with it.

        Raises:
            OSError: The disk refuses.
        """
        root = read_metadata(self.path)
        root["attributes"]["writer"] = self.id
        _write_json(self.path / "zarr.json", root)

    def close(self) -> None:
        """Write what waits, and let the record go."""
        self.closed = True
        self.flush()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While another takes the record over: nothing is written.

        Raises:
            BlockingIOError: This very thread is amid a write.
        """
        with self._mutex:
            if self._is_busy:
                raise BlockingIOError(
                    f"path: this process is writing to the record {str(self.path)!r} at this moment (a signal handler "
                    "interrupts it); make the Recorder later, or record to another path"
                )
            yield

    def forget(self) -> None:
        """Drop the rows that wait."""
        self._waiting.clear()

    def leave_to_the_parent(self) -> None:
        """In a forked child: the record and the rows are those of the process that began it."""
        self._mutex, self._is_busy, self._forked = threading.RLock(), False, True
        self.forget()

    def _attempt(self) -> None:
        self.last_flush = time.monotonic()
        if not self._waiting:
            return
        try:
            self._write()
        except (OSError, ValueError) as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the record {str(self.path)!r} could not be written ({error}); training goes on, and the last "
                    f"{4 * self.n_rows_chunk} rows are kept and tried again",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._drop_oldest(len(self._waiting) - 4 * self.n_rows_chunk)

    def _drop_oldest(self, n: int) -> None:
        """Bound the memory; what the rows did to those before them stays to be done."""
        if n > 0:
            gone, first = self._waiting[:n], self._waiting[n]
            initials = [entry.initial for entry in (*gone, first) if entry.initial is not None]
            keep = min(entry.keep for entry in (*gone, first))
            self._waiting[: n + 1] = [Entry(first.row, keep, initials[-1] if initials else None)]

    def _write(self) -> None:
        """Append the waiting rows, then commit. Repeating it after a failure at any point is safe."""
        entries = list(self._waiting)  # a signal handler may add to them
        root = self._own_metadata()
        rows: list[Row] = []
        for entry in entries:
            rows = [row for row in rows if row["step"] <= entry.keep]
            rows.append(entry.row)
        initial = next((entry.initial for entry in reversed(entries) if entry.initial is not None), None)
        n_kept = self._n_rows_up_to(min(entry.keep for entry in entries))
        if n_kept < self._n_rows or initial is not None:
            # First commit that the dropped rows are gone, only then write over them.
            self._commit(root, n_kept, self._arrays)
        if initial is not None:
            self._initial.write(0, initial)
        described = root["consolidated_metadata"]["metadata"]
        arrays = {}
        for name, array in self._arrays.items():
            # A parameter group added during training widens its arrays; earlier rows are NaN there.
            width = [max(array.shape[1], *(row[name].shape[0] for row in rows))] if array.shape[1:] else []
            block = array.blank((len(rows), *width))
            for target, row in zip(block, rows, strict=True) if width else ():
                target[: row[name].shape[0]] = row[name]
            if not width:
                block[:] = [row[name] for row in rows]
            arrays[name] = array.write(n_kept, block)
            # Readers that do not know consolidated metadata find every array by itself.
            _write_json(array.folder / "zarr.json", {**described[name], "shape": arrays[name].shape})
        self._commit(root, n_kept + len(rows), arrays)
        self._last = int(rows[-1]["step"])
        del self._waiting[: len(entries)]

    def _own_metadata(self) -> dict[str, Any]:
        """The root's metadata, where the record is still the one that this writer made or resumed.

        Raises:
            OSError, ValueError: It is not.
        """
        if self._forked:
            raise OSError("it is written by the process that this one was forked from")
        root = read_metadata(self.path)
        if root["attributes"].get("writer") != self.id:
            raise OSError("another Recorder has taken its place since")
        return root

    def _n_rows_up_to(self, step: float) -> int:
        if step >= self._last:
            return self._n_rows
        steps, lost = self._arrays["step"].read()
        if lost:
            raise OSError(f"its array step{lost[0]}")
        return int(np.searchsorted(steps, step, side="right"))

    def _commit(self, root: dict[str, Any], n_rows: int, arrays: dict[str, Array]) -> None:
        """Say how many rows count: one atomic replacement of the root's metadata, which holds every array's length."""
        arrays = {name: array._replace(shape=(n_rows, *array.shape[1:])) for name, array in arrays.items()}
        root["attributes"] |= self.attributes
        for name, array in arrays.items():
            root["consolidated_metadata"]["metadata"][name]["shape"] = array.shape
        _write_json(self.path / "zarr.json", root)
        self._n_rows, self._arrays = n_rows, arrays
        if n_rows == 0:
            self._last = -1


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def _leave_to_the_parent() -> None:
    for writer in list(_writers):
        writer.leave_to_the_parent()


os.register_at_fork(after_in_child=_leave_to_the_parent)


class Recorder:
    """Writes the readouts of an optimizer to disk as it steps; the training loop needs no line for it.

        with nperf.Recorder(optimizer, "runs/digits.zarr", every=10, probes={"loss": lambda: loss.item()}):
            ...                                                     # the training loop as it was

    A row is written when the recorder starts and after every step whose number is a multiple of `every`. Rows reach the
    disk in chunks, at the latest ten seconds after they were taken if training goes on; whenever the optimizer's
    `state_dict()` is taken, so that a record is never behind a checkpoint; at `flush` and `close`, from any thread; and
    when the process ends, unless it is killed, or the recorder is gone with its optimizer.

    A record is of one measurement, which `optimizer.measurement_id` names. When measuring starts anew, or another
    measurement is loaded, the next row raises ValueError; but where the record has no more than its first row, as when
    pretrained weights are loaded after the recorder was made, it begins anew too.

    Rows are keyed by the step: when the optimizer is set back (a checkpoint is loaded), rows later than its present
    step are dropped as soon as the next row is written, so that no step is there twice.

    While recording, a disk that fails costs rows and not the training: a RuntimeWarning says so once, waiting rows are
    kept within bounded memory and tried again, and nothing half-written is ever read as data. So it is where the record
    was moved, deleted, or overwritten by another Recorder, and in forked processes.

    One Recorder at a time writes to a record. Another process may not until `close`, or the end of this one, however
    it ends. In the same process, as when a notebook's cell is run again, the later Recorder wins: "resume" writes the
    earlier one's last rows and closes it, "overwrite" leaves it without a record. Any number may read.

    Args:
        optimizer: `nperf.SGD`, or another `nperf.MeasuredOptimizer`.
        path: Directory of the record; its parents are made where they are missing, `~` is the user's home.
        every: Steps between rows.
        exists: What to do where the path exists: "error"; "resume", continue the record of the same measurement;
            "overwrite", delete it (a noetherperf record only) and begin anew.
        probes: Name -> callable without arguments, called for each row; returns a number, or a 1-D tensor whose length
            never changes.

    Raises:
        TypeError: The optimizer cannot be read out.
        ValueError: `every`, `exists` or the path is of no use, a probe returns neither number nor vector, or the record
            to be resumed is damaged, or of other symmetries, other probes or another measurement.
        FileExistsError: The path exists and `exists` does not allow to touch it.
        BlockingIOError: Another process is writing to the record.
    """

    def __init__(
        self,
        optimizer: MeasuredOptimizer,
        path: str | os.PathLike[str],
        every: int = 1,
        *,
        exists: Literal["error", "resume", "overwrite"] = "error",
        probes: Mapping[str, Probe] | None = None,
    ) -> None:
        if not hasattr(optimizer, "readout"):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} measures no charges; record a noetherperf.MeasuredOptimizer, "
                "such as noetherperf.SGD"
            )
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if exists not in ("error", "resume", "overwrite"):
            raise ValueError(f"exists: must be 'error', 'resume' or 'overwrite', got {exists!r}")
        self.path = local_path(path).resolve()
        self.every = int(every)
        self._optimizer = optimizer
        self._probes = dict(probes or {})
        self._probe_shapes: dict[str, tuple[int, ...]] = {}

        with optimizer.paused():  # steps of another thread would fall between the record's rows and this one's
            self._begin(optimizer, exists)

    def _begin(self, optimizer: MeasuredOptimizer, exists: str) -> None:
        """Make the record or take it over, with the present readout, and follow the steps from here on."""
        readout = optimizer.readout()
        row = self._take(readout)
        self._initial = _initial(readout)
        self._measurement = optimizer.measurement_id
        # The name in a checkpoint is rank 0's; records of other ranks are known by the charges that they began with.
        self._is_named = rank() == 0
        self._has_begun_only = True  # the record has no more than the first row
        # It has more, of a run that began as this one does; the name of this one's measurement, and its first row.
        self._starts_over: tuple[str, Row] | None = None
        self._seen = self._before = readout.step
        self._keep: float = readout.step
        attributes = self._attributes(readout)
        occupied = self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))
        attributes["writer"] = uuid4().hex
        if occupied and exists == "resume":
            self._writer, steps = self._resume(readout, row, attributes)
        else:
            if occupied:
                _require_overwritable(self.path, exists)
            attributes["record"] = uuid4().hex
            lock = _create(self.path, attributes, self._initial, row)
            self._writer, steps = Writer(self.path, lock, attributes), np.empty(0, np.int64)
        self._let_go = weakref.finalize(self, self._writer.close)  # also at the end of the process
        kept = steps[steps <= self._seen]
        if len(kept) == 0:
            self._append(row)
            self.flush()  # so that the record has its first row from the beginning
        elif kept[-1] != self._seen and self._seen % self.every == 0:
            self._append(row)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self.flush()),
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Recorder cannot be copied or pickled: it alone writes to its record; make another")

    def close(self) -> None:
        """Write what waits and leave the optimizer alone. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._let_go()

    def flush(self) -> None:
        """Write all rows taken so far to disk and commit them, from any thread. Warns, once, where the disk refuses.

        In a signal handler that interrupts a flush it returns at once, and the interrupted flush writes the rows.
        """
        self._writer.flush()

    def _before_step(self, *_: object) -> None:
        if self._writer.closed:
            return
        # Before the first step parameters may have been loaded that the first row does not know; reading tells. All
        # ranks read here, and where a row is due: nowhere else, for one that reads alone would wait for ever.
        if self._optimizer.step_count == 0:
            self._follow(self._optimizer.readout())
        self._before = self._optimizer.step_count
        if self._before != self._seen:  # a checkpoint was loaded
            self._keep = self._before

    def _after_step(self, *_: object) -> None:
        # A GPU tells only when it is read which steps a gradient scaler skipped; until then they count as steps.
        step = self._optimizer.step_count
        if self._writer.closed or step == self._before:
            return
        self._seen = step
        if step % self.every == 0:
            readout = self._optimizer.readout()
            self._seen = readout.step
            if not self._follow(readout) and readout.step == step:
                self._has_begun_only = False
                self._writer.attributes = self._writer.attributes | _law_states(list(readout.values()))
                self._append(self._take(readout))

    def _append(self, row: Row, initial: NDArray[np.float64] | None = None) -> None:
        keep, self._keep = self._keep, np.inf
        # Whatever threads step at once: no row stays that is not of an earlier step.
        self._writer.append(Entry(row, min(keep, float(row["step"]) - 1), initial))

    def _take(self, readout: Readout) -> Row:
        """One row: every array's values at this step."""
        row = {name: _concatenate(readout, series.read) for name, series in SERIES.items()}
        row["step"] = np.asarray(readout.step, dtype=np.float64)
        row["time"] = np.asarray(readout.time, dtype=np.float64)
        for name in HYPERPARAMETERS:
            row[name] = np.asarray([float(group[name]) for group in self._optimizer.param_groups], dtype=np.float64)
        for index, (name, probe) in enumerate(self._probes.items()):
            value = torch.as_tensor(probe()).detach().to("cpu", torch.float64).numpy().copy()
            if value.ndim > 1:
                raise ValueError(f"probes: {name!r} returned shape {value.shape}; return a number, or flatten it")
            shape = self._probe_shapes.setdefault(name, value.shape)
            if value.shape != shape:
                raise ValueError(f"probes: {name!r} returned shape {value.shape} after {shape}; it must not change")
            row[probe_key(index)] = value
        return row

    def _attributes(self, readout: Readout) -> dict[str, Any]:
        """What a record says of the measurement that the readout is of."""
        groups, packages = self._optimizer.param_groups, ("noetherperf", "torch", "numpy", "xarray", "zarr")
        charges = list(readout.values())
        return {
            "noetherperf_record": FORMAT,
            "measurement": self._measurement if self._is_named else None,
            "symmetries": [charge.symmetry.to_dict() for charge in charges],
            "n_groups": [charge.charge.numel() for charge in charges],
            **_law_states(charges),
            "probes": list(self._probes),
            "every": self.every,
            "backend": self._optimizer.backend,
            "dtypes": sorted({str(p.dtype).removeprefix("torch.") for group in groups for p in group["params"]}),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "coordinates": " ".join(COORDINATES),
        }

    def _follow(self, readout: Readout) -> bool:
        """See that a readout is of the record's measurement; begin the record anew where nothing is lost by it.

        Returns:
            Whether the record begins anew, with this readout.

        Raises:
            ValueError: It is of another, and rows of the record's would be lost.
        """
        if self._optimizer.measurement_id == self._measurement:
            return False
        name, initial = self._optimizer.measurement_id, _initial(readout)
        if not self._is_named and np.array_equal(initial, self._initial, equal_nan=True):
            self._measurement = name
            return False
        before = self._measurement, self._is_named
        self._measurement, self._is_named = name, rank() == 0
        attributes = self._attributes(readout)
        is_start = self._starts_over is not None and self._starts_over[0] == name
        fits = all(attributes[key] == self._writer.attributes[key] for key in ("symmetries", "n_groups"))
        if not fits or not (self._has_begun_only or is_start):
            self._measurement, self._is_named = before
            raise self._is_another()
        row = self._starts_over[1] if self._starts_over and is_start else self._take(readout)
        self._initial, self._seen, self._keep = initial, readout.step, -1
        self._has_begun_only, self._starts_over = True, None
        self._writer.attributes = self._writer.attributes | attributes
        self._append(row, initial)
        self.flush()
        return True

    def _is_another(self) -> ValueError:
        return ValueError(
            f"the record {str(self.path)!r} is of another measurement: measuring was begun anew since, or another "
            "run's checkpoint was loaded. Load the checkpoint before the Recorder is made; after reset_measurement(), "
            "or for a new run, record to another path"
        )

    def _resume(self, readout: Readout, row: Row, attributes: dict[str, Any]) -> tuple[Writer, NDArray[np.int64]]:
        """Take over the record that is there.

        Returns:
            What writes to it, and the steps that it has.
        """
        lock, earlier = _lock(self.path), _writer_of(self.path)
        try:
            if earlier:
                with earlier.quiet():
                    pass
                earlier.flush()
            record, fault = read_record(self.path)
            if fault:
                raise ValueError(f"{fault}, so that it cannot be resumed; record to another path")
            self._check_resumable(record, readout, row, attributes)
            if earlier:
                warnings.warn(
                    f"path: another Recorder of this process was writing to the record {str(self.path)!r}; its last "
                    "rows are written, it is closed, and this one goes on",
                    RuntimeWarning,
                    stacklevel=4,
                )
                earlier.close()
            attributes["measurement"] = record.attrs.get("measurement")
            writer = Writer(self.path, lock, attributes)
            writer.claim()
        except BaseException:
            lock.release()
            raise
        self._has_begun_only = len(record.steps) <= 1
        return writer, record.steps

    def _check_resumable(self, record: Record, readout: Readout, row: Row, attributes: dict[str, Any]) -> None:
        for key, what in (("symmetries", "symmetries"), ("n_groups", "numbers of groups"), ("probes", "probes")):
            if record.attrs[key] != attributes[key]:
                raise ValueError(
                    f"exists='resume': {str(self.path)!r} records other {what} than this optimizer and recorder have; "
                    "record to another path, or say exists='overwrite'"
                )
        for probe, values in record.probes.items():
            if values.shape[1:] != (shape := self._probe_shapes[probe]):
                raise ValueError(
                    f"probes: {probe!r} returned shape {shape}, but {str(self.path)!r} holds it with shape "
                    f"{values.shape[1:]}"
                )
        name: str | None = record.attrs.get("measurement")
        is_alike = np.array_equal(record.dataset["initial"], self._initial, equal_nan=True)
        if name is None or not self._is_named:
            self._is_named = False
            if not is_alike:
                raise self._is_another()
        elif name != self._measurement:
            # A run that was killed before its first checkpoint begins again as it began; its rows are written anew.
            if not (is_alike and readout.step == 0):
                raise self._is_another()
            self._starts_over = self._measurement, row
            self._measurement = name


def _concatenate(readout: Readout, read: Callable[[Charges], Tensor]) -> NDArray[np.float64]:
    """One variable of all symmetries side by side, [all groups], float64."""
    charges = [readout.together] if isinstance(readout, Readout) else readout.values()
    values: NDArray[np.float64] = torch.cat([_NOTHING, *map(read, charges)]).numpy()
    return values


def _initial(readout: Readout) -> NDArray[np.float64]:
    return _concatenate(readout, lambda charge: charge.initial)


def _law_states(charges: Sequence[ChargeReadout]) -> dict[str, Any]:
    return {"closed": [charge.closed for charge in charges], "reason": [charge.reason for charge in charges]}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(content).encode())


def _require_overwritable(path: Path, exists: str) -> None:
    """Raise FileExistsError unless the path may be deleted: asked for, a record, and nothing but a record."""
    if exists == "error":
        raise FileExistsError(
            f"path: {str(path)!r} exists; say exists='resume' to continue that record, exists='overwrite' to delete "
            "it, or record to another path"
        )
    try:
        ours = {"zarr.json", *read_metadata(path)["consolidated_metadata"]["metadata"]}
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"exists='overwrite' deletes noetherperf records only, and {error}; remove it yourself, or record to "
            "another path"
        ) from error
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and not _is_leftover(entry))
    if others:
        raise FileExistsError(
            f"exists='overwrite' would delete {others[0]!r} too, which lies in {str(path)!r} and is no part of the "
            "record; move it away, or record to another path"
        )


def _is_leftover(entry: Path) -> bool:
    """Whether a file was left by a process that was killed while it wrote one of the record's."""
    return entry.name.startswith(".zarr.json.") or entry.suffix == ".partial"


def _writer_of(path: Path) -> Writer | None:
    """What in this process writes to the record at a path, by whatever path it knows it."""
    try:
        name = read_metadata(path)["attributes"].get("writer")
    except (OSError, ValueError):
        return None
    return next((writer for writer in list(_writers) if writer.id == name and not writer.closed), None)


def _lock(path: Path) -> Lock:
    """Keep a record to this process.

    Raises:
        BlockingIOError: Another process writes to it.
    """
    try:
        return Lock(path / "initial" / "zarr.json")  # of what is written once; files that change are replaced
    except BlockingIOError:
        raise BlockingIOError(
            f"path: another process is writing to the record {str(path)!r}; end it or close its Recorder, or record to "
            "another path"
        ) from None


def _create(path: Path, attributes: Mapping[str, Any], initial: NDArray[np.float64], row: Row) -> Lock:
    """Make a record without rows beside the path, then move it there: a path holds a whole record or none.

    Returns:
        The lock on it.

    Raises:
        BlockingIOError: Another process writes to the record that is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # An empty directory stays the one it is: it may be the present one, have permissions of its own, or be a mount.
    is_empty = path.is_dir() and not any(path.iterdir())
    # Their names are short whatever the record's is, which may be as long as a name can be.
    building, old = ((path if is_empty else path.parent) / f".noetherperf.{uuid4().hex}" for _ in range(2))
    try:
        _build(building, attributes, initial, row)
        lock = _lock(building)
        if is_empty:
            for entry in sorted(building.iterdir(), key=lambda entry: entry.name == "zarr.json"):  # by which it is one
                entry.replace(path / entry.name)
            building.rmdir()
            return lock
        if path.exists():
            earlier = _writer_of(path)
            with _lock(path), earlier.quiet() if earlier else nullcontext():
                path.replace(old)
                if earlier:
                    earlier.forget()  # rows of the record that goes
        building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return lock


def _build(path: Path, attributes: Mapping[str, Any], initial: NDArray[np.float64], row: Row) -> None:
    n_groups, n = attributes["n_groups"], len(initial)
    kinds = KINDS | {
        probe_key(index): probe_kind(index, name, 1 + row[probe_key(index)].ndim)
        for index, name in enumerate(attributes["probes"])
    }
    widths = {name: values.shape for name, values in row.items()}
    n_rows = min(1024, max(16, CHUNK_VALUES // max(1, *(size for shape in widths.values() for size in shape))))
    metadata = {}
    for name, kind in kinds.items():
        if kind.dims[0] == "step":
            shape = (0, *widths[name])
            columns = [16 if name in HYPERPARAMETERS else min(CHUNK_GROUPS, max(1, size)) for size in widths[name]]
            chunk = (n_rows, *columns)
        else:
            shape, chunk = (n,), (max(1, min(CHUNK_GROUPS, n)),)
        array = Array(path / name, attributes["record"], kind.dtype, shape, chunk, kind.dims, attributes=kind.labels)
        array.folder.mkdir(parents=True)
        metadata[name] = array.metadata()
        _write_json(array.folder / "zarr.json", metadata[name])
        if name == "initial":
            array.write(0, initial)
        elif name in ("symmetry", "position"):
            array.write(0, positions(n_groups)[name])
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": metadata},
    }
    _write_json(path / "zarr.json", root)
