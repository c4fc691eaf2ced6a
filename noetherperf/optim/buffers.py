"""Buffers in torch's state: the existing ones, and new ones for a step that writes them for the first time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import has_own_dispatch
from noetherperf.optim.counts import Counts
from noetherperf.optim.distributed import is_distributed, local, local_buffer
from noetherperf.optim.following import Group, Parameters
from noetherperf.rules.rule import Rule

Tensors = list[Tensor | None]


class Made(NamedTuple):
    """What a step makes in torch's state."""

    new: bytearray  # per tensor, 0 if the step makes a buffer of it, else 1
    ages: Sequence[int]  # before the step; an array of int64 if the rule counts them
    calls: list[Call]  # that put new buffers into the state, and count the step there


@dataclass(slots=True)
class Buffers:
    """Every parameter's buffers as the state holds them at one moment; a list for each of the rule's.

    Attributes:
        held: The buffer, None if there is none.
        here: The part of each in this rank's memory.
        unwritten: 1 if there is none.
        counts: Every parameter's count of steps; None for a rule that does not count.
        counted: What they are, as far as the host knows them, [n], int64; empty without counts.
    """

    held: list[Tensors]
    here: list[Tensors]
    unwritten: list[bytes]
    counts: Counts | None
    counted: np.ndarray

    def make(
        self,
        rule: Rule[Any],
        parameters: Parameters,
        options: Sequence[Any],
        groups: Sequence[Group],
        state: Mapping[Tensor, Any],
        grads: Sequence[Tensor | None],
        missing: bytes,
        found_inf: Tensor | None,
        there: Sequence[bool],
    ) -> Made:
        """Make the buffers that a step writes for the first time, and count it.

        Args:
            rule, parameters, options: The optimizer's; the rule's options, one per parameter group.
            groups, state: Torch's.
            grads, missing: Of this step, one per parameter; 1 if there is none.
            found_inf: As for Counts.count.
            there: For each meter whether its steps take their counts from the device.

        Raises:
            RuntimeError: A parameter has made steps, but a buffer of it is missing.
        """
        new = bytearray(b"\x01") * len(parameters.all)
        calls: list[Call] = []
        ages: Sequence[int] = new
        if self.counts is not None:
            ages = cast("Sequence[int]", self.counted if all(there) else self.counts.exact())
            calls += self.counts.count(groups, state, missing, found_inf, exact=not any(there))
        n_written = max(map(rule.n_written, options), default=0)
        for k, (key, unwritten) in enumerate(zip(rule.buffers[:n_written], self.unwritten, strict=False)):
            if 1 not in unwritten:
                continue
            for i, (p, g) in enumerate(zip(parameters.all, parameters.group_of, strict=True)):
                if unwritten[i] and k < rule.n_written(options[g]) and (grad := grads[i]) is not None:
                    if self.counts is not None and ages[i] > 0 and key not in rule.late_buffers:
                        raise RuntimeError(
                            f"{parameters.labels[i]}: {key!r} is missing in the optimizer's state, but its "
                            f"{rule.step_key!r} counts {ages[i]} steps; to start anew, delete its whole state"
                        )
                    new[i] = 0
                    made = _zeros(p, grad, rule.buffer_dtype(options[g], p.dtype, grad.dtype))
                    self.held[k][i], self.here[k][i] = made, local(made)
                    calls.append(partial(state[p].__setitem__, key, made))
        return Made(new, ages, calls)

    def age(self, i: int) -> int:
        """A tensor's age: its count of steps; for a rule that does not count, 0 if a buffer is unwritten, else 1.

        It waits for a device that alone knows the count.
        """
        if self.counts is not None:
            return int(self.counts.exact()[i])
        return 0 if any(unwritten[i] for unwritten in self.unwritten) else 1


def gather(rule: Rule[Any], parameters: Parameters, counts: Counts | None, state: dict[Tensor, Any]) -> Buffers:
    """Every parameter's buffers of a rule, and counts, in the state.

    Raises:
        RuntimeError, ValueError: A count cannot be one.
    """
    buffers = Buffers([], [], [], counts, np.empty(0) if counts is None else counts.read(state))
    for key in rule.buffers:
        held, unwritten = parameters.gatherer.items(state, key)
        here = held
        if parameters.sharded:
            whose = zip(parameters.labels, parameters.all, held, strict=True)
            here = [local_buffer(label, key, p, buffer) for label, p, buffer in whose]
        buffers.held.append(held)
        buffers.here.append(here)
        buffers.unwritten.append(unwritten)
    return buffers


def _zeros(p: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer of zeros in the parameter's layout; for a tensor subclass it is like the gradient, as in torch."""
    if has_own_dispatch(p) and not is_distributed(p):
        return torch.zeros_like(grad, dtype=dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
