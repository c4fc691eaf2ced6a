"""The CUDA engine's module built for a CPU, from the same sources (cuda_emulation.h)."""

import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE.parents[1] / "build" / "cuda_emulation"
SOURCES = [*CSRC.glob("cuda/*.cu"), CSRC / "bind_cuda.cpp"]
HEADERS = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *HERE.glob("*.h")]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wno-unknown-pragmas"]
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *WARNINGS]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def missing() -> str | None:
    """Why the emulation cannot be built here."""
    if os.uname().machine != "x86_64":
        return "the emulation switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "the emulation needs g++"
    return None


@cache
def build(sanitize: bool = False) -> Path:
    """Compile the module, unless these sources have been compiled before."""
    flags = [*FLAGS, *(["-O1", *SANITIZERS] if sanitize else ["-O2"])]
    includes = [f"-I{path}" for path in (CSRC, HERE)]
    includes += [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    inputs = sorted({*HEADERS, *SOURCES})
    key = hashlib.sha256(repr((flags, includes, [path.read_text() for path in inputs])).encode()).hexdigest()[:16]
    name = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    library = BUILD / key / name
    if not library.exists():
        unfinished = BUILD / f"{key}.{os.getpid()}"
        unfinished.mkdir(parents=True, exist_ok=True)

        def compiled(source: Path) -> str:
            made = unfinished / f"{source.name}.o"
            subprocess.run(["g++", *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(made)], check=True)
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, SOURCES))
        subprocess.run(["g++", "-shared", *flags, *objects, "-o", str(unfinished / name)], check=True)
        library.parent.mkdir(exist_ok=True)
        (unfinished / name).replace(library)  # another process may have been as quick
        shutil.rmtree(unfinished)
    return library


@cache
def load(sanitize: bool = False) -> ModuleType:
    """The emulated module; a sanitized one only where the sanitizers' libraries were loaded before Python."""
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(build(sanitize)))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
