"""A training that can be stopped and go on: a folder with a record and a checkpoint of the last complete epoch."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from noetherperf.common.paths import local_path
from noetherperf.common.progress import progress
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.recipes.settings import Settings
from noetherperf.recipes.train import Batch, Loop
from noetherperf.record import Recorder, open_record
from noetherperf.record.collect import Probe

__all__ = ["Exists", "Session", "Stopped"]

Exists = Literal["error", "resume", "overwrite"]

CHECKPOINT, RECORD = "checkpoint.pt", "record.zarr"
MAY_DIFFER = ("data_dir", "epochs", "device", "backend")  # between a stopped run and the one that goes on
FIRST_RUNS = {"optimizer": "sgd"}  # what the first checkpoints do not have


class Stopped(KeyboardInterrupt):
    """A training was interrupted. The text says where, and what is kept."""


class Session:
    """A run in a folder: a record of every charge, and a checkpoint after every epoch.

    A resumed run makes the same steps as one that was never stopped: the random states are in the checkpoint, and rows
    recorded after it are recorded again.

    Args:
        folder: Folder of the record and the checkpoint.
        what: What is trained, as plain data.
        settings: The settings; when resuming, only epochs, device and backend may differ.
        exists: What to do if there is a checkpoint or record: "error", "resume" or "overwrite".

    Raises:
        FileExistsError: There is a run already, and `exists` is "error".
    """

    def __init__(self, folder: Path | str, what: Mapping[str, object], settings: Settings, exists: Exists) -> None:
        self.folder, self._settings, self._exists = local_path(folder, "folder"), settings, exists
        self._checkpoint, self._record = self.folder / CHECKPOINT, self.folder / RECORD
        if exists == "error" and (self._checkpoint.exists() or self._record.exists()):
            raise FileExistsError(
                f"{str(self.folder)!r} holds a run already; resume or overwrite it, or name another folder"
            )
        options = {**what, **settings.plain}
        self._identity = {name: str(value) for name, value in options.items() if name not in MAY_DIFFER}

    def train(
        self,
        loop: Loop,
        batches: Callable[[int], Iterable[Batch]],
        n_batches: int,
        *,
        probes: Mapping[str, Probe],
        shown: bool,
    ) -> tuple[float, float]:
        """Train the epochs that are left.

        Args:
            loop: With a model and a measured optimizer.
            batches: Number of an epoch, from 0 -> its batches.
            n_batches: Batches in an epoch.
            probes: Recorded beside the charges.
            shown: Whether to show progress.

        Returns:
            Mean loss and accuracy of the last epoch, of each batch before its step; also if no epoch was left.

        Raises:
            Stopped: The training was interrupted.
            ValueError: The run to be resumed had other settings, or has lost its checkpoint.
        """
        optimizer, n_epochs = loop.optimizer, self._settings.epochs
        assert isinstance(optimizer, MeasuredOptimizer)
        epoch, loss, accuracy = 0, math.nan, math.nan
        exists = self._exists
        if exists == "resume" and self._checkpoint.exists():
            epoch, loss, accuracy = self._load(loop)
        elif exists == "resume" and self._record.exists():
            if open_record(self._record).steps[-1] > n_batches:
                raise ValueError(
                    f"{str(self.folder)!r} has a record of more than an epoch, but no checkpoint to go on from; "
                    "overwrite it, or name another folder"
                )
            exists = "overwrite"  # stopped in its first epoch, before a checkpoint

        def counted(epoch: int) -> Iterator[Batch]:
            note = f"epoch {epoch + 1} of {n_epochs}" + (f", loss {loss:.4f}, accuracy {accuracy:.1%}" if epoch else "")
            for number, batch in enumerate(batches(epoch)):
                report(epoch * n_batches + number, note)
                yield batch

        try:
            with (
                progress("training", n_epochs * n_batches, "step", shown=shown) as report,
                Recorder(optimizer, self._record, every=self._settings.every, exists=exists, probes=probes) as recorder,
            ):
                if exists == "overwrite":  # not before the old record may go
                    self._checkpoint.unlink(missing_ok=True)
                while epoch < n_epochs:
                    loss, accuracy = loop.epoch(counted(epoch))
                    recorder.flush()
                    self._save(loop, (epoch + 1, loss, accuracy))
                    epoch += 1
                    report(epoch * n_batches, f"loss {loss:.4f}, accuracy {accuracy:.1%}")
        except KeyboardInterrupt:
            raise Stopped(
                f"after step {optimizer.step_count:,} of {n_epochs * n_batches:,}; {str(self.folder)!r} keeps the "
                f"record, and a checkpoint of {epoch} of {n_epochs} epochs"
                if epoch
                else f"in the first epoch, before a checkpoint; {str(self.folder)!r} keeps the record"
            ) from None
        return loss, accuracy

    def _save(self, loop: Loop, done: tuple[int, float, float]) -> None:
        """Replace the checkpoint atomically: a process that is killed here leaves the previous one."""
        state = {
            "run": self._identity,
            "progress": done,
            "model": loop.model.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "random": self._random(),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _load(self, loop: Loop) -> tuple[int, float, float]:
        """Load the checkpoint; returns its number of epochs, and the last epoch's mean loss and accuracy."""
        state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        saved = FIRST_RUNS | {name: value.removeprefix("torch.") for name, value in state["run"].items()}
        if changed := [name for name, value in self._identity.items() if saved.get(name) != value]:
            shown = ", ".join(f"{name} ({saved.get(name)}, now {self._identity[name]})" for name in changed)
            raise ValueError(
                f"{self._checkpoint}: the run to be resumed had another {shown}; use the same settings, or another "
                "folder"
            )
        loop.model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
        random = state.get("random", {})  # the first checkpoints have none: their epochs draw from their numbers
        if "cpu" in random:
            torch.set_rng_state(random["cpu"])
        if "cuda" in random and self._on_cuda:
            torch.cuda.set_rng_state(random["cuda"], self._settings.device)
        epoch, loss, accuracy = state["progress"]
        return int(epoch), float(loss), float(accuracy)

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self._settings.device).type == "cuda"

    def _random(self) -> dict[str, Any]:
        """The states that batches and dropout are drawn from."""
        cuda = {"cuda": torch.cuda.get_rng_state(self._settings.device)} if self._on_cuda else {}
        return {"cpu": torch.get_rng_state(), **cuda}
