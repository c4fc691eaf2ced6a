"""Hugging Face Trainer: pass the MeasuredOptimizer as `optimizers`, and add a callback."""

import os
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from noetherperf.integrations.watch import Watch

__all__ = ["ChargeCallback"]

REMEDY = "Give Trainer optimizers=(noetherperf.SGD(model.named_parameters(), ..., symmetries=...), None), or AdamW"


class ChargeCallback(TrainerCallback):
    """Logs every symmetry's scalars, and records all charges, while a Trainer trains.

        trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        trainer.add_callback(ChargeCallback(trainer, every=10, record="runs/digits.zarr"))

    The scalars go through `trainer.log`, to `trainer.state.log_history` and to the targets of `report_to`.

    Args:
        trainer: The trainer that the callback is added to, for its `log`.
        every: Optimizer steps between scalars, and between rows of the record.
        record: Directory of the record, or None. Ranks after the first write to `record` + ".rank1" and so on.
        exists: What to do if a new training finds a record: "error" or "overwrite". A training that continues, from a
            checkpoint or with an optimizer that has made steps, continues its record. Another new training of the same
            callback is recorded to `record` + ".2", and so on.

    Raises:
        ValueError: `every` or `exists` is invalid. When training starts: the record is another training's.
        TypeError: When training starts: the trainer's optimizer is no noetherperf.MeasuredOptimizer.
        FileExistsError: When a new training starts and finds a record.
    """

    def __init__(
        self,
        trainer: Trainer,
        every: int = 50,
        record: str | os.PathLike[str] | None = None,
        *,
        exists: Literal["error", "overwrite"] = "error",
    ) -> None:
        self._trainer = trainer
        self._watch = Watch(every, record, exists)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        self._watch.start([optimizer], args.process_index, REMEDY)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if scalars := self._watch.scalars():
            due = control.should_log
            self._trainer.log(scalars)
            control.should_log = due  # log() clears it, but the trainer's own loss of this step is not logged yet

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._watch.stop()
