"""Spans: some segments of one view. A program of stage 2 adds up their moments from slices of the workspace.

All slices of all lines of a segment are added in a fixed order, in float64.
"""

import triton
import triton.language as tl

from noetherperf.triton_kernels.dtypes import FLOAT64
from noetherperf.triton_kernels.moments import sums_along, zeros

N_THREADS = tl.constexpr(128)  # of a program of stage 2
# Segments of a program, for many or few terms per segment; noetherperf.engines.tiling.TRITON.span_segments.
SHORT_SPAN, LONG_SPAN = tl.constexpr(32), tl.constexpr(128)
FEW = tl.constexpr(4)  # a view with so few segments has many terms for each


@triton.jit
def clear(moments, stride, span, FIRST: tl.constexpr, END: tl.constexpr):
    """Sets some moments of a span to zero."""
    segments = span.begin + tl.arange(0, LONG_SPAN)
    for i in tl.static_range(FIRST, END):
        tl.store(moments + i * stride + segments, tl.zeros([LONG_SPAN], tl.float64), segments < span.end)


@triton.constexpr_function
def always_summed(rule, i):
    """Whether every variant sums moment i."""
    return i < min(rule.taken)


@triton.jit
def load_term(ptr, mask, n_summed, RULE: tl.constexpr, i: tl.constexpr):
    """Moment i of a slice; zero from n_summed on."""
    if always_summed(RULE, i):
        return tl.load(ptr, mask, 0.0).to(tl.float64)
    else:
        return tl.load(ptr, mask & (i < n_summed), 0.0).to(tl.float64)


@triton.jit
def add_terms(m, ptr, n_lines, mask, n_summed, RULE: tl.constexpr):
    """Adds the terms at ptr, ptr + n_lines, ptr + 2 n_lines, … to the moments; zero from moment n_summed on."""
    sums = ()
    for i in tl.static_range(len(RULE.moments)):
        sums = sums + (m[i] + load_term(ptr + i * n_lines, mask, n_summed, RULE, i),)
    return sums


@triton.jit
def gather(slices, view, tensor, segments, end, n_summed, RULE: tl.constexpr, TERMS: tl.constexpr, WIDTH: tl.constexpr):
    """The moments of segments [WIDTH] of a view: all slices of all their lines, TERMS at a time."""
    n_lines = tl.where(view.by_row != 0, tensor.n_rows, tensor.n_cols)
    run = view.n_segments * view.inner
    repeats = tl.where(view.by_row != 0, 1, n_lines // run)
    n_terms = view.n_slices * repeats * view.inner
    m = zeros(len(RULE.moments), TERMS, WIDTH, tl.float64)
    for begin in range(0, n_terms, TERMS):
        term = begin + tl.arange(0, TERMS)
        group = term // view.inner  # counts slices and repeats
        line = group % repeats * run + term % view.inner
        at = group // repeats * len(RULE.moments) * n_lines + line
        mask = (term < n_terms)[:, None] & (segments < end)[None, :]
        m = add_terms(m, slices + (at[:, None] + segments[None, :] * view.inner), n_lines, mask, n_summed, RULE)
    return sums_along(m, 0, len(RULE.moments))


@triton.jit
def gather_span(span, view, tensor, workspace, n_summed, RULE: tl.constexpr, WIDTH: tl.constexpr):
    """The moments of a span of at most WIDTH segments, two elements a thread at a time."""
    TERMS: tl.constexpr = 2 * N_THREADS // WIDTH
    segments = span.begin + tl.arange(0, WIDTH)
    if tensor.dtype == FLOAT64:
        m = gather(workspace + view.workspace, view, tensor, segments, span.end, n_summed, RULE, TERMS, WIDTH)
    else:
        slices = (workspace + view.workspace).to(tl.pointer_type(tl.float32), bitcast=True)
        m = gather(slices, view, tensor, segments, span.end, n_summed, RULE, TERMS, WIDTH)
    return m
