"""Paths in options, completion of names, and the list of written files that a command prints."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from noetherperf.cli.errors import clean_errors
from noetherperf.common.paths import local_path

__all__ = ["completing", "local", "local_each", "report_files"]


def local(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Callback of path options: expands `~`, which the shell leaves unexpanded in --out=~/runs."""
    with clean_errors():
        return path and local_path(path, param.opts[0])


def local_each(param: typer.CallbackParam, paths: Sequence[Path]) -> list[Path]:
    """As `local`, of an argument that may be given several times."""
    with clean_errors():
        return [local_path(path, param.opts[0]) for path in paths]


def completing(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Shell completion of an option that takes one of these names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def report_files(paths: Sequence[Path]) -> None:
    """Print the paths of the files that a command has written, one a line."""
    for path in paths:
        print(path)
