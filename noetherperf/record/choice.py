"""Which series a Recorder writes, and how precisely."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from noetherperf.measure.readout import Charges
from noetherperf.record.series import DEFAULT, SAMPLES, SERIES
from noetherperf.symmetry.names import nearest

__all__ = ["Choice", "Precision", "choose"]

Precision = Literal["float32", "float64"]
PRECISIONS = ("float32", "float64")


class Choice(NamedTuple):
    """Series and precisions, as they were asked for.

    Attributes:
        series: Names; None if none were given.
        dtypes: Precision of each series; empty if none was given.
    """

    series: tuple[str, ...] | None
    dtypes: Mapping[str, str]

    def among(self, charges: Sequence[Charges]) -> dict[str, str]:
        """Name -> precision of the series to record in a new record.

        Args:
            charges: Of the readout; by default, what its rule does not have is left out.
        """
        names: Iterable[str] = self.series or (
            name for name in DEFAULT if not charges or SERIES[name].read(charges[0]) is not None
        )
        return {name: self.dtypes.get(name, DEFAULT.get(name, "float32")) for name in names}

    def keeps_all_digits(self, name: str) -> bool:
        """Whether a series is recorded in all digits of its precision; see SAMPLES."""
        return name in self.dtypes or name not in SAMPLES

    def check(self, recorded: Mapping[str, str], path: str) -> None:
        """Check that a record to be resumed has what was asked for; what was not asked for may be as it is.

        Args:
            recorded: Its series, and their precisions.
            path: Of the record.

        Raises:
            ValueError: It has other series, or other precisions.
        """
        way = "leave it out to go on as the record is, record to another path, or say exists='overwrite'"
        if self.series is not None and {*self.series} != {*recorded}:
            raise ValueError(
                f"series: {path!r} records {', '.join(recorded)}, and exists='resume' cannot change that to "
                f"{', '.join(self.series)}; {way}"
            )
        for name, precision in recorded.items():
            if self.dtypes.get(name, precision) != precision:
                raise ValueError(
                    f"dtype: {path!r} records {name!r} in {precision}, and exists='resume' cannot change that to "
                    f"{self.dtypes[name]}; {way}"
                )


def choose(series: Iterable[str] | Literal["all"] | None, dtype: Any) -> Choice:
    """The choice that a Recorder's arguments make.

    Args:
        series: Names from SERIES, "all", or None: those of DEFAULT.
        dtype: "float32" or "float64" for all series, a mapping from some of their names, or None: those of DEFAULT.

    Raises:
        ValueError: There is no such series or precision.
    """
    if isinstance(series, str) and series != "all":
        series = [series]
    names = None if series is None else tuple(SERIES) if series == "all" else tuple(dict.fromkeys(series))
    if names == ():
        raise ValueError("series: is empty; leave it out to record what views and plots need")
    dtypes = dict(dtype) if isinstance(dtype, Mapping) else {} if dtype is None else dict.fromkeys(SERIES, dtype)
    dtypes = {name: str(precision).removeprefix("torch.") for name, precision in dtypes.items()}
    for what, given in (("series", names or ()), ("dtype", dtypes)):
        for name in given:
            if name not in SERIES:
                raise ValueError(f"{what}: there is no series {name!r}; {nearest(str(name), SERIES)}")
    for name, precision in dtypes.items():
        if precision not in PRECISIONS:
            of = f" for {name!r}" if isinstance(dtype, Mapping) else ""
            raise ValueError(f"dtype: must be 'float32' or 'float64'{of}, got {precision!r}")
        if isinstance(dtype, Mapping) and names is not None and name not in names:
            raise ValueError(f"dtype: has {name!r}, which is not among the series to record")
    return Choice(names, dtypes)
