"""Sizes that one forward pass shows: candidates for heads and fused maps, which the gradients then judge."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

__all__ = ["Shapes"]

N_FUSED = 4  # largest number of equal maps in one fused tensor: Q, K, V and a gate


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors while it is active.

    Attributes:
        runs: Up to three neighbouring sizes of every floating-point tensor.
        cuts: Length of an axis -> the slices taken of it or joined into it.
        vocabulary: Address of an integer input -> number of rows of the embedding that reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[tuple[int, ...]] = set()
        self.cuts: dict[int, set[tuple[int, int]]] = {}
        self.vocabulary: dict[int, int] = {}

    @property
    def sizes(self) -> set[int]:
        """Every size above 1."""
        return {run[0] for run in self.runs if len(run) == 1 and run[0] > 1}

    def slices(self, length: int) -> set[tuple[int, int]]:
        """Slices that an axis of this length may consist of."""
        slices = set(self.cuts.get(length, ()))
        for run in self.runs:
            if 1 < run[0] <= N_FUSED and len(run) > 1 and int(np.prod(run)) == length:
                step = length // run[0]
                slices |= {(start, start + step) for start in range(0, length, step)}
        return slices

    def periods(self, length: int) -> set[int]:
        """Periods in which an axis of this length may repeat: the last sizes of a run whose product is the length."""
        factored = (run for run in self.runs if len(run) > 1 and int(np.prod(run)) == length)
        return {length // run[0] for run in factored if 1 < run[0] < length}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        pieces = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        for x in pieces:
            if x.is_floating_point():
                self._see(tuple(x.shape))
        operation = func.overloadpacket
        if operation is aten.embedding:
            self.vocabulary[args[1].data_ptr()] = args[0].shape[0]
        elif operation is aten.cat:
            self._cut(out.shape, [x.shape for x in args[0]])
        elif operation is aten.slice:
            self._slice(*args)
        elif len(pieces) > 1 and isinstance(args[0], Tensor):  # one of the kinds of split
            self._cut(args[0].shape, [x.shape for x in pieces])
        return out

    def _see(self, shape: tuple[int, ...]) -> None:
        for i in range(len(shape)):
            self.runs |= {shape[i:j] for j in range(i + 1, min(i + 3, len(shape)) + 1)}

    def _cut(self, whole: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        for axis, length in enumerate(whole):
            sizes = [piece[axis] for piece in pieces if len(piece) == len(whole)]
            if len(sizes) > 1 and sum(sizes) == length:
                ends = np.cumsum(sizes).tolist()
                self.cuts.setdefault(length, set()).update(zip([0, *ends], ends, strict=False))

    def _slice(
        self, x: Tensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
    ) -> None:
        length = x.shape[axis]
        start, stop, _ = slice(start, stop).indices(length)
        if step == 1 and 0 < stop - start < length:
            pieces = {(0, start), (start, stop), (stop, length)}
            self.cuts.setdefault(length, set()).update((i, j) for i, j in pieces if i < j)
