"""Makes a new record on disk, in the place of an old one if wanted: a path holds a whole record or none."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from noetherperf.record.array import Array
from noetherperf.record.files import PARTIAL, replace_json
from noetherperf.record.layout import chunk_width, kinds, positions, rows_per_chunk
from noetherperf.record.lock import Lock, lock_record
from noetherperf.record.metadata import ROOT, new_metadata, read_metadata, write_metadata
from noetherperf.record.pending import Row
from noetherperf.record.writer import writer_of


def is_occupied(path: Path) -> bool:
    """Whether there is something at the path, other than an empty directory."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def check_overwritable(path: Path) -> None:
    """Check that overwriting deletes a record and nothing else.

    Raises:
        FileExistsError: The path is no record, or holds other files too.
    """
    try:
        ours = {ROOT, *read_metadata(path)["consolidated_metadata"]["metadata"]}
    except (ValueError, KeyError, TypeError) as error:
        raise FileExistsError(
            f"exists='overwrite' deletes noetherperf records only, and {error}; remove it yourself, or record to "
            "another path"
        ) from error
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in ours and not _is_leftover(entry))
    if others:
        raise FileExistsError(
            f"exists='overwrite' would delete {others[0]!r} too, which lies in {str(path)!r} and is no part of the "
            "record; move it away, or record to another path"
        )


def _is_leftover(entry: Path) -> bool:
    """Whether a process was killed while it wrote this file of the record."""
    return entry.name.startswith(f".{ROOT}.") or entry.suffix == PARTIAL


def create_record(
    path: Path, attributes: Mapping[str, Any], series: Mapping[str, str], initial: NDArray[np.float64], row: Row
) -> Lock:
    """Build a record without rows beside the path, then move it there.

    Args:
        path: Free, an empty directory, or a record that may be overwritten.
        attributes: Of the record.
        series: Name -> precision of the recorded series.
        initial: Charges when measuring began, [all groups].
        row: A row as it will be recorded, for the shapes.

    Returns:
        The lock on it.

    Raises:
        BlockingIOError: Another process writes to the old record.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # An empty directory is kept: it may be the working directory, have permissions of its own, or be a mount point.
    is_empty = path.is_dir() and not any(path.iterdir())
    # Short names, since the record's own may be as long as a file name can be.
    building, old = ((path if is_empty else path.parent) / f".noetherperf.{uuid4().hex}" for _ in range(2))
    try:
        _build(building, attributes, series, initial, row)
        lock = lock_record(building)
        if is_empty:
            for entry in sorted(building.iterdir(), key=lambda entry: entry.name == ROOT):  # last: it makes the record
                entry.replace(path / entry.name)
            building.rmdir()
            return lock
        if path.exists():
            earlier = writer_of(path)
            with lock_record(path), earlier.quiet() if earlier else nullcontext():
                path.replace(old)
                if earlier:
                    earlier.forget()  # its rows belong to the old record
        building.replace(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return lock


def _build(
    path: Path, attributes: Mapping[str, Any], series: Mapping[str, str], initial: NDArray[np.float64], row: Row
) -> None:
    constant = {"initial": initial, **positions(attributes["n_groups"])}
    widths = {name: values.shape for name, values in row.items()}
    n_rows = rows_per_chunk(widths)
    metadata = {}
    hyperparameters, probes = attributes["hyperparameters"], attributes["probes"]
    for name, kind in kinds(series, hyperparameters, probes, lambda key: 1 + row[key].ndim, logged=True).items():
        if name in constant:
            shape: tuple[int, ...] = constant[name].shape
            chunk = chunk_width(kind, shape)
        else:
            shape = (0, *widths[name])
            chunk = (n_rows, *chunk_width(kind, widths[name]))
        array = Array(
            path / name,
            attributes["record"],
            series.get(name, kind.dtypes[0]),
            shape,
            chunk,
            kind.dims,
            kind.codecs,
            attributes=kind.labels,
        )
        array.folder.mkdir(parents=True)
        metadata[name] = array.metadata()
        replace_json(array.folder / "zarr.json", metadata[name])
        if name in constant:
            array.write(0, constant[name])
    write_metadata(path, new_metadata(attributes, metadata))
