"""How big a record will be: measured on real trainings, since compression depends on the numbers."""

from pathlib import Path

from noetherperf.record.metadata import arrays_of, check_attributes, read_metadata

__all__ = ["bytes_of", "estimated_bytes", "projected_bytes"]

#: Bytes of a row on disk for each group, of the default series: float32 parameters, minibatches, a row every step.
A_GROUP = 24
#: Bytes of a row on disk that all groups share: step, time, hyperparameters.
A_ROW = 20


def estimated_bytes(n_groups: int, n_steps: int, every: int = 1) -> int:
    """The size of a record of the default series, about: (n_steps/every + 1) rows of n_groups · 24 bytes.

    Of Balances, nothing is counted: their rows take 8 · (2n + 3) bytes for each block of n units before compression,
    and 16 n² more with matrices.

    Args:
        n_groups: Of all symmetries.
        n_steps: Of the training.
        every: Steps between rows.
    """
    return (n_steps // every + 1) * (A_GROUP * n_groups + A_ROW)


def projected_bytes(path: Path, n_rows: int) -> int:
    """The size that a record will have with so many rows, if their numbers compress as those that it has.

    Metadata and initial charges stay. A chunk has a size without numbers, which a short record pays as well as a long
    one; the rest of the chunks grows with the rows. All that is recorded is counted: series, probes, Balances.

    Args:
        path: Of the record.
        n_rows: Of the longer or shorter record.

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """
    metadata = read_metadata(path)
    check_attributes(metadata["attributes"])
    total = float(bytes_of(path))
    for array in arrays_of(path, metadata).values():
        if array.dims[0] != "step" or not array.shape[0]:
            continue
        of_chunks = bytes_of(array.folder) - bytes_of(array.folder / "zarr.json")
        blank, n_chunks = array.blank_bytes, array.n_chunks
        of_rows = max(0, of_chunks - n_chunks * blank) / array.shape[0]
        grown = array._replace(shape=(n_rows, *array.shape[1:]))
        total += of_rows * (n_rows - array.shape[0]) + blank * (grown.n_chunks - n_chunks)
    return round(total)


def bytes_of(path: Path) -> int:
    """What a record's files hold now, or one file, in bytes; files that go away meanwhile do not count."""
    total = 0
    for file in (path, *path.rglob("*")):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
