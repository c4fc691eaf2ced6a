"""Symmetries as JSON text, and back. The text is data: nothing in it is executed."""

import json
from collections.abc import Iterable

from noetherperf.common.untrusted import check_fields, load_json, shown
from noetherperf.symmetry.kinds import Symmetry

__all__ = ["from_json", "to_json"]

VERSION = 1


def to_json(symmetries: Iterable[Symmetry]) -> str:
    """Symmetries as JSON text, which `from_json` reads back equal.

    Args:
        symmetries: Any number of symmetries.

    Returns:
        {"version": 1, "symmetries": [...]}, indented.
    """
    data = {"version": VERSION, "symmetries": [symmetry.to_dict() for symmetry in symmetries]}
    return json.dumps(data, indent=2, ensure_ascii=False)


def from_json(text: str | bytes) -> tuple[Symmetry, ...]:
    """Symmetries from the text that `to_json` wrote.

    Args:
        text: JSON, or the bytes of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Returns:
        The symmetries, in the order of the text.

    Raises:
        ValueError: The text is no JSON, of another version, has an unknown kind or field, or a field twice.
    """
    data = load_json(text, "symmetries file")
    fields = {"version", "symmetries"}
    check_fields("symmetries file", data, required=fields, known=fields)
    if type(data["version"]) is not int or data["version"] != VERSION:
        raise ValueError(f"symmetries file: version {shown(data['version'])}, but only {VERSION} can be read")
    if not isinstance(data["symmetries"], list):
        raise ValueError(f"symmetries file: symmetries must be a list, got {shown(data['symmetries'])}")
    return tuple(Symmetry.from_dict(item) for item in data["symmetries"])
