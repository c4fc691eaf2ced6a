"""The base of engines that walk the tables of tiling.py: it keeps tables, addresses, layouts and options up to date."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines import Stepping, check_gradient
from noetherperf.engines.overlap import check_apart
from noetherperf.engines.reader import has_own_dispatch, make_reader, unreadable
from noetherperf.engines.rows import Rows
from noetherperf.engines.tiling import Tiling, is_dense, make_tables, memory_order
from noetherperf.measure.plan import Measurement, Plan

#: Columns of the addresses; from the last one on, one for each of the rule's buffers.
PARAMETER, GRADIENT, BUFFER = range(3)


class TableEngine(Stepping):
    """Keeps the tables and the inputs of each step; a subclass passes both to its kernels.

    _tables, _workspace: made by _build for the parameters' present layout.
    _addresses [n, 2 + n_buffers]: each tensor's parameter, gradient, buffers; null where it takes no part or has none.
    _places: the parameters' addresses when they were last checked to share no memory.
    _rows: the rule's numbers.
    """

    tiling: ClassVar[Tiling]

    def __init__(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        names: Sequence[str],
        group_index: Sequence[int],
        measurement: Measurement,
    ) -> None:
        self.plan, self.params, self.names, self.group_index = plan, params, names, group_index
        self._measurement = measurement
        self.rule = plan.rule
        self._rows = Rows(self.rule, group_index, measurement.clock.numel() - 1, plan.laws)
        self._places = b""
        self._build()

    @property
    def measurement(self) -> Measurement:
        return self._measurement

    def _build(self) -> None:
        """Make the tables for the parameters' present layouts."""
        n = len(self.params)
        self._tables = make_tables(self.plan, self.params, self.group_index, self.tiling)
        device = self._measurement.moments.device
        self._workspace = torch.full((self._tables.workspace,), torch.nan, dtype=torch.float64, device=device)
        n_columns = BUFFER + len(self.rule.buffers)
        self._addresses = np.zeros((n, n_columns), np.uint64)
        self._orders = [memory_order(p) for p in self.params]
        self._kinds = [(p.dtype, p.device, p.shape) for p in self.params]
        self._strides: list[list[tuple[int, ...] | None]] = [[None] * n for _ in range(n_columns)]  # that are known
        self._readers = [make_reader(n) for _ in range(n_columns)]
        for i, p in enumerate(self.params):
            self._strides[PARAMETER][i] = p.stride()
            self._readers[PARAMETER].remember(i, p)

    def n_bytes(self) -> dict[str, int]:
        """Bytes that the engine keeps beside its measurement: "workspace", of partial sums, and "tables"."""
        tables = self._tables
        arrays = (tables.tensors, tables.dims, tables.views, tables.tiles, tables.spans, self._addresses)
        return {"workspace": self._workspace.nbytes, "tables": sum(array.nbytes for array in arrays)}

    def _read(self, column: int, tensors: Sequence[Tensor | None]) -> list[int]:
        """Read the tensors' addresses; returns the indices of those whose layout changed."""
        listed = tensors if isinstance(tensors, list) else list(tensors)  # a copy would touch every tensor
        return self._readers[column].read(listed, self._addresses, column)

    def _relocate(self) -> None:
        """Read the parameters' addresses; rebuild the tables if a layout changed."""
        changed = self._read(PARAMETER, self.params)
        for i in changed:
            p, (dtype, device, shape) = self.params[i], self._kinds[i]
            if (reason := unreadable(p)) is not None:
                raise RuntimeError(
                    f"{self.names[i]} {reason}; give it memory of its own before step() and readout(), as it had when "
                    "the optimizer was made"
                )
            if (p.dtype, p.device, p.shape) != (dtype, device, shape):
                raise RuntimeError(
                    f"{self.names[i]} was {dtype} {tuple(shape)} on {device} and is now {p.dtype} {tuple(p.shape)} on "
                    f"{p.device}; make the optimizer after moving or converting the model"
                )
        if changed:
            self._build()
            self._read(PARAMETER, self.params)
        places = self._addresses[:, PARAMETER].tobytes()
        if places != self._places:
            check_apart(self.names, self.params)
            self._places = places

    def _lay_out(self, i: int, column: int, x: Tensor) -> None:
        """Write a gradient's or buffer's strides into the tables: dense if the parameter and all of them are."""
        strides = self._strides[column][i] = x.stride()
        p, order, tensor = self.params[i], self._orders[i], self._tables.tensors[i]
        rows = slice(tensor["dims"], tensor["dims"] + len(order))
        self._tables.dims["strides"][rows, column] = [strides[axis] for axis in order]
        shape = [p.shape[axis] for axis in order]
        known = [of_all[i] for of_all in self._strides]
        tensor["dense"] = all(is_dense(shape, [s[axis] for axis in order]) for s in known if s is not None)
        self._readers[column].remember(i, x)

    def admit(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        self._relocate()
        written_out: dict[int, Tensor] = {}
        for i in self._read(GRADIENT, grads):
            if (g := grads[i]) is not None:
                check_gradient(self.names[i], self.params[i], g)
                if (reason := unreadable(g)) is not None:
                    g = written_out[i] = _write_out(self.names[i], g, reason)
                self._lay_out(i, GRADIENT, g)
        if written_out:
            grads = [written_out.get(i, g) for i, g in enumerate(grads)]
            self._read(GRADIENT, grads)
        return grads

    def _admit_buffers(self, buffers: Sequence[Sequence[Tensor | None]]) -> None:
        for column, (key, of_all) in enumerate(zip(self.rule.buffers, buffers, strict=True), BUFFER):
            for i in self._read(column, of_all):
                if (v := of_all[i]) is not None:
                    self._check_buffer(i, key, v)
                    self._lay_out(i, column, v)

    def _check_buffer(self, i: int, key: str, v: Tensor) -> None:
        p = self.params[i]
        if (reason := unreadable(v)) is not None:
            raise RuntimeError(
                f"{self.names[i]}: its {key} {reason}; put a tensor with memory of its own into the "
                "state (buffer.resolve_neg().clone())"
            )
        if (v.dtype, v.device, v.shape) != (p.dtype, p.device, p.shape):
            raise RuntimeError(
                f"{self.names[i]}: its {key} ({v.dtype}, {v.device}, {tuple(v.shape)}) must match the "
                f"parameter ({p.dtype}, {p.device}, {tuple(p.shape)}); load it with load_state_dict, which converts it"
            )

    def _admit_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> None:
        """Read the addresses of parameters and buffers. Parameters replace missing buffers, which kernels read too."""
        self._relocate()
        self._admit_buffers([[p if v is None else v for p, v in zip(self.params, x, strict=True)] for x in buffers])


def _write_out(name: str, grad: Tensor, reason: str) -> Tensor:
    """A lazy gradient of torch, materialized in memory."""
    if not has_own_dispatch(grad) and grad._is_zerotensor():
        return torch.zeros_like(grad)
    if has_own_dispatch(grad):
        raise TypeError(
            f"{name}: the gradient {reason}; compiled backends cannot read it. Convert it before step(), or use "
            'backend="reference"'
        )
    if grad.is_neg():
        return grad.resolve_neg()
    raise RuntimeError(f"{name}: the gradient {reason}; set it anew before step()")
