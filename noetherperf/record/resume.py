"""Takes over an existing record: from an ended process, or from an earlier recorder of this process."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noetherperf.record.identity import Identity
from noetherperf.record.lock import lock_record
from noetherperf.record.pending import Row
from noetherperf.record.reader import Record, read_record
from noetherperf.record.writer import Writer, writer_of
from noetherperf.symmetry import Symmetry


def resume(
    path: Path,
    attributes: dict[str, Any],
    probe_shapes: Mapping[str, tuple[int, ...]],
    identity: Identity,
    step: int,
    row: Row,
) -> tuple[Writer, NDArray[np.int64]]:
    """Take over the record at a path.

    Args:
        path: Of the record.
        attributes: As a new record would have them; "measurement" becomes the record's.
        probe_shapes: Shape of each probe's value.
        identity: Of the present measurement; becomes the record's.
        step: The optimizer's.
        row: The present one.

    Returns:
        The record's new writer, and the steps that it has.

    Raises:
        ValueError: The record is damaged, or of other symmetries, probes or another measurement.
        BlockingIOError: Another process writes to it, or this thread is inside a write that a signal interrupts.
        OSError: The disk fails.
    """
    lock, earlier = lock_record(path), writer_of(path)
    try:
        if earlier:
            with earlier.quiet():
                pass
            earlier.flush()
        record, fault = read_record(path)
        if fault:
            raise ValueError(f"{fault}, so that it cannot be resumed; record to another path")
        _check_alike(record, attributes, probe_shapes)
        identity.resume(record, step, row)
        if earlier:
            warnings.warn(
                f"path: another Recorder of this process was writing to the record {str(path)!r}; its last "
                "rows are written, it is closed, and this one goes on",
                RuntimeWarning,
                stacklevel=4,
            )
            earlier.close()
        # The record's own: an early one lacks some arrays.
        attributes |= {"measurement": record.attrs.get("measurement"), "hyperparameters": list(record.hyperparameters)}
        writer = Writer(path, lock, attributes)
        writer.claim()
    except BaseException:
        lock.release()
        raise
    return writer, record.steps


def _check_alike(record: Record, attributes: Mapping[str, Any], probe_shapes: Mapping[str, tuple[int, ...]]) -> None:
    path = str(record.path)
    if record.rule != attributes["rule"]:
        raise ValueError(
            f"exists='resume': {path!r} records the update rule {record.rule!r}, and this optimizer's is "
            f"{attributes['rule']!r}; record to another path, or say exists='overwrite'"
        )
    if missing := {*map(str, record.hyperparameters)} - {*attributes["hyperparameters"]}:
        raise ValueError(
            f"exists='resume': {path!r} records {min(missing)!r} of every parameter group, which this optimizer's rule "
            "does not read; record to another path, or say exists='overwrite'"
        )
    own = [Symmetry.from_dict(data).content for data in attributes["symmetries"]]  # their names may have changed
    for what, is_alike in (
        ("symmetries", [symmetry.content for symmetry in record.symmetries] == own),
        ("numbers of groups", record.attrs["n_groups"] == attributes["n_groups"]),
        ("probes", record.attrs["probes"] == attributes["probes"]),
    ):
        if not is_alike:
            raise ValueError(
                f"exists='resume': {path!r} records other {what} than this optimizer and recorder have; "
                "record to another path, or say exists='overwrite'"
            )
    for probe, values in record.probes.items():
        if values.shape[1:] != (shape := probe_shapes[probe]):
            raise ValueError(
                f"probes: {probe!r} returned shape {shape}, but {path!r} holds it with shape {values.shape[1:]}"
            )
