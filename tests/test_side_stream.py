"""The second stage on a stream beside the current one: who touches its memory afterwards has waited for it.

There is no GPU here. The CUDA kernels are emulated, and streams and events are stand-ins. Work on the side stream is
executed at random moments, at the latest when somebody waits for it, so results are wrong where a wait is missing. And
every access to memory of the second stage, by kernels or by torch, is compared with all others by vector clocks: two of
them on different streams must be ordered by events.
"""

import copy
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cuda_emulation
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import SYMMETRIES, make_net

import noetherperf as nperf
from noetherperf.engines import side_stream
from noetherperf.engines.backends import BACKENDS, KERNELS, Backend
from noetherperf.engines.cuda import CudaEngine
from noetherperf.engines.gpu import GpuEngine
from noetherperf.engines.side_stream import SideStream
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.meters import Meter

pytestmark = pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing()))

Clock = Counter[int]  # of each stream, by its address: how many of its operations are certainly over


class Stream:
    """A stand-in for torch.cuda.Stream. Work on another one than the current one is executed late."""

    def __init__(self, *_: Any) -> None:
        self.cuda_stream = device.new_address()
        device.streams[self.cuda_stream] = self
        self.waiting: list[Callable[[], None]] = []
        self.clock: Clock = Counter()

    def queue(self, work: Callable[[], None]) -> None:
        if self is device.current:
            work()
        else:
            self.waiting.append(work)

    def run(self, until: int) -> None:
        """Execute what was queued before the position `until`, counted from the stream's beginning."""
        while self.waiting and self.n_executed < until:
            self.n_executed += 1
            self.waiting.pop(0)()

    n_executed = 0

    @property
    def end(self) -> int:
        return self.n_executed + len(self.waiting)


class Event:
    """A stand-in for torch.cuda.Event and its base class."""

    stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        device.calls["record"] += 1
        self.stream, self.position, self.clock = stream, stream.end, Counter(stream.clock)

    def wait(self, stream: Stream) -> None:
        device.calls["wait"] += 1
        if self.stream is not None:
            stream.clock |= self.clock
            if stream is device.current:  # else the stream runs later than all that the host has run
                self.stream.run(self.position)


class Device:
    """Streams, what they access, and the emulated module that queues kernels on them."""

    current: Stream  # on which the host queues
    other: Stream  # of the user too

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.calls: Counter[str] = Counter()
        self.kept: dict[int, Tensor] = {}  # by the address of their storage; held, so that none is used again
        self.accesses: dict[tuple[int, int], int] = {}  # the last one, by storage and stream
        self.random = random.Random(0)

    def new_address(self) -> int:
        return 1000 + len(self.streams)

    def keep(self, x: Tensor, stream: Stream) -> None:
        assert stream is not self.current
        self.kept[x.untyped_storage().data_ptr()] = x

    def access(self, stream: Stream, storages: set[int]) -> None:
        """One operation on a stream; it may write all that it touches."""
        stream.clock[stream.cuda_stream] += 1
        for storage in storages & self.kept.keys():
            for address in self.streams:
                last = self.accesses.get((storage, address), 0)
                assert last <= stream.clock[address], "memory of the second stage is touched without a wait"
            self.accesses[storage, stream.cuda_stream] = stream.clock[stream.cuda_stream]

    def synchronize(self) -> None:
        for stream in self.streams.values():
            stream.run(stream.end)
            self.current.clock |= stream.clock

    def run_some(self) -> None:
        for stream in self.streams.values():
            if stream is not self.current and stream.waiting and self.random.random() < 0.02:
                stream.run(self.random.randint(stream.n_executed, stream.end))

    # ---- the emulated module ----

    def Engine(self, rule: str, addresses: dict[str, int], **sizes: int) -> Any:
        engine = cuda_emulation.load().Engine(rule, addresses, **sizes)
        held = set(addresses.values())

        class Queued:
            any_variant = engine.any_variant

            def launch(queued, launches: Any, inputs: dict[str, int], *, stream: int, **how: Any) -> None:
                here = self.streams[stream]
                stages = "".join(name for name in ("first", "second") if how.get(name, True))
                self.calls[f"{stages} {'aside' if here is not self.current else 'here'}"] += 1
                self.access(here, {self.storage_of(address) for address in {*held, *inputs.values()}})
                here.queue(lambda: engine.launch(launches, inputs, stream=0, **how))

        return Queued()

    def storage_of(self, address: int) -> int:
        """The kept storage that an address is in."""
        for begin, x in self.kept.items():
            if begin <= address <= begin + x.untyped_storage().nbytes():
                return begin
        raise AssertionError("the second stage has memory that the allocator is not told of")


