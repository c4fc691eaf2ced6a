"""One formula, two executions: on Python's floats, and on float64 tensors of no dimensions, on their device.

The host does not read a learning rate on a device. Numbers that depend on it are computed there, by the same functions.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

#: A number: a float, or a float64 tensor of no dimensions.
Number = float | Tensor

T = TypeVar("T", float, Tensor)


def exp(x: Number) -> Number:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def sqrt(x: Number) -> Number:
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def sin(x: Number) -> Number:
    return torch.sin(x) if isinstance(x, Tensor) else math.sin(x)


def cos(x: Number) -> Number:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def copysign(x: Number, y: Number) -> Number:
    """|x| with the sign of y."""
    if isinstance(x, Tensor):
        return torch.copysign(x, y)
    return math.copysign(x, float(y))


def choose(holds: "bool | Tensor", then: Callable[[], tuple[Number, ...]], otherwise: Callable[[], tuple[Number, ...]]):  # type: ignore[no-untyped-def]
    """`then()` if the condition holds, else `otherwise()`; for tensors both are computed."""
    if not isinstance(holds, Tensor):
        return then() if holds else otherwise()
    return tuple(torch.where(holds, a, b) for a, b in zip(then(), otherwise(), strict=True))


def two_sum(a: T, b: T) -> tuple[T, T]:
    """The rounded sum a + b, and its rounding error, which is exact.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2.
    """
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def two_product(a: Number, b: Number) -> tuple[Number, Number]:
    """The rounded product a · b, and its rounding error: exact unless it underflows; 0 if the halves overflow.

    Source: Dekker (1971), "A floating-point technique for extending the available precision", Numer. Math. 18.
    """
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    if isinstance(rest, Tensor):
        return product, torch.where(torch.isfinite(rest), rest, 0.0)
    return product, rest if math.isfinite(rest) else 0.0


def _halves(a: Number) -> tuple[Number, Number]:
    """A number as the sum of two of 26 bits."""
    scaled = 134217729.0 * a  # 2²⁷ + 1
    high = scaled - (scaled - a)
    return high, a - high


def times(a: tuple[Number, Number], b: Number) -> tuple[Number, Number]:
    """A number with its rounding error, times a number; the product has the same form."""
    product, rest = two_product(a[0], b)
    return product, rest + a[1] * b
