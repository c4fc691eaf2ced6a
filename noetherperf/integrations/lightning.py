"""PyTorch Lightning: return the optimizer from configure_optimizers, and add a callback."""

import os
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from noetherperf.integrations.watch import Watch

__all__ = ["ChargeCallback"]

REMEDY = "Return noetherperf.SGD(self.named_parameters(), ..., symmetries=...), or AdamW, from configure_optimizers()"


class ChargeCallback(Callback):
    """Logs every symmetry's scalars, and records all charges, while Lightning trains.

        trainer = Trainer(callbacks=[ChargeCallback(every=10, record="runs/digits.zarr")])

    Every logger of the trainer gets `readout().scalars()` at `trainer.global_step`, under the same names.

    Args:
        every: Optimizer steps between scalars, and between rows of the record.
        record: Directory of the record, or None. Ranks after the first write to `record` + ".rank1" and so on.
        exists: What to do if a new training finds a record: "error" or "overwrite". A training that continues, from a
            checkpoint or with an optimizer that has made steps, continues its record. Another new training of the same
            callback is recorded to `record` + ".2", and so on.

    Raises:
        ValueError: `every` or `exists` is invalid. When training starts: the trainer has several
            noetherperf.MeasuredOptimizer, or the record is another training's.
        TypeError: When training starts: the trainer has no noetherperf.MeasuredOptimizer.
        FileExistsError: When a new training starts and finds a record.
    """

    def __init__(
        self,
        every: int = 50,
        record: str | os.PathLike[str] | None = None,
        *,
        exists: Literal["error", "overwrite"] = "error",
    ) -> None:
        self._watch = Watch(every, record, exists)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch.start(trainer.optimizers, trainer.global_rank, REMEDY)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if scalars := self._watch.scalars():
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._watch.stop()
