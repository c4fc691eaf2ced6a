"""`noetherperf run`: train, record, print how well the laws held, and draw."""

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from noetherperf.cli.errors import again, as_typed, clean_errors, fail, first_line, flag, is_given
from noetherperf.cli.files import completing, local, report_files
from noetherperf.recipes.settings import OPTIMIZERS, OPTIONS, Settings

if TYPE_CHECKING:
    from noetherperf.recipes.session import Exists
    from noetherperf.recipes.train import Result

__all__ = ["run"]

DEFAULTS = Settings()
EXPECTED_ACCURACY = 0.95
DATASETS = ("digits", "synthetic", "cifar10", "tiny-imagenet")
MODELS = ("small", "vgg16", "vgg16-bn", "resnet18")
BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")
#: Options of the large networks, and why the small one has none of them.
LARGE_ONLY = {
    "dataset": "the small network takes digits of 8×8 pixels only",
    "data_dir": "the small network takes digits of 8×8 pixels only, which come with scikit-learn",
    "image_size": "the small network takes digits of 8×8 pixels only",
    "width": "the small network has one width",
    "workers": "the small network's images are in memory, and no process has to load them",
}


class Precision(StrEnum):
    float32 = "float32"
    float64 = "float64"


class Preset(StrEnum):
    default = "default"
    paper = "paper"


def default(option: str) -> str:
    """The values of an optimizer's option where it is not given, and whose they are, for the help."""
    values: dict[str, list[str]] = {}
    for name, choice in OPTIMIZERS.items():
        if (value := choice.options.get(option)) is not None:
            shown = " ".join(f"{x:g}" for x in (value if isinstance(value, tuple) else (value,)))
            values.setdefault(shown, []).append(name)
    return "default " + ", ".join(f"{shown} ({', '.join(names)})" for shown, names in values.items())


