"""Paths that options name, and the list of files that a command has written."""

from collections.abc import Sequence
from pathlib import Path

import typer

from noetherperf.cli.errors import clean_errors
from noetherperf.common.paths import local_path

__all__ = ["local", "report_files"]


def local(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path as it was typed: the shell leaves `~` in --out=~/runs as it is."""
    with clean_errors():
        return path and local_path(path, param.opts[0])


def report_files(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)
