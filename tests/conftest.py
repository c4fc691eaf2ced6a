"""The state that every test starts from: known threads, known seeds, no screen. GPU tests are skipped without a GPU."""

import os
from collections import Counter
from collections.abc import Iterator

# Read once, when torch is imported: threads that wait asleep let several test processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from training import BACKENDS

try:
    import hypothesis
except ModuleNotFoundError:  # a machine with a GPU and without network runs the tests that do without
    pass
else:
    hypothesis.settings.register_profile("noetherperf", deadline=None, derandomize=True)
    hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=2000)  # others in each run
    hypothesis.settings.load_profile("noetherperf")

N_PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
N_THREADS = max(1, (os.cpu_count() or 1) // N_PROCESSES)


def execution(engine: str) -> str:
    """How this machine executes the kernels of an engine of the tests."""
    if engine.endswith("-stand-in"):
        return "by stand-in, lane by lane: this processor lacks the instruction set"
    if engine == "cuda-emulated":
        return "by emulation of CUDA's threads on the CPU"
    if engine == "triton" and not torch.cuda.is_available():
        return "in Triton's interpreter"
    return "natively"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report which kernels the tests executed, and how: a green run proves nothing about the others."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        counts.update(engine for name, engine in getattr(report, "user_properties", ()) if name == "engine")
    del counts["reference"]  # plain torch, which has none
    if counts:
        terminalreporter.section("kernels")
    for engine, n in sorted(counts.items()):
        terminalreporter.write_line(f"{engine.removesuffix('-stand-in'):15} {execution(engine)}: {n} tests passed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        engine = item.callspec.params.get("engine") if hasattr(item, "callspec") else None
        if isinstance(engine, str):
            item.user_properties.append(("engine", engine))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def known_state() -> Iterator[None]:
    """Every test begins with the same seed, dtype and threads, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(N_THREADS)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that can run here; a test whose parameters name backends gets those instead."""
    return str(request.param)
