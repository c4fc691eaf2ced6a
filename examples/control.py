"""Constant and cosine learning rates beside held effective learning rates, on two small real data sets.

    python examples/control.py

Prints a table: test accuracy and test loss, mean ± standard deviation over the seeds, and how far the effective
learning rate η/|θ|² of the first normalised layer went from where it began. docs/control.md discusses it.
"""

import argparse
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf.recipes import digits
from noetherperf.recipes.models import digits_network

BATCH_SIZE = 32
LEARNING_RATES = (0.01, 0.05, 0.25)
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-3
#: (is the effective learning rate held?, cosine?)
SCHEDULES = {
    "constant η": (False, False),
    "cosine η": (False, True),
    "constant η/|θ|²": (True, False),
    "cosine η/|θ|²": (True, True),
}


class Task(NamedTuple):
    """Data and a network for it, with the scale symmetries of its normalised layers."""

    data: tuple[Tensor, Tensor, Tensor, Tensor]  # training inputs and labels, test inputs and labels
    model: nn.Module
    scales: Sequence[nperf.Symmetry]


class Outcome(NamedTuple):
    """One run: share correct and mean cross-entropy on the test part, and η/|θ|² at the end over that at the start."""

    accuracy: float
    loss: float
    drift: float


def digits_task(seed: int) -> Task:
    data = digits.load(seed)
    model, symmetries = digits_network()
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return Task(tensors, model, [s for s in symmetries if isinstance(s, nperf.Scale)])


def tumours_task(seed: int) -> Task:
    """569 tumours described by 30 numbers, benign or malignant (Wisconsin diagnostic data, inside scikit-learn)."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        inputs, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)

    def numbers(rows: object) -> Tensor:
        return torch.as_tensor(scaler.transform(rows), dtype=torch.float32)

    model = nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(30, 64, bias=False),
            norm1=nn.BatchNorm1d(64),
            relu1=nn.ReLU(),
            fc2=nn.Linear(64, 64, bias=False),
            norm2=nn.BatchNorm1d(64),
            relu2=nn.ReLU(),
            fc3=nn.Linear(64, 2),
        )
    )
    scales = [nperf.Scale(name, [nperf.Part(f"{name}.weight", axis=0)]) for name in ("fc1", "fc2")]
    return Task((numbers(train_x), torch.as_tensor(train_y), numbers(test_x), torch.as_tensor(test_y)), model, scales)


TASKS: dict[str, tuple[Callable[[int], Task], int]] = {"digits": (digits_task, 5), "tumours": (tumours_task, 15)}


def train(task: Task, schedule: str, lr: float, epochs: int) -> Outcome | None:
    """One run; None if it diverged."""
    hold, cosine = SCHEDULES[schedule]
    train_x, train_y, test_x, test_y = task.data
    n_steps = epochs * math.ceil(len(train_y) / BATCH_SIZE)

    def factor(step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * step / n_steps)) if cosine else 1.0

    optimizer = nperf.SGD(
        nperf.control.groups(task.model, task.scales),
        lr=lr,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        symmetries=task.scales,
    )
    first, last_step = task.scales[0].name, factor(n_steps - 1)
    initial = lr / float(optimizer.readout()[first].charge.mean())
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if hold:
        scheduler = nperf.control.EffectiveLearningRate(optimizer, [s.name for s in task.scales], factor=factor)
    else:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    used = lr
    for _ in range(epochs):
        for rows in torch.randperm(len(train_y)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(task.model(train_x[rows]), train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            used = optimizer.param_groups[0]["lr"]
            optimizer.step()
            try:
                scheduler.step()
            except FloatingPointError:
                return None
    final = used / float(optimizer.readout()[first].charge.mean()) / last_step
    task.model.eval()
    with torch.no_grad():
        logits = task.model(test_x)
        test_loss = float(nn.functional.cross_entropy(logits, test_y))
    if not math.isfinite(test_loss):
        return None
    return Outcome(float((logits.argmax(1) == test_y).double().mean()), test_loss, final / initial)


def spread(values: list[float], form: str) -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values) if len(values) > 1 else 0:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, action="append", help="by default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="by default 5 (digits) and 15 (tumours)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| data | initial η | schedule | test accuracy | test loss | η/abs(θ)² at the end, of the start's |")
    print("|---|---|---|---|---|---|")
    for name in options.task or TASKS:
        make, epochs = TASKS[name]
        for lr in LEARNING_RATES:
            for schedule in SCHEDULES:
                outcomes = []
                for seed in range(options.seeds):
                    torch.manual_seed(seed)
                    outcomes.append(train(make(seed), schedule, lr, options.epochs or epochs))
                kept = [outcome for outcome in outcomes if outcome is not None]
                lost = f" ({len(outcomes) - len(kept)} diverged)" if len(kept) < len(outcomes) else ""
                columns = [
                    spread([100 * outcome.accuracy for outcome in kept], ".2f") + " %" + lost if kept else "diverged",
                    spread([outcome.loss for outcome in kept], ".4f") if kept else "",
                    spread([outcome.drift for outcome in kept], ".2f") if kept else "",
                ]
                schedule_shown = schedule.replace("|θ|", "abs(θ)")  # a bar would end the table's cell
                print("|", " | ".join([name, f"{lr:g}", schedule_shown, *columns]), "|", flush=True)


if __name__ == "__main__":
    main()
