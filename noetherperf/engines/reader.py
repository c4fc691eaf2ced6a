"""What a step asks of thousands of tensors: by compiled code where there is some.

A Gatherer gathers what parameters have (gradients, momentum buffers), a Reader where tensors are and how they lie, a
Watch which were written or replaced by somebody else.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines import FLOATING

if TYPE_CHECKING:
    from noetherperf._cpu import Readable


def unreadable(x: Tensor) -> str | None:
    """Why a tensor's elements are not the numbers at its address, all that compiled code knows; None where they are.

    The words go after its name.
    """
    if x.layout != torch.strided:
        return f"has layout {x.layout}"
    if has_own_dispatch(x):
        return f"is a {type(x).__name__}, a tensor subclass that keeps its elements in its own way"
    if x.device.type == "meta":
        return "is on the meta device, where tensors have no elements"
    if x.is_neg() or x.is_conj():
        return "is a view that torch negates or conjugates when it is read"
    if x._is_zerotensor():
        return "is one of torch's zeros without memory"
    if x.numel() > 0 and x.data_ptr() == 0:
        return "has no memory: its storage was emptied"
    return None


def has_own_dispatch(x: Tensor) -> bool:
    """Whether x is of a subclass that answers torch's operations itself; as a rule it has no memory of its own."""
    return type(x).__torch_dispatch__ != Tensor.__torch_dispatch__


