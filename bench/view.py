"""How quick the page of `noetherperf view` is, in a headless Chromium; and the pictures of docs/view.md.

Two records: the demo's (`make demo`) and one of 5,000 units and 2,000 rows, made here. Times are of the browser: the
first picture since the address was opened, and clicks until everything that they change is drawn; the median of some
repeats, each with a new server. In brackets: CPU time of the page's own thread.

python -m bench.view [--rows 2000] [--units 5000] [--demo runs/demo/record.zarr]
python -m bench.view --pictures docs/images/view [--demo runs/demo/record.zarr]
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import noetherperf as nperf
from bench.browser import Browser, open_browser
from bench.markdown import seconds, size, table
from noetherperf.figures import balance
from noetherperf.recipes import digits
from noetherperf.view import Answers, PageServer, export


def make_record(path: Path, n_units: int, n_rows: int, n_layers: int = 20) -> Path:
    """A record of layers of equal width, which take steps by random gradients."""
    torch.manual_seed(0)
    width = n_units // n_layers
    layers = [(f"layers.{i}.weight", nn.Parameter(torch.randn(width, 4))) for i in range(n_layers)]
    symmetries = [nperf.Norm(f"layers.{i}", [nperf.Part(name, axis=0)]) for i, (name, _) in enumerate(layers)]
    optimizer = nperf.SGD(layers, lr=0.01, momentum=0.9, weight_decay=1e-3, symmetries=symmetries)
    with nperf.Recorder(optimizer, path, exists="overwrite"):
        for _ in range(n_rows - 1):
            for _, parameter in layers:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    return path


def make_heads(path: Path, n_steps: int = 400) -> Path:
    """A record of the attention heads of a small reader of digits, with matrices."""
    torch.manual_seed(0)
    model, data = balance.Reader(), digits.load()
    norm = nperf.Norm("norm of queries", [nperf.Part("q.weight", axis=0)])
    optimizer = nperf.SGD(
        model.named_parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3, symmetries=[*balance.heads(), norm]
    )
    with nperf.Recorder(optimizer, path, exists="overwrite", matrices=True) as recorder:
        for _ in range(n_steps):
            rows = torch.randint(len(data.train_labels), (32,))
            loss = nn.functional.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
    return path


@contextmanager
def served(*records: Path) -> Iterator[str]:
    """The page's address, as `noetherperf view` serves it."""
    with PageServer(Answers(records)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


class Time(NamedTuple):
    """Seconds of the clock, and of the page's own thread on a processor."""

    wall: float
    cpu: float


def timed(browser: Browser, action: Callable[[], None]) -> Time:
    """The time from an action to the end of all drawing that it causes."""
    before, cpu = int(browser.run("document.documentElement.dataset.drawn")), browser.cpu_seconds()
    start = time.perf_counter()
    action()
    browser.wait(f"document.documentElement.dataset.drawn > {before}")
    return Time(time.perf_counter() - start, browser.cpu_seconds() - cpu)


def first_picture(browser: Browser, url: str) -> Time:
    """The time from opening an address to the first picture; the rest of the page may follow."""
    cpu = browser.cpu_seconds()
    browser.driver.get(url)
    while not (first := browser.run("document.documentElement.dataset.first")):
        time.sleep(0.02)
    found = Time(float(first) / 1000, browser.cpu_seconds() - cpu)
    browser.wait("document.documentElement.dataset.drawn > 0")
    return found


def measure(browser: Browser, url: str) -> list[Time]:
    """The first picture; then clicks on layers, on units, and on the menu of quantities: the slowest of each."""
    first = first_picture(browser, url)
    actions: list[list[Callable[[], None]]] = [
        [partial(browser.click, "#layers .picture .nsewdrag", down=down) for down in (0.3, 0.6, 0.9)],
        [partial(browser.click, "#units .picture .nsewdrag", down=down) for down in (0.3, 0.6, 0.9)],
        [partial(browser.choose, "#quantity", x) for x in ("angular_update", "residual", "rounding", "charge")],
    ]
    return [first, *(max(timed(browser, action) for action in kind) for kind in actions)]


def scroll_to(browser: Browser, selector: str) -> None:
    browser.run(
        "window.scrollTo(0, document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY - 70)", selector
    )
    time.sleep(1)


def take_pictures(browser: Browser, record: Path, folder: Path) -> None:
    """The pictures of docs/view.md: spectra and matrices; the top of the page; a layer, a unit and its budget."""
    with tempfile.TemporaryDirectory() as made, served(make_heads(Path(made) / "runs" / "heads.zarr")) as url:
        browser.driver.set_window_size(1400, 1420)
        browser.open(url)
        browser.choose("#symmetry", "q, k")
        browser.choose("#unit", "2")
        browser.wait("document.querySelector('#unit').value === '2'")
        scroll_to(browser, "#symmetry")
        browser.picture(folder / "matrices.png")
        browser.driver.get("about:blank")
        browser.driver.set_window_size(1400, 1000)
    if not record.exists():
        return
    with served(record) as url:
        browser.open(url)
        browser.choose("#quantity", "angular_update")
        browser.wait("true")
        browser.picture(folder / "layers.png")
        browser.driver.set_window_size(1400, 1500)
        browser.choose("#quantity", "charge")
        browser.choose("#symmetry", "conv2")
        browser.choose("#unit", "9")
        browser.wait("document.querySelector('#quantity').value === 'charge'")
        scroll_to(browser, "#symmetry")
        browser.picture(folder / "units.png")
        browser.driver.get("about:blank")


def main() -> None:
    parser = argparse.ArgumentParser(description="How quick the page is.")
    parser.add_argument("--units", type=int, default=5000)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo/record.zarr"))
    parser.add_argument("--pictures", type=Path, help="Only take the pictures of docs/view.md, into this folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        if options.pictures is not None:
            take_pictures(browser, options.demo, options.pictures)
            return
        records = {f"{options.units:,} units, {options.rows:,} rows": make_record(
            Path(folder) / "large.zarr", options.units, options.rows)}  # fmt: skip
        if options.demo.exists():
            records["the demo's"] = options.demo
        lines = []
        for name, record in records.items():
            runs = []
            for _ in range(options.repeats):  # a new server each time: nothing is in memory yet
                with served(record) as url:
                    runs.append(measure(browser, url))
                    browser.driver.get("about:blank")
            export([record], Path(folder) / "page.html")
            n_bytes = (Path(folder) / "page.html").stat().st_size
            times = [sorted(column)[len(column) // 2] for column in zip(*runs, strict=True)]
            cells = [f"{seconds(x.wall)} ({seconds(x.cpu)})" for x in times]
            lines.append([name, *cells, size(n_bytes)])
        head = ["record", "first picture", "click on a layer", "on a unit", "another quantity", "one file"]
        print(table(head, lines))


if __name__ == "__main__":
    main()
