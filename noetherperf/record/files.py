"""Files that are replaced atomically: at any moment, a reader sees the old content or the new, never a mixture."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

PARTIAL = ".partial"  # suffix of a file that is being written; one that stays was left by a killed process


def replace_file(path: Path, data: bytes) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_name(f".{uuid4().hex}{PARTIAL}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def replace_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole or not at all."""
    replace_file(path, json.dumps(content).encode())


def outside_records(path: Path, option: str) -> Path:
    """A path to write to, which must not be inside a record: overwriting the record would refuse a foreign file.

    Raises:
        ValueError: It is; the message names the option.
    """
    for folder in (path.resolve(), *path.resolve().parents):
        if (folder / "zarr.json").is_file():
            raise ValueError(f"{option}: {str(path)!r} is inside the record {str(folder)!r}; choose a place beside it")
    return path
