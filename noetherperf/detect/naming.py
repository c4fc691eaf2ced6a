"""Relations become symmetries, named after their parts, each with its meaning."""

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from noetherperf.detect.claims import Relation
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part, Rescale, Scale, Shape, Symmetry, Translation

__all__ = ["Named", "distinct", "name_all"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORMS = ("norm", "bn", "ln")


@dataclass(frozen=True)
class Named:
    """A symmetry, and its meaning in a few words."""

    symmetry: Symmetry
    meaning: str


def name_all(
    relations: list[Relation], model: nn.Module, shapes: Mapping[str, Shape], of_the_loss: Container[Relation]
) -> list[Named]:
    """Symmetries with distinct names, in the order of the model's parameters.

    Args:
        relations: What holds.
        model: Whose modules tell what writes to a unit and what reads it.
        shapes: Of all parameters.
        of_the_loss: The translations that only a softmax in the loss makes hold.
    """
    order = {name: i for i, name in enumerate(shapes)}
    idle = [part for r in relations if r.without_gradient for part in r.parts]
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in shapes}
    found = []
    for relation in relations:
        parts = sorted(relation.parts, key=lambda part: order[part.parameter])
        if relation.law == Law.TRANSLATION:
            found.append(_translation(relation, parts, relation in of_the_loss))
        else:
            found.append(_norm(_with_idle_biases(parts, idle, modules, shapes), modules, shapes))
    found.sort(key=lambda named: (min(order[part.parameter] for part in named.symmetry.parts), named.symmetry.law))
    return distinct(found)


def distinct(found: Sequence[Named]) -> list[Named]:
    """The same with distinct names; of several with one name, a norm's law keeps it rather than a translation's."""
    renamed, taken = list(found), set[str]()
    for i in sorted(range(len(found)), key=lambda i: found[i].symmetry.law):
        symmetry = found[i].symmetry
        name = next(name for name in _variants(symmetry) if name not in taken)
        taken.add(name)
        renamed[i] = replace(found[i], symmetry=symmetry.named(name))
    return renamed


def _variants(symmetry: Symmetry) -> Iterator[str]:
    plain, kind = symmetry.name, symmetry.kind
    return itertools.chain((plain, f"{plain} ({kind})"), (f"{plain} ({kind} {i})" for i in itertools.count(2)))


def _with_idle_biases(
    parts: list[Part], idle: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]
) -> list[Part]:
    """The parts, with the biases that belong to their units although a bias without gradient shows in no relation."""
    moved = list(parts)
    for part in parts:
        for bias in idle:
            if (
                bias.parameter.rpartition(".")[0] == part.parameter.rpartition(".")[0]
                and part.axis is not None
                and len(shapes[part.parameter]) > 1
                and _writes(part, modules, shapes) is not False
                and replace(part, parameter=bias.parameter, axis=0, weight=1.0) == bias
                and bias.n_groups(shapes[bias.parameter]) == part.n_groups(shapes[part.parameter])
            ):
                moved.insert(moved.index(part) + 1, replace(bias, weight=part.weight))
    return moved


# ---- translations ---------------------------------------------------------------------------------------------------


def _translation(relation: Relation, parts: list[Part], of_the_loss: bool) -> Named:
    if parts[0].weight < 0:
        parts = [replace(part, weight=-part.weight) for part in parts]
    if relation.without_gradient:
        meaning = "cancelled: a normalisation or softmax takes it out"
    elif len(parts) > 1:
        meaning = "added to one stream: what one gains another may lose"
    elif of_the_loss:
        meaning = "softmax: the same for all classes"
    else:
        meaning = "mean removed by a normalisation or softmax"
    return Named(Translation(None, parts), meaning)


# ---- scales and rescales --------------------------------------------------------------------------------------------


def _norm(parts: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> Named:
    signs = {part.weight > 0 for part in parts}
    if len(signs) == 1:
        parts = [replace(part, weight=abs(part.weight)) for part in parts]
        if parts[0].axis is None and len({_owner(part) for part in parts}) > 1:
            return Named(Scale(None, parts), "stream: all that is added to it, read through normalisations")
        return Named(Scale(None, parts), "scale: a normalisation divides it out")
    if _outwardness(parts, modules, shapes) < 0:
        parts = [replace(part, weight=-part.weight) for part in parts]
    inward = [part for part in parts if part.weight > 0]
    outward = [replace(part, weight=-part.weight) for part in parts if part.weight < 0]
    return Named(Rescale(None, inward, outward), _rescale_meaning(inward, outward, modules, shapes))


def _owner(part: Part) -> str:
    """The module of a weight or bias, else the parameter."""
    module, _, own = part.parameter.rpartition(".")
    return module if own in ("weight", "bias") else part.parameter


def _writes(part: Part, modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> bool | None:
    """Whether the axis holds outputs of its module (True) or inputs (False); None where it is both or unknown."""
    module = modules[part.parameter]
    if len(shapes[part.parameter]) == 1:
        return True
    if part.axis is None:
        return None
    if isinstance(module, nn.Embedding):
        return part.axis == 1
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1 and part.parameter.endswith("weight"):
        return None  # a channel of its own is both
    flipped = isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D"
    return (part.axis == 0) != flipped


def _outwardness(parts: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> float:
    """Positive if the parts with positive weight write into the unit."""
    votes = 0.0
    for part in parts:
        writes = _writes(part, modules, shapes)
        votes += 0 if writes is None else part.weight if writes else -part.weight
    return votes or parts[0].weight


def _rescale_meaning(
    inward: list[Part], outward: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]
) -> str:
    if any(part.axis is None for part in (*inward, *outward)):
        return "whole tensors: what one scales up another scales down"
    writers = {part.parameter.rpartition(".")[0] for part in inward}
    if all(_writes(part, modules, shapes) for part in (*inward, *outward)) and len(writers) == 1:
        return "product: keys and queries, or factors that meet in one"
    degrees = {abs(part.weight) for part in (*inward, *outward)}
    degree = f", of degree {max(degrees) / min(degrees):g}" if len(degrees) > 1 else ""
    if all(len(shapes[part.parameter]) == 1 for part in inward):
        return f"normalisation's gain and shift, and all their readers{degree}"
    if len(writers) > 1:
        return f"stream: all its writers and all its readers{degree}"
    return f"unit: what enters it, and what leaves it{degree}"
