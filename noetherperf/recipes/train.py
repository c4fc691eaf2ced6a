"""The training loop of the main job: an ordinary one, with the optimizer swapped and a recorder beside it."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.recipes.settings import Settings
from noetherperf.recorder import Recorder
from noetherperf.sgd import SGD

__all__ = ["Result", "accuracy", "train"]


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Args:
        train_accuracy, test_accuracy: Share of images classified correctly, 0 to 1.
        loss: Mean over the last epoch's steps, as the network was at each of them.
        seconds: Time of training and recording, without loading data and without pictures.
        steps: How many steps were made.
        backend: Which backend made them.
    """

    train_accuracy: float
    test_accuracy: float
    loss: float
    seconds: float
    steps: int
    backend: str


def train(
    path: Path | str,
    settings: Settings | None = None,
    *,
    exists: Literal["error", "overwrite"] = "error",
    progress: bool = True,
) -> Result:
    """Train the network of `digits_network` on the digits and record all its charges.

    Sets torch's global seed.

    Args:
        path: Where the record goes.
        settings: What to train with; by default `Settings()`.
        exists: What to do if there is a record already: "error" or "overwrite".
        progress: Show a bar with loss and accuracy.

    Returns:
        Result of the whole run.

    Raises:
        FileExistsError: There is a record at `path`, and `exists` is "error".
        ValueError: A setting is out of its range, or the backend is missing on this machine.
    """
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    data = digits.load(settings.seed, device=settings.device, dtype=settings.dtype)
    model, symmetries = digits_network()
    model.to(settings.device, settings.dtype)

    optimizer = SGD(
        model.named_parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        symmetries=symmetries,
        backend=settings.backend,
    )
    head = model.get_parameter("fc2.weight")
    loss = torch.tensor(math.nan, device=settings.device)  # until there is one
    probes = {
        "loss": lambda: loss,
        "parameters": lambda: head[0],  # one single parameter out of each group of the symmetry "fc2"
    }

    n_images = len(data.train_labels)
    steps_per_epoch = math.ceil(n_images / settings.batch_size)
    start = time.perf_counter()
    with (
        Recorder(optimizer, path, every=settings.every, exists=exists, probes=probes),
        tqdm(total=settings.epochs * steps_per_epoch, unit="step", disable=not progress) as bar,
    ):
        for _ in range(settings.epochs):
            epoch_loss = torch.zeros((), device=settings.device)
            epoch_correct = torch.zeros((), device=settings.device)
            for rows in torch.randperm(n_images).split(settings.batch_size):
                labels = data.train_labels[rows]
                logits = model(data.train_images[rows])
                loss = nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                epoch_loss += loss.detach() * len(rows)
                epoch_correct += (logits.argmax(1) == labels).sum()
                bar.update()
            mean_loss = epoch_loss.item() / n_images
            bar.set_postfix(loss=f"{mean_loss:.4f}", accuracy=f"{epoch_correct.item() / n_images:.1%}")
    seconds = time.perf_counter() - start
    return Result(
        train_accuracy=accuracy(model, data.train_images, data.train_labels),
        test_accuracy=accuracy(model, data.test_images, data.test_labels),
        loss=mean_loss,
        seconds=seconds,
        steps=settings.epochs * steps_per_epoch,
        backend=optimizer.backend,
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images [n, 1, 8, 8] that the model, in evaluation mode, gives their label [n]; the mode is kept."""
    was_training = model.training
    model.eval()
    correct = float((model(images).argmax(1) == labels).double().mean())
    model.train(was_training)
    return correct
