"""The paper's experiment, small: it learns, and a run that was stopped goes on as if it had not been."""

import re
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from noetherperf.cli import app
from noetherperf.cli.laws import law_table
from noetherperf.optim.sgd import SGD
from noetherperf.recipes.experiment import Experiment, run
from noetherperf.recipes.resnet import resnet18
from noetherperf.recipes.settings import Settings
from noetherperf.record import Recorder, open_record, relative_error

TINY = Experiment(dataset="digits", image_size=32, model="vgg16-bn", width=1 / 64)
SETTINGS = Settings(epochs=2, batch_size=256, every=2, lr=0.02)


@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, optimizer="adamw", lr=None)], ids=["sgd", "adamw"])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> None:
    run(tmp_path / "whole", TINY, settings, progress=False)
    calls, loss = count(), nn.functional.cross_entropy

    def stopped(*args: Any) -> Any:
        if next(calls) == 9:  # in the middle of the second epoch, with rows recorded that the checkpoint has not
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nn.functional, "cross_entropy", stopped)
        run(tmp_path / "parts", TINY, settings, progress=False)
    assert open_record(tmp_path / "parts" / "record.zarr").steps[-1] == 8
    result = run(tmp_path / "parts", TINY, settings, exists="resume", progress=False)
    assert result.steps == 6
    whole, parts = (open_record(tmp_path / name / "record.zarr") for name in ("whole", "parts"))
    assert whole.steps.tolist() == parts.steps.tolist() == [0, 2, 4, 6, 8, 10, 12]
    np.testing.assert_array_equal(whole.dataset["charge"], parts.dataset["charge"])
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts")]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert np.ptp(whole.dataset["charge"].to_numpy(), axis=0).max() > 0


def test_a_run_is_kept_unless_asked_and_resumed_as_it_was(tmp_path: Path) -> None:
    once = replace(SETTINGS, epochs=1, batch_size=1437)
    result = run(tmp_path, TINY, once, progress=False)
    finished = run(tmp_path, TINY, once, exists="resume", progress=False)
    assert finished.steps == 0
    for field in ("train_accuracy", "test_accuracy", "loss"):
        assert getattr(finished, field) == getattr(result, field), field
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tmp_path, TINY, once, progress=False)
    with pytest.raises(ValueError, match=r"had another lr \(0\.02, now 0\.5\)"):
        run(tmp_path, TINY, replace(once, lr=0.5), exists="resume", progress=False)
    with pytest.raises(ValueError, match=r"had another optimizer \(sgd, now adamw\), lr \(0\.02, now 0\.001\)"):
        run(tmp_path, TINY, replace(once, optimizer="adamw", lr=None), exists="resume", progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["run"]["optimizer"]  # as the first checkpoints
    torch.save(state, tmp_path / "checkpoint.pt")
    assert run(tmp_path, TINY, once, exists="resume", progress=False).steps == 0
    assert run(tmp_path, TINY, once, exists="overwrite", progress=False).steps == 1


def test_a_run_stopped_in_its_first_epoch_begins_anew(tmp_path: Path) -> None:
    once = replace(SETTINGS, epochs=1, batch_size=1437)
    run(tmp_path, TINY, once, progress=False)
    (tmp_path / "checkpoint.pt").unlink()
    assert run(tmp_path, TINY, once, exists="resume", progress=False).steps == 1


@pytest.mark.parametrize(("model", "n_symmetries"), [("vgg16", 17), ("resnet18", 37)])
def test_every_law_is_closed_and_held(tmp_path: Path, model: str, n_symmetries: int) -> None:
    experiment = Experiment(dataset="synthetic", image_size=32, model=model, width=1 / 64)
    result = run(tmp_path, experiment, replace(SETTINGS, epochs=1, batch_size=512, every=1), progress=False)
    assert result.steps == 2
    record = open_record(tmp_path / "record.zarr")
    assert len(record) == n_symmetries
    for name, data in record.items():
        assert data.attrs["closed"], name
        if data.attrs["kind"] != "translation":  # whose charges may begin at zero, with nothing to be relative to
            assert relative_error(data, "budget").max() < 1e-5, name


def test_the_table_of_a_resnet_cuts_nothing_off(tmp_path: Path) -> None:
    """Its symmetries have the longest names: in 80 columns, each has a block of lines."""
    model, symmetries = resnet18(width=1 / 64)
    optimizer = SGD(model.named_parameters(), lr=0.1, symmetries=symmetries)
    with Recorder(optimizer, tmp_path / "record.zarr"):
        optimizer.step()
    console = Console(width=80, record=True, file=StringIO())
    console.print(law_table(open_record(tmp_path / "record.zarr")))
    told = " ".join(console.export_text().split())
    for symmetry in symmetries:
        assert f"{symmetry.name} kind {symmetry.kind} " in told, symmetry.name


def test_a_model_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match="model: there is no 'alexnet'; there are: vgg16, vgg16-bn, resnet18"):
        Experiment(dataset="digits", model="alexnet")


RUN = ["run", "--dataset", "synthetic", "--image-size", "32", "--model", "vgg16", "--width", "0.02"]


def test_the_command_line_runs_the_paper_and_goes_on(tmp_path: Path) -> None:
    options = [*RUN, "--preset", "paper", "--batch-size", "512", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, [*options, "--epochs", "1"])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(app, [*options, "--epochs", "1"])
    assert again.exit_code == 2
    assert "--resume to continue" in again.output
    resumed = CliRunner().invoke(app, [*options, "--epochs", "2", "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "2 steps in" in resumed.output
    finished = CliRunner().invoke(app, [*options, "--epochs", "2", "--resume"])
    assert finished.exit_code == 0, finished.output
    assert "0 steps in" in finished.output
    accuracies = [re.findall(r"accuracy: train \S+%, test \S+%", done.output) for done in (resumed, finished)]
    assert len(accuracies[0]) == 1
    assert accuracies[0] == accuracies[1]
    hyper = open_record(tmp_path / "record.zarr").dataset
    assert float(hyper["lr"][-1, 0]) == 0.1
    assert float(hyper["momentum"][-1, 0]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run", "--dataset", "cifar10"], "--dataset: the small network takes digits"),
        (["run", "--workers", "2"], "--workers: the small network"),
        ([*RUN, "--resume", "--overwrite"], "--resume: continues the run that --overwrite would replace"),
        (["run", "--dataset", "cifar10", "--model", "vgg16"], "--data-dir: 'cifar10' is read from a folder and never"),
        (["run", "--model", "alexnet"], "--model: there is no 'alexnet'"),
        ([*RUN, "--width", "0"], "--width: must be positive"),
    ],
)
def test_options_that_do_not_fit_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert message in result.output
