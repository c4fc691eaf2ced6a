"""Both GPU backends through the optimizer, on a real device: what test_engines.py with its tensors on the CPU misses.

Nothing here is run by a machine without a GPU, except by test_gpu_report.py, which rehearses some of it on a CPU.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from test_engines import TENSORS, arena
from torch import Tensor, nn

import noetherperf as nperf
from noetherperf import Norm, Part, Symmetry, Translation
from noetherperf.engines.backends import BACKENDS, resolve
from noetherperf.optim.measured import MeasuredOptimizer

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES: list[tuple[int, ...]] = [(523, 771), (64, 64), (77,), (30, 7, 3, 3), (1031, 19), (1, 5001)]
MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
CAPTURABLE: dict[str, Any] = {**ADAM, "capturable": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1, "weight_decay": 0.01},
    "momentum": MOMENTUM,
    "dampening": {**MOMENTUM, "dampening": 0.4, "maximize": True},
    "nesterov": {**MOMENTUM, "nesterov": True},
    "adam": ADAM,
    "amsgrad": {**ADAM, "amsgrad": True, "maximize": True},
}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    status = nperf.backends().get(request.param, "this version has no such backend")
    if status != "available":
        pytest.skip(f"{request.param}: {status}")
    return str(request.param)


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def symmetries_of(shapes: Sequence[tuple[int, ...]]) -> list[Symmetry]:
    """Rows, columns and whole tensors, under either law or both."""
    found: list[Symmetry] = []
    for i, shape in enumerate(shapes):
        if 0 in shape:
            continue
        for axis in [*range(min(len(shape), 2)), None]:
            found.append(Norm(f"norm {i} {axis}", [Part(f"w{i}", axis)]))
        if shape and i % 2 == 0:
            found.append(Translation(f"translation {i}", [Part(f"w{i}", 0)]))
    return found


def optimizer_of(named: Iterable[tuple[str, Tensor]], backend: str, **options: Any) -> MeasuredOptimizer:
    """AdamW for options with betas, else SGD."""
    kind = nperf.AdamW if "betas" in options else nperf.SGD
    if not BACKENDS[backend].steps(kind.rule):
        pytest.skip(f"{backend} has no kernels of {kind.rule.name}")
    return kind(named, backend=backend, **options)


class SteppedModel:
    """Parameters with gradients, the same in every model of a dtype, and an optimizer that measures them."""

    def __init__(self, backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(random(shape, dtype, self.generator)) for shape in SHAPES]
        self.new_gradients()
        named = [(f"w{i}", p) for i, p in enumerate(self.params)]
        self.optimizer = optimizer_of(named, backend, symmetries=symmetries_of(SHAPES), **(options or MOMENTUM))

    def new_gradients(self, scale: float = 1.0) -> None:
        """Other gradients where the old ones were."""
        for p in self.params:
            g = random(tuple(p.shape), p.dtype, self.generator) * scale
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    def everything(self) -> list[Tensor]:
        """All that steps change, on the CPU."""
        state = chain.from_iterable(slot.values() for slot in self.optimizer.state.values())
        found = [*self.params, *(p.grad for p in self.params if p.grad is not None)]
        found += [x for x in state if isinstance(x, Tensor)]
        readout = self.optimizer.readout()
        for law in readout.values():
            found += [law.charge, law.initial, law.defect, law.discrete.budget, law.flow.budget, *law.moments.values()]
        found.append(torch.tensor([readout.step, readout.time], dtype=torch.float64))
        return [x.detach().cpu() for x in found]


def assert_equal(one: SteppedModel, two: SteppedModel) -> None:
    """Bit for bit."""
    for a, b in zip(one.everything(), two.everything(), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["momentum", "adam"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_for_bit(backend: str, dtype: torch.dtype, options: str) -> None:
    models = [SteppedModel(backend, dtype, **OPTIONS[options]) for _ in range(2)]
    for model in models:
        for _ in range(5):
            model.optimizer.step()
            model.new_gradients()
    assert_equal(*models)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_laws_hold_to_rounding_over_many_steps(backend: str, dtype: torch.dtype, options: str) -> None:
    """The discrete law with its defect is an identity for any gradients, up to rounding of what is stored."""
    n_steps = 30
    model = SteppedModel(backend, dtype, **{**OPTIONS[options], "lr": 0.01})
    for _ in range(n_steps):
        model.optimizer.step()
        model.new_gradients()
    readout = model.optimizer.readout()
    assert readout.step == n_steps
    for name, law in readout.items():
        tensor = model.params[int(name.split()[1])]
        # Rounding moves every element by eps of itself a step; what a charge sums of |θ| and θ² bounds what that moves.
        n_elements = tensor.numel() / law.charge.numel()
        scale = 2.0 * tensor.detach().double().abs().max().item() ** (1 if name.startswith("translation") else 2)
        bound = n_steps * torch.finfo(dtype).eps * n_elements * scale
        terms = (law.discrete.free, law.discrete.forced, law.discrete.defect)
        sums = 1e-12 if dtype == torch.float64 else 64 * n_steps * torch.finfo(torch.float32).eps
        assert (law.rounding.abs() <= bound + sums * sum(x.abs() for x in terms)).all(), name
        assert not torch.equal(law.charge, law.initial)


@pytest.mark.parametrize("options", OPTIONS)
def test_agrees_with_the_reference_backend(backend: str, options: str) -> None:
    one, two = (SteppedModel(name, torch.float64, **OPTIONS[options]) for name in (backend, "reference"))
    for model in (one, two):
        for _ in range(10):
            model.optimizer.step()
            model.new_gradients()
    for a, b in zip(one.everything(), two.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def odd_problem(backend: str, dtype: torch.dtype, options: str) -> tuple[list[Tensor], MeasuredOptimizer]:
    """Every shape and layout of test_engines.py, misaligned and strided ones too, in one model; the reference's on the
    CPU, for a memory checker takes its time over every kernel."""
    device = "cpu" if backend == "reference" else DEVICE
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape, layout, grad_layout in TENSORS.values():
        tensors = []
        for kind in (layout, grad_layout):
            made = arena(shape, dtype, kind, generator)
            tensor = made.tensor
            tensors.append(made.storage.to(device).as_strided(shape, tensor.stride(), tensor.storage_offset()))
        p = tensors[0].requires_grad_()
        p.grad = tensors[1]
        params.append(p)
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    symmetries = symmetries_of([tuple(p.shape) for p in params])
    return params, optimizer_of(named, backend, symmetries=symmetries, **OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_checker_set_of_odd_shapes_and_layouts(backend: str, dtype: torch.dtype, options: str) -> None:
    """Small enough for compute-sanitizer; tensors of all layouts side by side."""
    (p, ours), (q, reference) = (odd_problem(name, dtype, options) for name in (backend, "reference"))
    for _ in range(2):
        ours.step()
        reference.step()
    eps = torch.finfo(dtype).eps
    for a, b in zip(p, q, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=4 * eps, atol=16 * eps)
    one, two = ours.readout(), reference.readout()
    for name in one:
        # the elements may differ by their rounding, and the charge is a sum of them or their squares
        rtol = 1e-10 if dtype == torch.float64 else 32 * eps
        n_elements = one[name].symmetry.parts[0]
        size = p[int(n_elements.parameter[1:])].numel() ** 0.5
        torch.testing.assert_close(one[name].charge.cpu(), two[name].charge, rtol=rtol, atol=rtol * 8 * (1.0 + size))


# ---- the device's ways ----------------------------------------------------------------------------------------------


def test_auto_prefers_cuda_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    available = [name for name in ("cuda", "triton") if nperf.backends().get(name) == "available"]
    assert available, nperf.backends()
    device = torch.device("cuda")
    for name in available:
        assert resolve("auto", device).name == name
        assert nperf.SGD([torch.ones(3, device=device, requires_grad=True)], lr=0.1).backend == name
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=lambda: "hidden"))
    assert resolve("auto", device).name == "reference"


def test_parameters_elsewhere_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f'backend="{backend}" steps parameters on cuda.*move the model to cuda'):
        nperf.SGD([torch.ones(3, requires_grad=True)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match='backend="cpu" steps parameters on cpu, but there are parameters on cuda'):
        nperf.SGD([torch.ones(3, device="cuda", requires_grad=True)], lr=0.1, backend="cpu")


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("inputs", ["host", "device lr", "scaler", "adam"])
def test_a_step_neither_waits_nor_allocates(backend: str, inputs: str, waiting_is_an_error: None) -> None:
    lr = torch.tensor(0.1, device="cuda") if inputs == "device lr" else 0.1
    model = SteppedModel(backend, torch.float32, **(ADAM if inputs == "adam" else {**MOMENTUM, "lr": lr}))
    if inputs == "scaler":
        model.optimizer.grad_scale = torch.tensor(1.0, device="cuda")  # type: ignore[attr-defined]
        model.optimizer.found_inf = torch.tensor(0.0, device="cuda")  # type: ignore[attr-defined]
    for _ in range(10):
        model.optimizer.step()
    torch.cuda.synchronize()

    def allocated() -> list[int]:
        device, host = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
        return [device["allocation.all.allocated"], host.get("num_host_alloc", 0)]

    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError):  # or this test could not fail
        model.params[0].sum().item()
    before = allocated()
    for _ in range(20):
        model.optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert allocated() == before


def test_two_kernels_a_step(backend: str) -> None:
    from bench.gpu.device import launches

    model = SteppedModel(backend, torch.float32)
    for _ in range(3):
        model.optimizer.step()
    counted = launches(model.optimizer.step)
    if counted is None:
        pytest.skip("the profiler sees no kernel at all on this machine")
    assert counted[0] <= 2
    assert counted[1] <= 1


def test_a_learning_rate_on_the_device(backend: str) -> None:
    """Changed between steps where it lies; powers of two, which float32 holds as they are."""
    here, there = (
        SteppedModel(backend, torch.float64, **{**MOMENTUM, "lr": lr}) for lr in (0.5, torch.tensor(0.5).cuda())
    )
    for _ in range(5):
        for model in (here, there):
            model.optimizer.step()
            model.new_gradients()
            model.optimizer.param_groups[0]["lr"] *= 0.5
    assert isinstance(there.optimizer.param_groups[0]["lr"], Tensor)
    assert_equal(here, there)


def test_a_scaler_skips_the_first_step(backend: str) -> None:
    """Which writes nothing, advances nothing and leaves the undampened step to the next one."""
    options = {**MOMENTUM, "dampening": 0.4, "fused": True}
    plain, scaled = (SteppedModel(backend, torch.float64, **options) for _ in range(2))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    scaler.scale(torch.ones((), device="cuda"))
    before = [p.detach().clone() for p in scaled.params]
    grads = [p.grad.clone() for p in scaled.params if p.grad is not None]
    for turn in range(5):
        scale = scaler.get_scale()
        for p, g in zip(scaled.params, grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(g * scale)
        if turn == 0:
            assert scaled.params[0].grad is not None
            scaled.params[0].grad[0, 0] = torch.inf
        scaler.step(scaled.optimizer)
        scaler.update()
        if turn == 0:
            assert all(torch.equal(p, old) for p, old in zip(scaled.params, before, strict=True))
            assert scaler.get_scale() < scale
        else:
            plain.optimizer.step()
    assert scaled.optimizer.readout().step == 4
    assert_equal(plain, scaled)


@pytest.mark.parametrize("options", [MOMENTUM, CAPTURABLE, {**CAPTURABLE, "amsgrad": True}], ids=str)
def test_a_captured_step_is_replayed(backend: str, options: dict[str, Any]) -> None:
    eager, captured = (SteppedModel(backend, torch.float32, **options) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured.optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for _ in range(3):
        eager.optimizer.step()
    for _ in range(4):
        for model in (eager, captured):
            model.new_gradients()
        eager.optimizer.step()
        graph.replay()
    captured.optimizer.step()  # and eagerly again
    eager.optimizer.step()
    assert_equal(eager, captured)
    assert captured.optimizer.readout().step == 8


@pytest.fixture
def side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOETHERPERF_SIDE_STREAM", "1")


def test_a_side_stream_changes_no_number(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with other work between them, readouts, a copy, and a capture."""
    models = []
    for value in ("0", "1"):
        monkeypatch.setenv("NOETHERPERF_SIDE_STREAM", value)
        model = SteppedModel(backend, torch.float32)
        busy = torch.randn(2048, 2048, device=DEVICE)
        found = []
        for step in range(12):
            model.optimizer.step()
            busy = (busy @ busy).sin()  # as a forward pass: the second stage runs beside it
            model.new_gradients()
            if step % 4 == 3:
                found += model.everything()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model.optimizer.step()
        for _ in range(3):
            graph.replay()
            model.optimizer.step()
        models.append([*found, *model.everything()])
    for a, b in zip(*models, strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_with_a_side_stream_neither_waits_nor_allocates(
    backend: str, side_stream: None, waiting_is_an_error: None
) -> None:
    test_a_step_neither_waits_nor_allocates(backend, "host", None)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_capturable_step_counts_on_the_device(backend: str, waiting_is_an_error: None) -> None:
    """Without waiting for it, also where a scaler has it skip a step; with the numbers of counts on the host."""
    host, there = (SteppedModel(backend, **ADAM, capturable=capturable, fused=True) for capturable in (False, True))
    found_inf = torch.tensor(1.0, device="cuda")
    for step in range(6):
        skipped = step == 3
        if not skipped:
            host.optimizer.step()
        torch.cuda.synchronize()
        there.optimizer.found_inf = found_inf * skipped  # type: ignore[attr-defined]
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first steps make tables
        there.optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        for model in (host, there):
            model.new_gradients()
    for a, b in zip(host.everything(), there.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore")  # torch's, about a graph with nothing in it
def test_a_step_that_counts_on_the_host_cannot_be_captured(backend: str) -> None:
    model = SteppedModel(backend, torch.float32, **ADAM)
    for _ in range(3):
        model.optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="set capturable=True in all parameter groups"), torch.cuda.graph(graph):
        model.optimizer.step()


@pytest.mark.filterwarnings("ignore")  # torch's, about a graph with nothing in it
def test_a_first_step_cannot_be_captured(backend: str) -> None:
    model = SteppedModel(backend, torch.float32)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="captured in a CUDA graph"), torch.cuda.graph(graph):
        model.optimizer.step()


def test_more_elements_than_32_bits_count(backend: str) -> None:
    """The last rows of a tensor of more than 2³¹ elements; all others stay zero."""
    shape, n_last = ((1 << 19) + 3, 1 << 12), 3
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of the device's memory")
    p, g = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    last = torch.randn(n_last, shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    g[-n_last:] = last.cuda()
    p.requires_grad_().grad = g
    optimizer = nperf.SGD([("w", p)], lr=0.5, symmetries=[Norm("rows", [Part("w", 0)])], backend=backend)
    optimizer.step()
    stored = p.detach()[-n_last:].cpu()
    assert torch.equal(stored, (-0.5 * last.float()).bfloat16())
    assert (
        int(torch.count_nonzero(p.detach()[: 1 << 18])) + int(torch.count_nonzero(p.detach()[1 << 18 : -n_last])) == 0
    )
    charge = optimizer.readout()["rows"].charge
    torch.testing.assert_close(charge[-n_last:], stored.double().square().sum(1), rtol=1e-5, atol=0.0)
    assert int(torch.count_nonzero(charge[:-n_last])) == 0
