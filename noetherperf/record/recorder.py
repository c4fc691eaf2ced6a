"""Recorder: takes a row after every k-th step of an optimizer, and hands it to a Writer."""

import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, Self
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import Readout
from noetherperf.record.choice import Precision, choose
from noetherperf.record.collect import Collector, Measured, Probe
from noetherperf.record.create import check_overwritable, create_record, is_occupied
from noetherperf.record.identity import Identity
from noetherperf.record.pending import Entry, Row
from noetherperf.record.resume import own_attributes, resume
from noetherperf.record.writer import Writer


class Recorder:
    """Writes the readouts of an optimizer to disk while it steps. The training loop stays as it is.

        with nperf.Recorder(optimizer, "runs/digits.zarr", every=10) as recorder:
            ...                                # the training loop as it was; before optimizer.step():
            recorder.log(loss=loss)            # if the loss should be recorded, too

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
        series: What is recorded of every group: names among `noetherperf.record.SERIES`, or "all". By default what
            views and plots need, from which all terms of the laws follow; "all" adds the moments and more. A record
            that is resumed keeps its own.
        dtype: "float32" or "float64" for all series, or a mapping from their names. By default the charge is recorded
            in float64, and all else in float32. The parts of its change (decay, forced, defect, rounding) are series of
            their own, computed in float64: in float32 each keeps seven digits of itself. Numbers of the last step alone
            (`angular_update`, `effective_lr`, `relative_defect`) keep four. Initial charges, times, hyperparameters,
            probes and logged values are float64.
        matrices: Record the matrices of every Balance, too, and not only their spectra: `record.balance("attn")` has
            both.

    Raises:
        TypeError: The optimizer has no `readout()`.
        ValueError: `every`, `exists`, `series`, `dtype`, `matrices` or the path is invalid; a probe has the name of a
            Balance's spectrum; a probe returns neither number nor
            vector; or the record to resume is damaged, or of other symmetries, series, probes or another measurement.
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
        series: Iterable[str] | Literal["all"] | None = None,
        dtype: Precision | Mapping[str, Precision] | None = None,
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
        if not isinstance(matrices, bool):
            raise ValueError(f"matrices: must be True or False, got {matrices!r}")
        self._collector = Collector(optimizer, probes or {}, choose(series, dtype), matrices=matrices)
        with optimizer.paused():  # another thread may step; its rows must not fall between the record's and this one
            self._begin(optimizer, exists)

    def _begin(self, optimizer: Measured, exists: str) -> None:
        """Create or resume the record with the present readout, and follow the steps from here on."""
        readout = optimizer.readout()
        self._identity = Identity(self.path, optimizer.measurement_id, readout)
        self._seen = self._before = readout.step  # the last step followed; the one before the present step
        self._keep: float = readout.step  # rows of later steps go when the next row is written
        occupied = is_occupied(self.path)
        if occupied and exists == "resume":
            self._writer, steps, row = resume(self.path, self._collector, self._identity, readout, self.every)
        else:
            self._collector.begin(readout)
            row = self._collector.row(readout)
            if occupied and exists == "error":
                raise FileExistsError(
                    f"path: {str(self.path)!r} exists; say exists='resume' to continue that record, "
                    "exists='overwrite' to delete it, or record to another path"
                )
            if occupied:
                check_overwritable(self.path)
            attributes = self._collector.attributes(readout, self._identity.saved_name, self.every)
            attributes |= {"record": uuid4().hex, "writer": uuid4().hex}
            lock = create_record(self.path, attributes, self._collector.series, self._identity.initial, row)
            self._writer, steps = Writer(self.path, lock, attributes), np.empty(0, np.int64)
        self._row_bytes = sum(values.nbytes for values in row.values())
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

    @property
    def series(self) -> dict[str, str]:
        """The recorded series, and their precisions."""
        return dict(self._collector.series)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row before compression, which leaves about two thirds of them."""
        return self._row_bytes

    def __repr__(self) -> str:
        kilobytes = f"{self.bytes_per_row / 1000:,.1f} kB a row before compression"
        return f"<Recorder {str(self.path)!r}: {len(self.series)} series every {self.every} steps, {kilobytes}>"

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

    def log(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Record numbers with the next row: the loss, an accuracy, a temperature.

            recorder.log(loss=loss)                      # before optimizer.step(), so that the row of that step has it
            recorder.log({"validation/loss": 0.7})

        Of several values of one name since the last row, the latest is recorded; a row without a new value has NaN. A
        tensor is copied, on its device, and read when a row is taken, so that a step without a row waits for no device.
        `record.probes` has the values.

        Args:
            values: Name -> number, or tensor of one element.
            **named: The same.

        Raises:
            ValueError: A value is no number, a name is a probe's, or the record was begun by an earlier version.
        """
        self._collector.log({**(values or {}), **named})

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
                row = self._collector.row(readout)
                self._writer.attributes = self._writer.attributes | self._collector.states(readout)
                self._append(row)

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
        laws = ("symmetries", "n_groups", "balances", "balance_shapes")
        is_alike = all(attributes[key] == self._writer.attributes[key] for key in laws)
        if not is_alike or not self._identity.may_begin_anew(name):
            raise self._identity.another_measurement()
        row = self._identity.first_row(name) or self._collector.row(readout)
        self._identity, self._seen, self._keep = identity, readout.step, -1
        attributes |= own_attributes(self._writer.attributes) | self._collector.states(readout)
        self._writer.attributes = self._writer.attributes | attributes
        self._append(row, identity.initial)
        self.flush()
        return True
