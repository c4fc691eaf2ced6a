"""Slices of the workspace: where stage 1 leaves the sums of a tile's rows and columns, [n moments, n lines].

A slice has a row for every moment of the rule, of which a step writes those that it sums.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def n_side_by_side(n):
    """Columns that n moments take side by side: a power of two."""
    return 1 << (n - 1).bit_length()


@triton.constexpr_function
def n_halvings(n):
    return (n - 1).bit_length()


@triton.constexpr_function
def or_first(i, n):
    """What stands in column i: moment i, or the first where there is none."""
    return i if i < n else 0


@triton.jit
def halved(x, HALF: tl.constexpr):
    """The first half of some tensors, each joined with its peer in the second."""
    joined = ()
    for i in tl.static_range(HALF):
        joined = joined + (tl.join(x[i], x[i + HALF]),)
    return joined


@triton.jit
def side_by_side(m, N: tl.constexpr):
    """N vectors [R] as one [R, n_side_by_side], so that they leave by one store: joins put the last pair outermost."""
    WIDTH: tl.constexpr = n_side_by_side(N)
    x = ()
    for i in tl.static_range(WIDTH):
        x = x + (m[or_first(i, N)],)
    for level in tl.static_range(n_halvings(N)):
        x = halved(x, WIDTH >> (level + 1))
    return tl.reshape(x[0], [m[0].shape[0], WIDTH])


@triton.jit
def store_rows(slice_ptr, m, rows, row_end, n_rows, again, STEP: tl.constexpr):
    """Writes the sums [R] of rows to a slice [n moments, n_rows]; adds them to it where `again` says it holds some."""
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
