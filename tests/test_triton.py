"""The Triton engine without a GPU: its kernels executed by Triton's interpreter, and compiled ahead of time for GPUs.

The interpreter must be asked for before Triton is imported, and kernels cannot be compiled beside it. So the engines'
tests (test_engines.py, which then have the engine "triton") run in a process of their own.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
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
from noetherperf.engines.reference import ReferenceEngine
from noetherperf.engines.rows import COMPONENT, GROUP, components
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules import adam, sgd
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.given import GIVEN, GivenOptions
from noetherperf.rules.moments import Operand
from noetherperf.rules.rule import Rule
from noetherperf.rules.sgd import SGD, Hyper
from noetherperf.triton_kernels import moments, options, plan, rows, rules, spans
from noetherperf.triton_kernels.stage_1 import stage_1
from noetherperf.triton_kernels.stage_2 import stage_2

ROOT = Path(__file__).parents[1]
RULES = BACKENDS["triton"].rules or ()
STEPS: dict[str, tuple[Rule[Any], int]] = {
    "plain": (SGD, sgd.Variant.PLAIN),
    "idle": (SGD, sgd.Variant.IDLE),
    "momentum": (SGD, sgd.Variant.MOMENTUM),
    "nesterov": (SGD, sgd.Variant.NESTEROV),
    "adam": (ADAM, adam.Variant.PLAIN),
    "amsgrad": (ADAM, adam.Variant.AMSGRAD),
    "given": (GIVEN, 0),
}
of_every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@cache
def constants_of(rule: Rule[Any]) -> rules.Constants:
    return rules.constants(rule, *components(rule))


# ---- the interpreter -------------------------------------------------------------------------------------------------

STEP = "test_step_moments_and_laws"
# numpy, which the interpreter computes with, warns where a GPU goes on with inf and NaN
QUIET = ["-W", "ignore:invalid value:RuntimeWarning", "-W", "ignore:overflow:RuntimeWarning"]
SOME = {
    "sgd": [
        "bias misaligned",
        "column",
        "prime",
        "vector",
        "chunk plus",
        "convolution",
        "transposed gradient",
        "volume",
    ],
    "adam": ["transposed gradient", "vector", "prime", "column"],
    "given": ["vector", "column"],
}


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
    names = [
        f"{STEP}[{rule}-triton-{dtypes[i % len(dtypes)]}-{tensor}]"
        for rule, some in SOME.items()
        for i, tensor in enumerate(some)
    ]
    assert interpreted(*(f"tests/test_engines.py::{name}" for name in names)) == len(names)


def test_a_skipped_step(interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", "triton-2.0 and overflows") == 1


COLUMNS = """
import torch, triton, triton.language as tl
from noetherperf.triton_kernels.slices import n_side_by_side, side_by_side

@triton.jit
def kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, 4)
    m = ()
    for i in tl.static_range(N):
        m = m + (tl.load(x_ptr + i * 4 + at),)
    W: tl.constexpr = n_side_by_side(N)
    tl.store(y_ptr + at[:, None] * W + tl.arange(0, W)[None, :], side_by_side(m, N))

for n in range(1, 12):
    width = n_side_by_side(n)
    x, y = torch.randn(n, 4), torch.empty(4, width)
    kernel[(1,)](x, y, n)
    assert width < 2 * n, n
    assert torch.equal(y[:, :n], x.T), n
