"""What every test starts from: known threads, known seeds, no screen; and no GPU test where there is no GPU."""

import os
from collections.abc import Iterator

# Read once, when torch is imported: threads that wait asleep let several test processes share few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
