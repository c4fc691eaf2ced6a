"""Report on the laws of a record: a table of their errors, and the laws that are open or no longer finite."""

import numpy as np
import xarray as xr

from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable
from noetherperf.record import TERMS, LawName, Record, relative_error

__all__ = ["law_states", "law_table"]

#: How far a rule's flow and discrete law go, where they are no identities for an exact symmetry.
NOTES = {
    "adam": "the flow and discrete laws assume that Adam divides all elements of a group by one number; what this "
    "misses is in the defect, and so in the budget"
}

LAWS: tuple[LawName, ...] = ("flow", "discrete", "budget")


def law_table(record: Record) -> ReportTable:
    """For each symmetry, the range of its charges at the end and each law's largest error over all groups and rows.

    The errors are those of `relative_error`; the defect is the gradient constraint as a cosine.
    """
    table = ReportTable("Charges at the end, and each law's largest relative error on the way")
    table.add_column("symmetry", folds=True)
    table.add_column("kind")
    for heading in ("groups", "charge", "flow", "discrete", "budget", "defect"):
        table.add_column(heading, justify="right")
    for name, data in record.items():
        last = data["charge"].isel(step=-1)
        ends = sorted({f"{float(last.min()):.2g}", f"{float(last.max()):.2g}"}, key=float)
        table.add_row(
            name,
            data.attrs["kind"],
            str(data.sizes["group"]),
            " … ".join(ends),
            *(f"{worst(relative_error(data, law)):.1e}" for law in LAWS),
            f"{worst(data['relative_defect']):.1e}",
        )
    return table


def law_states(record: Record) -> str:
    """The laws that are open, with the reasons, and the symmetries whose numbers are no longer finite."""
    still_open = [
        f"{printable(name)}: {printable(data.attrs['reason'])}"
        for name, data in record.items()
        if not data.attrs["closed"]
    ]
    lines = ["these laws are open and predict nothing:", *still_open] if still_open else ["all laws are closed"]
    if record.rule in NOTES:
        lines.append(NOTES[record.rule])
    lost = {name: first_not_finite(data) for name, data in record.items()}
    broken = [f"{printable(name)}: from step {step} on" for name, step in lost.items() if step is not None]
    if broken:
        lines += ["NaN or infinity in these charges or their laws; what follows it means nothing:", *broken]
    return "\n".join(lines)


def first_not_finite(data: xr.Dataset) -> int | None:
    """The first recorded step at which a symmetry's charge, or a term of its laws, is NaN or infinite."""
    finite = np.all(
        [np.isfinite(data[name].to_numpy()).all(axis=1) for name in {"charge", *sum(TERMS.values(), ())}], axis=0
    )
    return None if finite.all() else int(data["step"][int(finite.argmin())])


def worst(values: xr.DataArray) -> float:
    """The largest absolute value; NaN if any value is NaN."""
    return float(np.abs(values.to_numpy()).max())
