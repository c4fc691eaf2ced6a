"""The CPU engine's module with kernels for instruction sets that this processor lacks, from the same source.

Vectors and intrinsics are executed lane by lane (csrc/simd.h), so that every path of every width runs on any machine.
"""

import fcntl
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]

#: Every instruction set that csrc/kernel_cpu.cpp is written for.
ISAS = ("avx512", "avx2", "baseline")


def missing() -> str | None:
    """Why the module cannot be built here."""
    return None if shutil.which("c++") is not None else "needs a C++ compiler"


def wanted() -> tuple[str, ...]:
    """The instruction sets that this processor, or this build, lacks; with STAND_INS=all every one but the baseline."""
    from noetherperf import _cpu

    lacking = ISAS[:-1] if os.environ.get("STAND_INS") == "all" else [isa for isa in ISAS if isa not in _cpu.isas()]
    return tuple(lacking)


def build(isas: tuple[str, ...], directory: Path, **options: str) -> Path:
    """Build the module with these instruction sets lane by lane; only what has changed is compiled again.

    Args:
        isas: Of ISAS.
        directory: Where.
        options: More of CMake's definitions.

    Returns:
        The module's file.
    """
    tools = Path(sys.executable).parent
    cmake = str(tools / "cmake") if (tools / "cmake").exists() else "cmake"
    definitions = {
        "CMAKE_BUILD_TYPE": "None",
        "NPERF_CUDA": "OFF",
        "NPERF_STAND_INS": ";".join(isas),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        **options,
    }
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:  # several test processes may want it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"]
        for command in (
            [*configure, *(f"-D{name}={value}" for name, value in definitions.items())],
            [cmake, "--build", str(directory)],
        ):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}")
    return directory / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


@cache
def load() -> ModuleType:
    """The module with the wanted instruction sets."""
    isas = wanted()
    flags = "" if "avx2" in isas or os.uname().machine != "x86_64" else "-mavx2;-mfma;-mf16c"  # half as many pieces
    library = build(isas, ROOT / "build" / "cpu_stand_in" / "-".join(isas), NPERF_STAND_IN_FLAGS=flags)
    loader = importlib.machinery.ExtensionFileLoader("_cpu", str(library))
    spec = importlib.util.spec_from_loader("_cpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
