"""The training loop of all recipes, an ordinary one, and the main job: this loop with a recorder."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network
from noetherperf.recipes.settings import OPTIMIZERS, Settings
from noetherperf.record import Recorder
from noetherperf.symmetry import Symmetry

__all__ = ["Batch", "Loop", "Result", "accuracy", "make_optimizer", "train"]

#: Images [n, channels, height, width] and their labels [n].
Batch = tuple[Tensor, Tensor]


class Loop:
    """Trains a model on batches, with cross-entropy.

    Args:
        model: A network that returns logits.
        optimizer: Its optimizer.

    Attributes:
        loss: Loss of the last batch, a scalar; NaN before the first. It is set before the batch's step, so a recorder
            can use it as a probe.
        n_steps: Number of steps so far.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.loss = torch.tensor(math.nan)
        self.n_steps = 0

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch; returns its logits [n, classes] from before the step."""
        logits: Tensor = self.model(images)
        self.loss = nn.functional.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        self.n_steps += 1
        return logits

    def epoch(self, batches: Iterable[Batch]) -> tuple[float, float]:
        """Train on every batch; returns the mean loss and the accuracy, of each batch before its step.

        Waits for the device once, at the end.
        """
        totals, n_images = torch.zeros(2), 0
        for images, labels in batches:
            correct = (self.step(images, labels).argmax(1) == labels).sum()
            totals = totals.to(labels.device) + torch.stack([self.loss.detach() * len(labels), correct])
            n_images += len(labels)
        loss, share = (totals / n_images).tolist()
        return loss, share


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """The share of images that the model classifies correctly in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    correct = torch.cat([model(images).argmax(1) == labels for images, labels in batches])
    model.train(was_training)
    return float(correct.double().mean())


def charge_error(optimizer: MeasuredOptimizer) -> float:
    """Compare every measured charge with the plain sum over the current parameters.

    Returns:
        The largest difference over all groups, relative to Σ|terms|.

    Raises:
        RuntimeError: A difference is larger than rounding can explain, so the measurement is wrong.
    """
    parameters = {
        name: p
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    largest = 0.0
    for name, law in optimizer.readout().items():
        dtypes = {parameters[part.parameter].dtype for part in law.symmetry.parts}
        size = law.symmetry.charge(parameters, magnitude=True).cpu()
        plain = law.symmetry.charge(parameters).cpu()
        error = (law.charge - plain).abs() / size.clamp(min=torch.finfo(size.dtype).tiny)
        error[~law.charge.isfinite() & ~plain.isfinite()] = 0.0  # training diverged, as the report of the laws says
        worst = float(error.max()) if len(error) else 0.0
        if not worst <= (1e-12 if dtypes == {torch.float64} else 1e-5):
            raise RuntimeError(
                f"the measured charge of {name!r} is {worst:.1e} of its terms off the sum over its parameters; please "
                "report it, with what `noetherperf info` prints"
            )
        largest = max(largest, worst)
    return largest


def make_optimizer(model: nn.Module, symmetries: Sequence[Symmetry], settings: Settings) -> MeasuredOptimizer:
    """The optimizer of the settings, measuring these symmetries."""
    make = OPTIMIZERS[settings.optimizer].make
    return make(model.named_parameters(), **settings.options, symmetries=symmetries, backend=settings.backend)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run.

    Args:
        train_accuracy, test_accuracy: Share of images classified correctly, 0 to 1.
        loss: Mean training loss over the last epoch, of each batch before its step.
        seconds: Time of training and recording, without loading data and without pictures.
        steps: Number of steps.
        backend: The backend that made them.
        charge_error: The result of `charge_error` at the end.
    """

    train_accuracy: float
    test_accuracy: float
    loss: float
    seconds: float
    steps: int
    backend: str
    charge_error: float


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
        path: Path of the record.
        settings: Settings of the run; by default `Settings()`.
        exists: What to do if there is a record already: "error" or "overwrite".
        progress: Show a progress bar with loss and accuracy.

    Returns:
        Result of the whole run.

    Raises:
        FileExistsError: There is a record at `path`, and `exists` is "error".
        ValueError: A setting is out of its range, or the backend is unknown or does not serve the device.
        RuntimeError: The backend cannot run on this machine.
    """
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    data = digits.load(settings.seed, device=settings.device, dtype=settings.dtype)
    model, symmetries = digits_network()
    model.to(settings.device, settings.dtype)
    optimizer = make_optimizer(model, symmetries, settings)
    loop = Loop(model, optimizer)
    head = model.get_parameter("fc2.weight")
    probes = {
        "loss": lambda: loop.loss,
        "parameters": lambda: head[0],  # one parameter of each group of the symmetry "fc2"
    }

    n_images = len(data.train_labels)
    steps_per_epoch = math.ceil(n_images / settings.batch_size)
    start = time.perf_counter()
    with (
        Recorder(optimizer, path, every=settings.every, exists=exists, probes=probes),
        tqdm(total=settings.epochs * steps_per_epoch, unit="step", disable=not progress) as bar,
    ):

        def batches() -> Iterator[Batch]:
            for rows in torch.randperm(n_images).split(settings.batch_size):
                yield data.train_images[rows], data.train_labels[rows]
                bar.update()

        for _ in range(settings.epochs):
            mean_loss, share = loop.epoch(batches())
            bar.set_postfix(loss=f"{mean_loss:.4f}", accuracy=f"{share:.1%}")
    seconds = time.perf_counter() - start
    return Result(
        train_accuracy=accuracy(model, [(data.train_images, data.train_labels)]),
        test_accuracy=accuracy(model, [(data.test_images, data.test_labels)]),
        loss=mean_loss,
        seconds=seconds,
        steps=loop.n_steps,
        backend=optimizer.backend,
        charge_error=charge_error(optimizer),
    )
