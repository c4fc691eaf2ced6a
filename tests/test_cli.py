"""The command line as a user meets it: what it prints, writes and refuses."""

import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from typer.testing import CliRunner, Result

from noetherperf import cli, plots
from noetherperf.backends import backends
from noetherperf.recipes.models import digits_network
from noetherperf.recorder import TERMS, Law, Record, open_record, relative_error
from noetherperf.symmetry import Part, Scale, to_json

PNG = b"\x89PNG\r\n\x1a\n"


def call(*arguments: str | Path) -> Result:
    """Run the command in this process, in a terminal wide enough for the table."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str, status: int = 2) -> None:
    """One line that says what is wrong, the exit status, and no traceback."""
    assert result.exit_code == status
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("noetherperf: error: ")
    for word in words:
        assert word in lines[-1]
    assert "Traceback" not in result.output


@pytest.fixture(autouse=True, scope="module")
def same_threads_afterwards() -> Iterator[None]:
    """`run` sets torch's threads, for it is the process; here it is not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A short run: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "short"
    return out, call("run", "--epochs", "5", "--every", "10", "--out", out)


def table_rows(result: Result) -> dict[str, list[str]]:
    """The table's cells by symmetry, the range of charges closed up."""
    lines = result.stdout.replace(" … ", "…").splitlines()
    (head,) = (index for index, line in enumerate(lines) if line.split()[:2] == ["symmetry", "kind"])
    rows = (line.split() for line in lines[head + 2 :])
    return {cells[0]: cells[1:] for cells in itertools.takewhile(lambda cells: len(cells) == 8, rows)}


def test_run_prints_accuracy_and_a_row_for_each_symmetry(done: tuple[Path, Result]) -> None:
    _, result = done
    assert result.exit_code == 0, result.output
    assert "accuracy: train " in result.stdout
    assert "all laws are closed" in result.stdout
    _, symmetries = digits_network()
    assert {name: cells[0] for name, cells in table_rows(result).items()} == {s.name: s.kind for s in symmetries}


def test_runs_table_is_the_records(done: tuple[Path, Result]) -> None:
    out, result = done
    kind, groups, charges, *errors = table_rows(result)["fc1->fc2"]
    data = open_record(out / "record.zarr")["fc1->fc2"]
    last = data["charge"].to_numpy()[-1]
    assert (kind, groups) == ("rescale", "64")
    np.testing.assert_allclose([float(end) for end in charges.split("…")], [last.min(), last.max()], rtol=0.05)
    laws: tuple[Law, ...] = ("flow", "discrete", "budget")
    expected = [relative_error(data, law).max() for law in laws] + [abs(data["relative_defect"]).max()]
    np.testing.assert_allclose([float(error) for error in errors], expected, rtol=0.05)


def test_the_table_fits_a_terminal(done: tuple[Path, Result]) -> None:
    out, _ = done
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(cli.law_table(open_record(out / "record.zarr")))
    _, symmetries = digits_network()
    lines = console.export_text().splitlines()
    for symmetry in symmetries:
        assert any(line.strip().startswith(f"{symmetry.name} ") for line in lines)
    assert not any("…" in line.replace(" … ", "") for line in lines)  # nothing cut off


def recorded(reason: str, **at: float) -> xr.Dataset:
    """Two groups at steps 0, 5 and 10, of which the second is `at` at step 5, by variable."""
    names = ("charge", *{term for terms in TERMS.values() for term in terms})
    data = xr.Dataset({name: (("step", "group"), np.ones((3, 2))) for name in names}, {"step": [0, 5, 10]})
    for name, value in at.items():
        data[name][1, 1] = value
    return data.assign_attrs(closed=not reason, reason=reason)


def test_an_open_law_is_told_with_its_reason() -> None:
    states = cli.law_states(cast(Record, {"a": recorded(""), "b": recorded("lr")}))
    assert "b: lr" in states
    assert "a:" not in states
    assert "closed" not in states
    assert "NaN" not in states


