"""What an install without compiled modules can do, what a build that must have them refuses, what an index shows."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from pathlib import Path
from urllib.parse import urlparse

import pytest

import noetherperf as nperf

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
NINJA = shutil.which("ninja", path=Path(sys.executable).parent) or shutil.which("ninja")


def configure(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configure a build on a machine that has no compiler: nothing is on its PATH."""
    command = [
        str(CMAKE),
        "-S",
        str(ROOT),
        "-B",
        str(tmp_path / "build"),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={NINJA}",
    ]
    return subprocess.run([*command, *options], env={"PATH": str(tmp_path / "nothing")}, capture_output=True, text=True)


@pytest.mark.skipif(CMAKE is None or NINJA is None, reason="needs CMake and ninja")
def test_without_a_compiler_the_build_says_so_and_goes_on(tmp_path: Path) -> None:
    done = configure(tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'its backend "reference" steps' in " ".join(done.stderr.split())


@pytest.mark.skipif(CMAKE is None or NINJA is None, reason="needs CMake and ninja")
@pytest.mark.parametrize("option", ["NPERF_CPU", "NPERF_CUDA"])
def test_a_build_that_must_have_a_module_fails_without_a_compiler(tmp_path: Path, option: str) -> None:
    done = configure(tmp_path, f"-D{option}=ON")
    assert done.returncode != 0
    assert "no C++ compiler is used: install GCC or Clang" in " ".join(done.stderr.split())
    assert "must be AUTO, ON or OFF" in configure(tmp_path, f"-D{option}=yes").stderr


def test_python_alone_steps_and_says_so_once_where_it_is_asked() -> None:
    """The package as it is where no module was compiled: `reference` steps, without a word except in `info`."""
    code = (
        "import sys, warnings; warnings.simplefilter('error');"
        "sys.modules['noetherperf._cpu'] = sys.modules['noetherperf._cuda'] = None;"
        "import torch, noetherperf as nperf;"
        "p = torch.ones(2, 3, requires_grad=True);"
        "o = nperf.SGD([('p', p)], lr=0.5, symmetries=[nperf.Norm('n', [nperf.Part('p', axis=0)])]);"
        "p.sum().backward(); o.step(); assert o.readout()['n'].charge.tolist() == [0.75, 0.75];"
        "print('stepped', flush=True); sys.argv = ['noetherperf', 'info'];"
        "from noetherperf.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("stepped\n")
    assert "this install is Python alone, and the backend reference steps in its place" in " ".join(done.stdout.split())


def test_the_trial_of_a_wheel_passes_here() -> None:
    """`make wheel` runs it in an environment of its own; it must not rot."""
    here = "cpu" if importlib.util.find_spec("noetherperf._cpu") else "reference"
    done = subprocess.run([sys.executable, ROOT / "tests" / "installed.py", here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_citation_names_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [nperf.__version__]


def test_every_address_of_the_project_is_below_one_home() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    urls = tomllib.loads(text)["project"]["urls"]
    home = urls["Homepage"]
    _, owner, name = urlparse(home).path.split("/")
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^repository-code: (.*)$", citation, re.MULTILINE) == [home]
    hosts = (home, f"https://raw.githubusercontent.com/{owner}/{name}/", f"https://{owner}.github.io/{name}/")
    addresses = re.findall(r"https?://[^\s\"')]+", text)
    assert len(addresses) >= 6
    assert all(address.startswith(hosts) for address in addresses), addresses


def test_a_package_index_gets_a_readme_without_relative_links(tmp_path: Path) -> None:
    """It has none of the files beside README: each link leads to the release's tag, where the file is."""
    pytest.importorskip("hatch_fancy_pypi_readme", reason="it is installed with the extra [dev]")
    code = "import sys; from scikit_build_core import build; print(build.prepare_metadata_for_build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    metadata = message_from_string((tmp_path / done.stdout.split()[-1] / "METADATA").read_text(encoding="utf-8"))
    text = str(metadata.get_payload())
    (home,) = (url.partition(", ")[2] for url in metadata.get_all("Project-URL", []) if url.startswith("Homepage"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "<!--" not in text

    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert len(links) > 20
    pages, images = f"{home}/blob/v{nperf.__version__}/", f"https://raw.githubusercontent.com{urlparse(home).path}"
    for is_image, target in links:
        assert target.startswith("https://")
        beside = f"{images}/v{nperf.__version__}/" if is_image else pages
        if target.startswith((images, home)):
            assert target.startswith(beside)
            assert (ROOT / target.removeprefix(beside).partition("#")[0]).exists(), target


def test_workflows_run_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.stem for file in files] == ["ci", "docs", "release", "wheels"]
    run = {command for file in files for command in re.findall(r"run: (.*)$", file.read_text(), re.MULTILINE)}
    assert run - {".ci/run"}
    assert run - {".ci/run"} <= {f"make {target}" for target in targets | {"docs"}}
