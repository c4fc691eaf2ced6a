"""Progress: a bar on a terminal, lines elsewhere, and nothing where none is wanted."""

import io
import sys

import pytest

from noetherperf.common.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_from_time_to_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 2000, "step") as report:
        for step in range(2001):
            clock[0] = step * 0.04  # 80 s in all
            report(step, f"loss {2000 - step}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0] == "training: step 250 of 2,000, 12%, 0:01:10 left; loss 1750"
    assert lines[-1] == "training: step 2,000 of 2,000, 100%, 0:00:00 left; loss 0"


def test_a_long_training_does_not_fill_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 100_000, "step") as report:
        for step in range(0, 100_001, 100):
            clock[0] = step * 1.0
            report(step)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100
    assert lines[0] == "training: step 1,000 of 100,000, 1%, 1 day, 3:30:00 left"


def test_what_began_in_the_middle_is_timed_from_there(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 100, "step") as report:
        report(80)
        clock[0] = 20.0
        report(90)
        report(100)
        report(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["training: step 90 of 100, 90%, 0:00:20 left", "training: step 100 of 100, 100%, 0:00:00 left"]


def test_a_share_has_no_unit(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("finding symmetries", 1.0) as report:
        report(0.0)
        clock[0] = 30.0
        report(0.25)
    assert capsys.readouterr().err == "finding symmetries: 25%, 0:01:30 left\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    with progress("training", 40, "step") as report:
        report(40, "loss 0.5")
    assert "\r" in screen.getvalue() or "\x1b" in screen.getvalue()
    for words in ("training", "100%", "loss 0.5"):
        assert words in screen.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_shown_where_nothing_is_wanted(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    screen = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("training", 2, "step", shown=False) as report:
        clock[0] = 60.0
        report(1)
        report(2, "done")
    assert screen.getvalue() == ""
