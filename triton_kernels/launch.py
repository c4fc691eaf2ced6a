"""The two stages of a step: kernels over tiles, then over spans, and the functions that queue them.

Stage 1. A program steps one tile and writes the sums of its rows and columns to the workspace (engines/tiling.py,
"GPU"). It walks the tile in blocks [R, C] of 16-byte vectors: C is 32 lanes of vectors, so that a warp lies along a
row, or 8 lanes in matrices that are narrower. What a tile sums decides the order of the walk: only rows, and columns
are walked inside, with one reduction a row; columns too, and rows are walked inside, with sums of columns in registers
and a reduction of each block's rows. A single row, or a tensor without views, is walked as one contiguous run.

Stage 2. A program takes some segments of one view, adds their slices and lines in a fixed order in float64, and
advances their laws. The first also advances the clock.

A tensor is walked in vectors where its addresses and rows are multiples of 16 bytes, element by element where not, and
through its strides where it is no matrix in memory.
"""

from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from noetherperf.triton_kernels.laws import (
    advance_norm,
    advance_translation,
    coefficients,
    duration,
    mode_of,
    propagate_all,
    transitions,
)
from noetherperf.triton_kernels.plan import (
    load_hyper,
    load_hyper_number,
    load_momentum,
    load_span,
    load_tensor,
    load_tile,
    load_view,
)
from noetherperf.triton_kernels.step import (
    FLOAT64,
    MEASURE,
    N_MOMENTS,
    NESTEROV,
    STALE,
    Coefficients,
    Moments,
    accumulate,
    element,
    n_accumulated,
    narrow,
    products,
    reads_buffer,
    scalar,
    update,
    writes_buffer,
)

# What tiles sum; a kernel is compiled for the kinds that occur.
RUNS, ROWS, COLUMNS, BOTH, WIDE, NARROW, STRIDED, VIEWED = (tl.constexpr(1 << i) for i in range(8))

# How a tile's elements are reached.
BY_VECTORS, BY_ELEMENTS, BY_STRIDES = (tl.constexpr(i) for i in range(3))

N_THREADS = tl.constexpr(128)  # of a program of stage 2
# Segments of a program of stage 2, where each has many terms or few; noetherperf.engines.tiling.TRITON.span_segments.
SHORT_SPAN, LONG_SPAN = tl.constexpr(32), tl.constexpr(128)
FLAGS = tl.constexpr(128)  # of fresh buffers, that a program looks after at once
FEW = tl.constexpr(4)  # a view with so few segments has many terms for each


@triton.constexpr_function
def occurs(kinds, kind):
    return kinds & kind != 0


@triton.constexpr_function
def vector(dtype):
    """Elements in 16 bytes."""
    return (4, 2, 8, 8)[dtype]


@triton.constexpr_function
def n_threads(dtype):
    """Of a program of stage 1; fewer for longer vectors, so that registers are shared out in smaller pieces."""
    return 64 if vector(dtype) == 8 else 128


@triton.constexpr_function
def block_rows(dtype, narrow):
    """R of a block: one vector a thread."""
    return n_threads(dtype) // (8 if narrow else 32)


@triton.constexpr_function
def block_cols(dtype, narrow):
    """C of a block."""
    return (8 if narrow else 32) * vector(dtype)


class Operands(NamedTuple):
    """One tensor's parameter, gradient and momentum buffer; v is null where there is none."""

    p: tl.tensor
    g: tl.tensor
    v: tl.tensor
    dims: tl.tensor
    n_dims: tl.tensor


# ---- blocks ----------------------------------------------------------------------------------------------------------


@triton.jit
def pointers(x, rows, cols, n_cols, WAY: tl.constexpr):
    """Pointers [R, C] to the elements at rows [R] and cols [C] of the matrix in p, g and v."""
    if WAY == BY_STRIDES:
        linear = rows[:, None] * n_cols + cols[None, :]
        p = linear * 0
        g = linear * 0
        v = linear * 0
        for d in range(x.n_dims - 1, -1, -1):
            dim = x.dims + d * 4
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
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    WAY: tl.constexpr,
):
    """Steps one block; what its elements add to the moments, [R, C]."""
    S: tl.constexpr = scalar(DTYPE)
    p_ptr, g_ptr, v_ptr = pointers(x, rows, cols, n_cols, WAY)
    p = load(p_ptr, mask, S)
    if MODE == MEASURE:
        v = load(v_ptr, mask, S)
        zero = tl.zeros_like(p)
        return products(p, p, v, zero, zero, MODE)
    else:
        g = load(g_ptr, mask, S)
        v = load(v_ptr, mask, S) if reads_buffer(MODE) else tl.zeros_like(p)
        if SCALED:
            g = g / scale
            tl.store(g_ptr, narrow(g, DTYPE), mask)
        p_new, v_new, u = update(p, g, v, c, MODE)
        stored = narrow(p_new, DTYPE)
        tl.store(p_ptr, stored, mask)
        if writes_buffer(MODE):
            tl.store(v_ptr, narrow(v_new, DTYPE), mask)
        return products(stored.to(S), p, g, u, v_new, MODE)


