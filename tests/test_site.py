"""The documentation site: it builds without a warning, has a page for every public name, and answers questions.

`make docs` runs this file, and leaves the site in build/site.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_pages import PUBLIC

pytest.importorskip("zensical", reason="the extra [docs] is not installed; `make docs` installs it")

# What a user may ask: the sections that answer, and words that a user may type into the search
QUESTIONS = [
    ({"questions.html#how-do-i-install-it-and-on-what-does-it-run"}, ["install", "python compiler", "on what run"]),
    (
        {"optimizers.html", "questions.html#which-optimizers-can-be-measured"},
        ["which optimizer", "optimizers measured", "lion adafactor"],
    ),
    (
        {"reading.html#a-residual-is-large-what-do-i-do"},
        ["residual large", "what do I do residual", "how big residual"],
    ),
    (
        {"questions.html#how-long-does-the-search-for-symmetries-take", "symmetries.html#time-and-memory"},
        ["how long search", "search too slow", "search seconds"],
    ),
    (
        {"recording.html#how-big-is-a-record-and-which-every"},
        ["how big record every", "record size disk", "how often record"],
    ),
    ({"recording.html#how-do-i-record-the-loss"}, ["record loss", "log loss step", "loss accuracy record"]),
    ({"recording.html#how-do-i-compare-two-runs"}, ["compare runs", "subtract one run", "runs learning rates time"]),
    (
        {"recording.html#notebooks", "questions.html#does-it-work-in-notebooks"},
        ["notebooks", "jupyter", "run cell again"],
    ),
    (
        {"questions.html#how-many-threads-does-it-use-and-is-it-safe-with-threads-of-mine"},
        ["threads", "thread safe", "set_num_threads"],
    ),
    ({"questions.html#how-do-i-cite-it"}, ["cite", "citation", "bibtex paper"]),
    (
        {"questions.html#how-much-slower-does-it-make-my-model"},
        ["how much slower model", "overhead", "slower training"],
    ),
    ({"questions.html#what-should-i-log"}, ["what log", "scalars wandb", "logger scalar rounding"]),
]

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


def search(sections: list[dict[str, Any]], words: str, answers: set[str]) -> list[str]:
    """The sections that have all the words, or words that begin so: in their titles if an answer is among these."""

    def found(text_of: Callable[[dict[str, Any]], str]) -> list[str]:
        texts = {section["location"]: text_of(section) for section in sections}
        return [
            location
            for location, text in texts.items()
            if all(re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE) for word in words.split())
        ]

    in_titles = found(lambda section: section["title"])
    if answers & {*in_titles}:
        return in_titles
    return found(lambda section: f"{section['title']} {re.sub('<[^>]*>', ' ', section['text'])}")


@pytest.mark.parametrize(
    ("words", "answers"), [(words, answers) for answers, wordings in QUESTIONS for words in wordings]
)
def test_a_search_for_a_questions_words_finds_the_answer(
    sections: list[dict[str, Any]], words: str, answers: set[str]
) -> None:
    found = search(sections, words, answers)
    assert answers & {*found}
    assert len(found) <= 6
