"""`noetherperf plot`: draw the pictures of a record again."""

from pathlib import Path
from typing import Annotated

import typer

from noetherperf.cli.errors import clean_errors
from noetherperf.cli.files import local, report_files

__all__ = ["plot"]


def plot(
    record: Annotated[
        Path, typer.Argument(callback=local, help="Folder of a record, such as runs/digits/record.zarr.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(callback=local, help="Folder for the pictures. Default: the folder that the record is in."),
    ] = None,
) -> None:
    """Draw the pictures of a record again."""
    with clean_errors():
        from noetherperf import plots
        from noetherperf.record import open_record

        opened = open_record(record)
        report_files(plots.save_all(opened, out or opened.path.parent))
