"""The machine that the report is of: a Python whose torch finds a GPU, and what figures depend on there."""

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkout import ROOT, answer, commit

#: Run by a Python, to describe itself.
PROBE = """
import importlib.util, json, platform, sys, sysconfig
found = {
    "python": platform.python_version(), "executable": sys.executable, "path": sys.path,
    "scripts": sysconfig.get_path("scripts"), "torch": None, "cuda": None, "triton": None, "devices": [],
}
try:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found["devices"].append([properties.name, [properties.major, properties.minor], properties.total_memory])
except ImportError:
    pass
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    pass
names = ["hypothesis", "expecttest", "pip", "pytest", "xdist", "numpy"]
found["modules"] = [name for name in names if importlib.util.find_spec(name)]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Machine:
    """A Python whose torch finds a GPU, and what PROBE printed there."""

    python: Path
    found: Mapping[str, Any]

    @property
    def capability(self) -> str:
        """ "90" for 9.0."""
        major, minor = self.found["devices"][0][1]
        return f"{major}{minor}"

    @property
    def is_exclusive(self) -> bool:
        """Whether the device takes one process at a time."""
        return "Exclusive" in (nvidia_smi(ask_nvidia_smi())["compute mode"] or "")

    @property
    def nvcc(self) -> Path | None:
        return find_nvcc(os.environ, self.found["path"])

    def environment(self, work: Path) -> dict[str, str]:
        """For the parts' processes, which keep their caches in the folder `work`."""
        path = os.pathsep.join([self.found["scripts"], os.environ.get("PATH", os.defpath)])
        found = {
            **os.environ,
            "PATH": path,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TRITON_CACHE_DIR": str(work / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        }
        if self.nvcc is not None:
            found["CUDACXX"] = str(self.nvcc)
        found.pop("TRITON_INTERPRET", None)  # kernels run on the device
        return found

    def describe(self) -> dict[str, Any]:
        """What figures depend on; no host name and no path."""
        name, _, memory = self.found["devices"][0]
        nvcc = None if self.nvcc is None else answer([self.nvcc, "--version"])
        release = re.search(r"release ([\d.]+)", nvcc or "")
        return {
            "device": name,
            "capability": self.capability,
            "memory": memory,
            **nvidia_smi(ask_nvidia_smi()),
            "python": self.found["python"],
            "torch": self.found["torch"],
            "cuda": self.found["cuda"],
            "triton": self.found["triton"],
            "nvcc": release[1] if release else None,
            **commit(),
        }


SMI = {
    "driver_version": "driver",
    "clocks.max.sm": "MHz of multiprocessors at most",
    "clocks.max.mem": "MHz of memory at most",
    "power.limit": "watts at most",
    "ecc.mode.current": "ecc",
    "compute_mode": "compute mode",
}


def ask_nvidia_smi() -> str | None:
    """What nvidia-smi prints for nvidia_smi to read."""
    return answer(["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"])


def nvidia_smi(printed: str | None) -> dict[str, str | None]:
    """The first device's fields, from nvidia-smi's CSV; None for a field that it does not report."""
    lines = (printed or "").splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    if len(values) != len(SMI):
        return dict.fromkeys(SMI.values())
    return {name: None if "N/A" in value else value for name, value in zip(SMI.values(), values, strict=True)}


def find_nvcc(environment: Mapping[str, str], path: Sequence[str]) -> Path | None:
    """The CUDA compiler: CUDACXX, or nvcc on PATH, under CUDA_HOME, /usr/local/cuda or among Python's packages."""
    named = environment.get("CUDACXX") or shutil.which("nvcc", path=environment.get("PATH"))
    if named:
        return Path(named)
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    places += [found for folder in path if folder for found in sorted(Path(folder).glob("nvidia/*/bin/nvcc"))]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def find_machine(pythons: Sequence[Path]) -> Machine | str:
    """The first Python whose torch finds a GPU, or one line with the reasons why none does."""
    reasons = []
    for python in pythons:
        printed = answer([python, "-c", PROBE], limit=120.0)
        if printed is None:
            reasons.append(f"{python} does not answer")
            continue
        found = json.loads(printed.splitlines()[-1])
        if found["devices"]:
            return Machine(python, found)
        what = "has no torch" if found["torch"] is None else f"has torch {found['torch']}, which finds no CUDA device"
        reasons.append(f"{python} {what}")
    return f"gpu-report: no GPU, so nothing was measured: {'; '.join(reasons)}"


def candidates() -> list[Path]:
    """The Python that runs this, then .venv's."""
    own = Path(sys.executable)
    return list(dict.fromkeys([own, *(path for path in [ROOT / ".venv" / "bin" / "python"] if path.exists())]))
