"""A step's inputs on a GPU: their layout in one block of bytes, and the memory that the block is copied through."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines.rows import GROUP


class InputsShape(NamedTuple):
    """The lengths of a step's inputs.

    Attributes:
        n_tensors, n_columns: Tensors, and addresses of each.
        n_groups: Parameter groups.
        n_rows, n_numbers: Rows of numbers, and numbers of each.
    """

    n_tensors: int
    n_columns: int
    n_groups: int
    n_rows: int
    n_numbers: int

    @property
    def sizes(self) -> list[int]:
        """The bytes of each part, in the order of DeviceInputs' fields; the longest items first, so that all are
        aligned."""
        return [
            16,
            8 * self.n_rows * self.n_numbers,
            GROUP.itemsize * self.n_groups,
            8 * self.n_tensors * self.n_columns,
            4 * self.n_tensors,
            self.n_tensors,
        ]


class DeviceInputs:
    """The inputs of one step, as views of one block of bytes.

    Args:
        block: The bytes.
        shape: Its parts' lengths.

    Attributes:
        block: All of it, uint8.
        scalars: [2] int64: addresses of the float32 grad_scale and found_inf; null: 1 and 0.
        rows: [n_rows, n_numbers] float64 (rows.py). If a group's learning rate is on the device, its rows are computed
            there later.
        groups: [n_groups] of GROUP, as int64 words.
        addresses: [n_tensors, n_columns] int64: parameter, gradient, buffers; null where it takes no part or has none.
        first: [n_tensors] int32: each tensor's row of age 0.
        ages: [n_tensors] uint8: 0 if the tensor's buffers are new.
        pointers: The address of each of them.
    """

    def __init__(self, block: Tensor, shape: InputsShape) -> None:
        self.block = block
        sizes = shape.sizes
        ends = np.cumsum(sizes).tolist()
        parts = [block[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        self.scalars = parts[0].view(torch.int64)
        self.rows = parts[1].view(torch.float64).view(shape.n_rows, shape.n_numbers)
        self.groups = parts[2].view(torch.int64)
        self.addresses = parts[3].view(torch.int64).view(shape.n_tensors, shape.n_columns)
        self.first = parts[4].view(torch.int32)
        self.ages = parts[5]
        names = ("scalars", "rows", "groups", "addresses", "first", "ages")
        self.pointers = {name: getattr(self, name).data_ptr() for name in names}

    @classmethod
    def empty(cls, shape: InputsShape, device: torch.device) -> "DeviceInputs":
        """Zeros: no addresses."""
        return cls(torch.zeros(sum(shape.sizes), dtype=torch.uint8, device=device), shape)


class Slot:
    """A buffer on the host and one on the device for inputs in flight. An engine uses its slots in turn.

    Args:
        shape: Of the inputs.
        device: The destination.
        stream: The stream of the copies; the same for all slots.

    Attributes:
        pinned: The source of the copy, in pinned memory.
        inputs: The inputs on the device.
        sent: An event after the copy.
        read: An event after the last kernel that reads the inputs.
    """

    def __init__(self, shape: InputsShape, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self.inputs = DeviceInputs.empty(shape, device)
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
