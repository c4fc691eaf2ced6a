"""`noetherperf plot`: draw the pictures of a record."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from noetherperf.cli.errors import as_typed, clean_errors, fail, is_given
from noetherperf.cli.files import completing, local, report_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from noetherperf.plots.style import Picture

__all__ = ["plot"]

FORMATS = ("png", "pdf", "svg")
CHOICES = ("symmetry", "layer", "groups", "quantity")
OF_BALANCES = ("eigenvalues", "matrices")
QUANTITIES = ("charge", "residual", "rounding", "angular_update", "effective_lr", "relative_defect", *OF_BALANCES)


class Choice(TypedDict):
    """Which symmetries: by name, and by module."""

    symmetries: "Sequence[str]"
    modules: "Sequence[str]"


def plot(
    context: typer.Context,
    record: Annotated[
        Path, typer.Argument(callback=local, help="Folder of a record, such as runs/digits/record.zarr.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(callback=local, help="Folder for the pictures. Default: the folder that the record is in."),
    ] = None,
    symmetry: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this symmetry; may be repeated.")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="MODULE", help="Only symmetries with a part in it; may be repeated.")
    ] = None,
    groups: Annotated[
        str, typer.Option(help="How many groups of each symmetry are drawn; or which: 0,3,7 (a single one: 3,).")
    ] = "10",
    quantity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            autocompletion=completing(QUANTITIES),
            help=f"What of every symmetry: {', '.join(QUANTITIES)}, …; may be repeated (default charge).",
        ),
    ] = None,
    format: Annotated[  # noqa: A002 - the option's name
        list[str] | None,
        typer.Option(
            autocompletion=completing(FORMATS), help="png, pdf or svg; may be repeated (default png and pdf)."
        ),
    ] = None,
    dpi: Annotated[int, typer.Option(min=10, max=2400, help="Pixels per inch of a png.")] = 150,
) -> None:
    """Draw the pictures of a record: charges, errors of the laws, parameters and loss, and a row of panels a layer.

    With --symmetry, --layer, --groups or --quantity, only rows of panels of what they name are drawn. Of a Balance
    these are eigenvalues. --quantity matrices draws its matrices: --groups says of how many blocks or which; by default
    of the one that the law misses most. A picture without data is not made, and the reason is printed; if nothing that
    was asked for can be drawn, that is an error.
    """
    formats = format or ["png", "pdf"]
    if unknown := [name for name in formats if name not in FORMATS]:
        fail(f"--format: there is no {unknown[0]!r}; there are: {', '.join(FORMATS)}")
    chosen = _groups(groups)
    with clean_errors():
        from noetherperf import plots
        from noetherperf.record import open_record
        from noetherperf.record.files import outside_records

        opened = open_record(record)
        folder = opened.path.parent if out is None else outside_records(out, "--out")

        def left_out(name: str, reason: str) -> None:
            print(f"{name} is not drawn: {reason}", file=sys.stderr)

        if not any(is_given(context, name) for name in CHOICES):
            report_files(plots.save_all(opened, folder, formats, dpi=dpi, left_out=left_out))
            return
        choice: Choice = {"symmetries": symmetry or (), "modules": layer or ()}
        blocks = chosen if is_given(context, "groups") else 1

        def pages(name: str) -> "list[Picture]":
            match name:
                case "matrices":
                    return plots.matrices(opened, **choice, blocks=blocks)
                case "eigenvalues":
                    return plots.spectra(opened, **choice, groups=chosen)
            return plots.layers(opened, name, **choice, groups=chosen)

        made: dict[str, list[Picture]] = {}
        missing: dict[str, str] = {}
        asked = quantity or ["charge", *["eigenvalues"] * bool(opened.balances)]
        for name in dict.fromkeys(asked):
            try:
                made[name] = pages(name)
            except plots.NothingToDraw as error:
                missing[name] = str(error)
            except ValueError as error:
                fail(as_typed(f"--{error}"))
        if not made:
            fail("; ".join(f"{name} is not drawn: {reason}" for name, reason in missing.items()))
        for name, reason in missing.items() if quantity else ():
            left_out(name, reason)
        for name, figures in made.items():  # all are made before the first is saved
            report_files(plots.save(figures, folder / name, formats, dpi))


def _groups(text: str) -> int | list[int]:
    """A number of groups, or indices separated by commas."""
    try:
        indices = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        indices = []
    if not indices or min(indices) < 0 or ("," not in text and indices[0] < 1):
        fail(f"--groups: must be a number of groups, at least 1, or indices such as 0,3,7; got {text!r}")
    return indices if "," in text else indices[0]
