"""Steps that a CUDA graph can capture (capturable=True), on a CPU: its memory stands for the device's, and the CUDA
kernels are emulated.

Such a step reads counts of steps on the device, which alone knows how often a graph was replayed. tests/test_gpu.py
captures and replays.
"""

from typing import Any

import cuda_emulation
import pytest
import torch
from torch import Tensor, nn
from training import SYMMETRIES, make_net, train

import noetherperf as nperf
from noetherperf.engines.backends import BACKENDS, Backend
from noetherperf.engines.cuda import CudaEngine
from noetherperf.optim.counts import Counts
from noetherperf.optim.meters import Meter
from noetherperf.rules.adam import ADAM

pytestmark = pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing()))

OPTIONS: dict[str, dict[str, Any]] = {
    "decoupled": {"lr": 1e-2, "weight_decay": 0.1},
    "amsgrad": {"lr": 1e-2, "betas": (0.8, 0.9), "amsgrad": True, "maximize": True},
}


def emulated(*args: Any) -> CudaEngine:
    return CudaEngine(*args, module=cuda_emulation.load())


@pytest.fixture(autouse=True)
def emulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend "emulated", whose tensors the host may not read."""
    monkeypatch.setitem(BACKENDS, "emulated", Backend("emulated", "cpu", lambda: None, emulated, (ADAM,)))
    monkeypatch.setattr(Meter, "is_host", property(lambda meter: not meter.engine.reads_counts))


def made(net: nn.Module, backend: str = "emulated", *, capturable: bool = True, **options: Any) -> nperf.AdamW:
    # fused: else torch, and so noetherperf, refuses capturable=True on a CPU
    all_options = {"symmetries": SYMMETRIES, "fused": True, "capturable": capturable, **options}
    return nperf.AdamW(net.named_parameters(), backend=backend, **all_options)


def counts_of(optimizer: nperf.AdamW) -> Counts:
    counts = optimizer._measuring.counts
    assert counts is not None
    return counts


def steps_in_state(optimizer: nperf.AdamW) -> list[float]:
    return [slot["step"].item() for slot in optimizer.state.values()]


def numbers(optimizer: nperf.AdamW) -> list[Tensor]:
    """Parameters, torch's state, and all that a readout tells."""
    found = [p for group in optimizer.param_groups for p in group["params"]]
    found += [slot[key] for slot in optimizer.state.values() for key in sorted(slot)]
    readout = optimizer.readout()
    for law in readout.values():
        found += [law.charge, law.discrete.total, law.discrete.defect, law.flow.total, law.rounding]
        found += law.moments.values()
    return [*found, torch.tensor([readout.step, readout.time], dtype=torch.float64)]


def assert_alike(one: nperf.AdamW, two: nperf.AdamW, tolerance: float = 1e-12) -> None:
    """Both agree to the rounding of rows: torch's powers and Python's differ in the last bit."""
    for a, b in zip(numbers(one), numbers(two), strict=True):
        assert (a - b).abs().max() <= tolerance * (1.0 + b.abs().max())


def trained(backend: str = "emulated", steps: range = range(8), **options: Any) -> nperf.AdamW:
    net = make_net("reference")
    optimizer = made(net, backend, **options)
    train(net, optimizer, steps)
    return optimizer


