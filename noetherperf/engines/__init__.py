"""Engines: what makes a plan's step on one device. One file each; noetherperf.engines.backends says which there are."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

#: What parameters and gradients may be of.
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OnDevice:
    """What a step reads where its parameters are, so that the host need not wait for it; one element each.

    The host reads what it can read at once: beside parameters on the CPU, lrs and found_inf are always None.

    Fields:
        lrs: One per parameter group: the learning rate that stands in for that of its options (which is NaN then), or
            None.
        grad_scale: Every gradient is divided by it first, and left divided; what the step and its moments call the
            gradient is the quotient. None: 1.
        found_inf: Where it is not zero, the step is skipped: nothing at all is written. None: 0.
    """

    lrs: Sequence[Tensor | None]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @cached_property
    def is_empty(self) -> bool:
        """Whether there is nothing to read on a device."""
        return all(x is None for x in (*self.lrs, self.grad_scale, self.found_inf))


class Engine(Protocol):
    """Steps the tensors of one plan and measures them.

    Engines are made for fixed parameters (Python objects; their storage may change), one Measurement, and one
    parameter group per tensor. They change parameters, buffers and the measurement, and nothing else: no version
    counter either.
    """

    @property
    def ages(self) -> Sequence[int] | Tensor:
        """Each tensor's age, as far as steps were not skipped: 0 where its buffers were made and have not been written.
        Empty: the host knows them all."""

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients as a step takes them: those that torch keeps in a lazy form are written out.

        Raises:
            RuntimeError, TypeError: They cannot be stepped with; raised before anything is changed.
        """

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list["Call"]:
        """The calls, for carry_out, that fill the moments from the parameters as they are, with the buffer v in the
        gradient's place: sum_g is ⟨v, 1⟩ and dot_pg ⟨p, v⟩. Where there is no buffer those mean nothing."""

    def measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> None:
        """Measure: prepare it and carry it out."""

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> list["Call"]:
        """Get one step ready and write nothing yet: the calls that make it, for carry_out.

        They advance the measurement's clock too: by one step, and by Rule.duration for each group.

        Args:
            grads: One per tensor, as admit gave them; None: the tensor takes no part.
            buffers: For each of the rule's buffers one per tensor; None where it has none.
            options: Of the rule, one per parameter group.
            ages: Per tensor 0 where its buffers have just been made (of zeros), else what the host knows. Told once: if
                that step is skipped, the tensor's next one that is not is its first.
            on_device: What the host has not read.
        """

    def step(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> None:
        """Make one step: prepare it and carry it out."""


#: A part of a step that writes: compiled code with its arguments, so that Python runs nothing of its own inside.
Call = Callable[[], object]


def carry_out(calls: Iterable[Call]) -> None:
    """Make calls one after the other, with no instruction of Python between them.

    An interrupt raises between two such instructions (so do signal handlers); so a step is made as a whole or not.
    """
    list(map(operator.call, calls))


class Stepping:
    """What engines have beside what prepares."""

    def measure(self, *args: Any) -> None:
        """Measure: prepare it and carry it out."""
        carry_out(self.prepare_to_measure(*args))  # type: ignore[attr-defined]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Make one step: prepare it and carry it out."""
        carry_out(self.prepare(*args, **kwargs))  # type: ignore[attr-defined]


def gradient_dtypes(p: Tensor) -> tuple[torch.dtype, ...]:
    """What torch lets a parameter's gradient be of (Parameter.grad_dtype); its own dtype, as a rule."""
    dtype: torch.dtype | None = getattr(p, "grad_dtype", p.dtype) if p.is_leaf else p.dtype
    return FLOATING if dtype is None else (dtype,)


def check_gradient(name: str, p: Tensor, grad: Tensor, dtypes: Iterable[torch.dtype] = ()) -> None:
    """Raise where a gradient is of a kind that an engine does not step with.

    Args:
        name: Of the parameter.
        p: The parameter.
        grad: Its gradient.
        dtypes: What it may be of beside the parameter's own dtype.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name}: noetherperf does not support sparse gradients, got layout {grad.layout}; "
            "make them dense (sparse=False in the embedding, or p.grad = p.grad.to_dense())"
        )
    if grad.is_complex():
        raise TypeError(
            f"{name}: noetherperf does not support complex gradients, got {grad.dtype}; "
            "store real and imaginary parts as a real parameter (torch.view_as_real)"
        )
    if (grad.dtype != p.dtype and grad.dtype not in dtypes) or grad.device != p.device or grad.shape != p.shape:
        raise TypeError(
            f"{name}: the gradient ({grad.dtype}, {grad.device}, {tuple(grad.shape)}) must match its parameter "
            f"({p.dtype}, {p.device}, {tuple(p.shape)}); convert the gradient before step(), or where torch allows "
            "another dtype, set the parameter's grad_dtype before the first step"
        )
