"""The base of GPU engines: the tables on the device, and the inputs of each step, copied there if they change.

A step is two stages. Stage 1 walks the tiles: it steps them and writes their sums to the workspace. Stage 2 walks the
spans: it adds the slices in order, folds lines to segments, advances the laws, then the clock and the ages. The host
never waits for the device, and after the first steps nothing is allocated. Copies have their own stream, so a copy
is finished long before the device reaches the step. On the step's stream the kernels would wait for it.

Ages. The host knows when it makes a tensor's buffers, but not whether the step that should write them is skipped
(found_inf), so ages are on the device. A tensor's age in a step is 0 if its buffers are new, else the age on the
device. Stage 1 chooses each tensor's row by its age (noetherperf/engines/rows.py) and writes the row's index to
`chosen`, which stage 2 reads. Stage 2 alone writes the ages. So no block reads what another block of its kernel writes.
Of a rule that counts ages in torch's state, a tensor has one row to choose from: that of its count.

Streams. Both stages are queued on the current stream, or stage 2 on a stream beside it (side_stream.py). What stage 2
touches is reached by others through `measurement` and `ages` alone.

Numbers on the device: rows that depend on a learning rate there, or on counts of steps there, are computed there by
torch operations on the step's stream, in place of the rows that were sent. A CUDA graph replays these operations too.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines import Call, OnDevice, carry_out
from noetherperf.engines.device_inputs import DeviceInputs, InputsShape, Slot
from noetherperf.engines.rows import components
from noetherperf.engines.side_stream import SideStream, wanted
from noetherperf.engines.tables import BUFFER, GRADIENT, TableEngine
from noetherperf.measure.plan import Measurement

#: Instead of a rule's variant: no step, only the moments.
MEASURE = -1


# A host that is this many changes of inputs ahead of the device waits for it; the device then still has all those steps
# in its queue. This many graphs can be captured between two steps.
RING = 8


@dataclass(frozen=True)
class Launch:
    """One kernel's share of stage 1: the tiles [begin, end), all of one dtype, whose tensors take one variant of the
    rule's step, or MEASURE.

    The kernel must skip tiles of another variant among them.
    """

    dtype: int
    variant: int
    begin: int
    end: int


class GpuEngine(TableEngine):
    """Engine over tables on a GPU. A subclass implements _launch with its kernels.

    In tests its tensors may be on the CPU, with emulated kernels; copies are then synchronous.

    Memory on the device for _launch, besides the measurement and the workspace (self._workspace):
        tables: self.tensors, dims, views, tiles, spans, components: the tables' bytes, as int64 [n_words]; at least one
            word. self.driving: int32.
        ages: self._known_ages: [n_tensors] uint8; self.chosen: [n_tensors] int32.
    """

    reads_counts = True

    def _build(self) -> None:
        super()._build()
        n = len(self.params)
        self.device = self._measurement.moments.device
        self._on_gpu = self.device.type != "cpu"
        if not hasattr(self, "_side"):
            self._side = self._make_side()
        self._refuse_capture("make its tables")
        self.n_groups = self._measurement.clock.numel() - 1
        t = self._tables
        self.tensors, self.dims, self.views, self.tiles, self.spans = (
            _words(table).to(self.device) for table in (t.tensors, t.dims, t.views, t.tiles, t.spans)
        )
        table, driving = components(self.rule)
        self.components, self.driving = _words(table).to(self.device), torch.from_numpy(driving).to(self.device)
        if not hasattr(self, "_known_ages"):  # else the tables are rebuilt, and the ages stay
            self._known_ages = torch.full((n,), self._rows.n_ages - 1, dtype=torch.uint8, device=self.device)
            self.chosen = torch.zeros(n, dtype=torch.int32, device=self.device)
        self._layouts_changed = False
        self._tile_counts = np.bincount(t.tiles["tensor"], minlength=n) if len(t.tiles) else np.zeros(n, np.int64)
        self._dtype_ranges = self._ranges_by_dtype()
        self._launches_for: tuple[bytes, list[Launch]] = (b"", [])
        self._lrs: Sequence[Tensor | None] = ()  # that the host does not read
        self._counts: Tensor | None = None  # likewise
        self._captured: list[Slot] = []  # read by CUDA graphs, for the lifetime of this engine
        if self._on_gpu:
            self._stream = torch.cuda.Stream(self.device)
        tables = (self.tensors, self.dims, self.views, self.tiles, self.spans, self.components, self.driving)
        self._keep(*tables, self._known_ages, self.chosen, self._workspace, *self._measurement.tensors())
        self._make_inputs()
        self._take_rows()  # already computed if the tables are rebuilt

    # ---- what a step may have left in flight ------------------------------------------------------------------------

    def _make_side(self) -> SideStream | None:
        return SideStream(self.device) if self._on_gpu and wanted() else None

    def _keep(self, *tensors: Tensor) -> None:
        """Memory that the second stage touches."""
        if self._side is not None:
            self._side.keep(*tensors)

    def _join(self) -> None:
        """Have the current stream wait for the second stages so far.

        A stream that captures must not wait for what is not captured. It need not: torch.cuda.graph waits for the
        device before a capture begins.
        """
        if self._side is not None and not self._capturing():
            self._side.join()

    def _aside(self, on_device: OnDevice) -> SideStream | None:
        """The stream for a step's second stage, None: the current one.

        The current one if nothing is measured, which takes too little time; if there is a found_inf, which is read in
        memory that is not the engine's; and from the first capture on: replays are not seen here, so they cannot join.
        """
        if self._captured or self._capturing() or on_device.found_inf is not None or len(self._tables.spans) == 0:
            return None
        return self._side

    @property
    def measurement(self) -> Measurement:
        self._join()
        return super().measurement

    @property
    def ages(self) -> Sequence[int] | Tensor:
        self._join()
        return self._known_ages if self.rule.step_key is None else ()

    def _make_inputs(self) -> None:
        """Make the inputs' memory on both sides, with room for as many rows as there are now."""
        addresses, (n_rows, n_numbers) = self._addresses, self._rows.numbers.shape
        self._shape = InputsShape(*addresses.shape, len(self._rows.groups), n_rows, n_numbers)
        # The host's side, whose addresses TableEngine fills in place.
        self._host = DeviceInputs.empty(self._shape, torch.device("cpu"))
        self._addresses = self._host.addresses.numpy().view(np.uint64)
        self._addresses[:] = addresses
        self._host.ages[:] = 1
        self.inputs = DeviceInputs.empty(self._shape, self.device)  # of an engine on the CPU
        self._keep(self.inputs.block)
        self._ring = [self._slot() for _ in range(RING)] if self._on_gpu else []
        self._turn = 0
        self._held = b""  # the contents of the current slot
        self._sent = b""  # the same, once its launches are known; empty: the next inputs are always sent
        self._spare: list[Slot] = []  # for CUDA graphs to come

    def _ranges_by_dtype(self) -> list[tuple[int, int, int]]:
        """(dtype, first tile, last tile + 1) of each dtype."""
        t = self._tables
        codes = t.tensors["dtype"][t.tiles["tensor"]] if len(t.tiles) else np.zeros(0, np.int32)
        return [
            (int(code), int(np.searchsorted(codes, code)), int(np.searchsorted(codes, code, "right")))
            for code in sorted({*codes.tolist()}, key=codes.tolist().index)
        ]

    # ---- what crosses to the device ---------------------------------------------------------------------------------

    def _capturing(self) -> bool:
        return self._on_gpu and torch.cuda.is_current_stream_capturing()

    def _refuse_capture(self, what: str, instead: str = "make a step like the captured one before the capture") -> None:
        if self._capturing():
            raise RuntimeError(f"noetherperf has to {what}, which cannot be captured in a CUDA graph; {instead}")

    def _slot(self) -> Slot:
        slot = Slot(self._shape, self.device, self._stream)
        self._keep(slot.inputs.block)
        return slot

    def _send(self) -> tuple[DeviceInputs, bool]:
        """Queue a copy of the host's inputs to the device, if they changed.

        Returns:
            The inputs on the device, ready when kernels run; and whether they changed.
        """
        if not self._on_gpu:
            self.inputs.block.copy_(self._host.block)
            self._find_rows(self.inputs)
            return self.inputs, True
        if self._capturing():  # each replay copies what the pinned block holds, so the slot belongs to the graph alone
            if not self._spare:
                self._refuse_capture("prepare memory for one more graph")
            slot = self._spare.pop()
            self._captured.append(slot)
            slot.pinned.copy_(self._host.block)
            slot.inputs.block.copy_(slot.pinned, non_blocking=True)
            self._find_rows(slot.inputs)
            self._held = self._sent = b""
            return slot.inputs, True
        while len(self._spare) < RING:
            self._spare.append(self._slot())
        block = self._host.block.numpy().tobytes()
        is_new = block != self._sent
        if is_new:
            self._sent = b""
            self._ring[self._turn].read.record()
            self._turn = (self._turn + 1) % RING
            self._ring[self._turn].send(self._host.block)
            self._held = block
        inputs = self._ring[self._turn].inputs
        self._find_rows(inputs)
        return inputs, is_new

    def _find_rows(self, inputs: DeviceInputs) -> None:
        """Queue the computation of rows from numbers on the device, which may have changed there."""
        if self._counts is not None:
            self._rows.fill_own(self._counts, self._lrs, inputs.rows)
            return
        for group, lr in enumerate(self._lrs):
            if lr is not None:
                self._rows.find_on_device(group, lr, inputs.rows)

    def _lay_out(self, i: int, column: int, x: Tensor) -> None:
        tensor = self._tables.tensors[i : i + 1]
        dims = self._tables.dims[tensor["dims"][0] :][: x.dim()]
        before = tensor.tobytes(), dims.tobytes()
        super()._lay_out(i, column, x)
        self._layouts_changed |= before != (tensor.tobytes(), dims.tobytes())

    def _send_layouts(self) -> None:
        """Copy the tables to the device again if the strides of a gradient or buffer changed."""
        if self._layouts_changed:
            self._refuse_capture("take over a gradient's or buffer's new layout")
            self.tensors.copy_(_words(self._tables.tensors))
            self.dims.copy_(_words(self._tables.dims))
            self._layouts_changed = False

    def _is_current(self) -> bool:
        return not self._on_gpu or torch.cuda.current_device() == self.device.index

    def _as_current(self) -> AbstractContextManager[object]:
        """Make this engine's device the current one, on whose current stream kernels are queued."""
        return nullcontext() if self._is_current() else torch.cuda.device(self.device)

    def _carry_out_here(self, calls: Sequence[Call]) -> None:
        with self._as_current():
            carry_out(calls)

    # ---- the step ---------------------------------------------------------------------------------------------------

    def prepare_to_measure(self, buffers: Sequence[Sequence[Tensor | None]]) -> list[Call]:
        self._refuse_capture("begin to measure")
        self._join()
        self._admit_to_measure(buffers)
        self._send_layouts()
        self._host.scalars.zero_()
        self._lrs, self._counts = (), None
        launches = [Launch(dtype, MEASURE, begin, end) for dtype, begin, end in self._dtype_ranges]
        with self._as_current():
            calls = self._launch(launches, self._send()[0], measuring=True, scaled=False, aside=None)
        self._sent = b""  # the next step has other launches, even with the same inputs
        return calls if self._is_current() else [partial(self._carry_out_here, calls)]

    def prepare(
        self,
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: Sequence[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> list[Call]:
        if 0 in ages:
            self._refuse_capture("make a tensor's buffers")
        self._join()
        self._admit_buffers(buffers)
        self._send_layouts()
        if self.rule.step_key is None:
            self._host.ages.numpy()[:] = np.frombuffer(bytes(ages), np.uint8)
            self._rows.find(options, range(self.rule.n_ages))
        elif on_device.counts is not None:
            self._rows.make_own(options, self.device)
        else:
            self._refuse_capture("count steps on the host", "set capturable=True in all parameter groups")
            self._rows.find_counted(options, ages, self._addresses[:, GRADIENT])
        if self._taken is not self._rows.numbers:
            self._take_rows()
        for lr in on_device.lrs:
            self._check_lr(lr)
        self._lrs, self._counts = on_device.lrs, on_device.counts
        scaled = on_device.grad_scale is not None
        self._host.scalars[0] = self._float32("grad_scale", on_device.grad_scale)
        self._host.scalars[1] = self._float32("found_inf", on_device.found_inf)
        with self._as_current():
            inputs, is_new = self._send()
            launches = self._launches() if is_new else self._launches_for[1]
            self._sent = self._held
            aside = self._aside(on_device)
            calls = self._launch(launches, inputs, measuring=False, scaled=scaled, aside=aside)
        return calls if self._is_current() else [partial(self._carry_out_here, calls)]

    def _take_rows(self) -> None:
        rows = self._rows
        if len(rows.numbers) > self._shape.n_rows:
            self._refuse_capture("make room for tensors of one more age")
            self._make_inputs()
        self._host.rows[: len(rows.numbers)] = torch.from_numpy(rows.numbers)
        self._host.groups.copy_(_words(rows.groups))
        self._host.first.copy_(torch.from_numpy(rows.first))
        self._taken = rows.numbers

    def _launches(self) -> list[Launch]:
        """Stage 1's kernels: one for each dtype and variant that occur."""
        of_group = self._rows.groups["variant"]
        part, buffer = self._addresses[:, GRADIENT] != 0, self._addresses[:, BUFFER] != 0
        key = of_group.tobytes() + part.tobytes() + buffer.tobytes()
        if key != self._launches_for[0]:
            t = self._tables.tensors
            variants = of_group[t["group"]]
            for variant, idle in self.rule.idle.items():
                variants = np.where((variants == variant) & buffer & (t["n_views"] > 0), idle, variants)
            here = part & (self._tile_counts > 0)
            occur = sorted({*zip(t["dtype"][here].tolist(), variants[here].tolist(), strict=True)})
            ranges = {dtype: (begin, end) for dtype, begin, end in self._dtype_ranges}
            self._launches_for = (key, [Launch(dtype, variant, *ranges[dtype]) for dtype, variant in occur])
        return self._launches_for[1]

    def _check_lr(self, lr: Tensor | None) -> None:
        if lr is not None and (lr.device != self.device or lr.dtype not in (torch.float32, torch.float64)):
            raise TypeError(
                f"lr is a tensor ({lr.dtype} on {lr.device}); beside parameters on {self.device} a learning rate that "
                "the host does not read must be a float32 or float64 tensor there"
            )

    def _float32(self, name: str, x: Tensor | None) -> int:
        if x is None:
            return 0
        if x.device != self.device or x.dtype != torch.float32:
            raise TypeError(f"{name} is {x.dtype} on {x.device}; it must be a float32 tensor on {self.device}")
        return x.data_ptr()

    def _launch(
        self,
        launches: Sequence[Launch],
        inputs: DeviceInputs,
        *,
        measuring: bool,
        scaled: bool,
        aside: SideStream | None,
    ) -> list[Call]:
        """The calls that queue both stages on the device's current stream, or the second one aside.

        Args:
            launches: Stage 1's kernels, in any order; may be none.
            inputs: The inputs of the step, on the device.
            measuring: Only take moments of all tensors (MEASURE): stage 2 advances neither laws, clock nor ages.
            scaled: Gradients are divided by grad_scale first, and stored divided.
            aside: The stream of the second stage, if it is not the current one.
        """
        raise NotImplementedError


def _words(table: np.ndarray) -> Tensor:
    """A table's bytes as int64; one word at least, so that there is an address."""
    return torch.from_numpy(np.frombuffer(table.tobytes() or bytes(8), np.int64).copy())
