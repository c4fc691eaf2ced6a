"""Which tensors share memory: an exact test of their elements' addresses, for any strides."""

import itertools
from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import numpy as np
from torch import Tensor


class _Block(NamedTuple):
    """A tensor's address range: all elements are in [begin, end)."""

    device: str
    begin: int
    end: int
    label: str
    tensor: Tensor

    def places(self, taken: np.ndarray, origin: int, unit: int) -> np.ndarray:
        """The tensor's elements in `taken`, a memory map from address `origin` with one entry per `unit` bytes."""
        x, size = self.tensor, self.tensor.element_size() // unit
        strides = [stride * size for stride in x.stride()]
        begin = taken[(self.begin - origin) // unit :]
        return np.lib.stride_tricks.as_strided(begin, (*x.shape, size), (*strides, 1))


def check_apart(labels: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise if two tensors share memory, or two elements of one tensor: an in-place step would be wrong for both.

    Interleaved views without a common element share nothing.

    Args:
        labels: A name for each tensor.
        tensors: With memory, strided.

    Raises:
        ValueError: It names both tensors, or the one.
    """
    blocks = [_block(label, x) for label, x in zip(labels, tensors, strict=True) if x.numel() > 0]
    blocks.sort(key=lambda block: (block.device, block.begin))
    run: list[_Block] = []  # blocks whose address ranges overlap; the last one ends at `end`
    end = 0
    for block in blocks:
        if run and (block.device != run[0].device or block.begin >= end):
            _check_run(run, end)
            run = []
        end = max(block.end, end) if run else block.end
        run.append(block)
    _check_run(run, end)


def _block(label: str, x: Tensor) -> _Block:
    if _overlaps_itself(x):
        raise ValueError(
            f"{label}: its elements share memory with each other (shape {tuple(x.shape)}, strides {x.stride()}), as in "
            "an expanded tensor; give it memory of its own (.clone(memory_format=torch.contiguous_format))"
        )
    begin = x.data_ptr()
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return _Block(str(x.device), begin, begin + length * x.element_size(), label, x)


def _overlaps_itself(x: Tensor) -> bool:
    axes = sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1)
    lengths = itertools.accumulate(((n - 1) * stride for stride, n in axes), initial=1)
    if all(stride >= length for (stride, _), length in zip(axes, lengths, strict=False)):
        return False
    taken = np.zeros(1 + sum((n - 1) * stride for stride, n in axes), bool)
    shape, strides = [n for _, n in axes], [stride for stride, _ in axes]
    np.lib.stride_tricks.as_strided(taken, shape, strides)[...] = True
    return int(np.count_nonzero(taken)) < x.numel()


def _check_run(run: Sequence[_Block], end: int) -> None:
    """Raise if two of these blocks share memory; none of them goes beyond `end`."""
    if len(run) < 2:
        return
    origin = run[0].begin
    unit = gcd(*(block.tensor.element_size() for block in run), *(block.begin - origin for block in run))
    taken = np.zeros((end - origin) // unit, bool)
    for i, block in enumerate(run):
        places = block.places(taken, origin, unit)
        if places.any():
            taken[:] = False
            places[...] = True
            other = next(other for other in run[:i] if other.places(taken, origin, unit).any())
            raise ValueError(
                f"{other.label} and {block.label} share memory, and a step would change each other's elements; pass "
                "one tensor for both (tie weights by assigning the parameter itself, decoder.weight = encoder.weight), "
                "or give each memory of its own (.clone())"
            )
        places[...] = True
