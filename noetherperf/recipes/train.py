"""The training loop of all recipes, an ordinary one; and what is checked and told after it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from noetherperf.measure.balances import BalanceReadout
from noetherperf.measure.charges import ChargeReadout
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.recipes.settings import OPTIMIZERS, Settings
from noetherperf.symmetry import Symmetry

__all__ = ["Batch", "Loop", "Result", "accuracy", "charge_error", "make_optimizer"]

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
    readout = optimizer.readout()
    laws: list[ChargeReadout | BalanceReadout] = [*readout.values(), *readout.balances.values()]
    for law in laws:
        dtypes = {parameters[part.parameter].dtype for part in law.symmetry.parts}
        size = law.symmetry.charge(parameters, magnitude=True).cpu()
        plain = law.symmetry.charge(parameters).cpu()
        error = (law.charge - plain).abs() / size.clamp(min=torch.finfo(size.dtype).tiny)
        error[~law.charge.isfinite() & ~plain.isfinite()] = 0.0  # training diverged, as the report of the laws says
        worst = float(error.max()) if len(error) else 0.0
        if not worst <= (1e-12 if dtypes == {torch.float64} else 1e-5):
            raise RuntimeError(
                f"the measured charge of {law.name!r} is {worst:.1e} of its terms off the sum over its parameters; "
                "please report it, with what `noetherperf info` prints"
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
