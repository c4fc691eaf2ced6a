"""How far one step may be from its rule (oracle.py) in float64 on the same rounded inputs.

Bounds are relative to Σ|terms|, which the same formulas give on magnitudes: so they hold where signed sums cancel. The
gate before every timing (correctness) and the engines' tests use the same ones, so that no case is timed under a looser
bound than it is tested under.
"""

import torch
from torch import Tensor

from bench import oracle
from noetherperf.rules.moments import Moment
from noetherperf.rules.sgd import Coefficients


def sum_eps(engine: str, dtype: torch.dtype) -> float:
    """Error of an engine's sums, relative to Σ|terms|: GPUs sum up to 128 numbers one by one in float32.

    Args:
        engine: Its name: a backend's, or one that begins with it.
        dtype: Of the parameters.
    """
    in_float32 = engine.startswith(("cuda", "triton")) and dtype != torch.float64
    return 64 * torch.finfo(torch.float32).eps if in_float32 else 1e-13


def magnitudes(p: Tensor, g: Tensor, v: Tensor | None, c: Coefficients) -> tuple[Tensor, Tensor | None, Tensor]:
    """|p'|, |v'|, |u| as sums of the magnitudes of their terms."""
    positive = Coefficients(-c.lr, c.decay, 1.0, c.buffer_decay, c.buffer_gain, c.mix_d, c.mix_v)
    return oracle.step(p.abs(), g.abs(), None if v is None else v.abs(), positive)


def of_stored(expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Bound of a parameter or buffer: its rounding to dtype, and the rounding of the step's arithmetic.

    Args:
        expected: p' or v' of the oracle, float64.
        magnitude: |p'| or |v'| of `magnitudes`, of the same shape.
        dtype: In which it is stored.
    """
    info = torch.finfo(dtype)
    spacing = info.eps * info.smallest_normal  # of the numbers around zero
    return spacing + info.eps * expected.abs() + 8 * _compute_eps(dtype) * magnitude


def of_moments(sums: Tensor, dtype: torch.dtype, sums_eps: float) -> Tensor:
    """Bound of moments.

    Charges and the gradient's moments are sums of exact products; the update's carry its rounding too.

    Args:
        sums: oracle.moments of magnitudes, [n moments, n_segments].
        dtype: Of the parameters.
        sums_eps: sum_eps of the engine.
    """
    bound = sums * sums_eps
    bound[Moment.SQ_U :] *= 1 + 24 * _compute_eps(dtype) / sums_eps
    return bound


def _compute_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor, what: str) -> None:
    """Raise AssertionError where an element is further from the expected one than its bound; NaN counts as such."""
    excess = ((actual.double() - expected).abs() - bound).max().item() if actual.numel() else 0.0
    assert excess <= 0.0, f"{what}: {excess:.3g} beyond its bound"
