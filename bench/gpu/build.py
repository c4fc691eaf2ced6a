"""Part "build": the package for the GPU at hand, in an environment of its own that borrows the machine's packages."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.checkout import ROOT
from bench.gpu.process import Part
from bench.gpu.session import Session


def build(session: Session, name: str) -> Iterator[Part]:
    """The package with noetherperf._cuda for this device alone; without it where that fails."""
    session.ready.unlink(missing_ok=True)
    made = session.run(
        f"{name} venv", [session.machine.python, "-m", "venv", "--clear", "--without-pip", session.venv], 60.0
    )
    if made.status != "passed":
        yield made
        return
    site = next((session.venv / "lib").glob("python3.*/site-packages"))
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed(session.machine.found["path"])))
    part = session.run(name, _install(session, "ON"), min(180.0, session.left))
    if part.status == "passed":
        part.detail = f"noetherperf._cuda for compute capability {session.machine.capability}"
        session.ready.touch()
    yield part
    if part.status != "passed":
        part = session.run(f"{name} without CUDA", _install(session, "OFF"), min(90.0, session.left))
        if part.status == "passed":
            part.detail = "for Triton alone"
            session.ready.touch()
        yield part


def _install(session: Session, cuda: str) -> list[str | Path]:
    settings = {
        "build-dir": f"{session.work}/{cuda}-{{wheel_tag}}",
        "cmake.define.NPERF_CUDA": cuda,
        "cmake.define.CMAKE_CUDA_ARCHITECTURES": f"{session.machine.capability}-real",
    }
    how = ["--no-build-isolation", "--no-deps", "--ignore-installed", "--no-index", "--disable-pip-version-check"]
    chosen = [f"--config-settings={key}={value}" for key, value in settings.items()]
    return [session.python, "-m", "pip", "install", "-v", *how, *chosen, "-e", "."]


def borrowed(path: Sequence[str]) -> list[str]:
    """The folders of a Python's sys.path that another one can read packages from."""
    return [folder for folder in path if Path(folder).is_absolute() and Path(folder).is_dir() and Path(folder) != ROOT]
