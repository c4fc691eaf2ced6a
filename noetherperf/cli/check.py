"""`noetherperf check`: the gradient and Hessian constraints of a user's model on one batch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.files import local, report_files
from noetherperf.cli.target import SearchLoss, inputs_of, made_by, search
from noetherperf.common.printing import printable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from noetherperf.symmetry import Symmetry

__all__ = ["check"]


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="A function without arguments. It returns (model, closure) or (model, closure, symmetries), where "
            "closure() returns the loss on one fixed batch. Without symmetries a search finds them, with the inputs "
            "that closure() gives the model. The module may be in the current folder.",
        ),
    ],
    symmetries: Annotated[
        Path | None,
        typer.Option(
            callback=local, help="JSON file of symmetries (from `find --out`), used instead of the callable's."
        ),
    ] = None,
    loss: Annotated[
        SearchLoss,
        typer.Option(help="For a search: the loss after the output, cross_entropy (softmax), mse or none (any loss)."),
    ] = SearchLoss.cross_entropy,
    hessian: Annotated[bool, typer.Option(help="Also check the Hessian constraints.")] = True,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="Compute one Hessian-vector product for every group, instead of random projections. Slower."
        ),
    ] = False,
    probes: Annotated[int, typer.Option(min=2, help="Number of random projections for the Hessian constraints.")] = 4,
    float64: Annotated[
        bool,
        typer.Option(help="Also evaluate in float64, and in float64 with the eps of every normalisation near zero."),
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative defect with which a symmetry still holds, in the last stage. Default: 1e-9 in "
            "float64, which is far above rounding and far below a broken symmetry; otherwise √ε of the dtype."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=local, help="Folder for constraints.json and the picture. Default: neither is written."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="First print each symmetry in words and formulas.")
    ] = False,
) -> None:
    """Check on one batch whether a model's symmetries hold, by their gradient and Hessian constraints.

    The exit status is 1 if a claimed symmetry fails.
    """
    if tolerance is not None and not tolerance > 0:
        fail(f"--tolerance: must be positive, got {tolerance}")
    model, closure, claimed = checked(target)
    with clean_errors():
        from noetherperf.checks import check_constraints

        if symmetries is not None:
            claimed = written_in(symmetries)
        elif claimed is None:
            claimed = search(model, inputs_of(model, closure), loss, progress=True)
        if explain:
            print("\n\n".join(symmetry.explain() for symmetry in claimed), end="\n\n")
        result = check_constraints(
            model,
            closure,
            claimed,
            hessian=hessian,
            exact=exact,
            probes=probes,
            float64=float64,
            tolerance=tolerance,
            progress=True,
        )
        console = Console()
        console.print(result)
        console.print(result.summary(), highlight=False, markup=False, emoji=False, soft_wrap=True)
        if out is not None:
            from noetherperf import plots

            pictures = plots.save_constraints(result, out)
            numbers = out / "constraints.json"
            numbers.write_text(json.dumps(result.to_dict(), ensure_ascii=False), encoding="utf-8")
            report_files([numbers, *pictures])
    if result.failed:
        fail(f"the constraints of {', '.join(map(printable, result.failed))} do not hold", status=1)


def checked(target: str) -> "tuple[nn.Module, Callable[[], Tensor], Sequence[Symmetry] | None]":
    """The model, closure and perhaps symmetries that a target returns."""
    from torch import nn

    made = made_by(target)
    model, closure, claimed = (*made, None)[:3] if len(made) in (2, 3) else (None,) * 3
    if not (isinstance(model, nn.Module) and callable(closure)):
        got = type(made[0]).__name__ if len(made) == 1 else f"({', '.join(type(one).__name__ for one in made)})"
        fail(f"{target} must return (model, closure) or (model, closure, symmetries), got {got}")
    return model, closure, claimed


def written_in(path: Path) -> "Sequence[Symmetry]":
    """The symmetries of a JSON file: of a search, or written by hand."""
    from noetherperf.detect import Symmetries

    try:
        return Symmetries.from_json(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        fail(f"--symmetries: {str(path)!r} cannot be read: {error.strerror}")
    except ValueError as error:
        fail(f"--symmetries: {str(path)!r}: {error}")
