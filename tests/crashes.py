"""Training that records and checkpoints, killed with SIGKILL at random moments, again and again.

    python tests/crashes.py --kills 60 [--seed 0]

After every kill a process of its own holds the record and the checkpoint against a run that nobody interrupted: the
record opens, its steps are 0, 1, 2, ... without one twice or missing, it is not behind the checkpoint, and every number
in it is the uninterrupted run's, bit for bit. At last the killed training is finished and its parameters and momentum
buffers are compared too.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from training import buffers, make_net, ours, train

import noetherperf as nperf
import noetherperf.record.layout
import noetherperf.record.writer

EVERY = 5  # steps between checkpoints
OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def begin() -> tuple[nn.Module, nperf.SGD]:
    net = make_net("cpu", torch.float32)
    return net, ours(net, "cpu", **OPTIONS)


def go_on(folder: Path, n_steps: int) -> tuple[nn.Module, nperf.SGD]:
    """Train up to a step from the last checkpoint, recording every step, as a user's script does."""
    noetherperf.record.writer.FLUSH_SECONDS = 0.05
    noetherperf.record.layout.CHUNK_VALUES = 8
    net, optimizer = begin()
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    with nperf.Recorder(optimizer, folder / "record", exists="resume"):
        while optimizer.step_count < n_steps:
            train(net, optimizer, range(optimizer.step_count, min(optimizer.step_count + EVERY, n_steps)))
            new = checkpoint.with_suffix(".new")
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, new)
            new.replace(checkpoint)
    return net, optimizer


def uninterrupted(folder: Path, n_steps: int) -> None:
    net, optimizer = begin()
    with nperf.Recorder(optimizer, folder / "whole"):
        train(net, optimizer, range(n_steps))


def verify(folder: Path) -> None:
    """Hold what a kill left behind against the uninterrupted run."""
    if not (folder / "record").exists():  # killed before there was one
        assert not (folder / "checkpoint.pt").exists()
        return
    record, whole = nperf.open_record(folder / "record"), nperf.open_record(folder / "whole")
    n_rows = len(record.steps)
    assert record.steps.tolist() == list(range(n_rows)), "a step is missing or there twice"
    if (folder / "checkpoint.pt").exists():
        measured = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["measurement"]
        assert n_rows - 1 >= int(measured["tensors"][0]["clock"][0]), "the record is behind the checkpoint"
    for name, values in whole.dataset.isel(step=slice(n_rows)).variables.items():
        np.testing.assert_array_equal(record.dataset[name].to_numpy(), values.to_numpy(), err_msg=str(name))


def finish(folder: Path) -> None:
    """Finish the killed training, and compare all of it with one that nobody interrupted."""
    n_steps = len(nperf.open_record(folder / "record").steps) + 2 * EVERY
    net, optimizer = go_on(folder, n_steps)
    verify(folder)
    other, peer = begin()
    train(other, peer, range(n_steps))
    for a, b in zip([*net.parameters(), *buffers(optimizer)], [*other.parameters(), *buffers(peer)], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def fork(work: Callable[[], object]) -> int:
    """Start a process; forking from one that has imported everything, but started no thread, saves importing it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    return child


def run(what: str, work: Callable[[], object]) -> None:
    _, status = os.waitpid(fork(work), 0)
    if status != 0:
        sys.exit(f"{what} failed")


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_many(folder: Path, n_kills: int, seed: int, n_steps: int) -> None:
    """Kill one process in five at any moment since its start, the others at any moment after a new checkpoint."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    run("the uninterrupted run", lambda: uninterrupted(folder, n_steps))
    for kill in range(n_kills):
        before = stamp(folder / "checkpoint.pt")
        child = fork(lambda: go_on(folder, n_steps))
        while kill % 5 and stamp(folder / "checkpoint.pt") == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(dice.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit("a training process ended by itself")
        run(f"verifying after kill {kill + 1}", lambda: verify(folder))
    run("finishing the training", lambda: finish(folder))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500, help="of the uninterrupted run, more than are reached")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kill_many(Path(folder), options.kills, options.seed, options.steps)
    print(f"{options.kills} kills: every record opened, no step twice or missing, resumed bit for bit")


if __name__ == "__main__":
    main()
