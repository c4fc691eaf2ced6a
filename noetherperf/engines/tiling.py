"""Views and memory layouts -> the tables that compiled engines walk: matrices, tiles, and where each sum goes.

Each tensor is seen in memory order as a matrix [n_rows, n_cols]. A view along the outermost memory axis sums over rows
(`by_row`: segment = row // inner); any other sums over positions (segment = (column // inner) % n). So channels_last
and transposed tensors need no special case, and neither do kernels or folds: they are inner positions.

A tile is a block of that matrix, walked by one thread of a CPU or one thread block of a GPU. Where several tiles share
a segment, each writes a slice of the workspace and a second stage adds the slices in order. The tiles depend on shapes
alone, so results do not depend on threads. A Tiling says how tiles are cut and what slices hold:

- CPU: the sums of segments, [n_slices, n_moments, n_segments], float64. Sums that one tile finishes go straight to the
  moments. The number of slices is bounded, so the workspace grows with the number of segments, not of parameters.
- GPU (`by_line`): the sums of the matrix's lines, which the second stage folds to segments: [n_slices, n_moments,
  n_rows] for the view by row, [n_slices, n_moments, n_cols] for the others, which share it. Always written, also where
  there is one slice. float64 for a float64 tensor; float32 for others, as the sums inside a tile are: their rounding is
  the smaller one, and the workspace is what measuring adds to the traffic. Tiles grow with the model, so that there are
  enough for the whole GPU and no more: the workspace stays within a few per cent of the parameters.

The dtypes mirror the structs of csrc/plan.h (a test compares their layouts).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod

import numpy as np
import torch
from torch import Tensor

from noetherperf.measure.plan import Plan, View
from noetherperf.rules.law import Law

TENSOR = np.dtype(
    [
        ("n_rows", "i8"),
        ("n_cols", "i8"),
        ("dims", "i8"),  # first row of the tensor in the table of dims
        ("n_dims", "i4"),
        ("dense", "i4"),  # parameter, gradient and buffers are all contiguous in the matrix's order
        ("dtype", "i4"),
        ("group", "i4"),  # which parameter group it is in
        ("view", "i4"),  # views are consecutive, the one by row first
        ("n_views", "i4"),
    ]
)
#: The most buffers that a rule may have.
MOST_BUFFERS = 3
DIM = np.dtype([("size", "i8"), ("strides", "i8", (2 + MOST_BUFFERS,))])  # of parameter, gradient, buffers
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
        ("workspace", "i8"),  # where its slices begin, in float64 values; a CPU needs none for one slice
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
SPAN = np.dtype([("begin", "i8"), ("end", "i8"), ("view", "i4"), ("tensor", "i4")])

Range = tuple[int, int]

#: Codes of the parameters' dtypes, as in csrc/plan.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Tiling:
    """How an engine's tiles, slices and spans are cut.

    Attributes:
        tile_elements: Elements of a tile: the least and the most.
        tiles: The number of tiles of a model, as far as their sizes allow.
        block_rows: Rows that are walked together.
        min_tile_rows: The least rows of a tile that sums over rows, if the tensor has as many.
        max_slices: The most slices of the sums over rows.
        tile_cols: The least columns of a tile; with by_line, exactly this many bytes of columns.
        min_cols: Matrices narrower than this and summed by position only are widened by merging rows.
        short_run: Contiguous groups shorter than this are summed by position.
        span_segments: Segments of a span of the second stage: the least and the most.
        span_terms: Up to this many terms per segment, a span has the most segments; with more terms it has fewer.
        by_line: Slices hold the sums of rows and columns, not of segments.
    """

    tile_elements: Range
    tiles: int
    block_rows: int
    min_tile_rows: int
    max_slices: int
    tile_cols: int
    min_cols: int
    short_run: int
    span_segments: Range
    span_terms: int
    by_line: bool


CPU = Tiling(
    tile_elements=(1 << 16, 1 << 16),  # large enough to hide a tile's overhead, small enough to balance threads
    tiles=1,
    block_rows=1,
    min_tile_rows=256,  # its slice is then 1/256 of what it reads, in float64 moments
    max_slices=16,
    tile_cols=1 << 14,  # whole rows of most models: a tile is then one contiguous run
    min_cols=64,
    short_run=16,  # no horizontal sums
    span_segments=(2048, 2048),
    span_terms=1,
    by_line=False,
)

TRITON = Tiling(
    tile_elements=(1 << 13, 1 << 17),
    tiles=8192,  # many per multiprocessor of a large GPU, so that few finish late
    block_rows=8,
    min_tile_rows=128,
    max_slices=4096,
    tile_cols=1024,
    min_cols=128,
    short_run=2,
    span_segments=(32, 128),
    span_terms=8,
    by_line=True,
)

CUDA = replace(TRITON, span_segments=(8, 64))


@dataclass
class Tables:
    """The engine's tables, and the size of their workspace."""

    tensors: np.ndarray
    dims: np.ndarray
    views: np.ndarray
    tiles: np.ndarray
    spans: np.ndarray
    workspace: int


