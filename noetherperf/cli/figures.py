"""`noetherperf figures`: make the figures of the gallery and check their claims."""

import time
from pathlib import Path
from typing import Annotated

import typer

from noetherperf.cli.errors import again, clean_errors, fail
from noetherperf.cli.files import local, report_files

__all__ = ["figures"]


def figures(
    context: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Figures to make. Default: all.")
    ] = None,
    out: Annotated[Path, typer.Option(callback=local, help="Folder for pictures, data and claims.")] = Path(
        "runs/figures"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Use smaller networks and fewer steps.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw the data in --out again, without computing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Make the figures of the gallery, and check the claims of their captions on the data.

    The exit status is 1 if a claim does not hold.
    """
    with clean_errors():
        import torch

        from noetherperf.figures import GALLERY, make

        torch.set_num_threads(threads)
        if unknown := [name for name in names or [] if name not in GALLERY]:
            fail(f"there is no figure {unknown[0]!r}; there are: {', '.join(GALLERY)}")
        broken, left = 0, list(names or GALLERY)
        while left:
            name, start = left[0], time.perf_counter()
            try:
                claims, files = make(name, out, quick=quick, redraw=redraw)
            except KeyboardInterrupt:
                way = again(context, names=left)
                raise KeyboardInterrupt(
                    f"in {name!r}; those before it are in {str(out)!r}; go on with: {way}"
                ) from None
            left = left[1:]
            broken += sum(not claim.holds for claim in claims)
            print(f"{name}: {GALLERY[name].title} ({time.perf_counter() - start:.0f} s)")
            for claim in claims:
                print(f"  {'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value:.4g}")
            report_files(files)
    if broken:
        fail(f"{broken} of the claims do not hold on this data", status=1)
