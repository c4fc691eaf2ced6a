"""Blocks: [R, C] elements of a tensor's matrix, which a program of stage 1 loads, steps and stores at once.

A block consists of 16-byte vectors, one per thread. C is 32 lanes of vectors, so that a warp's loads along a row are
coalesced, or 8 lanes in narrow matrices. Where elements are addressed one by one, a thread has fewer of them: their
addresses take the registers.
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
    """One tensor: pointers to parameter, gradient and the buffers that the step reads, and its rows of the dims."""

    places: tuple[tl.tensor, ...]
    dims: tl.tensor
    n_dims: tl.tensor


@triton.constexpr_function
def n_threads(dtype):
    """Threads of a program of stage 1; fewer for longer vectors, so that registers are allocated in smaller pieces."""
    return 64 if vector(dtype) == 8 else 128


@triton.constexpr_function
def n_together(dtype, way):
    """Neighbours in a row that one thread has: a vector, if there are any."""
    return vector(dtype) if way == BY_VECTORS.value else 1


@triton.constexpr_function
def block_size(dtype, way):
    """Elements of a block."""
    return n_threads(dtype) * (vector(dtype) if way == BY_VECTORS.value else min(2, vector(dtype) // 2))


@triton.constexpr_function
def block_cols(dtype, narrow, way=BY_VECTORS):
    """C of a block; all of it where elements come one by one, because sums of many rows take registers too."""
    if narrow:
        return 8 * vector(dtype)
    return 32 * vector(dtype) if way == BY_VECTORS.value else block_size(dtype, way)


@triton.constexpr_function
def block_rows(dtype, narrow, way):
    """R of a block."""
    return block_size(dtype, way) // block_cols(dtype, narrow, way)


@triton.jit
def advanced(places, index, dim, N: tl.constexpr):
    """N pointers, each moved by an index of a dim, times its own stride."""
    moved = ()
    for i in tl.static_range(N):
        moved = moved + (places[i] + index * tl.load(dim + 1 + i),)
    return moved


@triton.jit
def pointers(x, rows, cols, n_cols, N: tl.constexpr, WAY: tl.constexpr):
    """Pointers [R, C] to the elements at rows [R] and cols [C] of the matrix, in each of N places."""
    linear = (rows * n_cols)[:, None] + cols[None, :]
    at = ()
    if WAY == BY_STRIDES:
        for i in tl.static_range(N):
            at = at + (x.places[i] + linear * 0,)
        for d in range(x.n_dims - 1, -1, -1):
            dim = x.dims + d * N_DIM_WORDS
            size = tl.load(dim)
            at = advanced(at, linear % size, dim, N)
            linear = linear // size
    else:
        for i in tl.static_range(N):
            at = at + (x.places[i] + linear,)
    return at


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
    N_READ: tl.constexpr = STEP.n_read
    N_WRITTEN: tl.constexpr = STEP.n_written
    ptrs = pointers(x, rows, cols, n_cols, 2 + N_READ, WAY)
    p = load(ptrs[0], mask, S)
    zero = tl.zeros_like(p)
    buffers = ()
    for i in tl.static_range(N_READ):
        buffers = buffers + (load(ptrs[2 + i], mask, S),)
    if STEP.updates:
        g = load(ptrs[1], mask, S)
        if STEP.scaled:
            g = g / scale
            tl.store(ptrs[1], narrow(g, DTYPE), mask)
        p_new, buffers, u = UPDATE(p, g, buffers, c, STEP.variant)
        if STEP.divides and mask is not None:
            p_new, u = tl.where(mask, p_new, 0.0), tl.where(mask, u, 0.0)
        stored = narrow(p_new, DTYPE)
        tl.store(ptrs[0], stored, mask)
        for i in tl.static_range(N_WRITTEN):
            tl.store(ptrs[2 + i], narrow(buffers[i], DTYPE), mask)
        return products(Operands(p, stored.to(S), g, u, buffers[0] if N_READ > 0 else zero), STEP)
    else:
        return products(Operands(p, p, buffers[0], zero, zero), STEP)
