"""Records: charges, laws and moments of a training run on disk, written while it runs and read as a data set."""

from noetherperf.record.law_error import TERMS, LawName, relative_error
from noetherperf.record.reader import Record, open_record
from noetherperf.record.recorder import Recorder
from noetherperf.record.series import SERIES

__all__ = ["SERIES", "TERMS", "LawName", "Record", "Recorder", "open_record", "relative_error"]
