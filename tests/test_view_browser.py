"""The page in a real browser: no error in the console, clicks change it, a growing record is followed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from viewed import HOSTILE, Training, attention

import noetherperf as nperf
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


def assert_spectra_and_matrices(browser: Browser) -> None:
    """A Balance among the layers; its eigenvalues with the law over them, and its matrices at two steps."""
    assert browser.run("document.querySelector('#layers .picture').data[0].y") == ["rows", "q, k"]
    browser.click("#layers .picture .nsewdrag", down=0.8)
    browser.wait("document.querySelector('#symmetry').value === 'q, k'")
    assert "balance, 2 blocks of 4 units" in browser.text("#symmetry-meaning")
    assert browser.run("document.querySelector('#units .picture').data[0].z.length") == 8
    browser.click("#units .picture .nsewdrag", down=0.9)
    browser.wait("document.querySelector('#unit').value === '1'")
    drawn = browser.run("document.querySelector('#curves').data.map((trace) => [trace.name, trace.x.length])")
    assert drawn == [["measured", 32], ["discrete law", 32], ["discrete law", 8], ["rounding", 8]]
    titles = "document.querySelector('#budget .picture').data.map((trace) => trace.hovertemplate.split('<br>')[0])"
    assert browser.run(titles) == ["charge", "law", "residual"]
    entries = "document.querySelector('#budget .picture').data[0].z.flat()"
    last = browser.run(entries)
    assert len(last) == 16
    assert browser.text("#row-step") == "6"
    browser.choose("#row", "0")
    browser.wait("document.querySelector('#row-step').textContent === '0'")
    assert browser.run(entries) != last
    assert "balance" in browser.text("#table")
    browser.choose("#symmetry", "rows")
    browser.wait("document.querySelector('#budget-title').textContent === 'Budget'")
    assert browser.run("document.querySelector('#row-field').hidden")
    assert browser.run("document.querySelector('#budget .picture').data.length") == 9


def test_a_balance_is_shown_with_spectra_and_matrices(browser: Browser, tmp_path: Path) -> None:
    with served(browser, Answers([attention(tmp_path / "a.zarr")])) as server:
        browser.open(server.url)
        assert_spectra_and_matrices(browser)


def test_one_file_has_matrices_too(browser: Browser, tmp_path: Path) -> None:
    export([attention(tmp_path / "a.zarr")], tmp_path / "page.html")
    browser.open((tmp_path / "page.html").as_uri())
    assert_spectra_and_matrices(browser)


def test_matrices_that_are_not_recorded_are_asked_for(browser: Browser, tmp_path: Path) -> None:
    with served(browser, Answers([attention(tmp_path / "a.zarr", matrices=False)])) as server:
        browser.open(server.url)
        browser.choose("#symmetry", "q, k")
        browser.wait("document.querySelector('#budget .note')")
        assert "Recorder(..., matrices=True) records them" in browser.text("#budget")
        assert len(browser.run("document.querySelector('#curves').data")) == 4


def test_zooming_shows_what_lies_between(browser: Browser, tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(60)
    with served(browser, Answers([training.path], most_rows=16)) as server:
        browser.open(server.url)
        assert len(curve(browser)) == 16
        browser.run("void Plotly.relayout('curves', {'xaxis.range[0]': 17.3, 'xaxis.range[1]': 22.8})")
        browser.wait("document.querySelector('#curves').data[0].x.length === 7")
        steps = "document.querySelector(arguments[0]).data[0].x"
        for picture in ("#curves", "#layers .picture", "#units .picture", "#budget .picture"):
            assert browser.run(steps, picture) == list(range(17, 24)), picture
        assert browser.run("document.querySelector('#layers .picture').layout.xaxis.range") == [17, 23]
        browser.choose("#unit", "5")
        browser.wait("document.querySelector('#curves').data[0].x.length === 7")
        browser.run("void Plotly.relayout(document.querySelector('#layers .picture'), {'xaxis.autorange': true})")
        browser.wait("document.querySelector('#curves').data[0].x.length === 16")


def test_a_unit_that_is_typed_wrongly_is_the_nearest(browser: Browser, tmp_path: Path) -> None:
    with served(browser, Answers([Training(tmp_path / "a.zarr").step(2).path])) as server:
        browser.open(server.url)
        for typed, taken in (("1.6", "2"), ("99", "7"), ("-3", "0"), ("", "0"), ("6", "6")):
            browser.choose("#unit", typed)
            browser.wait(f"document.querySelector('#unit').value === '{taken}'")
            assert len(curve(browser)) == 3
            assert browser.text("#faults") == ""


def test_names_that_look_alike_are_two(browser: Browser, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    names = ["a\nb", r"a\nb", "x" * 300, "ü→\u202e'\"&amp;"]
    parts = [nperf.Norm(name, [nperf.Part("w", axis=i % 2)]) for i, name in enumerate(names)]
    with nperf.Recorder(nperf.SGD([("w", weight)], lr=0.1, symmetries=parts), tmp_path / "a.zarr"):
        pass
    with served(browser, Answers([tmp_path / "a.zarr"])) as server:
        browser.open(server.url)
        assert browser.run("document.querySelector('#layers .picture').data[0].z.length") == 4
        for name, units in zip(names, (4, 3, 4, 3), strict=True):
            browser.run("(choose({symmetry: arguments[0], unit: 0}), 0)", name)
            browser.wait("true")
            assert browser.run("document.querySelector('#symmetry').value") == name
            assert f"norm, {units} units" in browser.text("#symmetry-meaning")
        assert browser.run("document.querySelectorAll('#table tr.chosen').length") == 1


def test_budgets_of_two_runs_have_one_scale(browser: Browser, tmp_path: Path) -> None:
    runs = [Training(tmp_path / "slow.zarr").step(3), Training(tmp_path / "fast.zarr", lr=0.5).step(3)]
    with served(browser, Answers([run.path for run in runs])) as server:
        browser.open(server.url)
        ranges = browser.run("[...document.querySelectorAll('#budget .picture')].map((x) => x.layout.yaxis.range)")
        assert ranges[0] == ranges[1]
        assert browser.run("""[...document.querySelectorAll('#budget .picture')].every(({data, layout}) =>
            data.at(-1).y.every((y) => y >= layout.yaxis.range[0] && y <= layout.yaxis.range[1]))""")
