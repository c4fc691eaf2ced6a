"""Dtypes of parameters: the type in memory, the type of the arithmetic, and the rounding from one to the other."""

import triton
import triton.language as tl

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = (tl.constexpr(i) for i in range(4))

# The interpreter truncates where a GPU rounds.
CUTS_BFLOAT16 = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def element(dtype):
    """The type in memory."""
    return (tl.float32, tl.float64, tl.bfloat16, tl.float16)[dtype]


@triton.constexpr_function
def scalar(dtype):
    """The type of the arithmetic, and of sums inside a tile."""
    return tl.float64 if dtype == 1 else tl.float32


@triton.constexpr_function
def vector(dtype):
    """Elements in 16 bytes."""
    return (4, 2, 8, 8)[dtype]


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x as it is stored: rounded to the nearest, ties to even."""
    if DTYPE == BFLOAT16 and CUTS_BFLOAT16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(element(DTYPE))
