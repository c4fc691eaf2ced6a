"""How big a record will be: measured on real trainings, since compression depends on the numbers."""

from pathlib import Path

__all__ = ["bytes_of", "estimated_bytes"]

#: Bytes of a row on disk for each group, of the default series: float32 parameters, minibatches, a row every step.
A_GROUP = 24
#: Bytes of a row on disk that all groups share: step, time, hyperparameters.
A_ROW = 20


def estimated_bytes(n_groups: int, n_steps: int, every: int = 1) -> int:
    """The size of a record of the default series, about: (n_steps/every + 1) rows of n_groups · 24 bytes.

    Args:
        n_groups: Of all symmetries.
        n_steps: Of the training.
        every: Steps between rows.
    """
    return (n_steps // every + 1) * (A_GROUP * n_groups + A_ROW)


def bytes_of(path: Path) -> int:
    """What a record's files hold now, in bytes; files that go away meanwhile do not count."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue
    return total
