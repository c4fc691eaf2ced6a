"""The metadata of a record: one `zarr.json` at its root, read with suspicion.

The root's `zarr.json` defines what is committed: it holds the metadata, and so the length, of all arrays (consolidated
metadata). Files may be damaged or made up. So the metadata are compared with what a recorder writes, and the arrays
with the size of their files, before anything is allocated.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noetherperf.record.array import LARGEST, Array
from noetherperf.record.chunks import Damaged
from noetherperf.record.files import replace_json
from noetherperf.record.layout import FIRST_HYPERPARAMETERS, FIRST_SERIES, KINDS, OPTIONAL, kinds
from noetherperf.record.series import SERIES

ROOT = "zarr.json"
LARGEST_METADATA = 2**30  # bytes
UNITS = {kind.labels["units"] for kind in KINDS.values() if "units" in kind.labels}
NOT_A_NUMBER = ("NaN", "AAAAAAAA+H8=")  # as xarray writes it where it copies a record


def read_metadata(path: Path) -> dict[str, Any]:
    """The root's metadata, if the path is a record of any format.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: The path holds no record, or its metadata cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no record at {str(path)!r}")
    root, metadata = path / ROOT, None
    if root.is_file():  # reading a pipe would never end
        if root.stat().st_size > LARGEST_METADATA:
            raise ValueError(f"the record {str(path)!r} is damaged: its zarr.json has {root.stat().st_size} bytes")
        try:
            metadata = json.loads(root.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the record {str(path)!r} is damaged: its zarr.json cannot be read ({error})") from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(attributes, dict) or "noetherperf_record" not in attributes:
        raise ValueError(f"{str(path)!r} is no noetherperf record")
    return metadata


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Replace the root's metadata atomically: this commits."""
    replace_json(path / ROOT, metadata)


def new_metadata(attributes: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The root's metadata of a new record.

    Args:
        attributes: Of the record.
        arrays: `Array.metadata` of each, by name.
    """
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(arrays)},
    }


def check_attributes(attributes: Mapping[str, Any]) -> None:
    """Check that a recorder may have written them; `Record` checks the symmetries.

    Raises:
        Damaged: No recorder has written them.
    """
    of = {"n_groups": int, "symmetries": dict, "closed": bool, "reason": str, "probes": str}
    for name, kind in of.items():
        items = attributes.get(name)
        if not isinstance(items, list) or not all(type(item) is kind for item in items):
            raise Damaged(f"its attribute {name} is no list of {kind.__name__}")
    _check_balances(attributes)
    for name in ("hyperparameters", "series", "logged"):
        names = attributes.get(name, [])
        if not isinstance(names, list) or not all(type(item) is str for item in names):
            raise Damaged(f"its attribute {name} is no list of str")
        if len(set(names)) < len(names):
            raise Damaged(f"its attribute {name} has a name twice")
    if unknown := [name for name in attributes.get("series", []) if name not in SERIES]:
        raise Damaged(f"its attribute series has {unknown[0]!r}, which no recorder writes")
    n_groups, probes = attributes["n_groups"], attributes["probes"]
    if not all(0 <= n <= LARGEST for n in n_groups):
        raise Damaged("its attribute n_groups must hold numbers of groups")
    if any(len(attributes[name]) != len(n_groups) for name in ("symmetries", "closed", "reason")):
        raise Damaged("its attributes tell of different numbers of symmetries")
    if len(set(probes)) < len(probes):
        raise Damaged("two of its probes have one name")
    for name in ("record", "measurement", "writer", "rule"):
        if not isinstance(attributes.get(name, ""), str | None):
            raise Damaged(f"its attribute {name} is no text")


def _check_balances(attributes: Mapping[str, Any]) -> None:
    """Check what describes the Balances, which early records lack.

    Raises:
        Damaged: No recorder has written it.
    """
    found = [attributes.get(name, []) for name in ("balances", "balance_shapes", "balance_reasons")]
    if not all(isinstance(items, list) and len(items) == len(found[0]) for items in found):
        raise Damaged("its attributes tell of different numbers of Balances")
    for balance, shape, reason in zip(*found, strict=True):
        sizes = shape if isinstance(shape, list) and len(shape) == 2 else [None]
        if (
            not isinstance(balance, dict)
            or not isinstance(reason, str)
            or not all(type(n) is int and 0 <= n <= LARGEST for n in sizes)
        ):
            raise Damaged("its attribute balance_shapes must hold numbers of blocks and units")


def arrays_of(path: Path, metadata: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a record whose attributes are checked.

    Raises:
        Damaged: They are not the arrays that a recorder writes.
    """
    attributes = metadata["attributes"]
    consolidated = metadata.get("consolidated_metadata")
    listed = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    if not isinstance(listed, dict):
        raise Damaged("it does not say which arrays it has")
    arrays: dict[str, Array] = {}
    for name, array in listed.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise Damaged(f"its array {name!r} has a name that leads elsewhere")
        arrays[name] = Array.parse(path / name, attributes.get("record") or "", array)
    hyperparameters = attributes.get("hyperparameters", FIRST_HYPERPARAMETERS)
    is_first = attributes["noetherperf_record"] == 1
    series = FIRST_SERIES if is_first else attributes.get("series", [])

    def n_dims(key: str) -> int:
        return len(arrays[key].shape) if key in arrays else 1

    expected = kinds(series, hyperparameters, attributes["probes"], n_dims, logged=not is_first)
    optional = OPTIONAL if is_first else ()
    sizes = {"group": sum(attributes["n_groups"])}
    if missing := [name for name in expected if name not in arrays and name not in optional]:
        raise Damaged(f"its array {missing[0]} is missing")
    for name, array in arrays.items():
        kind = expected.get(name)  # other tools may add arrays
        if kind is not None and (array.dims != kind.dims or array.dtype not in kind.dtypes):
            raise Damaged(f"its array {name} has dimensions {array.dims} of {array.dtype}, not {kind.dims}")
        for dim, n in zip(array.dims, array.shape, strict=True):
            if sizes.setdefault(dim, n) != n:
                raise Damaged(f"its array {name} has {n} values along {dim}, where others have {sizes[dim]}")
        if odd := [label for label, value in array.attributes.items() if not _is_harmless(label, value)]:
            raise Damaged(f"its array {name} has the attribute {odd[0]}, by which readers would change its numbers")
    return arrays


def _is_harmless(label: str, value: Any) -> bool:
    """Whether an array's attribute leaves its numbers unchanged, for all readers that follow the CF conventions."""
    match label:
        case "units":
            return value in UNITS
        case "_FillValue":
            return value in NOT_A_NUMBER or value != value
        case _:
            return label not in ("scale_factor", "add_offset", "missing_value", "dtype", "_Unsigned", "calendar")
