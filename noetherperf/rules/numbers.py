"""The numbers of a parameter group, checked whenever they are read: a constructor sees only the first ones."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from noetherperf.common.untrusted import shown


def device_lr(group: Mapping[str, Any]) -> Tensor | None:
    """A parameter group's learning rate if it is a tensor on a device, where reading it would wait for the device."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else None


def check_number(name: str, value: Any) -> None:
    """Raise unless an option is a number, or a tensor of one element, which is not read.

    Raises:
        TypeError: It is none.
        ValueError: It is a tensor of several elements, or of none.
    """
    if isinstance(value, float | int):  # nearly always
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")  # torch's words
        if not value.is_complex():
            return
    elif not isinstance(value, str | bytes | bytearray):
        with suppress(TypeError, ValueError, OverflowError):
            float(value)
            return
    raise TypeError(f"{name} must be a number, not {shown(value)}")


def check_betas(betas: Any) -> None:
    """Raise unless betas are two numbers.

    Raises:
        TypeError: They are none.
        ValueError: There are more or fewer, or one is a tensor of several elements.
    """
    try:
        pair = list(betas)
    except TypeError:
        raise TypeError(f"betas must be two numbers, not {shown(betas)}") from None
    if len(pair) != 2:
        raise ValueError(f"betas must be two numbers, not {len(pair)}: {shown(betas)}")
    for i, beta in enumerate(pair):
        check_number(f"betas[{i}]", beta)


def number_in(group: Mapping[str, Any], name: str) -> float:
    """An option of a parameter group as a number; where it is on a device, the host waits for it.

    Raises:
        TypeError, ValueError: As `check_number`.
    """
    value = group[name]
    check_number(name, value)
    return float(value)


def lr_in(group: Mapping[str, Any]) -> float:
    """A parameter group's learning rate; NaN if it is on a device, where it is not read.

    Raises:
        TypeError, ValueError: As `check_number`.
    """
    if device_lr(group) is None:
        return number_in(group, "lr")
    check_number("lr", group["lr"])
    return math.nan


def betas_in(group: Mapping[str, Any]) -> tuple[float, float]:
    """A parameter group's β₁ and β₂; where they are on a device, the host waits for it.

    Raises:
        TypeError: As `check_betas`.
        ValueError: As `check_betas`, or one is not in [0, 1).
    """
    betas = group["betas"]
    check_betas(betas)
    beta1, beta2 = map(float, betas)
    for i, beta in enumerate((beta1, beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(
                f"betas[{i}] of a parameter group is {beta}, but must be at least 0 and below 1; "
                "set group['betas'] to two such numbers"
            )
    return beta1, beta2
