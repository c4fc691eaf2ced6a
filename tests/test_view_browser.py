"""The page in a real browser: no error in the console, clicks change it, a growing record is followed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from viewed import HOSTILE, Training

from bench.browser import MISSING, Browser, open_browser
from noetherperf.view import Answers, PageServer, export

pytest.importorskip("plotly", reason="the extra [view] is not installed")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """The module's browser, whose console must have stayed empty."""
    yield window
    assert window.errors() == []


@contextmanager
def served(browser: Browser, answers: Answers) -> Iterator[PageServer]:
    """A server for as long as the context lasts, at whose end the browser leaves its page."""
    with PageServer(answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
            browser.driver.get("about:blank")  # else its next question would fail, and say so in the console
        finally:
            server.shutdown()
            thread.join()


def curve(browser: Browser, name: str = "measured") -> list[float]:
    """What a curve of the unit's picture shows."""
    found: list[float] = browser.run(
        "(document.querySelector('#curves').data ?? []).find((trace) => trace.name === arguments[0])?.y", name
    )
    return found


def assert_everything_is_there(browser: Browser) -> None:
    """Three layers, their loss, units, curves, budget, table and settings."""
    assert browser.run("document.querySelector('#layers .picture').data[0].z.length") == 3
    assert browser.run("document.querySelector('#units .picture').data[0].z.length") == 8
    assert browser.run("document.querySelector('#loss').data[0].y.slice(1).every(Number.isFinite)")
    drawn = browser.run("document.querySelector('#curves').data.map((trace) => trace.name)")
    assert drawn[:3] == ["measured", "discrete law", "flow law"]
    assert browser.run("document.querySelector('#budget .picture').data.length") == 9
    assert browser.run("document.querySelectorAll('#table tbody tr').length") == 3
    assert "verdict" in browser.text("#table thead")
    assert "weight_decay" in browser.text("#settings")


def assert_clicks_change_it(browser: Browser) -> None:
    """A layer, a unit, a quantity."""
    first = curve(browser)
    browser.click("#units .picture .nsewdrag", down=0.93)
    browser.wait("document.querySelector('#unit').value === '7'")
    second = curve(browser)
    assert second != first
    browser.click("#layers .picture .nsewdrag", down=0.5)
    browser.wait("document.querySelector('#symmetry').value === 'head'")
    assert browser.run("document.querySelector('#unit').value") == "0"
    assert curve(browser) not in (first, second)
    titles = browser.run("document.querySelector('#layers .picture').data[0].zmax")
    browser.choose("#quantity", "rounding")
    browser.wait(f"document.querySelector('#layers .picture').data[0].zmax !== {titles}")
    browser.click("#table tbody tr:first-child td")
    browser.wait("document.querySelector('#table tbody tr:first-child').classList.contains('chosen')")


def assert_hostile_names_are_text(browser: Browser) -> None:
    browser.choose("#symmetry", HOSTILE)
    browser.wait("document.querySelector('#symmetry').value === arguments[0]".replace("arguments[0]", f"'{HOSTILE}'"))
    assert browser.run("document.querySelectorAll('img').length") == 0
    assert HOSTILE in browser.text("#table")
    drawn = browser.run("document.querySelector('#curves').data.map((trace) => trace.name)")
    assert drawn == ["measured", "rounding"], "a norm's law is open, and predicts nothing"
    ticks = browser.run("[...document.querySelectorAll('#layers .ytick text')].map((tick) => tick.textContent)")
    assert ticks[2] == HOSTILE


def loaded(browser: Browser) -> set[str]:
    """Where everything that the page loaded came from."""
    return set(browser.run("performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)"))


def test_the_page_draws_and_clicks_change_it(browser: Browser, tmp_path: Path) -> None:
    with served(browser, Answers([Training(tmp_path / "a.zarr").step(5).path])) as server:
        browser.open(server.url)
        assert_everything_is_there(browser)
        assert_clicks_change_it(browser)
        assert_hostile_names_are_text(browser)
        assert loaded(browser) == {server.url.rstrip("/")}


def test_a_growing_record_is_followed_without_loading_the_page_again(browser: Browser, tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(3)
    with served(browser, Answers([training.path])) as server:
        browser.open(server.url)
        browser.run("(window.before = true)")
        assert len(curve(browser)) == 4
        browser.choose("#unit", "3")
        training.step(6)
        browser.wait("document.querySelector('#curves').data[0].y.length === 10")
        assert "10 rows, to step 9" in browser.text("#runs")
        assert browser.run("document.querySelector('#unit').value") == "3"
        assert browser.run("window.before")


def test_two_runs_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    runs = [Training(tmp_path / "slow.zarr").step(3), Training(tmp_path / "fast.zarr", lr=0.2).step(4)]
    with served(browser, Answers([run.path for run in runs])) as server:
        browser.open(server.url)
        assert browser.run("[...document.querySelectorAll('#layers h3')].map((x) => x.textContent)") == [
            "slow.zarr",
            "fast.zarr",
        ]
        assert {len(curve(browser, f"{run}: measured")) for run in ("slow.zarr", "fast.zarr")} == {4, 5}
        differing = browser.run("[...document.querySelectorAll('tr.differs')].map((row) => row.cells[0].textContent)")
        assert differing == ["lr", "last step"]


def test_one_file_does_the_same_without_a_server(browser: Browser, tmp_path: Path) -> None:
    export([Training(tmp_path / "a.zarr").step(5).path], tmp_path / "page.html")
    browser.open((tmp_path / "page.html").as_uri())
    assert_everything_is_there(browser)
    assert_clicks_change_it(browser)
    assert_hostile_names_are_text(browser)
    assert loaded(browser) == set()
    assert browser.text("#status") == "saved in one file"


def test_a_page_whose_server_ends_says_so(window: Browser, tmp_path: Path) -> None:
    with PageServer(Answers([Training(tmp_path / "a.zarr").step(2).path])) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        window.open(server.url)
        server.shutdown()
        thread.join()
    window.wait("document.querySelector('#status').textContent.startsWith('the server has stopped')")
    window.driver.get("about:blank")
    assert all("Failed to load resource" in message for message in window.errors())


def test_what_is_not_recorded_is_said(browser: Browser, tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr", series=["charge", "angular_update"]).step(3)
    with served(browser, Answers([training.path])) as server:
        browser.open(server.url)
        assert "the record has no series" in browser.text("#budget")
        assert "the record has no series" in browser.text("#table")
        assert len(curve(browser)) == 4
        browser.choose("#quantity", "effective_lr")
        browser.wait("document.querySelector('#layers .note')")
        assert "has no series effective_lr" in browser.text("#layers")
        browser.choose("#quantity", "charge")
        browser.wait("document.querySelector('#layers .picture').data?.[0].z.length === 3")
