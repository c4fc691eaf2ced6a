"""What training runs meet: kills, full and read-only disks, gradients that are not finite, files by strangers, size."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sanitized
import torch
from training import BACKENDS, buffers, loss_of, make_net, ours, theirs, train

import noetherperf as nperf
from noetherperf import Norm, Part, laws, symmetry
from noetherperf.openness import Openness

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


class Interrupt:
    """Raises KeyboardInterrupt at an event (a call, a line, a return) of Python code; 0: it counts them."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> "Interrupt":
        self.count += 1
        if self.count == self.at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return self

    def during(self, call: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # torch's no_grad may be left half open


class Interrupted:
    """A training whose next step is ready to be made; gradients are scaled, which the step undoes."""

    def __init__(self, backend: str, steps: int) -> None:
        self.net = make_net(backend)
        self.optimizer = ours(self.net, backend, fused=True, dampening=0.2, **OPTIONS)
        self.optimizer.readout()
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        self.backward()

    def backward(self) -> None:
        self.optimizer.zero_grad()
        (8 * loss_of(self.net, self.optimizer.step_count)).backward()
        device = next(self.net.parameters()).device
        self.optimizer.grad_scale = torch.tensor(8.0, device=device)  # type: ignore[attr-defined]
        self.optimizer.found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]

    def all(self) -> list[Any]:
        """All numbers that a step changes, on the device and on the host."""
        sgd, params = self.optimizer, list(self.net.parameters())
        device = sgd._prepare()[0]
        tensors = [*params, *(p.grad for p in params), *buffers(sgd), *device.measurement.tensors()]
        values = [None if x is None else x.tolist() for x in tensors]
        return [*values, sgd.step_count, sgd._openness.state_dict(), list(map(bool, device.engine.fresh))]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where Python drops the interrupt
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("backend", sorted({"reference", "cpu"} & set(BACKENDS)))
def test_an_interrupted_step_is_made_or_not(backend: str, steps: int) -> None:
    counter, counted = Interrupt(0), Interrupted(backend, steps)
    counter.during(counted.optimizer.step)
    assert counter.count > 200
    unmade, whole = Interrupted(backend, steps).all(), counted.all()
    assert unmade != whole
    outcomes = set()
    for at in [*range(1, counter.count, counter.count // 50), *range(counter.count - 40, counter.count)]:
        here = Interrupted(backend, steps)
        Interrupt(at).during(here.optimizer.step)
        found = here.all()
        assert found in (unmade, whole), at
        outcomes.add(found == whole)
        while here.optimizer.step_count < steps + 2:
            here.backward()
            here.optimizer.step()
        expected = Interrupted(backend, steps + 1)
        expected.optimizer.step()
        assert here.all() == expected.all(), at
    assert outcomes == {True, False}


@pytest.mark.parametrize("backend", sorted({"reference", "cpu"} & set(BACKENDS)))
def test_an_error_in_a_step_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last tensor's law, when all others' are done; or of the last of the engines."""
    training = Interrupted(backend, 2)
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

RECORD_ON_A_BAD_DISK = """
import sys, pathlib, warnings
import torch, noetherperf as nperf, noetherperf.recorder
from training import make_net, ours, train
import test_faults
folder = pathlib.Path(sys.argv[1])
noetherperf.recorder.FLUSH_SECONDS = 0.0
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
assert all(not values.isnull().any() for values in record["fc2"].values())
mend_disk(folder)
train(net, optimizer, range(9, 11))
recorder.close()
record = nperf.open_record(folder / "record")
assert record.steps.tolist() == list(range(12)), record.steps
assert all(not values.isnull().any() for values in record["fc2"].values())
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


@pytest.fixture
def record(tmp_path: Path) -> Path:
    net = make_net("cpu")
    optimizer = ours(net, "cpu", **OPTIONS)
    with nperf.Recorder(optimizer, tmp_path / "record", probes={"one": lambda: 1.0}):
        train(net, optimizer, range(4))
    return tmp_path / "record"


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
    with pytest.raises(ValueError, match=r"damaged|format|symmetry|unknown|part|axis"):
        nperf.open_record(record)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("array", ["step", "charge"])
def test_chunks_that_are_something_else(record: Path, tmp_path: Path, array: str) -> None:
    for chunk in (record / array).rglob("*"):
        if chunk.is_file() and chunk.name != "zarr.json":
            chunk.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises((ValueError, RuntimeError)):
        nperf.open_record(record)["fc2"].charge.to_numpy()
    assert not (tmp_path / "executed").exists()


def test_json_nested_without_end(record: Path) -> None:
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="nested"):
        symmetry.from_json(deep)
    (record / "zarr.json").write_text(deep)
    with pytest.raises(ValueError, match="damaged"):
        nperf.open_record(record)


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
    expected = 1 - of_column / 4
    last = torch.tensor(1 - 0.5 / 4, dtype=torch.bfloat16) if dense else expected[-1]
    assert p[-1, -1] == last
    p[-1, -1] = expected[-1]
    for rows in rows_at_once():
        assert torch.equal(p[rows], expected.expand_as(p[rows]))
    readout = optimizer.readout()
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
    beyond += "_cpu.memory_floor(x.data_ptr(), x.data_ptr(), x.data_ptr(), 65, 1)"
    done = subprocess.run(
        [sys.executable, "-c", beyond], env=sanitized.environment(), capture_output=True, text=True, timeout=60
    )
    assert "heap-buffer-overflow" in done.stderr, "the sanitizers do not see what they must"
    some = "any_model or hostile or (cpu and (vector or padded) and not float16)"
    assert sanitized.run("-q", "-x", "tests/test_properties.py", "tests/test_engines.py", "-k", some) == 0
