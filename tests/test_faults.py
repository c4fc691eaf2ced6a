"""What training runs meet: kills, full and read-only disks, gradients that are not finite, files by strangers, size."""

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sanitized
import torch
from google_crc32c import value as crc32c
from interrupts import Interrupt
from training import ADAMW, BACKENDS, SGD, Kind, buffers, each, loss_of, make_net, ours, theirs, train

import noetherperf as nperf
import noetherperf.record.layout
from noetherperf import Norm, Part
from noetherperf.measure.openness import Openness
from noetherperf.record.array import Array
from noetherperf.rules import law as laws
from noetherperf.symmetry import from_json

OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
TESTS = Path(__file__).parent


def in_a_process(code: str, *arguments: str, before: tuple[str, ...] = ()) -> str:
    """Run Python code that may import the tests' modules; what it prints."""
    search = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- kills: tests/crashes.py by itself takes any number


def test_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    in_a_process(f"import crashes, pathlib; crashes.kill_many(pathlib.Path({str(tmp_path)!r}), 4, 0, 200)")


# --- interrupts


class Interrupted:
    """A training whose next step is ready to be made; gradients are scaled, which the step undoes."""

    def __init__(self, kind: Kind, backend: str, steps: int) -> None:
        self.net = make_net(backend)
        self.optimizer = kind.mine(self.net, backend, fused=True, **kind.options)
        self.optimizer.readout()
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        self.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        (8 * loss_of(self.net, self.optimizer.step_count)).backward()
        device = next(self.net.parameters()).device
        self.optimizer.grad_scale = torch.tensor(8.0, device=device)
        self.optimizer.found_inf = torch.tensor(0.0, device=device)

    def all(self) -> list[Any]:
        """All numbers that a step changes, on the device and on the host."""
        sgd, params = self.optimizer, list(self.net.parameters())
        meter = sgd._prepare()[0]
        tensors = [*params, *(p.grad for p in params), *buffers(sgd), *meter.measurement.tensors()]
        values = [None if x is None else x.tolist() for x in tensors]
        return [*values, sgd.step_count, sgd._measuring.openness.state_dict(), list(map(int, meter.engine.ages))]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where Python drops the interrupt
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])
@each((SGD, ADAMW), {"reference", "cpu"})
def test_an_interrupted_step_is_made_or_not(kind: Kind, backend: str, steps: int) -> None:
    counter, counted = Interrupt(0), Interrupted(kind, backend, steps)
    counter.during(counted.optimizer.step)
    assert counter.count > 200
    unmade, whole = Interrupted(kind, backend, steps).all(), counted.all()
    assert unmade != whole
    outcomes = set()
    for at in [*range(1, counter.count, counter.count // 50), *range(counter.count - 40, counter.count)]:
        here = Interrupted(kind, backend, steps)
        Interrupt(at).during(here.optimizer.step)
        found = here.all()
        assert found in (unmade, whole), at
        outcomes.add(found == whole)
        while here.optimizer.step_count < steps + 2:
            here.backward()
            here.optimizer.step()
        expected = Interrupted(kind, backend, steps + 1)
        expected.optimizer.step()
        assert here.all() == expected.all(), at
    assert outcomes == {True, False}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", sorted({"reference", "cpu"} & set(BACKENDS)))
@pytest.mark.parametrize("call", ["readout", "step"])
def test_an_interrupt_while_a_change_is_noticed_loses_nothing_of_it(backend: str, call: str) -> None:
    """What others wrote between steps is the defect's, and rounding nothing, whenever it came."""

    def changed() -> Interrupted:
        training = Interrupted(SGD, backend, 2)
        with torch.no_grad():
            for p in training.net.parameters():
                p.mul_(1.5)
        for buffer in buffers(training.optimizer):
            assert buffer is not None
            buffer.mul_(0.5)
        return training

    counter = Interrupt(0)
    counter.during(getattr(changed().optimizer, call))
    for at in range(1, counter.count, counter.count // 60):
        training = changed()
        Interrupt(at).during(getattr(training.optimizer, call))
        while training.optimizer.step_count < 4:
            training.backward()
            training.optimizer.step()
        for name, law in training.optimizer.readout().items():
            assert law.rounding.abs().max() <= 1e-12 * (1 + law.charge.abs().max()), (at, name)
            assert not law.closed


@pytest.mark.parametrize("backend", sorted({"reference", "cpu"} & set(BACKENDS)))
def test_an_error_in_a_step_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last tensor's law, when all others' are done; or of the last of the engines."""
    training = Interrupted(SGD, backend, 2)
    before = training.all()
    if backend == "reference":
        advance, calls = laws.advance, []

        def failing(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 4:
                raise ZeroDivisionError
            advance(*args)

        monkeypatch.setattr(laws, "advance", failing)
    else:
        monkeypatch.setattr(Openness, "after", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.optimizer.step()
    assert training.all() == before


# --- disks

UNKNOWN = {"growth", "transport", "angular_update", "effective_lr"}  # SGD's, or before the first step: NaN


def is_whole(data: Any) -> bool:
    """Whether a symmetry's arrays hold a number in every row."""
    return not any(values.isnull().any() for name, values in data.items() if name not in UNKNOWN)


RECORD_ON_A_BAD_DISK = """
import sys, pathlib, warnings
import torch, noetherperf as nperf, noetherperf.record.writer
from training import make_net, ours, train
import test_faults
folder = pathlib.Path(sys.argv[1])
noetherperf.record.writer.FLUSH_SECONDS = 0.0
net, other = make_net("cpu"), make_net("cpu")
optimizer, peer = ours(net, "cpu", **test_faults.OPTIONS), ours(other, "cpu", **test_faults.OPTIONS)
recorder = nperf.Recorder(optimizer, folder / "record")
train(net, optimizer, range(3))
before = nperf.open_record(folder / "record").steps.tolist()
assert before == [0, 1, 2, 3], before
break_disk(folder)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    train(net, optimizer, range(3, 9))
    recorder.flush()
assert [w.category for w in told] == [RuntimeWarning], told
assert "could not be written" in str(told[0].message), told[0].message
train(other, peer, range(9))
assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
record = nperf.open_record(folder / "record")
assert record.steps.tolist() == before, record.steps
assert test_faults.is_whole(record["fc2"])
mend_disk(folder)
train(net, optimizer, range(9, 11))
recorder.close()
record = nperf.open_record(folder / "record")
assert record.steps.tolist() == list(range(12)), record.steps
assert test_faults.is_whole(record["fc2"])
print("done", told[0].message)
"""

TORN_WRITES = """
import resource
def break_disk(folder):  # every file ends after 50 bytes: writes are torn, then fail
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
def mend_disk(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""

DISK_FULL = """
def break_disk(folder):
    with open(folder / "ballast", "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(512))
        except OSError: pass
def mend_disk(folder):
    (folder / "ballast").unlink()
"""

READ_ONLY = """
import subprocess
def break_disk(folder):
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
def mend_disk(folder):
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
"""

MOUNT = 'mount -t tmpfs -o size=4m none "$1" && shift && exec "$@"'


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", folder, "true"]
        return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_writes_torn_by_the_disk(tmp_path: Path) -> None:
    assert "File too large" in in_a_process(TORN_WRITES + RECORD_ON_A_BAD_DISK, str(tmp_path))


@pytest.mark.parametrize(
    ("fault", "message"), [(DISK_FULL, "No space left"), (READ_ONLY, "Read-only")], ids=["full", "read-only"]
)
def test_disk_full_and_read_only(tmp_path: Path, fault: str, message: str) -> None:
    """On a file system of its own."""
    if not can_mount():
        pytest.skip("needs unshare with user namespaces, to mount a small file system")
    before = ("unshare", "-rm", "sh", "-c", MOUNT, "sh", str(tmp_path))
    assert message in in_a_process(fault + RECORD_ON_A_BAD_DISK, str(tmp_path), before=before)


# --- gradients that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_not_finite(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    """It goes where torch lets it go and no further; the record says so; going back to a checkpoint mends all."""
    net, other = make_net("cpu", dtype), make_net("cpu", dtype)
    optimizer, peer = ours(net, "cpu", **OPTIONS), theirs(other, **OPTIONS)

    def spoil(step: int, net: torch.nn.Module) -> None:
        if step == 3:
            grad = net.get_parameter("fc2.weight").grad
            assert grad is not None
            grad[1, 2] = bad

    def grads_of(step: int) -> None:
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert a.grad is not None
            b.grad = a.grad.clone()
        peer.step()

    with nperf.Recorder(optimizer, tmp_path / "record"):
        train(net, optimizer, range(3), before_step=lambda step, _: grads_of(step))
        saved = {"net": {k: v.clone() for k, v in net.state_dict().items()}, "optimizer": optimizer.state_dict()}
        saved = torch.load(_saved(tmp_path / "checkpoint", saved), weights_only=True)
        optimizer.zero_grad()
        loss_of(net, 3).backward()
        spoil(3, net)
        grads_of(3)
        optimizer.step()
    for a, b in zip([*net.parameters(), *buffers(optimizer)], [*other.parameters(), *buffers(peer)], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.isfinite(), b.isfinite())
        assert (~a.isfinite()).sum() == (a.shape == (3, 7))  # one element of fc2.weight and of its buffer
    readout = optimizer.readout()
    assert (~readout["fc2"].charge.isfinite()).nonzero().flatten().tolist() == [2]
    assert (~readout["fc1->fc2"].charge.isfinite()).nonzero().flatten().tolist() == [2]
    assert readout["fc2.bias"].charge.isfinite().all()
    assert readout["half of fc1"].discrete.total.isfinite().all()
    assert readout["fc2.bias"].relative_defect.isfinite().all()
    assert (
        readout["half of fc1"].relative_defect > 0
    ).all()  # no symmetry; the average of gradients says nothing of it
    record = nperf.open_record(tmp_path / "record")
    assert record.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(np.isfinite(record["fc2"].charge).all("step"), [True, True, False, *[True] * 4])

    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    with nperf.Recorder(optimizer, tmp_path / "record", exists="resume"):
        train(net, optimizer, range(3, 6))
    assert optimizer.readout()["fc2"].residual.isfinite().all()
    record = nperf.open_record(tmp_path / "record")
    assert record.steps.tolist() == list(range(7))
    assert np.isfinite(record["fc2"].charge).all()


def _saved(path: Path, data: object) -> Path:
    torch.save(data, path)
    return path


# --- files by strangers: data only, and never executed


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records, of which tests damage copies."""
    folder = tmp_path_factory.mktemp("records")
    net = make_net("cpu")
    optimizer = ours(net, "cpu", **OPTIONS)
    with nperf.Recorder(optimizer, folder / "record", probes={"one": lambda: 1.0}, series="all"):
        train(net, optimizer, range(4))
    make_long_record(folder / "long")
    return folder


def make_long_record(path: Path) -> None:
    """Of several chunks along rows and groups, with numbers that are all different."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noetherperf.record.layout, "CHUNK_VALUES", 8)
        patch.setattr(noetherperf.record.layout, "CHUNK_GROUPS", 3)
        net = make_net("cpu")
        optimizer = ours(net, "cpu", **OPTIONS)
        with nperf.Recorder(optimizer, path, probes={"one": lambda: 1.0}):
            train(net, optimizer, range(40))


@pytest.fixture
def record(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "record", tmp_path / "record"))


@pytest.fixture
def long_record(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "long", tmp_path / "long"))


def edit(record: Path, change: Callable[[dict[str, Any]], object]) -> None:
    metadata = json.loads((record / "zarr.json").read_bytes())
    change(metadata)
    (record / "zarr.json").write_text(json.dumps(metadata))


def arrays(metadata: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = metadata["consolidated_metadata"]["metadata"]
    return found


def version_two(dtype: str, filters: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    def change(metadata: dict[str, Any]) -> None:
        shape = arrays(metadata)["charge"]["shape"]
        arrays(metadata)["charge"] = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": shape,
            "dtype": dtype,
            "compressor": None,
            "filters": filters,
            "fill_value": 0.0,
            "order": "C",
            "attributes": {"_ARRAY_DIMENSIONS": ["step", "group"]},
        }

    return change


def lengthen(metadata: dict[str, Any], n_rows: int, chunk: int = 1024) -> None:
    for name, array in arrays(metadata).items():
        if array["dimension_names"][0] == "step":
            array["shape"][0] = n_rows
            set_chunk(metadata, name, [chunk, *array["chunk_grid"]["configuration"]["chunk_shape"][1:]])


def widen(metadata: dict[str, Any], n_groups: int, chunk: int) -> None:
    """As consistent as can be."""
    attributes = metadata["attributes"]
    attributes["n_groups"] = [n_groups] * len(attributes["n_groups"])
    for name, array in arrays(metadata).items():
        if array["dimension_names"][-1] == "group":
            array["shape"][-1] = sum(attributes["n_groups"])
            set_chunk(metadata, name, [*array["chunk_grid"]["configuration"]["chunk_shape"][:-1], chunk])


def set_chunk(metadata: dict[str, Any], name: str, shape: list[int]) -> None:
    arrays(metadata)[name]["chunk_grid"]["configuration"]["chunk_shape"] = shape


ODD: dict[str, Callable[[dict[str, Any]], object]] = {
    "objects": version_two("|O", [{"id": "pickle"}]),
    "pickled numbers": version_two("<f8", [{"id": "pickle"}]),
    "a codec": lambda m: arrays(m)["charge"]["codecs"].append({"name": "numcodecs.pickle", "configuration": {}}),
    "codecs of no kind": lambda m: arrays(m)["time"].update(codecs="zstd"),
    "strings": lambda m: arrays(m)["initial"].update(data_type="string"),
    "a structure": lambda m: arrays(m)["initial"].update(data_type={"name": "structured", "configuration": {}}),
    "a group": lambda m: arrays(m)["initial"].update(node_type="group"),
    "no array": lambda m: arrays(m).update(charge=[1, 2]),
    "a missing array": lambda m: arrays(m).pop("sq_u"),
    "no arrays": lambda m: m["consolidated_metadata"].update(metadata=None),
    "no metadata": lambda m: m.update(consolidated_metadata=None),
    "another width": lambda m: arrays(m)["charge"].update(shape=[5, 10**12]),
    "no shape": lambda m: arrays(m)["charge"].update(shape={"a": 1}),
    "groups of no number": lambda m: m["attributes"].update(n_groups=[1, "2", 3, 4]),
    "fewer groups": lambda m: m["attributes"]["n_groups"].pop(),
    "negative groups": lambda m: m["attributes"].update(n_groups=[7, 7, -1, 4]),
    "no probes": lambda m: m["attributes"].update(probes={"one": 1}),
    "probes of no name": lambda m: m["attributes"].update(probes=[["one"]]),
    "symmetries of no kind": lambda m: m["attributes"].update(symmetries="import os"),
    "an unknown symmetry": lambda m: m["attributes"]["symmetries"][0].update(kind="__import__"),
    "a field too many": lambda m: m["attributes"]["symmetries"][0].update(__class__="os.system"),
    "a part of no kind": lambda m: m["attributes"]["symmetries"][1].update(parts=[3]),
    "an axis of no kind": lambda m: m["attributes"]["symmetries"][1]["parts"][0].update(axis={"a": []}),
    "shapes of text": lambda m: arrays(m)["time"].update(shape=["5"]),
    "a shape of fractions": lambda m: arrays(m)["time"].update(shape=[5.0]),
    "a shape of truths": lambda m: arrays(m)["lr"].update(shape=[5, True]),
    "fewer rows in one": lambda m: arrays(m)["sq_p"]["shape"].__setitem__(0, 0),
    "rows without end": lambda m: lengthen(m, 10**12),
    "rows beyond all numbers": lambda m: lengthen(m, 10**400),
    "groups without end": lambda m: widen(m, 10**12, 4),
    "groups without end in one chunk": lambda m: widen(m, 10**12, 10**12),
    "groups beyond all numbers": lambda m: widen(m, 10**400, 4),
    "chunks without end": lambda m: set_chunk(m, "charge", [1024, 10**12]),
    "chunks of nothing": lambda m: set_chunk(m, "charge", [1024, 0]),
    "chunks of a single row": lambda m: lengthen(m, 10**7, 1),
    "no dimension names": lambda m: arrays(m)["charge"].pop("dimension_names"),
    "null for dimension names": lambda m: arrays(m)["charge"].update(dimension_names=[None, None]),
    "one name for two dimensions": lambda m: arrays(m)["charge"].update(dimension_names=["step", "step"]),
    "dimensions in another order": lambda m: arrays(m)["lr"].update(dimension_names=["parameter_group", "step"]),
    "a name that leads elsewhere": lambda m: arrays(m).update({"../x": arrays(m)["charge"]}),
    "a name from the root": lambda m: arrays(m).update({"/etc/x": arrays(m)["charge"]}),
    "no name": lambda m: arrays(m).update({"": arrays(m)["charge"]}),
    "time since": lambda m: arrays(m)["time"]["attributes"].update(units="days since 2000-01-01"),
    "steps as durations": lambda m: arrays(m)["step"]["attributes"].update(units="days"),
    "another missing value": lambda m: arrays(m)["charge"]["attributes"].update(_FillValue=0.0),
    "a scale": lambda m: arrays(m)["charge"]["attributes"].update(scale_factor=2.0),
    "an offset": lambda m: arrays(m)["sum_p"]["attributes"].update(add_offset=2.0),
    "attributes of no kind": lambda m: arrays(m)["sum_p"].update(attributes=[1]),
    "steps that are fractions": lambda m: arrays(m)["step"].update(data_type="float64"),
    "charges that are whole": lambda m: arrays(m)["charge"].update(data_type="int64"),
    "codecs in another order": lambda m: arrays(m)["charge"]["codecs"].reverse(),
    "one codec twice": lambda m: arrays(m)["charge"]["codecs"].insert(1, arrays(m)["charge"]["codecs"][1]),
    "no codecs": lambda m: arrays(m)["charge"].update(codecs=[]),
    "a file name for a chunk's": lambda m: arrays(m)["charge"].update(chunk_key_encoding={"name": "v2"}),
    "a separator that leads elsewhere": lambda m: arrays(m)["charge"]["chunk_key_encoding"].update(
        configuration={"separator": "/../"}
    ),
    "a transformer": lambda m: arrays(m)["charge"].update(storage_transformers=[{"name": "x"}]),
    "an irregular grid": lambda m: arrays(m)["charge"]["chunk_grid"].update(name="rectilinear"),
    "reasons of no text": lambda m: m["attributes"].update(reason=[None] * 4),
    "one name for two symmetries": lambda m: m["attributes"]["symmetries"][1].update(
        name=m["attributes"]["symmetries"][0]["name"]
    ),
    "one name for two probes": lambda m: m["attributes"].update(probes=["one", "one"]),
    "an identity of no text": lambda m: m["attributes"].update(record=3),
    "another identity": lambda m: m["attributes"].update(record="another"),
    "an array that fits nowhere": lambda m: arrays(m).update(
        mine={**arrays(m)["charge"], "dimension_names": ["step", "mine"], "shape": [3, 3]}
    ),
    "series of no kind": lambda m: m["attributes"].update(series="charge"),
    "a series that no recorder writes": lambda m: m["attributes"]["series"].append("../x"),
    "a series twice": lambda m: m["attributes"]["series"].append("charge"),
    "names of logged values of no kind": lambda m: m["attributes"].update(logged=[{"__class__": "x"}]),
    "no place for logged values": lambda m: arrays(m).pop("logged"),
    "charges that are short": lambda m: arrays(m)["charge"].update(data_type="float16"),
    "steps of 32 bits": lambda m: arrays(m)["step"].update(data_type="float32"),
    "dimensions stored in another order": lambda m: arrays(m)["charge"]["codecs"][0]["configuration"].update(
        order=[0, 1]
    ),
    "dimensions stored in no order": lambda m: arrays(m)["charge"]["codecs"][0].update(configuration=[]),
    "an envelope of another kind": lambda m: arrays(m)["charge"]["codecs"][3].update(name="gzip"),
    "another format": lambda m: m["attributes"].update(noetherperf_record={"$": 1}),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_crafted_record_is_refused(record: Path, tmp_path: Path, odd: str) -> None:
    edit(record, ODD[odd])
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    for chunk in (record / "charge").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(bomb)
    (record / "charge" / "0.0").write_bytes(bomb)
    with within(8), pytest.raises(ValueError, match=r"damaged|of format"):
        nperf.open_record(record)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("array", ["step", "charge"])
def test_chunks_that_are_something_else(record: Path, tmp_path: Path, array: str) -> None:
    for chunk in chunks(record, array):
        chunk.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    if array == "step":
        with pytest.raises(ValueError, match=r"damaged: the steps of 5 of its 5 rows .* does not match its checksum"):
            nperf.open_record(record)
    else:
        with pytest.warns(RuntimeWarning, match=r"damaged: charge\[step 0:5, group .*\] does not match its checksum"):
            charge = nperf.open_record(record)["fc2"].charge
        assert np.isnan(charge).all()
    assert not (tmp_path / "executed").exists()


def chunks(record: Path, array: str) -> list[Path]:
    return sorted(file for file in (record / array / "c").rglob("*") if file.is_file())


@contextmanager
def within(megabytes: int, seconds: float = 20.0) -> Iterator[None]:
    """In bounded memory and time."""
    tracemalloc.start()
    begin = time.monotonic()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20
    assert time.monotonic() - begin < seconds


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        '{"attributes": {"noetherperf_record": ' + "9" * 5000 + "}}",
        "\xff",
        "",
        "nul",
    ],
    ids=["lists", "objects", "a number", "a format", "no UTF-8", "empty", "torn"],
)
def test_metadata_that_no_parser_likes(record: Path, text: str) -> None:
    if text.startswith("["):
        with pytest.raises(ValueError, match="nested"):
            from_json(text)
    (record / "zarr.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="damaged"):
        nperf.open_record(record)


@pytest.mark.parametrize("special", ["pipe", "directory", "circle", "sparse"])
@pytest.mark.parametrize("name", ["zarr.json", "step/c/0", "initial/c/0"])
def test_files_of_another_kind(record: Path, name: str, special: str) -> None:
    path = record / name
    path.unlink()
    match special:
        case "pipe":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "circle":
            path.symlink_to(path)
        case "sparse":
            path.touch()
            os.truncate(path, 2**40)
    with within(8), pytest.raises(ValueError, match=r"damaged|no noetherperf record"):
        nperf.open_record(record)


def zstd_of_zeros(n_bytes: int, declared: int) -> bytes:
    """A frame of blocks that say: so many zeros."""
    blocks = [min(2**17, n_bytes - at) for at in range(0, n_bytes, 2**17)]
    heads = (size << 3 | 1 << 1 | (i == len(blocks) - 1) for i, size in enumerate(blocks))
    frame = b"\x28\xb5\x2f\xfd\xe0" + declared.to_bytes(8, "little")
    return frame + b"".join(head.to_bytes(3, "little") + b"\0" for head in heads)


@pytest.mark.parametrize("declared", [2**40, 2**30, 0, -8, 8], ids=["much", "true", "nothing", "less", "more"])
def test_few_bytes_that_become_many(record: Path, declared: int) -> None:
    """What is decompressed is bounded, whatever a frame declares, even with a valid checksum."""
    for array in ("step", "charge", "initial"):
        expected = 8 * math.prod(Array.parse(record / array, "", arrays_in(record)[array]).chunk)
        data = zstd_of_zeros(2**30, declared if declared in (2**40, 2**30, 0) else expected + declared)
        (chunk,) = chunks(record, array)
        content = chunk.read_bytes()
        chunk.write_bytes(data + struct.pack("<I", crc32c(data)))
        with (
            within(16),
            pytest.raises(ValueError, match=r"damaged: .*(bytes of numbers|decompress)"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("error")
            try:
                nperf.open_record(record)["fc2"]
            except RuntimeWarning as warning:
                raise ValueError(str(warning)) from warning
        chunk.write_bytes(content)


def arrays_in(record: Path) -> dict[str, Any]:
    return arrays(json.loads((record / "zarr.json").read_bytes()))


def test_every_bit_of_a_chunk_counts(record: Path) -> None:
    charge = nperf.open_record(record).dataset.charge.to_numpy()
    (chunk,) = chunks(record, "charge")
    content = chunk.read_bytes()
    dataset = nperf.open_record(record).dataset
    for place in range(len(content)):
        chunk.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.warns(RuntimeWarning, match="damaged: charge"):
            assert np.isnan(dataset.charge.to_numpy()).all()
        chunk.write_bytes(content[:place])
        with pytest.warns(RuntimeWarning, match="damaged: charge"):
            assert np.isnan(dataset.charge.to_numpy()).all()
    chunk.write_bytes(content)
    np.testing.assert_array_equal(dataset.charge, charge)


@pytest.mark.parametrize("other", ["charge", "rounding", "another record", "another place"])
def test_a_chunk_in_anothers_place_is_not_read(long_record: Path, tmp_path: Path, other: str) -> None:
    """Its checksum is right; it is another's all the same."""
    mine = long_record / "discrete_decay" / "c" / "1" / "0"
    if other == "another record":
        twin = long_record.with_name("twin")
        make_long_record(twin)
        shutil.copy(twin / mine.relative_to(long_record), mine)
    elif other == "another place":
        shutil.copy(mine.with_name("1"), mine)
    else:
        shutil.copy(long_record / other / "c" / "1" / "0", mine)
    with pytest.warns(RuntimeWarning, match=r"discrete_decay\[step 16:32, group 0:3\] is the chunk of another place"):
        decay = nperf.open_record(long_record).dataset.discrete_decay.to_numpy()
    assert np.isnan(decay[16:32, :3]).all()
    assert np.isnan(decay).sum() == 16 * 3


@pytest.mark.parametrize("how", ["missing", "torn", "changed"])
def test_the_readable_rows_are_given(long_record: Path, how: str) -> None:
    whole = nperf.open_record(long_record).dataset.load()

    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.unlink()
        if how != "missing":
            file.write_bytes(content[:-1] + (b"?" if how == "changed" else b""))

    file = long_record / "charge" / "c" / "1" / "2"
    content = file.read_bytes()
    damage(file)
    with pytest.warns(RuntimeWarning, match=r"damaged: charge\[step 16:32, group 6:9\]"):
        charge = nperf.open_record(long_record).dataset.charge.to_numpy()
    assert np.isnan(charge[16:32, 6:9]).all()
    charge[16:32, 6:9] = whole.charge[16:32, 6:9]
    np.testing.assert_array_equal(charge, whole.charge)
    file.write_bytes(content)
    damage(long_record / "step" / "c" / "1")
    with pytest.warns(
        RuntimeWarning, match=r"damaged: the steps of 16 of its 41 rows .*step\[step 16:32\].* are left out"
    ):
        record = nperf.open_record(long_record)
    assert record.steps.tolist() == [*range(16), *range(32, 41)]
    np.testing.assert_array_equal(record.dataset.charge, whole.charge[record.steps])
    np.testing.assert_array_equal(record.times, whole.time[record.steps])
    with pytest.raises(ValueError, match=r"damaged: .* cannot be resumed"):
        nperf.Recorder(ours(make_net("cpu"), "cpu", **OPTIONS), long_record, exists="resume", probes={"one": float})
    damage(long_record / "initial" / "c" / "0")
    with pytest.raises(ValueError, match=r"damaged: its array initial \[group 0:3\]"):
        nperf.open_record(long_record)


def test_steps_that_fall_end_the_record(record: Path) -> None:
    """As a record without checksums may hold them."""
    array = Array.parse(record / "step", metadata_of(record)["attributes"]["record"], arrays_in(record)["step"])
    array.write(0, np.array([0, 1, 2, 2, 3]))
    with pytest.warns(
        RuntimeWarning, match="the steps of 2 of its 5 rows do not increase, and those rows are left out"
    ):
        assert nperf.open_record(record).steps.tolist() == [0, 1, 2]


def metadata_of(record: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((record / "zarr.json").read_bytes())
    return metadata


# --- files changed at random

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    10**12,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "x",
    "..",
    [],
    {},
    [1],
    {"a": 1},
)


def leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON: its container, and key or index."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from leaves(node[key])


def change_something(record: Path, dice: random.Random) -> None:
    files = sorted(file for file in record.rglob("*") if file.is_file() and file.stat().st_size > 0)
    root = record / "zarr.json"
    file = dice.choice(files + [root] * (len(files) // 2) * (root in files))
    content = bytearray(file.read_bytes())
    match dice.randrange(8):
        case 0 | 1:  # a bit
            content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
            file.write_bytes(content)
        case 2:  # the end
            file.write_bytes(content[: dice.randrange(len(content))])
        case 3:  # a block
            at = dice.randrange(len(content))
            content[at : at + 64] = dice.choice([bytes(64), dice.randbytes(64), content[:64], b""])
            file.write_bytes(content)
        case 4:
            file.unlink()
        case 5:  # two files change places
            other = dice.choice(files)
            file.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case 6:  # a whole array is called another
            folder, other = (record / dice.choice([f.name for f in record.iterdir() if f.is_dir()]) for _ in range(2))
            folder.rename(record / "aside")
            if other.exists():
                other.rename(folder)
            (record / "aside").rename(other)
        case 7:  # metadata, as JSON that is well-formed
            with suppress(OSError, ValueError):  # of what an earlier change has left
                metadata = json.loads(root.read_bytes())
                container, key = dice.choice(list(leaves(metadata)))
                if dice.random() < 0.2:
                    del container[key]
                else:
                    container[key] = dice.choice(ODD_VALUES)
                root.write_text(json.dumps(metadata))


def change_and_read(record: Path, whole: Any, seed: int) -> bool:
    """Whether what is left opens; every number that it gives is the one that was recorded, or NaN."""
    dice = random.Random(seed)
    before = {file: file.read_bytes() for file in record.rglob("*") if file.is_file()}
    for _ in range(dice.choice([1, 1, 2, 4])):
        change_something(record, dice)
    try:
        with within(100), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = nperf.open_record(record)
            assert set(opened.steps) <= set(whole.step.to_numpy())
            for name, values in opened.dataset.load().variables.items():
                if name in whole.variables:
                    expected = whole[name]
                    expected = expected.sel(step=opened.steps) if "step" in expected.dims else expected
                    wrong = ~((values == expected.variable) | values.isnull())
                    assert not wrong.any(), f"seed {seed}: {name}"
            assert all(data.sizes["step"] == len(opened.steps) for data in opened.values())
        return True
    except ValueError as error:
        if not re.search(r"damaged|no noetherperf record|of format", str(error)):
            raise
        return False
    finally:
        for file in [file for file in record.rglob("*") if file.is_file() and file not in before]:
            file.unlink()
        for file, content in before.items():
            if file.is_dir():
                shutil.rmtree(file)
            if not file.exists() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)


@pytest.mark.parametrize("n", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_a_record_changed_at_random(long_record: Path, n: int) -> None:
    """It opens or is told as damaged, in bounded memory and time; no number in it is wrong."""
    whole = nperf.open_record(long_record).dataset.load()
    opened = sum(change_and_read(long_record, whole, seed) for seed in range(n))
    assert n / 5 < opened < n  # of both, enough


def test_checkpoints_need_no_pickled_objects(tmp_path: Path) -> None:
    """So weights_only=True, torch's default, loads them; and refuses what would execute."""
    net = make_net("cpu")
    optimizer = ours(net, "cpu", **OPTIONS)
    train(net, optimizer, range(2))
    path = _saved(tmp_path / "checkpoint", optimizer.state_dict())
    optimizer.load_state_dict(torch.load(path, weights_only=True))
    assert optimizer.step_count == 2
    with pytest.raises(pickle.UnpicklingError):
        torch.load(_saved(path, {"measurement": Bomb(tmp_path / "executed")}), weights_only=True)
    assert not (tmp_path / "executed").exists()


# --- more than 2³¹ elements

SHAPE = (2**15 + 1, 2**16 + 8)
N_ELEMENTS = SHAPE[0] * SHAPE[1]


def available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def rows_at_once(n: int = 2048) -> Iterator[slice]:
    return (slice(row, min(row + n, SHAPE[0])) for row in range(0, SHAPE[0], n))


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "strided"])
def test_more_elements_than_32_bits_count(dense: bool) -> None:
    """p = 1, and a gradient that tells rows and columns apart; every element and every moment is known exactly."""
    assert N_ELEMENTS > 2**31
    needed = (2.6 if dense else 1.6) * 2 * N_ELEMENTS
    if available_memory() < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory")
    p = torch.ones(SHAPE, dtype=torch.bfloat16)
    of_column = (torch.arange(SHAPE[1]) % 8).to(torch.bfloat16) / 16  # 0 .. 7/16: p stays exact in bfloat16
    grad = of_column.expand(SHAPE)
    if dense:
        grad = grad.contiguous()
        grad[-1, -1] = 0.5
    p.grad = grad
    symmetries = [Norm("rows", [Part("w", 0)]), Norm("columns", [Part("w", 1)])]
    optimizer = nperf.SGD([("w", p)], lr=0.25, symmetries=symmetries, backend="cpu")
    optimizer.step()
    readout = optimizer.readout()  # before this test writes p
    expected = 1 - of_column / 4
    last = torch.tensor(1 - 0.5 / 4, dtype=torch.bfloat16) if dense else expected[-1]
    assert p[-1, -1] == last
    p[-1, -1] = expected[-1]
    for rows in rows_at_once():
        assert torch.equal(p[rows], expected.expand_as(p[rows]))
    g, x = of_column.double(), expected.double()
    excess = torch.zeros(2, dtype=torch.float64)  # in sq_g and sq_p, of the last element
    excess += torch.tensor([0.25 - g[-1] ** 2, last.double() ** 2 - x[-1] ** 2])
    for name, one_group, count in (("rows", True, SHAPE[1]), ("columns", False, SHAPE[0])):
        moments = readout[name].moments
        for moment, values, extra in (("sq_g", g * g, excess[0]), ("sq_p", x * x, excess[1])):
            exact = values.sum().expand(SHAPE[0]).clone() if one_group else values * count
            exact[-1] += extra if dense else 0.0
            torch.testing.assert_close(moments[moment], exact, rtol=1e-14, atol=0.0)
    del p, grad


# --- the engine under sanitizers


@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    if reason := sanitized.missing():
        pytest.skip(reason)
    sanitized.build()
    beyond = "import sanitized, torch; from noetherperf import _cpu; x = torch.zeros(64);"
    beyond += "_cpu.memory_floor([x.data_ptr()] * 2, 1, 65, 1)"
    done = subprocess.run(
        [sys.executable, "-c", beyond], env=sanitized.environment(), capture_output=True, text=True, timeout=60
    )
    assert "heap-buffer-overflow" in done.stderr, "the sanitizers do not see what they must"
    some = "any_model or hostile or (cpu and (vector or padded) and not float16)"
    assert sanitized.run("-q", "-x", "tests/test_properties.py", "tests/test_engines.py", "-k", some) == 0