class Reader(Protocol):
    """Reads a list of tensors, always the same number of them, and remembers how each of them lay."""

    def read(self, tensors: list[Tensor | None], addresses: np.ndarray, column: int) -> list[int]:
        """Write every tensor's address to a column, and tell which do not lie as remembered.

        Args:
            tensors: As many as the reader was made for.
            addresses: [n, columns] uint64. Where a tensor is None its address is 0, where it is empty 1.
            column: Which column.

        Returns:
            The numbers of tensors whose dtype, device, shape or strides are not the remembered ones. What is not
            readable (a sparse tensor, a negated view) is always among them, and has the address 0.

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


class Gatherer(Protocol):
    """Gathers what parameters have, always the same ones.

    Both methods return a list of one value per parameter, None where there is none, and a byte for each: 1 where there
    is none.
    """

    def attributes(self, params: list[Tensor], name: str) -> tuple[list[Any], bytes]:
        """Every parameter's attribute.

        Args:
            params: The ones that the gatherer was made for.
            name: Of the attribute.

        Raises:
            ValueError: Another number of parameters.
        """

    def items(self, state: dict[Tensor, Any], name: str) -> tuple[list[Any], bytes]:
        """state[parameter][name] of every parameter."""


class PythonGatherer:
    """A Gatherer in plain Python."""

    def __init__(self, params: list[Tensor]) -> None:
        self._place = {id(p): i for i, p in enumerate(params)}
        self._keys: list[Tensor] = []
        self._places: list[int] = []

    def attributes(self, params: list[Tensor], name: str) -> tuple[list[Any], bytes]:
        if len(params) != len(self._place):
            raise ValueError(f"expected {len(self._place)} parameters, got {len(params)}")
        found = [getattr(p, name) for p in params]
        return found, _missing(found)

    def items(self, state: dict[Tensor, Any], name: str) -> tuple[list[Any], bytes]:
        # Hashing every parameter would take longer than comparing what the state holds.
        if len(state) != len(self._keys) or not all(map(operator.is_, state, self._keys)):
            self._keys = list(state)
            self._places = [self._place.get(id(key), -1) for key in self._keys]
        found = [None] * (len(self._place) + 1)  # the last for what is of no parameter
        for place, slot in zip(self._places, state.values(), strict=True):
            found[place] = slot.get(name)
        found.pop()
        return found, _missing(found)


class Watch(Protocol):
    """Knows some tensors of a list by identity and version counter (torch.Tensor._version), and keeps none alive.

    It has weak references to them, beside which torch.utils.swap_tensors refuses; none to tensors that are kept.

    At first it knows None for each. Every method takes a list of all, or bytes for all.
    """

    def look(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """The numbers of the watched ones that are not as they are known: others, or written since."""

    def know(self, i: int, tensor: Tensor | None) -> None:
        """Take tensor i, if it is watched, as it is now."""

    def expect(self, missing: bytes) -> None:
        """Tensors are about to be written once, and their counters raised by one; not those with a 1 in missing."""


class PythonWatch:
    """A Watch in plain Python."""

    def __init__(self, which: Sequence[int], *, kept: bool = False) -> None:
        self._known: dict[int, tuple[Callable[[], Tensor | None] | None, int]] = dict.fromkeys(which, (None, 0))
        self._refer: Callable[[Tensor], Callable[[], Tensor | None]] = _kept if kept else weakref.ref
        self._at_least = max(which, default=-1) + 1

    def look(self, tensors: Sequence[Tensor | None]) -> list[int]:
        self._check(len(tensors))
        changed = []
        for i, (reference, version) in self._known.items():
            x, known = tensors[i], None if reference is None else reference()
            if x is not known or (x is None) != (reference is None) or (x is not None and _version(x) != version):
                changed.append(i)
        return changed

    def know(self, i: int, tensor: Tensor | None) -> None:
        if i in self._known:
            self._known[i] = (None, 0) if tensor is None else (self._refer(tensor), _version(tensor))

    def expect(self, missing: bytes) -> None:
        self._check(len(missing))
        for i, (reference, version) in self._known.items():
            if version >= 0 and not missing[i]:
                self._known[i] = reference, version + 1

    def _check(self, n: int) -> None:
        if n < self._at_least:
            raise ValueError(f"expected at least {self._at_least} tensors, got {n}")


def make_reader(n: int) -> Reader:
    """A reader of n tensors."""
    if not _is_compiled():
        return PythonReader(n)
    from noetherperf._cpu import TensorReader

    return TensorReader(n, Tensor, _readable())


@functools.cache
def _readable() -> "Readable":
    """What tells readable tensors from others; it learns from examples where torch keeps the negative bit."""
    from noetherperf._cpu import Readable

    shapes = [tuple(range(2, 2 + n)) for n in range(6)]
    with torch.inference_mode(False):
        plain = [torch.ones(shape, dtype=dtype, device="cpu") for dtype in FLOATING for shape in shapes]
        plain += [torch.ones(9, device="cpu")[k::2] for k in range(3)]
        return Readable(Tensor, torch.nn.Parameter, plain, [torch._neg_view(x) for x in plain])


def make_gatherer(params: list[Tensor]) -> Gatherer:
    """A gatherer of what these parameters have."""
    if not _is_compiled() or any(map(has_own_dispatch, params)):  # whose place in memory compiled code must not ask
        return PythonGatherer(params)
    from noetherperf._cpu import Gatherer

    return Gatherer(params, Tensor)


def make_watch(which: Sequence[int], *, kept: bool = False) -> Watch:
    """A watch over the tensors with these numbers, each once.

    Args:
        which: The numbers.
        kept: Whether the caller keeps alive what the watch knows.
    """
    if not _is_compiled():
        return PythonWatch(which, kept=kept)
    from noetherperf._cpu import Watch

    return Watch(which, Tensor, kept)


def _is_compiled() -> bool:
    """Whether the compiled ones were built, and torch describes its tensors to others."""
    return find_spec("noetherperf._cpu") is not None and hasattr(Tensor, "__dlpack_c_exchange_api__")


def _missing(found: list[Any]) -> bytes:
    return bytes([x is None for x in found])


def _kept(x: Tensor) -> Callable[[], Tensor]:
    """What a weak reference is where the tensor is kept anyway."""
    return lambda: x


def _version(x: Tensor) -> int:
    """A tensor's version counter, −1 where it has none, as one that was made in inference mode."""
    try:
        return x._version
    except RuntimeError:
        return -1


def _layout(x: object) -> object:
    if not isinstance(x, Tensor) or unreadable(x) is not None:
        return None
    return x.dtype, x.device, x.shape, x.stride()
