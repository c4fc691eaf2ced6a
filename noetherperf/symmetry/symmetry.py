"""Symmetries as immutable data over parameter names: which numbers move together, and what is conserved because of it.

A symmetry is a family of transformations of the parameters that leaves the loss alone. Its *generator* ψ is the
direction in which they start, so the gradient has nothing along it, ⟨g, ψ⟩ = 0 on every batch, and its *charge* Q is
what gradient flow conserves. This file knows names, axes and coefficients only; addresses are the plan's business.

Source: Kunin et al. (2021), Neural Mechanics: Symmetry and Broken Conservation Laws in Deep Learning Dynamics,
arXiv:2012.04728; docs/theory.md, section 1.
"""

import dataclasses
import difflib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from noetherperf.common.untrusted import load_json, shown
from noetherperf.symmetry import explain as explanation

__all__ = [
    "Norm",
    "Part",
    "Rescale",
    "Scale",
    "Symmetry",
    "Translation",
    "from_json",
    "layers",
    "neurons",
    "to_json",
    "validate",
]

Kind = Literal["translation", "scale", "rescale", "norm"]
Law = Literal["translation", "norm"]
Shape = Sequence[int]

JSON_VERSION = 1


@dataclass(frozen=True, repr=False)
class Part:
    """What one parameter contributes to a symmetry: one group of elements for each index of an axis.

    Args:
        parameter: Name of the parameter, as in ``model.named_parameters()``.
        axis: 0 makes every output unit (row) a group, 1 every input unit (column); None: the whole tensor is one group.
        start: First index of the axis that takes part; None: 0.
        stop: One past the last index that takes part; None: the axis' length.
        fold: So many indices (after slicing) share a group, as the H·W features of a flattened channel do.
        stride: How far apart the indices lie that share a group: 1 for neighbours; d/2 for the two halves of a head of
            d that rotary positions turn together (fold=2); d for the query heads of one key head (fold=heads per key).
        period: The slice and its groups repeat every so many indices, as queries do where each head holds its own
            queries, keys and values side by side; start and stop then count within a period. None: the axis' length.
        weight: Coefficient of this part in the charge, the degree k of homogeneity; finite, not zero.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field is out of range, or slices an axis that is None.
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
        object.__setattr__(self, "weight", self._coefficient(self.weight))
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
                f"{self!r}: stride says how far apart the indices of a group lie, but with fold=1 it has one"
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

    def _coefficient(self, value: object) -> float:
        if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"Part of {self.parameter!r}: weight must be a number, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number == 0:
            raise ValueError(f"Part of {self.parameter!r}: weight must be finite and not zero, got {shown(value)}")
        return number

    def __repr__(self) -> str:
        fields = self.to_dict()
        del fields["parameter"]
        return f"Part({self.parameter!r}, {', '.join(f'{key}={value!r}' for key, value in fields.items())})"

    def bounds(self, shape: Shape) -> tuple[int, int]:
        """The half-open range of indices of the axis that take part, for a parameter of this shape.

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
        """How many groups this part makes of a parameter of this shape.

        Args:
            shape: The parameter's shape.

        Returns:
            (stop − start) / fold in each period, at least 1; 1 where axis is None.

        Raises:
            ValueError: The axis or the slice lies outside the shape, or fold · stride does not divide the slice.
        """
        start, stop = self.bounds(shape)
        if (stop - start) % (self.fold * self.stride):
            apart = f", {self.stride} apart," if self.stride != 1 else ""
            raise ValueError(
                f"parameter {self.parameter!r}: fold {self.fold}{apart} does not divide the {stop - start} indices "
                f"{start}:{stop} of axis {self.axis} for shape {tuple(shape)}"
            )
        n_periods = 1 if self.axis is None or self.period is None else shape[self.axis] // self.period
        return n_periods * (stop - start) // self.fold

    @property
    def run(self) -> int:
        """How many neighbouring indices always share a group: fold where they are neighbours, else 1."""
        return self.fold if self.stride == 1 else 1

    def gather(self, values: Tensor, run: int = 1) -> Tensor:
        """Values along the axis, sorted into groups.

        Args:
            values: [..., length / run], one for each `run` neighbouring indices of the axis.
            run: Divides this part's run, start, stop and period.

        Returns:
            [..., n_groups, values of one group]; [..., 1, length] where axis is None.
        """
        if self.axis is None:
            return values.unsqueeze(-2)
        periods = values.unflatten(-1, (-1, values.shape[-1] if self.period is None else self.period // run))
        stop = None if self.stop is None else self.stop // run
        slices = periods[..., (self.start or 0) // run : stop]
        fold = self.fold // run if self.stride == 1 else self.fold
        groups: Tensor = slices.unflatten(-1, (-1, fold, self.stride)).transpose(-1, -2)
        return groups.flatten(-4, -2)

    def grouped(self, x: Tensor) -> Tensor:
        """The elements of each group of a tensor of the parameter's shape: [n_groups, elements of one group]."""
        if self.axis is None:
            return x.reshape(1, -1)
        return self.gather(x.movedim(self.axis, -1)).movedim(-2, 0).flatten(1)

    def to_dict(self) -> dict[str, Any]:
        """This part as plain data for JSON; fields that have their default are left out, save the axis."""
        named = ((field, getattr(self, field)) for field in _PART_DEFAULTS)
        return {key: value for key, value in named if key == "axis" or value != _PART_DEFAULTS[key]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Part":
        """The part that `to_dict` wrote.

        Raises:
            ValueError: A field is unknown, missing or of no use.
        """
        names = {field.name for field in dataclasses.fields(Part)}
        _check_fields("part", data, required={"parameter", "axis"}, known=names)
        try:
            return Part(**data)
        except TypeError as error:
            raise ValueError(str(error)) from error


_PART_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Part)}


@dataclass(frozen=True, init=False, repr=False)
class Symmetry:
    """One symmetry (or one set of norms to watch): a name, and parts whose weights carry the signs of the charge.

    Group i of the symmetry is group i of every part together. Use `Translation`, `Scale`, `Rescale` or `Norm`.

    Attributes:
        name: Under which the readout lists it.
        parts: With signed weights.
        kind: "translation", "scale", "rescale" or "norm".
        law: Which law of motion the charge follows: "translation" (linear in θ) or "norm" (quadratic).
        claimed: Whether ⟨g, ψ⟩ = 0 is claimed, so that the law is a prediction and a defect is a finding.
    """

    name: str
    parts: tuple[Part, ...]
    kind: ClassVar[Kind]
    law: ClassVar[Law] = "norm"
    claimed: ClassVar[bool] = True

    def __init__(self, name: str, parts: Iterable[Part]) -> None:
        if type(self) is Symmetry:
            raise TypeError("Symmetry has no charge of its own: use Translation, Scale, Rescale or Norm")
        if not isinstance(name, str):
            raise TypeError(f"{type(self).__name__}: name must be a str, got {shown(name)}")
        if not name:
            raise ValueError(f"{type(self).__name__}: name is empty, but the readout lists charges by name")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "parts", self._checked(parts, "parts"))

    @classmethod
    def _checked(cls, parts: object, role: str) -> tuple[Part, ...]:
        if isinstance(parts, str) or not isinstance(parts, Iterable):
            raise TypeError(f"{cls.__name__}: {role} must be a sequence of Part, got {parts!r}")
        checked = tuple(parts)
        for part in checked:
            if not isinstance(part, Part):
                raise TypeError(f"{cls.__name__}: {role} must hold Part only, got {part!r}")
        if not checked:
            raise ValueError(f"{cls.__name__}: {role} is empty, so nothing would be measured")
        return checked

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {list(self.parts)!r})"

    def explain(self) -> explanation.Explanation:
        """The symmetry, its generator, constraints, charge and laws in words and formulas, with its parameters' names.

        Returns:
            Text, which a prompt shows and `print` prints.
        """
        return explanation.explain(self.kind, self.name, self.parts)

    def charge(self, parameters: Mapping[str, Tensor], *, magnitude: bool = False) -> Tensor:
        """The charge of these parameters in plain torch: Σ c ⟨θ, 1⟩ over a translation's parts, else Σ c |θ|².

        What a readout says is measured in the step; this is the same by its definition, to compare with.

        Args:
            parameters: Tensors by name, such as dict(model.named_parameters()).
            magnitude: Sum the terms' magnitudes instead: what a rounding error of the charge is relative to.

        Returns:
            [n groups], float64, on the parameters' device.

        Raises:
            KeyError: A part names a parameter that is not there.
        """
        shares = []
        for part in self.parts:
            theta = part.grouped(parameters[part.parameter].detach().double())
            terms = part.weight * (theta if self.law == "translation" else theta.square())
            shares.append((terms.abs() if magnitude else terms).sum(1))
        return torch.stack(shares).sum(0)

    def to_dict(self) -> dict[str, Any]:
        """This symmetry as plain data for JSON: {"kind", "name", and the lists of parts it is built from}."""
        return {"kind": self.kind, "name": self.name, "parts": [part.to_dict() for part in self.parts]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Symmetry":
        """The symmetry that `to_dict` wrote.

        Raises:
            ValueError: The kind or a field is unknown, or a field is missing or of no use.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a symmetry must be an object, got {shown(data)}")
        kind = data.get("kind")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"unknown kind of symmetry {shown(kind)}; known are {', '.join(_KINDS)}")
        lists = ("inward", "outward") if kind == Rescale.kind else ("parts",)
        fields = {"kind", "name", *lists}
        _check_fields(kind, data, required=fields, known=fields)
        for field in lists:
            if not isinstance(data[field], list | tuple):
                raise ValueError(f"{kind}: {field} must be a list of parts, got {shown(data[field])}")
        try:
            return _KINDS[kind](data["name"], *([Part.from_dict(part) for part in data[field]] for field in lists))
        except TypeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, init=False, repr=False)
class Translation(Symmetry):
    """Adding one number to all parameters of a group changes nothing: f(θ + α 1_A) = f(θ).

        generator ψ = c 1_A          constraint Σ c ⟨g, 1⟩ = 0          charge Q = Σ c ⟨θ_A, 1⟩

    With weight decay λ the flow gives Q(t) = e^{−λt} Q(0). It holds for each column of the last linear layer, and for
    its bias, under softmax with cross-entropy; for whatever writes to a stream that only LayerNorm reads; for biases
    before BatchNorm. Weights of any sign are a weighted translation.

    Args:
        name: Under which the readout lists it.
        parts: Groups with the same index move together.

    Raises:
        TypeError, ValueError: The name is no name, or parts is empty or holds something else.

    Source: Kunin et al. (2021), arXiv:2012.04728, translation symmetry.
    """

    kind = "translation"
    law = "translation"


@dataclass(frozen=True, init=False, repr=False)
class Scale(Symmetry):
    """Multiplying all parameters of a group by one number changes nothing: f(α θ_A) = f(θ_A) for α > 0.

        generator ψ = c θ_A          constraint Σ c ⟨g, θ⟩ = 0          charge Q = Σ c |θ_A|²

    With weight decay λ the flow gives Q(t) = e^{−2λt} Q(0) + η ∫₀ᵗ e^{−2λ(t−s)} |g_A|² ds. It holds, as the eps of the
    normalisation goes to 0, for the weights and bias of each unit before BatchNorm, and of whole layers or blocks
    before Layer-, Group- or RMSNorm.

    Args:
        name: Under which the readout lists it.
        parts: Groups with the same index scale together; weights positive.

    Raises:
        TypeError, ValueError: The name is no name, parts is empty or holds something else, or a weight is negative.

    Source: Kunin et al. (2021), arXiv:2012.04728, scale symmetry.
    """

    kind = "scale"

    def __init__(self, name: str, parts: Iterable[Part]) -> None:
        super().__init__(name, parts)
        for part in self.parts:
            if part.weight < 0:
                raise ValueError(f"Scale: {part!r} has a negative weight; what shrinks as the rest grows is a Rescale")


@dataclass(frozen=True, init=False, repr=False)
class Rescale(Symmetry):
    """Scaling what enters a unit up and what leaves it down changes nothing: f(α θ_A1, θ_A2 / α) = f(θ_A1, θ_A2).

        generator ψ = (θ_A1, −θ_A2)     constraint ⟨g_A1, θ_A1⟩ − ⟨g_A2, θ_A2⟩ = 0     charge Q = |θ_A1|² − |θ_A2|²

    The loss is the same for every α > 0. With weight decay λ the flow gives
    Q(t) = e^{−2λt} Q(0) + η ∫₀ᵗ e^{−2λ(t−s)} (|g_A1|² − |g_A2|²) ds. It holds through ReLU and its kin, pooling,
    dropout and flattening; between a normalisation's affine parameters and all readers of them; inside attention and
    gated units. Where the unit is homogeneous of degree k (ReLU²: k = 2), its outward parts have weight k, the
    generator is (θ_A1, −k θ_A2), and Q = |θ_A1|² − k |θ_A2|².

    Args:
        name: Under which the readout lists it.
        inward: Parameters into the unit; weights positive.
        outward: Parameters out of it; weights positive here, negated in `parts`.

    Raises:
        TypeError, ValueError: The name is no name, inward or outward is empty or holds something else, or a weight is
            negative.

    Source: Kunin et al. (2021), arXiv:2012.04728, rescale symmetry; for degree k derived here.
    """

    kind = "rescale"

    def __init__(self, name: str, inward: Iterable[Part], outward: Iterable[Part]) -> None:
        inward, outward = self._checked(inward, "inward"), self._checked(outward, "outward")
        for part in (*inward, *outward):
            if part.weight < 0:
                raise ValueError(f"Rescale: {part!r} has a negative weight; inward or outward already sets the sign")
        super().__init__(name, (*inward, *map(_negated, outward)))

    @property
    def inward(self) -> tuple[Part, ...]:
        """The parts into the unit."""
        return tuple(part for part in self.parts if part.weight > 0)

    @property
    def outward(self) -> tuple[Part, ...]:
        """The parts out of the unit, with positive weights as they were given."""
        return tuple(_negated(part) for part in self.parts if part.weight < 0)

    def __repr__(self) -> str:
        return f"Rescale({self.name!r}, inward={list(self.inward)!r}, outward={list(self.outward)!r})"

    def to_dict(self) -> dict[str, Any]:
        """This symmetry as plain data for JSON: {"kind", "name", "inward", "outward"}."""
        lists = {"inward": self.inward, "outward": self.outward}
        return {"kind": self.kind, "name": self.name} | {
            role: [part.to_dict() for part in parts] for role, parts in lists.items()
        }


@dataclass(frozen=True, init=False, repr=False)
class Norm(Symmetry):
    """No symmetry claimed: the squared norm of each group, and the budget that says where it went.

        Q = Σ c |θ_A|²     |θ'|² = |θ|² − 2η ⟨θ, u⟩ + η² |u|²

    The update's own identity splits every change of Q into decay, the gradient's part ⟨g, θ⟩ (the defect) and |u|², on
    any network; the defect is a quantity of interest here and no error.

    Args:
        name: Under which the readout lists it.
        parts: Groups with the same index are summed.

    Raises:
        TypeError, ValueError: The name is no name, or parts is empty or holds something else.

    Source: Derived here from the update.
    """

    kind = "norm"
    claimed = False


_KINDS: dict[str, type[Symmetry]] = {cls.kind: cls for cls in (Translation, Scale, Rescale, Norm)}


def _negated(part: Part) -> Part:
    return dataclasses.replace(part, weight=-part.weight)


def _check_fields(what: str, data: object, *, required: set[str], known: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}: must be an object, got {shown(data)}")
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"{what}: unknown field {shown(unknown[0])}; known are {', '.join(sorted(known))}")
    if missing := sorted(required - set(data)):
        raise ValueError(f"{what}: field {missing[0]!r} is missing")


def to_json(symmetries: Iterable[Symmetry]) -> str:
    """Symmetries as JSON text, which `from_json` reads back equal.

    Args:
        symmetries: Any number of them.

    Returns:
        {"version": 1, "symmetries": [...]}, indented.
    """
    data = {"version": JSON_VERSION, "symmetries": [symmetry.to_dict() for symmetry in symmetries]}
    return json.dumps(data, indent=2, ensure_ascii=False)


def from_json(text: str | bytes) -> tuple[Symmetry, ...]:
    """Symmetries from the text that `to_json` wrote; the text is data and nothing in it is executed.

    Args:
        text: JSON, or the bytes of a file of it in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Returns:
        The symmetries in their order.

    Raises:
        ValueError: The text is no JSON, of another version, has an unknown kind or field, or a field twice.
    """
    data = load_json(text, "symmetries file")
    fields = {"version", "symmetries"}
    _check_fields("symmetries file", data, required=fields, known=fields)
    if type(data["version"]) is not int or data["version"] != JSON_VERSION:
        raise ValueError(f"symmetries file: version {shown(data['version'])}, but only {JSON_VERSION} can be read")
    if not isinstance(data["symmetries"], list):
        raise ValueError(f"symmetries file: symmetries must be a list, got {shown(data['symmetries'])}")
    return tuple(Symmetry.from_dict(item) for item in data["symmetries"])


def validate(symmetries: Iterable[Symmetry], shapes: Mapping[str, Shape]) -> tuple[Symmetry, ...]:
    """Check symmetries against the parameters that they name.

    Args:
        symmetries: Any number of them.
        shapes: Parameter name -> shape.

    Returns:
        The same symmetries as a tuple.

    Raises:
        TypeError: An item is no Symmetry.
        ValueError: A parameter is unknown; an axis, slice or fold does not fit its shape; the parts of one symmetry
            have different numbers of groups, or name the same indices of an axis twice; two symmetries share a name.
    """
    if isinstance(symmetries, Symmetry):
        raise TypeError(f"symmetries must be a sequence, got one {type(symmetries).__name__}; put it into a list")
    symmetries = tuple(symmetries)
    names: set[str] = set()
    for symmetry in symmetries:
        if not isinstance(symmetry, Symmetry):
            raise TypeError(f"symmetries must hold Translation, Scale, Rescale or Norm only, got {symmetry!r}")
        if symmetry.name in names:
            raise ValueError(f"two symmetries are named {symmetry.name!r}; the readout lists them by name: rename one")
        names.add(symmetry.name)
        try:
            _check_parts(symmetry.parts, shapes)
        except ValueError as error:
            raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None
    return symmetries


def _check_parts(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> None:
    for part in parts:
        if part.parameter not in shapes:
            nearest = difflib.get_close_matches(part.parameter, shapes, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(map(repr, shapes)) or 'none'}"
            raise ValueError(f"no parameter is named {part.parameter!r}; {hint}")
    n_groups = [part.n_groups(shapes[part.parameter]) for part in parts]
    for part, n in zip(parts, n_groups, strict=True):
        if n != n_groups[0]:
            raise ValueError(
                f"all parts need the same number of groups, but {parts[0]!r} has {n_groups[0]} and {part!r} has {n}"
            )
    of_parameter: dict[str, list[Part]] = {}
    for part in parts:
        of_parameter.setdefault(part.parameter, []).append(part)
    for parameter, its_parts in of_parameter.items():
        if len(its_parts) > 1 and (both := _overlapping(its_parts, shapes[parameter])):
            raise ValueError(f"{both[0]!r} and {both[1]!r} name the same elements of {parameter!r} twice")


def _overlapping(parts: Sequence[Part], shape: Shape) -> tuple[Part, Part] | None:
    """Two of the parts of one parameter that hold the same elements, None if all are apart; linear in their number."""
    owners: dict[int, Tensor] = {}  # for each axis, which part holds each of its indices; −1: none so far
    for number, part in enumerate(parts):
        if part.axis is None:
            return parts[0], parts[max(1, number)]
        if part.axis not in owners:  # rows and columns do not overlap: a recurrent weight enters and leaves its units
            owners[part.axis] = torch.full((shape[part.axis],), -1, device="cpu")
        start, stop = part.bounds(shape)
        own = owners[part.axis].view(-1, part.period or shape[part.axis])[:, start:stop]
        if (earlier := int(own.max())) >= 0:
            return parts[earlier], part
        own.fill_(number)
    return None


def neurons(model: nn.Module) -> tuple[Symmetry, ...]:
    """The squared norm and its budget for every unit of every module that has a weight of two or more axes.

    A group is an output unit: a row of a linear map or an embedding, a filter of a convolution, with its bias. Frozen
    parameters are left out; shared ones are listed once, under the name that `named_parameters()` gives them.

    Args:
        model: Any model.

    Returns:
        A Norm for each such module, named like it; a weight not called "weight" has one named "parameter[axis]".

    Raises:
        ValueError: A parameter is lazy and has no shape yet, or a grouped transposed convolution has units that are no
            slices of its weight.
    """
    parameters = dict(_trainable(model))
    found: list[Symmetry] = []
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        prefix, _, own_name = name.rpartition(".")
        part = _units(name, parameter, model.get_submodule(prefix))
        bias = ".".join(filter(None, (prefix, own_name.replace("weight", "bias"))))
        n_units = part.n_groups(parameter.shape)
        has_bias = bias in parameters and tuple(parameters[bias].shape) == (n_units,)
        parts = [part, Part(bias, axis=0)] if has_bias else [part]
        found.append(Norm(prefix if prefix and own_name == "weight" else f"{name}[{part.axis}]", parts))
    return tuple(found)


def _units(name: str, parameter: nn.Parameter, module: nn.Module) -> Part:
    """The output units of a weight: axis 0, but in transposed convolutions the weight is [in, out / groups, ...]."""
    if not isinstance(module, nn.modules.conv._ConvTransposeNd) or parameter is not module.weight:
        return Part(name, axis=0)
    if module.groups == 1:
        return Part(name, axis=1)
    if parameter.shape[1] == 1:  # depthwise: output unit i is the i-th block of in / groups rows
        return Part(name, axis=0, fold=parameter.shape[0] // module.groups)
    raise ValueError(
        f"parameter {name!r}: with groups={module.groups} and {parameter.shape[1]} outputs each, an output unit of a "
        "transposed convolution is a block of rows in one column, which no Part describes; use layers(model), or "
        "write the Norms of the other modules by hand"
    )


def layers(model: nn.Module) -> tuple[Symmetry, ...]:
    """The squared norm and its budget for every parameter tensor.

    Frozen parameters are left out; shared ones are listed once, under the name that `named_parameters()` gives them.

    Args:
        model: Any model.

    Returns:
        A Norm of one group for each parameter, named like it.

    Raises:
        ValueError: A parameter is lazy and has no shape yet.
    """
    return tuple(Norm(name, [Part(name, axis=None)]) for name, _ in _trainable(model))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} is lazy and has no shape yet; run the model once on an example first")
        if parameter.requires_grad and parameter.numel():
            yield name, parameter
