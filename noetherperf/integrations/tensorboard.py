"""TensorBoard: a readout's scalars, each under its own tag; histograms over groups, and of eigenvalues."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from noetherperf.measure.logged import logged
from noetherperf.measure.readout import Readout

__all__ = ["add_readout"]


class Writer(Protocol):
    """torch.utils.tensorboard.SummaryWriter, or a writer with the same method."""

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int) -> None: ...
    def add_histogram(self, tag: str, values: Any, global_step: int) -> None: ...


#: What histograms can be of: one number for each group.
QUANTITIES = (
    "charge",
    "residual",
    "rounding",
    "defect",
    "relative_defect",
    "relative_update",
    "angular_update",
    "effective_lr",
)


def add_readout(writer: Writer, readout: Readout, step: int | None = None, *, histograms: Sequence[str] = ()) -> None:
    """Write `readout.scalars()` with their names as tags: "conv1/abs_charge", "conv1/residual", and so on.

        add_readout(writer, optimizer.readout(), histograms=("charge", "effective_lr"))

    Args:
        writer: Gets the scalars and histograms.
        readout: From `optimizer.readout()`.
        step: Place on the horizontal axis; None: steps since measuring began.
        histograms: Quantities of which each symmetry gets a histogram over its groups, tagged "conv1/groups/charge":
            charge, residual, rounding, defect, relative_defect, relative_update, angular_update or effective_lr. Groups
            that are NaN or infinite are left out. If none is left, there is no histogram. With charge, each Balance
            gets one of the eigenvalues of its matrices, tagged "attn/eigenvalues"; of the others it has none, because
            they are numbers of a group.

    Raises:
        ValueError: histograms has another quantity.
    """
    if isinstance(histograms, str) or (unknown := [quantity for quantity in histograms if quantity not in QUANTITIES]):
        wrong = histograms if isinstance(histograms, str) else unknown[0]
        raise ValueError(f"histograms: must be a sequence of {', '.join(QUANTITIES)}; got {wrong!r}")
    place = readout.step if step is None else step
    for name, value in readout.scalars().items():
        if name != "step":
            writer.add_scalar(name, value, place)
    if not histograms:
        return

    def write(tag: str, values: Tensor) -> None:
        finite = values[values.isfinite()]
        if finite.numel():
            writer.add_histogram(tag, finite.numpy(), place)

    names = logged([*readout, *readout.balances])
    for name, law in zip(names[: len(readout)], readout.values(), strict=True):
        for quantity in histograms:
            write(f"{name}/groups/{quantity}", getattr(law, quantity))
    if "charge" in histograms:
        for name, balance in zip(names[len(readout) :], readout.balances.values(), strict=True):
            write(f"{name}/eigenvalues", balance.eigenvalues)
