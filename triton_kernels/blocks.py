"""Blocks: [R, C] elements of a tensor's matrix, which a program of stage 1 loads, steps and stores at once.

A block consists of 16-byte vectors, one per thread. C is 32 lanes of vectors, so that a warp's loads along a row are
coalesced, or 8 lanes in narrow matrices.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from noetherperf.triton_kernels.dtypes import narrow, scalar, vector
from noetherperf.triton_kernels.moments import Operands, products
from noetherperf.triton_kernels.plan import N_DIM_WORDS

# How a tile's elements are addressed.
BY_VECTORS, BY_ELEMENTS, BY_STRIDES = (tl.constexpr(i) for i in range(3))


class Matrix(NamedTuple):
    """One tensor's parameter, gradient and momentum buffer; v is null where there is none."""

    p: tl.tensor
    g: tl.tensor
    v: tl.tensor
    dims: tl.tensor
    n_dims: tl.tensor


@triton.constexpr_function
def n_threads(dtype):
    """Threads of a program of stage 1; fewer for longer vectors, so that registers are allocated in smaller pieces."""
    return 64 if vector(dtype) == 8 else 128


@triton.constexpr_function
def block_rows(dtype, narrow):
    """R of a block: one vector a thread."""
    return n_threads(dtype) // (8 if narrow else 32)


@triton.constexpr_function
def block_cols(dtype, narrow):
    """C of a block."""
    return (8 if narrow else 32) * vector(dtype)


@triton.jit
def pointers(x, rows, cols, n_cols, WAY: tl.constexpr):
    """Pointers [R, C] to the elements at rows [R] and cols [C] of the matrix in p, g and v."""
    if WAY == BY_STRIDES:
        linear = rows[:, None] * n_cols + cols[None, :]
        p = linear * 0
        g = linear * 0
        v = linear * 0
        for d in range(x.n_dims - 1, -1, -1):
            dim = x.dims + d * N_DIM_WORDS
            size = tl.load(dim)
            index = linear % size
            linear = linear // size
            p += index * tl.load(dim + 1)
            g += index * tl.load(dim + 2)
            v += index * tl.load(dim + 3)
        return x.p + p, x.g + g, x.v + v
    else:
        at = (rows * n_cols)[:, None] + cols[None, :]
        return x.p + at, x.g + at, x.v + at


@triton.jit
def load(ptr, mask, S: tl.constexpr):
    if mask is None:
        return tl.load(ptr).to(S)
    else:
        return tl.load(ptr, mask, 0.0).to(S)


@triton.jit
def step_block(
    x,
    rows,
    cols,
    n_cols,
    mask,
    c,
    scale,
    DTYPE: tl.constexpr,
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    WAY: tl.constexpr,
):
    """Steps one block; returns what its elements add to the moments, [R, C]."""
    S: tl.constexpr = scalar(DTYPE)
    p_ptr, g_ptr, v_ptr = pointers(x, rows, cols, n_cols, WAY)
    p = load(p_ptr, mask, S)
    if STEP.updates:
        g = load(g_ptr, mask, S)
        v = load(v_ptr, mask, S) if STEP.reads_buffer else tl.zeros_like(p)
        if STEP.scaled:
            g = g / scale
            tl.store(g_ptr, narrow(g, DTYPE), mask)
        p_new, v_new, u = UPDATE(p, g, v, c, STEP.variant)
        stored = narrow(p_new, DTYPE)
        tl.store(p_ptr, stored, mask)
        if STEP.writes_buffer:
            tl.store(v_ptr, narrow(v_new, DTYPE), mask)
        return products(Operands(p, stored.to(S), g, u, v_new), STEP)
    else:
        v = load(v_ptr, mask, S)
        zero = tl.zeros_like(p)
        return products(Operands(p, p, v, zero, zero), STEP)
