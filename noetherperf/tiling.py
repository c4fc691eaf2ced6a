"""Views and memory layouts -> the tables that the compiled CPU engine walks: matrices, tiles and what sums where.

Each tensor is seen in memory order as a matrix [n_rows, n_cols]. A view along the outermost memory axis sums over rows
(`by_row`: segment = row // inner); any other sums over positions (segment = (column // inner) % n). So channels_last
and transposed tensors need no special case, and neither do kernels or folds: they are inner positions.

A tile is a block of that matrix. Sums of a view that one tile finishes go straight to the moments; where several tiles
share a segment, each writes a slice of the workspace and a second stage adds the slices in order. The tiles depend on
shapes alone, so results do not depend on threads. The number of slices is bounded, so the workspace grows with the
number of segments, not with the number of parameters.

The dtypes mirror the structs of csrc/plan.h (a test compares their layouts).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

import numpy as np
import torch
from torch import Tensor

from noetherperf.laws import Law
from noetherperf.moments import N_MOMENTS
from noetherperf.plan import Plan, View

HYPER = np.dtype(
    [
        ("lr", "f8"),
        ("momentum", "f8"),
        ("dampening", "f8"),
        ("weight_decay", "f8"),
        ("nesterov", "i4"),
        ("maximize", "i4"),
    ]
)
TENSOR = np.dtype(
    [
        ("n_rows", "i8"),
        ("n_cols", "i8"),
        ("dims", "i8"),  # first row of the tensor in the table of dims
        ("n_dims", "i4"),
        ("dense", "i4"),  # parameter, gradient and buffer are all contiguous in the matrix's order
        ("dtype", "i4"),
        ("hyper", "i4"),  # which parameter group's hyperparameters
        ("view", "i4"),  # views are consecutive, the one by row first
        ("n_views", "i4"),
    ]
)
DIM = np.dtype([("size", "i8"), ("stride_p", "i8"), ("stride_g", "i8"), ("stride_v", "i8")])
VIEW = np.dtype(
    [
        ("tensor", "i4"),
        ("by_row", "i4"),
        ("inner", "i8"),
        ("n_segments", "i8"),
        ("segment", "i8"),
        ("translation", "i8"),
        ("norm", "i8"),
        ("n_slices", "i8"),
        ("workspace", "i8"),  # in float64 values; slices [n_slices, N_MOMENTS, n_segments]; unused for one slice
    ]
)
TILE = np.dtype(
    [
        ("row_begin", "i8"),
        ("row_end", "i8"),
        ("col_begin", "i8"),
        ("col_end", "i8"),
        ("tensor", "i4"),
        ("row_slice", "i4"),  # which slice of a by-row view it writes: its number along the columns
        ("col_slice", "i4"),  # which slice of the other views: its number along the rows
        ("padding", "i4"),
    ]
)
SPAN = np.dtype([("begin", "i8"), ("end", "i8"), ("view", "i4"), ("padding", "i4")])

Range = tuple[int, int]

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

TILE_ELEMENTS = 1 << 16  # enough to hide what a tile costs, few enough to balance threads
MIN_TILE_ROWS = 256  # of a tile that sums over rows: its slice is then 1/256 of what it reads, in float64 moments
MAX_SLICES = 16
MIN_TILE_COLS = 4096  # and its runs of memory are then long enough for the hardware's prefetching
MIN_COLS = 64  # matrices narrower than this and summed by position only are widened by merging rows
SHORT_RUN = 16  # contiguous groups shorter than this are summed by position: no horizontal sums
SPAN_SEGMENTS = 2048


@dataclass
class Tables:
    """The engine's tables, and how large a workspace they need."""

    tensors: np.ndarray
    dims: np.ndarray
    views: np.ndarray
    tiles: np.ndarray
    spans: np.ndarray
    workspace: int


@dataclass(frozen=True)
class _Column:
    """A view's way to sum over positions: segment = (column // inner) % n_segments."""

    inner: int
    n_segments: int


