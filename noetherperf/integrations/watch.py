"""What the callbacks of all libraries share: the optimizer, found; its scalars, when they are due; its record."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import Readout
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.record.writer import Recorder, open_record

__all__ = ["Watch", "unwrap"]


def _inside(optimizer: object) -> MeasuredOptimizer | None:
    """The optimizer that measures, in a wrapper or in several: libraries call what they have wrapped `.optimizer`."""
    while optimizer is not None and not isinstance(optimizer, MeasuredOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def unwrap(optimizer: object) -> MeasuredOptimizer:
    """The optimizer that measures, inside what a library has wrapped around it: accelerate's AcceleratedOptimizer.

    Args:
        optimizer: A noetherperf.MeasuredOptimizer, or what holds one as `.optimizer`, itself or by another wrapper.

    Raises:
        TypeError: There is none.
    """
    found = _inside(optimizer)
    if found is None:
        raise TypeError(
            f"optimizer: {type(optimizer).__qualname__} is no noetherperf.MeasuredOptimizer and wraps none; make "
            "noetherperf.SGD(model.named_parameters(), ..., symmetries=...) the training's optimizer"
        )
    return found


class Watch:
    """Follows the one measured optimizer among a trainer's optimizers from `start` to `stop`.

    Args:
        every: Optimizer steps between scalars, and between rows of the record.
        record: Directory of the record, or None. Ranks after the first write to `record` + ".rank1" and so on.
        exists: What to do where a new training finds a record: "error" or "overwrite". A training that goes on, from a
            checkpoint or with an optimizer that has made steps, goes on with its record. Where the callback sees
            another new training after that, it records it to `record` + ".2", and so on.

    Raises:
        ValueError: `every` or `exists` is of no use.
    """

    def __init__(
        self, every: int, record: str | os.PathLike[str] | None, exists: Literal["error", "overwrite"] = "error"
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if exists not in ("error", "overwrite"):
            raise ValueError(f"exists: must be 'error' or 'overwrite', got {exists!r}")
        self._every, self._record, self._exists = every, record, exists
        self._optimizer: MeasuredOptimizer | None = None
        self._recorder: Recorder | None = None
        self._number = 0  # the highest of the records that this callback has begun or continued
        self._before = 0  # steps, as the present step began
        self._due: int | None = None  # the multiple of `every` that was passed since the last look
        self._hooks: list[RemovableHandle] = []

    def start(self, optimizers: Sequence[object], rank: int, remedy: str) -> None:
        """Find the optimizer, after a checkpoint was loaded into it, and begin or continue the record.

        Args:
            optimizers: The trainer's, wrapped or not.
            rank: Of this process.
            remedy: How this library is given an optimizer, for the error's text.

        Raises:
            TypeError: None of them is a noetherperf.MeasuredOptimizer.
            ValueError: Several are; the record to be continued is another training's.
            FileExistsError: A new training finds a record.
        """
        self.stop()  # of a training that was interrupted
        found = [inside for inside in map(_inside, optimizers) if inside is not None]
        names = ", ".join(type(optimizer).__qualname__ for optimizer in optimizers) or "none at all"
        if not found:
            raise TypeError(
                f"this training has no noetherperf.MeasuredOptimizer, and so no charges; it has: {names}. {remedy}"
            )
        if len(found) > 1:
            raise ValueError(
                f"this training has {len(found)} noetherperf.MeasuredOptimizer ({names}), and the callback follows "
                "one; read and record each yourself: optimizer.readout().scalars(), nperf.Recorder(optimizer, path)"
            )
        optimizer = found[0]
        if self._record is not None:
            self._recorder = self._recording(optimizer, f".rank{rank}" if rank else "")
        self._optimizer, self._due = optimizer, None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _recording(self, optimizer: MeasuredOptimizer, suffix: str) -> Recorder:
        """The recorder of this training: on with the record of its measurement, or a new one beside the last.

        What was measured decides, not who asks: a checkpoint that was loaded, or an optimizer that has trained before,
        goes on with its record. A measurement that begins anew never writes over one that this callback has recorded.
        """
        assert self._record is not None
        base = os.fspath(local_path(self._record, "record"))

        def path(number: int) -> str:
            return f"{base}{'' if number == 1 else f'.{number}'}{suffix}"

        readout = optimizer.readout()
        numbers = [*itertools.takewhile(lambda number: Path(path(number)).exists(), itertools.count(1))]
        if readout.step == 0:  # of those that are there already, only an own one that has made no step
            numbers = [number for number in numbers if number == self._number]
        known = next((number for number in reversed(numbers) if _is_of(path(number), readout)), None)
        if known is not None:
            self._number = max(self._number, known)
            return Recorder(optimizer, path(known), self._every, exists="resume")
        number = self._number + 1
        exists = "resume" if readout.step and number == 1 else self._exists
        try:
            recorder = Recorder(optimizer, path(number), self._every, exists=exists)
        except FileExistsError as error:
            if exists == "overwrite":
                raise
            raise FileExistsError(
                f"record: {path(number)!r} exists, and this is a new training; name another path, go on from that "
                "training's checkpoint, or say exists='overwrite' to delete the record"
            ) from error
        self._number = number
        return recorder

    def _before_step(self, *_: object) -> None:
        self._before = self._optimizer.step_count if self._optimizer is not None else 0

    def _after_step(self, *_: object) -> None:
        step = self._optimizer.step_count if self._optimizer is not None else 0
        if step != self._before and step % self._every == 0:
            self._due = step

    def scalars(self) -> dict[str, float]:
        """`readout().scalars()` without the step, which loggers count themselves; empty if none are due.

        They are due once after steps among which one's number is a multiple of `every`. Where parameters are sharded
        this is a collective, as readout() is.
        """
        if self._optimizer is None or self._due is None:
            return {}
        due, self._due = self._due, None
        readout = self._optimizer.readout()
        if readout.step < due:  # a GPU tells only now that its gradient scaler has skipped steps
            return {}
        return {name: value for name, value in readout.scalars().items() if name != "step"}

    def stop(self) -> None:
        """Write what waits and leave the optimizer alone."""
        for hook in self._hooks:
            hook.remove()
        if self._recorder is not None:
            self._recorder.close()
        self._optimizer, self._recorder, self._hooks = None, None, []


def _is_of(path: str, readout: Readout) -> bool:
    """Whether a record is one of this measurement, which is known by the charges that it began with.

    Of a measurement that has made no step, only if the record holds none either: then nothing is lost.
    """
    try:
        record = open_record(path)
    except ValueError:  # no record; whoever begins one there says so
        return False
    if [law.symmetry for law in readout.values()] != list(record.symmetries):
        return False
    initial = torch.cat(
        [torch.empty(0, dtype=torch.float64, device="cpu"), *(law.initial for law in readout.values())]
    ).numpy()
    same = np.array_equal(record.dataset["initial"].to_numpy(), initial, equal_nan=True)
    return same and (readout.step > 0 or record.steps.tolist() in ([], [0]))