print("any number")
"""


def test_any_number_of_moments_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "columns.py"  # Triton reads kernels from their source
    file.write_text(COLUMNS)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, file], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "any number\n"


@pytest.mark.slow
def test_models_flags_and_scales(interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", f"triton and not {STEP}") >= 39


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [str(dtype).removeprefix("torch.") for dtype in DTYPES])
@of_every_rule
def test_every_tensor_in_every_dtype(rule: Rule[Any], dtype: str, interpreted: Callable[..., int]) -> None:
    assert interpreted("tests/test_engines.py", "-k", f"{STEP} and {rule.name}-triton-{dtype}") == len(TENSORS)


# ---- what mirrors what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (tiling.TENSOR, plan.Tensor),
        (tiling.VIEW, plan.View),
        (tiling.TILE, plan.Tile),
        (tiling.SPAN, plan.Span),
        (GROUP, rows.Group),
    ],
    ids=["tensor", "view", "tile", "span", "group"],
)
def test_rows_have_the_tables_fields_in_order(table: np.dtype[Any], row: Any) -> None:
    assert table.names is not None
    assert row._fields == tuple(field for field in table.names if field != "padding")


def test_a_row_of_dims_has_its_words() -> None:
    assert tiling.DIM.itemsize == 8 * plan.N_DIM_WORDS.value


@of_every_rule
def test_components_are_those_of_the_table(rule: Rule[Any]) -> None:
    table, driving = components(rule)
    fields = [field.name for field in dataclasses.fields(rules.Component)]
    assert fields == [name for name in COMPONENT.names or () if name not in ("n_moments", "padding")]
    for row, component in zip(table, constants_of(rule).components, strict=True):
        own = {name: getattr(component, name) for name in fields}
        assert own.pop("moments") == tuple(driving[row["moments"] :][: row["n_moments"]])
        assert own == {name: row[name] for name in own}


@of_every_rule
def test_constants_are_those_of_the_rule(rule: Rule[Any]) -> None:
    constants = constants_of(rule)
    assert [field.upper() for field in moments.Operands._fields] == [x.name for x in Operand if x != Operand.ONE]
    named = [x.name.lower() for x in Operand if x != Operand.ONE] + ["one"]  # which is the last, -1
    assert [(named[a], named[b]) for a, b in constants.moments] == [
        (pair.a.name.lower(), pair.b.name.lower()) for pair in rule.moments
    ]
    assert [rule.moments[i].a for i in range(constants.n_charges)] == [Operand.P_NEW] * 2
    assert tiling.TRITON.span_segments == (spans.SHORT_SPAN.value, spans.LONG_SPAN.value)


@pytest.mark.parametrize(
    ("name", "options", "n_read"),
    [
        ("plain", Hyper(0.1), 0),
        ("idle", Hyper(0.1), 1),
        ("momentum", Hyper(0.1, momentum=0.9), 1),
        ("nesterov", Hyper(0.1, momentum=0.9, nesterov=True), 1),
        ("adam", AdamOptions(0.1), 2),
        ("amsgrad", AdamOptions(0.1, amsgrad=True), 3),
        ("given", GivenOptions(0.1), 1),
    ],
    ids=list(STEPS),
)
def test_variants_sum_read_and_write_what_the_rule_says(name: str, options: Any, n_read: int) -> None:
    rule, variant = STEPS[name]
    constants, has_buffer, of_group = constants_of(rule), n_read > 0, rule.variant(options)
    assert variant == (dict(constants.idle).get(of_group, of_group) if has_buffer else of_group)
    step = rules.step(rule, variant)
    assert len(step.moments) == constants.taken[variant] == rule.n_taken(options, has_buffer)
    assert step.n_moments == len(constants.moments)
    assert step.n_written == rule.n_written(options)
    assert step.n_read == n_read


# ---- machine code ----------------------------------------------------------------------------------------------------

not_interpreted = pytest.mark.skipif(INTERPRETED, reason="kernels cannot be compiled beside the interpreter")

POINTERS = {"first": "*i32", "given_ages": "*u8", "ages": "*u8", "chosen": "*i32"} | dict.fromkeys(
    ["rows", "workspace", "moments", "translations", "norms", "propagators", "clock"], "*fp64"
)
TABLES = ["tensors", "dims", "views", "tiles", "spans", "scalars", "groups", "addresses"]
SM = {arch: GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
GFX942 = GPUTarget("hip", "gfx942", 64)

MATRIX = (options.RUNS, options.ROWS, options.WIDE, options.NARROW, options.VIEWED)
KINDS = {
    "runs": (options.RUNS,),
    "rows": MATRIX,
    "columns": (options.RUNS, options.COLUMNS, options.WIDE, options.VIEWED),
    "both": (*MATRIX, options.BOTH),
    "strided": (*MATRIX, options.BOTH, options.COLUMNS, options.STRIDED),
}


def compiled(kernel: Any, rule: Rule[Any], constants: dict[str, Any], target: GPUTarget, **how: int) -> Any:
    constants = {"RULE": constants_of(rule), **constants}
    signature = {
        name: "constexpr" if name in constants else "*i64" if name in TABLES else POINTERS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options=how)


def compiled_stage_1(name: str, dtype: torch.dtype, kinds: str, target: GPUTarget) -> Any:
    rule, variant = STEPS[name]
    code, step, kernels = tiling.DTYPES[dtype], rules.step(rule, variant), rules.module_of(rule)
    bits = sum(kind.value for kind in KINDS[kinds])
    hip = target.backend == "hip"
    functions = {"COEFFICIENTS": kernels.coefficients, "UPDATE": kernels.update}
    constants = {"DTYPE": code, "STEP": step, "KINDS": bits, "STAGES": options.n_stages(hip), **functions}
    how = options.options(code, step, bits, target.warp_size, hip)
    return compiled(stage_1, rule, constants, target, **how)


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


def n_walks(kinds: str) -> int:
    """How often a kernel for these kinds has the update of a vector: once for runs, and for each way to sum."""
    ways = [kind for kind in KINDS[kinds] if kind in (options.ROWS, options.COLUMNS, options.BOTH)]
    return 1 + len(ways) * (2 if options.NARROW in KINDS[kinds] else 1)


def accesses(name: str, kinds: str, loads: str, stores: str, code: str) -> bool:
    """Whether vectors of p, g and buffers are loaded, and of p and buffers stored, in each walk."""
    step = rules.step(*STEPS[name])
    n_loads, n_stores = len(re.findall(loads, code)), len(re.findall(stores, code))
    walks = n_walks(kinds)
    return n_loads >= (2 + step.n_read) * walks and n_stores >= (1 + step.n_written) * walks


def check_stage_1(name: str, dtype: torch.dtype, kinds: str, arch: int, registers: int, tmp_path: Path) -> None:
    """No stack, so no spills; 128-bit loads and stores; registers in bounds; all but runs go through a pipeline."""
    used, stack, code = machine_code(compiled_stage_1(name, dtype, kinds, SM[arch]), tmp_path)
    print(f"sm_{arch} {name} {dtype} {kinds}: {used} registers, {stack} B stack")
    assert used <= registers
    assert stack == 0
    assert accesses(name, kinds, r"\b(?:LDG|LDGSTS)\.E\S*\.128\b", r"\bSTG\.E\S*\.128\b", code)
    in_flight = len(re.findall(r"\bLDGSTS\.E\S*\.128\b", code))  # each stage has its own, in the loop or before it
    assert in_flight >= options.n_stages(False) * (2 + rules.step(*STEPS[name]).n_read) * (n_walks(kinds) - 1)


@not_interpreted
@pytest.mark.parametrize(
    ("name", "dtype", "kinds", "registers"),
    [
        ("momentum", torch.float32, "rows", 128),
        ("momentum", torch.bfloat16, "runs", 128),
        ("adam", torch.float32, "columns", 128),
    ],
    ids=str,
)
def test_machine_code(name: str, dtype: torch.dtype, kinds: str, registers: int, tmp_path: Path) -> None:
    check_stage_1(name, dtype, kinds, 90, registers, tmp_path)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("arch", SM)
@pytest.mark.parametrize(
    ("name", "dtype", "kinds", "registers"),
    [
        ("momentum", torch.float32, "runs", 128),
        ("momentum", torch.float32, "rows", 128),
        ("momentum", torch.float32, "columns", 128),
        ("momentum", torch.float32, "both", 128),
        ("momentum", torch.float32, "strided", 128),
        ("nesterov", torch.float32, "both", 168),
        ("momentum", torch.bfloat16, "rows", 128),
        ("momentum", torch.bfloat16, "columns", 128),
        ("momentum", torch.bfloat16, "both", 168),
        ("nesterov", torch.bfloat16, "both", 200),
        ("momentum", torch.float16, "both", 168),
        ("momentum", torch.float64, "both", 128),
        ("adam", torch.float32, "rows", 128),
        ("adam", torch.float32, "both", 168),
        ("adam", torch.bfloat16, "rows", 128),
        ("adam", torch.bfloat16, "both", 255),
        ("amsgrad", torch.float32, "columns", 128),
        ("amsgrad", torch.float32, "strided", 168),
        ("amsgrad", torch.bfloat16, "both", 255),
        ("amsgrad", torch.float16, "strided", 255),
        ("adam", torch.float64, "both", 255),
        ("amsgrad", torch.float64, "both", 255),
        ("given", torch.bfloat16, "both", 200),
    ],
    ids=str,
)
def test_machine_code_of_every_kind(
    arch: int, name: str, dtype: torch.dtype, kinds: str, registers: int, tmp_path: Path
) -> None:
    check_stage_1(name, dtype, kinds, arch, registers, tmp_path)


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("arch", SM)
@of_every_rule
def test_machine_code_of_stage_2(rule: Rule[Any], arch: int, tmp_path: Path) -> None:
    """No stack: nothing is spilled."""
    used, stack, _ = machine_code(compiled(stage_2, rule, {"MEASURING": False}, SM[arch], num_warps=4), tmp_path)
    print(f"sm_{arch} {rule.name} stage 2: {used} registers, {stack} B stack")
    assert used <= 128
    assert stack == 0


@not_interpreted
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_machine_code_for_amd(name: str, dtype: torch.dtype) -> None:
    code = compiled_stage_1(name, dtype, "both", GFX942).asm["amdgcn"]
    figures = {key: int(n) for key, n in re.findall(r"\.(vgpr\w*|private_segment_fixed_size):\s*(\d+)", code)}
    print(f"gfx942 {name} {dtype}: {figures}")
    assert accesses(name, "both", r"(?:global|buffer)_load_dwordx4", r"(?:global|buffer)_store_dwordx4", code)
    assert figures["vgpr_spill_count"] == figures["private_segment_fixed_size"] == 0
    assert figures["vgpr_count"] <= 264


@not_interpreted
@pytest.mark.slow
@of_every_rule
def test_machine_code_of_stage_2_for_amd(rule: Rule[Any]) -> None:
    code = compiled(stage_2, rule, {"MEASURING": True}, GFX942, num_warps=2).asm["amdgcn"]
    assert "vgpr_spill_count: 0" in code


# ---- the backend -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_backend_says_so() -> None:
    assert BACKENDS["triton"].missing() == "torch finds no CUDA or ROCm device"
    assert list(BACKENDS).index("cuda") < list(BACKENDS).index("triton") < list(BACKENDS).index("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (SGD, Hyper(0.1, momentum=0.9, weight_decay=0.01)),
        (ADAM, AdamOptions(0.1, weight_decay=0.01, amsgrad=True)),
        (GIVEN, GivenOptions(0.1, decay=0.01)),
    ],
    ids=[rule.name for rule in (SGD, ADAM, GIVEN)],
)
def test_on_a_gpu(rule: Rule[Any], options: Any, dtype: torch.dtype) -> None:
    """A few steps beside the reference engine on the same device; then the same step in a CUDA graph."""
    from noetherperf.engines.triton import TritonEngine

    shapes = [(523, 771), (64, 64), (300, 7, 3, 3), (77,), (131_101,)]
    names = [f"w{i}" for i in range(len(shapes))]
    parts = [Part(name, axis) for name, shape in zip(names, shapes, strict=True) for axis in range(min(2, len(shape)))]
    measured = make_plan([Norm(f"{part}", [part]) for part in parts], names, shapes, rule)
    ages = [1] * len(shapes)
    lr = torch.tensor(0.1, device="cuda")
    results = []
    for make in (ReferenceEngine, TritonEngine):
        torch.manual_seed(0)
        p, g, *buffers = (
            [torch.randn(s, device="cuda").to(dtype) for s in shapes] for _ in range(2 + len(rule.buffers))
        )
        for of_all in buffers[1:]:
            of_all[:] = [x.abs() for x in of_all]
        measurement = Measurement.empty(measured, "cuda")
        engine = make(measured, p, names, [0] * len(p), measurement)
        engine.measure(buffers)
        measurement.start(measured, [True] * len(p))
        for on_device in (OnDevice([None]), OnDevice([lr], None, torch.zeros((), device="cuda"))):
            engine.admit(g)
            engine.step(g, buffers, [options], ages, on_device)
        if make is TritonEngine:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                engine.admit(g)
                engine.step(g, buffers, [options], ages, OnDevice([None]))
            graph.replay()
            graph.replay()
        else:
            for _ in range(2):
                engine.admit(g)
                engine.step(g, buffers, [options], ages, OnDevice([None]))
        results.append([*p, *chain(*buffers), *engine.measurement.tensors()])
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    for expected, actual in zip(*results, strict=True):
        scale = expected.double().abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)
