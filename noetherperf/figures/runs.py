"""Training runs for the gallery: an ordinary loop that keeps the optimizer's readout every few steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from noetherperf import theory
from noetherperf.measure.charges import ChargeReadout
from noetherperf.measure.readout import Readout
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.sgd import SGD
from noetherperf.recipes import digits
from noetherperf.recipes.train import Loop, accuracy, charge_error
from noetherperf.recipes.vgg import centre, vgg16
from noetherperf.rules.sgd import Hyper

__all__ = ["Run", "Vgg", "modified_flow", "series", "train", "train_vgg"]

N_CENTRED = 128


@dataclass(frozen=True)
class Run:
    """The data of a training run.

    Attributes:
        steps: The step of each row, [n rows].
        readouts: The readout of each row.
        probes: The probed values of each row, [n rows, n probed].
        losses: Training loss of each step's batch, [n steps].
        accuracy: Share of the test images classified correctly at the end, 0 to 1.
        sq_updates: Where it was asked for, |u|² of each step by the symmetry's name, [n steps, n groups].
    """

    steps: NDArray[np.int64]
    readouts: Sequence[Readout]
    probes: NDArray[np.float64]
    losses: NDArray[np.float64]
    accuracy: float
    sq_updates: Mapping[str, Tensor] = field(default_factory=dict)


def train(
    model: nn.Module,
    optimizer: MeasuredOptimizer,
    data: digits.Digits,
    n_steps: int,
    batch_size: int,
    *,
    every: int = 1,
    probe: Callable[[], Tensor] = lambda: torch.empty(0),
    with_updates: bool = False,
) -> Run:
    """Train with cross-entropy on batches drawn with torch's global seed, with a readout every few steps.

    Args:
        model: A network that returns logits; stays in training mode.
        optimizer: Its optimizer, with the symmetries to measure.
        data: Images and labels.
        n_steps: Number of steps.
        batch_size: Images in a batch, drawn without replacement within an epoch.
        every: Steps between readouts. The first readout is before step 1, the last after the last step.
        probe: Called at each readout; returns a vector.
        with_updates: Whether to keep |u|² of every step, which `modified_flow` needs of norms.

    Raises:
        RuntimeError: The measured charges at the end are not those of the parameters.
    """
    loop = Loop(model, optimizer)
    steps, readouts, probes, losses = [0], [optimizer.readout()], [_kept(probe)], []
    sq_updates: dict[str, list[Tensor]] = {name: [] for name in readouts[0]} if with_updates else {}
    order: list[Tensor] = []
    for step in range(1, n_steps + 1):
        if not order:  # full batches only, so that the noise does not vary
            order = [
                rows for rows in torch.randperm(len(data.train_labels)).split(batch_size) if len(rows) == batch_size
            ]
        rows = order.pop()
        loop.step(data.train_images[rows], data.train_labels[rows])
        losses.append(loop.loss.item())
        is_row = step % every == 0 or step == n_steps
        if is_row or with_updates:
            readout = optimizer.readout()
        for name, kept in sq_updates.items():
            kept.append(readout[name].moments["sq_u"])
        if is_row:
            steps.append(step)
            readouts.append(readout)
            probes.append(_kept(probe))
    charge_error(optimizer)
    tests = zip(data.test_images.split(128), data.test_labels.split(128), strict=True)
    all_updates = {name: torch.stack(kept) for name, kept in sq_updates.items()}
    return Run(np.array(steps), readouts, np.stack(probes), np.array(losses), accuracy(model, tests), all_updates)


def series(run: Run, name: str, read: Callable[[ChargeReadout], Tensor]) -> NDArray[np.float64]:
    """One quantity of one symmetry over the rows, [n rows, n groups]."""
    found: NDArray[np.float64] = torch.stack([read(readout[name]) for readout in run.readouts]).numpy()
    return found


def modified_flow(run: Run, name: str, hyper: Hyper) -> tuple[Tensor, Tensor]:
    """Free and forced of a symmetry's modified flow law at each row, [n rows, n groups] each.

    Args:
        run: From cold buffers; `with_updates`, unless it is a translation.
        name: The symmetry's.
        hyper: The run's.
    """
    law, times = run.readouts[0][name], [readout.time for readout in run.readouts]
    free = theory.free(law.symmetry.law, law.charge, times, hyper, flow="modified")
    if law.symmetry.law == "translation":
        return free, torch.zeros_like(free)
    driven = theory.driven(law.charge, run.sq_updates[name], hyper, flow="modified")
    return free, driven[torch.from_numpy(run.steps)] - free


@dataclass(frozen=True)
class Vgg:
    """Settings for training a VGG-16 on the enlarged digits.

    Attributes:
        batch_norm, width, image_size, dropout: As in recipes.vgg.vgg16.
        hyper, n_steps, batch_size, every, with_updates: As in `train`.
    """

    batch_norm: bool
    width: float
    image_size: int
    hyper: Hyper
    n_steps: int
    batch_size: int = 16
    every: int = 5
    dropout: float = 0.5
    with_updates: bool = False


@cache
def train_vgg(settings: Vgg) -> Run:
    """Train a VGG-16 on the enlarged digits. The run is cached by its settings.

    Without BatchNorm, the network starts centred on the first images (`recipes.vgg.centre`). Otherwise such a narrow
    network hardly learns in so few steps.
    """
    torch.manual_seed(0)
    model, symmetries = vgg16(
        batch_norm=settings.batch_norm,
        width=settings.width,
        image_size=settings.image_size,
        dropout=settings.dropout,
    )
    data = _digits(settings.image_size)
    if not settings.batch_norm:
        centre(model, data.train_images[:N_CENTRED])
    optimizer = SGD(model.named_parameters(), **asdict(settings.hyper), symmetries=symmetries)
    return train(
        model,
        optimizer,
        data,
        settings.n_steps,
        settings.batch_size,
        every=settings.every,
        with_updates=settings.with_updates,
    )


@cache
def _digits(image_size: int) -> digits.Digits:
    """The enlarged digits, cached for all runs."""
    return digits.load(image_size=image_size)


def _kept(probe: Callable[[], Tensor]) -> NDArray[np.float64]:
    kept: NDArray[np.float64] = probe().detach().double().numpy().copy()
    return kept
