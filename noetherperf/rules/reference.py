"""The step and its moments in plain torch: what every kernel is tested against, and a backend of its own.

csrc/step.h and triton_kernels/step.py mirror this file: same names, same order. Formulas: docs/theory.md, section 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from noetherperf.rules.hyper import Coefficients
from noetherperf.rules.moments import N_MOMENTS, Moment


def step(p: Tensor, g: Tensor, v: Tensor | None, c: Coefficients) -> tuple[Tensor, Tensor | None, Tensor]:
    """One step of one tensor: d = s g + λ p, v' = b v + a d, u = c_d d + c_v v', p' = p − η u.

    Args:
        p: Parameter before the step, in the dtype to compute in.
        g: Gradient of the loss alone; same shape and dtype.
        v: Momentum buffer, zeros the first time; None where there is none, which a step with momentum cannot do with.
        c: The step's coefficients.

    Returns:
        (p', v', u) in the compute dtype, not rounded to any other; v' is v where the step writes no buffer.
    """
    d = c.sign * g + c.decay * p
    if c.mix_v != 0.0:
        assert v is not None, "a step with momentum needs a buffer"
        v = c.buffer_decay * v + c.buffer_gain * d
        u = v if c.mix_d == 0.0 else d + c.mix_v * v
    else:
        u = d
    return p - c.lr * u, v, u


def moments(
    grouped: Callable[[Tensor], Tensor],
    stored: Tensor,
    p: Tensor,
    g: Tensor,
    u: Tensor,
    v: Tensor | None,
    c: Coefficients,
) -> Tensor:
    """The moments of one view's segments (noetherperf.rules.moments), summed in float64.

    Args:
        grouped: Reshapes a tensor to [outer, n_segments, inner] (View.grouped).
        stored: p' as stored, after rounding to the parameter's dtype.
        p, g, u, v: What step took and gave; any floating dtype.
        c: The step's coefficients.

    Returns:
        [N_MOMENTS, n_segments], float64.
    """
    stored, p, g, u = (grouped(x).double() for x in (stored, p, g, u))
    v = torch.zeros_like(u) if v is None else grouped(v).double()
    products = {
        Moment.SUM_P: stored,
        Moment.SQ_P: stored * stored,
        Moment.SUM_G: g,
        Moment.SQ_G: g * g,
        Moment.DOT_PG: p * g,
        Moment.SQ_U: u * u,
    }
    if c.mix_d != 0.0:  # with plain momentum u = v', and |u|² tells all
        products[Moment.DOT_UV] = u * v
    if c.mix_d != 0.0 and c.mix_v != 0.0:
        products[Moment.DOT_GU] = g * u
    sums = stored.new_zeros(N_MOMENTS, stored.shape[1])
    for moment, product in products.items():
        sums[moment] = product.sum((0, 2))
    return sums
