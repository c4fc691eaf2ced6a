"""Engines: each makes a plan's step on one device. One file each; noetherperf.engines.backends lists them."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from noetherperf.measure.plan import Measurement

if TYPE_CHECKING:
    from noetherperf.engines.reader import Reader

#: Dtypes of parameters and gradients.
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class OnDevice:
    """What a step reads on the parameters' device, so that the host does not wait for it.

    The host reads what it can without waiting: for parameters on the CPU, lrs and found_inf are always None.

    Attributes:
        lrs: One per parameter group: the learning rate that replaces the one of its options (then NaN), or None.
        grad_scale: Every gradient is divided by it first, and stored divided. The quotient is the gradient of the step
            and its moments. None: 1.
        found_inf: If it is not zero, the step is skipped and nothing is written. None: 0.
        counts: Every tensor's count of steps, [n_tensors], any dtype, which the host need not know: a CUDA graph may
            have counted. For a rule that counts and an engine that `reads_counts`. None: the host knows.
    """

    lrs: Sequence[Tensor | None]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    counts: Tensor | None = None

    @cached_property
    def is_empty(self) -> bool:
        """Whether there is nothing to read on a device."""
        return all(x is None for x in (*self.lrs, self.grad_scale, self.found_inf, self.counts))


class Engine(Protocol):
    """Steps the tensors of one plan and measures them.

    Engines are made for fixed parameters (Python objects; their storage may change), one Measurement, and one
    parameter group per tensor. They change parameters, buffers and the measurement, and nothing else: no version
    counter either.
    """

    reads_counts: bool  # whether a step can take the counts of steps from the device

    @property
    def measurement(self) -> Measurement:
        """The measurement after all steps so far: the device's current stream waits for them. Ask for it anew after a
        step."""

    @property
    def ages(self) -> Sequence[int] | Tensor:
        """Each tensor's age without skipped steps: 0 if its buffers are not written yet. Empty: the host knows all."""

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients as a step reads them: torch's lazy gradients are materialized.

        Raises:
            RuntimeError, TypeError: A gradient is not supported; raised before anything is changed.
        """

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list["Call"]:
        """The calls, for carry_out, that fill the moments from the parameters as they are, with v in the gradient's
        place, the first of the buffers or what Rule.carried has in its place: sum_g is ⟨v, 1⟩ and dot_pg ⟨p, v⟩.
        Without v these two are meaningless."""

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
        """Prepare one step and write nothing yet: returns the calls that make it, for carry_out.

        They advance the measurement's clock too: by one step, and by Rule.duration for each group.

        Args:
            grads: One per tensor, as admit gave them; None: the tensor takes no part.
            buffers: For each of the rule's buffers one per tensor; None where it has none.
            options: Of the rule, one per parameter group.
            ages: Per tensor: 0 if its buffers are new (zeros), else the host's count. 0 is passed only once: if that
                step is skipped, the engine keeps the age 0 for the tensor's next step. A rule with a step_key counts
                ages in torch's state instead; then a skipped step gets here only if the counts are on_device.
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


@runtime_checkable
class Repeating(Protocol):
    """An engine that can step the same tensors again without a look at each in turn, after a Glance has."""

    @property
    def addresses(self) -> np.ndarray:
        """Of the tensors, [n, 2 + buffers]: parameter, gradient, buffers, 0 where there is none; another array whenever
        layouts have changed."""

    @property
    def readers(self) -> list["Reader"]:
        """What reads each column of the addresses."""

    def prepare_again(self, options: Sequence[Any], ages: Sequence[int], *, same_options: bool) -> list["Call"]:
        """Prepare a step of the same tensors as the last one, one step older, after their addresses were written;
        nothing of it is on_device.

        Args:
            options, ages: As for `prepare`.
            same_options: Whether the options are those of the last step.
        """


#: A part of a step that writes: compiled code with its arguments, which executes no Python instruction.
Call = Callable[[], object]


def carry_out(calls: Iterable[Call]) -> None:
    """Run calls one after the other, with no Python instruction between them.

    Interrupts and signal handlers raise only between two Python instructions, so a step is made wholly or not at all.
    """
    list(map(operator.call, calls))


class Stepping:
    """The methods `measure` and `step` of an engine, made of its prepare methods."""

    reads_counts = False

    def measure(self, *args: Any) -> None:
        """Measure: prepare it and carry it out."""
        carry_out(self.prepare_to_measure(*args))  # type: ignore[attr-defined]

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Make one step: prepare it and carry it out."""
        carry_out(self.prepare(*args, **kwargs))  # type: ignore[attr-defined]


def gradient_dtypes(p: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that torch allows for a parameter's gradient (Parameter.grad_dtype); usually the parameter's own."""
    dtype: torch.dtype | None = getattr(p, "grad_dtype", p.dtype) if p.is_leaf else p.dtype
    return FLOATING if dtype is None else (dtype,)


def check_gradient(name: str, p: Tensor, grad: Tensor, dtypes: Iterable[torch.dtype] = ()) -> None:
    """Raise if an engine does not support a gradient.

    Args:
        name: Of the parameter.
        p: The parameter.
        grad: Its gradient.
        dtypes: The dtypes that are allowed beside the parameter's own.
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
