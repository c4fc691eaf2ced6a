"""What an optimizer asks of its update rule, and all that differs between two measured optimizers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from noetherperf.rules.hyper import Hyper


class Rule(Protocol):
    """An update rule, as it reads one of torch's parameter groups.

    Fields:
        buffer: The key of its buffer in torch's state of a parameter.
        numbers: Those options that are numbers; every checkpoint has them.
        late_options: Options that checkpoints of early versions of torch lack, and what stands for them.
    """

    buffer: str
    numbers: Sequence[str]
    late_options: Sequence[tuple[str, Any]]

    def options(self, group: Mapping[str, Any]) -> Hyper:
        """The options of one step."""

    def device_lr(self, group: Mapping[str, Any]) -> Tensor | None:
        """The learning rate if it is a tensor on a device, where the host does not read it."""

    def writes_buffer(self, group: Mapping[str, Any]) -> bool:
        """Whether a step writes the buffer."""

    def buffer_dtype(self, group: Mapping[str, Any], p: Tensor, grad: Tensor) -> torch.dtype:
        """What torch makes the buffer of, beside this parameter and its first gradient."""

    def time_may_fall(self, group: Mapping[str, Any]) -> bool:
        """Whether there are steps whose time (Hyper.duration) is below zero."""