@triton.jit
def zeros(R: tl.constexpr, C: tl.constexpr, S: tl.constexpr):
    z = tl.zeros([R, C], S)
    return Moments(z, z, z, z, z, z, z, z)


@triton.jit
def side_by_side(a, b, c, d, e, f, g, h):
    """Eight vectors [R] as one [R, 8], so that they leave by one store: joins put the last pair outermost."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [a.shape[0], 8])


@triton.jit
def sums_along(m, AXIS: tl.constexpr, MODE: tl.constexpr):
    """Moments summed along an axis; those that a mode does not accumulate mean nothing."""
    sum_p = tl.sum(m.sum_p, AXIS)
    dot_uv = tl.sum(m.dot_uv, AXIS) if n_accumulated(MODE) > 6 else sum_p
    dot_gu = tl.sum(m.dot_gu, AXIS) if n_accumulated(MODE) > 7 else sum_p
    return Moments(
        sum_p,
        tl.sum(m.sq_p, AXIS),
        tl.sum(m.sum_g, AXIS),
        tl.sum(m.sq_g, AXIS),
        tl.sum(m.dot_pg, AXIS),
        tl.sum(m.sq_u, AXIS),
        dot_uv,
        dot_gu,
    )


@triton.jit
def sums_of_vectors(m, V: tl.constexpr, MODE: tl.constexpr):
    """Moments [R, C] summed over each V columns, [R, C / V]: what a thread holds, so no thread waits for another."""
    SHAPE: tl.constexpr = [m.sum_p.shape[0], m.sum_p.shape[1] // V, V]
    sum_p = tl.sum(tl.reshape(m.sum_p, SHAPE), 2)
    dot_uv = tl.sum(tl.reshape(m.dot_uv, SHAPE), 2) if n_accumulated(MODE) > 6 else sum_p
    dot_gu = tl.sum(tl.reshape(m.dot_gu, SHAPE), 2) if n_accumulated(MODE) > 7 else sum_p
    return Moments(
        sum_p,
        tl.sum(tl.reshape(m.sq_p, SHAPE), 2),
        tl.sum(tl.reshape(m.sum_g, SHAPE), 2),
        tl.sum(tl.reshape(m.sq_g, SHAPE), 2),
        tl.sum(tl.reshape(m.dot_pg, SHAPE), 2),
        tl.sum(tl.reshape(m.sq_u, SHAPE), 2),
        dot_uv,
        dot_gu,
    )


@triton.jit
def store_rows(slice_ptr, m, rows, row_end, n_rows, again, MODE: tl.constexpr):
    """Writes the sums [R] of rows to a slice [N_MOMENTS, n_rows]; adds them to it where `again` says it holds some."""
    which = tl.arange(0, 8)
    ptr = slice_ptr + which[None, :] * n_rows + rows[:, None]
    mask = (rows < row_end)[:, None] & (which < n_accumulated(MODE))[None, :]
    sums = side_by_side(m.sum_p, m.sq_p, m.sum_g, m.sq_g, m.dot_pg, m.sq_u, m.dot_uv, m.dot_gu)
    tl.store(ptr, sums + tl.load(ptr, mask & again, 0.0), mask)


@triton.jit
def store_run(slice_ptr, m, MODE: tl.constexpr):
    """Writes the sum of a run, from sums [R] of its rows, to a slice [N_MOMENTS, 1]."""
    which = tl.arange(0, 8)
    sums = side_by_side(m.sum_p, m.sq_p, m.sum_g, m.sq_g, m.dot_pg, m.sq_u, m.dot_uv, m.dot_gu)
    tl.store(slice_ptr + which, tl.sum(sums, 0), which < n_accumulated(MODE))


@triton.jit
def store_columns(slice_ptr, m, cols, col_end, n_cols, MODE: tl.constexpr):
    """Writes the sums [C] of columns to a slice [N_MOMENTS, n_cols]."""
    ptr = slice_ptr + cols
    mask = cols < col_end
    tl.store(ptr, m.sum_p, mask)
    tl.store(ptr + n_cols, m.sq_p, mask)
    tl.store(ptr + 2 * n_cols, m.sum_g, mask)
    tl.store(ptr + 3 * n_cols, m.sq_g, mask)
    tl.store(ptr + 4 * n_cols, m.dot_pg, mask)
    tl.store(ptr + 5 * n_cols, m.sq_u, mask)
    if n_accumulated(MODE) > 6:
        tl.store(ptr + 6 * n_cols, m.dot_uv, mask)
    if n_accumulated(MODE) > 7:
        tl.store(ptr + 7 * n_cols, m.dot_gu, mask)


@triton.jit
def whole(x, UNIT: tl.constexpr):
    """x, which is a multiple of a unit: a product tells the compiler so, where a hint on what was loaded is lost."""
    return x // UNIT * UNIT


# ---- tiles -----------------------------------------------------------------------------------------------------------


@triton.jit
def walk_run(
    x,
    tile,
    row_slice,
    by_row,
    c,
    scale,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    MEASURED: tl.constexpr,
    WAY: tl.constexpr,
):
    """A tile of one row: blocks are pieces of one run, C wide and R of them; unmasked but for the last block."""
    R: tl.constexpr = block_rows(DTYPE, False)
    C: tl.constexpr = block_cols(DTYPE, False)
    rows, lanes = tl.arange(0, R).to(tl.int64), tl.arange(0, C)
    begin = whole(tile.col_begin, 64)
    rest = begin + (tile.col_end - begin) // (R * C) * (R * C)
    sums = zeros(R, C // vector(DTYPE), scalar(DTYPE))
    for at in range(begin, rest, R * C):
        block = step_block(x, rows, at + lanes, C, None, c, scale, DTYPE, MODE, SCALED, WAY)
        if MEASURED:
            sums = accumulate(sums, sums_of_vectors(block, vector(DTYPE), MODE), MODE)
    if rest < tile.col_end:
        mask = rows[:, None] * C + (rest + lanes)[None, :] < tile.col_end
        block = step_block(x, rows, rest + lanes, C, mask, c, scale, DTYPE, MODE, SCALED, WAY)
        if MEASURED:
            sums = accumulate(sums, sums_of_vectors(block, vector(DTYPE), MODE), MODE)
    if MEASURED:
        if by_row:
            store_run(row_slice, sums_along(sums, 1, MODE), MODE)


@triton.jit
def walk_rows(
    x,
    tile,
    n_rows,
    n_cols,
    col_end,
    row_slice,
    c,
    scale,
    R: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    WAY: tl.constexpr,
):
    """A tile that sums rows only: along R rows to their end, then the next R rows."""
    begin = whole(tile.col_begin, 64)
    for row in range(tile.row_begin, tile.row_end, R):
        rows = row + tl.arange(0, R)
        sums = zeros(R, C // vector(DTYPE), scalar(DTYPE))
        for col in range(begin, col_end, C):
            cols = col + tl.arange(0, C)
            mask = (rows < tile.row_end)[:, None] & (cols < col_end)[None, :]
            block = step_block(x, rows, cols, n_cols, mask, c, scale, DTYPE, MODE, SCALED, WAY)
            sums = accumulate(sums, sums_of_vectors(block, vector(DTYPE), MODE), MODE)
        store_rows(row_slice, sums_along(sums, 1, MODE), rows, tile.row_end, n_rows, False, MODE)


@triton.jit
def walk_columns(
    x,
    tile,
    n_rows,
    n_cols,
    col_end,
    row_slice,
    col_slice,
    c,
    scale,
    BY_ROW: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    WAY: tl.constexpr,
):
    """A tile that sums columns, and rows too if BY_ROW: down C columns to their end, then the next C columns."""
    begin = whole(tile.col_begin, 64)
    for col in range(begin, col_end, C):
        cols = col + tl.arange(0, C)
        sums = zeros(R, C, scalar(DTYPE))
        for row in range(tile.row_begin, tile.row_end, R):
            rows = row + tl.arange(0, R)
            mask = (rows < tile.row_end)[:, None] & (cols < col_end)[None, :]
            block = step_block(x, rows, cols, n_cols, mask, c, scale, DTYPE, MODE, SCALED, WAY)
            sums = accumulate(sums, block, MODE)
            if BY_ROW:
                again = col > begin
                store_rows(row_slice, sums_along(block, 1, MODE), rows, tile.row_end, n_rows, again, MODE)
        store_columns(col_slice, sums_along(sums, 0, MODE), cols, col_end, n_cols, MODE)
        if BY_ROW:
            tl.debug_barrier()  # the next columns' sums are added to what other threads may have stored


@triton.jit
def walk_matrix(
    x,
    tile,
    tensor,
    row_slice,
    col_slice,
    by_row,
    by_col,
    c,
    scale,
    SLIM: tl.constexpr,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    KINDS: tl.constexpr,
    SCALED: tl.constexpr,
    WAY: tl.constexpr,
):
    R: tl.constexpr = block_rows(DTYPE, SLIM)
    C: tl.constexpr = block_cols(DTYPE, SLIM)
    n_rows, n_cols, col_end = tensor.n_rows, tensor.n_cols, tile.col_end
    if WAY == BY_VECTORS:
        n_cols = whole(n_cols, vector(DTYPE))
        col_end = whole(col_end, vector(DTYPE))
    if occurs(KINDS, ROWS):
        if by_row & (not by_col):
            walk_rows(x, tile, n_rows, n_cols, col_end, row_slice, c, scale, R, C, DTYPE, MODE, SCALED, WAY)
    if occurs(KINDS, COLUMNS):
        if by_col & (not by_row):
            walk_columns(
                x, tile, n_rows, n_cols, col_end, row_slice, col_slice, c, scale, False, R, C, DTYPE, MODE, SCALED, WAY
            )
    if occurs(KINDS, BOTH):
        if by_col & by_row:
            walk_columns(
                x, tile, n_rows, n_cols, col_end, row_slice, col_slice, c, scale, True, R, C, DTYPE, MODE, SCALED, WAY
            )


@triton.jit
def walk_tile(
    x,
    tile,
    tensor,
    views,
    by_row,
    by_col,
    workspace,
    c,
    scale,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    KINDS: tl.constexpr,
    SCALED: tl.constexpr,
    WAY: tl.constexpr,
):
    """Steps a tile and writes its sums to its slices of the workspace."""
    MEASURED: tl.constexpr = occurs(KINDS, VIEWED)
    slices = workspace.to(tl.pointer_type(scalar(DTYPE)), bitcast=True)
    row_slice, col_slice = slices, slices
    if MEASURED:
        PER_WORD: tl.constexpr = 1 if DTYPE == FLOAT64 else 2
        if tensor.n_views > 0:
            view = load_view(views, tensor.view)
            row_slice = slices + (view.workspace * PER_WORD + tile.row_slice * N_MOMENTS * tensor.n_rows)
            view = load_view(views, tensor.view + tensor.n_views - 1)
            col_slice = slices + (view.workspace * PER_WORD + tile.col_slice * N_MOMENTS * tensor.n_cols)
    if by_col | (tensor.n_rows > 1):
        if occurs(KINDS, NARROW):
            if tensor.n_cols <= block_cols(DTYPE, False) // 2:
                walk_matrix(
                    x,
                    tile,
                    tensor,
                    row_slice,
                    col_slice,
                    by_row,
                    by_col,
                    c,
                    scale,
                    True,
                    DTYPE,
                    MODE,
                    KINDS,
                    SCALED,
                    WAY,
                )
        if occurs(KINDS, WIDE):
            if tensor.n_cols > block_cols(DTYPE, False) // 2:
                walk_matrix(
                    x,
                    tile,
                    tensor,
                    row_slice,
                    col_slice,
                    by_row,
                    by_col,
                    c,
                    scale,
                    False,
                    DTYPE,
                    MODE,
                    KINDS,
                    SCALED,
                    WAY,
                )
    else:
        if occurs(KINDS, RUNS):
            walk_run(x, tile, row_slice, by_row, c, scale, DTYPE, MODE, SCALED, MEASURED, WAY)


@triton.jit
def read_float(address, otherwise):
    """The float32 at an address; a null address: otherwise."""
    value = tl.cast(otherwise, tl.float32)
    if address != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)))
    return value


@triton.jit(do_not_specialize=["tile_begin", "n_tensors"])
def stage_1(
    tensors,
    dims,
    views,
    tiles,
    scalars,
    lrs,
    hypers,
    addresses,
    first,
    fresh,
    pending,
    workspace,
    tile_begin,
    n_tensors,
    DTYPE: tl.constexpr,
    MODE: tl.constexpr,
    KINDS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Steps one tile."""
    program = tl.program_id(0)
    if MODE != MEASURE:
        for i in range(program, n_tensors, tl.num_programs(0)):
            tl.store(pending + i, tl.load(first + i) | tl.load(fresh + i))

    tile = load_tile(tiles, tile_begin + program)
    tensor = load_tensor(tensors, tile.tensor)
    at = addresses + 3 * tile.tensor
    p, g, v = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    S: tl.constexpr = scalar(DTYPE)
    zero = tl.cast(0.0, S)
    c = Coefficients(zero, zero, zero, zero, zero, zero, zero)
    scale = zero + 1.0
    if MODE != MEASURE:
        hyper = load_hyper(hypers, lrs, tensor.hyper)
        here = (g != 0) & (mode_of(hyper, v != 0, tensor.n_views > 0) == MODE)
        if (not here) | (read_float(tl.load(scalars + 1), 0.0) != 0.0):
            return
        c64 = coefficients(hyper, tl.load(first + tile.tensor) | tl.load(fresh + tile.tensor))
        c = Coefficients(
            c64.lr.to(S),
            c64.decay.to(S),
            c64.sign.to(S),
            c64.buffer_decay.to(S),
            c64.buffer_gain.to(S),
            c64.mix_d.to(S),
            c64.mix_v.to(S),
        )
        if SCALED:
            scale = read_float(tl.load(scalars), 1.0).to(S)
    POINTER: tl.constexpr = tl.pointer_type(element(DTYPE))
    used = p if MODE == MEASURE else p | g
    used = used | v if reads_buffer(MODE) or MODE == MEASURE else used
    by_row = tensor.n_views < 0
    if tensor.n_views > 0:
        by_row = load_view(views, tensor.view).by_row != 0
    by_col = tensor.n_views > by_row.to(tl.int64)
    is_run = (tensor.n_rows == 1) & (not by_col)
    vectors = (used & 15 == 0) & (is_run | (tensor.n_cols % vector(DTYPE) == 0))
    if tensor.dense == 0:
        if occurs(KINDS, STRIDED):
            x = Operands(p.to(POINTER), g.to(POINTER), v.to(POINTER), dims + tensor.dims * 4, tensor.n_dims)
            walk_tile(
                x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, MODE, KINDS, SCALED, BY_STRIDES
            )
    elif vectors:
        x = Operands(
            tl.multiple_of(p.to(POINTER), 16),
            tl.multiple_of(g.to(POINTER), 16),
            tl.multiple_of(v.to(POINTER), 16),
            dims,
            tensor.n_dims,
        )
        walk_tile(x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, MODE, KINDS, SCALED, BY_VECTORS)
    else:
        x = Operands(p.to(POINTER), g.to(POINTER), v.to(POINTER), dims, tensor.n_dims)
        walk_tile(x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, MODE, KINDS, SCALED, BY_ELEMENTS)


