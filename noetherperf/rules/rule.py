"""What an update rule is: one object, with everything that engines, readouts and optimizers ask about it.

A rule is a file in this folder, mirrored by csrc/rules/<name>.h and triton_kernels/rules/<name>.py with the same names
in the same order: the update and the list of moments. Its laws stand in Python alone.

What a step needs of a parameter group is one *row* of float64 numbers for each age: the update's coefficients, the time
that the step takes, and the coefficients of every law. Engines read rows; only the rule knows what is in them.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number
from noetherperf.rules.law import Law, Shape, Step
from noetherperf.rules.moments import Pair


class Options(Protocol):
    """Options of one parameter group in one step. `lr` is NaN where it lies on a device, which the host does not read;
    where it is a float64 tensor of no dimensions, so is what follows from it."""

    @property
    def lr(self) -> Number: ...


O = TypeVar("O", bound=Options)  # noqa: E741


def device_lr(group: Mapping[str, Any]) -> Tensor | None:
    """A parameter group's learning rate if it is a tensor on a device, where reading it would wait for the device."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None


#: What `Rule.update` takes and gives for a tensor's buffers; None where it has none.
Buffers = tuple[Tensor | None, ...]


class Rule(ABC, Generic[O]):
    """An update rule.

    Attributes:
        name: As in csrc/rules and triton_kernels/rules.
        option_names: Options of a parameter group that `options` reads.
        number_options: Options of a parameter group that are numbers; every checkpoint has them.
        late_options: Options that checkpoints of early versions of torch lack, and what stands for them.
        buffers: Keys of a tensor's buffers in torch's state of a parameter; there may be none. Where measuring begins,
            the first stands in for the gradient: it gives a law's y₀.
        n_ages: How many ages of a tensor have rows of their own. A tensor's age is the number of steps that have
            written its buffers, at most n_ages − 1: 0 where they have just been made, of zeros.
        coefficients: Names of the update's coefficients.
        moments: What a step may sum, the common ones first.
        laws: The shape of each law.
        idle: By variant the one that takes its place for a tensor with views and with buffers that the step leaves as
            they are, but whose moments it takes.
    """

    name: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]]
    number_options: ClassVar[tuple[str, ...]]
    late_options: ClassVar[tuple[tuple[str, Any], ...]]
    buffers: ClassVar[tuple[str, ...]]
    n_ages: ClassVar[int]
    coefficients: ClassVar[tuple[str, ...]]
    moments: ClassVar[tuple[Pair, ...]]
    laws: ClassVar[Mapping[Law, Shape]]
    idle: ClassVar[Mapping[int, int]]

    @abstractmethod
    def options(self, group: Mapping[str, Any]) -> O:
        """The options that an optimizer's parameter group holds now."""

    @abstractmethod
    def with_lr(self, options: O, lr: Number) -> O:
        """The same options with another learning rate."""

    @abstractmethod
    def variant(self, options: O) -> int:
        """Which of the update's variants the kernels are to run (csrc/rules)."""

    @abstractmethod
    def n_written(self, options: O) -> int:
        """How many of the tensor's buffers, from the first on, a step writes."""

    def ages(self, options: O) -> bool:
        """Whether a step makes a tensor older: it writes buffers."""
        return self.n_written(options) > 0

    @abstractmethod
    def ages_differ(self, options: O) -> bool:
        """Whether tensors of other ages take other steps."""

    @abstractmethod
    def n_taken(self, options: O, has_buffers: bool) -> int:
        """How many of the moments, from the first on, a step sums; the others are zero."""

    @abstractmethod
    def duration(self, options: O) -> Number:
        """T, the time that a step takes in the flow law."""

    @abstractmethod
    def coefficients_of(self, options: O, age: int) -> Sequence[Number]:
        """The update's coefficients for tensors of an age."""

    @abstractmethod
    def steps(self, options: O, age: int, laws: Collection[Law]) -> Mapping[Law, Step]:
        """What moves each of these laws in a step of tensors of an age."""

    @abstractmethod
    def update(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Tensor, Buffers, Tensor]:
        """One step of one tensor.

        Args:
            p: Parameter before the step, in the dtype to compute in.
            g: Gradient of the loss alone; same shape and dtype.
            buffers: Before the step; zeros where they have just been made, None where there are none.
            c: Its coefficients, `coefficients_of`.

        Returns:
            (p', buffers', u) in the compute dtype, not rounded to any other; a buffer that the step does not write is
            the one that came.
        """

    # ---- as torch has it ---------------------------------------------------------------------------------------------

    @abstractmethod
    def buffer_dtype(self, options: O, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        """What torch makes the buffers of, beside a parameter of one dtype and its first gradient of another."""

    def time_may_fall(self, options: O) -> bool:
        """Whether there may be steps whose time is below zero."""
        return float(options.lr) < 0.0

    # ---- rows -------------------------------------------------------------------------------------------------------

    @cached_property
    def n_numbers(self) -> int:
        """The length of a row."""
        return len(self.coefficients) + 1 + sum(self.laws[law].n_numbers for law in Law)

    @cached_property
    def law_numbers(self) -> Mapping[Law, int]:
        """Where in a row each law's coefficients begin."""
        starts, at = {}, len(self.coefficients) + 1
        for law in Law:
            starts[law] = at
            at += self.laws[law].n_numbers
        return starts

    @cached_property
    def moment_rows(self) -> Mapping[str, int]:
        """The row of each moment."""
        return {pair.name: row for row, pair in enumerate(self.moments)}

    def row(self, options: O, age: int, laws: Collection[Law] = tuple(Law)) -> list[Number]:
        """A row: the update's coefficients, the time of the step, the coefficients of every law; [n_numbers].

        Args:
            options: The parameter group's.
            age: Of the tensors.
            laws: Those that somebody asks for; the others stand still.
        """
        row = [*self.coefficients_of(options, age), self.duration(options)]
        steps = self.steps(options, age, laws)
        for law, shape in self.laws.items():
            row += steps[law].numbers(shape) if law in steps else shape.still
        return row
