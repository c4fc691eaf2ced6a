"""Relations become symmetries, named after the model's modules, each with its meaning."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from noetherperf.detect.claims import Relation
from noetherperf.rules.law import Law
from noetherperf.symmetry import Part, Rescale, Scale, Shape, Symmetry, Translation

__all__ = ["Named", "name_all"]

_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_NORMS = ("norm", "bn", "ln")


@dataclass(frozen=True)
class Named:
    """A symmetry, and its meaning in a few words."""

    symmetry: Symmetry
    meaning: str


def name_all(relations: list[Relation], model: nn.Module, shapes: Mapping[str, Shape], loss: object) -> list[Named]:
    """Symmetries with distinct names, in the order of the model's parameters."""
    order = {name: i for i, name in enumerate(shapes)}
    idle = [part for r in relations if r.without_gradient for part in r.parts]
    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in shapes}
    found = []
    for relation in relations:
        parts = sorted(relation.parts, key=lambda part: order[part.parameter])
        if relation.law == Law.TRANSLATION:
            found.append(_translation(relation, parts, modules, shapes, loss))
        else:
            found.append(_norm(_with_idle_biases(parts, idle, modules, shapes), modules, shapes))
    found.sort(key=lambda named: (min(order[part.parameter] for part in named.symmetry.parts), named.symmetry.law))
    taken: set[str] = set()
    unique = []
    for named in found:
        name = next(name for name in _variants(named.symmetry) if name not in taken)
        taken.add(name)
        unique.append(replace(named, symmetry=_renamed(named.symmetry, name)))
    return unique


def _variants(symmetry: Symmetry) -> list[str]:
    plain = symmetry.name
    return [plain, f"{plain} ({symmetry.kind})", *(f"{plain} ({symmetry.kind} {i})" for i in range(2, 1000))]


def _renamed(symmetry: Symmetry, name: str) -> Symmetry:
    if isinstance(symmetry, Rescale):
        return Rescale(name, symmetry.inward, symmetry.outward)
    return type(symmetry)(name, symmetry.parts)


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


def _translation(
    relation: Relation, parts: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape], loss: object
) -> Named:
    if parts[0].weight < 0:
        parts = [replace(part, weight=-part.weight) for part in parts]
    name = " ".join(
        ("" if i == 0 and part.weight > 0 else "+ " if part.weight > 0 else "− ") + _place(part)
        for i, part in enumerate(parts)
    )
    if relation.without_gradient:
        meaning = "cancelled: a normalisation or softmax takes it out"
    elif len(parts) > 1:
        meaning = "added to one stream: what one gains another may lose"
    elif loss == "cross_entropy" and _is_last(parts[0].parameter, shapes):
        meaning = "softmax: the same for all classes"
    else:
        meaning = "mean removed by a normalisation or softmax"
    return Named(Translation(name, parts), meaning)


def _is_last(parameter: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether it belongs to the last module of the model, its head."""
    return parameter.rpartition(".")[0] == list(shapes)[-1].rpartition(".")[0]


# ---- scales and rescales --------------------------------------------------------------------------------------------


def _norm(parts: list[Part], modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> Named:
    signs = {part.weight > 0 for part in parts}
    if len(signs) == 1:
        parts = [replace(part, weight=abs(part.weight)) for part in parts]
        places = _places(parts)
        if len(places) == 1:
            return Named(Scale(places[0], parts), "scale: a normalisation divides it out")
        if parts[0].axis is None:
            return Named(Scale(_listed(places), parts), "stream: all that is added to it, read through normalisations")
        return Named(Scale(_listed(places), parts), "scale: a normalisation divides it out")
    if _outwardness(parts, modules, shapes) < 0:
        parts = [replace(part, weight=-part.weight) for part in parts]
    inward = [part for part in parts if part.weight > 0]
    outward = [replace(part, weight=-part.weight) for part in parts if part.weight < 0]
    sources, targets = _places(inward), _places(outward)
    return Named(Rescale(_arrow(sources, targets), inward, outward), _rescale_meaning(inward, outward, modules, shapes))


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


def _place(part: Part) -> str:
    """The parameter of a part, and its slice if it is one."""
    slice_ = ""
    if part.start is not None or part.stop is not None:
        every = f" of {part.period}" if part.period is not None else ""
        slice_ = f"[{part.start or 0}:{'' if part.stop is None else part.stop}{every}]"
    return part.parameter + slice_


def _places(parts: list[Part]) -> list[str]:
    """The modules of these parts, each once; a parameter that is neither weight nor bias by its own name."""
    names = []
    for part in parts:
        place = _place(part)
        module, _, own = part.parameter.rpartition(".")
        if own in ("weight", "bias") and module:
            place = module + place[len(part.parameter) :]
        names.append(place)
    return list(dict.fromkeys(names))


def _listed(places: list[str]) -> str:
    return " + ".join(places) if len(places) <= 2 else f"{places[0]} + {len(places) - 2} more + {places[-1]}"


def _arrow(sources: list[str], targets: list[str]) -> str:
    """`block.attn.v → o`: the common beginning of both sides stands once."""
    source, target = _listed(sources), _listed(targets)
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(source, target, strict=False))
    shared = "".join(a for a, _ in alike)
    shared = shared[: shared.rfind(".") + 1]
    rest = target[len(shared) :]
    return f"{source} → {target}" if not shared or rest[:1].isdigit() or " + " in rest else f"{source} → {rest}"
