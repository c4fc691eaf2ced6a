"""A step's inputs on a GPU: their layout in one block of bytes, and the memory that the block is copied through."""

from math import prod

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines.rows import GROUP


class DeviceInputs:
    """The inputs of one step, as views of one block of bytes.

    Args:
        block: The bytes.
        n_tensors: The number of tensors.
        rows: Shape of the rows.

    Fields:
        block: All of it, uint8.
        scalars: [2] int64: addresses of the float32 grad_scale and found_inf; null: 1 and 0.
        rows: [n_groups, n_ages, n_numbers] float64 (rows.py). If a group's learning rate is on the device, its rows are
            computed there later.
        groups: [n_groups] of GROUP, as int64 words.
        addresses: [n_tensors, 3] int64: parameter, gradient, momentum buffer; null where it takes no part or has none.
        ages: [n_tensors] uint8: 0 if the tensor's buffers are new.
        pointers: The address of each of them.
    """

    def __init__(self, block: Tensor, n_tensors: int, rows: tuple[int, ...]) -> None:
        self.block = block
        sizes = self._sizes(n_tensors, rows)
        ends = np.cumsum(sizes).tolist()
        parts = [block[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.scalars = parts[0].view(torch.int64)
        self.rows = parts[1].view(torch.float64).view(rows)
        self.groups = parts[2].view(torch.int64)
        self.addresses = parts[3].view(torch.int64).view(n_tensors, 3)
        self.ages = parts[4]
        names = ("scalars", "rows", "groups", "addresses", "ages")
        self.pointers = {name: getattr(self, name).data_ptr() for name in names}

    @staticmethod
    def _sizes(n_tensors: int, rows: tuple[int, ...]) -> list[int]:
        return [16, 8 * prod(rows), GROUP.itemsize * rows[0], 24 * n_tensors, n_tensors]

    @classmethod
    def empty(cls, n_tensors: int, rows: tuple[int, ...], device: torch.device, pinned: bool = False) -> "DeviceInputs":
        """Zeros: no addresses."""
        n_bytes = sum(cls._sizes(n_tensors, rows))
        return cls(torch.zeros(n_bytes, dtype=torch.uint8, device=device, pin_memory=pinned), n_tensors, rows)


class Slot:
    """A buffer on the host and one on the device for inputs in flight. An engine uses its slots in turn.

    Args:
        n_tensors, rows: Of the inputs.
        device: The destination.
        stream: The stream of the copies; the same for all slots.

    Fields:
        pinned: The source of the copy, in pinned memory.
        inputs: The inputs on the device.
        sent: An event after the copy.
        read: An event after the last kernel that reads the inputs.
    """

    def __init__(self, n_tensors: int, rows: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self.inputs = DeviceInputs.empty(n_tensors, rows, device)
        stream.wait_stream(torch.cuda.current_stream(device))  # earlier kernels may still use this memory
        self.pinned = torch.empty(self.inputs.block.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.sent, self.read = torch.cuda.Event(), torch.cuda.Event()

    def send(self, block: Tensor) -> None:
        """Copy a block to the device on the ring's stream; the current stream waits for it."""
        self.read.synchronize()  # returns at once, unless the host is a whole ring ahead
        self.pinned.copy_(block)
        with torch.cuda.stream(self._stream):
            self.inputs.block.copy_(self.pinned, non_blocking=True)
            self.sent.record()
        self.sent.wait()
