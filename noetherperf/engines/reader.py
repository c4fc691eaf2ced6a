"""Fast reads of thousands of tensors in a step, by compiled code if it is built.

A Gatherer gathers gradients and momentum buffers. A Reader reads the tensors' addresses and layouts. A Watch detects
tensors that other code has written or replaced. A Glance does all of this at once, where nothing is new.
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
    """Why a tensor's elements are not the numbers at its address, all that compiled code reads; None if they are.

    The words follow the tensor's name.
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
    """Whether x is of a subclass that implements torch's operations itself; it usually has no memory of its own."""
    return type(x).__torch_dispatch__ != Tensor.__torch_dispatch__


class Reader(Protocol):
    """Reads a list of tensors, of a fixed length, and remembers each tensor's layout."""

    def read(self, tensors: list[Tensor | None], addresses: np.ndarray, column: int) -> list[int]:
        """Write every tensor's address to a column, and return which layouts are not the remembered ones.

        Args:
            tensors: As many as the reader was made for.
            addresses: [n, columns] uint64. The address is 0 for None, 1 for an empty tensor.
            column: Which column.

        Returns:
            The indices of tensors whose dtype, device, shape or strides are not the remembered ones. A tensor that is
            not readable (sparse, a negated view) is always among them, with the address 0.

        Raises:
            ValueError: Another number of tensors.
        """

    def remember(self, i: int, tensor: Tensor) -> None:
        """Remember this tensor's layout as that of tensor i."""


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
    """Gathers attributes and state entries of fixed parameters.

    Both methods return a list of one value per parameter, None if it has none, and a byte for each: 1 for None.
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
        found = [None] * (len(self._place) + 1)  # the last is for keys that are no parameter
        for place, slot in zip(self._places, state.values(), strict=True):
            found[place] = slot.get(name)
        found.pop()
        return found, _missing(found)


class Watch(Protocol):
    """Detects written or replaced tensors of a list, by identity and version counter (torch.Tensor._version).

    It keeps no tensor alive. It has weak references, but none to tensors that the caller keeps:
    torch.utils.swap_tensors refuses a tensor with weak references.

    At first it knows None for each. Methods take a list of all tensors, or a byte for each.
    """

    def look(self, tensors: Sequence[Tensor | None]) -> list[int]:
        """The indices of the watched tensors that were replaced or written."""

    def know(self, i: int, tensor: Tensor | None) -> None:
        """Record the present state of tensor i, if it is watched."""

    def expect(self, missing: bytes) -> None:
        """All tensors but those with a 1 in `missing` are about to be written, which raises their counters by one."""


class PythonWatch:
    """A Watch in plain Python."""

    def __init__(self, which: Sequence[int], *, kept: bool = False, placed: bool = False) -> None:
        self._known: dict[int, tuple[Callable[[], Tensor | None] | None, int, int]] = dict.fromkeys(which, (None, 0, 0))
        self._refer: Callable[[Tensor], Callable[[], Tensor | None]] = _kept if kept else weakref.ref
        self._place: Callable[[Tensor], int] = _address if placed else lambda x: 0
        self._at_least = max(which, default=-1) + 1

    def look(self, tensors: Sequence[Tensor | None]) -> list[int]:
        self._check(len(tensors))
        changed = []
        for i, (reference, *seen) in self._known.items():
            x, known = tensors[i], None if reference is None else reference()
            if x is not known or (x is None) != (reference is None) or (x is not None and [*self._seen(x)] != seen):
                changed.append(i)
        return changed

    def know(self, i: int, tensor: Tensor | None) -> None:
        if i in self._known:
            self._known[i] = (None, 0, 0) if tensor is None else (self._refer(tensor), *self._seen(tensor))

    def _seen(self, x: Tensor) -> tuple[int, int]:
        return _version(x), self._place(x)

    def expect(self, missing: bytes) -> None:
        self._check(len(missing))
        for i, (reference, version, place) in self._known.items():
            if version >= 0 and not missing[i]:
                self._known[i] = reference, version + 1, place

    def _check(self, n: int) -> None:
        if n < self._at_least:
            raise ValueError(f"expected at least {self._at_least} tensors, got {n}")


class Glance(Protocol):
    """Recognises a step that sees the same tensors as the step before, wherever its gradients and buffers are.

    It tells no more, so that there is none in Python.
    """

    def look(self, groups: list[Any], state: dict[Tensor, Any]) -> list[Tensor | None] | None:
        """Compare all that a step reads of tensors, and write the addresses of gradients and buffers.

        Args:
            groups: Torch's parameter groups.
            state: Torch's, by parameter.

        Returns:
            The gradients and buffers, which the caller keeps alive until the step is made. None if anything is not as
            before: other groups or parameters, one of which has moved; a gradient or buffer where there was none, or
            none where there was one; another layout; a watched tensor that was written or replaced. Some addresses are
            written then.
        """


def make_reader(n: int) -> Reader:
    """A reader of n tensors."""
    if not _is_compiled():
        return PythonReader(n)
    from noetherperf._cpu import TensorReader

    return TensorReader(n, Tensor, _readable())


@functools.cache
def _readable() -> "Readable":
    """The test for readable tensors; it learns from examples where torch keeps the negative bit."""
    from noetherperf._cpu import Readable

    shapes = [tuple(range(2, 2 + n)) for n in range(6)]
    with torch.inference_mode(False):
        plain = [torch.ones(shape, dtype=dtype, device="cpu") for dtype in FLOATING for shape in shapes]
        plain += [torch.ones(9, device="cpu")[k::2] for k in range(3)]
        return Readable(Tensor, torch.nn.Parameter, plain, [torch._neg_view(x) for x in plain])


def make_gatherer(params: list[Tensor]) -> Gatherer:
    """A gatherer for these parameters."""
    if not _is_compiled() or any(map(has_own_dispatch, params)):  # compiled code must not describe these
        return PythonGatherer(params)
    from noetherperf._cpu import Gatherer

    return Gatherer(params, Tensor)


def make_watch(which: Sequence[int], *, kept: bool = False, placed: bool = False) -> Watch:
    """A watch over the tensors with these indices.

    Args:
        which: The indices, each once.
        kept: Whether the caller keeps the known tensors alive.
        placed: Whether a tensor whose elements were moved (`x.data = y`, which raises no counter) is another.
    """
    if not _is_compiled():
        return PythonWatch(which, kept=kept, placed=placed)
    from noetherperf._cpu import Watch

    return Watch(which, Tensor, kept, placed)


def make_glance(
    params: list[Tensor],
    sizes: Sequence[int],
    gatherer: Gatherer,
    readers: list[Reader],
    watches: list[Watch | None],
    keys: Sequence[str],
    counts: Watch | None,
    count_key: str | None,
    addresses: np.ndarray,
) -> Glance | None:
    """A glance at these parameters; None if what it needs is not compiled.

    Args:
        params: The parameters.
        sizes: How many of them are in each parameter group.
        gatherer: Theirs.
        readers, watches: Of parameters, gradients, and the buffers under each of these keys; None: not watched.
        keys: In the state of a parameter.
        counts: Watches the counts of steps, if there are any.
        count_key: Their key in the state of a parameter.
        addresses: [n, 2 + buffers], as the step before had them; changes in place.
    """
    if not _is_compiled() or isinstance(gatherer, PythonGatherer):
        return None
    from noetherperf import _cpu

    parts: Any = (params, sizes, gatherer, readers, watches, list(keys), counts, count_key, addresses)
    return _cpu.Glance(*parts)


def _is_compiled() -> bool:
    """Whether the compiled classes are built, and torch has DLPack's exchange API."""
    return find_spec("noetherperf._cpu") is not None and hasattr(Tensor, "__dlpack_c_exchange_api__")


def _missing(found: list[Any]) -> bytes:
    return bytes([x is None for x in found])


def _kept(x: Tensor) -> Callable[[], Tensor]:
    """The replacement of a weak reference if the caller keeps the tensor."""
    return lambda: x


def _version(x: Tensor) -> int:
    """A tensor's version counter; −1 if it has none, like a tensor made in inference mode."""
    try:
        return x._version
    except RuntimeError:
        return -1


def _address(x: Tensor) -> int:
    """The address of a tensor's elements; 0 if it has none, like a fake tensor."""
    try:
        return x.data_ptr()
    except RuntimeError:
        return 0


def _layout(x: object) -> object:
    if not isinstance(x, Tensor) or unreadable(x) is not None:
        return None
    return x.dtype, x.device, x.shape, x.stride()
