"""The documentation site: it builds without a warning, has a page for every public name, and answers questions.

`make docs` runs this file, and leaves the site in build/site.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pages import PUBLIC

pytest.importorskip("zensical", reason="the extra [docs] is not installed; `make docs` installs it")

# What a user may ask, in words that a search gets, and the section that answers
QUESTIONS = {
    "install": "questions.html#how-do-i-install-it-and-on-what-does-it-run",
    "which optimizer": "optimizers.html",
    "residual large": "reading.html#a-residual-is-large-what-do-i-do",
    "how long search": "questions.html#how-long-does-the-search-for-symmetries-take",
    "how big record every": "recording.html#how-big-is-a-record-and-which-every",
    "record loss": "recording.html#how-do-i-record-the-loss",
    "compare runs": "recording.html#how-do-i-compare-two-runs",
    "notebooks": "recording.html#notebooks",
    "threads": "questions.html#how-many-threads-does-it-use-and-is-it-safe-with-threads-of-mine",
    "cite": "questions.html#how-do-i-cite-it",
    "how much slower model": "questions.html#how-much-slower-does-it-make-my-model",
    "what log": "questions.html#what-should-i-log",
}

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"


@pytest.fixture(scope="module")
def said() -> str:
    """What the generator says while it builds the site."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sections(said: str) -> list[dict[str, Any]]:
    """What the site's search looks through: each section's location, title and text."""
    found: list[dict[str, Any]] = json.loads((SITE / "search.json").read_text(encoding="utf-8"))["items"]
    return found


def test_nothing_warns(said: str) -> None:
    """The generator counts its own warnings alone; those of docstrings are only printed."""
    assert re.fullmatch(r"\s*Build started\s*Build finished in [\d.]+m?s\s*No issues found\s*", said), said


def test_the_site_loads_nothing_from_elsewhere(said: str) -> None:
    pages = sorted(SITE.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]*)", page.read_text())
        assert not loaded, page


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_place(said: str, name: str) -> None:
    inventory = (SITE / "objects.inv").read_bytes()
    assert inventory
    places = [page for page in (SITE / "reference").glob("*.html") if f'id="{name}"' in page.read_text()]
    assert len(places) == 1


@pytest.mark.parametrize("words", QUESTIONS)
def test_a_search_for_a_questions_words_finds_the_answer(sections: list[dict[str, Any]], words: str) -> None:
    """Among the few sections whose title or text has all the words, or words that begin so."""

    def has(section: dict[str, Any], word: str) -> bool:
        text = f"{section['title']} {re.sub('<[^>]*>', ' ', section['text'])}"
        return re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE) is not None

    in_titles = [x for x in sections if all(has({**x, "text": ""}, word) for word in words.split())]
    found = in_titles or [x for x in sections if all(has(x, word) for word in words.split())]
    assert QUESTIONS[words] in [section["location"] for section in found]
    assert len(found) <= 6
