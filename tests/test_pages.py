"""The pages: docs/optimizers.md prints what it says and names every optimizer of torch; links lead somewhere; the
reference has every public name, and the site's menu every page."""

import ast
import io
import re
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


def test_the_page_runs_and_prints_what_it_says() -> None:
    torch.set_num_threads(1)
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, "docs/optimizers.md", "exec"), names)
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
