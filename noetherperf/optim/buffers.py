"""Buffers in torch's state, and the counts of steps there: the existing ones, and new ones for a step that writes them
for the first time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import has_own_dispatch
from noetherperf.optim.distributed import is_distributed, local, local_buffer
from noetherperf.optim.following import Parameters
from noetherperf.rules.rule import Rule

Tensors = list[Tensor | None]


class Made(NamedTuple):
    """What a step makes in torch's state."""

    new: bytearray  # per tensor, 0 if the step makes a buffer of it, else 1
    ages: Sequence[int]  # before the step
    calls: list[Call]  # that put new buffers into the state, and count the step there


@dataclass(slots=True)
class Buffers:
    """Every parameter's buffers as the state holds them at one moment; a list for each of the rule's.

    Fields:
        held: The buffer, None if there is none.
        here: The part of each in this rank's memory.
        unwritten: 1 if there is none.
        steps: Every parameter's count of steps, None if there is none; empty for a rule that does not count.
    """

    held: list[Tensors]
    here: list[Tensors]
    unwritten: list[bytes]
    steps: list[Any]

    def make(
        self,
        rule: Rule[Any],
        parameters: Parameters,
        options: Sequence[Any],
        state: Mapping[Tensor, Any],
        grads: Sequence[Tensor | None],
    ) -> Made:
        """Make the buffers that a step with these gradients writes for the first time, and count the step."""
        new = bytearray(b"\x01") * len(parameters.all)
        calls: list[Call] = []
        ages: Sequence[int] = new
        if rule.step_key is not None:
            ages = list(map(self.age, range(len(new))))
            calls += self._count(rule.step_key, parameters, state, grads)
        for k, (key, unwritten) in enumerate(zip(rule.buffers, self.unwritten, strict=True)):
            if 1 not in unwritten:
                continue
            for i, (p, g) in enumerate(zip(parameters.all, parameters.group_of, strict=True)):
                if unwritten[i] and k < rule.n_written(options[g]) and (grad := grads[i]) is not None:
                    new[i] = 0
                    made = _zeros(p, grad, rule.buffer_dtype(options[g], p.dtype, grad.dtype))
                    self.held[k][i], self.here[k][i] = made, local(made)
                    calls.append(partial(state[p].__setitem__, key, made))
        return Made(new, ages, calls)

    def age(self, i: int) -> int:
        """A tensor's age: its count of steps; for a rule that does not count, 0 if a buffer is unwritten, else 1."""
        if self.steps:
            count = self.steps[i]
            return 0 if count is None else int(count)
        return 0 if any(unwritten[i] for unwritten in self.unwritten) else 1

    def _count(
        self, key: str, parameters: Parameters, state: Mapping[Tensor, Any], grads: Sequence[Tensor | None]
    ) -> list[Call]:
        """The calls that count a step with these gradients."""
        calls: list[Call] = []
        counts: list[Tensor] = []
        for p, count, grad in zip(parameters.all, self.steps, grads, strict=True):
            if grad is None:
                continue
            if count is None:
                calls.append(partial(state[p].__setitem__, key, new_count(1)))
            else:
                counts.append(count)
        if counts:
            calls.append(partial(torch._foreach_add_, counts, 1))
        return calls


def gather(rule: Rule[Any], parameters: Parameters, state: dict[Tensor, Any]) -> Buffers:
    """Every parameter's buffers of a rule, and counts, in the state."""
    steps = [] if rule.step_key is None else parameters.gatherer.items(state, rule.step_key)[0]
    buffers = Buffers([], [], [], steps)
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


def new_count(steps: float) -> Tensor:
    """A count of steps, as torch makes it: a float tensor of no dimensions, on the CPU."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(float(steps), dtype=dtype, device="cpu")


def _zeros(p: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer of zeros in the parameter's layout; for a tensor subclass it is like the gradient, as in torch."""
    if has_own_dispatch(p) and not is_distributed(p):
        return torch.zeros_like(grad, dtype=dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
