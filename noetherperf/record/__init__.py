"""Records: charges, laws and moments of a training run on disk, written while it runs and read as a data set."""

from noetherperf.record.reader import Record, open_record
from noetherperf.record.writer import Recorder

__all__ = ["Record", "Recorder", "open_record"]
