"""`noetherperf find`: search for the conservation laws of a user's model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.files import local, report_files
from noetherperf.cli.target import Inputs, Matrices, SearchLoss, inputs_of, made_by, search

__all__ = ["find"]


def find(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="A function without arguments. It returns (model, input, …), where a dict at the end holds keyword "
            "inputs; or (model, closure), where closure() calls the model on one batch. The module may be in the "
            "current folder.",
        ),
    ],
    loss: Annotated[
        SearchLoss,
        typer.Option(help="Loss after the output: cross_entropy (softmax), mse (squared error), none (any loss)."),
    ] = SearchLoss.cross_entropy,
    verify: Annotated[bool, typer.Option(help="Test each law on fresh parameters and batches.")] = True,
    matrix: Annotated[
        Matrices,
        typer.Option(
            help="Laws of matrices (linear pairs, attention): yes; no: the diagonals alone; both: beside each other."
        ),
    ] = Matrices.yes,
    largest_matrix: Annotated[
        int, typer.Option(min=1, help="Most units that mix with each other, for a law of matrices.")
    ] = 512,
    explain: Annotated[bool, typer.Option("--explain", help="Also print each law in words and formulas.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(callback=local, help="JSON file to write; `check --symmetries` and Symmetries.from_json read it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Search a model for conservation laws, and print them."""
    model, inputs = searched(target, made_by(target))
    with clean_errors():
        matrices = "both" if matrix == Matrices.both else matrix == Matrices.yes
        found = search(
            model, inputs, loss, verify=verify, matrix=matrices, largest_matrix=largest_matrix, progress=True
        )
        if as_json:
            print(found.to_json())
        else:
            Console().print(found, highlight=False)
        if explain:
            print("", *(symmetry.explain() for symmetry in found), sep="\n\n")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.to_json() + "\n", encoding="utf-8")
            report_files([out])


def searched(target: str, made: tuple[Any, ...]) -> tuple[Any, Inputs]:
    """The model and its inputs, of what a target returned."""
    from torch import nn

    model, *others = made
    if not (isinstance(model, nn.Module) and others):
        returned = ", ".join(type(one).__name__ for one in made)
        fail(f"{target} must return (model, input, …) or (model, closure), got ({returned})")
    if callable(others[0]):
        return model, inputs_of(model, others[0])
    options = others.pop() if isinstance(others[-1], dict) else {}
    return model, (tuple(others), options)
