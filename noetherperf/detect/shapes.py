"""Sizes that one forward pass shows: candidates for heads and fused maps, which the gradients then judge."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

__all__ = ["Cut", "Shapes"]

N_FUSED = 4  # largest number of equal maps in one fused tensor: Q, K, V and a gate
N_VIEWS = 2  # neighbouring axes on either side of a cut that may be one axis with it in another view
N_INDEXED = 8  # most indices of one list that are taken as slices of one index


class Cut(NamedTuple):
    """A slice of an axis, which repeats at a period if it has one."""

    start: int
    stop: int
    period: int | None = None


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors while it is active.

    Attributes:
        runs: Up to three neighbouring sizes of every floating-point tensor.
        cuts: Length of an axis -> the slices taken of it or joined into it.
        vocabulary: Address of an integer input -> the fewest rows of an embedding that reads it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: set[tuple[int, ...]] = set()
        self.cuts: dict[int, set[Cut]] = {}
        self.vocabulary: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; torch would import torch._dynamo to say so, which takes seconds."""
        return False

    @property
    def sizes(self) -> set[int]:
        """Every size above 1."""
        return {run[0] for run in self.runs if len(run) == 1 and run[0] > 1}

    def joined(self, other: "Shapes", resized: bool) -> "Shapes":
        """What two passes show. Where their batches differ in size, the model's own sizes are those that both have."""
        both = Shapes()
        both.runs = self.runs & other.runs if resized else self.runs | other.runs
        both.cuts = {
            x: self.cuts.get(x, set()) | other.cuts.get(x, set()) for x in self.cuts.keys() | other.cuts.keys()
        }
        both.vocabulary = self.vocabulary
        return both

    def slices(self, length: int) -> set[Cut]:
        """Slices that an axis of this length may consist of, and slices of these."""
        slices = self._slices(length)
        for start, stop, period in list(slices):
            slices |= {
                Cut(start + a, start + b, period) for a, b, repeated in self._slices(stop - start) if not repeated
            }
        return slices

    def _slices(self, length: int) -> set[Cut]:
        """Slices that were taken, of equal maps, of maps whose indices take turns, or of each period."""
        slices = set(self.cuts.get(length, ()))
        for run in self.runs:
            if len(run) == 1 or int(np.prod(run)) != length:
                continue
            step = length // run[0]
            if 1 < run[-1] <= N_FUSED:  # as after a channel shuffle
                slices |= {Cut(i, i + 1, run[-1]) for i in range(run[-1])}
            if 1 < run[0] <= N_FUSED:
                slices |= {Cut(start, start + step) for start in range(0, length, step)}
            if 1 < run[0] < length:
                slices |= {Cut(a, b, step) for a, b, repeated in self._slices(step) if not repeated}
        return slices

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        pieces = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        for x in pieces:
            if x.is_floating_point():
                self._see(tuple(x.shape))
        operation = func.overloadpacket
        if operation is aten.embedding:
            rows = args[0].shape[0]
            self.vocabulary[args[1].data_ptr()] = min(rows, self.vocabulary.get(args[1].data_ptr(), rows))
        elif operation is aten.cat:
            self._cut(out.shape, [x.shape for x in args[0]])
        elif operation is aten.slice:
            self._slice(*args)
        elif operation is aten.select:
            self._take(args[0].shape, args[1], [args[2]])
        elif operation is aten.index:
            for axis, index in enumerate(args[1]):
                if index is not None and not index.is_floating_point() and 0 < index.numel() <= N_INDEXED:
                    self._take(args[0].shape, axis, index.flatten().tolist())
        elif operation in (aten.unbind, aten.stack):
            x, axis = (args[0], *args[1:], kwargs.get("dim", 0))[:2]
            whole = x.shape if operation is aten.unbind else out.shape
            self._take(whole, axis, range(min(whole[axis], N_INDEXED)))
        elif operation is aten.glu:
            axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            half = args[0].shape[axis] // 2
            self._note(args[0].shape, axis, Cut(0, half), Cut(half, 2 * half))
        elif len(pieces) > 1 and isinstance(args[0], Tensor):  # one of the kinds of split
            self._cut(args[0].shape, [x.shape for x in pieces])
        return out

    def _see(self, shape: tuple[int, ...]) -> None:
        for i in range(len(shape)):
            self.runs |= {shape[i:j] for j in range(i + 1, min(i + 3, len(shape)) + 1)}

    def _note(self, shape: Sequence[int], axis: int, *cuts: Cut) -> None:
        """Slices of an axis, and of the axes that it becomes where neighbouring axes are flattened into it."""
        axis %= len(shape)
        inner = np.cumprod([1, *shape[axis + 1 : axis + 1 + N_VIEWS]]).tolist()
        outer = np.cumprod([1, *reversed(shape[max(0, axis - N_VIEWS) : axis])]).tolist()
        for block in inner:
            unit = shape[axis] * block
            for repeats in outer:
                for start, stop, period in cuts:
                    if not start < stop:
                        continue
                    repeated = period * block if period else unit if repeats > 1 else None
                    if unit * repeats > 1 and (start * block, stop * block) != (0, unit * repeats):
                        self.cuts.setdefault(unit * repeats, set()).add(Cut(start * block, stop * block, repeated))

    def _cut(self, whole: Sequence[int], pieces: Sequence[Sequence[int]]) -> None:
        for axis, length in enumerate(whole):
            sizes = [piece[axis] for piece in pieces if len(piece) == len(whole)]
            if len(sizes) > 1 and sum(sizes) == length:
                ends = np.cumsum(sizes).tolist()
                self._note(whole, axis, *itertools.starmap(Cut, zip([0, *ends], ends, strict=False)))

    def _take(self, shape: Sequence[int], axis: int, indices: Iterable[int]) -> None:
        """Single indices of an axis."""
        length = shape[axis]
        self._note(shape, axis, *(Cut(i % length, i % length + 1) for i in indices if length > 1))

    def _slice(
        self, x: Tensor, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
    ) -> None:
        length = x.shape[axis]
        start, stop, _ = slice(start, stop).indices(length)
        if step != 1:
            if length % step == 0 and length > step:
                self._note(x.shape, axis, *(Cut(i, i + 1, step) for i in range(min(step, N_FUSED))))
        elif 0 < stop - start < length:
            self._note(x.shape, axis, Cut(0, start), Cut(start, stop), Cut(stop, length))
