"""The page's numbers, its server, its file and its command; a browser shows them in test_view_browser.py."""

import base64
import copy
import gzip
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_cli import assert_refused, call
from torch import nn
from viewed import HOSTILE, Training, attention

import noetherperf as nperf
from noetherperf.measure.printed import cells
from noetherperf.measure.table import rows
from noetherperf.record import relative_error
from noetherperf.view import Answers, PageServer, export
from noetherperf.view.answers import MOST_UNITS, labels, spread_units
from noetherperf.view.quantities import QUANTITIES, largest, median_size
from noetherperf.view.sampled import MOST_ROWS, Sampled, spread_rows

pytest.importorskip("plotly", reason="the extra [view] is not installed")


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Training(tmp_path_factory.mktemp("run") / "record.zarr").step(20).path


def unpacked(answer: dict[str, Any]) -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(answer["float32"]), "<f4").reshape(answer["shape"])


# ---- numbers


def test_rows_are_spread_and_only_come_at_the_end() -> None:
    for n in (0, 1, 2, 7, 8, 9, 100, 1000):
        rows = spread_rows(n, 8)
        assert len(rows) <= 9
        assert np.all(np.diff(rows) > 0)
        assert n == 0 or (rows[0], rows[-1]) == (0, n - 1)
        later = spread_rows(n + 1, 8)
        assert {*rows.tolist()[:-1]} >= {*later.tolist()} - {n, n - 1}, "nothing comes between what was read"


def test_reductions_leave_nan_out() -> None:
    values = np.array([[1.0, np.nan, -3.0], [np.nan] * 3, [2.0, -8.0, 4.0]])
    np.testing.assert_equal(median_size(values), [2.0, np.nan, 4.0])
    np.testing.assert_equal(largest(values), [1.0, np.nan, 4.0])
    np.testing.assert_equal(median_size(np.empty((2, 0))), [np.nan] * 2)


def test_quantities_are_the_records(record: Path) -> None:
    answers, opened = Answers([record]), nperf.open_record(record)
    for index, (name, data) in enumerate(opened.items()):
        expected = {
            "charge": data["charge"],
            "discrete": data["discrete_total"],
            "flow": data["flow_total"],
            "effective_lr": data["effective_lr"],
            "angular_update": data["angular_update"],
            "residual": relative_error(data, "discrete"),
            "flow_error": relative_error(data, "flow"),
            "rounding": relative_error(data, "budget"),
        }
        assert {*expected} == {*QUANTITIES}
        for quantity, values in expected.items():
            answer = answers.answer(f"series?run=0&symmetry={index}&name={quantity}")
            if QUANTITIES[quantity].predicts and not data.attrs["closed"]:
                assert "the law is open" in answer["missing"]
                continue
            np.testing.assert_allclose(unpacked(answer["values"]), values.to_numpy().T, rtol=1e-6, err_msg=name)
            assert answer["steps"] == opened.steps.tolist()
            one = answers.answer(f"series?run=0&symmetry={index}&name={quantity}&unit=1")
            np.testing.assert_equal(unpacked(one["values"]), unpacked(answer["values"])[1:2])


def test_a_layer_is_the_median_or_the_worst_of_its_units(record: Path) -> None:
    answers, opened = Answers([record]), nperf.open_record(record)
    charges = unpacked(answers.answer("layers?run=0&quantity=charge")["values"])
    errors = unpacked(answers.answer("layers?run=0&quantity=residual")["values"])
    for index, data in enumerate(opened.values()):
        np.testing.assert_allclose(charges[index], np.median(np.abs(data["charge"]), axis=1), rtol=1e-6)
        worst = relative_error(data, "discrete").max("group")  # a norm, which is no symmetry, is predicted by no law
        np.testing.assert_allclose(errors[index], worst if data.attrs["closed"] else worst * np.nan, rtol=1e-6)


def test_the_sources_of_the_budget_add_up_to_the_change(record: Path) -> None:
    answers = Answers([record])
    for index, data in enumerate(nperf.open_record(record).values()):
        terms = {name: unpacked(x) for name, x in answers.answer(f"budget?run=0&symmetry={index}")["terms"].items()}
        change = (data["charge"] - data["initial"]).mean("group").to_numpy()
        np.testing.assert_allclose(terms["change"][0], change, rtol=1e-6, atol=1e-12)
        sources = np.sum([terms[name] for name in ("decay", "growth", "defect", "rounding")], axis=0)
        np.testing.assert_allclose(
            sources, terms["change"], atol=1e-6 * max(map(np.abs, terms.values()), key=np.max).max()
        )


