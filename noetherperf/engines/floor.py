"""The memory's floor: a call that moves as many bytes as a step and computes almost nothing."""

from collections.abc import Callable

import torch
from torch import Tensor

from noetherperf import _cpu


def memory_floor(p: Tensor, g: Tensor, v: Tensor, n_threads: int) -> Callable[[], None]:
    """A call that reads three streams and writes p and v in place.

    Args:
        p, g, v: Float32 on the CPU, contiguous, of one length, [n]; v may be p, which leaves two streams to read and
            one to write: a step without momentum.
        n_threads: The number of threads of the call.

    Raises:
        ValueError: A stream of another dtype, device, layout or length.
    """
    for name, x in (("p", p), ("g", g), ("v", v)):
        if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous() or x.shape != (len(p),):
            raise ValueError(
                f"{name} must be contiguous float32 on the CPU of p's length, for the floor's streams are read as "
                f"such; it is {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    n = len(p)
    # it holds the tensors, so that their memory lives as long as the call
    return lambda: _cpu.memory_floor(p.data_ptr(), g.data_ptr(), v.data_ptr(), n, n_threads)
