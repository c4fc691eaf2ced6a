"""TensorBoard: a readout's scalars, each under its own tag."""

from typing import Any, Protocol

from noetherperf.measure.readout import Readout

__all__ = ["add_readout"]


class Writer(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or a writer with the same method."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> None: ...


def add_readout(writer: Writer, readout: Readout, step: int | None = None) -> None:
    """Write `readout.scalars()` with their names as tags: "conv1/charge", "conv1/residual", and so on.

    Args:
        writer: Gets the scalars.
        readout: From `optimizer.readout()`.
        step: Place on the horizontal axis; None: steps since measuring began.
    """
    for name, value in readout.scalars().items():
        if name != "step":
            writer.add_scalar(name, value, readout.step if step is None else step)
