"""What the callbacks of all libraries share: the optimizer, found; its scalars, when they are due; its record."""

import os
from collections.abc import Sequence
from typing import Literal

from noetherperf.paths import local_path
from noetherperf.recorder import Recorder
from noetherperf.sgd import SGD

__all__ = ["Watch", "unwrap"]


def _inside(optimizer: object) -> SGD | None:
    """The SGD in a wrapper, or in a wrapper's wrapper: libraries call what they have wrapped `.optimizer`."""
    while optimizer is not None and not isinstance(optimizer, SGD):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def unwrap(optimizer: object) -> SGD:
    """The SGD inside what a library has wrapped around it: accelerate's AcceleratedOptimizer, Lightning's.

    Args:
        optimizer: A noetherperf.SGD or a wrapper that holds one as `.optimizer`, itself or by another wrapper.

    Raises:
        TypeError: There is none.
    """
    found = _inside(optimizer)
    if found is None:
        raise TypeError(
            f"optimizer: {type(optimizer).__qualname__} is no noetherperf.SGD and wraps none; make "
            "noetherperf.SGD(model.named_parameters(), ..., symmetries=...) the training's optimizer"
        )
    return found


class Watch:
    """Follows the one SGD among a trainer's optimizers from `start` to `stop`.

    Args:
        every: Optimizer steps between scalars, and between rows of the record.
        record: Directory of the record, or None. Ranks after the first write to `record` + ".rank1" and so on.
        exists: What to do where a new training finds a record: "error" or "overwrite". A training that goes on from a
            checkpoint goes on with its record.

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
        self._optimizer: SGD | None = None
        self._recorder: Recorder | None = None
        self._seen = 0

    def start(self, optimizers: Sequence[object], rank: int, remedy: str) -> None:
        """Find the optimizer, after a checkpoint was loaded into it, and begin or continue the record.

        Args:
            optimizers: The trainer's, wrapped or not.
            rank: Of this process.
            remedy: How this library is given an optimizer, for the error's text.

        Raises:
            TypeError: None of them is a noetherperf.SGD.
            ValueError: Several are; the record to be continued is another training's.
            FileExistsError: A new training finds a record.
        """
        self.stop()  # of a training that was interrupted
        found = [sgd for sgd in map(_inside, optimizers) if sgd is not None]
        names = ", ".join(type(optimizer).__qualname__ for optimizer in optimizers) or "none at all"
        if not found:
            raise TypeError(f"this training has no noetherperf.SGD, and so no charges; it has: {names}. {remedy}")
        if len(found) > 1:
            raise ValueError(
                f"this training has {len(found)} noetherperf.SGD ({names}), and the callback follows one; read and "
                "record them yourself: optimizer.readout().scalars(), noetherperf.Recorder(optimizer, path)"
            )
        optimizer = found[0]
        if self._record is not None:
            path = local_path(self._record, "record")
            path = path.with_name(f"{path.name}.rank{rank}") if rank else path
            exists = "resume" if optimizer.step_count else self._exists
            self._recorder = Recorder(optimizer, path, self._every, exists=exists)
        self._optimizer, self._seen = optimizer, optimizer.step_count

    def scalars(self) -> dict[str, float]:
        """`readout().scalars()` without the step, which loggers count themselves; empty if none are due.

        They are due once after every step whose number is a multiple of `every`. Where parameters are sharded this is
        a collective, as readout() is.
        """
        optimizer = self._optimizer
        if optimizer is None or optimizer.step_count == self._seen:
            return {}
        step = self._seen = optimizer.step_count
        if step % self._every:
            return {}
        readout = optimizer.readout()
        self._seen = readout.step
        if readout.step != step:  # a GPU tells only now that its gradient scaler has skipped steps
            return {}
        return {name: value for name, value in readout.scalars().items() if name != "step"}

    def stop(self) -> None:
        """Write what waits and leave the optimizer alone."""
        if self._recorder is not None:
            self._recorder.close()
        self._optimizer = self._recorder = None
