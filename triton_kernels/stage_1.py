"""Stage 1: a program steps one tile and writes the sums of its rows and columns to the workspace (engines/tiling.py).

Programs also choose every tensor's row, by its age, and write its index for stage 2 (engines/gpu.py).
"""

import triton
import triton.language as tl

from noetherperf.triton_kernels.blocks import BY_ELEMENTS, BY_STRIDES, BY_VECTORS, Matrix
from noetherperf.triton_kernels.dtypes import element, scalar, vector
from noetherperf.triton_kernels.options import STRIDED, occurs
from noetherperf.triton_kernels.plan import N_DIM_WORDS, load_tensor, load_tile, load_view, read_float
from noetherperf.triton_kernels.rows import choose_row, load_coefficients, load_group, variant_of
from noetherperf.triton_kernels.tiles import walk_tile


@triton.jit
def load_places(addresses, DTYPE: tl.constexpr, STEP: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a tensor's parameter, gradient and the buffers that the step reads."""
    POINTER: tl.constexpr = tl.pointer_type(element(DTYPE))
    places = ()
    for i in tl.static_range(2 + STEP.n_read):
        place = tl.load(addresses + i).to(POINTER)
        places = places + (tl.multiple_of(place, 16) if ALIGNED else place,)
    return places


@triton.jit
def misalignment(addresses, STEP: tl.constexpr):
    """0 if all that the step reads of a tensor is aligned to 16 bytes."""
    bits = tl.load(addresses)
    for i in tl.static_range(0 if STEP.updates else 1, 1 + STEP.n_read):
        bits = bits | tl.load(addresses + 1 + i)
    return bits & 15


@triton.jit(do_not_specialize=["tile_begin", "n_tensors"])
def stage_1(
    tensors,
    dims,
    views,
    tiles,
    scalars,
    rows,
    groups,
    addresses,
    first,
    given_ages,
    ages,
    chosen,
    workspace,
    tile_begin,
    n_tensors,
    DTYPE: tl.constexpr,
    RULE: tl.constexpr,
    STEP: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    UPDATE: tl.constexpr,
    KINDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Steps one tile."""
    program = tl.program_id(0)
    if STEP.updates:
        for i in range(program, n_tensors, tl.num_programs(0)):
            tl.store(chosen + i, choose_row(RULE, tl.load(first + i), tl.load(given_ages + i), tl.load(ages + i)))

    tile = load_tile(tiles, tile_begin + program)
    tensor = load_tensor(tensors, tile.tensor)
    at = addresses + (2 + RULE.n_buffers) * tile.tensor
    S: tl.constexpr = scalar(DTYPE)
    c = ()
    scale = tl.cast(1.0, S)
    if STEP.updates:
        group = load_group(groups, tensor.group)
        variant = variant_of(RULE, group.variant, tl.load(at + 2) != 0, tensor.n_views > 0)
        here = (tl.load(at + 1) != 0) & (variant == STEP.variant)
        if (not here) | (read_float(tl.load(scalars + 1), 0.0) != 0.0):
            return
        i = tile.tensor
        row = choose_row(RULE, tl.load(first + i), tl.load(given_ages + i), tl.load(ages + i))
        c = load_coefficients(RULE, COEFFICIENTS, rows + row * RULE.n_numbers, S)
        if STEP.scaled:
            scale = read_float(tl.load(scalars), 1.0).to(S)
    by_row = tensor.n_views < 0
    if tensor.n_views > 0:
        by_row = load_view(views, tensor.view).by_row != 0
    by_col = tensor.n_views > by_row.to(tl.int64)
    is_run = (tensor.n_rows == 1) & (not by_col)
    vectors = (misalignment(at, STEP) == 0) & (is_run | (tensor.n_cols % vector(DTYPE) == 0))
    if tensor.dense == 0:
        if occurs(KINDS, STRIDED):
            x = Matrix(load_places(at, DTYPE, STEP, False), dims + tensor.dims * N_DIM_WORDS, tensor.n_dims)
            walk_tile(
                x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, STEP, UPDATE, KINDS, BY_STRIDES, 1
            )
    elif vectors:
        x = Matrix(load_places(at, DTYPE, STEP, True), dims, tensor.n_dims)
        walk_tile(
            x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, STEP, UPDATE, KINDS, BY_VECTORS, STAGES
        )
    else:
        x = Matrix(load_places(at, DTYPE, STEP, False), dims, tensor.n_dims)
        walk_tile(
            x, tile, tensor, views, by_row, by_col, workspace, c, scale, DTYPE, STEP, UPDATE, KINDS, BY_ELEMENTS, 1
        )
