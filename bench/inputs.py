"""The tensors of a case: input sets that rounds rotate over, so that no step finds its data in a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.cases import Case

MEMORY = 12 << 30  # that a case may take, in bytes
MAX_SETS = 6
CPU = torch.device("cpu")
PERIOD = 1_000_003  # random numbers repeat after so many; prime, so that no two rows of a tensor are alike


class TooLarge(Exception):
    """A case needs more memory than there is; the message says how much."""


@dataclass(frozen=True)
class InputSet:
    """One set. All variants step the same memory, so that none is luckier than another with its addresses."""

    params: list[nn.Parameter]
    grads: list[Tensor]
    buffers: list[list[Tensor]]  # of each of the recipe's buffers one for every parameter

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, as plain tensors."""
        return [x.detach() for x in chain(self.params, self.grads, *self.buffers)]

    def alone(self) -> "InputSet":
        """The same memory as other tensors, whose version counters no other variant's step raises.

        An optimizer that measures takes a parameter that other code has written to for one that it must measure anew.
        """
        params = [nn.Parameter(p.data) for p in self.params]
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g
        return InputSet(params, self.grads, [[x.data for x in tensors] for tensors in self.buffers])


@lru_cache(maxsize=1)
def _numbers() -> Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))


def _fill(tensors: Sequence[Tensor], phase: int) -> None:
    """Fill tensors with random numbers that differ from phase to phase."""
    if not tensors:
        return
    numbers, start = _numbers().to(tensors[0].device, tensors[0].dtype), 31 * phase
    for tensor in tensors:
        flat, at = tensor.detach().view(-1), 0
        while at < len(flat):
            piece = numbers[start % PERIOD :][: len(flat) - at]
            flat[at : at + len(piece)] = piece
            at, start = at + len(piece), start + len(piece)


def _renew(case: Case, inputs: InputSet, number: int) -> InputSet:
    """Give an input set its initial values again."""
    of_all: list[Sequence[Tensor]] = [inputs.params, inputs.grads, *inputs.buffers]
    for i, tensors in enumerate(of_all):
        _fill(tensors, 5 * number + i)
    for buffers, is_squared in zip(inputs.buffers, case.recipe.is_squared, strict=True):
        if is_squared:
            torch._foreach_mul_(buffers, buffers)
    return inputs


def make_input_set(case: Case, number: int, device: torch.device = CPU) -> InputSet:
    """One input set, each tensor where torch's allocator puts it; sets of different numbers hold different values."""

    def tensors() -> list[Tensor]:
        return [torch.empty(shape, dtype=case.torch_dtype, device=device) for shape in case.shapes]

    params, grads = list(map(nn.Parameter, tensors())), tensors()
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return _renew(case, InputSet(params, grads, [tensors() for _ in case.recipe.buffers]), number)


def caches() -> dict[str, str]:
    """Sizes of the first core's caches, as Linux reports them: {"L1 data": "48K", ...}; empty elsewhere."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        found[f"L{level}" + ("" if kind == "Unified" else f" {kind.lower()}")] = size
    return found


def cache_size(name: str, otherwise: int) -> int:
    """Bytes of a cache of caches(); `otherwise` where the system does not report it."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    size = caches().get(name)
    return otherwise if size is None else int(size[:-1]) * units[size[-1]]


def last_level_cache() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not report it."""
    return max((cache_size(name, 0) for name in caches()), default=32 << 20)


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no line MemAvailable")


def n_sets(case: Case, cache: int, memory: int) -> int:
    """Number of input sets: as many as fill twice the last cache, and as memory holds; two for host time alone.

    Memory must also hold the floor's streams and a Probe's own tensors beside each set and, earlier, the gate's copies
    of one set's parameters and buffers.

    Raises:
        TooLarge: One set is too many.
    """
    streams = case.bytes_held
    of_probe = case.bytes_held if case.suite == "step" and case.view != "none" else 0

    def needed(n: int) -> int:
        return n * (case.bytes_held + of_probe) + max(n * streams, case.bytes_held)

    n = min(2 if case.suite == "host" else MAX_SETS, max(2, -(-2 * cache // case.bytes_held)))
    while n and needed(n) > memory:
        n -= 1
    if n == 0:
        raise TooLarge(f"needs {needed(1) / 2**30:.1f} GiB of memory, and may take {memory / 2**30:.1f}")
    return n


_kept: dict[tuple[object, ...], list[InputSet]] = {}


def input_sets(case: Case) -> list[InputSet]:
    """The case's input sets; kept for the next case if it has the same tensors, which then begins with the same values.

    Raises:
        TooLarge: They do not fit into memory.
    """
    key = (case.shapes, case.dtype, case.recipe.is_squared)
    if key in _kept:
        for i, inputs in enumerate(_kept[key]):
            _renew(case, inputs, i)
    else:
        _kept.clear()
        memory = min(MEMORY, available_memory() * 9 // 10)
        _kept[key] = [make_input_set(case, i) for i in range(n_sets(case, last_level_cache(), memory))]
    return _kept[key]
