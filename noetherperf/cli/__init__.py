"""The command line: `noetherperf run | plot | figures | check | info`, the same as `python -m noetherperf`.

It arranges what other files do and prints it; it computes nothing. What only some commands need (matplotlib,
scikit-learn) is imported in them, so that `info` also works where the extra `[run]` is not installed.
"""

import functools
import importlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

from noetherperf.checks.constraints import check_constraints
from noetherperf.common.paths import local_path
from noetherperf.common.printing import encode_everything, printable
from noetherperf.common.table import ReportTable
from noetherperf.detect import Symmetries, find_symmetries
from noetherperf.engines.backends import backends, resolve
from noetherperf.recipes.settings import Settings
from noetherperf.record import TERMS, Law, Record, open_record, relative_error
from noetherperf.symmetry import Symmetry, from_json

__all__ = ["app", "main"]

DEFAULTS = Settings()
EXPECTED_ACCURACY = 0.95
LAWS: tuple[Law, ...] = ("flow", "discrete", "budget")
USAGE_ERROR = 2
EXTRA = ("PIL", "matplotlib", "scipy", "sklearn", "tqdm")  # what the extra [run] installs

app = typer.Typer(
    name="noetherperf",
    help="Measure the Noether charges of a network during training, with the theory beside them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def local(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """A path as it was typed: the shell leaves `~` in --out=~/runs as it is."""
    with clean_errors():
        return path and local_path(path, param.opts[0])


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


class Preset(StrEnum):
    default = "default"
    paper = "paper"


class SearchLoss(StrEnum):
    cross_entropy = "cross_entropy"
    mse = "mse"
    none = "none"


@app.command()
def run(
    context: typer.Context,
    dataset: Annotated[str, typer.Option(help="digits, synthetic, cifar10, tiny-imagenet.")] = "digits",
    data_dir: Annotated[
        Path | None, typer.Option(callback=local, help="Folder of cifar10 or tiny-imagenet, unpacked.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side of digits or synthetic images.")
    ] = None,
    model: Annotated[str, typer.Option(help="small (for digits, 8×8), vgg16, vgg16-bn, resnet18.")] = "small",
    width: Annotated[float, typer.Option(help="Channels of a large network times this.")] = 1.0,
    preset: Annotated[
        Preset, typer.Option(help="paper: η 0.1, β 0, λ 1e-4, batches of 128, 100 epochs; other options still count.")
    ] = Preset.default,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read a large network's images.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a large network's run in --out that was stopped.")
    ] = False,
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
    out: Annotated[Path, typer.Option(callback=local, help="Folder for the record and the pictures.")] = Path(
        "runs/digits"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = DEFAULTS.device,
    dtype: Annotated[Precision, typer.Option(help="Of parameters and images.")] = Precision.float32,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; the small network gains nothing from more.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the record that --out has already.")] = False,
) -> None:
    """Train, record every charge, print how well the laws held, and draw it.

    Without options, a small network on scikit-learn's digits; this ends with status 1 if it classifies 95 % of the test
    images or fewer. With --model, a VGG-16 or ResNet-18 on any of the data sets, with a checkpoint after every epoch.
    """
    small = model == "small"

    def chosen(name: str) -> bool:
        return getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"

    if small:
        large_only = ("data_dir", "image_size", "width", "workers", "resume")
        if dataset != "digits" or any(map(chosen, large_only)):
            wrong = next((name for name in large_only if chosen(name)), "dataset").replace("_", "-")
            fail(f"--{wrong}: the small network takes digits of 8×8 pixels alone; add --model vgg16-bn, say")
    elif resume and overwrite:
        fail("--resume: it goes on with what --overwrite would replace; leave one of them out")
    elif not chosen("out"):
        out = Path("runs") / f"{dataset}-{model}"
    record_path = out / "record.zarr"
    if record_path.exists() and not (overwrite or resume):
        way = "--overwrite to replace it" if small else "--resume to go on, --overwrite to replace it"
        fail(f"--out: {str(record_path)!r} exists; add {way}, or name another folder")
    check_machine(device, backend)
    torch.set_num_threads(threads)
    with clean_errors():
        from noetherperf import plots
        from noetherperf.recipes import experiment
        from noetherperf.recipes.train import train

        paper = experiment.PAPER if preset == Preset.paper else {}
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
        settings = replace(settings, **{name: value for name, value in paper.items() if not chosen(name)})
        if small:
            result = train(record_path, settings, exists="overwrite" if overwrite else "error")
        else:
            what = experiment.Experiment(
                dataset=dataset, data_dir=data_dir, image_size=image_size, model=model, width=width
            )
            exists: Literal["error", "resume", "overwrite"] = (
                "resume" if resume else "overwrite" if overwrite else "error"
            )
            result = experiment.run(out, what, settings, exists=exists, workers=workers)
        console = Console()
        console.print(
            f"accuracy: train {result.train_accuracy:.2%}, test {result.test_accuracy:.2%}; "
            f"{result.steps} steps in {result.seconds:.1f} s, backend {result.backend}\n"
            f"charges at the end equal plain sums over the parameters to {result.charge_error:.1e}",
            highlight=False,
        )
        record = open_record(record_path)
        console.print(law_table(record))
        console.print(law_states(record), highlight=False, markup=False, emoji=False, soft_wrap=True)
        report_files([record_path, *plots.save_all(record, out)])
    if small and not result.test_accuracy > EXPECTED_ACCURACY:
        fail(
            f"test accuracy is {result.test_accuracy:.2%}, and a training that goes well reaches more than "
            f"{EXPECTED_ACCURACY:.0%}: the pictures show one that did not. Try the default options, or more --epochs",
            status=1,
        )


@app.command()
def plot(
    record: Annotated[
        Path, typer.Argument(callback=local, help="Folder of a record, such as runs/digits/record.zarr.")
    ],
    out: Annotated[
        Path | None, typer.Option(callback=local, help="Folder for the pictures; by default the one the record is in.")
    ] = None,
) -> None:
    """Draw the pictures of a record again."""
    with clean_errors():
        from noetherperf import plots

        opened = open_record(record)
        report_files(plots.save_all(opened, out or opened.path.parent))


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:CALLABLE",
            help="What makes the model: called without arguments, it returns (model, closure) or (model, closure, "
            "symmetries), where closure() is the loss on one fixed batch. Found from the present folder, too. Without "
            "symmetries, they are searched for with the inputs that closure() gives the model.",
        ),
    ],
    symmetries: Annotated[
        Path | None,
        typer.Option(callback=local, help="JSON file (`to_json`) of symmetries, instead of the callable's."),
    ] = None,
    loss: Annotated[
        SearchLoss, typer.Option(help="What follows the output, for a search: a softmax, squares, or anything.")
    ] = SearchLoss.cross_entropy,
    hessian: Annotated[bool, typer.Option(help="Check the Hessian constraints, too.")] = True,
    exact: Annotated[
        bool, typer.Option("--exact", help="A Hessian-vector product for every group, not random projections alone.")
    ] = False,
    probes: Annotated[int, typer.Option(min=2, help="Random projections of the Hessian constraints.")] = 4,
    float64: Annotated[
        bool, typer.Option(help="Evaluate also in float64, and there with the eps of normalisations near zero.")
    ] = True,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative defect with which a symmetry holds, in the last column. By default 1e-9 in float64, "
            "far above what rounding leaves there and far below a broken symmetry; else √ε of the dtype."
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

    Ends with status 1 if a symmetry that is claimed fails.
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


@app.command()
def figures(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which figures; by default all.")
    ] = None,
    out: Annotated[Path, typer.Option(callback=local, help="Folder for pictures, data and claims.")] = Path(
        "runs/figures"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller networks and fewer steps.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw the data in --out again, without computing.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
) -> None:
    """Make the figures of the gallery: each picture, its data beside it, and its captions' claims checked on that data.

    Ends with status 1 if a claim does not hold.
    """
    torch.set_num_threads(threads)
    with clean_errors():
        from noetherperf.figures import GALLERY, make

        if unknown := [name for name in names or [] if name not in GALLERY]:
            fail(f"there is no figure {unknown[0]!r}; there are: {', '.join(GALLERY)}")
        broken = 0
        for name in names or GALLERY:
            start = time.perf_counter()
            claims, files = make(name, out, quick=quick, redraw=redraw)
            broken += sum(not claim.holds for claim in claims)
            print(f"{name}: {GALLERY[name].title} ({time.perf_counter() - start:.0f} s)")
            for claim in claims:
                print(f"  {'holds' if claim.holds else 'FAILS'}  {claim.text}: {claim.value:.4g}")
            report_files(files)
    if broken:
        fail(f"{broken} of the claims do not hold on this data", status=1)


@app.command()
def info() -> None:
    """Print versions and backends; of a backend that cannot run here, why."""
    table = ReportTable(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(folds=True)
    table.add_row("python", platform.python_version())
    for package in ("noetherperf", "torch", "numpy"):
        table.add_row(package, importlib.metadata.version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    if backends()["cpu"] == "available":
        from noetherperf import _cpu
        from noetherperf.engines import isa

        used = isa.choose()
        for name in _cpu.isas():
            wrong = isa.fault(name)
            passed = f"fails its self-check: {wrong}" if wrong else "passes its self-check"
            table.add_row(f"instructions {name}", passed + (f", used ({isa.VARIABLE} chooses)" if name == used else ""))
    Console().print(table, highlight=False)


def made_by(target: str) -> tuple[nn.Module, Callable[[], Tensor], Sequence[Symmetry] | None]:
    """Model, closure and perhaps symmetries from what "module:callable" returns, or exit with one line."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        fail(f"{target!r} is no MODULE:CALLABLE; write it as in mypackage.training:make")
    sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    try:
        make = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        fail(f"there is no module {error.name!r} here; run this in the folder that it is in, or install it")
    except AttributeError:
        fail(f"module {module_name!r} has no {name!r}")
    made = make() if callable(make) and not isinstance(make, nn.Module) else make
    model, closure, claimed = (*made, None)[:3] if isinstance(made, tuple) and len(made) in (2, 3) else (None,) * 3
    if not (isinstance(model, nn.Module) and callable(closure)):
        fail(f"{target} must return (model, closure) or (model, closure, symmetries), got {type(made).__name__}")
    return model, closure, claimed


def found_by_search(model: nn.Module, closure: Callable[[], Tensor], loss: SearchLoss) -> Symmetries:
    """The symmetries that a search finds with what the closure gives the model."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)
    try:
        closure()
    finally:
        hook.remove()
    if not calls:
        fail("closure() never called the model that was returned beside it, so its inputs are not known")
    args, options = calls[0]
    after: dict[SearchLoss, Literal["cross_entropy", "mse"]] = {
        SearchLoss.cross_entropy: "cross_entropy",
        SearchLoss.mse: "mse",
    }
    return find_symmetries(model, *args, loss=after.get(loss), **options)


def law_table(record: Record) -> ReportTable:
    """How the laws of each symmetry did: the range of its charges at the end, and the worst of all groups and rows.

    The errors are `recorder.relative_error`; the defect is the gradient constraint as a cosine.
    """
    table = ReportTable("Charges at the end, and each law's largest relative error on the way")
    table.add_column("symmetry", folds=True)
    table.add_column("kind")
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
    """Which laws are closed, that is, predict anything; of the others, why not; and what is no longer a number."""
    still_open = [
        f"{printable(name)}: {printable(data.attrs['reason'])}"
        for name, data in record.items()
        if not data.attrs["closed"]
    ]
    lines = ["these laws are open and predict nothing:", *still_open] if still_open else ["all laws are closed"]
    lost = {name: first_not_finite(data) for name, data in record.items()}
    broken = [f"{printable(name)}: from step {step} on" for name, step in lost.items() if step is not None]
    if broken:
        lines += ["NaN or infinity in these charges or their laws; what follows it means nothing:", *broken]
    return "\n".join(lines)


def first_not_finite(data: xr.Dataset) -> int | None:
    """The first recorded step at which a symmetry's charge, or a term of its laws, is NaN or infinite."""
    finite = np.all(
        [np.isfinite(data[name].to_numpy()).all(axis=1) for name in {"charge", *sum(TERMS.values(), ())}], axis=0
    )
    return None if finite.all() else int(data["step"][int(finite.argmin())])


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
    except (UnicodeEncodeError, BrokenPipeError):  # of where output goes, and no mistake in what was asked for
        raise
    except (ValueError, OSError) as error:
        fail(str(error))


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def fail(message: str, *, status: int = USAGE_ERROR) -> NoReturn:
    line = " ".join(map(printable, message.splitlines()))  # of a library's error, too
    print(f"noetherperf: error: {line}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """The console entry point."""
    encode_everything((sys.stdout, sys.stderr))
    app()
