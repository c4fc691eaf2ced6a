"""`noetherperf check`: the gradient and Hessian constraints of a user's model on one batch."""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from torch import Tensor, nn

from noetherperf.checks import check_constraints
from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.files import local, report_files
from noetherperf.common.printing import printable
from noetherperf.detect import Symmetries, find_symmetries
from noetherperf.symmetry import Symmetry, from_json

__all__ = ["check"]


class SearchLoss(StrEnum):
    cross_entropy = "cross_entropy"
    mse = "mse"
    none = "none"


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="A function without arguments that returns (model, closure) or (model, closure, symmetries), where "
            "closure() returns the loss on one fixed batch. The module may be in the current folder. Without "
            "symmetries, they are searched for with the inputs that closure() gives the model.",
        ),
    ],
    symmetries: Annotated[
        Path | None,
        typer.Option(callback=local, help="JSON file (`to_json`) of symmetries, instead of the callable's."),
    ] = None,
    loss: Annotated[
        SearchLoss, typer.Option(help="For a search, the loss that follows the output: softmax, squared error, or any.")
    ] = SearchLoss.cross_entropy,
    hessian: Annotated[bool, typer.Option(help="Also check the Hessian constraints.")] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use a Hessian-vector product for every group, not only random projections.")
    ] = False,
    probes: Annotated[int, typer.Option(min=2, help="Number of random projections of the Hessian constraints.")] = 4,
    float64: Annotated[
        bool, typer.Option(help="Also evaluate in float64, and in float64 with the eps of normalisations near zero.")
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative defect of a symmetry that holds, in the last column. By default 1e-9 in float64, "
            "far above its rounding errors and far below a broken symmetry; else √ε of the dtype."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(callback=local, help="Folder for constraints.json and the picture.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every symmetry in words and formulas first.")
    ] = False,
) -> None:
    """Check the gradient and Hessian constraints of a model's symmetries on one batch.

    The status is 1 if a claimed symmetry fails.
    """
    if tolerance is not None and not tolerance > 0:
        fail(f"--tolerance: must be positive, got {tolerance}")
    model, closure, claimed = made_by(target)
    with clean_errors():
        if symmetries is not None:
            claimed = from_json(symmetries.read_bytes())
        elif claimed is None:
            claimed = found_by_search(model, closure, loss)
        if explain:
            print("\n\n".join(symmetry.explain() for symmetry in claimed), end="\n\n")
        result = check_constraints(
            model, closure, claimed, hessian=hessian, exact=exact, probes=probes, float64=float64, tolerance=tolerance
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


def made_by(target: str) -> tuple[nn.Module, Callable[[], Tensor], Sequence[Symmetry] | None]:
    """Model, closure and perhaps symmetries, as "module:callable" returns them; fails where it does not."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        fail(f"{target!r} is no MODULE:CALLABLE; write it as in mypackage.training:make")
    sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    try:
        make = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        fail(f"there is no module {error.name!r} here; run this in the module's folder, or install it")
    except AttributeError:
        fail(f"module {module_name!r} has no {name!r}")
    made = make() if callable(make) and not isinstance(make, nn.Module) else make
    model, closure, claimed = (*made, None)[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (None,) * 3
    if not (isinstance(model, nn.Module) and callable(closure)):
        fail(f"{target} must return (model, closure) or (model, closure, symmetries), got {type(made).__name__}")
    return model, closure, claimed


def found_by_search(model: nn.Module, closure: Callable[[], Tensor], loss: SearchLoss) -> Symmetries:
    """The symmetries that a search finds, with the inputs that the closure gives the model as the example."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)
    try:
        closure()
    finally:
        hook.remove()
    if not calls:
        fail("closure() never called the model returned beside it, so the model's inputs are not known")
    args, options = calls[0]
    after: dict[SearchLoss, Literal["cross_entropy", "mse"]] = {
        SearchLoss.cross_entropy: "cross_entropy",
        SearchLoss.mse: "mse",
    }
    return find_symmetries(model, *args, loss=after.get(loss), **options)
