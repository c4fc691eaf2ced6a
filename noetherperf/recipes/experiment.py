"""The paper's experiment: a large network on an image data set, every charge recorded. It can be resumed."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from noetherperf.recipes import datasets
from noetherperf.recipes.resnet import resnet18
from noetherperf.recipes.session import Exists, Session
from noetherperf.recipes.settings import SettingError, Settings
from noetherperf.recipes.train import Batch, Loop, Result, accuracy, charge_error, make_optimizer
from noetherperf.recipes.vgg import vgg16
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
            raise SettingError("model", f"there is no {self.model!r}; there are: {', '.join(MODELS)}")
        if not self.width > 0:
            raise SettingError("width", f"must be positive, not {self.width}")


def run(
    folder: Path | str,
    experiment: Experiment,
    settings: Settings,
    *,
    exists: Exists = "error",
    workers: int = 0,
    progress: bool = True,
) -> Result:
    """Train, record all charges to folder/record.zarr, and keep a checkpoint of the last complete epoch beside it.

    It can be stopped and resumed, as `Session` says. Batches, augmentation and dropout of an epoch are drawn from the
    seed and the epoch's number. (With another number of workers, augmentation is drawn in another order.)

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
    session = Session(folder, asdict(experiment), settings, exists)
    torch.manual_seed(settings.seed)
    data = datasets.load(experiment.dataset, experiment.data_dir, image_size=experiment.image_size, seed=settings.seed)
    model, symmetries = MODELS[experiment.model](
        n_classes=data.n_classes,
        in_channels=data.channels,
        image_size=data.image_size,
        width=experiment.width,
    )
    model.to(settings.device, getattr(torch, settings.dtype))
    optimizer = make_optimizer(model, symmetries, settings)
    loop = Loop(model, optimizer)
    pinned = torch.device(settings.device).type == "cuda"
    train, test = data.loaders(settings.batch_size, workers=workers, pin_memory=pinned)

    def batches(epoch: int) -> Iterator[Batch]:
        torch.manual_seed(settings.seed * 1_000_003 + epoch + 1)
        return _moved(train, settings)

    start = time.perf_counter()
    probes = {"loss": lambda: loop.loss}
    mean_loss, train_accuracy = session.train(loop, batches, len(train), probes=probes, shown=progress)
    return Result(
        train_accuracy=train_accuracy,
        test_accuracy=accuracy(model, _moved(test, settings)),
        loss=mean_loss,
        seconds=time.perf_counter() - start,
        steps=loop.n_steps,
        backend=optimizer.backend,
        charge_error=charge_error(optimizer),
    )


def _moved(batches: Iterable[Batch], settings: Settings) -> Iterator[Batch]:
    """The batches on the device of the settings, the images in their dtype."""
    dtype = getattr(torch, settings.dtype)
    for images, labels in batches:
        yield (
            images.to(settings.device, dtype, non_blocking=True),
            labels.to(settings.device, non_blocking=True),
        )
