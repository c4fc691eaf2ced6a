"""A stream beside the current one, for work whose results nobody needs before the next step.

With NOETHERPERF_SIDE_STREAM=1 a GPU engine queues the second stage of measured steps there: it runs while the current
stream goes on with the next forward pass. The default is to queue both stages on the current stream.

The rule is: the side stream's work touches only memory of the engine, and whoever touches that memory afterwards joins
first. GpuEngine keeps it in two places. A step and a pass that measures join before they write anything. All others
reach the memory through GpuEngine.measurement and GpuEngine.ages, which join. A join is a wait on the device, not of
the host. By the time of the next step the work is long finished, so partial sums need no second buffer.

Memory is freed in the order of the stream that it was allocated on. `keep` tells the allocator of the side stream once
(Tensor.record_stream), so an engine that is dropped with work in flight keeps its memory until that work is finished.
"""

import os
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from noetherperf.engines import Call

__all__ = ["VARIABLE", "SideStream", "wanted"]

#: The environment variable that asks for a side stream.
VARIABLE = "NOETHERPERF_SIDE_STREAM"


def wanted() -> bool:
    """Whether NOETHERPERF_SIDE_STREAM asks for a side stream.

    Raises:
        ValueError: It is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"{VARIABLE}={value!r} must be 1 (the second stage on a stream of its own) or 0 (the default)")
    return value == "1"


class SideStream:
    """One side stream of an engine.

    Args:
        device: The engine's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._forked, self._finished = torch.cuda.Event(), torch.cuda.Event()

    @property
    def address(self) -> int:
        """The stream as compiled code takes it."""
        return self._stream.cuda_stream

    def here(self) -> AbstractContextManager[object]:
        """Makes it the current stream."""
        return torch.cuda.stream(self._stream)

    def keep(self, *tensors: Tensor) -> None:
        """Memory that the work touches: when freed, it is reused only after the work then in flight."""
        for x in tensors:
            x.record_stream(self._stream)

    def fork(self, work: list[Call]) -> list[Call]:
        """The calls that queue work, which itself queues on this stream, after all that the current stream has then."""
        # Of the base class, in compiled code: no Python instruction lies between two calls of a step.
        record, wait = torch._C._CudaEventBase.record, torch._C._CudaEventBase.wait
        here = torch.cuda.current_stream(self._device)
        return [
            partial(record, self._forked, here),
            partial(wait, self._forked, self._stream),
            *work,
            partial(record, self._finished, self._stream),
        ]

    def join(self) -> None:
        """Have the current stream wait for all work queued so far."""
        self._finished.wait(torch.cuda.current_stream(self._device))