# ---- spans -----------------------------------------------------------------------------------------------------------


class LawStates(NamedTuple):
    translations: tl.tensor
    translations_stride: tl.tensor
    norms: tl.tensor
    norms_stride: tl.tensor


@triton.jit
def clear(moments, stride, span):
    """Sets the moments of gradient and update of a span to zero."""
    segments = span.begin + tl.arange(0, LONG_SPAN)
    for which in tl.static_range(2, 8):
        tl.store(moments + which * stride + segments, tl.zeros([LONG_SPAN], tl.float64), segments < span.end)


@triton.jit
def add_terms(m, ptr, n_lines, mask, n_acc):
    """Adds what lies at ptr, and one, two, … times n_lines further, to moments; zero from n_acc on."""
    return Moments(
        m.sum_p + tl.load(ptr, mask, 0.0).to(tl.float64),
        m.sq_p + tl.load(ptr + n_lines, mask, 0.0).to(tl.float64),
        m.sum_g + tl.load(ptr + 2 * n_lines, mask, 0.0).to(tl.float64),
        m.sq_g + tl.load(ptr + 3 * n_lines, mask, 0.0).to(tl.float64),
        m.dot_pg + tl.load(ptr + 4 * n_lines, mask, 0.0).to(tl.float64),
        m.sq_u + tl.load(ptr + 5 * n_lines, mask, 0.0).to(tl.float64),
        m.dot_uv + tl.load(ptr + 6 * n_lines, mask & (n_acc > 6), 0.0).to(tl.float64),
        m.dot_gu + tl.load(ptr + 7 * n_lines, mask & (n_acc > 7), 0.0).to(tl.float64),
    )


