"""Untrusted data: strict JSON, checks of its objects, and values cut short for error messages."""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxstring = _SHORT.maxother = 200


def shown(x: object) -> str:
    """repr for an error message, cut short if it is long or deep."""
    try:
        return _SHORT.repr(x)
    except Exception:  # an integer of more digits than Python prints, for example
        return f"a value of type {type(x).__name__}"


def load_json(text: str | bytes, what: str) -> Any:
    """Plain data from strict JSON: no field twice in one object, no NaN or Infinity.

    Args:
        text: The JSON text.
        what: The name of the data in error messages.

    Raises:
        ValueError: The text is not strict JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{what}: field {shown(twice)} is there twice in one object")
        return data

    def refuse(constant: str) -> None:
        raise ValueError(f"{what}: {constant} is not finite, and JSON has finite numbers only")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what}: is no JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{what}: its JSON is nested too deeply") from error


def check_fields(what: str, data: object, *, required: set[str], known: set[str]) -> None:
    """Raise ValueError unless the data is an object with every required field and no unknown one."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}: must be an object, got {shown(data)}")
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"{what}: unknown field {shown(unknown[0])}; known are {', '.join(sorted(known))}")
    if missing := sorted(required - set(data)):
        raise ValueError(f"{what}: field {missing[0]!r} is missing")
