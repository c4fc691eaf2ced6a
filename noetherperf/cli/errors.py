"""Errors as one line on stderr and an exit status, instead of a traceback; and what an interrupted command leaves."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from noetherperf.common.printing import printable
from noetherperf.recipes.settings import SettingError

__all__ = ["again", "as_typed", "clean_errors", "fail", "first_line", "flag", "is_given"]

USAGE_ERROR, INTERRUPTED = 2, 130
#: The extra that installs a library.
EXTRA = {**dict.fromkeys(("PIL", "matplotlib", "scipy", "sklearn"), "run"), "plotly": "view"}


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn errors that a user can fix (a value, a file, a missing extra) into one line instead of a traceback.

    A KeyboardInterrupt is no error; its text, if it has one, says where the command stopped and how to go on.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        end(f"interrupted {stopped}".rstrip(), status=INTERRUPTED)
    except ModuleNotFoundError as error:
        extra = EXTRA.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        fail(f"{error.name} is not installed; it comes with the extra: pip install 'noetherperf[{extra}]'")
    except (UnicodeEncodeError, BrokenPipeError):  # faults of the output stream, not of the options
        raise
    except SettingError as error:
        fail(f"{flag(error.setting)}: {error.why}")
    except (ValueError, OSError) as error:
        fail(as_typed(str(error)))


def flag(name: str) -> str:
    """A parameter's name as the option that is typed."""
    return f"--{name.replace('_', '-')}"


def as_typed(message: str) -> str:
    """A library's message, its keywords as the options that are typed: --resume for exists='resume'."""
    message = re.sub(r"\bexists=(['\"])(\w+)\1", r"--\2", message)
    return re.sub(r"\bbackend=(['\"])(\w+)\1", r"--backend \2", message)


def again(context: typer.Context, **changed: Any) -> str:
    """The command line of a command, its options as given or changed, to be typed again."""
    words = context.command_path.split()
    for parameter in context.command.params:
        name = str(parameter.name)
        if name not in changed and not is_given(context, name):
            continue
        value = changed.get(name, context.params.get(name))
        values = list(map(str, value if isinstance(value, list | tuple) else [value]))
        if parameter.param_type_name == "argument":
            words += values
        elif isinstance(value, bool):
            words += parameter.opts if value else parameter.secondary_opts
        else:
            words += [parameter.opts[0], *values]
    return shlex.join(words)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, and does not have its default."""
    return getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    """Print the message as one line on stderr and exit with the status."""
    end(f"error: {message}", status=status)


def end(message: str, *, status: int) -> NoReturn:
    line = " ".join(map(printable, message.splitlines()))  # a library's message may have several lines
    print(f"noetherperf: {line}", file=sys.stderr)
    raise typer.Exit(status)
