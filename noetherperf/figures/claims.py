"""Claims of captions: numbers from a figure's data with bounds that can be checked."""

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
    """A number from a figure's data, and the bounds that the caption states for it.

    Attributes:
        text: The meaning of the number.
        value: The number.
        low, high: The bounds, inclusive.
    """

    text: str
    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def holds(self) -> bool:
        """Whether the value is within the bounds; False for NaN."""
        return self.low <= self.value <= self.high

    def to_dict(self) -> dict[str, Any]:
        """As data for JSON, without infinite bounds."""
        bounds = {name: bound for name in ("low", "high") if math.isfinite(bound := getattr(self, name))}
        return {"text": self.text, "value": self.value, **bounds, "holds": self.holds}


def slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The power p of y ∝ xᵖ, by least squares on the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
