"""The tutorial: its blocks run one after the other as they stand, and print what the page says they print."""

import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest
import torch
from test_datasets import make_tiny_imagenet
from typer.testing import CliRunner

from noetherperf import cli

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")
ROUNDING = 1e-9  # smaller numbers are what rounding left, and that differs from machine to machine


@dataclass(frozen=True)
class Block:
    """A Python block of the page, the line it begins in, and what the page says it prints."""

    line: int
    code: str
    printed: str


def blocks(page: str) -> Iterator[Block]:
    for found in re.finditer(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", page, re.DOTALL | re.MULTILINE):
        yield Block(page.count("\n", 0, found.start()) + 2, found[1], found[2] or "")


def commands(page: str) -> list[list[str]]:
    """The page's calls of the command line, without their first word."""
    return [line.split()[1:] for line in re.findall(r"^ {4}(noetherperf .*)$", page, re.MULTILINE)]


def assert_prints(found: str, told: str) -> None:
    """Word for word; numbers within 5 %, or below ROUNDING both."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", told)
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(told), strict=True):
        small = abs(float(one)) < ROUNDING and abs(float(other)) < ROUNDING
        assert small or float(one) == pytest.approx(float(other), rel=0.05), (one, other)


@pytest.mark.slow
def test_every_block_runs_and_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        printed = StringIO()
        padding = "\n" * (block.line - 1)  # so that a traceback tells the page's line
        with redirect_stdout(printed):
            exec(compile(padding + block.code, "docs/tutorial.md", "exec"), names)
        assert_prints(printed.getvalue(), block.printed)
    assert (tmp_path / "runs" / "tutorial" / "oscillation.pdf").stat().st_size > 10_000
    assert (tmp_path / "runs" / "tutorial" / "charges.png").exists()


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small folder in the data's true layout, and made shorter by options that come last."""
    monkeypatch.chdir(tmp_path)
    make_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    shorter = {"run": ["--width", "0.02", "--epochs", "1"], "figures": ["--quick"], "plot": []}
    run = commands(PAGE)
    assert [command[0] for command in run] == ["run", "plot", "figures"]
    for command in run:
        result = CliRunner().invoke(cli.app, [*command, *shorter[command[0]]])
        assert result.exit_code == 0, result.output


def test_the_page_shows_its_output() -> None:
    found = list(blocks(PAGE))
    assert len(found) == PAGE.count("```python") > 8
    for block in found:
        assert bool(block.printed) == ("print(" in block.code), block.line
    assert (Path(__file__).parents[1] / "docs" / "images" / "tutorial.png").exists()


@pytest.mark.parametrize(
    ("found", "told"), [("a 1.0\n", "b 1.0\n"), ("1.0 2", "1.0"), ("x 1.10", "x 1.00"), ("2e-9", "1e-14")]
)
def test_what_differs_is_noticed(found: str, told: str) -> None:
    with pytest.raises(AssertionError):
        assert_prints(found, told)


def test_what_rounding_makes_is_not_compared() -> None:
    assert_prints("error 3.1e-15, period 278.1", "error 7e-14, period 278.2")
