"""Rows of the plan's tables, read on the device; mirrors csrc/plan.h and the dtypes of noetherperf/engines/tiling.py.

Tables come as int64 words; two int32 share one, the earlier field in its lower half.
"""

from typing import NamedTuple

import triton
import triton.language as tl

#: Words of a row of the table of dims: its size, then the strides of parameter, gradient and three buffers.
N_DIM_WORDS = tl.constexpr(6)


class Tensor(NamedTuple):
    n_rows: tl.tensor
    n_cols: tl.tensor
    dims: tl.tensor
    n_dims: tl.tensor
    dense: tl.tensor
    dtype: tl.tensor
    group: tl.tensor
    view: tl.tensor
    n_views: tl.tensor


class View(NamedTuple):
    tensor: tl.tensor
    by_row: tl.tensor
    inner: tl.tensor
    n_segments: tl.tensor
    segment: tl.tensor
    translation: tl.tensor
    norm: tl.tensor
    n_slices: tl.tensor
    workspace: tl.tensor


class Tile(NamedTuple):
    row_begin: tl.tensor
    row_end: tl.tensor
    col_begin: tl.tensor
    col_end: tl.tensor
    tensor: tl.tensor
    row_slice: tl.tensor
    col_slice: tl.tensor


class Span(NamedTuple):
    begin: tl.tensor
    end: tl.tensor
    view: tl.tensor
    tensor: tl.tensor


@triton.jit
def low(word):
    return word & 0xFFFFFFFF


@triton.jit
def high(word):
    return word >> 32


@triton.jit
def load_tensor(tensors, i):
    at = tensors + i * 6
    a, b, c = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    return Tensor(tl.load(at), tl.load(at + 1), tl.load(at + 2), low(a), high(a), low(b), high(b), low(c), high(c))


@triton.jit
def load_view(views, i):
    at = views + i * 8
    a = tl.load(at)
    return View(
        low(a),
        high(a),
        tl.load(at + 1),
        tl.load(at + 2),
        tl.load(at + 3),
        tl.load(at + 4),
        tl.load(at + 5),
        tl.load(at + 6),
        tl.load(at + 7),
    )


@triton.jit
def load_tile(tiles, i):
    at = tiles + i * 6
    a, b = tl.load(at + 4), tl.load(at + 5)
    return Tile(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), low(a), high(a), low(b))


@triton.jit
def load_span(spans, i):
    at = spans + i * 3
    a = tl.load(at + 2)
    return Span(tl.load(at), tl.load(at + 1), low(a), high(a))


@triton.jit
def load_group_number(tensors, i, mask):
    """The parameter groups of many tensors."""
    return high(tl.load(tensors + i * 6 + 4, mask, 0))


@triton.jit
def read_float(address, otherwise):
    """The float32 at an address; a null address: otherwise."""
    value = tl.cast(otherwise, tl.float32)
    if address != 0:
        value = tl.load(address.to(tl.pointer_type(tl.float32)))
    return value
