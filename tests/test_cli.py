"""The command line as a user meets it: what it prints, writes and refuses."""

import io
import itertools
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import typer
import xarray as xr
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

import noetherperf as nperf
from noetherperf import cli, plots
from noetherperf.cli.errors import clean_errors, fail
from noetherperf.cli.laws import LAWS, law_states, law_table, worst
from noetherperf.common.table import ReportTable
from noetherperf.engines.backends import backends
from noetherperf.optim.sgd import SGD
from noetherperf.recipes.models import digits_network
from noetherperf.record import TERMS, LawName, Record, Recorder, open_record, relative_error
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
    laws: tuple[LawName, ...] = ("flow", "discrete", "budget")
    expected = [relative_error(data, law).max() for law in laws] + [abs(data["relative_defect"]).max()]
    np.testing.assert_allclose([float(error) for error in errors], expected, rtol=0.05)


def test_the_table_fits_a_terminal(done: tuple[Path, Result]) -> None:
    out, _ = done
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(law_table(open_record(out / "record.zarr")))
    _, symmetries = digits_network()
    lines = console.export_text().splitlines()
    for symmetry in symmetries:
        assert any(line.strip().startswith(f"{symmetry.name} ") for line in lines)
    assert not any("…" in line.replace(" … ", "") for line in lines)  # nothing cut off


ODD_NAMES = (
    "conv[relu]",
    "block[/attn]",
    "[bold red]",
    ":smile:",
    "two\nlines\tand a tab",
    "\x1b[31mred\x1b[0m",
    "back\\slash",
    "a" * 150,
)
AS_PRINTED = {"two\nlines\tand a tab": "two\\nlines\\tand a tab", "\x1b[31mred\x1b[0m": "\\x1b[31mred\\x1b[0m"}


def printed(renderable: object, width: int, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding)
    Console(width=width, file=file, force_terminal=True, color_system=None).print(renderable)
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_names_are_printed_as_they_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = torch.nn.Linear(20, 3)
    optimizer = SGD(model.named_parameters(), symmetries=[Scale(name, [Part("weight", axis=0)])])
    Recorder(optimizer, tmp_path / "record").close()
    record = open_record(tmp_path / "record")
    shown = AS_PRINTED.get(name, name)
    for width in (100, 40, 12):
        text = printed(law_table(record), width)
        names = "".join(line.partition(" scale ")[0] for line in text.splitlines())
        assert shown.replace(" ", "") in names.replace(" ", "")
        assert "\x1b" not in text
    assert f"“{shown}”" in optimizer.symmetries[0].explain()


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        fail("it went\nwrong in \x1b[31mred\x1b[0m")
    assert capsys.readouterr().err == "noetherperf: error: it went wrong in \\x1b[31mred\\x1b[0m\n"


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20])
def test_the_table_cuts_nothing_off(done: tuple[Path, Result], width: int) -> None:
    """However narrow it is, names and numbers are there in one piece, and lines are no longer than they may be."""
    record = open_record(done[0] / "record.zarr")
    text = printed(law_table(record), width)
    assert max(map(len, text.splitlines())) <= width
    for name, data in record.items():
        assert name in text
        for law in LAWS:
            assert f"{worst(relative_error(data, law)):.1e}" in text


def test_a_name_is_folded_before_a_table_falls_apart(tmp_path: Path) -> None:
    table = ReportTable()
    table.add_column("name", folds=True)
    table.add_column("number")
    table.add_row("n" * 30, "1.234567")
    table.add_row("m", "2.5")
    assert printed(table, 26).splitlines()[2:] == [
        f"{'n' * 17} 1.234567",
        f"{'n' * 13}{' ' * 13}",
        f"m{' ' * 17}2.5     ",
    ]
    assert printed(table, 24).splitlines() == ["n" * 24, "n" * 6, "  number 1.234567", "m", "  number 2.5"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_table_stays_in_columns_where_characters_are_missing(done: tuple[Path, Result], encoding: str) -> None:
    lines = printed(law_table(open_record(done[0] / "record.zarr")), 80, encoding).splitlines()
    assert " ... " in "".join(lines)
    assert len({len(line) for line in lines[1:]}) == 1


def in_another_encoding(code: str, encoding: str = "ascii", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "80"} | environment,
    )