@triton.jit
def gather(slices, view, tensor, segments, end, n_acc, TERMS: tl.constexpr, WIDTH: tl.constexpr):
    """The moments of segments [WIDTH] of a view: all slices of all their lines, TERMS at a time."""
    n_lines = tl.where(view.by_row != 0, tensor.n_rows, tensor.n_cols)
    run = view.n_segments * view.inner
    repeats = tl.where(view.by_row != 0, 1, n_lines // run)
    n_terms = view.n_slices * repeats * view.inner
    m = zeros(TERMS, WIDTH, tl.float64)
    for begin in range(0, n_terms, TERMS):
        term = begin + tl.arange(0, TERMS)
        group = term // view.inner  # counts slices and repeats
        line = group % repeats * run + term % view.inner
        at = group // repeats * N_MOMENTS * n_lines + line
        mask = (term < n_terms)[:, None] & (segments < end)[None, :]
        m = add_terms(m, slices + (at[:, None] + segments[None, :] * view.inner), n_lines, mask, n_acc)
    return sums_along(m, 0, NESTEROV)


@triton.jit
def gather_span(span, view, tensor, workspace, n_acc, WIDTH: tl.constexpr):
    """The moments of a span of at most WIDTH segments, two elements a thread at a time."""
    TERMS: tl.constexpr = 2 * N_THREADS // WIDTH
    segments = span.begin + tl.arange(0, WIDTH)
    if tensor.dtype == FLOAT64:
        m = gather(workspace + view.workspace, view, tensor, segments, span.end, n_acc, TERMS, WIDTH)
    else:
        slices = (workspace + view.workspace).to(tl.pointer_type(tl.float32), bitcast=True)
        m = gather(slices, view, tensor, segments, span.end, n_acc, TERMS, WIDTH)
    return m


@triton.jit
def finish(
    span,
    view,
    tensor,
    workspace,
    moments,
    stride,
    n_acc,
    states,
    hyper,
    is_first,
    propagator,
    WIDTH: tl.constexpr,
):
    """Brings the moments of a span together; advances its laws, and its tensor's propagators, where it has states."""
    m = gather_span(span, view, tensor, workspace, n_acc, WIDTH)
    segments = span.begin + tl.arange(0, WIDTH)
    mask = segments < span.end
    store_columns(moments + view.segment, m, segments, span.end, stride, NESTEROV)
    if states is not None:
        t = transitions(hyper, is_first)
        if view.translation >= 0:
            state = states.translations + view.translation + segments
            advance_translation(state, states.translations_stride, m, t.discrete_0, mask)
        if view.norm >= 0:
            state = states.norms + view.norm + segments
            advance_norm(state, states.norms_stride, m, t.discrete_1, t.flow_1, mask)
        if (span.begin == 0) & (span.view == tensor.view):
            propagate_all(propagator, t)


@triton.jit(
    do_not_specialize=[
        "moments_stride",
        "translations_stride",
        "norms_stride",
        "n_spans",
        "n_tensors",
        "n_hypers",
    ]
)
def stage_2(
    tensors,
    views,
    spans,
    scalars,
    lrs,
    hypers,
    addresses,
    fresh,
    pending,
    workspace,
    moments,
    moments_stride,
    translations,
    translations_stride,
    norms,
    norms_stride,
    propagators,
    clock,
    n_spans,
    n_tensors,
    n_hypers,
    MEASURING: tl.constexpr,
):
    """Finishes one span; the first program advances the clock, and all together the flags of fresh buffers."""
    program = tl.program_id(0)
    skipped = False
    if not MEASURING:
        skipped = read_float(tl.load(scalars + 1), 0.0) != 0.0
        for begin in range(program * FLAGS, n_tensors, tl.num_programs(0) * FLAGS):
            i = begin + tl.arange(0, FLAGS).to(tl.int64)
            mask = i < n_tensors
            takes_part = tl.load(addresses + 3 * i + 1, mask, 0) != 0
            is_fresh = tl.load(pending + i, mask, 0)
            momentum = load_momentum(hypers, load_hyper_number(tensors, i, mask), mask)
            tl.store(fresh + i, tl.where((momentum != 0.0) & (not skipped), 0, is_fresh), mask & takes_part)
        if (program == 0) & (not skipped):
            tl.store(clock, tl.load(clock) + 1.0)
            for i in range(n_hypers):
                tl.store(clock + 1 + i, tl.load(clock + 1 + i) + duration(load_hyper(hypers, lrs, i)))
    if (program >= n_spans) | skipped:
        return

    span = load_span(spans, program)
    view = load_view(views, span.view)
    tensor = load_tensor(tensors, span.tensor)
    n_acc = n_accumulated(MEASURE) + 0 * tensor.dtype
    states, hyper, is_first = None, None, None
    if not MEASURING:
        at = addresses + 3 * span.tensor
        if tl.load(at + 1) == 0:  # its charges stay, the moments of gradient and update are zero, its laws wait
            clear(moments + view.segment, moments_stride, span)
            return
        hyper = load_hyper(hypers, lrs, tensor.hyper)
        mode = mode_of(hyper, tl.load(at + 2) != 0, tensor.n_views > 0)
        n_acc = tl.where(mode == NESTEROV, 8, tl.where(mode == STALE, 7, 6)).to(tl.int64)
        states = LawStates(translations, translations_stride, norms, norms_stride)
        is_first = tl.load(pending + span.tensor)
    own = propagators + span.tensor * 16
    n_segments = span.end - span.begin
    if n_segments <= FEW:
        finish(span, view, tensor, workspace, moments, moments_stride, n_acc, states, hyper, is_first, own, FEW)
    elif n_segments <= SHORT_SPAN:
        finish(span, view, tensor, workspace, moments, moments_stride, n_acc, states, hyper, is_first, own, SHORT_SPAN)
    else:
        finish(span, view, tensor, workspace, moments, moments_stride, n_acc, states, hyper, is_first, own, LONG_SPAN)


def options(dtype: int, mode: int, kinds: int, lanes: int, hip: bool) -> dict[str, int]:
    """Compile options of stage 1.

    Registers decide how many threads share a multiprocessor's 65,536, and so how many loads are in flight: 512 with 128
    each, 384 with 168, 320 with 200 (in programs of 64), 256 with 255. What needs more gets more, so that nothing is
    spilled: float64, longer vectors (16 bits), rows and columns at once, Nesterov's two moments more, strides.

    Args:
        dtype, mode, kinds: As the kernel's constants.
        lanes: Threads of a warp.
        hip: Whether it is compiled for AMD, where nothing limits registers.
    """
    has_columns = kinds & (COLUMNS.value | BOTH.value) != 0
    hard = mode == NESTEROV or kinds & STRIDED.value != 0
    if vector(dtype) == 8:
        registers = 255 if has_columns and (hard or kinds & BOTH.value) else 200 if has_columns else 168
    else:
        registers = 168 if dtype == FLOAT64 or (has_columns and hard) else 128
    return {"num_warps": n_threads(dtype) // lanes} | ({} if hip else {"maxnreg": registers})


def kinds(tables: Any, dtype: int) -> int:
    """The kinds of tiles that occur among tensors of a dtype.

    Args:
        tables: With arrays `tensors` and `views` (noetherperf.engines.tiling.Tables).
        dtype: Code of the tensors' dtype.
    """
    t = tables.tensors[(tables.tensors["dtype"] == dtype) & (tables.tensors["n_rows"] * tables.tensors["n_cols"] > 0)]
    by_row = np.zeros(len(t), bool)
    viewed = t["n_views"] > 0
    by_row[viewed] = tables.views["by_row"][t["view"][viewed]] != 0
    by_col = t["n_views"] > by_row
    is_run = ~by_col & (t["n_rows"] == 1)
    is_narrow = t["n_cols"] <= block_cols(dtype, False) // 2
    occurs = {
        RUNS: is_run,
        ROWS: by_row & ~by_col,
        COLUMNS: by_col & ~by_row,
        BOTH: by_row & by_col,
        NARROW: ~is_run & is_narrow,
        WIDE: ~is_run & ~is_narrow,
        STRIDED: t["dense"] == 0,
        VIEWED: viewed,
    }
    return sum(kind.value for kind, there in occurs.items() if there.any())
