"""Takes over an existing record: from an ended process, or from an earlier recorder of this process."""

import warnings
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from noetherperf.measure.readout import Readout
from noetherperf.record.collect import Collector
from noetherperf.record.identity import Identity
from noetherperf.record.layout import LOGGED
from noetherperf.record.lock import lock_record
from noetherperf.record.pending import Row
from noetherperf.record.reader import Record, read_record
from noetherperf.record.writer import Writer, writer_of
from noetherperf.symmetry import Symmetry

#: Attributes that stay as the record has them: what it was made with decides which arrays it has.
OWN = ("noetherperf_record", "hyperparameters", "series")


def resume(
    path: Path, collector: Collector, identity: Identity, readout: Readout, every: int
) -> tuple[Writer, NDArray[np.int64], Row]:
    """Take over the record at a path.

    Args:
        path: Of the record.
        collector: Of the optimizer; takes over the record's series.
        identity: Of the present measurement; becomes the record's.
        readout: The present one.
        every: Steps between rows.

    Returns:
        The record's new writer, the steps that it has, and the present row.

    Raises:
        ValueError: The record is damaged, or of other symmetries, series, probes or another measurement.
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
        logged = list(record.attrs.get(LOGGED, [])) if LOGGED in record.dataset else None
        collector.resume(str(path), record.recorded, logged)
        row = collector.row(readout)
        attributes = collector.attributes(readout, identity.saved_name, every)
        _check_alike(record, attributes, collector)
        identity.resume(record, readout.step, row)
        if earlier:
            warnings.warn(
                f"path: another Recorder of this process was writing to the record {str(path)!r}; its last "
                "rows are written, it is closed, and this one goes on",
                RuntimeWarning,
                stacklevel=4,
            )
            earlier.close()
        own = own_attributes(record.attrs) | {"hyperparameters": list(map(str, record.hyperparameters))}
        attributes |= own | {"measurement": record.attrs.get("measurement"), "writer": uuid4().hex}
        writer = Writer(path, lock, attributes)
        writer.claim()
    except BaseException:
        lock.release()
        raise
    return writer, record.steps, row


def own_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Those that stay as the record has them."""
    return {name: attributes[name] for name in OWN if name in attributes}


def _check_alike(record: Record, attributes: dict[str, Any], collector: Collector) -> None:
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
    laws = [*attributes["symmetries"], *attributes["balances"]]
    own = [Symmetry.from_dict(data).content for data in laws]  # their names may have changed
    for what, is_alike in (
        ("symmetries", [law.content for law in (*record.symmetries, *record.balances.values())] == own),
        ("numbers of groups", record.attrs["n_groups"] == attributes["n_groups"]),
        ("probes", record.attrs["probes"] == attributes["probes"]),
    ):
        if not is_alike:
            raise ValueError(
                f"exists='resume': {path!r} records other {what} than this optimizer and recorder have; "
                "record to another path, or say exists='overwrite'"
            )
    for probe in attributes["probes"]:
        shape, recorded = collector.probe_shapes[probe], record.probes[probe].shape[1:]
        if recorded != shape:
            raise ValueError(f"probes: {probe!r} returned shape {shape}, but {path!r} holds it with shape {recorded}")
