"""Names of symmetries as loggers take them."""

import itertools
import re
from collections.abc import Sequence


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
