"""Stage 2: a program combines the moments of one span and advances its laws.

All programs share the writes of the tensors' ages; the first advances the clock.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from noetherperf.rules.law import Law
from noetherperf.triton_kernels.plan import load_group_number, load_span, load_tensor, load_view, read_float
from noetherperf.triton_kernels.rows import advance, load_ages, load_group, n_taken, propagate, variant_of
from noetherperf.triton_kernels.slices import store_columns
from noetherperf.triton_kernels.spans import FEW, LONG_SPAN, SHORT_SPAN, clear, gather_span

NORM = tl.constexpr(int(Law.NORM))
AGES = tl.constexpr(128)  # that a program writes at once


class LawStates(NamedTuple):
    translations: tl.tensor
    translations_stride: tl.tensor
    norms: tl.tensor
    norms_stride: tl.tensor


@triton.jit
def write_ages(tensors, groups, addresses, first, ages, chosen, n_tensors, skipped, RULE: tl.constexpr):
    """Increments the ages of tensors whose buffers the step writes."""
    for begin in range(tl.program_id(0) * AGES, n_tensors, tl.num_programs(0) * AGES):
        i = begin + tl.arange(0, AGES).to(tl.int64)
        mask = i < n_tensors
        takes_part = mask & (tl.load(addresses + (2 + RULE.n_buffers) * i + 1, mask, 0) != 0)
        group = load_group_number(tensors, i, mask)
        age = tl.load(chosen + i, mask, 0) - tl.load(first + i, mask, 0)
        older = tl.minimum(age + 1, RULE.n_ages - 1)
        is_older = load_ages(groups, group, mask) & (not skipped)
        tl.store(ages + i, tl.where(is_older, older, age).to(tl.uint8), takes_part)


@triton.jit
def advance_clock(clock, rows, groups, n_groups, RULE: tl.constexpr):
    """By one step, and by the time that it takes in each parameter group."""
    tl.store(clock, tl.load(clock) + 1.0)
    for i in range(n_groups):
        row = rows + load_group(groups, i).row * RULE.n_numbers
        tl.store(clock + 1 + i, tl.load(clock + 1 + i) + tl.load(row + len(RULE.coefficients)))


@triton.jit
def advance_segments(RULE: tl.constexpr, i: tl.constexpr, numbers, states, view, segments, m, mask):
    """Advances component i of a view's segments, where the view has its law."""
    if RULE.components[i].law == NORM:
        at, state, stride = view.norm, states.norms, states.norms_stride
    else:
        at, state, stride = view.translation, states.translations, states.translations_stride
    if at >= 0:
        advance(RULE, i, numbers, state + (RULE.components[i].row * stride + at + segments), stride, m, mask)


@triton.jit
def finish(
    span,
    view,
    tensor,
    workspace,
    moments,
    stride,
    n_summed,
    states,
    numbers,
    propagator,
    RULE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Combines the moments of a span; with states, advances its laws and its tensor's propagators."""
    m = gather_span(span, view, tensor, workspace, n_summed, RULE, WIDTH)
    segments = span.begin + tl.arange(0, WIDTH)
    mask = segments < span.end
    store_columns(moments + view.segment, m, segments, span.end, stride, len(RULE.moments))
    if states is not None:
        for i in tl.static_range(len(RULE.components)):
            advance_segments(RULE, i, numbers, states, view, segments, m, mask)
        if (span.begin == 0) & (span.view == tensor.view):
            propagate(RULE, propagator, numbers)


@triton.jit(
    do_not_specialize=[
        "moments_stride",
        "translations_stride",
        "norms_stride",
        "n_spans",
        "n_tensors",
        "n_groups",
    ]
)
def stage_2(
    tensors,
    views,
    spans,
    scalars,
    rows,
    groups,
    addresses,
    first,
    ages,
    chosen,
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
    n_groups,
    RULE: tl.constexpr,
    MEASURING: tl.constexpr,
):
    """Finishes one span."""
    program = tl.program_id(0)
    skipped = False
    if not MEASURING:
        skipped = read_float(tl.load(scalars + 1), 0.0) != 0.0
        write_ages(tensors, groups, addresses, first, ages, chosen, n_tensors, skipped, RULE)
        if (program == 0) & (not skipped):
            advance_clock(clock, rows, groups, n_groups, RULE)
    if (program >= n_spans) | skipped:
        return

    span = load_span(spans, program)
    view = load_view(views, span.view)
    tensor = load_tensor(tensors, span.tensor)
    n_summed = RULE.n_common + 0 * tensor.dtype
    states, numbers = None, None
    if not MEASURING:
        at = addresses + (2 + RULE.n_buffers) * span.tensor
        if tl.load(at + 1) == 0:  # charges stay, moments of gradient and update are zero, laws do not advance
            clear(moments + view.segment, moments_stride, span, RULE.n_charges, len(RULE.moments))
            return
        group = load_group(groups, tensor.group)
        variant = variant_of(RULE, group.variant, tl.load(at + 2) != 0, tensor.n_views > 0)
        n_summed = n_taken(RULE, variant)
        states = LawStates(translations, translations_stride, norms, norms_stride)
        numbers = rows + tl.load(chosen + span.tensor).to(tl.int64) * RULE.n_numbers
    own = propagators + span.tensor * (4 * len(RULE.propagated))
    n_segments = span.end - span.begin
    if n_segments <= FEW:
        finish(span, view, tensor, workspace, moments, moments_stride, n_summed, states, numbers, own, RULE, FEW)
    elif n_segments <= SHORT_SPAN:
        finish(span, view, tensor, workspace, moments, moments_stride, n_summed, states, numbers, own, RULE, SHORT_SPAN)
    else:
        finish(span, view, tensor, workspace, moments, moments_stride, n_summed, states, numbers, own, RULE, LONG_SPAN)
