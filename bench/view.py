"""How quick the page of `noetherperf view` is, in a headless Chromium; and the pictures of docs/view.md.

Two records: the demo's (`make demo`) and one of 5,000 units and 2,000 rows, made here. Times are of the browser: the
first picture since the address was opened, and clicks until everything that they change is drawn.

python -m bench.view [--rows 2000] [--units 5000] [--demo runs/demo/record.zarr]
python -m bench.view --pictures docs/images/view [--demo runs/demo/record.zarr]
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import noetherperf as nperf
from bench.browser import Browser, open_browser
from bench.markdown import seconds, size, table
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


def timed(browser: Browser, action: Callable[[], None]) -> float:
    """Seconds from an action to the end of all drawing that it causes."""
    before = int(browser.run("document.documentElement.dataset.drawn"))
    start = time.perf_counter()
    action()
    browser.wait(f"document.documentElement.dataset.drawn > {before}")
    return time.perf_counter() - start


def measure(browser: Browser, url: str) -> list[float]:
    """First picture; whole page; clicks on layers, on units and on the menu of quantities (the slowest of each)."""
    start = time.perf_counter()
    browser.open(url)
    whole = time.perf_counter() - start
    first = float(browser.run("document.documentElement.dataset.first")) / 1000
    layers = [
        timed(browser, lambda share=share: browser.click("#layers .picture .nsewdrag", down=share))  # type: ignore[misc]
        for share in (0.3, 0.6, 0.9)
    ]
    units = [
        timed(browser, lambda share=share: browser.click("#units .picture .nsewdrag", down=share))  # type: ignore[misc]
        for share in (0.3, 0.6, 0.9)
    ]
    menu = [
        timed(browser, lambda name=name: browser.choose("#quantity", name))  # type: ignore[misc]
        for name in ("angular_update", "residual", "rounding", "charge")
    ]
    return [first, whole, *map(max, (layers, units, menu))]


def take_pictures(browser: Browser, record: Path, folder: Path) -> None:
    """The pictures of docs/view.md: the top of the page; and a layer, a unit and its budget."""
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
        browser.run(
            "window.scrollTo(0, document.querySelector('#symmetry').getBoundingClientRect().top + scrollY - 70)"
        )
        time.sleep(1)
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
            times = [seconds(statistics.median(column)) for column in zip(*runs, strict=True)]
            lines.append([name, *times, size(n_bytes)])
        head = [
            "record",
            "first picture",
            "whole page",
            "click on a layer",
            "on a unit",
            "another quantity",
            "one file",
        ]
        print(table(head, lines))


if __name__ == "__main__":
    main()
