"""Hyperparameters of one step, and the step's coefficients that follow from them.

torch.optim.SGD's update is one linear recursion, whatever its options:

    d  = s g + λ p              s = +1, or −1 with maximize
    v' = b v + a d              the momentum buffer
    u  = c_d d + c_v v'         the update
    p' = p − η u

    option                      b    a         c_d   c_v
    momentum β                  β    1 − τ     0     1       (a = 1 the first time the buffer is written)
    with nesterov               β    1 − τ     1     β
    momentum 0                  1    0         1     0       (a buffer left from earlier stays as it is)

See docs/theory.md, section 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one parameter group in one step, named as in torch.optim.SGD.

    lr is NaN where the learning rate is a tensor on a device, which the host does not read.
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Hyper":
        """The hyperparameters that an optimizer's parameter group holds now."""
        return cls(
            math.nan if device_lr(group) is not None else float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
        )

    @property
    def sign(self) -> float:
        """s: +1 to descend, −1 with maximize."""
        return -1.0 if self.maximize else 1.0

    @property
    def duration(self) -> float:
        """T, the time of one step in units of the learning rate: η(1 − τ) with momentum, η without."""
        return self.lr * (1.0 - self.dampening) if self.momentum != 0.0 else self.lr

    def coefficients(self, *, first: bool) -> "Coefficients":
        """The step's coefficients; `first` says that this step writes the momentum buffer for the first time."""
        if self.momentum == 0.0:
            buffer = (1.0, 0.0, 1.0, 0.0)
        else:
            gain = 1.0 if first else 1.0 - self.dampening
            buffer = (self.momentum, gain, *((1.0, self.momentum) if self.nesterov else (0.0, 1.0)))
        return Coefficients(self.lr, self.weight_decay, self.sign, *buffer)


def device_lr(group: Mapping[str, Any]) -> Tensor | None:
    """A parameter group's learning rate if it is a tensor on a device, where reading it would wait for the device."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None


class Coefficients(NamedTuple):
    """η, λ, s and (b, a, c_d, c_v) of the module's recursion. Mirrored by `Coefficients` in csrc/step.h."""

    lr: float
    decay: float
    sign: float
    buffer_decay: float
    buffer_gain: float
    mix_d: float
    mix_v: float