def memory_order(p: Tensor) -> list[int]:
    """Axes of p from the outermost in memory to the innermost."""
    strides = p.stride()
    return sorted(range(p.dim()), key=lambda axis: (-strides[axis], axis))


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides are those of a contiguous tensor of this shape; size-1 axes may have any stride."""
    if 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _matrix(shape: list[int], views: list[tuple[int, View]]) -> tuple[int, int, dict[int, int | _Column]]:
    """A tensor's matrix and how each view (at its memory axis) sums on it: rows per segment, or a _Column."""
    numel = prod(shape)
    if not views:
        return 1, numel, {}
    outermost, rest = shape[0], prod(shape[1:])
    if all(axis == 0 for axis, _ in views):
        (_, view), *_ = views
        run = view.fold * rest
        if run >= SHORT_RUN:
            return view.n_segments, run, {0: 1}
        return 1, numel, {0: _Column(max(run, 1), view.n_segments)}
    columns: dict[int, int | _Column] = {
        axis: view.fold if axis == 0 else _Column(view.fold * prod(shape[axis + 1 :]), view.n_segments)
        for axis, view in views
    }
    merge = 1
    if 0 not in columns and 0 < rest < MIN_COLS:
        merge = max((k for k in range(1, 2 * MIN_COLS // rest + 1) if outermost % k == 0), default=1)
    return outermost // merge, rest * merge, columns


def _pieces(length: int, at_least: int, unit: int, at_most: int) -> list[Range]:
    """Cut [0, length) into near-equal pieces of at least `at_least`, whole units, and at most `at_most` of them."""
    n = max(1, min(at_most, length // max(1, at_least)))
    step = -(-length // n)
    step = -(-step // unit) * unit
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _tiles(n_rows: int, n_cols: int, sums: dict[int, int | _Column]) -> tuple[list[Range], list[Range]]:
    """The row ranges and the column ranges whose product are a tensor's tiles."""
    if n_rows * n_cols == 0:
        return [], []
    columns = [s for s in sums.values() if isinstance(s, _Column)]
    rows_per_segment = next((s for s in sums.values() if isinstance(s, int)), None)
    if not columns:
        rows = _pieces(n_rows, max(1, TILE_ELEMENTS // n_cols), 8 if n_rows > 8 else 1, n_rows)
        return rows, _pieces(n_cols, TILE_ELEMENTS, 64, n_cols) if n_cols > 2 * TILE_ELEMENTS else [(0, n_cols)]
    rows = _pieces(n_rows, MIN_TILE_ROWS, lcm(8, rows_per_segment or 1), MAX_SLICES)
    if any(s.inner * s.n_segments != n_cols for s in columns):
        return rows, [(0, n_cols)]  # segments that come again along the columns are not cut
    unit = lcm(64, *(s.inner for s in columns))
    return rows, _pieces(n_cols, MIN_TILE_COLS, unit, MAX_SLICES if rows_per_segment else n_cols)


def make_tables(plan: Plan, params: Sequence[Tensor], hyper_index: Sequence[int]) -> Tables:
    """Lay out a plan over parameters as they lie in memory now.

    Args:
        plan: The views of these parameters.
        params: CPU tensors of a dtype in DTYPES, any strides. Only shapes and strides are read.
        hyper_index: For each tensor the number of its parameter group.
    """
    tensors = np.zeros(len(params), TENSOR)
    dims: list[tuple[int, int, int, int]] = []
    views: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    workspace = 0
    by_tensor: dict[int, list[View]] = {}
    for view in plan.views:
        by_tensor.setdefault(view.tensor, []).append(view)

    for i, p in enumerate(params):
        order = memory_order(p) or [0]
        shape = [(p.shape or (1,))[axis] for axis in order]
        strides = [(p.stride() or (1,))[axis] for axis in order]
        placed = sorted(((order.index(view.axis), view) for view in by_tensor.get(i, [])), key=lambda pair: pair[0])
        n_rows, n_cols, sums = _matrix(shape, placed)
        rows, cols = _tiles(n_rows, n_cols, sums)
        tensors[i] = (
            n_rows,
            n_cols,
            len(dims),
            len(shape),
            is_dense(shape, strides),
            DTYPES[p.dtype],
            hyper_index[i],
            len(views),
            len(placed),
        )
        dims += [(size, stride, stride, stride) for size, stride in zip(shape, strides, strict=True)]
        for axis, view in placed:
            way = sums[axis]
            by_row, inner = (True, way) if isinstance(way, int) else (False, way.inner)
            n_slices = len(cols) if by_row else len(rows)
            views.append(
                (
                    i,
                    by_row,
                    inner,
                    view.n_segments,
                    view.segment,
                    view.law_segment[Law.TRANSLATION],
                    view.law_segment[Law.NORM],
                    n_slices,
                    workspace,
                )
            )
            workspace += n_slices * N_MOMENTS * view.n_segments if n_slices > 1 else 0
        tiles += [
            (*row, *col, i, col_number, row_number, 0)
            for row_number, row in enumerate(rows)
            for col_number, col in enumerate(cols)
        ]

    spans = [
        (begin, min(begin + SPAN_SEGMENTS, row[3]), number, 0)
        for number, row in enumerate(views)
        for begin in range(0, row[3], SPAN_SEGMENTS)
    ]
    return Tables(
        tensors,
        np.array(dims, DIM),
        np.array(views, VIEW),
        np.array(tiles, TILE),
        np.array(spans, SPAN),
        workspace,
    )