EVERY_COMMAND = """
import sys
from noetherperf.cli import app, main
for command in ([], *([c.name or c.callback.__name__] for c in app.registered_commands)):
    sys.argv = ["noetherperf", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
assert not {"torch", "numpy", "xarray", "matplotlib"} & set(sys.modules), "help is slow"
sys.argv = ["noetherperf", "check", "made:make", "--explain", "--no-hessian"]
main()
"""


def test_help_and_formulas_need_no_unicode(made: Path) -> None:
    shown = in_another_encoding(EVERY_COMMAND)
    assert (shown.returncode, shown.stderr) == (0, "")
    for words in (
        "Learning rate eta;",
        "Draw the pictures",
        "Q = |0.weight[i]|^2 + |0.bias[i]|^2 - |2.weight[:,i]|^2",
    ):
        assert words in shown.stdout
    assert "\\u" not in shown.stdout


def test_run_ends_well_whatever_surrounds_it(tmp_path: Path) -> None:
    """Output that knows ASCII alone, a locale that does, a backend of a notebook, and a style that needs LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.family: Courier\ntoolbar: toolmanager\n")
    surroundings = {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "MATPLOTLIBRC": str(tmp_path),
    }
    code = (
        "import sys; from noetherperf.cli import main; sys.argv[1:] = ['run', '--epochs', '6', '--out', 'out']; main()"
    )
    shown = in_another_encoding(f"import os; os.chdir({str(tmp_path)!r}); {code}", **surroundings)
    assert shown.returncode == 0, shown.stderr
    assert len([path for path in (tmp_path / "out").iterdir() if path.suffix in {".png", ".pdf"}]) == 10


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `noetherperf info | head -1`: the command ends as if it had been read."""
    code = """
import sys
from noetherperf.cli import main
try:
    sys.argv = ["noetherperf", *sys.argv[1:]]
    main()
finally:
    print("to the end", file=sys.stderr)
"""
    for words in (["-c", code, "run", "--help"], ["-u", "-c", code, "--version"]):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        process = subprocess.Popen(
            [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, "to the end\n")


def test_what_cannot_be_written_is_no_mistake_of_the_user() -> None:
    with pytest.raises(UnicodeEncodeError), clean_errors():
        "η".encode("ascii")
    with pytest.raises(BrokenPipeError), clean_errors():
        raise BrokenPipeError


def recorded(reason: str, **at: float) -> xr.Dataset:
    """Two groups at steps 0, 5 and 10, of which the second is `at` at step 5, by variable."""
    names = ("charge", *{term for terms in TERMS.values() for term in terms})
    data = xr.Dataset({name: (("step", "group"), np.ones((3, 2))) for name in names}, {"step": [0, 5, 10]})
    for name, value in at.items():
        data[name][1, 1] = value
    return data.assign_attrs(closed=not reason, reason=reason)


class Named(dict[str, Any]):
    """A record's symmetries and its rule."""

    rule = "sgd"


def of_sgd(symmetries: dict[str, Any]) -> Record:
    return cast(Record, Named(symmetries))


def test_an_open_law_is_told_with_its_reason() -> None:
    states = law_states(of_sgd({"a": recorded(""), "b": recorded("lr")}))
    assert "b: lr" in states
    assert "a:" not in states
    assert "closed" not in states
    assert "NaN" not in states


@pytest.mark.parametrize("at", [{"charge": np.nan}, {"discrete_defect": np.inf}, {"flow_forced": -np.inf}], ids=str)
def test_what_is_no_longer_a_number_is_told_with_its_step(at: dict[str, float]) -> None:
    states = law_states(of_sgd({"a": recorded(""), "b": recorded("", **at)}))
    assert "NaN" in states
    assert "b: from step 5 on" in states
    assert "a:" not in states


def test_a_nan_is_the_worst() -> None:
    assert worst(xr.DataArray([1.0, -3.0])) == 3.0
    assert np.isnan(worst(xr.DataArray([1.0, np.nan])))


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
    words = ("--out", str(out / "record.zarr"), "--resume", "--overwrite")
    assert_refused(call("run", "--epochs", "1", "--out", out), *words)
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
    (tmp_path / "checkpoint.pt").write_text("days")
    result = call("run", "--epochs", "1", "--out", tmp_path, "--overwrite")
    assert_refused(result, "error: --overwrite deletes noetherperf records only", "record.zarr")
    assert (precious.read_text(), (tmp_path / "checkpoint.pt").read_text()) == ("years", "days")


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a training interrupted at its n-th loss from now on."""
    loss = nn.functional.cross_entropy

    def interrupt(n: int) -> None:
        calls = itertools.count(1)

        def counted(*args: Any) -> Any:
            if next(calls) == n:
                raise KeyboardInterrupt
            return loss(*args)

        monkeypatch.setattr(nn.functional, "cross_entropy", counted)

    return interrupt


def stopped(result: Result) -> tuple[str, list[str]]:
    """What an interrupted command says, and the command that it says to type."""
    assert result.exit_code == 130
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("noetherperf: interrupted ")
    said, _, way = line.partition("; go on with: ")
    program, *words = shlex.split(way)
    assert program == "noetherperf"
    return said, words


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("n", [10, 22], ids=["first epoch", "second epoch"])
def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, interrupting: Callable[[int], None], n: int) -> None:
    options = ("--weight-decay", "0.002", "--epochs", "3", "--batch-size", "100", "--every", "9")  # 15 steps an epoch
    whole = call("run", *options, "--out", tmp_path / "whole")
    assert "training: step 45 of 45, 100%, 0:00:00 left; loss " in whole.stderr
    interrupting(n)
    said, words = stopped(call("run", *options, "--overwrite", "--out", tmp_path / "two parts"))
    assert str(tmp_path / "two parts") in said
    assert ("in the first epoch, before a checkpoint" if n < 15 else "after step 21 of 45") in said
    assert ("a checkpoint of 1 of 3 epochs" in said) == (n > 15)
    assert words == ["run", "--resume", *options, "--out", str(tmp_path / "two parts")]
    interrupting(10_000)
    assert "all laws are closed" in call(*words).stdout
    one, two = (open_record(tmp_path / name / "record.zarr") for name in ("whole", "two parts"))
    assert two.steps.tolist() == [0, 9, 18, 27, 36, 45]
    for name in ("charge", "discrete_forced", "rounding", "probe_0", "probe_1"):
        np.testing.assert_array_equal(one.dataset[name], two.dataset[name])
    finished = call(*words)
    accuracies = [re.findall(r"accuracy: train \S+%, test \S+%", result.output) for result in (whole, finished)]
    assert accuracies[0] == accuracies[1] != []
    assert "0 steps in" in finished.stdout


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_record_without_a_checkpoint_is_not_overwritten_by_resuming(tmp_path: Path) -> None:
    call("run", "--epochs", "2", "--out", tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    assert_refused(call("run", "--epochs", "2", "--out", tmp_path, "--resume"), "no checkpoint to go on from")
    assert open_record(tmp_path / "record.zarr").steps[-1] == 90


def test_interrupted_while_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "save_all", interrupted)
    result = call("run", "--epochs", "1", "--batch-size", "500", "--out", tmp_path)
    assert result.exit_code == 130
    assert f"the record is complete; draw it with: noetherperf plot {tmp_path}/record.zarr" in result.stderr
    assert "all laws are closed" in result.stdout


def test_interrupted_figures_tell_which_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(name: str, *_: object, **__: object) -> tuple[list[Any], list[Path]]:
        if name == "noise":
            raise KeyboardInterrupt
        return [], [tmp_path / name]

    monkeypatch.setattr("noetherperf.figures.make", make)
    said, words = stopped(call("figures", "fields", "noise", "decay", "--quick", "--out", tmp_path))
    assert f"in 'noise'; those before it are in {str(tmp_path)!r}" in said
    assert words == ["figures", "noise", "decay", "--out", str(tmp_path), "--quick"]


def test_a_signal_to_end_is_an_interruption(tmp_path: Path) -> None:
    """As a batch system sends it: where the training was, a status, and a record that can be read."""
    code = "import sys; from noetherperf.cli import main; sys.argv[0] = 'noetherperf'; main()"
    words = ["run", "--epochs", "10000", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.search(r"^noetherperf: interrupted after step \d+ of 450,000; ", errors.splitlines()[-1])
    assert errors.rstrip().endswith(f"go on with: noetherperf run --resume {shlex.join(words[1:])}")
    assert "Traceback" not in errors
    assert len(open_record(tmp_path / "record.zarr").steps) > 9


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


@pytest.mark.parametrize(
    ("optimizer", "options", "expected"),
    [
        ("adamw", (), {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "decoupled": 1}),
        ("adam", ("--lr", "0.002", "--weight-decay", "0.1"), {"lr": 0.002, "weight_decay": 0.1, "decoupled": 0}),
        ("adamw", ("--betas", "0.8", "0.95"), {"beta1": 0.8, "beta2": 0.95}),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_another_optimizer(
    tmp_path: Path, optimizer: str, options: tuple[str, ...], expected: dict[str, float]
) -> None:
    short = ("--epochs", "1", "--batch-size", "500", "--every", "3", "--out", tmp_path)
    result = call("run", "--optimizer", optimizer, *options, *short)
    assert "assume that Adam divides all elements of a group by one number" in result.output
    assert ("the weight decay (0.1) is added to the gradient" in result.output) == (optimizer == "adam")
    record = open_record(tmp_path / "record.zarr")
    assert record.rule == "adam"
    last = record.hyperparameters.isel(step=-1, parameter_group=0)
    assert {name: float(last[name]) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--optimizer", "adamw", "--nesterov"), ("--nesterov: adamw has no nesterov", "--lr, --betas")),
        (("--optimizer", "adam", "--momentum", "0.9"), ("--momentum: adam has no momentum",)),
        (("--betas", "0.9", "0.99"), ("--betas: sgd has no betas", "--momentum")),
        (("--optimizer", "lion"), ("--optimizer: there is no 'lion'", "sgd, adam, adamw")),
        (("--optimizer", "adamw", "--preset", "paper"), ("--preset: the paper's experiment is trained with sgd",)),
        (("--optimizer", "adamw", "--betas", "0.9", "1.5"), ("--betas: both must be at least 0 and below 1", "1.5")),
    ],
)
def test_options_of_another_optimizer_are_refused(
    tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(call("run", *options, "--out", tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_a_training_that_went_wrong_is_told(tmp_path: Path) -> None:
    result = call("run", "--lr", "1e-7", "--epochs", "1", "--every", "45", "--out", tmp_path)
    assert_refused(result, "test accuracy is", "95%", status=1)
    assert list(tmp_path.glob("*.png"))  # and still drawn, for they may show why


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--lr", "-1"), "--lr: must be at least 0, got -1.0"),
        (("--lr", "nan"), "--lr: must be at least 0, got nan"),
        (("--momentum", "-0.1"), "--momentum: must be at least 0"),
        (("--weight-decay", "-1"), "--weight-decay: must be at least 0"),
        (("--nesterov", "--momentum", "0"), "--nesterov: needs a momentum above 0"),
        (("--backend", "abacus"), "error: --backend abacus is unknown; choose one of auto, "),
        (("--device", "toaster"), "--device: 'toaster'"),
        (("--dataset", "nope"), "--dataset: there is no 'nope'; there are: digits, synthetic, cifar10, tiny-imagenet"),
        (("--dataset", "cifar10"), "--dataset: the small network takes digits of 8×8 pixels only; add --model vgg16"),
        (("--width", "2"), "--width: the small network has one width; add --model vgg16-bn"),
        (("--workers", "2"), "--workers: the small network's images are in memory"),
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


def test_plot_draws_what_is_chosen(done: tuple[Path, Result], tmp_path: Path) -> None:
    record = done[0] / "record.zarr"
    options = ("--layer", "conv1", "--symmetry", "fc2", "--quantity", "effective_lr", "--groups", "0,3")
    result = call("plot", record, "--out", tmp_path, *options, "--format", "svg", "--format", "png", "--dpi", "40")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["effective_lr.png", "effective_lr.svg"]
    assert struct.unpack(">I", (tmp_path / "effective_lr.png").read_bytes()[16:20]) == (round(7.2 * 40),)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--symmetry", "conv11"), ("--symmetry: ", "'conv11'", "there are: conv1, ")),
        (("--layer", "conv9"), ("--layer: ", "'conv9'", "there are: conv1, ")),
        (("--quantity", "effective_rl"), ("--quantity: ", "did you mean 'effective_lr'")),
        (("--quantity", "sq_g"), ("--quantity: ", "record it with Recorder")),
        (("--format", "gif"), ("--format: ", "png, pdf, svg")),
        (("--groups", "0"), ("--groups: ", "at least 1")),
        (("--groups", "1,x"), ("--groups: ", "'1,x'")),
    ],
)
def test_plot_names_near_ones(
    done: tuple[Path, Result], tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_refused(call("plot", done[0] / "record.zarr", "--out", tmp_path / "new", *options), *words)
    assert not (tmp_path / "new").exists()


def test_plot_tells_what_is_not_drawn(tmp_path: Path) -> None:
    net = nn.Linear(3, 2)
    optimizer = nperf.SGD(
        net.named_parameters(), symmetries=[nperf.Translation("head", [nperf.Part("weight", axis=1)])]
    )
    nperf.Recorder(optimizer, tmp_path / "record").close()
    result = call("plot", tmp_path / "record", "--format", "svg")
    assert result.exit_code == 0, result.output
    assert [Path(line).name for line in result.stdout.splitlines()] == ["charges.svg"]
    assert "residuals is not drawn: no recorded error of a law is finite and above 0" in result.stderr
    assert "loss is not drawn: no 'loss' was recorded; to record it, recorder.log(loss=loss)" in result.stderr
    assert "parameters is not drawn: no 'parameters' was recorded" in result.stderr
    result = call("plot", tmp_path / "record", "--groups", "9,")
    assert_refused(result, "charge is not drawn: no symmetry has a group 9; the last index is 2")


def test_plot_of_a_balance(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    balance = nperf.Balance("0, 1", [nperf.Part("0.weight", 0)], [nperf.Part("1.weight", 1)])
    nperf.Recorder(nperf.SGD(net.named_parameters(), symmetries=[balance]), tmp_path / "record").close()
    result = call("plot", tmp_path / "record", "--symmetry", "0, 1", "--format", "svg")
    assert [Path(line).name for line in result.stdout.splitlines()] == ["eigenvalues.svg"], result.output
    assert_refused(
        call("plot", tmp_path / "record", "--quantity", "matrices", "--quantity", "charge"),
        "matrices is not drawn: no matrices were recorded; to record them, Recorder(..., matrices=True)",
        "charge is not drawn: the charges of a Balance are matrices",
    )
    assert_refused(
        call("plot", tmp_path / "record", "--groups", "99,"), "eigenvalues is not drawn: no Balance has the eigenvalues"
    )


def test_plot_writes_nothing_before_all_is_made(done: tuple[Path, Result], tmp_path: Path) -> None:
    record, new = done[0] / "record.zarr", tmp_path / "new"
    assert_refused(call("plot", record, "--out", new, "--quantity", "charge", "--quantity", "chrage"), "'chrage'")
    assert not new.exists()
    assert_refused(call("plot", record, "--out", record / "new"), "--out: ", "is inside the record", "beside it")
    assert not (record / "new").exists()


def test_plot_of_no_record_is_refused(tmp_path: Path) -> None:
    assert_refused(call("plot", tmp_path / "nothing"), "nothing")
    (tmp_path / "file").write_text("")
    assert_refused(call("plot", tmp_path / "file"), "file")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for module in ("digits", "main_job"):
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

def make_input():
    return model, x

def make_options():
    return model, {"input": x}
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
    assert "Q = |0.weight[i]|² + |0.bias[i]|² − |2.weight[:,i]|²" in result.stdout


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
    absent = made / "absent.json"
    assert_refused(
        call("check", "made:make", "--symmetries", absent), f"--symmetries: '{absent}' cannot be read: No such file"
    )
    (made / "no.json").write_text("[]")
    assert_refused(call("check", "made:make", "--symmetries", made / "no.json"), "--symmetries: ", "must be an object")


@pytest.mark.parametrize("target", ["made:make_two", "made:make_input", "made:make_options"])
def test_find_prints_the_laws(made: Path, target: str) -> None:
    result = call("find", target)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "symmetry kind conserved, for each group meaning"
    assert lines[1].startswith("0->2 rescale |0.weight[i]|² + |0.bias[i]|² − |2.weight[:,i]|² unit: ")
    assert [line.split()[:2] for line in lines[2:4]] == [["2", "translation"], ["2.bias", "translation"]]
    assert not [path for path in made.iterdir() if path.suffix == ".json"]


def test_find_writes_json_that_check_reads(made: Path) -> None:
    result = call("find", "made:make_two", "--explain", "--out", made / "new" / "laws.json")
    assert str(made / "new" / "laws.json") in result.stdout
    assert "Rescale “0->2”" in result.stdout
    found = nperf.Symmetries.from_json((made / "new" / "laws.json").read_text())
    assert [symmetry.name for symmetry in found] == ["0->2", "2", "2.bias"]
    assert found.meanings
    assert nperf.Symmetries.from_json(call("find", "made:make_two", "--json").stdout) == found
    checked = call("check", "made:make", "--symmetries", made / "new" / "laws.json")
    assert checked.exit_code == 0, checked.output
    assert "3 of 3 symmetries hold" in checked.stdout


def test_finds_options_reach_the_search(made: Path) -> None:
    found = json.loads(call("find", "made:make_two", "--loss", "mse", "--no-verify", "--json").stdout)
    assert [symmetry["name"] for symmetry in found["symmetries"]] == ["0->2"]
    assert found["defects"] == {}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["0<->1"]),
        (["--matrix", "no"], ["0->1"]),
        (["--matrix", "both"], ["0<->1", "0->1"]),
        (["--largest-matrix", "2"], ["0->1"]),
    ],
)
def test_find_claims_matrices_as_asked(made: Path, options: list[str], names: list[str]) -> None:
    (made / "pair.py").write_text(
        "from torch import nn, randn\n"
        "def make():\n    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), randn(4, 2)\n"
    )
    found = json.loads(call("find", "pair:make", "--loss", "mse", "--json", *options).stdout)
    assert [symmetry["name"] for symmetry in found["symmetries"]] == names
    assert bool(found["costs"]) == ("0<->1" in names)


def test_find_tells_what_is_in_no_law(made: Path) -> None:
    (made / "tanh.py").write_text(
        "from torch import nn, ones\n"
        "def make():\n    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), ones(4, 2)\n"
    )
    result = call("find", "tanh:make")
    assert "in no symmetry:" in result.stdout
    assert any(line.startswith("  0.weight: ") for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("made:model", ("made:model must return (model, input, …) or (model, closure), got (Sequential)",)),
        ("made:make_nothing", ("got (NoneType)",)),
        ("nowhere:make", ("no module 'nowhere'",)),
    ],
)
def test_a_target_that_find_cannot_use_is_refused(made: Path, target: str, words: tuple[str, ...]) -> None:
    assert_refused(call("find", target), *words)


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
    text = " ".join(result.stdout.split())  # long reasons are wrapped
    for name, state in backends().items():
        assert f"backend {name} {state}" in text


def test_info_estimates_the_size_of_a_record(tmp_path: Path) -> None:
    told = call("info", "--groups", "505", "--steps", "10000").stdout.split()
    assert " ".join(told) == "groups 505 estimate 121 MB for 10,000 steps, every 1: 10,001 rows " + (
        "without Balances: a row has 2n + 3 float64 for each block of n units, and 2n² with matrices"
    )
    weight = torch.nn.Parameter(torch.ones(40, 3))
    optimizer = nperf.SGD([("w", weight)], lr=0.1, symmetries=[nperf.Norm("w", [nperf.Part("w", 0)])])
    with nperf.Recorder(optimizer, tmp_path / "a.zarr", every=2):
        for _ in range(40):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
    found = json.loads(call("info", tmp_path / "a.zarr", "--steps", "80", "--every", "1", "--json").stdout)
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "a.zarr").rglob("*") if file.is_file())
    estimate = found.pop("estimate")
    assert found == {"groups": 40, "balances": {}, "rows": 21, "every": 2, "bytes": n_bytes}
    assert (estimate["steps"], estimate["every"]) == (80, 1)
    same = json.loads(call("info", tmp_path / "a.zarr", "--json").stdout)
    assert same["estimate"] == {"steps": 40, "every": 2, "bytes": n_bytes}
    assert "21, every 2 steps" in call("info", tmp_path / "a.zarr").stdout
    for arguments in (["--every", "2"], [tmp_path / "a.zarr", "--groups", "3"], [tmp_path]):
        assert_refused(call("info", *arguments))


def test_info_of_a_short_record_estimates_a_long_one(tmp_path: Path) -> None:
    """Metadata do not grow with the rows; matrices do."""

    def size(n_steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
        balance = nperf.Balance("pair", [Part("0.weight", 0), Part("0.bias", 0)], [Part("1.weight", 1)])
        optimizer = nperf.SGD(net.named_parameters(), lr=0.01, symmetries=[balance])
        with nperf.Recorder(optimizer, tmp_path / f"{n_steps}", matrices=True):
            for _ in range(n_steps):
                optimizer.zero_grad()
                net(torch.randn(4, 6)).square().mean().backward()
                optimizer.step()
        found: dict[str, Any] = json.loads(call("info", tmp_path / f"{n_steps}", "--steps", "200", "--json").stdout)
        return found

    short, long = size(4), size(200)
    assert 0.7 < short["estimate"]["bytes"] / long["bytes"] < 1.4
    assert short["bytes"] / 5 * 201 > 5 * long["bytes"]  # what it would be if metadata grew, too
    assert long["balances"] == {"pair": [1, 8]}
    told = " ".join(call("info", tmp_path / "4").stdout.split())
    assert told.startswith("Balance pair 1 × [8, 8] rows 5")


def test_info_as_json_says_the_same() -> None:
    found = json.loads(call("info", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert {name: reason or "available" for name, reason in found["backends"].items()} == backends()
    assert (found["used"] in found["instructions"]) == (backends()["cpu"] == "available")


def test_the_version() -> None:
    assert call("--version").stdout == f"noetherperf {nperf.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", "check figures find info plot run view"),
        ("run --optimizer a", "adam adamw"),
        ("run --model ", "resnet18 small vgg16 vgg16-bn"),
        ("run --dataset ", "cifar10 digits synthetic tiny-imagenet"),
        ("run --backend c", "cpu cuda"),
        ("find made:make --loss ", "cross_entropy mse none"),
        ("info --j", "--json"),
    ],
)
def test_a_shell_completes(typed: str, offered: str) -> None:
    words = f"noetherperf {typed}"
    environment = {
        "_NOETHERPERF_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = CliRunner(env=environment).invoke(cli.app, prog_name="noetherperf")
    assert sorted(result.stdout.split()) == offered.split()


def test_what_completes_is_what_there_is() -> None:
    from noetherperf.cli import run
    from noetherperf.recipes import datasets, experiment

    assert {*run.DATASETS} == {*datasets.DATASETS}
    assert {*run.MODELS} == {"small", *experiment.MODELS}
    assert {*run.BACKENDS} == {"auto", *backends()}


@pytest.mark.skipif(backends()["cpu"] != "available", reason="the compiled engine is not here")
def test_info_tells_the_instruction_sets_and_which_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from noetherperf import _cpu

    for used in _cpu.isas():
        monkeypatch.setenv("NOETHERPERF_ISA", used)
        lines = [line for line in call("info").stdout.splitlines() if line.startswith("instructions ")]
        assert [line.split()[1] for line in lines] == _cpu.isas()
        assert all("passes its self-check" in line for line in lines)
        assert [line.split()[1] for line in lines if ", used " in line] == [used]


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "noetherperf", "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "plot", "check", "info"):
        assert f" {command} " in shown.stdout
