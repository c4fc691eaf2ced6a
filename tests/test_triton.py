"""The Triton engine without a GPU: its kernels executed by Triton's interpreter, and compiled ahead of time for GPUs.

The interpreter must be asked for before Triton is imported, and kernels cannot be compiled beside it. So the engines'
tests (test_engines.py, which then have the engine "triton") run in a process of their own.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from test_engines import DTYPES, INTERPRETED, TENSORS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from noetherperf import Norm, Part
from noetherperf.engines import OnDevice, tiling
from noetherperf.engines.backends import BACKENDS
from noetherperf.engines.gpu import MOMENTUM, NESTEROV
from noetherperf.engines.reference import ReferenceEngine
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules import hyper, laws
from noetherperf.rules.moments import Moment
from noetherperf.rules.sgd import Hyper
from noetherperf.triton_kernels import launch, plan, step
from noetherperf.triton_kernels import laws as triton_laws

ROOT = Path(__file__).parents[1]

# ---- the interpreter -------------------------------------------------------------------------------------------------

STEP = "test_step_moments_and_laws"
# numpy, which the interpreter computes with, warns where a GPU goes on with inf and NaN
QUIET = ["-W", "ignore:invalid value:RuntimeWarning", "-W", "ignore:overflow:RuntimeWarning"]
SOME = ["bias misaligned", "column", "prime", "vector", "chunk plus", "convolution", "transposed gradient", "volume"]


def interpret(*arguments: str) -> int:
    """Run engines' tests in the interpreter; how many passed, all of those asked for."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", *QUIET]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    return int(passed)


@pytest.fixture
def interpreted(record_property: Callable[[str, object], None]) -> Callable[..., int]:
    """`interpret`; the run's closing lines name the engine that it executes."""
    record_property("engine", "triton")
    return interpret


def test_tensors_of_some_layouts(interpreted: Callable[..., int]) -> None:
    """Each in another dtype."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    names = [f"{STEP}[triton-{dtypes[i % len(dtypes)]}-{tensor}]" for i, tensor in enumerate(SOME)]
    assert interpreted(*(f"tests/test_engines.py::{name}" for name in names)) == len(SOME)


def test_a_skipped_step(interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", "triton-2.0 and overflows") == 1


SINES = """
import numpy as np, torch, triton, triton.language as tl
from noetherperf.triton_kernels.laws import sin_cos