def run(
    context: typer.Context,
    dataset: Annotated[
        str, typer.Option(autocompletion=completing(DATASETS), help=f"Images to learn: {', '.join(DATASETS)}.")
    ] = "digits",
    data_dir: Annotated[
        Path | None,
        typer.Option(callback=local, help="Folder of the unpacked cifar10 or tiny-imagenet; nothing is downloaded."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side of an image in pixels; default 32 (digits), 64 (synthetic), fixed for the others."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            autocompletion=completing(MODELS),
            help="Network: small (for digits of 8×8 pixels only), vgg16, vgg16-bn, resnet18.",
        ),
    ] = "small",
    width: Annotated[float, typer.Option(help="Factor on the number of channels of a large network.")] = 1.0,
    preset: Annotated[
        Preset,
        typer.Option(
            help="Default values of the other options. paper: --lr 0.1 --momentum 0 --weight-decay 1e-4 --batch-size "
            "128 --epochs 100. Options that you give win."
        ),
    ] = Preset.default,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Processes that load images for a large network; with 0 the training process does it."
        ),
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the stopped run in --out from its last checkpoint.")
    ] = False,
    optimizer: Annotated[
        str, typer.Option(autocompletion=completing(OPTIMIZERS), help=f"Optimizer: {', '.join(OPTIMIZERS)}.")
    ] = DEFAULTS.optimizer,
    lr: Annotated[float | None, typer.Option(help=f"Learning rate η; {default('lr')}.")] = None,
    momentum: Annotated[float | None, typer.Option(help=f"Momentum β; {default('momentum')}.")] = None,
    nesterov: Annotated[bool, typer.Option("--nesterov", help="Use Nesterov momentum (sgd only).")] = False,
    betas: Annotated[
        tuple[float, float] | None, typer.Option(help=f"β₁ and β₂, two numbers; {default('betas')}.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"Weight decay λ; {default('weight_decay')}.")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = DEFAULTS.batch_size,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the data split, initial parameters, batches and dropout.")
    ] = DEFAULTS.seed,
    backend: Annotated[
        str,
        typer.Option(
            autocompletion=completing(BACKENDS),
            help=f"Code that makes the step: {', '.join(BACKENDS)}. `noetherperf info` says which run here.",
        ),
    ] = DEFAULTS.backend,
    every: Annotated[int, typer.Option(min=1, help="Steps between two rows of the record.")] = DEFAULTS.every,
    out: Annotated[
        Path,
        typer.Option(
            callback=local,
            help="Folder for record, checkpoint and pictures; with a large network runs/DATASET-MODEL by default.",
        ),
    ] = Path("runs/digits"),
    device: Annotated[
        str, typer.Option(help="Device of parameters and images, as torch names it: cpu, cuda, cuda:1, …")
    ] = DEFAULTS.device,
    dtype: Annotated[Precision, typer.Option(help="Dtype of parameters and images.")] = Precision.float32,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; more than 1 do not speed up the small network.")
    ] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the record that exists in --out.")] = False,
) -> None:
    """Train a network, record its charges, print how well each law held, and draw pictures.

    Without options it trains a small network on scikit-learn's digits.
    The exit status is then 1 if that network classifies 95 % of the test images or fewer.
    --model chooses a VGG-16 or a ResNet-18, for any of the data sets.
    Every epoch ends with a checkpoint, from which --resume goes on.
    """
    small = model == "small"

    def chosen(name: str) -> bool:
        return is_given(context, name)

    if dataset not in DATASETS:
        fail(f"--dataset: there is no {dataset!r}; there are: {', '.join(DATASETS)}")
    large = (name for name in LARGE_ONLY if chosen(name) and (name, dataset) != ("dataset", "digits"))
    if small and (wrong := next(large, None)):
        fail(f"{flag(wrong)}: {LARGE_ONLY[wrong]}; add --model vgg16-bn, for example")
    if resume and overwrite:
        fail("--resume: continues the run that --overwrite would replace; leave one of them out")
    if not small and not chosen("out"):
        out = Path("runs") / f"{dataset}-{model}"
    if optimizer not in OPTIMIZERS:
        fail(f"--optimizer: there is no {optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
    choice = OPTIMIZERS[optimizer]
    if foreign := next((name for name in OPTIONS if chosen(name) and name not in choice.options), None):
        fail(f"{flag(foreign)}: {optimizer} has no {foreign}; its options are {', '.join(map(flag, choice.options))}")
    if preset == Preset.paper and choice is not OPTIMIZERS["sgd"]:
        fail(f"--preset: the paper's experiment is trained with sgd; leave out --optimizer {optimizer}")
    exists: Exists = "resume" if resume else "overwrite" if overwrite else "error"
    record_path = out / "record.zarr"
    if record_path.exists() and exists == "error":
        fail(
            f"--out: {str(record_path)!r} exists; add --resume to continue, --overwrite to replace it, or name another "
            "folder"
        )
    with clean_errors():
        import torch

        from noetherperf.recipes import experiment
        from noetherperf.recipes.main_job import train
        from noetherperf.recipes.session import Stopped

        paper = experiment.PAPER if preset == Preset.paper else {}
        settings = Settings(
            optimizer=optimizer,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov or None,
            betas=betas,
            weight_decay=weight_decay,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed,
            backend=backend,
            every=every,
            device=device,
            dtype=dtype.value,
        )
        settings = replace(settings, **{name: value for name, value in paper.items() if not chosen(name)})
        check_machine(settings)
        torch.set_num_threads(threads)
        try:
            if small:
                result = train(out, settings, exists=exists)
            else:
                what = experiment.Experiment(
                    dataset=dataset, data_dir=data_dir, image_size=image_size, model=model, width=width
                )
                result = experiment.run(out, what, settings, exists=exists, workers=workers)
        except Stopped as stopped:
            way = again(context, resume=True, overwrite=False)
            raise KeyboardInterrupt(f"{stopped}; go on with: {way}") from None
        report(result, record_path)
    if small and not result.test_accuracy > EXPECTED_ACCURACY:
        fail(
            f"test accuracy is {result.test_accuracy:.2%}, but a good training reaches more than "
            f"{EXPECTED_ACCURACY:.0%}; these pictures show a bad one. Try the default options, or more --epochs",
            status=1,
        )


def report(result: "Result", path: Path) -> None:
    """Print what came out, and how well the laws held, and draw the record's pictures."""
    from noetherperf import plots
    from noetherperf.cli.laws import law_states, law_table
    from noetherperf.record import open_record

    console = Console()
    console.print(
        f"accuracy: train {result.train_accuracy:.2%}, test {result.test_accuracy:.2%}; "
        f"{result.steps} steps in {result.seconds:.1f} s, backend {result.backend}\n"
        f"charges at the end equal plain sums over the parameters to {result.charge_error:.1e}",
        highlight=False,
    )
    record = open_record(path)
    console.print(law_table(record))
    console.print(law_states(record), highlight=False, markup=False, emoji=False, soft_wrap=True)
    try:
        report_files([path, *plots.save_all(record, path.parent)])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"while drawing; the record is complete; draw it with: noetherperf plot {path}"
        ) from None


def check_machine(settings: Settings) -> None:
    """Fail where torch cannot put a tensor on the device, or the backend cannot make the optimizer's steps there."""
    import torch

    from noetherperf.engines.backends import resolve

    device = settings.device
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, with a message of several lines
        fail(f"--device: {device!r} cannot be used here ({first_line(error)}); try --device cpu")
    try:
        resolve(settings.backend, torch.device(device), rule=OPTIMIZERS[settings.optimizer].make.rule)
    except (RuntimeError, ValueError) as error:
        fail(as_typed(str(error)))
