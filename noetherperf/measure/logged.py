"""What loggers take: safe names, and one number for all groups of a symmetry."""

import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def logged(names: Sequence[str]) -> list[str]:
    """Names that are safe for loggers, all different; safe names are unchanged."""
    cleaned = list(map(_clean, names))
    used = {name for name, clean in zip(names, cleaned, strict=True) if name == clean}
    for i, (name, clean) in enumerate(zip(names, cleaned, strict=True)):
        if name != clean:
            candidates = itertools.chain([clean], (f"{clean}.{number}" for number in itertools.count(2)))
            cleaned[i] = next(candidate for candidate in candidates if candidate not in used)
            used.add(cleaned[i])
    return cleaned


def _clean(name: str) -> str:
    """A name without characters that loggers refuse, and without the path parts "", "." and ".."."""
    parts = re.sub(r"[^\w\-./: ]", "_", name).split("/")
    return "/".join("_" * max(1, len(part)) if part in ("", ".", "..") else part for part in parts)


@np.errstate(all="ignore")
def quantiles(
    values: NDArray[np.float64], starts: NDArray[np.int64], stops: NDArray[np.int64], at: float = 0.5
) -> NDArray[np.float64]:
    """A quantile of each run of values, [n runs], linear between two values; without NaN, NaN if there is nothing else.

    Args:
        values: [n values].
        starts, stops: Of the runs, which follow each other without gaps and are not empty.
        at: Which one, 0 to 1; 0.5 is the median.
    """
    run = np.repeat(np.arange(len(starts)), stops - starts)
    ordered = values[np.lexsort((values, run))]  # NaN last in each run
    n = np.add.reduceat(~np.isnan(values), starts, dtype=np.int64)
    place = at * np.maximum(n - 1, 0)
    low = place.astype(np.int64)
    share, lower = place - low, ordered[starts + low]
    upper = ordered[starts + np.minimum(low + 1, np.maximum(n - 1, 0))]
    found: NDArray[np.float64] = np.where(lower == upper, lower, (1.0 - share) * lower + share * upper)
    return np.where(share == 0.0, lower, found)  # an infinite upper value has no share then
