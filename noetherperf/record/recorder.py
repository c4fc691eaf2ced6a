"""Recorder: takes a row after every k-th step of an optimizer, and hands it to a Writer."""

import os
import weakref
from collections.abc import Mapping
from typing import Literal, NoReturn, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import Readout
from noetherperf.record.collect import Collector, Measured, Probe, law_states
from noetherperf.record.create import check_overwritable, create_record, is_occupied
from noetherperf.record.identity import Identity
from noetherperf.record.pending import Entry, Row
from noetherperf.record.resume import resume
from noetherperf.record.writer import Writer


class Recorder:
    """Writes the readouts of an optimizer to disk while it steps. The training loop stays as it is.

        with nperf.Recorder(optimizer, "runs/digits.zarr", every=10, probes={"loss": lambda: loss.item()}):
            ...                                                     # the training loop as it was

    A row is taken when the recorder starts, and after every step whose number is a multiple of `every`. Rows are
    written to disk in chunks:

    - at the latest ten seconds after they were taken, if training goes on;
    - whenever the optimizer's `state_dict()` is taken, so that a record is never behind a checkpoint;
    - at `flush` and `close`, from any thread;
    - when the process ends (unless it is killed), or when the recorder is garbage-collected with its optimizer.

    A record is of one measurement, named by `measurement_id`. If measuring starts anew, or another measurement is
    loaded, the next row raises ValueError. A record with no more than its first row begins anew instead, as when
    pretrained weights are loaded after the recorder was made.

    Rows are keyed by step. After the optimizer is set back (a checkpoint is loaded), the next row drops the rows later
    than that step, so that no step is recorded twice.

    A disk that fails during training costs rows, not the training. A RuntimeWarning says so once; waiting rows are kept
    in bounded memory and written later if possible; nothing half-written is ever read as data. The same holds if the
    record was moved, deleted or overwritten by another Recorder, and in forked processes.

    One Recorder at a time writes to a record. Another process has to wait for `close` or the end of this process. In
    the same process, as when a notebook's cell is run again, the later Recorder wins: "resume" writes the earlier one's
    last rows and closes it, "overwrite" leaves it without a record. Any number of processes may read.

    Args:
        optimizer: One with a `readout()`, such as `nperf.SGD`, or an `nperf.Probe`.
        path: Directory of the record. Missing parents are made; `~` is the user's home.
        every: Steps between rows.
        exists: What to do if the path exists: "error"; "resume", continue the record of the same measurement;
            "overwrite", delete it (a noetherperf record only) and begin anew.
        probes: Name -> callable without arguments, called for each row; returns a number, or a 1-D tensor of constant
            length.
        matrices: Record the matrices of every Balance, too. Of a Balance "attn", `record.probes` always has
            "attn: eigenvalues" and "attn: predicted eigenvalues", [blocks · n]; with `matrices` also "attn: charge" and
            "attn: predicted charge", [blocks · n · n].

    Raises:
        TypeError: The optimizer has no `readout()`.
        ValueError: `every`, `exists` or the path is invalid; a probe returns neither number nor vector; or the record
            to resume is damaged, or of other symmetries, other probes or another measurement.
        FileExistsError: The path exists, and `exists` forbids to change it.
        BlockingIOError: Another process is writing to the record.
    """

    def __init__(
        self,
        optimizer: Measured,
        path: str | os.PathLike[str],
        every: int = 1,
        *,
        exists: Literal["error", "resume", "overwrite"] = "error",
        probes: Mapping[str, Probe] | None = None,
        matrices: bool = False,
    ) -> None:
        if not hasattr(optimizer, "readout"):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} measures no charges; record a noetherperf.MeasuredOptimizer, "
                "such as noetherperf.SGD, or a noetherperf.Probe of this one"
            )
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if exists not in ("error", "resume", "overwrite"):
            raise ValueError(f"exists: must be 'error', 'resume' or 'overwrite', got {exists!r}")
        self.path = local_path(path).resolve()
        self.every = int(every)
        self._optimizer = optimizer
        self._collector = Collector(optimizer, probes or {})
        self._collector.matrices = bool(matrices)
        with optimizer.paused():  # another thread may step; its rows must not fall between the record's and this one
            self._begin(optimizer, exists)

    def _begin(self, optimizer: Measured, exists: str) -> None:
        """Create or resume the record with the present readout, and follow the steps from here on."""
        readout = optimizer.readout()
        row = self._collector.row(readout)
        self._identity = Identity(self.path, optimizer.measurement_id, readout)
        self._seen = self._before = readout.step  # the last step followed; the one before the present step
        self._keep: float = readout.step  # rows of later steps go when the next row is written
        attributes = self._collector.attributes(readout, self._identity.saved_name, self.every)
        occupied = is_occupied(self.path)
        attributes["writer"] = uuid4().hex
        if occupied and exists == "resume":
            shapes = self._collector.probe_shapes
            self._writer, steps = resume(self.path, attributes, shapes, self._identity, readout.step, row)
        else:
            if occupied and exists == "error":
                raise FileExistsError(
                    f"path: {str(self.path)!r} exists; say exists='resume' to continue that record, "
                    "exists='overwrite' to delete it, or record to another path"
                )
            if occupied:
                check_overwritable(self.path)
            attributes["record"] = uuid4().hex
            lock = create_record(self.path, attributes, self._identity.initial, row)
            self._writer, steps = Writer(self.path, lock, attributes), np.empty(0, np.int64)
        self._let_go = weakref.finalize(self, self._writer.close)  # also at the end of the process
        kept = steps[steps <= self._seen]
        if len(kept) == 0:
            self._append(row)
            self.flush()  # the record has its first row from the beginning
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
        """Write the waiting rows and remove the hooks from the optimizer. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._let_go()

    def flush(self) -> None:
        """Write all rows taken so far to disk and commit them, from any thread. If that fails, warn once.

        In a signal handler that interrupts a flush, it returns at once, and the interrupted flush writes the rows.
        """
        self._writer.flush()

    def _before_step(self, *_: object) -> None:
        if self._writer.closed:
            return
        # Parameters may have been loaded since the first row was taken; only a readout tells. A readout may be a
        # collective, so all ranks read here and where a row is due, and nowhere else: one rank alone would deadlock.
        if self._optimizer.step_count == 0:
            self._follow(self._optimizer.readout())
        self._before = self._optimizer.step_count
        if self._before != self._seen:  # a checkpoint was loaded
            self._keep = self._before

    def _after_step(self, *_: object) -> None:
        # Steps that a gradient scaler skipped on a GPU count until the next readout.
        step = self._optimizer.step_count
        if self._writer.closed or step == self._before:
            return
        self._seen = step
        if step % self.every == 0:
            readout = self._optimizer.readout()
            self._seen = readout.step
            if not self._follow(readout) and readout.step == step:
                self._identity.has_first_row_only = False
                self._writer.attributes = self._writer.attributes | law_states(list(readout.values()))
                self._append(self._collector.row(readout))

    def _append(self, row: Row, initial: NDArray[np.float64] | None = None) -> None:
        keep, self._keep = self._keep, np.inf
        # Whichever threads step at once, all earlier rows are of earlier steps.
        self._writer.append(Entry(row, min(keep, float(row["step"]) - 1), initial))

    def _follow(self, readout: Readout) -> bool:
        """Check that a readout is of the record's measurement. Begin the record anew if that loses nothing.

        Returns:
            Whether the record begins anew, with this readout.

        Raises:
            ValueError: It is of another one, and rows would be lost.
        """
        name = self._optimizer.measurement_id
        if self._identity.covers(name, readout):
            return False
        identity = Identity(self.path, name, readout)
        attributes = self._collector.attributes(readout, identity.saved_name, self.every)
        is_alike = all(attributes[key] == self._writer.attributes[key] for key in ("symmetries", "n_groups"))
        if not is_alike or not self._identity.may_begin_anew(name):
            raise self._identity.another_measurement()
        row = self._identity.first_row(name) or self._collector.row(readout)
        self._identity, self._seen, self._keep = identity, readout.step, -1
        attributes["hyperparameters"] = self._writer.attributes["hyperparameters"]  # the arrays that the record has
        self._writer.attributes = self._writer.attributes | attributes
        self._append(row, identity.initial)
        self.flush()
        return True