class Watch(TorchDispatchMode):
    """Records torch's accesses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device.run_some()
        touched = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor) and x.layout == torch.strided
        }
        device.access(device.current, touched)
        return func(*args, **(kwargs or {}))


device: Device


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A backend "emulated" whose engines have a side stream, and "plain" without one."""
    global device
    device = Device()
    device.current, device.other = Stream(), Stream()

    @contextmanager
    def stream_of(stream: Stream) -> Iterator[None]:
        before, device.current = device.current, stream
        yield
        device.current = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch._C, "_CudaEventBase", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: device.current)
    monkeypatch.setattr(torch.cuda, "stream", stream_of)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: device.keep(x, stream))
    monkeypatch.setattr(CudaEngine, "_queue", lambda engine: device.current.cuda_stream)
    for name, module, side in (("emulated", device, True), ("plain", cuda_emulation.load(), False)):

        class Emulated(CudaEngine):
            has_side, its_module = side, module

            def __init__(self, *args: Any) -> None:
                super().__init__(*args, module=self.its_module)  # type: ignore[arg-type]

            def _make_side(self) -> SideStream | None:
                return SideStream(self.device) if self.has_side else None

        monkeypatch.setitem(BACKENDS, name, Backend(name, "cpu", lambda: None, Emulated, KERNELS))
    return device


# ---- sequences of steps and of all that reads ------------------------------------------------------------------------


class Training:
    """A net, its optimizer, and what can be done with them; every action returns the numbers that it shows."""

    def __init__(self, backend: str, kind: str) -> None:
        self.net = make_net("reference")
        self.backend, self.kind = backend, kind
        self.generator = torch.Generator().manual_seed(0)
        self.inner: Any = None
        self.optimizer: Any = self.make()

    def make(self) -> Any:
        named = list(self.net.named_parameters())
        if self.kind == "probe":
            self.inner = torch.optim.RMSprop(self.net.parameters(), lr=0.01, momentum=0.9, foreach=False)
            return nperf.Probe(self.inner, SYMMETRIES, named, backend=self.backend)
        if self.kind == "adam":
            return nperf.AdamW(named, lr=0.01, symmetries=SYMMETRIES, backend=self.backend)
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}
        return nperf.SGD(named, **options, symmetries=SYMMETRIES, backend=self.backend)

    def step(self) -> list[Tensor]:
        for p in self.net.parameters():
            p.grad = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
        (self.inner or self.optimizer).step()
        return [p.detach().clone() for p in self.net.parameters()]

    def step_without_a_gradient(self) -> list[Tensor]:
        self.step()
        for p in list(self.net.parameters())[:2]:
            p.grad = None
        (self.inner or self.optimizer).step()
        return []

    def step_with_transposed_gradients(self) -> list[Tensor]:
        for p in self.net.parameters():
            g = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
            p.grad = g.t().contiguous().t() if g.dim() == 2 else g
        (self.inner or self.optimizer).step()
        return []

    def read(self) -> list[Tensor]:
        readout = self.optimizer.readout()
        found = [torch.tensor([readout.step, readout.time])]
        for law in readout.values():
            found += [law.charge, law.initial, law.discrete.budget, law.discrete.defect, *law.moments.values()]
        return found

    def save(self) -> list[Tensor]:
        measured = self.optimizer.state_dict()["measurement"]
        return [x.clone() for x in tree_leaves(measured) if isinstance(x, Tensor)]

    def load(self) -> list[Tensor]:
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        return []

    def copy(self) -> list[Tensor]:
        if self.kind == "probe":
            return []
        self.net, self.optimizer = copy.deepcopy((self.net, self.optimizer))
        return []

    def pickled(self) -> list[Tensor]:
        if self.kind == "probe":
            return []
        self.net, self.optimizer = pickle.loads(pickle.dumps((self.net, self.optimizer)))
        return []

    def change_a_parameter(self) -> list[Tensor]:
        with torch.no_grad():
            next(self.net.parameters()).mul_(1.01)
        return []

    def move_a_parameter(self) -> list[Tensor]:
        """Another memory layout: the tables are made anew."""
        p = next(self.net.parameters())
        p.data = p.data.t().contiguous().t()
        return []

    def change_streams(self) -> list[Tensor]:
        """As a user should: the new one waits for the old one, but not for a stream that the user does not know."""
        device.current, device.other = device.other, device.current
        device.current.clock |= device.other.clock
        return []

    def start_anew(self) -> list[Tensor]:
        self.optimizer.reset_measurement()
        return []


