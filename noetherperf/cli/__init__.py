"""The command line: `noetherperf run | plot | view | find | check | figures | info`; so is `python -m noetherperf`.

A file for each command. They arrange and print what other rooms compute. What takes long to import (torch, and the
libraries of one command) is imported inside the commands, so that help and completion are quick and `info` also works
without the extra `[run]`.
"""

import importlib.metadata
import signal
import sys
from typing import Annotated

import typer

from noetherperf.cli import check, figures, find, info, plot, run, view
from noetherperf.common.printing import encode_everything, outlive_reader

__all__ = ["app", "main"]


app = typer.Typer(name="noetherperf", no_args_is_help=True, pretty_exceptions_enable=False)
for command in (run.run, plot.plot, view.view, find.find, check.check, figures.figures, info.info):
    app.command()(command)


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"noetherperf {importlib.metadata.version('noetherperf')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure what training does to each layer of a network, and compare it with theory."""


def main() -> None:
    """The console entry point. A signal to end is an interruption; a reader of the output that goes away is none."""
    sys.stdout, sys.stderr = map(outlive_reader, (sys.stdout, sys.stderr))
    encode_everything((sys.stdout, sys.stderr))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
