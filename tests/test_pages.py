"""The pages and README print what they say; links lead somewhere; docs/optimizers.md names every optimizer of torch,
the reference every public name and command, and the site's menu every page."""

import ast
import io
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from test_tutorial import assert_prints, blocks

from noetherperf.optim.known import TABLE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "noetherperf"
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE)

README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWERS = README.partition("## Five questions")[2].partition("\n## ")[0]
EXAMPLE = ROOT / "examples" / "questions.py"

# Where each public module's names are listed
MODULES = {
    "noetherperf": PACKAGE / "__init__.py",
    "noetherperf.control": PACKAGE / "optim" / "control.py",
    "noetherperf.distributed": PACKAGE / "optim" / "distributed.py",
    "noetherperf.plots": PACKAGE / "plots" / "__init__.py",
    "noetherperf.theory": PACKAGE / "theory" / "__init__.py",
    "noetherperf.integrations": PACKAGE / "integrations" / "__init__.py",
    **{
        f"noetherperf.integrations.{library}": PACKAGE / "integrations" / f"{library}.py"
        for library in ("lightning", "tensorboard", "transformers")
    },
}


def listed(file: Path) -> Iterator[str]:
    """The names in a file's `__all__`; read, not imported, for its libraries need not be installed."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            yield from ast.literal_eval(node.value)


PUBLIC = sorted({f"{module}.{name}" for module, file in MODULES.items() for name in listed(file)} - {*MODULES})


@pytest.mark.parametrize("page", ["optimizers.md", "reading.md", "recording.md"])
def test_a_page_runs_and_prints_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for block in blocks((ROOT / "docs" / page).read_text(encoding="utf-8")):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, f"docs/{page}", "exec"), names)
        assert_prints(printed.getvalue(), block.printed)


def test_the_page_names_every_optimizer_that_is_known() -> None:
    told = {name for row in ROWS for name in re.findall(r"[A-Z]\w+", row)}
    assert {kind.__name__ for kind in TABLE} <= told


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_the_reference_has_every_public_name() -> None:
    assert len(PUBLIC) > 50
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md")]
    shown = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)]
    assert len(shown) == len({*shown})
    assert {*PUBLIC} - {*shown} == set()


def test_the_reference_has_the_command_line_as_it_is(tmp_path: Path) -> None:
    page = ROOT / "docs" / "reference" / "command-line.md"
    command = [sys.executable, "-m", "typer", "noetherperf.cli", "utils", "docs", "--name", "noetherperf"]
    subprocess.run([*command, "--title", "Command line", "--output", tmp_path / page.name], check=True)
    assert (tmp_path / page.name).read_text() == page.read_text(), "`make docs` writes the page again"


def test_the_menu_has_every_page() -> None:
    """One that it leaves out is built, and nobody comes to it."""

    def pages_of(entry: object) -> Iterator[str]:
        match entry:
            case str():
                yield entry
            case list() | dict():
                for inner in entry.values() if isinstance(entry, dict) else entry:
                    yield from pages_of(inner)

    menu = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    docs = ROOT / "docs"
    assert sorted(pages_of(menu)) == sorted(page.relative_to(docs).as_posix() for page in docs.rglob("*.md"))


def test_the_example_has_the_questions_of_the_first_page_and_their_blocks() -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    questions = re.findall(r"^\*\*(.*\?)\*\*", ANSWERS, re.MULTILINE)
    assert len(questions) == 5
    assert questions == re.findall(r'^print\("(.*\?)"\)$', source, re.MULTILINE)
    found = list(blocks(ANSWERS))
    assert len(found) == len(questions)
    for block in found:
        assert block.code in source
        assert block.printed
        assert len(block.code.splitlines()) <= 6


@pytest.mark.slow
def test_the_example_prints_what_the_first_page_says(tmp_path: Path) -> None:
    """Word for word; training is chaotic, so another processor prints other numbers, and pads them otherwise."""

    def words(text: str) -> list[str]:
        lines = (re.sub(r"[\d.]+(?:e[+-]\d+)?|─+", "#", line).split() for line in text.splitlines())
        return [" ".join(line) for line in lines]

    done = subprocess.run([sys.executable, EXAMPLE], cwd=tmp_path, capture_output=True, text=True, check=True)
    answers = re.split(r"^.*\?\n", done.stdout, flags=re.MULTILINE)[1:]
    assert [words(answer) for answer in answers] == [words(block.printed) for block in blocks(ANSWERS)]
