"""The parts that a parameter's axis may be cut into: slices, blocks, indices a stride apart."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from noetherperf.detect.shapes import Shapes
from noetherperf.symmetry import Part, Shape

__all__ = ["Axis", "Mask", "foldings", "group_axes", "is_grouped", "joined", "pieces"]

Axis = tuple[str, int]  # a parameter's name and the number of one of its axes
Mask = NDArray[np.bool_]  # over the indices of an axis


def group_axes(shapes: Mapping[str, Shape], modules: Mapping[str, nn.Module]) -> Iterator[Axis]:
    """The axes whose indices may be groups: of a kernel its channels, of other parameters every axis."""
    for name, shape in shapes.items():
        is_kernel = isinstance(modules[name], nn.modules.conv._ConvNd)
        for axis, length in enumerate(shape[:2] if is_kernel else shape):
            if length > 1:
                yield name, axis


def is_grouped(module: nn.Module) -> bool:
    """Whether it is a grouped convolution, whose first axis holds inputs and outputs."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1


def pieces(axis: Axis, length: int, seen: Shapes) -> list[Part]:
    """An axis as it is, the slices that it may consist of, and periodic slices; each with one index per group."""
    name, number = axis

    def cut(whole: int, period: int | None = None) -> Iterator[Part]:
        for start, stop in sorted(seen.slices(whole), key=lambda s: (s[0] - s[1], s)):
            yield Part(name, number, start=start or None, stop=stop if stop < whole else None, period=period)

    periodic = (cut(period, period) for period in sorted(seen.periods(length)))
    return [Part(name, number), *cut(length), *itertools.chain.from_iterable(periodic)]


def foldings(piece: Part, shape: Shape, n: int, sizes: set[int]) -> Iterator[Part]:
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
    """The same parts; slices with one coefficient that tile their axis or its periods become one part with a stride."""
    result: list[Part] = []
    for key, group in itertools.groupby(parts, lambda part: (part.parameter, part.axis, part.period, part.weight)):
        slices = list(group)
        name, axis, period, weight = key
        whole = Part(name, axis, weight=weight)
        if len(slices) > 1 and axis is not None and all(part.fold == 1 for part in slices):
            bounds = sorted(part.bounds(shapes[name]) for part in slices)
            width = bounds[0][1]
            tiles = [(i * width, (i + 1) * width) for i in range((period or shapes[name][axis]) // width)]
            if bounds == tiles:
                slices = [replace(whole, fold=len(tiles), stride=width if width > 1 else 1)]
        result += slices
    return result
