"""What a caption says of a figure's data, so that it can be checked."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Claim", "Data", "slope"]

#: A figure's data: arrays of numbers and text, by name.
Data = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Claim:
    """A number taken from a figure's data, and between which bounds the caption says it is.

    Attributes:
        text: What the number is.
        value: As found.
        low, high: The bounds, themselves allowed.
    """

    text: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value is between the bounds; not a number never is."""
        return self.low <= self.value <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON; a bound that is infinite is left out."""
        bounds = {name: bound for name in ("low", "high") if math.isfinite(bound := getattr(self, name))}
        return {"text": self.text, "value": self.value, **bounds, "holds": self.holds}


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The power p of y ∝ xᵖ, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