@pytest.mark.parametrize("at", [{"charge": np.nan}, {"discrete_defect": np.inf}, {"flow_forced": -np.inf}], ids=str)
def test_what_is_no_longer_a_number_is_told_with_its_step(at: dict[str, float]) -> None:
    states = cli.law_states(cast(Record, {"a": recorded(""), "b": recorded("", **at)}))
    assert "NaN" in states
    assert "b: from step 5 on" in states
    assert "a:" not in states


def test_a_nan_is_the_worst() -> None:
    assert cli.worst(xr.DataArray([1.0, -3.0])) == 3.0
    assert np.isnan(cli.worst(xr.DataArray([1.0, np.nan])))


def test_run_lists_the_files_it_wrote(done: tuple[Path, Result]) -> None:
    out, result = done
    pictures = sorted(out.glob("*.png"))
    assert pictures
    assert str(out / "record.zarr") in result.stdout
    for picture in pictures:
        assert str(picture) in result.stdout
        assert picture.read_bytes().startswith(PNG)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and some tests look at the record alone."""
    monkeypatch.setattr(plots, "save_all", lambda *_: [])


def test_run_keeps_a_record_that_exists(done: tuple[Path, Result]) -> None:
    out, _ = done
    before = open_record(out / "record.zarr").steps
    assert_refused(call("run", "--epochs", "1", "--out", out), "--out", str(out / "record.zarr"), "--overwrite")
    np.testing.assert_array_equal(open_record(out / "record.zarr").steps, before)


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_replaces_the_record(tmp_path: Path) -> None:
    short = ("run", "--epochs", "1", "--out", tmp_path)
    call(*short, "--every", "45")
    call(*short, "--every", "9", "--overwrite")
    assert open_record(tmp_path / "record.zarr").steps.tolist() == [0, 9, 18, 27, 36, 45]


def test_overwrite_deletes_records_only(tmp_path: Path) -> None:
    precious = tmp_path / "record.zarr" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years")
    assert_refused(call("run", "--epochs", "1", "--out", tmp_path, "--overwrite"), "record.zarr")
    assert precious.read_text() == "years"


@pytest.mark.usefixtures("no_pictures")
def test_options_reach_the_training(tmp_path: Path) -> None:
    call(
        *("run", "--lr", "0.02", "--momentum", "0.8", "--weight-decay", "0.003", "--nesterov", "--dtype", "float64"),
        *("--epochs", "1", "--batch-size", "500", "--backend", "reference", "--every", "3", "--out", tmp_path),
    )
    record = open_record(tmp_path / "record.zarr")
    last = record.hyperparameters.isel(step=-1, parameter_group=0)
    assert (float(last["lr"]), float(last["momentum"]), float(last["weight_decay"])) == (0.02, 0.8, 0.003)
    assert record.steps.tolist() == [0, 3]
    assert record.attrs["backend"] == "reference"
    assert record.attrs["dtypes"] == ["float64"]


def test_a_training_that_went_wrong_is_told(tmp_path: Path) -> None:
    result = call("run", "--lr", "1e-7", "--epochs", "1", "--every", "45", "--out", tmp_path)
    assert_refused(result, "test accuracy is", "95%", status=1)
    assert list(tmp_path.glob("*.png"))  # and still drawn, for they may show why


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--lr", "-1"), "-1"),
        (("--nesterov", "--momentum", "0"), "momentum"),
        (("--backend", "abacus"), "abacus"),
        (("--device", "toaster"), "--device: 'toaster'"),
        pytest.param(
            ("--device", "cuda"),
            "--device: 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_values_of_no_use_are_refused(tmp_path: Path, options: tuple[str, ...], word: str) -> None:
    assert_refused(call("run", *options, "--out", tmp_path), word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [("--epochs", "0"), ("--batch-size", "0"), ("--every", "0"), ("--seed", "-1"), ("--dtype", "int8")]
)
def test_values_out_of_range_are_usage_errors(options: tuple[str, str]) -> None:
    result = call("run", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_plot_draws_again_where_asked(done: tuple[Path, Result], tmp_path: Path) -> None:
    out, _ = done
    result = call("plot", out / "record.zarr", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in out.iterdir() if path.suffix in {".png", ".pdf"})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert sorted(Path(line).name for line in result.stdout.splitlines()) == names


def test_plot_draws_beside_the_record(done: tuple[Path, Result]) -> None:
    out, _ = done
    pictures = sorted(out.glob("*.png"))
    for picture in pictures:
        picture.unlink()
    assert call("plot", out / "record.zarr").exit_code == 0
    assert sorted(out.glob("*.png")) == pictures


def test_paths_are_a_users(done: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = done
    monkeypatch.setenv("HOME", str(out))
    monkeypatch.chdir(tmp_path)
    result = call("plot", "~/record.zarr", "--out=~/at home")
    assert result.exit_code == 0, result.output
    assert list((out / "at home").glob("*.png"))
    assert_refused(call("plot", "s3://bucket/record.zarr"), "record: ", "is a URL")
    assert_refused(call("plot", out / "record.zarr", "--out", "gs://bucket/x"), "--out: ", "is a URL")
    assert_refused(call("run", "--out=~nobody-of-this-name/x"), "--out: ", "cannot be followed")
    assert_refused(call("figures", "--out", "file:///x"), "--out: ", "is a URL")
    assert not list(tmp_path.iterdir())


def test_plot_of_no_record_is_refused(tmp_path: Path) -> None:
    assert_refused(call("plot", tmp_path / "nothing"), "nothing")
    (tmp_path / "file").write_text("")
    assert_refused(call("plot", tmp_path / "file"), "file")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for module in ("digits", "train"):
        monkeypatch.delitem(sys.modules, f"noetherperf.recipes.{module}", raising=False)
        monkeypatch.delattr(sys.modules["noetherperf.recipes"], module, raising=False)
    assert_refused(call("run", "--out", tmp_path), "sklearn", "noetherperf[run]")


MADE = """
import torch
from noetherperf import Part, Rescale, Scale
from torch import nn

