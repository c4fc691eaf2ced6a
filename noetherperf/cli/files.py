"""Paths in options, and the list of written files that a command prints."""

from collections.abc import Sequence
from pathlib import Path

import typer

from noetherperf.cli.errors import clean_errors
from noetherperf.common.paths import local_path

__all__ = ["local", "report_files"]


def local(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Callback of path options: expands `~`, which the shell leaves unexpanded in --out=~/runs."""
    with clean_errors():
        return path and local_path(path, param.opts[0])


def report_files(paths: Sequence[Path]) -> None:
    """Print the paths of the files that a command has written, one a line."""
    for path in paths:
        print(path)