ACTIONS = [name for name in vars(Training) if not name.startswith("_") and name != "make"]


def train(backend: str, kind: str, actions: list[str]) -> list[Tensor]:
    training = Training(backend, kind)
    found = []
    for action in actions:
        found += getattr(training, action)()
    return found + training.read()


@pytest.mark.parametrize("kind", ["sgd", "adam", "probe"])
@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_actions(kind: str, seed: int, aside: Device) -> None:
    """Bit for bit what the current stream alone gives, with every access in order."""
    chosen = random.Random(seed).choices(["step", "step", "read", *ACTIONS], k=30)
    plain = train("plain", kind, chosen)
    with Watch():
        late = train("emulated", kind, chosen)
    assert aside.calls["second aside"] >= chosen.count("step")
    for one, two in zip(plain, late, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("reader", ["read", "save", "copy", "pickled", "step", "change_a_parameter", "start_anew"])
def test_the_check_notices_a_missing_wait(reader: str, aside: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GpuEngine, "_join", lambda engine: None)
    with Watch(), pytest.raises(AssertionError, match="touched without a wait"):
        train("emulated", "sgd", ["step", reader])


def test_the_check_notices_a_missing_fork(aside: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, "fork", lambda side, work: work)
    with Watch(), pytest.raises(AssertionError, match="touched without a wait"):
        train("emulated", "sgd", ["step"])


# ---- where the second stage stays on the current stream --------------------------------------------------------------


def stages_of_a_step(aside: Device, optimizer: MeasuredOptimizer) -> Counter[str]:
    """What one more step queues."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    before = Counter(aside.calls)
    optimizer.step()
    return aside.calls - before


def test_a_measured_step_waits_forks_and_joins_once(aside: Device) -> None:
    optimizer = Training("emulated", "sgd").optimizer
    # waited for: the second stage before, and the first stage
    assert stages_of_a_step(aside, optimizer) == {"first here": 1, "second aside": 1, "record": 2, "wait": 2}


def test_a_step_that_measures_nothing_has_one_stream(aside: Device) -> None:
    optimizer = nperf.SGD(nn.Linear(4, 3).named_parameters(), lr=0.1, backend="emulated")
    assert stages_of_a_step(aside, optimizer)["firstsecond here"] == 1
    assert not aside.calls["second aside"]


def test_found_inf_is_read_on_the_current_stream(aside: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is memory of the scaler, which may write or free it when the step is queued."""
    monkeypatch.setattr(Meter, "is_host", False)  # as on a GPU: the host leaves it to the kernels
    optimizer = Training("emulated", "sgd").optimizer
    optimizer.found_inf = torch.tensor(0.0)
    assert stages_of_a_step(aside, optimizer) == {"firstsecond here": 1, "wait": 1}


def test_a_capture_and_all_after_it_have_one_stream(aside: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture must not wait for what is not captured, and nothing here sees a replay, which joins nothing."""
    training = Training("emulated", "sgd")
    training.step()
    engine: Any = training.optimizer._measuring.meters[0].engine
    before = Counter(aside.calls)
    aside.synchronize()  # as torch.cuda.graph begins
    with monkeypatch.context() as patched:
        patched.setattr(GpuEngine, "_capturing", lambda engine: True)
        training.step()
    assert aside.calls - before == {"firstsecond here": 1}
    engine._captured.append(None)
    training.step()
    assert aside.calls["second aside"] == 1


# ---- the option ------------------------------------------------------------------------------------------------------


def test_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    assert side_stream.VARIABLE == "NOETHERPERF_SIDE_STREAM"
    for value, is_wanted in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(side_stream.VARIABLE, value)
        assert side_stream.wanted() == is_wanted
    monkeypatch.setenv(side_stream.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"NOETHERPERF_SIDE_STREAM='yes' must be 1 .* or 0"):
        side_stream.wanted()
    monkeypatch.delenv(side_stream.VARIABLE)
    assert not side_stream.wanted()
