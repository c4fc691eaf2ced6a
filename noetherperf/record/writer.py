"""Writes rows to a record on disk: safe to kill at any moment.

The root's `zarr.json` defines what is committed; it is replaced atomically after the rows are written. Chunks are
replaced atomically too. So a process that is killed between any two instructions leaves a record that ends with its
last commit. A power failure is another matter: no write waits for the disk.
"""

import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from noetherperf.record.array import Array
from noetherperf.record.files import replace_json
from noetherperf.record.lock import Lock
from noetherperf.record.metadata import arrays_of, read_metadata, write_metadata
from noetherperf.record.pending import Batch, Entry, Pending

FLUSH_SECONDS = 10.0
KEPT_CHUNKS = 4  # rows of so many chunks are kept in memory while the disk fails


class Writer:
    """Appends rows to one record. It does not refer to the optimizer, and so may outlive it.

    Any thread may flush; a second thread waits. A signal handler may interrupt a flush and flush: its call returns at
    once, and the interrupted flush writes its rows too.

    Args:
        path: Of a record that exists and is undamaged.
        lock: On the record.
        attributes: Of the record, from the next commit on.
    """

    def __init__(self, path: Path, lock: Lock, attributes: dict[str, Any]) -> None:
        self.path, self.attributes, self.closed = path, attributes, False
        self.id: str = attributes["writer"]
        self.last_flush = time.monotonic()
        self._lock = lock
        self._waiting = Pending()
        self._mutex = threading.RLock()  # reentrant: a signal handler cannot wait for the code that it interrupts
        self._is_busy = self._again = self._warned = self._forked = False
        arrays = arrays_of(path, read_metadata(path))
        self._initial = arrays["initial"]
        self._arrays = {name: array for name, array in arrays.items() if array.dims[0] == "step"}
        self.n_rows_chunk = arrays["step"].chunk[0]
        steps, _ = arrays["step"].read()
        self._n_rows, self._last = len(steps), int(steps[-1]) if len(steps) else -1
        _writers.add(self)

    def append(self, entry: Entry) -> None:
        """Take a row, and flush if a chunk is full or the last flush is long ago."""
        self._waiting.add(entry)
        if len(self._waiting) % self.n_rows_chunk == 0 or time.monotonic() - self.last_flush >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all rows taken so far to disk and commit them. If that fails, warn once."""
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
        """Make this the only writer of a resumed record: earlier ones write to it no more.

        Raises:
            OSError: The disk fails.
        """
        root = read_metadata(self.path)
        root["attributes"]["writer"] = self.id
        write_metadata(self.path, root)

    def close(self) -> None:
        """Write the waiting rows and release the record."""
        self.closed = True
        self.flush()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """A context in which nothing is written, so that another writer can take over the record.

        Raises:
            BlockingIOError: This thread is inside a write, which a signal handler interrupts.
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
        """In a forked child: the record and the waiting rows belong to the parent process."""
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
                    f"{KEPT_CHUNKS * self.n_rows_chunk} rows are kept and tried again",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._waiting.limit(KEPT_CHUNKS * self.n_rows_chunk)

    def _write(self) -> None:
        """Append the waiting rows, then commit. It may fail at any point and be repeated."""
        entries = self._waiting.copy()
        root = self._own_metadata()
        rows, keep, initial = Batch.of(entries)
        n_kept = self._n_rows_up_to(keep)
        if n_kept < self._n_rows or initial is not None:
            # Commit that the dropped rows are gone before they are overwritten.
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
            # For readers that do not know consolidated metadata.
            replace_json(array.folder / "zarr.json", {**described[name], "shape": arrays[name].shape})
        self._commit(root, n_kept + len(rows), arrays)
        self._last = int(rows[-1]["step"])
        self._waiting.remove(len(entries))

    def _own_metadata(self) -> dict[str, Any]:
        """The root's metadata, if the record still belongs to this writer.

        Raises:
            OSError, ValueError: It does not.
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
        """Set the number of valid rows, by one atomic replacement of the root's metadata."""
        arrays = {name: array._replace(shape=(n_rows, *array.shape[1:])) for name, array in arrays.items()}
        root["attributes"] |= self.attributes
        for name, array in arrays.items():
            root["consolidated_metadata"]["metadata"][name]["shape"] = array.shape
        write_metadata(self.path, root)
        self._n_rows, self._arrays = n_rows, arrays
        if n_rows == 0:
            self._last = -1


_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


def writer_of(path: Path) -> Writer | None:
    """The open Writer of this process for the record at a path, under whatever path it was opened."""
    try:
        name = read_metadata(path)["attributes"].get("writer")
    except (OSError, ValueError):
        return None
    return next((writer for writer in list(_writers) if writer.id == name and not writer.closed), None)


def _leave_to_the_parent() -> None:
    for writer in list(_writers):
        writer.leave_to_the_parent()


os.register_at_fork(after_in_child=_leave_to_the_parent)
