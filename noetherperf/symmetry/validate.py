"""Validate symmetries against a model's parameter names and shapes."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from noetherperf.symmetry.kinds import Symmetry
from noetherperf.symmetry.part import Part, Shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["validate"]


def validate(symmetries: Iterable[Symmetry], shapes: Mapping[str, Shape]) -> tuple[Symmetry, ...]:
    """Check symmetries against the shapes of the parameters that they name.

    Args:
        symmetries: Any number of them.
        shapes: Parameter name -> shape.

    Returns:
        The same symmetries as a tuple.

    Raises:
        TypeError: An item is no Symmetry.
        ValueError: A parameter is unknown, or an axis, slice or fold does not fit its shape. Or the parts of one
            symmetry have different numbers of groups, give one parameter different offsets, or name the same indices of
            an axis twice. Or two symmetries share a name.
    """
    if isinstance(symmetries, Symmetry):
        raise TypeError(f"symmetries must be a sequence, got one {type(symmetries).__name__}; put it into a list")
    symmetries = tuple(symmetries)
    names: set[str] = set()
    for symmetry in symmetries:
        if not isinstance(symmetry, Symmetry):
            raise TypeError(f"symmetries must hold Translation, Scale, Rescale, Norm or Balance only, got {symmetry!r}")
        if symmetry.name in names:
            raise ValueError(f"two symmetries are named {symmetry.name!r}; the readout lists them by name: rename one")
        names.add(symmetry.name)
        try:
            symmetry.check_groups(_check_parts(symmetry.parts, shapes))
        except ValueError as error:
            raise ValueError(f"symmetry {symmetry.name!r}: {error}") from None
    return symmetries


def _check_parts(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> int:
    """The number of groups of all parts."""
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
        if len(offsets := {part.offset for part in its_parts}) > 1:
            raise ValueError(
                f"the parts of {parameter!r} have offsets {' and '.join(map(str, sorted(offsets)))}; "
                "give all parts of one parameter the same offset"
            )
        if len(its_parts) > 1 and (both := _overlapping(its_parts, shapes[parameter])):
            raise ValueError(
                f"{both[0]!r} and {both[1]!r} name the same elements of {parameter!r} twice; leave one out"
            )
    return n_groups[0]


def _overlapping(parts: Sequence[Part], shape: Shape) -> tuple[Part, Part] | None:
    """Two parts of one parameter that share elements, or None; linear in the number of parts."""
    import torch

    owners: dict[int, Tensor] = {}  # axis -> number of the part that holds each index; −1: none so far
    for number, part in enumerate(parts):
        if part.axis is None:
            return parts[0], parts[max(1, number)]
        if part.axis not in owners:  # parts along different axes may share elements, as in a recurrent weight
            owners[part.axis] = torch.full((shape[part.axis],), -1, device="cpu")
        start, stop = part.bounds(shape)
        own = owners[part.axis].view(-1, part.period or shape[part.axis])[:, start:stop]
        if (earlier := int(own.max())) >= 0:
            return parts[earlier], part
        own.fill_(number)
    return None
