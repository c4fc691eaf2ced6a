"""The machine code of noetherperf._cuda, read ahead of time: registers, stack and how wide memory is accessed."""

import re
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

SPEC = find_spec("noetherperf._cuda")
TRITON = find_spec("triton")
CUOBJDUMP = Path(str(TRITON and TRITON.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="noetherperf._cuda was not built: no nvcc was found"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="there is no cuobjdump: triton, which brings one, is not here"),
]

DTYPES = {"Float32": 4, "Float64": 8, "BFloat16": 2, "Float16": 2}
ANY = "any"  # the kernel of all variants without their own
# The hot variants of each rule's step (csrc/rules), and how many tensors each reads and writes.
HOT = {
    "sgd": {"plain": (2, 1), "momentum": (3, 2), "nesterov": (3, 2)},
    "adam": {"plain": (4, 3)},
    "given": {"plain": (3, 1)},
}
REGISTERS = 64 * 1024  # of a multiprocessor
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes of a multiprocessor's shared memory


BANDWIDTH = {"H200": 4.8e12, "B200": 8e12}  # bytes a second, as NVIDIA states them; an H100 has 3.35e12
MULTIPROCESSORS = {"H200": 132, "B200": 148}
LATENCY = 800e-9  # seconds, of a load under load


class Kernel(NamedTuple):
    architecture: str
    rule: str
    dtype: str
    variant: str
    registers: int
    stack: int
    shared: int
    code: str

    @property
    def hot(self) -> bool:
        """Whether training spends its time there."""
        return self.variant != ANY

    @property
    def threads(self) -> int:
        """Of a block."""
        many_sums = self.hot and (self.rule == "given" or self.variant == "nesterov")
        return 128 if self.rule == "adam" or many_sums else 256

    @property
    def reads(self) -> int:
        return HOT[self.rule][self.variant][0]

    @property
    def writes(self) -> int:
        return HOT[self.rule][self.variant][1]

    @property
    def blocks(self) -> int:
        """How many run on a multiprocessor at once: registers are given out by 8 a thread."""
        by_registers = REGISTERS // (self.threads * (-(-self.registers // 8) * 8))
        return min(by_registers, SHARED[self.architecture] // self.shared)

    @property
    def bytes_in_flight(self) -> int:
        """Loads of parameter, gradient and buffers that are on their way to a multiprocessor while it computes."""
        ahead = 1 if (self.dtype, self.rule, self.variant) == ("Float64", "sgd", "momentum") else 2  # vectors
        return self.blocks * self.threads * self.reads * 16 * ahead


def cuobjdump(option: str) -> str:
    assert SPEC is not None
    assert SPEC.origin is not None
    done = subprocess.run([str(CUOBJDUMP), option, SPEC.origin], capture_output=True, text=True, check=True)
    return done.stdout


def by_function(text: str, heading: str) -> dict[tuple[str, str], str]:
    """What a listing says of each function, by architecture and mangled name."""
    found = {}
    for part in re.split(r"^\s*arch = ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split()[0]
        for body in re.split(heading, part)[1:]:
            found[architecture, body.split()[0].rstrip(":")] = body
    return found


@cache
def kernels() -> list[Kernel]:
    usage = by_function(cuobjdump("--dump-resource-usage"), r"Function ")
    code = by_function(cuobjdump("--dump-sass"), r"Function : ")
    found = []
    for (architecture, name), body in usage.items():
        of_type = r"step_tilesINS_\d+(B?Float\d+)E"
        match = re.search(of_type + r"NS_(?:3AnyINS_)?\d+([a-z]+)4(?:StepILi(\d)E|Rule)", name)
        if match is not None:
            registers, stack, shared = (int(re.search(rf"{key}:(\d+)", body)[1]) for key in ("REG", "STACK", "SHARED"))  # type: ignore[index]
            machine_code = code[architecture, name]
            variant = ANY if match[3] is None else list(HOT[match[2]])[int(match[3])]
            found.append(Kernel(architecture, match[2], match[1], variant, registers, stack, shared, machine_code))
    return sorted(found)


def test_every_kernel_is_there_for_every_architecture() -> None:
    architectures = {k.architecture for k in kernels()}
    assert architectures
    assert {k[:4] for k in kernels()} == {
        (architecture, rule, dtype, variant)
        for architecture in architectures
        for rule, variants in HOT.items()
        for dtype in DTYPES
        for variant in [*variants, ANY]
    }


def test_registers_and_stack() -> None:
    print("\narch    rule   dtype     variant   registers  stack  shared  threads  loads in flight")
    for k in kernels():
        in_flight = f"{k.bytes_in_flight:9,} B" if k.hot else ""
        print(
            f"{k.architecture:7} {k.rule:6} {k.dtype:9} {k.variant:9} {k.registers:9} {k.stack:6} {k.shared:7}"
            f" {k.blocks * k.threads:8} {in_flight}"
        )
    for k in kernels():
        assert k.stack == 0, k[:-1]
        # Little's law: bytes a second times seconds of latency are in flight on each multiprocessor, loads and stores.
        if k.hot:
            gpu = "B200" if k.architecture == "sm_100" else "H200"
            needed = BANDWIDTH[gpu] / MULTIPROCESSORS[gpu] * LATENCY * k.reads / (k.reads + k.writes)
            share = 0.94 if (gpu, k.dtype, k.variant) == ("B200", "Float64", "momentum") else 1.0
            assert k.bytes_in_flight >= share * needed, k[:-1]


def test_the_second_stage() -> None:
    """No stack: nothing is spilled, and what the laws choose by data lies in shared memory."""
    found = {
        (architecture, match[1]): {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", body)}
        for (architecture, name), body in by_function(cuobjdump("--dump-resource-usage"), r"Function ").items()
        if (match := re.search(r"finish_spansINS_\d+([a-z]+)4Rule", name)) is not None
    }
    print(f"\nsecond stage: {found}")
    assert found.keys() == {k[:2] for k in kernels()}
    for usage in found.values():
        assert usage["STACK"] == 0
        assert usage["REG"] <= 128


def test_memory_is_moved_sixteen_bytes_at_a_time() -> None:
    for k in filter(lambda k: k.hot, kernels()):
        loads, stores = (len(re.findall(rf"\b{op}\.E\S*\.128", k.code)) for op in ("LDGSTS", "STG"))
        # twice: with columns' sums and without; the gradient is stored where it is unscaled
        assert loads >= 2 * k.reads, k[:-1]
        assert stores >= 2 * (k.writes + 1), k[:-1]
        assert not re.search(r"\b(LDL|STL)\b", k.code), k[:-1]


def test_adam_has_neither_branch_nor_call_for_roots_and_quotients() -> None:
    """Of float32: a subroutine for the last bit would keep registers that the sums need (csrc/arithmetic.h)."""
    for k in filter(lambda k: k.hot and k.rule == "adam" and k.dtype != "Float64", kernels()):
        assert "FCHK" not in k.code, k[:-1]  # before a quotient that is rounded to the nearest
        assert len(re.findall(r"\bMUFU\.(?:SQRT|RSQ)\b", k.code)) >= 4, k[:-1]
