"""Buffers in torch's state: the existing ones, and new ones for a step that writes them for the first time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import has_own_dispatch
from noetherperf.optim.distributed import is_distributed, local, local_buffer
from noetherperf.optim.following import Parameters
from noetherperf.rules.rule import Rule

Tensors = list[Tensor | None]


@dataclass(slots=True)
class Buffers:
    """Every parameter's buffers as the state holds them at one moment; a list for each of the rule's.

    Fields:
        held: The buffer, None if there is none.
        here: The part of each in this rank's memory.
        unwritten: 1 if there is none.
    """

    held: list[Tensors]
    here: list[Tensors]
    unwritten: list[bytes]

    def make(
        self,
        rule: Rule[Any],
        parameters: Parameters,
        options: Sequence[Any],
        state: Mapping[Tensor, Any],
        grads: Sequence[Tensor | None],
    ) -> tuple[bytearray, list[Call]]:
        """Make the buffers that a step with these gradients writes for the first time. Returns every tensor's age, 0
        for new buffers and 1 otherwise, and the calls that put the buffers into the state."""
        ages = bytearray(b"\x01") * len(parameters.all)
        calls: list[Call] = []
        for k, (key, unwritten) in enumerate(zip(rule.buffers, self.unwritten, strict=True)):
            if 1 not in unwritten:
                continue
            for i, (p, g) in enumerate(zip(parameters.all, parameters.group_of, strict=True)):
                if unwritten[i] and k < rule.n_written(options[g]) and (grad := grads[i]) is not None:
                    ages[i] = 0
                    made = _zeros(p, grad, rule.buffer_dtype(options[g], p.dtype, grad.dtype))
                    self.held[k][i], self.here[k][i] = made, local(made)
                    calls.append(partial(state[p].__setitem__, key, made))
        return ages, calls


def gather(keys: Sequence[str], parameters: Parameters, state: dict[Tensor, Any]) -> Buffers:
    """Every parameter's buffers under these keys of the state."""
    buffers = Buffers([], [], [])
    for key in keys:
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
