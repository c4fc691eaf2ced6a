"""Which measurement a record is of: by the measurement's name, else by the charges that it began with.

The name in a checkpoint is rank 0's. So the records of other ranks are recognized by their initial charges.
"""

from pathlib import Path

import numpy as np

from noetherperf.measure.readout import Readout
from noetherperf.optim.distributed import rank
from noetherperf.record.collect import initial_charges
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
        self._path, self._name, self.initial = path, name, initial_charges(readout)
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
        if not self._is_named and np.array_equal(initial_charges(readout), self.initial, equal_nan=True):
            self._name = name
            return True
        return False

    def may_begin_anew(self, name: str) -> bool:
        """Whether the record loses nothing if it begins anew with the measurement of this name."""
        return self.has_first_row_only or self.first_row(name) is not None

    def first_row(self, name: str) -> Row | None:
        """The first row of a run that repeats the resumed one, if the measurement of this name is that run's."""
        return self._restart[1] if self._restart is not None and self._restart[0] == name else None

    def resume(self, record: Record, step: int, row: Row) -> None:
        """Take over a record's identity.

        Args:
            record: The record.
            step: The optimizer's.
            row: The present one.

        Raises:
            ValueError: The record is of another measurement.
        """
        name: str | None = record.attrs.get("measurement")
        is_alike = np.array_equal(record.dataset["initial"], self.initial, equal_nan=True)
        if name is None or not self._is_named:
            self._is_named = False
            if not is_alike:
                raise self.another_measurement()
        elif name != self._name:
            # A run that was killed before its first checkpoint begins again in the same way; its rows are rewritten.
            if not (is_alike and step == 0):
                raise self.another_measurement()
            self._restart = self._name, row
            self._name = name
        self.has_first_row_only = len(record.steps) <= 1

    def another_measurement(self) -> ValueError:
        return ValueError(
            f"the record {str(self._path)!r} is of another measurement: measuring was begun anew since, or another "
            "run's checkpoint was loaded. Load the checkpoint before the Recorder is made; after reset_measurement(), "
            "or for a new run, record to another path"
        )
