"""Compile options of stage 1: the kinds of tiles that occur, and the registers of a program."""

from typing import Any

import numpy as np
import triton
import triton.language as tl

from noetherperf.triton_kernels.blocks import block_cols, n_threads
from noetherperf.triton_kernels.dtypes import FLOAT32, vector
from noetherperf.triton_kernels.rules import Step

# The kinds of tiles, by their sums; a kernel is compiled for the kinds that occur.
RUNS, ROWS, COLUMNS, BOTH, WIDE, NARROW, STRIDED, VIEWED = (tl.constexpr(1 << i) for i in range(8))


@triton.constexpr_function
def occurs(kinds, kind):
    return kinds & kind != 0


def options(dtype: int, step: Step, kinds: int, lanes: int, hip: bool) -> dict[str, int]:
    """Compile options of stage 1.

    Registers decide how many threads share a multiprocessor's 65,536, and so how many loads are in flight: 512 with 128
    each, 384 with 168, 320 with 200 (in programs of 64), 256 with 255. Kernels that need more than 128 get more, so
    that nothing spills: sums of columns, where a thread keeps two moments more than the common six of each element of a
    long vector (16 bits), or in two registers each (float64); both sums in a pipeline; several buffers; strides.

    Args:
        dtype, step, kinds: As the kernel's constants.
        lanes: Threads of a warp.
        hip: Whether the target is AMD, where registers are not limited.
    """
    has_columns, has_both = kinds & (COLUMNS.value | BOTH.value) != 0, kinds & BOTH.value != 0
    is_strided, has_many = kinds & STRIDED.value != 0, len(step.moments) > 7
    is_short = vector(dtype) == 8  # 16 bits
    registers = 128
    if dtype == FLOAT32:
        registers = 168 if has_many and (is_strided or has_both) else 128
    elif has_columns and (has_many or is_strided or (has_both and is_short)):
        more = is_short and (is_strided or (has_both and has_many))
        registers = 255 if step.n_read > (1 if has_both else 2) else 200 if more else 168
    return {"num_warps": n_threads(dtype) // lanes} | ({} if hip else {"maxnreg": registers})


def n_stages(hip: bool) -> int:
    """Stages of stage 1's pipeline: a block that is stepped, and two whose loads are in flight.

    Args:
        hip: Whether the target is AMD, where what is in flight would take registers: no pipeline.
    """
    return 1 if hip else 3


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
