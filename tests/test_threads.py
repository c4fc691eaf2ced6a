"""One thread trains and others read, save, reset and record: each gets one step. In processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from noetherperf.engines.backends import backends

BACKENDS = [name for name in ("cpu", "reference") if backends()[name] == "available"]

SET_UP = """
import copy, sys, threading, time
import torch
import noetherperf as nperf

backend, seed = sys.argv[1], int(sys.argv[2])
torch.manual_seed(seed)
torch.set_num_threads(1)
sys.setswitchinterval(1e-5)


def make(n=64):
    p = torch.nn.Parameter(torch.randn(n, n, dtype=torch.float64))
    norm = nperf.Norm("n", [nperf.Part("w", axis=0)])
    return p, nperf.SGD([("w", p)], lr=0.01, momentum=0.9, backend=backend, symmetries=[norm])


def rounding(readout):
    law = readout["n"]
    return float((law.rounding.abs() / (law.charge + 1)).max())


def train(p, optimizer, n_steps):
    for _ in range(n_steps):
        p.grad = torch.randn_like(p)
        optimizer.step()


class Beside:
    '''Calls something again and again in another thread, from before the first step on.'''

    def __init__(self, call):
        self.call, self.n, self.error, self.ended = call, 0, None, False
        self.gate = threading.Barrier(2)
        self.thread = threading.Thread(target=self.run)

    def run(self):
        self.gate.wait()
        try:
            while not self.ended or self.n == 0:
                self.call()
                self.n += 1
        except BaseException as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        self.gate.wait()
        return self

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()
        if self.error is not None:
            raise self.error
"""

READ = """
p, optimizer = make()
worst, steps = [0.0], []

def read():
    readout = optimizer.readout()
    worst[0] = max(worst[0], rounding(readout))
    steps.append(readout.step)

with Beside(read) as beside:
    train(p, optimizer, 500 if backend == "cpu" else 100)
assert worst[0] < 1e-12, worst
assert steps == sorted(steps)
assert rounding(optimizer.readout()) < 1e-12
assert optimizer.step_count == optimizer.readout().step == (500 if backend == "cpu" else 100)
"""

FIRST = """
for _ in range(40):
    p, optimizer = make(200)
    p.grad = torch.randn_like(p)
    with Beside(optimizer.readout):
        train(p, optimizer, 3)
    assert rounding(optimizer.readout()) < 1e-12
    assert optimizer.step_count == 3
"""

SAVE = """
p, optimizer = make(16)
saved = []

def save():
    with optimizer.paused():
        saved.append(copy.deepcopy((p.detach(), optimizer.state_dict())))
    time.sleep(0.001)

with Beside(save):
    train(p, optimizer, 400)
for weights, state in saved[:: max(1, len(saved) // 20)]:
    q, other = make(16)
    with torch.no_grad():
        q.copy_(weights)
    other.load_state_dict(state)
    train(q, other, 2)
    assert rounding(other.readout()) < 1e-12
"""

RESET = """
p, optimizer = make(16)
kept = copy.deepcopy(optimizer.state_dict())

def disturb():
    optimizer.reset_measurement()
    copy.deepcopy(optimizer)
    optimizer.state_dict()
    with optimizer.paused():
        optimizer.load_measurement(optimizer.state_dict()["measurement"])
    assert rounding(optimizer.readout()) < 1e-12

with Beside(disturb):
    train(p, optimizer, 300)
assert rounding(optimizer.readout()) < 1e-12
"""

RECORD = """
import tempfile
path = tempfile.mkdtemp() + "/record.zarr"
p, optimizer = make(8)
with nperf.Recorder(optimizer, path) as recorder:
    def read():
        optimizer.readout()
        recorder.flush()
    with Beside(read):
        train(p, optimizer, 400)
assert nperf.open_record(path).steps.tolist() == list(range(401))
"""

SIGNAL = """
import itertools, os, signal
p, optimizer = make(128)
train(p, optimizer, 2)
found = []

def handler(*_):
    found.append(rounding(optimizer.readout()))
    optimizer.state_dict()

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.003)
train(p, optimizer, 300 if backend == "cpu" else 100)
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(found) > 10
assert max(found) < 1e-12, max(found)
assert rounding(optimizer.readout()) < 1e-12
"""

PROGRAMS = {"read": READ, "first": FIRST, "save": SAVE, "reset": RESET, "record": RECORD, "signal": SIGNAL}


def run(program: str, backend: str, seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SET_UP + PROGRAMS[program], backend, str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_thread_reads_is_of_one_step(program: str, backend: str) -> None:
    run(program, backend, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 13))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_many_seeds(program: str, backend: str, seed: int) -> None:
    run(program, backend, seed)
