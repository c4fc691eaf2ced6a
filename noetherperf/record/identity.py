"""Which measurement a record is of: by the measurement's name, else by the charges that it began with.

The name in a checkpoint is rank 0's. So the records of other ranks are recognized by their initial charges: the numbers
of each group, and of each Balance a digest of its matrices.
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from noetherperf.measure.readout import Readout
from noetherperf.optim.distributed import rank
from noetherperf.record.collect import initial_charges
from noetherperf.record.matrices import initial_matrices
from noetherperf.record.pending import Row
from noetherperf.record.reader import Record


class Identity:
    """Identity of the measurement that a record is of.

    Args:
        path: Of the record, for errors.
        name: The measurement's.
        readout: Of the measurement.

    Attributes:
        has_first_row_only: Whether the record has at most its first row, so that nothing is lost if it begins anew.
    """

    def __init__(self, path: Path, name: str, readout: Readout) -> None:
        self._path, self._name = path, name
        self.initial, self._matrices = initial_charges(readout), initial_matrices(readout)
        self._is_named = rank() == 0
        self.has_first_row_only = True
        # If a resumed record has rows of a run that began as this one: the name of this measurement and its first row.
        self._restart: tuple[str, Row] | None = None

    @property
    def saved_name(self) -> str | None:
        """The name to store in the record; None if the record is recognized by its initial charges."""
        return self._name if self._is_named else None

    def covers(self, name: str, readout: Readout) -> bool:
        """Whether a readout of the measurement with this name belongs to the record."""
        if name == self._name:
            return True
        if not self._is_named and self._began_with(initial_charges(readout), initial_matrices(readout)):
            self._name = name
            return True
        return False

    def may_begin_anew(self, name: str) -> bool:
        """Whether the record loses nothing if it begins anew with the measurement of this name."""
        return self.has_first_row_only or self.first_row(name) is not None

    def first_row(self, name: str) -> Row | None:
        """The first row of a run that repeats the resumed one, if the measurement of this name is that run's."""
        return self._restart[1] if self._restart is not None and self._restart[0] == name else None

    def is_of(self, record: Record, step: int) -> bool:
        """Whether a record is of this measurement, or of a run that it repeats from the first step on.

        Args:
            record: The record.
            step: The optimizer's.
        """
        name = record.attrs.get("measurement")
        if self._is_named and name == self._name:
            return True
        # A run that was killed before its first checkpoint begins again in the same way; its rows are rewritten.
        may_differ = name is None or not self._is_named or step == 0
        return may_differ and self._began_with(record.dataset["initial"], record.attrs.get("balance_initial", []))

    def _began_with(self, charges: ArrayLike, matrices: list[str]) -> bool:
        return matrices == self._matrices and np.array_equal(charges, self.initial, equal_nan=True)

    def resume(self, record: Record, step: int, row: Row) -> None:
        """Take over a record's identity.

        Args:
            record: The record.
            step: The optimizer's.
            row: The present one.

        Raises:
            ValueError: The record is of another measurement.
        """
        if not self.is_of(record, step):
            raise self.another_measurement()
        name: str | None = record.attrs.get("measurement")
        if name is None or not self._is_named:
            self._is_named = False
        elif name != self._name:
            self._restart = self._name, row
            self._name = name
        self.has_first_row_only = len(record.steps) <= 1

    def another_measurement(self) -> ValueError:
        return ValueError(
            f"the record {str(self._path)!r} is of another measurement: measuring was begun anew since, or another "
            "run's checkpoint was loaded. Load the checkpoint before the Recorder is made; after reset_measurement(), "
            "or for a new run, record to another path"
        )
