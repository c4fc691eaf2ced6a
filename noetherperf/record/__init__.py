"""Records: charges, laws and moments of a training run on disk, written while it runs and read as a data set.

Reading needs no torch, which takes long to import.
"""

from typing import TYPE_CHECKING, Any

from noetherperf.record.law_error import TERMS, LawName, relative_error
from noetherperf.record.reader import Record, open_record
from noetherperf.record.series import SERIES

if TYPE_CHECKING:
    from noetherperf.record.recorder import Recorder

__all__ = ["SERIES", "TERMS", "LawName", "Record", "Recorder", "open_record", "relative_error"]


def __getattr__(name: str) -> Any:
    if name != "Recorder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from noetherperf.record.recorder import Recorder

    return Recorder