def test_the_table_is_the_readouts(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr", dtype="float64").step(7)
    table = Answers([training.path]).answer("table?run=0")
    readout = training.optimizer.readout()
    assert [row["cells"] for row in table["rows"]] == [cells(row) for row in rows(readout)]
    assert [row["key"] for row in table["rows"]] == [row.name for row in rows(readout)]
    assert table["headings"][0] == "symmetry"


def test_settings_are_told_with_their_changes(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(2)
    training.optimizer.param_groups[0]["lr"] = 0.01
    settings = Answers([training.step(1).path]).answer("state")["runs"][0]["settings"]
    assert settings["lr"] == "0.05 → 0.01"
    assert settings["weight_decay"] == "0.01"
    assert settings["last step"] == "3"


def test_a_question_without_an_answer_is_refused(record: Path) -> None:
    answers = Answers([record])
    for question in (
        "",
        "nothing",
        "layers",
        "layers?run=1&quantity=charge",
        "layers?run=-1&quantity=charge",
        "layers?run=0&quantity=__class__",
        "series?run=0&symmetry=3&name=charge",
        "series?run=0&symmetry=0&name=charge&unit=8",
        "series?run=0&symmetry=0&name=charge&unit=x",
        "state?run=0",
        "answer?question=state",
    ):
        with pytest.raises(LookupError):
            answers.answer(question)


def test_many_rows_and_units_are_thinned(tmp_path: Path) -> None:
    assert spread_units(10).tolist() == list(range(10))
    units = spread_units(5000)
    assert (len(units), units[0], units[-1]) == (MOST_UNITS, 0, 4999)
    training = Training(tmp_path / "a.zarr").step(40)
    sampled = Sampled(training.path, "", most_rows=16)
    assert sampled.steps.tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    answer = Answers([training.path], most_rows=16).answer("series?run=0&symmetry=0&name=charge")
    charge = nperf.open_record(training.path)["scale of 0"]["charge"]
    np.testing.assert_allclose(unpacked(answer["values"]), charge.to_numpy()[::4].T, rtol=1e-6)
    assert MOST_ROWS >= 256


# ---- records that change


def test_a_growing_record_is_followed(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(5)
    answers = Answers([training.path], most_rows=16)
    question = "series?run=0&symmetry=0&name=charge"
    for n in (0, 1, 3, 30):  # and rows are thinned
        training.step(n)
        answers.answer("versions")
        charge = nperf.open_record(training.path)["scale of 0"]["charge"]
        answer = answers.answer(question)
        np.testing.assert_allclose(unpacked(answer["values"]), charge.sel(step=answer["steps"]).to_numpy().T, rtol=1e-6)
        assert answer["steps"][-1] == training.optimizer.step_count
    assert answers.answer("versions")["versions"] == [3]


def test_only_new_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path / "a.zarr").step(5)
    sampled, read = Sampled(training.path, ""), []
    original = sampled._read

    def counted(name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        read.append(rows.tolist())
        return original(name, rows)

    monkeypatch.setattr(sampled, "_read", counted)
    sampled.data(("charge",), slice(None))
    training.step(2)
    sampled.follow()
    sampled.data(("charge",), slice(None))
    sampled.data(("charge",), slice(None))
    assert read == [[0, 1, 2, 3, 4, 5], [6, 7]]


def test_a_record_that_begins_anew_is_read_anew(tmp_path: Path) -> None:
    answers = Answers([Training(tmp_path / "a.zarr").step(9).path])
    question = "series?run=0&symmetry=0&name=charge"
    before = unpacked(answers.answer(question)["values"])
    Training(tmp_path / "a.zarr", lr=0.5).step(9)
    answers.answer("versions")
    after = unpacked(answers.answer(question)["values"])
    assert before.shape == after.shape
    assert not np.array_equal(before[:, 1:], after[:, 1:])


def test_a_run_that_goes_back_is_read_anew(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(3)
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    answers = Answers([training.step(3).path])
    question = "series?run=0&symmetry=0&name=charge"
    answers.answer(question)
    training.model.load_state_dict(saved[0])
    training.optimizer.load_state_dict(saved[1])
    training.optimizer.param_groups[0]["lr"] = 0.5
    training.step(5)  # past the row where it was
    answers.answer("versions")
    charge = nperf.open_record(training.path)["scale of 0"]["charge"]
    np.testing.assert_allclose(unpacked(answers.answer(question)["values"]), charge.to_numpy().T, rtol=1e-6)


def test_a_record_that_goes_away_stays_with_its_fault(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(2)
    answers = Answers([training.path])
    before = answers.answer("layers?run=0&quantity=charge")
    training.recorder.close()
    training.path.rename(tmp_path / "b.zarr")
    assert answers.answer("versions")["versions"] == [1]
    assert "there is no record" in answers.answer("state")["runs"][0]["faults"][0]
    assert answers.answer("layers?run=0&quantity=charge") == before


def test_a_damaged_chunk_is_a_gap_and_a_fault(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(2)
    (chunk,) = (file for file in (training.path / "charge" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(b"damaged" + chunk.read_bytes())
    answers = Answers([training.path])
    assert np.isnan(unpacked(answers.answer("layers?run=0&quantity=charge")["values"])).all()
    (fault,) = answers.answer("state")["runs"][0]["faults"]
    assert "charge" in fault


def test_an_open_law_predicts_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr", optimizer=nperf.AdamW).step(3)
    answers = Answers([training.path])
    state = answers.answer("state")["runs"][0]
    closed = [symmetry["closed"] for symmetry in state["symmetries"]]
    errors = unpacked(answers.answer("layers?run=0&quantity=residual")["values"])
    assert np.isfinite(errors[:, -1]).tolist() == closed
    verdicts = {row["key"]: row["cells"][-1] for row in answers.answer("table?run=0")["rows"]}
    assert len(verdicts) == len(closed)
    open_one = closed.index(False)
    for quantity in ("residual", "discrete", "flow", "flow_error"):
        assert (
            "the law is open" in answers.answer(f"series?run=0&symmetry={open_one}&name={quantity}&unit=0")["missing"]
        )
    terms = answers.answer("budget?run=0&symmetry=1")["terms"]  # of a translation, which Adam does not keep
    sources = np.sum([unpacked(terms[name]) for name in ("decay", "growth", "defect", "rounding")], axis=0)
    np.testing.assert_allclose(sources, unpacked(terms["change"]), rtol=1e-5, atol=1e-7)


def test_labels_are_what_differs() -> None:
    def of(*paths: str) -> list[str]:
        return labels([Path(path) for path in paths])

    assert of("/runs/a/record.zarr") == ["a/record.zarr"]
    assert of("/runs/a/record.zarr", "/runs/b/record.zarr") == ["a", "b"]
    assert of("/runs/a.zarr", "/runs/b.zarr") == ["a.zarr", "b.zarr"]
    assert of("/runs/a.zarr", "/runs/x/a.zarr") == ["a.zarr", "x/a.zarr"]
    assert of("/runs/a.zarr", "/runs/a.zarr") == ["a.zarr", "a.zarr"]


# ---- matrices


def test_a_balance_is_a_layer_among_the_others(tmp_path: Path) -> None:
    path = attention(tmp_path / "a.zarr")
    answers, data = Answers([path]), nperf.open_record(path).balance("q, k")
    about = answers.answer("state")["runs"][0]["symmetries"]
    assert [(x["name"], x["kind"], x["units"]) for x in about] == [("rows", "norm", 8), ("q, k", "balance", 8)]
    charge = unpacked(answers.answer("layers?run=0&quantity=charge")["values"])[1]
    np.testing.assert_allclose(charge, abs(data.eigenvalues).median(("block", "unit")), rtol=1e-6)
    for name in ("residual", "rounding"):
        relative = data[name] / data["size"]
        layer = unpacked(answers.answer(f"layers?run=0&quantity={name}")["values"])[1]
        np.testing.assert_allclose(layer, relative.max("block"), rtol=1e-6)
        blocks = unpacked(answers.answer(f"series?run=0&symmetry=1&name={name}")["values"])
        np.testing.assert_allclose(blocks, relative.T, rtol=1e-6)
    assert np.isnan(unpacked(answers.answer("layers?run=0&quantity=effective_lr")["values"])[1]).all()
    assert "a Balance has no" in answers.answer("series?run=0&symmetry=1&name=effective_lr")["missing"]
    units = answers.answer("series?run=0&symmetry=1&name=charge")
    np.testing.assert_allclose(unpacked(units["values"]).T, data.eigenvalues.to_numpy().reshape(7, 8), rtol=1e-6)
    assert units["blocks"] == [0] * 4 + [1] * 4
    (row,) = (row for row in answers.answer("table?run=0")["rows"] if row["key"] == "q, k")
    assert row["cells"][1] == "balance"
    assert re.fullmatch(r"holds to \de-\d+", row["cells"][-1])


def test_spectra_and_matrices_are_the_records(tmp_path: Path) -> None:
    path = attention(tmp_path / "a.zarr")
    answers, data = Answers([path]), nperf.open_record(path).balance("q, k")
    for block in (0, 1):
        of = data.isel(block=block)
        lines = answers.answer(f"spectrum?run=0&symmetry=1&block={block}")["lines"]
        for name, expected in {"measured": of.eigenvalues, "law": of.predicted_eigenvalues}.items():
            np.testing.assert_allclose(unpacked(lines[name]), expected.T, rtol=1e-6, err_msg=name)
        matrices = answers.answer(f"matrix?run=0&symmetry=1&block={block}&row=3")
        assert matrices["step"] == 3
        at = of.isel(step=3)
        expected = {"charge": at.charge, "law": at.predicted_charge, "residual": at.charge - at.predicted_charge}
        for name, values in expected.items():
            np.testing.assert_allclose(unpacked(matrices["matrices"][name]), values, rtol=1e-6, err_msg=name)
    for question in ("spectrum?run=0&symmetry=1&block=2", "spectrum?run=0&symmetry=0&block=0",
                     "matrix?run=0&symmetry=1&block=0&row=7", "matrix?run=0&symmetry=1&block=-1&row=0"):  # fmt: skip
        with pytest.raises(LookupError):
            answers.answer(question)


def test_a_law_that_misses_a_matrix_is_told(tmp_path: Path) -> None:
    """As the readout's line does; an open law predicts nothing."""
    weights = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    balance = nperf.Balance("pair", [nperf.Part("0", axis=0)], [nperf.Part("1", axis=0)])
    for groups, verdict in ((1, r"the law misses \d+ % of the matrix"), (2, "open")):
        named = [{"params": [(str(i), w)], "lr": 0.1 / (i + 1)} for i, w in enumerate(weights)]
        optimizer = nperf.SGD(
            [(str(i), w) for i, w in enumerate(weights)] if groups == 1 else named, lr=0.1, symmetries=[balance]
        )
        with nperf.Recorder(optimizer, tmp_path / "a.zarr", exists="overwrite"):
            for _ in range(2):
                for w in weights:
                    w.grad = torch.randn_like(w)  # of no loss that the pair is symmetric in
                optimizer.step()
        answers = Answers([tmp_path / "a.zarr"])
        (row,) = answers.answer("table?run=0")["rows"]
        assert re.fullmatch(verdict, row["cells"][-1])
        assert ("law" in answers.answer("spectrum?run=0&symmetry=0&block=0")["lines"]) == (groups == 1)
        assert "not recorded" in answers.answer("matrix?run=0&symmetry=0&block=0&row=0")["missing"]


def test_a_stretch_of_steps_has_finer_rows(tmp_path: Path) -> None:
    training = Training(tmp_path / "a.zarr").step(100)
    answers, charge = Answers([training.path], most_rows=16), nperf.open_record(training.path)["scale of 0"]["charge"]
    question = "series?run=0&symmetry=0&name=charge"
    assert answers.answer(question)["steps"] == [*range(0, 97, 8), 100]
    for first, last, steps in ((9, 13, range(9, 14)), (10, 40, range(10, 41, 2)), (99, 500, (99, 100))):
        found = answers.answer(f"{question}&first={first}&last={last}")
        assert found["steps"] == list(steps)
        np.testing.assert_allclose(unpacked(found["values"]).T, charge[list(steps)], rtol=1e-6)
    training.step(50)
    answers.answer("versions")
    assert answers.answer(f"{question}&first=99&last=500")["steps"] == [*range(99, 148, 4), 150]
    assert answers.answer(question)["steps"] == [*range(0, 145, 16), 150]
    with pytest.raises(LookupError):
        answers.answer(f"{question}&first=3")


# ---- server


@pytest.fixture(scope="module")
def server(record: Path) -> Iterator[PageServer]:
    with PageServer(Answers([record])) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: PageServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_server_is_for_this_machine_alone(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9000"):  # the last one through a tunnel
        assert get(server, "/data/state", Host=host)[0] == 200
        assert get(server, "/data/state", Host=host, Origin=f"http://{host}")[0] == 200
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example:80", ""):
        assert get(server, "/data/state", Host=host)[0] == 403
        assert get(server, "/", Host=host)[0] == 403
    for origin in ("http://evil.example", "null", f"http://localhost:{port}"):
        assert get(server, "/data/state", Host=f"127.0.0.1:{port}", Origin=origin)[0] == 403


@pytest.mark.parametrize("path", ["/nothing", "/../pyproject.toml", "/data/", "/data/nothing", "/data/series?run=9"])
def test_there_is_nothing_else(server: PageServer, path: str) -> None:
    assert get(server, path)[0] == 404


def test_a_malformed_address_is_refused(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    for path in ("http://[::1/", "http://[/data/state"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            assert b" 400 " in connection.makefile("rb").readline(), path
    assert capfd.readouterr().err == ""


def test_the_page_may_load_nothing_from_elsewhere(server: PageServer) -> None:
    status, headers, page = get(server, "/")
    assert status == 200
    assert headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(rb"https?://", page)
    assert not re.search(rb"https?://", get(server, "/page.js")[2])


def test_a_browser_that_goes_away_is_no_error(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
            connection.sendall(f"GET /plotly.js HTTP/1.1\r\nHost: localhost:{server.server_port}\r\n\r\n".encode())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closed at once
    assert get(server, "/data/state")[0] == 200
    assert capfd.readouterr().err == ""


# ---- one file


def test_the_file_holds_every_answer_and_no_markup_from_a_name(record: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "page.html"
    export([record], file)
    text = file.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/octet-stream" id="data">([\w+/=]*)</script>', text)
    held = json.loads(gzip.decompress(base64.b64decode(data)))
    assert {*held} == {*Answers([record]).questions()}
    assert held["state"]["runs"][0]["symmetries"][2]["name"] == HOSTILE
    assert HOSTILE not in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=\"(?!data:)", text)
    assert "default-src 'none'" in text
    assert "'unsafe-inline'; img-src" in text
    assert len(text) < 10e6
    assert [entry.name for entry in file.parent.iterdir()] == ["page.html"]


# ---- command


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "noetherperf", "view", *map(str, arguments)]


def hears_interrupts() -> None:
    """A process in the background of a shell, and its children, ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_serves_until_it_is_interrupted(record: Path) -> None:
    process = subprocess.Popen(
        command(record, record),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_interrupts,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    (port,) = re.findall(r"^http://127\.0\.0\.1:(\d+)/ shows 2 records; Ctrl-C ends it\n$", line)
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request("GET", "/data/versions")
    assert json.loads(connection.getresponse().read()) == {"versions": [0, 0]}
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    connection.close()
    assert (process.returncode, rest, errors) == (0, "the page has ended\n", "")


def test_open_opens_the_page(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def interrupted(_: PageServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    result = call("view", record, "--open")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{opened[0]} shows 1 record; Ctrl-C ends it\nthe page has ended\n"
    assert call("view", record).exit_code == 0
    assert len(opened) == 1


def refused(*arguments: str | Path) -> str:
    result = call("view", *arguments)
    assert_refused(result)
    return result.stderr


def test_what_cannot_be_shown_is_refused(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no record at" in refused(tmp_path / "nothing")
    assert "is no noetherperf record" in refused(tmp_path)
    assert "is a URL" in refused("https://example.org/record.zarr")
    before = (record / "zarr.json").read_bytes()
    assert "is inside the record" in refused(record, "--html", record / "zarr.json")
    assert (record / "zarr.json").read_bytes() == before
    assert f"is a folder; name a file in it, such as '{tmp_path / 'page.html'}'" in refused(record, "--html", tmp_path)
    (tmp_path / "file").touch()
    told = refused(record, "--html", tmp_path / "file" / "page.html")
    assert f"file: '{tmp_path / 'file' / 'page.html'}' cannot be written" in told
    other = tmp_path / "other.zarr"
    other.mkdir()
    metadata = json.loads((record / "zarr.json").read_text())
    metadata["attributes"]["noetherperf_record"] = 99
    (other / "zarr.json").write_text(json.dumps(metadata))
    assert "is a record of format 99" in refused(record, other)
    assert "is a record of format 99" in refused(other, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = refused(record, "--port", str(port))
    assert f"--port: {port} cannot be used" in told
    assert os.strerror(98) in told or "in use" in told
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "noetherperf[view]" in refused(record)


def test_the_command_writes_one_file(record: Path, tmp_path: Path) -> None:
    result = call("view", record, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").stat().st_size > 1e6