@pytest.mark.parametrize("case", OPTIONS)
def test_steps_and_laws_are_those_of_counts_on_the_host(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    on_device = Counts.on_device

    def recorded(*args: Any) -> Tensor:
        asked.append(on_device(*args))
        return asked[-1]

    monkeypatch.setattr(Counts, "on_device", recorded)
    host = trained(capturable=False, **OPTIONS[case])
    assert not asked
    there = trained(**OPTIONS[case])
    assert [counts.tolist() for counts in asked] == [[float(step)] * 4 for step in range(8)]
    assert steps_in_state(there) == [8.0] * 4
    assert_alike(there, host)
    assert_alike(there, trained("reference", capturable=False, **OPTIONS[case]), 1e-10)


def test_replays_count_without_the_host() -> None:
    """As after replays, the host's counts are too small; the steps that follow are right, also when they are read."""
    net, other = make_net("reference"), make_net("reference")
    host, there = made(other, capturable=False), made(net)
    for begin, capturable in ((0, True), (3, True), (6, False), (8, True)):
        there.param_groups[0]["capturable"] = capturable
        train(other, host, range(begin, begin + 3))
        train(net, there, range(begin, begin + 3))
        if capturable:
            counts_of(there)._ages = counts_of(there)._ages - 2
    assert_alike(there, host)
    assert counts_of(there).exact().tolist() == [12] * 4


def test_parameters_that_come_late_have_counts_of_their_own() -> None:
    nets = [make_net("reference") for _ in range(2)]
    optimizers = [made(net, capturable=capturable) for net, capturable in zip(nets, (True, False), strict=True)]

    def without_fc2(step: int, net: nn.Module) -> None:
        for name, p in net.named_parameters():
            if name.startswith("fc2") and step in (0, 1, 4):
                p.grad = None

    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(7), before_step=without_fc2)
    assert steps_in_state(optimizers[0]) == [7.0, 7.0, 4.0, 4.0]
    assert_alike(optimizers[0], optimizers[1])


def test_several_groups_have_their_own_options() -> None:
    nets = [make_net("reference") for _ in range(2)]
    optimizers = []
    for net, capturable in zip(nets, (True, False), strict=True):
        fc1, fc2 = list(net.named_parameters())[:2], list(net.named_parameters())[2:]
        groups = [{"params": fc1, "lr": 1e-2}, {"params": fc2, "betas": (0.5, 0.9), "eps": 1e-4}]
        options: dict[str, Any] = {"symmetries": SYMMETRIES, "fused": True, "backend": "emulated"}
        optimizers.append(nperf.AdamW(groups, lr=3e-3, weight_decay=0.2, capturable=capturable, **options))
        train(net, optimizers[-1], range(6))
    assert_alike(optimizers[0], optimizers[1])


@pytest.mark.parametrize("when", [0, 2])
def test_a_skipped_step_counts_nothing_and_is_not_waited_for(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net("reference")
    optimizer = made(net)

    def scaler(step: int, net: nn.Module) -> None:
        optimizer.grad_scale = torch.tensor(1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(step == -1))  # type: ignore[attr-defined]

    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "item", lambda x: pytest.fail("a step reads a tensor on the device"))
        for step in [*range(when), -1, *range(when, 5)]:
            train(net, optimizer, range(step, step + 1), before_step=scaler)
    assert steps_in_state(optimizer) == [5.0] * 4
    assert optimizer.readout().step == 5
    assert_alike(optimizer, trained(steps=range(5), capturable=False))


def test_groups_that_are_not_all_capturable_count_on_the_host() -> None:
    net = make_net("reference")
    named = list(net.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "capturable": False}]
    options: dict[str, Any] = {"symmetries": SYMMETRIES, "fused": True, "backend": "emulated", "capturable": True}
    optimizer = nperf.AdamW(groups, lr=1e-2, **options)
    train(net, optimizer, range(4))
    assert_alike(optimizer, trained(steps=range(4), capturable=False, lr=1e-2))


def test_a_checkpoint_has_the_counts_of_the_device() -> None:
    optimizer = trained(steps=range(4))
    counts_of(optimizer)._ages = counts_of(optimizer)._ages - 2  # as after replays
    net = make_net("reference")
    with torch.no_grad():
        for p, q in zip(net.parameters(), optimizer.param_groups[0]["params"], strict=True):
            p.copy_(q)
    other = made(net)
    other.load_state_dict(optimizer.state_dict())
    train(net, other, range(4, 8))
    assert_alike(other, trained(steps=range(8), capturable=False))
