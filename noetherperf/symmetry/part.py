"""Part: what one parameter contributes to a symmetry: a name, an axis and a slice of it, and where it counts from."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from noetherperf.common.untrusted import check_fields, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Part", "Shape"]

Shape = Sequence[int]


@dataclass(frozen=True, repr=False)
class Part:
    """What one parameter contributes to a symmetry: one group of elements for each index of an axis.

    Args:
        parameter: Name of the parameter, as in ``model.named_parameters()``.
        axis: 0 makes every output unit (row) a group, 1 every input unit (column); None: the whole tensor is one group.
        start: First index of the slice of the axis; None: 0.
        stop: One past the last index of the slice; None: the axis' length.
        fold: Number of indices in a group, after slicing. A flattened channel of H·W features has fold=H·W.
        stride: Distance between the indices of one group; 1 for neighbours. Take a head of size d. Rotary positions
            turn its two halves together: stride=d/2 and fold=2. Several query heads share one key head: stride=d and
            fold=heads per key.
        period: The slice repeats at this distance, and start and stop count within a period. An example is a weight in
            which each head holds its queries, keys and values side by side. fold and stride count along the slices of
            all periods, one behind the other. So if the stride is as long as the slice, a group has one index of each
            of `fold` periods. This is for the queries of heads that share a key. None: the axis' length.
        weight: Coefficient of this part in the charge, the degree k of homogeneity; finite, not zero.
        offset: A finite number that the model adds to the parameter when it reads it: 1 for the gain 1 + w of Gemma's
            RMSNorm or of LayerNorm1p. The part's share of a squared length is then |θ + offset|².

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range, or axis is None while start, stop, fold, stride or period is set.
    """

    parameter: str
    axis: int | None
    _: dataclasses.KW_ONLY
    start: int | None = None
    stop: int | None = None
    fold: int = 1
    stride: int = 1
    period: int | None = None
    weight: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.parameter, str):
            raise TypeError(f"Part: parameter must be a name (str), got {shown(self.parameter)}")
        if not self.parameter:
            raise ValueError("Part: parameter is an empty name")
        for field, least in (("axis", 0), ("start", 0), ("stop", 1), ("fold", 1), ("stride", 1), ("period", 1)):
            value = getattr(self, field)
            if value is None and field not in ("fold", "stride"):
                continue
            object.__setattr__(self, field, self._integer(field, value, least))
        object.__setattr__(self, "weight", self._number("weight", self.weight))
        object.__setattr__(self, "offset", self._number("offset", self.offset) + 0.0)  # −0.0 is 0.0
        if self.weight == 0:
            raise ValueError(f"Part of {self.parameter!r}: weight must be finite and not zero, got 0")
        slicing = (self.start, self.stop, self.fold, self.stride, self.period)
        if self.axis is None and slicing != (None, None, 1, 1, None):
            raise ValueError(
                f"{self!r}: start, stop, fold, stride and period slice an axis, "
                "but with axis=None there is none to slice"
            )
        if self.stop is not None and (self.start or 0) >= self.stop:
            raise ValueError(f"{self!r}: start must be below stop")
        if self.stride != 1 and self.fold == 1:
            raise ValueError(
                f"{self!r}: stride is the distance between the indices of a group, but with fold=1 a group has one "
                "index; set fold, or leave stride out"
            )

    def _integer(self, field: str, value: object, least: int) -> int:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"Part of {self.parameter!r}: {field} must be an integer, got {shown(value)}") from None
        if number < least:
            raise ValueError(f"Part of {self.parameter!r}: {field} must be at least {least}, got {shown(number)}")
        return number

    def _number(self, field: str, value: object) -> float:
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"Part of {self.parameter!r}: {field} must be a number, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            nonzero = " and not zero" if field == "weight" else ""
            raise ValueError(f"Part of {self.parameter!r}: {field} must be finite{nonzero}, got {shown(value)}")
        return number

    def __repr__(self) -> str:
        fields = self.to_dict()
        del fields["parameter"]
        return f"Part({self.parameter!r}, {', '.join(f'{key}={value!r}' for key, value in fields.items())})"

    def bounds(self, shape: Shape) -> tuple[int, int]:
        """The slice of the axis as a half-open range of indices, for a parameter of this shape.

        Args:
            shape: The parameter's shape.

        Returns:
            (start, stop), with 0 <= start < stop <= period or shape[axis]; (0, 1) where axis is None.

        Raises:
            ValueError: The axis or the slice lies outside the shape, or the period does not divide the axis.
        """
        if self.axis is None:
            return 0, 1
        if self.axis >= len(shape):
            raise ValueError(
                f"parameter {self.parameter!r}: axis {self.axis} is out of range for shape {tuple(shape)}; "
                + (f"use an axis from 0 to {len(shape) - 1}, or None" if shape else "a scalar has axis None only")
            )
        axis, length = f"axis {self.axis}", shape[self.axis]
        if self.period is not None:
            if length % self.period:
                raise ValueError(
                    f"parameter {self.parameter!r}: period {self.period} does not divide {axis} of shape {tuple(shape)}"
                )
            axis, length = f"period of axis {self.axis}", self.period
        start, stop = self.start or 0, length if self.stop is None else self.stop
        if not start < stop <= length:
            fault = "empty" if start >= stop else "out of range"
            raise ValueError(
                f"parameter {self.parameter!r}: the slice {start}:{stop} of {axis} is {fault} "
                f"for shape {tuple(shape)}, where that {axis.partition(' ')[0]} has length {length}"
            )
        return start, stop

    def n_groups(self, shape: Shape) -> int:
        """The number of groups in a parameter of this shape.

        Args:
            shape: The parameter's shape.

        Returns:
            n_periods · (stop − start) / fold, at least 1; 1 where axis is None.

        Raises:
            ValueError: The axis or the slice lies outside the shape; or fold · stride divides neither the slice, nor
                the periods into sets whose groups hold the same places of each slice.
        """
        start, stop = self.bounds(shape)
        n_periods = 1 if self.axis is None or self.period is None else shape[self.axis] // self.period
        length, block = stop - start, self.fold * self.stride
        whole_slices = block % length == 0 and n_periods % (block // length) == 0
        same_places = length % self.stride == 0 or self.stride % length == 0
        if length % block and not (whole_slices and same_places):
            apart = f", {self.stride} apart," if self.stride != 1 else ""
            every = f" of every {self.period}" if n_periods > 1 else ""
            raise ValueError(
                f"parameter {self.parameter!r}: fold {self.fold}{apart} does not divide the {n_periods * length} "
                f"indices {start}:{stop}{every} of axis {self.axis} for shape {tuple(shape)}"
            )
        return n_periods * length // self.fold

    @property
    def run(self) -> int:
        """The number of neighbouring indices that always share a group: fold if stride is 1, else 1."""
        return self.fold if self.stride == 1 else 1

    def gather(self, values: "Tensor", run: int = 1) -> "Tensor":
        """Values along the axis, sorted into groups.

        Args:
            values: [..., length / run], one value for each `run` neighbouring indices of the axis.
            run: A divisor of this part's run, start, stop and period.

        Returns:
            [..., n_groups, values of one group]; [..., 1, length] where axis is None.
        """
        if self.axis is None:
            return values.unsqueeze(-2)
        periods = values.unflatten(-1, (-1, values.shape[-1] if self.period is None else self.period // run))
        stop = None if self.stop is None else self.stop // run
        slices = periods[..., (self.start or 0) // run : stop].flatten(-2)
        fold = self.fold // run if self.stride == 1 else self.fold
        groups: Tensor = slices.unflatten(-1, (-1, fold, self.stride)).transpose(-1, -2)
        return groups.flatten(-3, -2)

    def grouped(self, x: "Tensor") -> "Tensor":
        """The elements of each group of a tensor of the parameter's shape, as they are: [n_groups, elements of one]."""
        if self.axis is None:
            return x.reshape(1, -1)
        return self.gather(x.movedim(self.axis, -1)).movedim(-2, 0).flatten(1)

    def to_dict(self) -> dict[str, Any]:
        """This part as plain data for JSON, without the fields that have their default. The axis is always there."""
        named = ((field, getattr(self, field)) for field in _PART_DEFAULTS)
        return {key: value for key, value in named if key == "axis" or value != _PART_DEFAULTS[key]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Part":
        """The part that `to_dict` wrote.

        Raises:
            ValueError: A field is unknown, missing or invalid.
        """
        names = {field.name for field in dataclasses.fields(Part)}
        check_fields("part", data, required={"parameter", "axis"}, known=names)
        try:
            return Part(**data)
        except TypeError as error:
            raise ValueError(str(error)) from error


_PART_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Part)}
