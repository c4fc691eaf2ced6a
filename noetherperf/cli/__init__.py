"""The command line: `noetherperf run | plot | check | figures | info`, the same as `python -m noetherperf`.

A file for each command. They arrange and print what other rooms compute. Libraries that only one command needs
(matplotlib, scikit-learn) are imported inside it, so that `info` also works without the extra `[run]`.
"""

import sys

import typer

from noetherperf.cli import check, figures, info, plot, run
from noetherperf.cli.laws import law_table
from noetherperf.common.printing import encode_everything

__all__ = ["app", "law_table", "main"]

app = typer.Typer(
    name="noetherperf",
    help="Measure the Noether charges of a network during training, with the theory beside them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (run.run, plot.plot, check.check, figures.figures, info.info):
    app.command()(command)


def main() -> None:
    """The console entry point."""
    encode_everything((sys.stdout, sys.stderr))
    app()
