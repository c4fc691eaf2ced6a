"""The parts that a parameter's axis may be cut into: slices, blocks, indices a stride apart."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from noetherperf.detect.layout import ANY
from noetherperf.detect.shapes import Shapes
from noetherperf.symmetry import Part, Shape

__all__ = ["Axis", "Mask", "crosses_periods", "divisors", "foldings", "group_axes", "is_grouped", "joined", "pieces"]

Axis = tuple[str, int]  # a parameter's name and the number of one of its axes
Mask = NDArray[np.bool_]  # over the indices of an axis


def group_axes(shapes: Mapping[str, Shape]) -> Iterator[Axis]:
    """The axes whose indices may be groups."""
    for name, shape in shapes.items():
        for axis, length in enumerate(shape):
            if length > 1:
                yield name, axis


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a grouped convolution, whose first axis holds inputs and outputs."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1


def divisors(length: int) -> Iterator[int]:
    return (n for n in range(1, length + 1) if length % n == 0)


def pieces(length: int, seen: Shapes) -> list[Part]:
    """Groupings of an axis: as it is, and slices, periodic ones too, that it may consist of; one index per group."""
    cuts = sorted(seen.slices(length), key=lambda cut: (cut.period or 0, cut.start - cut.stop, cut))
    return [Part(ANY, 0)] + [
        Part(
            ANY,
            0,
            start=cut.start or None,
            stop=cut.stop if cut.stop < (cut.period or length) else None,
            period=cut.period,
        )
        for cut in cuts
    ]


def foldings(piece: Part, length: int, n: int, sizes: Iterable[int]) -> Iterator[Part]:
    """Ways to make n groups of a piece: as it is, of neighbours, of indices a stride apart, of one index a period."""
    n_indices = piece.n_groups((length,))
    if n_indices == n:
        yield piece
    if n_indices <= n or n_indices % n:
        return
    fold = n_indices // n
    start, stop = piece.bounds((length,))
    for stride in sorted({1} | {size for size in itertools.chain(sizes, (n, stop - start)) if n % size == 0}):
        if (stop - start) % (fold * stride) == 0 or stride == stop - start:
            yield replace(piece, fold=fold, stride=stride)


def crosses_periods(grouping: Part, length: int) -> bool:
    """Whether its groups have indices of several periods."""
    start, stop = grouping.bounds((length,))
    return grouping.period is not None and grouping.fold * grouping.stride > stop - start


def joined(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> list[Part]:
    """The same parts; neighbouring slices of one axis with one coefficient become one part, as do those of all periods.

    In a slice whose width is fold · stride, group j holds the indices that leave the rest j when divided by the stride.
    Slices of equal width side by side have such groups together, too.
    """
    result: list[Part] = []
    for part in parts:
        at = len(result)
        # A part that joins two neighbours may in turn join a third.
        while (found := _neighbour(result, part, shapes[part.parameter])) is not None:
            at, part = found
            del result[at]
        result.insert(at, part)
    return _of_all_periods(result, shapes)


def _of_all_periods(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> list[Part]:
    """The same parts; equal slices in all periods of an axis become one part, of which group j holds their places j."""
    slices: dict[object, list[Part]] = {}
    for part in parts:
        alone = part.axis is None or part.period is not None or part.fold != 1
        slices.setdefault(part if alone else (part.parameter, part.axis, part.weight), []).append(part)
    result = []
    for alike in slices.values():
        first, n = alike[0], len(alike)
        if n > 1 and first.axis is not None:
            length = shapes[first.parameter][first.axis]
            bounds = sorted(part.bounds(shapes[first.parameter]) for part in alike)
            (start, stop), period = bounds[0], length // n
            if length == n * period and bounds == [(start + k * period, stop + k * period) for k in range(n)]:
                end, stride = stop if stop < period else None, stop - start
                every = period if stride < period else None
                alike = [replace(first, start=start or None, stop=end, period=every, fold=n, stride=stride)]
        result += alike
    return result


def _neighbour(parts: Sequence[Part], part: Part, shape: Shape) -> tuple[int, Part] | None:
    """The number of a part that another forms one part with, and that part."""
    for at, other in enumerate(parts):
        together = _together(other, part, shape) or _together(part, other, shape)
        if together is not None:
            return at, together
    return None


def _together(a: Part, b: Part, shape: Shape) -> Part | None:
    """Two slices as one part if the second follows the first and has groups alike, else None."""
    if a.axis is None or (a.parameter, a.axis, a.period, a.weight) != (b.parameter, b.axis, b.period, b.weight):
        return None
    (start, middle), (other, stop) = a.bounds(shape), b.bounds(shape)
    rests = [(middle - start) // a.fold, (stop - other) // b.fold]
    strides = [rest if part.fold == 1 else part.stride for part, rest in zip((a, b), rests, strict=True)]
    if middle != other or rests[0] != rests[1] or strides != rests:
        return None
    length = a.period or shape[a.axis]
    whole = (start, stop) == (0, length)
    return replace(
        a,
        stop=None if stop == length else stop,
        period=None if whole else a.period,
        fold=a.fold + b.fold,
        stride=rests[0],
    )