@dataclass(frozen=True)
class _Column:
    """How a view sums over positions: segment = (column // inner) % n_segments."""

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


def _matrix(
    shape: list[int], views: list[tuple[int, View]], tiling: Tiling
) -> tuple[int, int, dict[int, int | _Column]]:
    """A tensor's matrix and how each view (at its memory axis) sums on it: rows per segment, or a _Column."""
    numel = prod(shape)
    if not views:
        return 1, numel, {}
    outermost, rest = shape[0], prod(shape[1:])
    if all(axis == 0 for axis, _ in views):
        (_, view), *_ = views
        run = view.fold * rest
        if run >= tiling.short_run:
            return view.n_segments, run, {0: 1}
        return 1, numel, {0: _Column(max(run, 1), view.n_segments)}
    columns: dict[int, int | _Column] = {
        axis: view.fold if axis == 0 else _Column(view.fold * prod(shape[axis + 1 :]), view.n_segments)
        for axis, view in views
    }
    merge = 1
    if 0 not in columns and 0 < rest < tiling.min_cols:
        merge = max((k for k in range(1, 2 * tiling.min_cols // rest + 1) if outermost % k == 0), default=1)
    return outermost // merge, rest * merge, columns


def _pieces(length: int, at_least: int, unit: int, at_most: int) -> list[Range]:
    """Cut [0, length) into near-equal pieces of at least `at_least`, whole units, and at most `at_most` of them."""
    n = max(1, min(at_most, length // max(1, at_least)))
    step = -(-length // n)
    step = -(-step // unit) * unit
    return [(begin, min(begin + step, length)) for begin in range(0, length, step)]


def _tiles(
    n_rows: int, n_cols: int, sums: dict[int, int | _Column], elements: int, itemsize: int, tiling: Tiling
) -> tuple[list[Range], list[Range]]:
    """The row ranges and the column ranges whose product are a tensor's tiles, of about so many elements."""
    if n_rows * n_cols == 0:
        return [], []
    columns = [s for s in sums.values() if isinstance(s, _Column)]
    rows_per_segment = next((s for s in sums.values() if isinstance(s, int)), None)
    if not columns:
        longest = max(1, elements // min(tiling.block_rows, n_rows))
        most = tiling.max_slices if tiling.by_line and rows_per_segment else n_cols
        rows = _pieces(n_rows, max(1, elements // n_cols), 8 if n_rows > 8 else 1, n_rows)
        return rows, _pieces(n_cols, longest, 64, most) if n_cols > 2 * longest else [(0, n_cols)]
    if tiling.by_line:
        width = tiling.tile_cols // itemsize
        cols = [(begin, min(begin + width, n_cols)) for begin in range(0, n_cols, width)]
        return _pieces(n_rows, max(tiling.min_tile_rows, elements // width), 8, tiling.max_slices), cols
    rows = _pieces(n_rows, tiling.min_tile_rows, lcm(8, rows_per_segment or 1), tiling.max_slices)
    if any(s.inner * s.n_segments != n_cols for s in columns):
        return rows, [(0, n_cols)]  # segments that repeat along the columns are not cut
    unit = lcm(64, *(s.inner for s in columns))
    return rows, _pieces(n_cols, tiling.tile_cols, unit, tiling.max_slices if rows_per_segment else n_cols)


def _span_length(view: np.void, tensor: np.void, tiling: Tiling) -> int:
    """How many of a view's segments a span has: half as many for each doubling of their terms."""
    least, most = tiling.span_segments
    lines = int(tensor["n_rows"] if view["by_row"] else tensor["n_cols"])
    terms = int(view["n_slices"]) * lines // max(1, int(view["n_segments"]))
    share = max(1, -(-terms // tiling.span_terms))
    return max(least, most >> (share - 1).bit_length())


def make_tables(plan: Plan, params: Sequence[Tensor], group_index: Sequence[int], tiling: Tiling = CPU) -> Tables:
    """Make the tables of a plan for the parameters' present layouts.

    Args:
        plan: The views of these parameters.
        params: Tensors of a dtype in DTYPES, any strides. Only shapes and strides are read.
        group_index: For each tensor the number of its parameter group.
        tiling: How to cut.
    """
    tensors = np.zeros(len(params), TENSOR)
    dims: list[tuple[int, list[int]]] = []
    views: list[tuple[int, ...]] = []
    tiles: list[tuple[int, ...]] = []
    workspace, n_moments = 0, len(plan.rule.moments)
    least, most = tiling.tile_elements
    elements = max(least, min(most, sum(p.numel() for p in params) // tiling.tiles))
    by_tensor: dict[int, list[View]] = {}
    for view in plan.views:
        by_tensor.setdefault(view.tensor, []).append(view)

    for i, p in enumerate(params):
        order = memory_order(p) or [0]
        shape = [(p.shape or (1,))[axis] for axis in order]
        strides = [(p.stride() or (1,))[axis] for axis in order]
        placed = sorted(((order.index(view.axis), view) for view in by_tensor.get(i, [])), key=lambda pair: pair[0])
        n_rows, n_cols, sums = _matrix(shape, placed, tiling)
        rows, cols = _tiles(n_rows, n_cols, sums, elements, p.element_size(), tiling)
        by_position: int | None = None  # where the slices that the views by position share begin
        tensors[i] = (
            n_rows,
            n_cols,
            len(dims),
            len(shape),
            is_dense(shape, strides),
            DTYPES[p.dtype],
            group_index[i],
            len(views),
            len(placed),
        )
        dims += [(size, [stride] * (2 + MOST_BUFFERS)) for size, stride in zip(shape, strides, strict=True)]
        for axis, view in placed:
            way = sums[axis]
            by_row, inner = (True, way) if isinstance(way, int) else (False, way.inner)
            n_slices = len(cols) if by_row else len(rows)
            at, size = workspace, n_slices * n_moments * view.n_segments if n_slices > 1 else 0
            if tiling.by_line:
                lines = n_rows if by_row else n_cols
                size = -(-n_slices * n_moments * lines * max(p.element_size(), 4) // 8)
                if not by_row and by_position is not None:
                    at, size = by_position, 0
                elif not by_row:
                    by_position = at
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
                    at,
                )
            )
            workspace += size
        tiles += [
            (*row, *col, i, col_number, row_number, 0)
            for row_number, row in enumerate(rows)
            for col_number, col in enumerate(cols)
        ]

    view_table = np.array(views, VIEW)
    spans = [
        (begin, min(begin + length, row["n_segments"]), number, row["tensor"])
        for number, row in enumerate(view_table)
        for length in [_span_length(row, tensors[row["tensor"]], tiling)]
        for begin in range(0, row["n_segments"], length)
    ]
    tile_table = np.array(tiles, TILE)
    if tiling.by_line:  # tiles of one dtype are consecutive: one kernel for each dtype
        tile_table = tile_table[np.argsort(tensors["dtype"][tile_table["tensor"]], kind="stable")]
    else:  # the largest first, so that threads end together
        sizes = (tile_table["row_end"] - tile_table["row_begin"]) * (tile_table["col_end"] - tile_table["col_begin"])
        tile_table = tile_table[np.argsort(-sizes, kind="stable")]
    return Tables(
        tensors,
        np.array(dims, DIM),
        view_table,
        tile_table,
        np.array(spans, SPAN),
        workspace,
    )