model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
x, y = torch.randn(5, 3), torch.randint(2, (5,))
hidden = Rescale("hidden", [Part("0.weight", 0), Part("0.bias", 0)], [Part("2.weight", 1)])
wrong = Scale("wrong", [Part("0.weight", 0)])

def closure():
    return nn.functional.cross_entropy(model(x), y)

def make():
    return model, closure, [hidden]

def make_wrong():
    return model, closure, [hidden, wrong]

def make_two():
    return model, closure

def make_bad():
    return model, lambda: model(x), [hidden]

def make_nothing():
    pass
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module `made` in it, which is where we are."""
    (tmp_path / "made.py").write_text(MADE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("made", None)


def test_check_prints_the_table(made: Path) -> None:
    result = call("check", "made:make")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert next(row[:4] for row in rows if row[-1:] == ["holds"]) == ["hidden", "rescale", "4", "gradient"]
    assert "1 of 1 symmetries hold" in result.stdout
    assert not [path for path in made.iterdir() if path.suffix in {".json", ".png"}]


def test_the_main_jobs_network_passes_the_check() -> None:
    result = call("check", "noetherperf.recipes.check:digits_batch")
    assert result.exit_code == 0, result.output
    _, symmetries = digits_network()
    for symmetry in symmetries:
        assert any(line.split()[:2] == [symmetry.name, symmetry.kind] for line in result.stdout.splitlines())


def test_check_fails_where_a_constraint_does(made: Path) -> None:
    result = call("check", "made:make_wrong", "--out", made / "out")
    assert_refused(result, "the constraints of wrong do not hold", status=1)
    assert "FAILS" in result.stdout
    assert (made / "out" / "constraints.png").read_bytes().startswith(PNG)
    data = json.loads((made / "out" / "constraints.json").read_text())
    assert data["failed"] == ["wrong"]
    for name in ("constraints.json", "constraints.png", "constraints.pdf"):
        assert str(made / "out" / name) in result.stdout


def test_checks_options_reach_the_check(made: Path) -> None:
    plain = call("check", "made:make_wrong", "--tolerance", "1", "--no-hessian", "--no-float64")
    assert plain.exit_code == 0, plain.output
    assert "Hessian" not in plain.stdout.replace("gradient and Hessian", "")
    assert "eps → 0" not in plain.stdout
    call("check", "made:make", "--exact", "--probes", "2", "--out", made / "exact")
    call("check", "made:make", "--probes", "2", "--out", made / "probes")
    defects = [
        json.loads((made / name / "constraints.json").read_text())["symmetries"][0]["defects"]
        for name in ("exact", "probes")
    ]
    assert defects[0]["gradient"] == defects[1]["gradient"]
    assert defects[0]["hessian"] != defects[1]["hessian"]


def test_check_explains(made: Path) -> None:
    result = call("check", "made:make", "--explain")
    assert "Rescale “hidden”" in result.stdout
    assert "Q = |0.weight[i]|² + |0.bias[i]|² − |2.weight[:, i]|²" in result.stdout


def test_check_searches_where_no_symmetries_are_given(made: Path) -> None:
    searched = call("check", "made:make_two")
    assert searched.exit_code == 0, searched.output
    assert "3 of 3 symmetries hold" in searched.stdout  # the hidden units, the classes' weights and bias
    unassuming = call("check", "made:make_two", "--loss", "none")
    assert "1 of 1 symmetries hold" in unassuming.stdout
    (made / "silent.py").write_text(
        "from torch import nn, ones\n\ndef make():\n    return nn.Linear(2, 2), lambda: ones(())\n"
    )
    assert_refused(call("check", "silent:make"), "never called the model")


def test_check_reads_symmetries_from_a_file(made: Path) -> None:
    (made / "s.json").write_text(to_json([Scale("from the file", [Part("0.weight", 0)])]))
    assert_refused(call("check", "made:make", "--symmetries", made / "s.json"), "from the file", status=1)
    assert_refused(call("check", "made:make", "--symmetries", made / "absent.json"), "absent.json")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("made", ("'made' is no MODULE:CALLABLE",)),
        ("nowhere:make", ("no module 'nowhere'",)),
        ("made:nothing", ("module 'made' has no 'nothing'",)),
        ("made:model", ("made:model", "must return (model, closure)")),
        ("made:make_nothing", ("must return (model, closure)", "got NoneType")),
        ("made:make_bad", ("must return one number, got shape (5, 2)",)),
    ],
)
def test_a_target_of_no_use_is_refused(made: Path, target: str, words: tuple[str, ...]) -> None:
    assert_refused(call("check", target), *words)


@pytest.mark.usefixtures("made")
def test_check_refuses_a_tolerance_of_no_use() -> None:
    assert_refused(call("check", "made:make", "--tolerance", "0"), "--tolerance")


def test_a_module_that_a_target_misses_is_no_usage_error(made: Path) -> None:
    (made / "made.py").write_text("import missing_elsewhere")
    assert isinstance(call("check", "made:make").exception, ModuleNotFoundError)


def test_info_tells_versions_and_backends() -> None:
    result = call("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.stdout
    for name, state in backends().items():
        (line,) = (line for line in result.stdout.splitlines() if line.startswith(f"backend {name} "))
        assert state in line


@pytest.mark.skipif(backends()["cpu"] != "available", reason="the compiled engine is not here")
def test_info_tells_the_instructions_that_are_used() -> None:
    from noetherperf import _cpu

    (line,) = (line for line in call("info").stdout.splitlines() if line.startswith("instructions "))
    assert f" {_cpu.isas()[0]} is used" in line


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "noetherperf", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "plot", "check", "info"):
        assert f" {command} " in shown.stdout
