"""The command line: `noetherperf run | plot | info`, the same as `python -m noetherperf`.

It arranges what other files do and prints it; it computes nothing. What only some commands need (matplotlib,
scikit-learn) is imported in them, so that `info` also works where the extra `[run]` is not installed.
"""

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import numpy as np
import torch
import typer
import xarray as xr
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from noetherperf.backends import backends, resolve
from noetherperf.recipes.settings import Settings
from noetherperf.recorder import Law, Record, open_record, relative_error

__all__ = ["app", "main"]

DEFAULTS = Settings()
EXPECTED_ACCURACY = 0.95
LAWS: tuple[Law, ...] = ("flow", "discrete", "budget")
USAGE_ERROR = 2
EXTRA = ("matplotlib", "scipy", "sklearn", "tqdm")  # what the extra [run] installs

app = typer.Typer(
    name="noetherperf",
    help="Measure the Noether charges of a network during training, with the theory beside them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


@app.command()
def run(
    lr: Annotated[float, typer.Option(help="Learning rate η.")] = DEFAULTS.lr,
    momentum: Annotated[float, typer.Option(help="Momentum β.")] = DEFAULTS.momentum,
    weight_decay: Annotated[float, typer.Option(help="Weight decay λ.")] = DEFAULTS.weight_decay,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Nesterov's momentum.")] = DEFAULTS.nesterov,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step.")] = DEFAULTS.batch_size,
    seed: Annotated[
        int, typer.Option(min=0, help="Draws the data split, initial parameters, batches and dropout.")
    ] = DEFAULTS.seed,
    backend: Annotated[
        str, typer.Option(help="What makes the step; `noetherperf info` lists them.")
    ] = DEFAULTS.backend,
    every: Annotated[int, typer.Option(min=1, help="Steps between two records.")] = DEFAULTS.every,
    out: Annotated[Path, typer.Option(help="Folder for the record and the pictures.")] = Path("runs/digits"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = DEFAULTS.device,
    dtype: Annotated[Precision, typer.Option(help="Of parameters and images.")] = Precision.float32,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; this network is too small to gain from more.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the record that --out has already.")] = False,
) -> None:
    """Train on scikit-learn's digits, record every charge, print how well the laws held, and draw it.

    Ends with status 1 if the network classifies 95 % of the test images or fewer.
    """
    record_path = out / "record.zarr"
    if record_path.exists() and not overwrite:
        fail(f"--out: {str(record_path)!r} exists; add --overwrite to replace it, or name another folder")
    check_machine(device, backend)
    torch.set_num_threads(threads)
    with clean_errors():
        from noetherperf import plots
        from noetherperf.recipes.train import train

        settings = Settings(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            backend=backend,
            every=every,
            device=device,
            dtype=getattr(torch, dtype.value),
        )
        result = train(record_path, settings, exists="overwrite" if overwrite else "error")
        console = Console()
        console.print(
            f"accuracy: train {result.train_accuracy:.2%}, test {result.test_accuracy:.2%}; "
            f"{result.steps} steps in {result.seconds:.1f} s, backend {result.backend}",
            highlight=False,
        )
        record = open_record(record_path)
        console.print(law_table(record))
        console.print(law_states(record), highlight=False, markup=False)
        report_files([record_path, *plots.save_all(record, out)])
    if not result.test_accuracy > EXPECTED_ACCURACY:
        fail(
            f"test accuracy is {result.test_accuracy:.2%}, and a training that goes well reaches more than "
            f"{EXPECTED_ACCURACY:.0%}: the pictures show one that did not. Try the default options, or more --epochs",
            status=1,
        )


@app.command()
def plot(
    record: Annotated[Path, typer.Argument(help="Folder of a record, such as runs/digits/record.zarr.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the pictures; by default the one the record is in.")
    ] = None,
) -> None:
    """Draw the pictures of a record again."""
    with clean_errors():
        from noetherperf import plots

        report_files(plots.save_all(open_record(record), out or record.resolve().parent))


@app.command()
def info() -> None:
    """Print versions and backends; of a backend that cannot run here, why."""
    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    for package in ("noetherperf", "torch", "numpy"):
        table.add_row(package, importlib.metadata.version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    if backends()["cpu"] == "available":
        from noetherperf import _cpu

        used, *others = _cpu.isas()
        table.add_row(
            "instructions", f"{used} is used by backend cpu" + (f"; it also has {', '.join(others)}" if others else "")
        )
    Console().print(table, highlight=False)


def law_table(record: Record) -> Table:
    """How the laws of each symmetry did: the range of its charges at the end, and the worst of all groups and rows.

    The errors are `recorder.relative_error`; the defect is the gradient constraint as a cosine.
    """
    table = Table(
        title="Charges at the end, and each law's largest relative error on the way",
        title_justify="left",
        box=SIMPLE,
        padding=0,
        show_edge=False,  # eight columns in a terminal of 80
    )
    for heading in ("symmetry", "kind"):
        table.add_column(heading)
    for heading in ("groups", "charge", "flow", "discrete", "budget", "defect"):
        table.add_column(heading, justify="right")
    for name, data in record.items():
        last = data["charge"].isel(step=-1)
        ends = sorted({f"{float(last.min()):.2g}", f"{float(last.max()):.2g}"}, key=float)
        table.add_row(
            name,
            data.attrs["kind"],
            str(data.sizes["group"]),
            " … ".join(ends),
            *(f"{worst(relative_error(data, law)):.1e}" for law in LAWS),
            f"{worst(data['relative_defect']):.1e}",
        )
    return table


def law_states(record: Record) -> str:
    """Which laws are closed, that is, predict anything; of the others, why not."""
    still_open = [f"{name}: {data.attrs['reason']}" for name, data in record.items() if not data.attrs["closed"]]
    return "\n".join(
        ["these laws are open and predict nothing:", *still_open] if still_open else ["all laws are closed"]
    )


def worst(values: xr.DataArray) -> float:
    """The largest absolute value; NaN if there is one, for that is worse."""
    return float(np.abs(values.to_numpy()).max())


def report_files(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)


def check_machine(device: str, backend: str) -> None:
    """Exit with one line where torch cannot put a tensor on the device, or the backend cannot step it there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own ways to say so, several lines long
        fail(f"--device: {device!r} cannot be used here ({first_line(error)}); try --device cpu")
    try:
        resolve(backend, torch.device(device))
    except (RuntimeError, ValueError) as error:
        fail(str(error))


@contextmanager
def clean_errors() -> Iterator[None]:
    """Turn what a user can put right (a value, a file, a missing extra) into one line instead of a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in EXTRA:
            raise
        fail(f"{error.name} is not installed; it comes with the extra: pip install 'noetherperf[run]'")
    except (ValueError, OSError) as error:
        fail(str(error))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    print(f"noetherperf: error: {message}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """The console entry point."""
    app()
