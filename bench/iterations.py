"""Whole training iterations, forward, backward and step: torch's fused optimizer against noetherperf's.

Every variant trains a copy of the network of its own, from the same parameters on the same batch, in the same process.
Gradients are made anew in each iteration, as in use.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import noetherperf as nperf
from bench.cases import Case, norms
from bench.correctness import Mismatch
from bench.inputs import CPU, TooLarge
from bench.networks import TASKS
from bench.timing import Rounds, Step, figures
from bench.training import EVERY

#: Of each variant the view that it measures; None: torch's optimizer. "recorded" also writes its readouts to disk.
VIEWS_OF: Mapping[str, str | None] = {
    "fused": None,
    "unmeasured": "none",
    "rows": "rows",
    "both": "both",
    "recorded": "both",
}
BASELINE = "fused"
UNLIKE = 0.05  # of the first step's length: more between noetherperf's and torch's is a wrong step


@dataclass
class Trainer:
    """A network in training."""

    model: nn.Module
    optimizer: Optimizer
    inputs: Tensor
    classes: Tensor

    def iterate(self) -> None:
        """An iteration; on a GPU in mixed precision."""
        device = self.inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            logits = self.model(self.inputs)
            loss = cross_entropy(logits.flatten(0, -2), self.classes.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def trainer(case: Case, view: str | None, device: torch.device = CPU) -> Trainer:
    """A network with its optimizer, before the first iteration.

    Args:
        case: Of the suite "train".
        view: What noetherperf measures; None: with torch's fused optimizer.
        device: Where.
    """
    task, recipe = TASKS[case.model], case.recipe
    torch.manual_seed(0)
    model = task.network().to(device)
    named = list(model.named_parameters())
    if view is None:
        make: Callable[..., Optimizer] = recipe.torch
        optimizer = make(named, **recipe.options, fused=True)
    else:
        ours: Callable[..., Optimizer] = recipe.ours
        optimizer = ours(named, **recipe.options, symmetries=norms({name: tuple(p.shape) for name, p in named}, view))
    return Trainer(model, optimizer, *task.data(device))


class Iterations(Rounds):
    """Rounds of iterations by the clock on the wall, from a device at rest to a device at rest."""

    def __init__(self, steps: Mapping[str, Step], counts: Mapping[str, int], device: torch.device) -> None:
        super().__init__({name: [step] for name, step in steps.items()}, counts=counts)
        self._device = device

    def _seconds(self, name: str, turns: Sequence[Step]) -> float:
        self._wait()
        begin = time.perf_counter()
        for iterate in turns:
            iterate()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.cuda.synchronize(self._device)


@contextmanager
def iterations(case: Case, memory: int, device: torch.device = CPU) -> Iterator[Iterations]:
    """The rounds of a case, whose variants have made one iteration each, all with the same step.

    Args:
        case: Of the suite "train".
        memory: Bytes that all networks may take with their gradients and buffers.
        device: Where.

    Raises:
        TooLarge: They take more.
        Mismatch: A variant's first step is another one than torch's.
    """
    needed = len(VIEWS_OF) * case.bytes_held
    if needed > memory:
        raise TooLarge(f"needs {needed / 2**30:.1f} GiB of memory, and may take {memory / 2**30:.1f}")
    trainers = {name: trainer(case, view, device) for name, view in VIEWS_OF.items()}
    first_steps(trainers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        recorded = trainers["recorded"]
        assert isinstance(recorded.optimizer, nperf.MeasuredOptimizer)
        stack.enter_context(nperf.Recorder(recorded.optimizer, folder / "record.zarr", every=EVERY))
        steps: dict[str, Step] = {name: one.iterate for name, one in trainers.items()}

        def ten() -> None:
            for _ in range(EVERY):
                recorded.iterate()

        yield Iterations({**steps, "recorded": ten}, {"recorded": EVERY}, device)


def timed(
    case: Case, memory: int, seconds: float, least: int, exactly: int = 0, device: torch.device = CPU
) -> dict[str, Any]:
    """Time a case's iterations; what results keep of it.

    Args:
        case, memory, device: As for `iterations`.
        seconds, least, exactly: As for Rounds.compare.

    Raises:
        TooLarge, Mismatch: As for `iterations`.
    """
    with iterations(case, memory, device) as rounds:
        rounds.compare(BASELINE, seconds, least, exactly)
    return {
        **case.described(),
        "threads": torch.get_num_threads(),
        "batch": TASKS[case.model].described(device),
        "rounds": rounds.n_rounds,
        "iterations timed together": rounds.repeats,
        "figures": {
            name: {key: spread.rounded() for key, spread in found.items()}
            for name, found in figures(rounds.times, (BASELINE, "unmeasured", "both")).items()
        },
        "not run": {},
    }


def first_steps(trainers: Mapping[str, Trainer]) -> None:
    """Make an iteration of each, and compare the steps.

    Raises:
        Mismatch: One is not that of torch's optimizer.
    """

    def parameters(one: Trainer) -> list[Tensor]:
        return [p.detach() for p in one.model.parameters()]

    before = [p.clone() for p in parameters(trainers[BASELINE])]
    for one in trainers.values():
        one.iterate()
    after = parameters(trainers[BASELINE])
    length = _distance(before, after)
    for name, one in trainers.items():
        apart = _distance(parameters(one), after)
        if not apart <= UNLIKE * length:
            raise Mismatch(f"{name}: after one step {apart / length:.2g} of its length away from torch's optimizer")


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    squares = [(x - y).square().sum(dtype=torch.float64) for x, y in zip(one, other, strict=True)]
    return float(torch.stack(squares).sum().sqrt())
