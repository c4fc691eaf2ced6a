"""Slices of the workspace: where stage 1 writes the sums of a tile's rows and columns, [n moments, n lines].

A slice has a row for every moment of the rule; a step writes the rows of the moments that it sums.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def n_side_by_side(n):
    """Columns that n moments take side by side: a power of two."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def or_first(i, n):
    """The moment in column i: i, or the first if there are fewer."""
    return i if i < n else 0


@triton.jit
def joined(m, N: tl.constexpr, FIRST: tl.constexpr, EVERY: tl.constexpr):
    """Columns FIRST, FIRST + EVERY, … of side_by_side, [R, 2, 2, …]: those at even places joined with the others."""
    if n_side_by_side(N) > EVERY:
        return tl.join(joined(m, N, FIRST, 2 * EVERY), joined(m, N, FIRST + EVERY, 2 * EVERY))
    else:
        return m[or_first(FIRST, N)]


@triton.jit
def side_by_side(m, N: tl.constexpr):
    """N vectors [R] as one [R, n_side_by_side], for a single store; further columns are padding."""
    return tl.reshape(joined(m, N, 0, 1), [m[0].shape[0], n_side_by_side(N)])


@triton.jit
def store_rows(slice_ptr, m, rows, row_end, n_rows, again, STEP: tl.constexpr):
    """Writes the sums [R] of rows to a slice [n moments, n_rows]; adds them to its contents if `again`."""
    N: tl.constexpr = len(STEP.moments)
    which = tl.arange(0, n_side_by_side(N))
    ptr = slice_ptr + which[None, :] * n_rows + rows[:, None]
    mask = (rows < row_end)[:, None] & (which < N)[None, :]
    tl.store(ptr, side_by_side(m, N) + tl.load(ptr, mask & again, 0.0), mask)


@triton.jit
def store_run(slice_ptr, m, STEP: tl.constexpr):
    """Writes the sum of a run, from sums [R] of its rows, to a slice [n moments, 1]."""
    N: tl.constexpr = len(STEP.moments)
    which = tl.arange(0, n_side_by_side(N))
    tl.store(slice_ptr + which, tl.sum(side_by_side(m, N), 0), which < N)


@triton.jit
def store_columns(slice_ptr, m, cols, col_end, n_cols, N: tl.constexpr):
    """Writes the sums [C] of columns to a slice [n moments, n_cols]."""
    ptr = slice_ptr + cols
    mask = cols < col_end
    for i in tl.static_range(N):
        tl.store(ptr + i * n_cols, m[i], mask)
