"""Errors as one line on stderr and an exit status, instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from noetherperf.common.printing import printable

__all__ = ["clean_errors", "fail", "first_line"]

USAGE_ERROR = 2
EXTRA = ("PIL", "matplotlib", "scipy", "sklearn", "tqdm")  # what the extra [run] installs


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn errors that a user can fix (a value, a file, a missing extra) into one line instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA:
            raise
        fail(f"{error.name} is not installed; it comes with the extra: pip install 'noetherperf[run]'")
    except (UnicodeEncodeError, BrokenPipeError):  # faults of the output stream, not of the options
        raise
    except (ValueError, OSError) as error:
        fail(str(error))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    """Print the message as one line on stderr and exit with the status."""
    line = " ".join(map(printable, message.splitlines()))  # a library's message may have several lines
    print(f"noetherperf: error: {line}", file=sys.stderr)
    raise typer.Exit(status)
