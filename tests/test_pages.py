"""The pages: docs/optimizers.md prints what it says and names every optimizer of torch; links lead somewhere."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from test_tutorial import assert_prints, blocks

from noetherperf.optim.known import TABLE

PAGE = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*?) \|", PAGE, re.MULTILINE)


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


@pytest.mark.parametrize("page", sorted(Path(__file__).parents[1].glob("docs/*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