@triton.jit
def kernel(x_ptr, sine_ptr, cosine_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    sine, cosine = sin_cos(tl.load(x_ptr + at))
    tl.store(sine_ptr + at, sine)
    tl.store(cosine_ptr + at, cosine)

x = torch.cat([torch.logspace(-8, 5, 448, dtype=torch.float64), torch.arange(64, dtype=torch.float64) * np.pi / 2])
sine, cosine = torch.empty_like(x), torch.empty_like(x)
kernel[(1,)](x, sine, cosine, len(x))
errors = [np.abs(found.numpy() - exact(x.numpy().astype(np.longdouble)))
          for found, exact in ((sine, np.sin), (cosine, np.cos))]
relative = errors[0][:200] / x[:200].numpy()  # near zero sin x is to have x's precision
print(float(max(map(np.max, errors))), float(relative.max()))
"""


def test_sines_for_angles_of_any_size(tmp_path: Path) -> None:
    file = tmp_path / "sines.py"  # Triton reads kernels from their source
    file.write_text(SINES)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, file], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    absolute, relative = map(float, done.stdout.split())
    assert absolute < 2e-15
    assert relative < 1e-15


@pytest.mark.slow
def test_models_flags_and_scales(interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", f"triton and not {STEP}") >= 11


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [str(dtype).removeprefix("torch.") for dtype in DTYPES])
def test_every_tensor_in_every_dtype(dtype: str, interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", f"{STEP} and triton-{dtype}") == len(TENSORS)


# ---- what mirrors what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TENSOR", "VIEW", "TILE", "SPAN", "HYPER"])
def test_rows_have_the_tables_fields_in_order(name: str) -> None:
    names = getattr(tiling, name).names
    assert getattr(plan, name.title())._fields == tuple(field for field in names if field != "padding")


def test_moments_and_coefficients_are_in_one_order() -> None:
    assert [name.upper() for name in step.Moments._fields] == [moment.name for moment in Moment]
    assert step.Coefficients._fields == hyper.Coefficients._fields
    assert triton_laws.Transition._fields == laws.Transition._fields
    assert triton_laws.FlowTransition._fields == laws.FlowTransition._fields
    assert [getattr(triton_laws, state.name).value for state in laws.State] == list(laws.State)
    assert tiling.TRITON.span_segments == (launch.SHORT_SPAN.value, launch.LONG_SPAN.value)


# ---- machine code ----------------------------------------------------------------------------------------------------

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="kernels cannot be compiled beside the interpreter")

POINTERS = {"first": "*u8", "fresh": "*u8", "pending": "*u8"} | dict.fromkeys(
    ["workspace", "moments", "translations", "norms", "propagators", "clock"], "*fp64"
)
TABLES = ["tensors", "dims", "views", "tiles", "spans", "scalars", "lrs", "hypers", "addresses"]
SM = {arch: GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
GFX942 = GPUTarget("hip", "gfx942", 64)

MATRIX = (launch.RUNS, launch.ROWS, launch.WIDE, launch.NARROW, launch.VIEWED)
KINDS = {
    "runs": (launch.RUNS,),
    "rows": MATRIX,
    "columns": (launch.RUNS, launch.COLUMNS, launch.WIDE, launch.VIEWED),
    "both": (*MATRIX, launch.BOTH),
    "strided": (*MATRIX, launch.BOTH, launch.COLUMNS, launch.STRIDED),
}


def compiled(kernel: Any, constants: dict[str, Any], target: GPUTarget, **options: int) -> Any:
    signature = {
        name: "constexpr" if name in constants else "*i64" if name in TABLES else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options=options)


def stage_1(dtype: torch.dtype, mode: int, kinds: str, target: GPUTarget) -> Any:
    code = tiling.DTYPES[dtype]
    bits = sum(kind.value for kind in KINDS[kinds])
    constants = {"DTYPE": code, "MODE": mode, "KINDS": bits, "SCALED": False}
    return compiled(
        launch.stage_1, constants, target, **launch.options(code, mode, bits, target.warp_size, target.backend == "hip")
    )


def machine_code(kernel: Any, tmp_path: Path) -> tuple[int, int, str]:
    """Registers, bytes of stack, and the instructions, by the cuobjdump that comes with Triton."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(option: str) -> str:
        return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    found = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert found is not None
    return int(found[1]), int(found[2]), dump("-sass")


def check_stage_1(dtype: torch.dtype, mode: int, kinds: str, arch: int, registers: int, tmp_path: Path) -> None:
    """No stack, so no spills; 16-byte loads of p, g, v and stores of p, v in each way to walk; registers in bounds."""
    used, stack, code = machine_code(stage_1(dtype, mode, kinds, SM[arch]), tmp_path)
    loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128\b", code)) for op in ("LDG", "STG"))
    print(f"sm_{arch} {dtype} mode {mode}: {used} registers, {stack} B stack, {loads} and {stores} 128-bit accesses")
    walked = [kind for kind in KINDS[kinds] if kind in (launch.ROWS, launch.COLUMNS, launch.BOTH)]
    n_walks = 1 + len(walked) * (2 if launch.NARROW in KINDS[kinds] else 1)
    assert used <= registers
    assert stack == 0
    assert loads >= 3 * n_walks
    assert stores >= 2 * n_walks


@not_interpreted
@pytest.mark.parametrize(
    ("dtype", "kinds", "registers"), [(torch.float32, "rows", 128), (torch.bfloat16, "runs", 128)], ids=str
)
def test_machine_code(dtype: torch.dtype, kinds: str, registers: int, tmp_path: Path) -> None:
    check_stage_1(dtype, MOMENTUM, kinds, 90, registers, tmp_path)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("arch", SM)
@pytest.mark.parametrize(
    ("dtype", "mode", "kinds", "registers"),
    [
        (torch.float32, MOMENTUM, "runs", 128),
        (torch.float32, MOMENTUM, "rows", 128),
        (torch.float32, MOMENTUM, "columns", 128),
        (torch.float32, MOMENTUM, "both", 128),
        (torch.float32, NESTEROV, "both", 168),
        (torch.float32, MOMENTUM, "strided", 168),
        (torch.bfloat16, MOMENTUM, "rows", 168),
        (torch.bfloat16, MOMENTUM, "columns", 200),
        (torch.bfloat16, MOMENTUM, "both", 255),
        (torch.bfloat16, NESTEROV, "both", 255),
        (torch.float16, MOMENTUM, "both", 255),
        (torch.float64, MOMENTUM, "both", 168),
    ],
    ids=str,
)
def test_machine_code_of_every_kind(
    arch: int, dtype: torch.dtype, mode: int, kinds: str, registers: int, tmp_path: Path
) -> None:
    check_stage_1(dtype, mode, kinds, arch, registers, tmp_path)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("arch", SM)
def test_machine_code_of_stage_2(arch: int, tmp_path: Path) -> None:
    """No stack: nothing is spilled, and sines need no table."""
    used, stack, _ = machine_code(compiled(launch.stage_2, {"MEASURING": False}, SM[arch], num_warps=4), tmp_path)
    print(f"sm_{arch} stage 2: {used} registers, {stack} B stack")
    assert used <= 128
    assert stack == 0


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_machine_code_for_amd(dtype: torch.dtype) -> None:
    code = stage_1(dtype, MOMENTUM, "both", GFX942).asm["amdgcn"]
    figures = {name: int(n) for name, n in re.findall(r"\.(vgpr\w*|private_segment_fixed_size):\s*(\d+)", code)}
    print(f"gfx942 {dtype}: {figures}")
    assert len(re.findall(r"(?:global|buffer)_load_dwordx4", code)) >= 15
    assert len(re.findall(r"(?:global|buffer)_store_dwordx4", code)) >= 10
    assert figures["vgpr_spill_count"] == figures["private_segment_fixed_size"] == 0
    assert figures["vgpr_count"] <= 264
    compiled(launch.stage_2, {"MEASURING": True}, GFX942, num_warps=2)


# ---- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_backend_says_so() -> None:
    assert BACKENDS["triton"].missing() == "torch finds no CUDA or ROCm device"
    assert list(BACKENDS).index("cuda") < list(BACKENDS).index("triton") < list(BACKENDS).index("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """A few steps beside the reference engine on the same device; then the same step in a CUDA graph."""
    from noetherperf.engines.triton import TritonEngine

    shapes = [(523, 771), (64, 64), (300, 7, 3, 3), (77,), (131_101,)]
    names = [f"w{i}" for i in range(len(shapes))]
    parts = [Part(name, axis) for name, shape in zip(names, shapes, strict=True) for axis in range(min(2, len(shape)))]
    measured = make_plan([Norm(f"{part}", [part]) for part in parts], names, shapes)
    hypers, first = [Hyper(0.1, momentum=0.9, weight_decay=0.01)], [False] * len(shapes)
    lr = torch.tensor(0.1, device="cuda")
    results = []
    for make in (ReferenceEngine, TritonEngine):
        torch.manual_seed(0)
        p, g, v = ([torch.randn(s, device="cuda").to(dtype) for s in shapes] for _ in range(3))
        measurement = Measurement.empty(measured, "cuda")
        engine = make(measured, p, names, [0] * len(p), measurement)
        engine.measure(v)
        measurement.start(measured, [True] * len(p))
        for on_device in (OnDevice([None]), OnDevice([lr], None, torch.zeros((), device="cuda"))):
            engine.admit(g)
            engine.step(g, v, hypers, first, on_device)
        if make is TritonEngine:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                engine.admit(g)
                engine.step(g, v, hypers, first, OnDevice([None]))
            graph.replay()
            graph.replay()
        else:
            for _ in range(2):
                engine.admit(g)
                engine.step(g, v, hypers, first, OnDevice([None]))
        results.append([*p, *v, *measurement.tensors()])
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    for expected, actual in zip(*results, strict=True):
        scale = expected.double().abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
