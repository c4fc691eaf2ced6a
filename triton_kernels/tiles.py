"""Tiles: the order in which a program of stage 1 walks the blocks of a tile, and the sums that it takes.

The order depends on the sums. If a tile sums only rows, the inner loop is over columns, with one reduction per row. If
it sums columns too, the inner loop is over rows, with the columns' sums in registers and a reduction of each block's
rows. A single row, or a tensor without views, is walked as one contiguous run.

Blocks of rows and columns go through a pipeline of STAGES: the loads of the next ones are in flight to shared memory
while one is stepped. The blocks of a walk are disjoint, so a load may pass the stores before it. Runs need no
pipeline, and elements one by one cannot have one: shared memory is filled four bytes at a time at least.

A tensor is walked in vectors if its addresses and rows have an alignment of 16 bytes, else element by element; and
through its strides if its layout is not dense.
"""

import triton
import triton.language as tl

from noetherperf.triton_kernels.blocks import BY_VECTORS, block_cols, block_rows, n_together, step_block
from noetherperf.triton_kernels.dtypes import FLOAT64, scalar, vector
from noetherperf.triton_kernels.moments import add, sums_along, sums_of_vectors, zeros
from noetherperf.triton_kernels.options import BOTH, COLUMNS, NARROW, ROWS, RUNS, VIEWED, WIDE, occurs
from noetherperf.triton_kernels.plan import load_view
from noetherperf.triton_kernels.slices import store_columns, store_rows, store_run


@triton.jit
def whole(x, UNIT: tl.constexpr):
    """x, which is a multiple of UNIT. The product shows this to the compiler; a hint on a loaded value is lost."""
    return x // UNIT * UNIT


