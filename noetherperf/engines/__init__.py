"""Engines: what makes a plan's step on one device. One file each; noetherperf.backends says which there are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from noetherperf.hyper import Hyper


@dataclass(frozen=True)
class OnDevice:
    """What a step reads where its parameters are, so that the host need not wait for it; one element each.

    The host reads what it can read at once: beside parameters on the CPU, lrs and found_inf are always None.

    Fields:
        lrs: One per parameter group: the learning rate that stands in for Hyper.lr (which is NaN then), or None.
        grad_scale: Every gradient is divided by it first, and left divided; what the step and its moments call the
            gradient is the quotient. None: 1.
        found_inf: Where it is not zero, the step is skipped: nothing at all is written. None: 0.
    """

    lrs: Sequence[Tensor | None]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Engine(Protocol):
    """Steps the tensors of one plan and measures them.

    Engines are made for fixed parameters (Python objects; their storage may change), one Measurement, and one
    parameter group per tensor. They change parameters, buffers and the measurement, and nothing else: no version
    counter either.
    """

    @property
    def fresh(self) -> Sequence[bool] | Tensor:
        """The tensors whose buffer has been made and not been written, because steps were skipped: none, if empty."""

    def admit(self, grads: Sequence[Tensor | None]) -> None:
        """Raise if these gradients cannot be stepped with, before anything is changed."""

    def measure(self, buffers: Sequence[Tensor | None]) -> None:
        """Fill the moments from the parameters as they are, with the buffer v in the gradient's place: sum_g is
        ⟨v, 1⟩ and dot_pg ⟨p, v⟩. Where there is no buffer those mean nothing."""

    def step(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        first: Sequence[int],
        on_device: OnDevice,
    ) -> None:
        """Make one step, and advance the measurement's clock: by one step, and by Hyper.duration for each group.

        Args:
            grads: One per tensor; None: the tensor takes no part.
            buffers: One per tensor; None where it has none.
            hypers: One per parameter group.
            first: Per tensor 1 where its momentum buffer has just been made (of zeros) and is written for the first
                time, else 0. Told once: if that step is skipped, the tensor's next one that is not is its first.
            on_device: What the host has not read.
        """


def check_gradient(name: str, p: Tensor, grad: Tensor) -> None:
    """Raise where a gradient is of a kind that no engine steps with."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name}: noetherperf.SGD does not support sparse gradients, got layout {grad.layout}; "
            "make them dense (sparse=False in the embedding, or p.grad = p.grad.to_dense())"
        )
    if grad.is_complex():
        raise TypeError(
            f"{name}: noetherperf.SGD does not support complex gradients, got {grad.dtype}; "
            "store real and imaginary parts as a real parameter (torch.view_as_real)"
        )
    if grad.dtype != p.dtype or grad.device != p.device or grad.shape != p.shape:
        raise TypeError(
            f"{name}: the gradient ({grad.dtype}, {grad.device}, {tuple(grad.shape)}) must match its parameter "
            f"({p.dtype}, {p.device}, {tuple(p.shape)}); convert the gradient before step()"
        )
