"""The memory's floor: a call that moves as many bytes as a step and computes almost nothing."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from noetherperf import _cpu

MOST_STREAMS = 5


def memory_floor(streams: Sequence[Tensor] | Tensor, n_written: int, n_threads: int) -> Callable[[], None]:
    """A call that reads all streams and writes the first n_written of them in place.

    A step with momentum reads three (p, v, g) and writes two; AdamW reads four (p, m, n, g) and writes three.

    Args:
        streams: Two to five tensors of one length [n], or the rows of one: float32 on the CPU, contiguous.
        n_written: At least 1, less than there are streams.
        n_threads: The number of threads of the call.

    Raises:
        ValueError: A stream of another dtype, device, layout or length; fewer or more streams.
    """
    streams = list(streams)
    if not 2 <= len(streams) <= MOST_STREAMS or not 1 <= n_written < len(streams):
        raise ValueError(
            f"the floor has loops for 2 to {MOST_STREAMS} streams, of which all but the last may be written; it was "
            f"asked for {len(streams)}, {n_written} of them written"
        )
    n = len(streams[0])
    for k, x in enumerate(streams):
        if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() or x.shape != (n,):
            raise ValueError(
                f"stream {k} must be contiguous float32 on the CPU of the first one's length, for the floor reads it "
                f"as such; it is {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    # it holds the tensors, so that their memory lives as long as the call
    return lambda: _cpu.memory_floor([x.data_ptr() for x in streams], n_written, n, n_threads)
