"""The parts that a parameter's axis may be cut into: slices, blocks, indices a stride apart."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from noetherperf.detect.shapes import Shapes
from noetherperf.symmetry import Part, Shape

__all__ = ["Axis", "Mask", "divisors", "foldings", "group_axes", "is_grouped", "joined", "pieces"]

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


def pieces(axis: Axis, length: int, seen: Shapes) -> list[Part]:
    """An axis as it is, and the slices, periodic ones too, that it may consist of; each with one index per group."""
    name, number = axis
    cuts = sorted(seen.slices(length), key=lambda cut: (cut.period or 0, cut.start - cut.stop, cut))
    return [Part(name, number)] + [
        Part(
            name,
            number,
            start=cut.start or None,
            stop=cut.stop if cut.stop < (cut.period or length) else None,
            period=cut.period,
        )
        for cut in cuts
    ]


def foldings(piece: Part, shape: Shape, n: int, sizes: Iterable[int]) -> Iterator[Part]:
    """Ways to make n groups of a piece: as it is, of neighbours, of indices a stride apart."""
    length = piece.n_groups(shape)
    if length == n:
        yield piece
    if length <= n or length % n:
        return
    fold = length // n
    start, stop = piece.bounds(shape)
    for stride in sorted({1} | {size for size in itertools.chain(sizes, (n,)) if n % size == 0}):
        if (stop - start) % (fold * stride) == 0:
            yield replace(piece, fold=fold, stride=stride)


def joined(parts: Sequence[Part], shapes: Mapping[str, Shape]) -> list[Part]:
    """The same parts; neighbouring slices of one axis with one coefficient become one part with a stride."""
    result: list[Part] = []
    for key, group in itertools.groupby(
        sorted(parts, key=lambda part: part.fold != 1),
        lambda part: (part.parameter, part.axis, part.period, part.weight, part.fold),
    ):
        slices = list(group)
        name, axis, period, weight, fold = key
        if len(slices) > 1 and axis is not None and fold == 1:
            bounds = sorted(part.bounds(shapes[name]) for part in slices)
            first, width = bounds[0][0], bounds[0][1] - bounds[0][0]
            if bounds == [(first + i * width, first + (i + 1) * width) for i in range(len(bounds))]:
                length = period or shapes[name][axis]
                stop = first + len(bounds) * width
                whole = first == 0 and stop == length
                slices = [
                    Part(
                        name,
                        axis,
                        start=first or None,
                        stop=None if stop == length else stop,
                        period=None if whole else period,
                        fold=len(bounds),
                        stride=width if width > 1 else 1,
                        weight=weight,
                    )
                ]
        result += slices
    return result
