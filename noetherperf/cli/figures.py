"""`noetherperf figures`: make the figures of the gallery and check their claims."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.files import local, report_files

__all__ = ["figures"]


def figures(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Figures to make; by default all.")
    ] = None,
    out: Annotated[Path, typer.Option(callback=local, help="Folder for pictures, data and claims.")] = Path(
        "runs/figures"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller networks and fewer steps.")] = False,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Draw again from the data in --out, without computing.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
) -> None:
    """Make the figures of the gallery: pictures, their data, and the claims of their captions, checked on that data.

    The status is 1 if a claim does not hold.
    """
    torch.set_num_threads(threads)
    with clean_errors():
        from noetherperf.figures import GALLERY, make

        if unknown := [name for name in names or [] if name not in GALLERY]:
            fail(f"there is no figure {unknown[0]!r}; there are: {', '.join(GALLERY)}")
        broken = 0
        for name in names or GALLERY:
            start = time.perf_counter()
            claims, files = make(name, out, quick=quick, redraw=redraw)
            broken += sum(not claim.holds for claim in claims)
            print(f"{name}: {GALLERY[name].title} ({time.perf_counter() - start:.0f} s)")
            for claim in claims:
                print(f"  {'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value:.4g}")
            report_files(files)
    if broken:
        fail(f"{broken} of the claims do not hold on this data", status=1)
