"""The interface of an update rule: one object, with everything that engines, readouts and optimizers need.

A rule is a file in this folder, mirrored by csrc/rules/<name>.h and triton_kernels/rules/<name>.py with the same names
in the same order: the update and the list of moments. Its laws are in Python alone.

A step reads one *row* of float64 numbers for each parameter group and age: the update's coefficients, the time that the
step takes, and the coefficients of every law. Engines read rows; only the rule knows what is in them.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from noetherperf.rules.arithmetic import Number
from noetherperf.rules.law import OFFSET, Component, Law, Shape, Step
from noetherperf.rules.moments import COMMON, Pair
from noetherperf.rules.motion import UNKNOWN, Motion
from noetherperf.rules.numbers import number_in


class Options(Protocol):
    """Options of one parameter group in one step.

    `lr` is NaN if it is on a device, where the host does not read it. If it is a float64 tensor of no dimensions, so
    are the numbers that depend on it.
    """

    @property
    def lr(self) -> Number: ...


O = TypeVar("O", bound=Options)  # noqa: E741


#: A tensor's buffers, for `Rule.update`; None if it has none.
Buffers = tuple[Tensor | None, ...]


def numbers_of(rule: "Rule[Any]", group: Mapping[str, Any]) -> dict[str, float]:
    """The options that a rule reads from a parameter group, by their fields' names; NaN where one is no number.

    A learning rate on a device is read, which waits for the device.
    """
    options = {**asdict(rule.options(group)), "lr": number_in(group, "lr")}
    return {name: float(x) if isinstance(x, int | float) else math.nan for name, x in options.items()}


class Rule(ABC, Generic[O]):
    """An update rule.

    Attributes:
        name: As in csrc/rules and triton_kernels/rules.
        option_names: Options of a parameter group that `options` reads.
        number_options: Options of a parameter group that are numbers; every checkpoint has them.
        pair_options: Options of a parameter group that are two numbers each.
        late_options: Options that checkpoints of early versions of torch lack, and their defaults.
        buffers: Keys of a tensor's buffers in torch's state of a parameter; there may be none.
        late_buffers: Those that a tensor may lack although it has made steps, because some options do without.
        n_ages: How many ages of a tensor have rows of their own, 1 or 2. A tensor's age is the number of steps that
            have written its buffers, at most n_ages − 1: 0 if they are new (zeros). 0: ages have no bound, and are
            counted under step_key.
        first_step: What sets a tensor's step at age 0 apart from others', as a clause for messages; not for rules that
            count ages.
        step_key: Key of a tensor's age in torch's state of a parameter, where it is counted; None if it is not.
        coefficients: Names of the update's coefficients.
        moments: The sums of a step, the common ones first.
        laws: The shape of each law.
        offset: What a norm's law has besides, where some norm counts from an offset: components "offset" and
            "offset_flow" (rules/law.py). None: such laws are open.
        lr_degree: The k of an effective learning rate η/|θ|^k: 1 + the power of 1/|θ| with which the update of
            parameters falls whose scale the loss does not feel; None if it is not known.
        idle: For some variants, the variant that replaces it for a tensor with views and idle buffers, which the step
            does not write, but sums in its moments.
    """

    name: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]]
    number_options: ClassVar[tuple[str, ...]]
    pair_options: ClassVar[tuple[str, ...]] = ()
    late_options: ClassVar[tuple[tuple[str, Any], ...]]
    buffers: ClassVar[tuple[str, ...]]
    late_buffers: ClassVar[tuple[str, ...]] = ()
    n_ages: ClassVar[int]
    first_step: ClassVar[str] = "wrote its buffers for the first time"
    step_key: ClassVar[str | None] = None
    coefficients: ClassVar[tuple[str, ...]]
    moments: ClassVar[tuple[Pair, ...]]
    laws: ClassVar[Mapping[Law, Shape]]
    offset: ClassVar[tuple[Component, ...]] = ()
    lr_degree: ClassVar[int | None] = None
    idle: ClassVar[Mapping[int, int]]

    @abstractmethod
    def options(self, group: Mapping[str, Any]) -> O:
        """The options that an optimizer's parameter group holds now.

        Raises:
            TypeError, ValueError: One is no number where it must be (rules/numbers.py).
        """

    @abstractmethod
    def with_lr(self, options: O, lr: Number) -> O:
        """The same options with another learning rate."""

    @abstractmethod
    def variant(self, options: O) -> int:
        """The variant of the update that the kernels run (csrc/rules)."""

    @abstractmethod
    def n_written(self, options: O) -> int:
        """How many of the tensor's buffers, from the first on, a step writes."""

    def ages(self, options: O) -> bool:
        """Whether a step makes a tensor older: it writes buffers."""
        return self.n_written(options) > 0

    def older(self, age: int) -> int:
        """A tensor's age after a step that makes it older."""
        return age + 1 if self.step_key is not None else 1

    def with_row(self, age: int) -> int:
        """The age whose row a tensor of an age takes."""
        return int(age) if self.step_key is not None else min(age, self.n_ages - 1)

    @abstractmethod
    def ages_differ(self, options: O) -> bool:
        """Whether a tensor's step depends on its age."""

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
            p: Parameter before the step, in the dtype to compute in; nothing that comes is written.
            g: Gradient of the loss alone; same shape and dtype.
            buffers: Before the step; zeros if they are new, None if there are none.
            c: Its coefficients, `coefficients_of`.

        Returns:
            (p', buffers', u) in the compute dtype, not rounded to any other. A buffer that the step does not write is
            returned as it is.
        """

    def direction(self, p: Tensor, g: Tensor, buffers: Buffers, c: Sequence[Any]) -> tuple[Buffers, Tensor]:
        """buffers' and u of `update`, which do not depend on the learning rate as long as p' is not asked for.

        Coefficients may be tensors on a device, which the host does not read.
        """
        return self.update(p, g, buffers, c)[1:]

    def carried(self, buffers: Buffers, options: O, age: int) -> Tensor | None:
        """What a tensor carries into its next step: a law's y₀ is ⟨p, carried⟩, for a translation ⟨carried, 1⟩.

        Args:
            buffers: As the last step left them; None where it made none.
            options: Of the next step, as far as they are known.
            age: The tensor's.

        Returns:
            A tensor like the parameter; None if nothing is carried.
        """
        return buffers[0] if buffers else None

    def open_reason(self, options: O, law: Law) -> str:
        """Why free + forced predicts nothing in a step with these options, even if all parts make the same one.

        Such a law is open from that step on.

        Args:
            options: The parameter group's.
            law: A translation's or a norm's.

        Returns:
            The reason, as a clause; "" if the law predicts.
        """
        return ""

    def motion(self, options: O) -> Motion:
        """How a step with these options moves a group's elements; UNKNOWN where the moments do not tell.

        Derived in docs/theory.md, section 7.
        """
        return UNKNOWN

    def with_offsets(self) -> Self:
        """The same rule, whose norms may count from an offset: `steps` give the components `offset` too."""
        new = copy.copy(self)
        for cached in ("n_numbers", "law_numbers"):  # of the laws without
            vars(new).pop(cached, None)
        norm = Shape((*self.laws[Law.NORM].components, *self.offset))
        vars(new)["laws"] = {**self.laws, Law.NORM: norm}
        return new

    @property
    def has_offsets(self) -> bool:
        """Whether norms may count from an offset."""
        return OFFSET in self.laws[Law.NORM].rows

    # ---- as torch has it ---------------------------------------------------------------------------------------------

    @abstractmethod
    def buffer_dtype(self, options: O, p: torch.dtype, g: torch.dtype) -> torch.dtype:
        """The dtype in which torch makes the buffers, for a parameter of dtype p and its first gradient of dtype g."""

    def time_may_fall(self, options: O) -> bool:
        """Whether a step's time may be negative."""
        return float(options.lr) < 0.0

    def check(self) -> None:
        """Check that the rule's data are what engines and readouts rely on.

        Raises:
            ValueError: They are not; it names the attribute and says what is wrong.
        """
        name = getattr(self, "name", type(self).__name__)
        for attribute in Rule.__annotations__:
            if not hasattr(self, attribute):
                raise ValueError(f"update rule {name!r}: has no {attribute!r}")
        if self.n_ages not in ((1, 2) if self.step_key is None else (0,)):
            raise ValueError(
                f"update rule {name!r}: n_ages is {self.n_ages}, but engines tell buffers just made from others and no "
                "more: it must be 1 or 2, or 0 where torch's state counts ages under step_key"
            )
        if self.moments[: len(COMMON)] != COMMON:
            raise ValueError(
                f"update rule {name!r}: moments must begin with the common ones (rules/moments.py, COMMON)"
            )
        if len(self.moment_rows) < len(self.moments):
            raise ValueError(f"update rule {name!r}: two of its moments have one name")
        for law in Law:
            where = f"update rule {name!r}: the {law.name.lower()} law"
            if law not in self.laws:
                raise ValueError(f"{where} is missing in laws")
            components = self.laws[law].components
            if len(self.laws[law].rows) < len(components):
                raise ValueError(f"{where} has two components of one name")
            if not any(x.name == "budget" and x.starts and x.jumps for x in components):
                raise ValueError(f"{where} needs a component 'budget' with starts=True and jumps=True")
            for component in components:
                if component.size not in (1, 2):
                    raise ValueError(f"{where}: {component.name!r} has size {component.size}, which must be 1 or 2")
                for moment in component.moments:
                    if moment not in self.moment_rows:
                        raise ValueError(
                            f"{where}: {component.name!r} is driven by {moment!r}, which is none of the rule's moments "
                            f"({', '.join(self.moment_rows)})"
                        )

    def check_numbers(self, options: O, laws: Collection[Law]) -> None:
        """Check that the rule gives the numbers that it names, for these options and laws.

        Raises:
            ValueError: It gives others.
        """
        for age in range(max(self.n_ages, 1)):
            n = len(self.coefficients_of(options, age))
            if n != len(self.coefficients):
                raise ValueError(
                    f"update rule {self.name!r}: coefficients_of gives {n} numbers, but coefficients names "
                    f"{len(self.coefficients)} ({', '.join(self.coefficients)})"
                )
            for law in laws:
                try:
                    self.steps(options, age, (law,))[law].check(self.laws[law])
                except ValueError as error:
                    raise ValueError(f"update rule {self.name!r}: the {law.name.lower()} law: {error}") from error

    # ---- rows -------------------------------------------------------------------------------------------------------

    @cached_property
    def n_numbers(self) -> int:
        """The length of a row."""
        return len(self.coefficients) + 1 + sum(self.laws[law].n_numbers for law in Law)

    @cached_property
    def law_numbers(self) -> Mapping[Law, int]:
        """The first coefficient of each law in a row."""
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
            laws: The laws that some symmetry needs; the others stand still.
        """
        row = [*self.coefficients_of(options, age), self.duration(options)]
        steps = self.steps(options, age, laws)
        for law, shape in self.laws.items():
            row += steps[law].numbers(shape) if law in steps else shape.still
        return row

    def row_of_age(self, options: O, laws: Collection[Law]) -> Callable[[int], list[Number]]:
        """`row` as a function of the age, which computes what depends on the options alone only once."""
        return lambda age: self.row(options, age, laws)

    def rows(self, options: O, ages: Tensor, laws: Collection[Law] = tuple(Law)) -> Tensor:
        """The rows of tensors whose ages are on a device, computed there without waiting: for a step in a CUDA graph.

        Args:
            options: Of the parameter group that the tensors are in; numbers of these may be on the device too.
            ages: Counts of steps, [n_tensors], any dtype. The rule's formulas must take them in the place of a number.
            laws: As for `row`.

        Returns:
            [n_tensors, n_numbers], float64, on the device of ages.
        """
        steps = ages.to(torch.float64)
        row = self.row(options, steps, laws)  # type: ignore[arg-type]
        numbers = [x if isinstance(x, Tensor) else steps.new_full((), x) for x in row]
        return torch.stack([x.expand_as(steps) for x in numbers], dim=-1)
