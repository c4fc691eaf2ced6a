"""A pytest plugin, `-p sanitized`: the tests run on the CPU engine that `make sanitize` has built with ASan and UBSan.

The sanitizers' libraries must be loaded before Python, so the process is started with LD_PRELOAD (`environment`).
"""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch  # noqa: F401  (first: OpenMP then binds to torch's copy)

BUILD = Path(__file__).parents[1] / "build" / "sanitize"


def environment() -> dict[str, str]:
    """The variables that a sanitized process starts with: the interceptors come first, leaks of Python's are let be."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in libraries]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, **options, "LD_PRELOAD": " ".join(found)}


def load() -> None:
    """Put the sanitized module where `from noetherperf import _cpu` finds it."""
    path = BUILD / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_loader("noetherperf._cpu", importlib.machinery.ExtensionFileLoader("_cpu", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["noetherperf._cpu"] = module


load()
