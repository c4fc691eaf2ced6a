"""Products of units: of the rows of each block with each other, by torch's batched matrix product.

A tensor's units [blocks, n, rest] are multiplied in pieces that stay in a processor's cache: some blocks, whole if they
are small, else some elements of each unit. The products of all pieces and parts of a cell are summed in place.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from noetherperf.measure.cells import Cell, GramPlan
from noetherperf.measure.sharded_units import ShardedUnits
from noetherperf.measure.shards import Indices
from noetherperf.symmetry import Part

#: Elements of a piece, and least of each unit.
PIECE, LEAST = 1 << 18, 64


class Units:
    """The units of a plan's parts, of tensors on one device.

    Args:
        plan: The cells.
        device: Where the tensors are.
        indices: For each tensor the indices of its shard in this rank's memory; None: the tensors are whole.

    Raises:
        ValueError: Units of one block are on several ranks.
    """

    def __init__(self, plan: GramPlan, device: torch.device | str, indices: Sequence[Indices] | None) -> None:
        self._balances, self._in_pieces = plan.balances, torch.device(device).type == "cpu"
        self._shards: dict[tuple[int, Part], ShardedUnits] = {}
        for cell in plan.cells:
            for tensor, part in cell.members:
                if cell.cut and indices is not None:
                    balance, shape = plan.balances[cell.balance], plan.tensor_shapes[tensor]
                    found = ShardedUnits.of(balance, part, shape, indices[tensor], device)
                    self._shards[cell.balance, part] = found

    def pieces(
        self, cell: Cell, part: Part, tensors: Sequence[Tensor | None]
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Pieces of tensors, whose products add up, each with its blocks.

        A shard is one piece, and not in units yet, because what it lacks must not be divided; see `complete`.
        """
        if self._shard(cell, part) is not None:
            yield slice(0, cell.n_blocks), list(tensors)
            return
        balance = self._balances[cell.balance]
        units = [None if x is None else balance.units(part, x) for x in tensors]
        blocks, n, rest = next(x.shape for x in units if x is not None)
        height, width = blocks, rest
        if self._in_pieces:
            width = _even(rest, max(PIECE // n, LEAST))
            height = _even(blocks, max(PIECE // (n * width), 1))
        for top in range(0, blocks, height):
            some = slice(top, min(top + height, blocks))
            high = [None if x is None else x[some] for x in units]
            for left in range(0, rest, width):
                yield some, [x if x is None or width == rest else x[..., left : left + width] for x in high]

    def complete(self, cell: Cell, part: Part, x: Tensor) -> Tensor:
        """A piece of `pieces`, or what was computed of pieces element by element, as [some blocks, n, some elements];
        of a shard with zeros for what other ranks have."""
        shard = self._shard(cell, part)
        return x if shard is None else shard.units(x)

    def _shard(self, cell: Cell, part: Part) -> ShardedUnits | None:
        return self._shards.get((cell.balance, part)) if cell.cut else None


class Sums:
    """Sums of products: of a cell's pieces, one cell after the other in the same memory.

    Args:
        plan: The cells.
        device: Where they are.
    """

    def __init__(self, plan: GramPlan, device: torch.device | str) -> None:
        self._device = device
        self._memory: dict[torch.dtype, Tensor] = {}  # [products, entries of the largest cell]
        self._outgrown: list[Tensor] = []  # where a CUDA graph may still write
        self._largest = max((cell.n_blocks * cell.n**2 for cell in plan.cells), default=0)
        self._places = {n: [x.to(device) for x in _places(n)] for n in {cell.n for cell in plan.cells}}

    def begin(self, cell: Cell, dtype: torch.dtype) -> None:
        """Begin the sums of a cell, in a dtype."""
        self._cell, self._dtype = cell, dtype
        self._begun = [False] * cell.n_blocks
        self._rows: dict[str, int] = {}
        self._symmetric: list[bool] = []

    def add(self, blocks: slice, weight: float, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add weight · a bᵀ for the pairs (a, b) of pieces [some blocks, n, some elements].

        Which pairs are the same tensors must not change inside a cell; they are multiplied once.
        """
        if not self._rows:
            self._plan(pairs)
        begun = float(self._begun[blocks.start])  # else what is in the memory does not count
        self._begun[blocks] = [True] * (blocks.stop - blocks.start)
        for name, row in self._taken:
            a, b = pairs[name]
            products = self._products[row, blocks]
            if a.shape[2] == 1 and begun:  # of a bias, of which a matrix product makes more work
                products.addcmul_(a, b.mT, value=weight)
            else:
                products.baddbmm_(a, b.mT, beta=begun, alpha=weight)  # in place, which autocast leaves alone

    def _plan(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Give each product a row of the memory, and make that large enough."""
        found: dict[tuple[int, int], int] = {}
        self._taken: list[tuple[str, int]] = []
        for name, (a, b) in pairs.items():
            key = id(a), id(b)
            if key not in found:
                found[key] = len(found)
                self._taken.append((name, found[key]))
                self._symmetric.append(a is b)
            self._rows[name] = found[key]
        memory = self._memory.get(self._dtype)
        if memory is None or len(memory) < len(found):
            self._outgrown += [] if memory is None else [memory]
            memory = torch.empty(len(found), self._largest, dtype=self._dtype, device=self._device)
            self._memory[self._dtype] = memory
        shape = (self._cell.n_blocks, self._cell.n, self._cell.n)
        self._products = memory[: len(found), : prod(shape)].unflatten(1, shape)

    def entries(self) -> dict[str, Tensor]:
        """The sums by name: the upper triangles of their symmetric parts, [entries of the cell], float64."""
        upper, lower = self._places[self._cell.n]
        found = []
        for products, symmetric in zip(self._products.flatten(2), self._symmetric, strict=True):
            entries = products.index_select(1, upper).flatten().double()
            if not symmetric:
                entries.add_(products.index_select(1, lower).flatten()).mul_(0.5)
            found.append(entries)
        return {name: found[row] for name, row in self._rows.items()}


def _even(total: int, most: int) -> int:
    """The size of as few parts of a total as can be, none above the most, all nearly alike: threads share one part."""
    return -(-total // -(-total // most))


def lengths(x: Tensor) -> Tensor:
    """The Frobenius norms of matrices [blocks, n, rest]: [blocks]. First along neighbours in memory, which is fast."""
    first = 2 if x.stride(2) <= x.stride(1) else 1
    partial = torch.linalg.vector_norm(x, dim=first)
    found: Tensor = torch.linalg.vector_norm(partial, dim=1)
    return found


def _places(n: int) -> list[Tensor]:
    """Where the entries of an n × n matrix are on and above its diagonal, row by row, and where their mirror images."""
    i, j = torch.triu_indices(n, n, device="cpu")
    return [n * i + j, n * j + i]
