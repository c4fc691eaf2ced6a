"""How far one step may be from its rule (oracle.py) in float64 on the same rounded inputs.

Errors are relative to the magnitudes of an operation's terms, so they hold where signed terms cancel. A rule has a
function here that counts the roundings of its update, in whatever order an engine makes them. The gate before every
timing (correctness) and the engines' tests use the same bounds, so that no case is timed under a looser bound than it
is tested under.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bench import oracle
from bench.oracle import Stepped
from noetherperf.measure.plan import View
from noetherperf.rules import adam, given, sgd
from noetherperf.rules.moments import Operand
from noetherperf.rules.rule import Buffers, Rule


def sum_eps(engine: str, dtype: torch.dtype) -> float:
    """Error of an engine's sums, relative to Σ|terms|.

    GPUs sum up to 128 numbers one by one in float32. CPUs sum up to 32 numbers of 16 bits so (csrc/sums_cpu.h):
    each is rounded as a product and by up to 32 additions, by at most eps/2 each time.

    Args:
        engine: Its name: a backend's, or one that begins with it.
        dtype: Of the parameters.
    """
    eps = torch.finfo(torch.float32).eps
    if engine.startswith(("cuda", "triton")) and dtype != torch.float64:
        return 64 * eps
    return 16.5 * eps if engine.startswith("cpu") and dtype.itemsize == 2 else 1e-13


# ---- roundings of an update ----------------------------------------------------------------------------------------


def of_step(rule: Rule[Any], p: Tensor, g: Tensor, buffers: Buffers, c: Any, dtype: torch.dtype) -> Stepped:
    """The errors of p', of the buffers after the step and of u, before they are stored.

    Args:
        rule, p, g, buffers, c: As for oracle.step.
        dtype: Of the parameters; float64 is computed in float64, all others in float32.
    """
    return _OF_STEP[rule.name](p, g, buffers, c, torch.finfo(_compute_dtype(dtype)))


def _of_sgd(p: Tensor, g: Tensor, buffers: Buffers, c: sgd.Coefficients, info: torch.finfo) -> Stepped:
    """Sums of products: a few roundings, each of at most all magnitudes together."""
    positive = sgd.Coefficients(-c.lr, c.decay, 1.0, c.buffer_decay, c.buffer_gain, c.mix_d, c.mix_v)
    sizes = oracle.step(sgd.SGD, p.abs(), g.abs(), tuple(None if v is None else v.abs() for v in buffers), positive)
    written = tuple(None if v is None else 8 * info.eps * v for v in sizes.buffers)
    return Stepped(8 * info.eps * sizes.p, written, 12 * info.eps * sizes.u)


def _of_adam(p: Tensor, g: Tensor, buffers: Buffers, c: adam.Coefficients, info: torch.finfo) -> Stepped:
    """Each line has the error of its inputs, and one eps (two roundings) for every operation and coefficient."""
    eps = info.eps
    _, (mean, mean_sq, largest), u = oracle.step(adam.ADAM, p, g, buffers, c)
    before = buffers[0]
    assert mean is not None
    assert mean_sq is not None
    assert before is not None
    d = c.sign * g + c.decay * p
    of_d = 2 * eps * (g.abs() + c.decay * p.abs())
    of_mean = (1.0 - c.beta1) * of_d + 3 * eps * (2 * before.abs() + d.abs())
    of_mean_sq = (1.0 - c.beta2) * (2 * d.abs() + of_d) * of_d + 4 * eps * mean_sq + info.tiny
    scale = mean_sq if largest is None or not c.amsgrad else largest
    root = scale.sqrt()
    of_root = root - (scale - of_mean_sq).clamp(min=0.0).sqrt() + eps * root  # below it the root is steeper
    denominator = root / c.root_sq_correction + c.eps
    of_denominator = of_root / c.root_sq_correction + 3 * eps * denominator
    least = (denominator - of_denominator).clamp(min=c.eps * (1.0 - 2 * eps))
    of_u = (of_mean / c.correction + u.abs() * of_denominator) / least + 4 * eps * u.abs()
    of_p = (c.lr * of_u).abs() + 3 * eps * ((c.keep * p).abs() + (c.lr * u).abs())
    return Stepped(of_p, (of_mean, of_mean_sq, None if largest is None else of_mean_sq), of_u)


def _of_given(p: Tensor, g: Tensor, buffers: Buffers, c: given.Coefficients, info: torch.finfo) -> Stepped:
    """p' is the buffer."""
    (v,) = buffers
    assert v is not None
    of_u = 3 * info.eps * ((c.per_lr * (p - v)).abs() + (c.decay * p).abs())
    return Stepped(torch.zeros_like(p), (torch.zeros_like(v),), of_u)


_OF_STEP: Mapping[str, Callable[..., Stepped]] = {"sgd": _of_sgd, "adam": _of_adam, "given": _of_given}


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- what is stored and summed -------------------------------------------------------------------------------------


def of_stored(expected: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound of a parameter or buffer: its rounding to dtype, and the rounding of the step's arithmetic.

    Args:
        expected: p' or a buffer of the oracle, float64.
        error: Of `of_step`, of the same shape.
        dtype: In which it is stored.
    """
    info = torch.finfo(dtype)
    spacing = info.eps * info.smallest_normal  # of the numbers around zero
    return spacing + info.eps * expected.abs() + (1.0 + info.eps) * error


def of_moments(
    rule: Rule[Any], options: Any, view: View, factors: Mapping[Operand, Tensor], errors: Stepped, sums_eps: float
) -> Tensor:
    """Bound of moments [n moments, n_segments]: of the sum, and of the rounding of u and the buffer in it.

    Charges and the gradient's moments are sums of exact products.

    Args:
        rule, options, view: As for oracle.moments.
        factors: oracle.operands.
        errors: Of `of_step`.
        sums_eps: sum_eps of the engine.
    """
    exact = {which: x.double().abs() for which, x in factors.items()}
    largest = dict(exact)
    largest[Operand.U] = exact[Operand.U] + errors.u
    if Operand.V in exact and (of_v := errors.buffers[0]) is not None:
        largest[Operand.V] = exact[Operand.V] + of_v
    terms, bounded = (oracle.moments(rule, options, view, x) for x in (exact, largest))
    return sums_eps * bounded + (bounded - terms)


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Raise AssertionError where an element is further from the expected one than its bound; NaN counts as such."""
    excess = ((actual.double() - expected).abs() - bound).max().item() if actual.numel() else 0.0
    assert excess <= 0.0, f"{what}: {excess:.3g} beyond its bound"
