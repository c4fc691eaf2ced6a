"""Agreement of the ranks that shard one model: marks that must be equal, and the error if they differ.

Each rank steps its own shards. Partial sums add up to those of the whole only if all ranks made the same steps. So a
rank keeps digests of its steps: of every parameter group's options, and of which tensors had gradients. Equal steps
give equal digests on every processor: only the user's options, to nine digits, and the host's counts enter. Values that
only a device knows, the times of learning rates on it, are compared as floats.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from noetherperf.rules.rule import Rule


class Kind(IntEnum):
    """Kinds of marks. If one kind differs, later kinds may differ for the same reason and are not reported.

    The last kind is no error: it passes on to all ranks what some of them detected.
    """

    LAYOUT = 0
    STEP = 1
    OPTIONS = 2
    GRADIENT = 3
    BUFFER = 4
    LAWS = 5
    TIME = 6
    CHANGED = 7


_ANEW = "reset_measurement() on every rank starts the laws anew"

#: Error messages by kind, with the differing things in place of {}: what differs, and what to do.
_MESSAGES: Mapping[Kind, str] = {
    Kind.LAYOUT: "they measure other symmetries, or the same ones in another order, or group their parameters "
    "otherwise; make every rank's optimizer alike",
    Kind.STEP: "they are not after the same step; call readout() and state_dict() after the same step on every rank, "
    "and let all ranks skip a step or none (a gradient scaler must see the gradients of all)",
    Kind.OPTIONS: "the options of {} ({options}) were not the same on all ranks in every step; set them alike (a "
    f"schedule that follows a loss needs that of all ranks), and {_ANEW}",
    Kind.GRADIENT: "{} had a gradient on some ranks and none on others in the same step; let all ranks set it to None "
    f"or none, and {_ANEW}",
    Kind.BUFFER: f"{{}} {{aged}}; keep or clear the optimizer's state on all ranks, and {_ANEW}",
    Kind.LAWS: "which laws are open, or which tensors were stepped alike, is not the same on all ranks ({}); load the "
    f"same checkpoint on every rank, or {_ANEW}",
    Kind.TIME: "the learning rates of {}, on a device, do not add up to the same time on all ranks; set them alike, "
    f"and {_ANEW}",
}


class Mark(NamedTuple):
    """A number that must be equal on all ranks, up to rounding if it is a time; ints have 32 bits."""

    kind: Kind
    of: str
    value: int | float


def summary(marks: Sequence[Mark]) -> list[Mark]:
    """One mark of each kind. Ranks with the same layout have marks of the same things in the same order."""
    ordered = sorted(marks, key=lambda mark: mark.kind)
    values = {kind: [mark.value for mark in of_kind] for kind, of_kind in groupby(ordered, lambda mark: mark.kind)}
    values[Kind.LAYOUT] = [*values.get(Kind.LAYOUT, []), crc32(repr([mark[:2] for mark in ordered]).encode())]
    times = values.pop(Kind.TIME, [])
    time = sum(i * value for i, value in enumerate(times, start=1) if math.isfinite(value))
    digests = [Mark(kind, "", crc32(repr(values.get(kind)).encode())) for kind in Kind if kind != Kind.TIME]
    return [*digests, Mark(Kind.TIME, "", time)]


def numbers(marks: Iterable[Mark]) -> Tensor:
    """Two numbers for each mark [n, 2], float64 on the CPU.

    A digest is split into two halves, so small that the sums of their squares are exact for two million ranks.
    """
    return torch.tensor([list(_pair(mark)) for mark in marks], dtype=torch.float64, device="cpu")


def _pair(mark: Mark) -> Iterator[float]:
    if mark.kind == Kind.TIME:  # the second number compares whether the time is finite
        yield from (mark.value, 0.0) if math.isfinite(mark.value) else (0.0, 1.0)
    else:
        yield from divmod(int(mark.value), 1 << 16)


def explain(marks: Iterable[Mark], rule: Rule[Any]) -> str:
    """The error message for differing marks: what differs between ranks, and what to do.

    Args:
        marks: Those that differ.
        rule: Of the step.
    """
    differing = list(marks)
    kind = min(mark.kind for mark in differing)
    things = [mark.of for mark in differing if mark.kind == kind]
    shown = ", ".join(things[:3]) + (f" and {len(things) - 3} more" if len(things) > 3 else "")
    aged = f"{rule.first_step}, in another step than on other ranks"
    if rule.step_key is not None:
        aged = "had made another number of steps before on some ranks than on others"
    message = _MESSAGES[kind].format(shown, options=", ".join(rule.option_names), aged=aged)
    return f"the ranks do not read the same measurement: {message}"


class Digests:
    """Digests of the steps that a rank has made since measuring began; immutable.

    Args:
        n_tensors, n_groups: Numbers of tensors and parameter groups.
        state: From `state()`, perhaps with fewer tensors and groups.
    """

    def __init__(self, n_tensors: int, n_groups: int, state: Sequence[Sequence[int]] = ((0,), (), (), ())) -> None:
        (self._count,), options, gradients, buffers = state
        self.options = [*options, *[0] * (n_groups - len(options))]
        self.gradients, self.buffers = (np.zeros(n_tensors, np.uint32) for _ in range(2))
        self.gradients[: len(gradients)], self.buffers[: len(buffers)] = gradients, buffers

    def after(self, options: Sequence[Any], aged: Sequence[int], missing: bytes) -> "Digests":
        """The digests after one more step.

        Args:
            options: Of the rule, one per parameter group.
            aged: Per tensor, what sets its step apart because of its age, 0 if nothing does; empty: nothing for any.
            missing: A byte per tensor: has it no gradient?
        """
        new = object.__new__(Digests)
        new._count = self._count + 1
        new.options = [crc32(_written(x), old) for x, old in zip(options, self.options, strict=True)]
        step = np.uint32(crc32(f"{new._count}".encode()))
        new.gradients, new.buffers = self.gradients, self.buffers
        if 1 in missing:
            new.gradients = self.gradients + np.frombuffer(missing, np.uint8) * step
        if any(aged):
            new.buffers = self.buffers + np.array(aged, np.uint32) * step
        return new

    @staticmethod
    def check(state: object, n_tensors: int, n_groups: int) -> None:
        """Check that something is a `state()` of so many tensors and groups.

        Raises:
            ValueError: It has another shape, or numbers of more than 32 bits.
        """
        lengths = [1, n_groups, n_tensors, n_tensors]
        lists = state if isinstance(state, list) and all(isinstance(x, list) for x in state) else []
        if [len(x) for x in lists] != lengths:
            raise ValueError(f"has 'digests' that are not lists of {', '.join(map(str, lengths))} numbers")
        if not all(type(number) is int and 0 <= number < 1 << 32 for numbers in lists for number in numbers):
            raise ValueError("has 'digests' that are not all integers of 32 bits")

    def state(self) -> list[list[int]]:
        """The state for a checkpoint."""
        return [[self._count], list(self.options), self.gradients.tolist(), self.buffers.tolist()]


def _written(options: Any) -> bytes:
    """A step's options without the last digits, because those of a schedule's cosine may depend on the processor."""
    return " ".join(_digits(getattr(options, field.name)) for field in fields(options)).encode()


def _digits(x: object) -> str:
    if isinstance(x, tuple):
        return f"({' '.join(map(_digits, x))})"
    return f"{x:d}" if isinstance(x, bool) else f"{x:.9g}" if isinstance(x, int | float) else repr(x)
