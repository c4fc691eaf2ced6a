"""The paper's experiment: a large network on an image data set, every charge recorded. It can be resumed."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from noetherperf.common.paths import local_path
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.recipes import datasets
from noetherperf.recipes.resnet import resnet18
from noetherperf.recipes.settings import Settings
from noetherperf.recipes.train import Batch, Loop, Result, accuracy, charge_error, make_optimizer
from noetherperf.recipes.vgg import vgg16
from noetherperf.record import Recorder
from noetherperf.symmetry import Symmetry

__all__ = ["MODELS", "PAPER", "Experiment", "run"]

#: Each takes n_classes, in_channels, image_size and width, and returns a network and its symmetries.
MODELS: dict[str, Callable[..., tuple[nn.Module, list[Symmetry]]]] = {
    "vgg16": partial(vgg16, batch_norm=False),
    "vgg16-bn": partial(vgg16, batch_norm=True),
    "resnet18": resnet18,
}
#: The poster gives no hyperparameters. These come from a script for CIFAR-100 in its authors' public repository
#: (github.com/danielkunin/neural-mechanics, scripts/fo_vgg16_bn_gpu4.sh: plain SGD, λ of 0, 10⁻⁴, 10⁻³ and 10⁻²). The
#: script does not say which λ and batch size the figures on Tiny ImageNet had.
PAPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 1e-4, "batch_size": 128, "epochs": 100}
CHECKPOINT = "checkpoint.pt"
RECORD = "record.zarr"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A network and a data set.

    Args:
        dataset: One of recipes.datasets.DATASETS.
        data_dir: The data set's folder, if it has one.
        image_size: Pixels of a side of digits and synthetic images.
        model: One of MODELS.
        width: Factor on all channels and hidden units of the network.
    """

    dataset: str
    data_dir: Path | None = None
    image_size: int | None = None
    model: str = "vgg16"
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"there is no model {self.model!r}; there are: {', '.join(MODELS)}")
        if not self.width > 0:
            raise ValueError(f"width must be positive, not {self.width}")


def run(
    folder: Path | str,
    experiment: Experiment,
    settings: Settings,
    *,
    exists: Literal["error", "resume", "overwrite"] = "error",
    workers: int = 0,
    progress: bool = True,
) -> Result:
    """Train, record all charges to folder/record.zarr, and keep a checkpoint of the last complete epoch beside it.

    A resumed run makes the same steps as one that was never stopped: batches, augmentation and dropout of an epoch are
    drawn from the seed and the epoch's number, and rows recorded after the checkpoint are recorded again. (With another
    number of workers, augmentation is drawn in another order.)

    Args:
        folder: Folder of the record and the checkpoint.
        experiment: The network and the data set.
        settings: The settings; when resuming, only epochs, device and backend may differ.
        exists: What to do if there is a checkpoint or record: "error", "resume" or "overwrite".
        workers: Number of processes that read images.
        progress: Show a progress bar.

    Returns:
        Result. train_accuracy is that of the last epoch's batches, each before its step, also where a finished run is
        resumed and no epoch is left. seconds and steps count this call only.

    Raises:
        FileExistsError: There is a run already, and `exists` is "error".
        FileNotFoundError: A file of the data set is missing.
        ValueError: Options contradict each other, or the run to be resumed had other settings.
    """
    folder = local_path(folder, "folder")
    checkpoint_path, record_path = folder / CHECKPOINT, folder / RECORD
    if exists == "error" and (checkpoint_path.exists() or record_path.exists()):
        raise FileExistsError(f"{str(folder)!r} holds a run already; resume or overwrite it, or name another folder")
    torch.manual_seed(settings.seed)
    data = datasets.load(experiment.dataset, experiment.data_dir, image_size=experiment.image_size, seed=settings.seed)
    model, symmetries = MODELS[experiment.model](
        n_classes=data.n_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        width=experiment.width,
    )
    model.to(settings.device, settings.dtype)
    optimizer = make_optimizer(model, symmetries, settings)
    loop = Loop(model, optimizer)
    pinned = torch.device(settings.device).type == "cuda"
    train, test = data.loaders(settings.batch_size, workers=workers, pin_memory=pinned)
    identity = _identity(experiment, settings)
    first_epoch, mean_loss, train_accuracy = 0, math.nan, math.nan
    if exists == "resume" and checkpoint_path.exists():
        first_epoch, mean_loss, train_accuracy = _resume(checkpoint_path, identity, model, optimizer)
    elif exists == "resume" and record_path.exists():
        exists = "overwrite"  # stopped in its first epoch, before a checkpoint
    elif exists == "overwrite":
        checkpoint_path.unlink(missing_ok=True)

    start = time.perf_counter()
    with Recorder(
        optimizer, record_path, every=settings.every, exists=exists, probes={"loss": lambda: loop.loss}
    ) as recorder:
        for epoch in range(first_epoch, settings.epochs):
            torch.manual_seed(settings.seed * 1_000_003 + epoch + 1)
            batches = tqdm(train, desc=f"epoch {epoch + 1}", unit="step", disable=not progress)
            mean_loss, train_accuracy = loop.epoch(_moved(batches, settings))
            recorder.flush()
            _save(checkpoint_path, identity, (epoch + 1, mean_loss, train_accuracy), model, optimizer)
    return Result(
        train_accuracy=train_accuracy,
        test_accuracy=accuracy(model, _moved(test, settings)),
        loss=mean_loss,
        seconds=time.perf_counter() - start,
        steps=loop.n_steps,
        backend=optimizer.backend,
        charge_error=charge_error(optimizer),
    )


def _identity(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must share with the stopped one, as plain data."""
    may_differ = ("data_dir", "epochs", "device", "backend")
    options = asdict(experiment) | settings.plain
    return {name: str(value) for name, value in options.items() if name not in may_differ}


def _save(
    path: Path,
    identity: dict[str, Any],
    progress: tuple[int, float, float],
    model: nn.Module,
    optimizer: MeasuredOptimizer,
) -> None:
    """Replace the checkpoint atomically: a process that is killed here leaves the previous one."""
    state = {"run": identity, "progress": progress, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(
    path: Path, identity: dict[str, Any], model: nn.Module, optimizer: MeasuredOptimizer
) -> tuple[int, float, float]:
    """Load the checkpoint; returns its number of epochs, and the last epoch's mean loss and accuracy."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    saved = {"optimizer": "sgd", **state["run"]}  # the first checkpoints do not have it
    if changed := [name for name, value in identity.items() if saved.get(name) != value]:
        shown = ", ".join(f"{name} ({saved.get(name)}, now {identity[name]})" for name in changed)
        raise ValueError(f"{path}: the run to be resumed had another {shown}; use the same settings, or another folder")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    epoch, loss, share = state["progress"]
    return int(epoch), float(loss), float(share)


def _moved(batches: Iterable[Batch], settings: Settings) -> Iterator[Batch]:
    """The batches on the device of the settings, the images in their dtype."""
    for images, labels in batches:
        yield (
            images.to(settings.device, settings.dtype, non_blocking=True),
            labels.to(settings.device, non_blocking=True),
        )
