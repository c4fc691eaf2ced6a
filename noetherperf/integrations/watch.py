"""Common part of all callbacks: the optimizer in a trainer, its scalars when they are due, and its record."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from noetherperf.common.paths import local_path
from noetherperf.measure.readout import Readout
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.probe import Probe, probes_of
from noetherperf.record import Recorder, open_record
from noetherperf.record.collect import Measured
from noetherperf.record.identity import Identity

__all__ = ["Watch", "unwrap"]


def _inside(optimizer: object) -> list[Any]:
    """What has readouts in a wrapper, or in nested wrappers: libraries name the wrapped optimizer `.optimizer`.

    Of the innermost one, because a wrapper may pass on every attribute of what it wraps: itself, or else its Probes.
    """
    found: list[Any] = []
    while optimizer is not None:
        if isinstance(optimizer, Probe):
            return [optimizer]
        if hasattr(optimizer, "readout"):
            found = [optimizer]
        elif isinstance(optimizer, Optimizer):
            found = probes_of(optimizer) or found
        optimizer = getattr(optimizer, "optimizer", None)
    return found


def unwrap(optimizer: object) -> MeasuredOptimizer | Probe:
    """The MeasuredOptimizer inside a library's wrapper, such as accelerate's AcceleratedOptimizer or Lightning's.

    Args:
        optimizer: A noetherperf.MeasuredOptimizer, an optimizer with a noetherperf.Probe, or a wrapper that holds one
            as `.optimizer`, directly or in another wrapper.

    Returns:
        The noetherperf.MeasuredOptimizer, the Probe, or whatever has a `readout()`.

    Raises:
        TypeError: There is none.
        ValueError: The optimizer has several Probes.
    """
    found = _inside(optimizer)
    if not found:
        raise TypeError(
            f"optimizer: {type(optimizer).__qualname__} is no noetherperf.MeasuredOptimizer and wraps none, and has no "
            "noetherperf.Probe; make noetherperf.SGD(model.named_parameters(), ..., symmetries=...), or AdamW, the "
            "training's optimizer, or noetherperf.Probe(optimizer, symmetries, model.named_parameters()) of another one"
        )
    if len(found) > 1:
        raise ValueError(f"optimizer: {type(optimizer).__qualname__} has {len(found)} Probes; use the one you mean")
    only: MeasuredOptimizer | Probe = found[0]
    return only


class Watch:
    """Follows the one measured optimizer among a trainer's optimizers from `start` to `stop`.

    Args:
        every: Optimizer steps between scalars, and between rows of the record.
        record: Directory of the record, or None. Ranks after the first write to `record` + ".rank1" and so on.
        exists: What to do if a new training finds a record: "error" or "overwrite". A training that continues, from a
            checkpoint or with an optimizer that has made steps, continues its record. Another new training of the same
            callback is recorded to `record` + ".2", and so on.

    Raises:
        ValueError: `every` or `exists` is invalid.
    """

    def __init__(
        self, every: int, record: str | os.PathLike[str] | None, exists: Literal["error", "overwrite"] = "error"
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if exists not in ("error", "overwrite"):
            raise ValueError(f"exists: must be 'error' or 'overwrite', got {exists!r}")
        self._every, self._record, self._exists = every, record, exists
        self._optimizer: Measured | None = None
        self._recorder: Recorder | None = None
        self._number = 0  # the highest number of a record that this callback has begun or continued
        self._before = 0  # steps before the present one
        self._due: int | None = None  # the multiple of `every` that was reached since the last scalars()
        self._hooks: list[RemovableHandle] = []

    def start(self, optimizers: Sequence[object], rank: int, remedy: str) -> None:
        """Find the optimizer, after a checkpoint was loaded into it, and begin or continue the record.

        Args:
            optimizers: The trainer's, wrapped or not.
            rank: Of this process.
            remedy: How to give this library an optimizer, for the error message.

        Raises:
            TypeError: None of them is a noetherperf.MeasuredOptimizer, or has a noetherperf.Probe.
            ValueError: Several are or have; or the record to continue is another training's.
            FileExistsError: A new training finds a record.
        """
        self.stop()  # of a training that was interrupted
        found = [inside for optimizer in optimizers for inside in _inside(optimizer)]
        names = ", ".join(type(optimizer).__qualname__ for optimizer in optimizers) or "none at all"
        if not found:
            raise TypeError(
                "this training has no noetherperf.MeasuredOptimizer and no optimizer with a noetherperf.Probe, and so "
                f"no charges; it has: {names}. {remedy}"
            )
        if len(found) > 1:
            raise ValueError(
                f"this training has {len(found)} noetherperf.MeasuredOptimizer ({names}) or Probes, and the callback "
                "follows one; read and record each yourself: optimizer.readout().scalars(), "
                "nperf.Recorder(optimizer, path)"
            )
        optimizer = found[0]
        if self._record is not None:
            self._recorder = self._recording(optimizer, f".rank{rank}" if rank else "")
        self._optimizer, self._due = optimizer, None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _recording(self, optimizer: Measured, suffix: str) -> Recorder:
        """A recorder for this training: it continues the record of its measurement, or begins one beside the last.

        The measurement decides: with a loaded checkpoint, or an optimizer that has trained before, its record is
        continued. A new measurement never overwrites one that this callback has recorded.
        """
        assert self._record is not None
        base = os.fspath(local_path(self._record, "record"))

        def path(number: int) -> str:
            return f"{base}{'' if number == 1 else f'.{number}'}{suffix}"

        readout = optimizer.readout()
        numbers = [*itertools.takewhile(lambda number: Path(path(number)).exists(), itertools.count(1))]
        if readout.step == 0:  # a new measurement may continue only this callback's own record without steps
            numbers = [number for number in numbers if number == self._number]
        known = next((number for number in reversed(numbers) if _is_of(path(number), optimizer, readout)), None)
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

        They are due once after a step whose number is a multiple of `every`. With sharded parameters this is a
        collective, as readout() is.
        """
        if self._optimizer is None or self._due is None:
            return {}
        due, self._due = self._due, None
        readout = self._optimizer.readout()
        if readout.step < due:  # the readout shows that a gradient scaler on a GPU skipped steps
            return {}
        return {name: value for name, value in readout.scalars().items() if name != "step"}

    def stop(self) -> None:
        """Close the record and remove the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        if self._recorder is not None:
            self._recorder.close()
        self._optimizer, self._recorder, self._hooks = None, None, []


def _is_of(path: str, optimizer: Measured, readout: Readout) -> bool:
    """Whether a record is of this measurement, as a Recorder sees it.

    If the measurement has made no step, the record must hold none either, so that nothing is lost.
    """
    try:
        record = open_record(path)
    except ValueError:  # no record; beginning one there raises
        return False
    own = [*(law.symmetry for law in readout.values()), *(law.symmetry for law in readout.balances.values())]
    recorded = [*record.symmetries, *record.balances.values()]
    if [symmetry.content for symmetry in own] != [symmetry.content for symmetry in recorded]:
        return False
    same = Identity(record.path, optimizer.measurement_id, readout).is_of(record, readout.step)
    return same and (readout.step > 0 or record.steps.tolist() in ([], [0]))
