"""The CUDA engine on a CPU: its kernels under the sanitizers, and what the engine asks of its module.

That the kernels compute the right thing is tested in test_engines.py, engine "cuda-emulated".
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import cuda_emulation
import pytest
import torch

from noetherperf import Norm, Part, backends
from noetherperf.engines import OnDevice
from noetherperf.engines.backends import resolve
from noetherperf.engines.cuda import CudaEngine, covers
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.sgd import Hyper

pytestmark = pytest.mark.skipif(cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing()))

Launches = list[tuple[int, int, int, int]]

# Edges of vectors, rows and tiles, addresses that are no multiple of 16, and strides.
A_FEW = ["vector plus", "row"]
ALL_BUT_LARGE = [
    "chunk plus",
    "bias misaligned",
    "empty",
    "no rows",
    "scalar",
    "column",
    "transposed gradient",
    "prime",
    "vector minus",
    "chunk minus",
    "tall",
    "convolution",
    "channels last, plain gradient",
    "strided",
    "padded",
    "volume",
]


def run_sanitized(n_dtypes: int, *tensors: str) -> None:
    # The sanitizer finds the exceptions of what is loaded later only if their library is loaded as early.
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ comes without the address sanitizer's library")
    cuda_emulation.build(sanitize=True)
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation", str(n_dtypes), *tensors],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["clean"], done.stdout + done.stderr[-4000:]


def test_sanitizers_find_nothing() -> None:
    run_sanitized(1, *A_FEW)


@pytest.mark.slow
def test_sanitizers_find_nothing_in_other_shapes_and_layouts() -> None:
    run_sanitized(4, *A_FEW, *ALL_BUT_LARGE)


class Counting:
    """A module that passes on to the emulation what it is asked, and keeps it."""

    def __init__(self) -> None:
        self.asked: list[Launches] = []

    def Engine(self, *args: Any, **kwargs: Any) -> Any:
        engine = cuda_emulation.load().Engine(*args, **kwargs)

        class Kept:
            any_variant = engine.any_variant

            def launch(kept, launches: Launches, *args: Any, **kwargs: Any) -> None:
                self.asked.append(launches)
                engine.launch(launches, *args, **kwargs)

        return Kept()


def steps(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], strided: bool, hyper: Hyper) -> Launches:
    """The launches that one step asks for."""
    p = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    g = [x.t().contiguous().t() if strided and x.dim() == 2 else x.clone() for x in p]
    v = [torch.zeros_like(x) for x in p]
    names = [f"w{i}" for i in range(len(p))]
    plan = make_plan([Norm(name, [Part(name, 0)]) for name in names], names, shapes)
    module = Counting()
    engine = CudaEngine(plan, p, names, [0] * len(p), Measurement.empty(plan), module=cast(ModuleType, module))
    engine.admit(g)
    engine.step(g, [v], [hyper], [0] * len(p), OnDevice([None]))
    return module.asked[-1]


def test_one_launch_for_all_tensors_of_a_dtype_and_mode() -> None:
    shapes: list[tuple[int, ...]] = [(30, 40), (7,), (5, 3, 2)] * 20
    launches = steps(shapes, [torch.float32] * 60, False, Hyper(0.1, momentum=0.9))
    assert [(dtype, variant) for dtype, variant, _, _ in launches] == [(0, 1)]
    mixed = steps(shapes, [torch.float32, torch.bfloat16, torch.float32] * 20, False, Hyper(0.1))
    assert len(mixed) == 2
    with_strides = steps(shapes, [torch.float32] * 60, True, Hyper(0.1, momentum=0.9, nesterov=True))
    assert [variant for _, variant, _, _ in with_strides] == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 37), (3, 8)], ids=str)
def test_lanes_past_the_end_of_a_row_add_nothing(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """With ε = 0 the zeros there would add 0/0 to the sums."""
    generator = torch.Generator().manual_seed(0)
    p, g, m, n = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    plan = make_plan([Norm(f"{axis}", [Part("w", axis)]) for axis in (0, 1)], ["w"], [shape], ADAM)
    measurement = Measurement.empty(plan)
    engine = CudaEngine(plan, [p], ["w"], [0], measurement, module=cuda_emulation.load())
    engine.admit([g])
    engine.step([g], [[m], [n.abs_()], [None]], [AdamOptions(0.1, eps=0.0)], [3], OnDevice([None]))
    assert p.isfinite().all()
    assert measurement.moments.isfinite().all()
    rows, columns = measurement.moments.split(list(shape), dim=1)
    torch.testing.assert_close(rows.sum(1), columns.sum(1), rtol=1e-4, atol=1e-3)


def test_rows_outlive_tables_that_are_made_anew() -> None:
    """A parameter with another layout has the tables made anew; the options are as before, so nothing finds rows."""
    steps_made = []
    for changes in (False, True):
        p, g, v = (torch.arange(12.0).view(3, 4) for _ in range(3))
        plan = make_plan([Norm("w", [Part("w", 0)])], ["w"], [(3, 4)])
        measurement = Measurement.empty(plan)
        engine = CudaEngine(plan, [p], ["w"], [0], measurement, module=cuda_emulation.load())
        for _ in range(2):
            engine.admit([g])
            engine.step([g], [[v]], [Hyper(0.1, momentum=0.9)], [1], OnDevice([None]))
            if changes:
                p.data = p.t().contiguous().t()
        steps_made.append([p, v, *measurement.tensors()])
    for plain, changed in zip(*steps_made, strict=True):
        torch.testing.assert_close(plain, changed, rtol=1e-6, atol=1e-12)  # the rests of rounded sums are smaller


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("80-real,90-real,100-real,100-virtual", (8, 0), True),
        ("80-real,90-real,100-real,100-virtual", (8, 9), True),
        ("80-real,90-real,100-real,100-virtual", (9, 0), True),
        ("80-real,90-real,100-real,100-virtual", (12, 0), True),
        ("80-real,90-real,100-real,100-virtual", (7, 5), False),
        ("86-real", (8, 0), False),
        ("80-real", (9, 0), False),
        ("80", (9, 0), True),
        ("80-virtual", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f-real", (12, 0), False),
        ("native", (7, 0), True),
    ],
)
def test_devices_that_a_build_covers(architectures: str, capability: tuple[int, int], covered: bool) -> None:
    assert covers(architectures, capability) == covered


def test_a_named_backend_that_cannot_run_says_why() -> None:
    reason = backends()["cuda"]
    if reason == "available":
        with pytest.raises(ValueError, match="move the model to cuda"):
            resolve("cuda", torch.device("cpu"))
    else:
        with pytest.raises(RuntimeError, match=r'backend="cuda" cannot run here: .*; or use backend="auto"') as caught:
            resolve("cuda", torch.device("cpu"))
        assert reason in str(caught.value)


def test_each_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["noetherperf.engines.backends"]

    class Built:
        architectures = "90-real"
        n_found: int | None = 1

        def n_devices(self) -> int:
            if self.n_found is None:
                raise RuntimeError("no CUDA-capable device is detected")
            return self.n_found

    built = Built()
    monkeypatch.setitem(sys.modules, "noetherperf._cuda", built)
    monkeypatch.setattr("noetherperf._cuda", built, raising=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "noetherperf._cuda is not there" in backends()["cuda"]
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    built.n_found = None
    assert "no CUDA-capable device is detected" in backends()["cuda"]
    built.n_found = 1
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch built with CUDA" in backends()["cuda"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    assert "compute capability 75" in backends()["cuda"]
    assert "90-real" in backends()["cuda"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    assert backends()["cuda"] == "available"
    assert resolve("auto", torch.device("cuda")).name == "cuda"
