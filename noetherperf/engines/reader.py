"""Where tensors are and how they lie: asked for in every step, so by compiled code where there is some."""

from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Reader(Protocol):
    """Reads a list of tensors, always the same number of them, and remembers how each of them lay."""

    def read(self, tensors: list[Tensor | None], addresses: np.ndarray, column: int) -> list[int]:
        """Write every tensor's address to a column, and tell which do not lie as remembered.

        Args:
            tensors: As many as the reader was made for.
            addresses: [n, columns] uint64. Where a tensor is None its address is 0, where it is empty 1.
            column: Which column.

        Returns:
            The numbers of tensors whose dtype, device, shape or strides are not the remembered ones. What is no tensor
            with strides (a sparse one, say) is always among them, and has the address 0.

        Raises:
            ValueError: Another number of tensors.
        """

    def remember(self, i: int, tensor: Tensor) -> None:
        """Take how a tensor lies now as how tensor i is to lie."""


class PythonReader:
    """A Reader in plain torch."""

    def __init__(self, n: int) -> None:
        self._known: list[object] = [None] * n

    def read(self, tensors: list[Tensor | None], addresses: np.ndarray, column: int) -> list[int]:
        if len(tensors) != len(self._known):
            raise ValueError(f"expected {len(self._known)} tensors, got {len(tensors)}")
        changed = []
        for i, (x, known) in enumerate(zip(tensors, self._known, strict=True)):
            layout = _layout(x)
            addresses[i, column] = 0 if x is None or layout is None else x.data_ptr() or 1
            if x is not None and (layout is None or layout != known):
                changed.append(i)
        return changed

    def remember(self, i: int, tensor: Tensor) -> None:
        self._known[i] = _layout(tensor)


def make_reader(n: int) -> Reader:
    """A reader of n tensors: the compiled one, where it was built and torch describes its tensors to others."""
    if find_spec("noetherperf._cpu") is None or not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return PythonReader(n)
    from noetherperf._cpu import TensorReader

    return TensorReader(n, Tensor)


def _layout(x: object) -> object:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return None
    return x.dtype, x.device, x.shape, x.stride()