@triton.jit
def walk_run(
    x,
    tile,
    row_slice,
    by_row,
    c,
    scale,
    DTYPE: tl.constexpr,
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    MEASURED: tl.constexpr,
    WAY: tl.constexpr,
):
    """A tile of one row: blocks are pieces of one run, C wide and R of them; unmasked but for the last block."""
    R: tl.constexpr = block_rows(DTYPE, False, WAY)
    C: tl.constexpr = block_cols(DTYPE, False, WAY)
    V: tl.constexpr = n_together(DTYPE, WAY)
    rows, lanes = tl.arange(0, R).to(tl.int64), tl.arange(0, C)
    begin = whole(tile.col_begin, 64)
    rest = begin + (tile.col_end - begin) // (R * C) * (R * C)
    sums = zeros(len(STEP.moments), R, C // V, scalar(DTYPE))
    for at in range(begin, rest, R * C):
        block = step_block(x, rows, at + lanes, C, None, c, scale, DTYPE, STEP, UPDATE, WAY)
        if MEASURED:
            sums = add(sums, sums_of_vectors(block, V, len(STEP.moments)), len(STEP.moments))
    if rest < tile.col_end:
        mask = rows[:, None] * C + (rest + lanes)[None, :] < tile.col_end
        block = step_block(x, rows, rest + lanes, C, mask, c, scale, DTYPE, STEP, UPDATE, WAY)
        if MEASURED:
            sums = add(sums, sums_of_vectors(block, V, len(STEP.moments)), len(STEP.moments))
    if MEASURED:
        if by_row:
            store_run(row_slice, sums_along(sums, 1, len(STEP.moments)), STEP)


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
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    WAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile that sums rows only: along R rows to their end, then the next R rows."""
    V: tl.constexpr = n_together(DTYPE, WAY)
    begin = whole(tile.col_begin, 64)
    for row in range(tile.row_begin, tile.row_end, R):
        rows = row + tl.arange(0, R)
        sums = zeros(len(STEP.moments), R, C // V, scalar(DTYPE))
        for col in tl.range(begin, col_end, C, num_stages=STAGES):
            cols = col + tl.arange(0, C)
            mask = (rows < tile.row_end)[:, None] & (cols < col_end)[None, :]
            block = step_block(x, rows, cols, n_cols, mask, c, scale, DTYPE, STEP, UPDATE, WAY)
            sums = add(sums, sums_of_vectors(block, V, len(STEP.moments)), len(STEP.moments))
        store_rows(row_slice, sums_along(sums, 1, len(STEP.moments)), rows, tile.row_end, n_rows, False, STEP)


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
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    WAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile that sums columns, and rows too if BY_ROW: down C columns to their end, then the next C columns."""
    begin = whole(tile.col_begin, 64)
    for col in range(begin, col_end, C):
        cols = col + tl.arange(0, C)
        sums = zeros(len(STEP.moments), R, C, scalar(DTYPE))
        for row in tl.range(tile.row_begin, tile.row_end, R, num_stages=STAGES):
            rows = row + tl.arange(0, R)
            mask = (rows < tile.row_end)[:, None] & (cols < col_end)[None, :]
            block = step_block(x, rows, cols, n_cols, mask, c, scale, DTYPE, STEP, UPDATE, WAY)
            sums = add(sums, block, len(STEP.moments))
            if BY_ROW:
                again = col > begin
                store_rows(row_slice, sums_along(block, 1, len(STEP.moments)), rows, tile.row_end, n_rows, again, STEP)
        store_columns(col_slice, sums_along(sums, 0, len(STEP.moments)), cols, col_end, n_cols, len(STEP.moments))
        if BY_ROW:
            tl.debug_barrier()  # the next columns are added to sums that other threads may have stored


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
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    WAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    R: tl.constexpr = block_rows(DTYPE, SLIM, WAY)
    C: tl.constexpr = block_cols(DTYPE, SLIM, WAY)
    n_rows, n_cols, col_end = tensor.n_rows, tensor.n_cols, tile.col_end
    if WAY == BY_VECTORS:
        n_cols = whole(n_cols, vector(DTYPE))
        col_end = whole(col_end, vector(DTYPE))
    if occurs(KINDS, ROWS):
        if by_row & (not by_col):
            walk_rows(x, tile, n_rows, n_cols, col_end, row_slice, c, scale, R, C, DTYPE, STEP, UPDATE, WAY, STAGES)
    if occurs(KINDS, COLUMNS):
        if by_col & (not by_row):
            walk_columns(
                x,
                tile,
                n_rows,
                n_cols,
                col_end,
                row_slice,
                col_slice,
                c,
                scale,
                False,
                R,
                C,
                DTYPE,
                STEP,
                UPDATE,
                WAY,
                STAGES,
            )
    if occurs(KINDS, BOTH):
        if by_col & by_row:
            walk_columns(
                x,
                tile,
                n_rows,
                n_cols,
                col_end,
                row_slice,
                col_slice,
                c,
                scale,
                True,
                R,
                C,
                DTYPE,
                STEP,
                UPDATE,
                WAY,
                STAGES,
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
    STEP: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    WAY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Steps a tile and writes its sums to its slices of the workspace."""
    MEASURED: tl.constexpr = occurs(KINDS, VIEWED)
    slices = workspace.to(tl.pointer_type(scalar(DTYPE)), bitcast=True)
    row_slice, col_slice = slices, slices
    if MEASURED:
        PER_WORD: tl.constexpr = 1 if DTYPE == FLOAT64 else 2
        if tensor.n_views > 0:
            view = load_view(views, tensor.view)
            row_slice = slices + (view.workspace * PER_WORD + tile.row_slice * STEP.n_moments * tensor.n_rows)
            view = load_view(views, tensor.view + tensor.n_views - 1)
            col_slice = slices + (view.workspace * PER_WORD + tile.col_slice * STEP.n_moments * tensor.n_cols)
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
                    STEP,
                    UPDATE,
                    KINDS,
                    WAY,
                    STAGES,
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
                    STEP,
                    UPDATE,
                    KINDS,
                    WAY,
                    STAGES,
                )
    else:
        if occurs(KINDS, RUNS):
            walk_run(x, tile, row_slice, by_row, c, scale, DTYPE, STEP, UPDATE, MEASURED, WAY)
