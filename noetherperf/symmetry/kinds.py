"""The kinds of symmetry with one charge for each group, as immutable data over parameter names: Translation, Scale,
Rescale, and Norm. Balance, whose charges are matrices, is in balance.py.

A symmetry is a family of transformations of the parameters that leaves the loss unchanged. Its *generator* ψ is the
direction in which they start, so the gradient has no component along it, ⟨g, ψ⟩ = 0 on every batch. Its *charge* Q is
what gradient flow conserves. A symmetry holds names, axes and coefficients; the plan turns them into addresses.

Source: Kunin et al. (2021), Neural Mechanics: Symmetry and Broken Conservation Laws in Deep Learning Dynamics,
arXiv:2012.04728; docs/theory.md, section 1.
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from noetherperf.common.untrusted import check_fields, shown
from noetherperf.symmetry.explain import Explanation, explain
from noetherperf.symmetry.names import name_of
from noetherperf.symmetry.part import Part

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KINDS", "Norm", "Quantity", "Rescale", "Scale", "Symmetry", "Translation", "TwoSided"]

Kind = Literal["translation", "scale", "rescale", "norm", "balance"]
Quantity = Literal["translation", "norm"]


@dataclass(frozen=True, init=False, repr=False)
class Symmetry:
    """One symmetry, or one set of norms: a name, and parts whose weights carry the signs of the charge.

    Group i of the symmetry is group i of every part together. Use `Translation`, `Scale`, `Rescale`, `Norm` or
    `Balance`.

    Attributes:
        name: Its key in the readout.
        parts: Parts with signed weights.
        kind: "translation", "scale", "rescale", "norm" or "balance".
        law: The law that the charge follows: "translation" (linear in θ) or "norm" (quadratic).
        claimed: Whether ⟨g, ψ⟩ = 0 is claimed. If so, the law is a prediction, and a defect is a deviation from it.
    """

    name: str
    parts: tuple[Part, ...]
    kind: ClassVar[Kind]
    law: ClassVar[Quantity] = "norm"
    claimed: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ("parts",)  # the constructor's lists of parts
    options: ClassVar[tuple[str, ...]] = ()  # and its other fields, which have defaults

    def __init__(self, name: str | None, parts: Iterable[Part]) -> None:
        if type(self) is Symmetry:
            raise TypeError("Symmetry has no charge of its own: use Translation, Scale, Rescale, Norm or Balance")
        if not isinstance(name, str | None):
            raise TypeError(f"{type(self).__name__}: name must be a str, got {shown(name)}")
        if name == "":
            raise ValueError(f"{type(self).__name__}: name is empty, but the readout lists charges by name")
        parts = self._checked(parts, "parts")
        object.__setattr__(self, "name", name_of(self.kind, parts) if name is None else name)
        object.__setattr__(self, "parts", parts)

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

    @property
    def content(self) -> tuple[object, ...]:
        """Kind, parts and options: what is measured, whatever its name; a renamed symmetry's checkpoint fits."""
        return self.kind, self.parts, *(getattr(self, option) for option in self.options)

    def named(self, name: str | None) -> Self:
        """The same symmetry with another name; None: the name of its parts."""
        renamed = copy.copy(self)
        object.__setattr__(renamed, "name", name_of(self.kind, self.parts) if name is None else name)
        return renamed

    def explain(self) -> Explanation:
        """The symmetry, its generator, constraints, charge and laws in words and formulas, with its parameters' names.

        Returns:
            A str that a Python prompt shows without quotes and escapes.
        """
        return explain(self.kind, self.name, self.parts)

    def charge(self, parameters: "Mapping[str, Tensor]", *, magnitude: bool = False) -> "Tensor":
        """The charge of these parameters in plain torch: Σ c⟨θ, 1⟩ over a translation's parts, else Σ c|θ + offset|².

        A readout holds what the step measured. This computes the charge from its definition, as a reference.

        Args:
            parameters: Tensors by name, such as dict(model.named_parameters()).
            magnitude: Sum the terms' magnitudes instead, the scale of the charge's rounding error.

        Returns:
            [n groups], float64, on the parameters' device.

        Raises:
            KeyError: A part names a parameter that is missing.
        """
        import torch

        shares = []
        for part in self.parts:
            theta, offset, weight = part.grouped(parameters[part.parameter].detach().double()), part.offset, part.weight
            if magnitude:
                theta, offset, weight = theta.abs(), abs(offset), abs(weight)
            shares.append((weight * (theta if self.law == "translation" else (theta + offset).square())).sum(1))
        return torch.stack(shares).sum(0)

    def check_groups(self, n_groups: int) -> None:
        """Check that parts of so many groups fit this symmetry.

        Raises:
            ValueError: They do not.
        """

    def to_dict(self) -> dict[str, Any]:
        """This symmetry as plain data for JSON: {"kind", "name", "parts"}."""
        return {"kind": self.kind, "name": self.name, "parts": [part.to_dict() for part in self.parts]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Symmetry":
        """The symmetry that `to_dict` wrote.

        Raises:
            ValueError: The kind or a field is unknown, or a field is missing or invalid.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a symmetry must be an object, got {shown(data)}")
        kind = data.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"unknown kind of symmetry {shown(kind)}; known are {', '.join(KINDS)}")
        cls = KINDS[kind]
        fields = {"kind", "name", *cls.sides}
        check_fields(kind, data, required=fields, known=fields.union(cls.options))
        for field in cls.sides:
            if not isinstance(data[field], list | tuple):
                raise ValueError(f"{kind}: {field} must be a list of parts, got {shown(data[field])}")
        sides = ([Part.from_dict(part) for part in data[field]] for field in cls.sides)
        try:
            return cls(data["name"], *sides, **{option: data[option] for option in cls.options if option in data})
        except TypeError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, init=False, repr=False)
class Translation(Symmetry):
    """Adding one number to all parameters of a group changes nothing: f(θ + α 1_A) = f(θ).

        generator ψ = c 1_A          constraint Σ c⟨g_A, 1⟩ = 0         charge Q = Σ c⟨θ_A, 1⟩

    With weight decay λ the flow gives Q(t) = e^{−λt} Q(0). The symmetry holds for each column of the last linear layer,
    and for its bias, under softmax with cross-entropy. It also holds for everything that writes to a stream that only
    LayerNorm reads, and for biases before BatchNorm. A part's weight is the factor of the number that is added to it,
    and may be negative.

    Attributes:
        name: Its key in the readout; None: the name of its parts, as the search gives it ("fc2").
        parts: Groups with the same index move together.

    Raises:
        TypeError: name is no str, or parts is no sequence of Part.
        ValueError: name or parts is empty, or a part has an offset.

    Source: Kunin et al. (2021), arXiv:2012.04728, translation symmetry.
    """

    kind = "translation"
    law = "translation"

    def __init__(self, name: str | None, parts: Iterable[Part]) -> None:
        super().__init__(name, parts)
        for part in self.parts:
            if part.offset:
                raise ValueError(
                    f"Translation: {part!r} has an offset, but a sum has the same law wherever it counts from; "
                    "leave the offset out"
                )


@dataclass(frozen=True, init=False, repr=False)
class Scale(Symmetry):
    """Multiplying all parameters of a group by one number changes nothing: f(α θ_A) = f(θ_A) for α > 0.

        generator ψ = c θ_A          constraint Σ c⟨g_A, θ_A⟩ = 0       charge Q = Σ c|θ_A|²

    With weight decay λ the flow gives Q(t) = e^{−2λt} Q(0) + η ∫₀ᵗ e^{−2λ(t−s)} |g_A|² ds. The symmetry holds for the
    weights and bias of each unit before BatchNorm, and of whole layers or blocks before Layer-, Group- or RMSNorm. It
    is exact in the limit where the normalisation's eps goes to 0. A part with an offset c counts as θ + c in the
    generator, the constraint and the charge. Decay draws θ to 0, not θ + c. So it is one more source of the law there.

    Args:
        name: Its key in the readout; None: the name of its parts, as the search gives it ("fc2").
        parts: Groups with the same index scale together; weights positive.

    Raises:
        TypeError: name is no str, or parts is no sequence of Part.
        ValueError: name or parts is empty, or a weight is negative.

    Source: Kunin et al. (2021), arXiv:2012.04728, scale symmetry.
    """

    kind = "scale"

    def __init__(self, name: str | None, parts: Iterable[Part]) -> None:
        super().__init__(name, parts)
        for part in self.parts:
            if part.weight < 0:
                raise ValueError(
                    f"Scale: {part!r} has a negative weight; if one part shrinks as the rest grows, use a Rescale"
                )


@dataclass(frozen=True, init=False, repr=False)
class TwoSided(Symmetry):
    """A symmetry whose parts lead into a unit or out of it: these have negative weights in `parts`."""

    sides = ("inward", "outward")

    def __init__(self, name: str | None, inward: Iterable[Part], outward: Iterable[Part]) -> None:
        inward, outward = self._checked(inward, "inward"), self._checked(outward, "outward")
        for part in (*inward, *outward):
            if part.weight < 0:
                raise ValueError(
                    f"{type(self).__name__}: {part!r} has a negative weight; inward or outward already sets the sign"
                )
        super().__init__(name, (*inward, *map(_negated, outward)))

    @property
    def inward(self) -> tuple[Part, ...]:
        """The parts into the unit."""
        return tuple(part for part in self.parts if part.weight > 0)

    @property
    def outward(self) -> tuple[Part, ...]:
        """The parts out of the unit, with positive weights as in the constructor."""
        return tuple(_negated(part) for part in self.parts if part.weight < 0)

    def __repr__(self) -> str:
        options = "".join(f", {option}={getattr(self, option)!r}" for option in self._given)
        inward, outward = list(self.inward), list(self.outward)
        return f"{type(self).__name__}({self.name!r}, inward={inward!r}, outward={outward!r}{options})"

    @property
    def _given(self) -> list[str]:
        """The options that do not have their default, None."""
        return [option for option in self.options if getattr(self, option) is not None]

    def to_dict(self) -> dict[str, Any]:
        """This symmetry as plain data for JSON: {"kind", "name", "inward", "outward"}, and options."""
        lists = {"inward": self.inward, "outward": self.outward}
        return {
            "kind": self.kind,
            "name": self.name,
            **{role: [part.to_dict() for part in parts] for role, parts in lists.items()},
            **{option: getattr(self, option) for option in self._given},
        }


@dataclass(frozen=True, init=False, repr=False)
class Rescale(TwoSided):
    """Weights into a unit times α, and out of it divided by α, change nothing: f(α θ_A1, θ_A2 / α) = f(θ_A1, θ_A2).

        generator ψ = (θ_A1, −θ_A2)     constraint ⟨g_A1, θ_A1⟩ − ⟨g_A2, θ_A2⟩ = 0     charge Q = |θ_A1|² − |θ_A2|²

    The loss is the same for every α > 0. With weight decay λ the flow gives

        Q(t) = e^{−2λt} Q(0) + η ∫₀ᵗ e^{−2λ(t−s)} (|g_A1|² − |g_A2|²) ds

    The symmetry holds through ReLU, leaky ReLU, pooling, dropout and flattening. It also holds between a
    normalisation's affine parameters and all their readers, and inside attention and gated units.

    If the unit is homogeneous of degree k (ReLU²: k = 2), give its outward parts the weight k. The generator is then
    (θ_A1, −k θ_A2), and Q = |θ_A1|² − k|θ_A2|². For a gain that is applied as 1 + w (Gemma, LayerNorm1p), give its part
    offset=1. It counts as 1 + w, so Q = |1 + w|² − |θ_A2|²; see `Scale`.

    Args:
        name: Its key in the readout; None: the name of its parts, as the search gives it ("fc1->fc2").
        inward: Parameters into the unit; weights positive.
        outward: Parameters out of it; weights positive here, negated in `parts`.

    Raises:
        TypeError: name is no str, or inward or outward is no sequence of Part.
        ValueError: name, inward or outward is empty, or a weight is negative.

    Source: Kunin et al. (2021), arXiv:2012.04728, rescale symmetry; for degree k derived here.
    """

    kind = "rescale"

    def __init__(self, name: str | None, inward: Iterable[Part], outward: Iterable[Part]) -> None:
        super().__init__(name, inward, outward)


@dataclass(frozen=True, init=False, repr=False)
class Norm(Symmetry):
    """No symmetry claimed: the squared norm of each group, and the budget of its changes.

        Q = Σ c|θ_A|²     |θ'|² = |θ|² − 2η⟨θ, u⟩ + η²|u|²

    The identity of the update splits every change of Q into decay, the gradient's part ⟨g, θ⟩ (the defect) and |u|².
    It holds on any network. Here the defect is no error: it is what the gradient does to the length.

    Attributes:
        name: Its key in the readout; None: the name of its parts, as the search gives it ("fc2").
        parts: Groups with the same index are summed.

    Raises:
        TypeError: name is no str, or parts is no sequence of Part.
        ValueError: name or parts is empty.

    Source: Derived from the update; this project.
    """

    kind = "norm"
    claimed = False


#: Every kind by its name in JSON.
KINDS: dict[str, type[Symmetry]] = {cls.kind: cls for cls in (Translation, Scale, Rescale, Norm)}


def _negated(part: Part) -> Part:
    return dataclasses.replace(part, weight=-part.weight)
