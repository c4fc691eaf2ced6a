"""The house rules that can be read off the source: who may import whom, and what stays out of where."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "noetherperf"

# A unit is a file or folder directly inside the package; it imports only units of lower rank.
RANKS = {
    "_cpu": 0,
    "_cuda": 0,
    "moments": 0,
    "hyper": 0,
    "locking": 0,
    "names": 0,
    "overlap": 0,
    "explanation": 0,
    "printing": 0,
    "paths": 0,
    "chunks": 0,
    "untrusted": 0,
    "agreement": 1,
    "reference": 1,
    "report": 1,
    "symmetry": 1,
    "evaluation": 1,
    "laws": 1,
    "detect": 2,
    "plan": 2,
    "openness": 2,
    "tiling": 3,
    "shards": 3,
    "readout": 3,
    "checkpoint": 3,
    "triton_kernels": 3,
    "record": 4,
    "engines": 4,
    "cost": 4,
    "backends": 5,
    "distributed": 5,
    "watched": 5,
    "sgd": 6,
    "constraints": 6,
    "recorder": 7,
    "control": 7,
    "theory": 8,
    "plots": 8,
    "integrations": 8,
    "cli": 9,
    "figures": 9,
    "recipes": 9,
    "__init__": 10,
    "__main__": 10,
}

# Neighbours of one rank that may look at each other in this direction, and why.
NEIGHBOURS = {
    ("explanation", "printing"): "names are explained as they are printed",
    ("reference", "laws"): "the reference step advances the law states, as csrc/step.h and csrc/laws.h do",
    ("plots", "theory"): "the figures draw the continuous models beside the measurement",
    ("cli", "recipes"): "the command line starts the main job",
    ("cli", "figures"): "and the gallery",
    ("figures", "recipes"): "the gallery trains the recipes' networks on their data",
}

# Imported in one file only, so that the rest works without it.
ONLY_IN = {
    "matplotlib": "plots",
    "torch.distributed": "distributed",
    **dict.fromkeys(
        ("accelerate", "lightning", "tensorboard", "torch.utils.tensorboard", "transformers"), "integrations"
    ),
}

TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)


def unit_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of all that a file imports, relative ones resolved.

    `from a import b` gives a.b, which may be a module; so may an attribute, as in torch.distributed.send.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - level + 1] if level else []
                yield from (".".join([*parents, *filter(None, [source]), alias.name]) for alias in names)
            case ast.Attribute(value=ast.Name(id=root), attr=name):
                yield f"{root}.{name}"


def units_reached(names: set[str]) -> set[str]:
    """The package's units among dotted names; what is no unit is taken from the package's __init__."""
    inside = (name.split(".") for name in names if name.split(".")[0] == PACKAGE)
    return {parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__" for parts in inside}


def violations(package: Path) -> list[str]:
    """Every broken rule in the Python files of a package, one line each."""
    found = []
    # rglob follows no link, and triton_kernels is one
    files = sorted({*package.rglob("*.py"), *(package / "triton_kernels").rglob("*.py")})
    for path in files:
        unit, place = unit_of(path, package), path.relative_to(package.parent).as_posix()
        if unit not in RANKS:
            found.append(f"{place} has no rank: give it one in RANKS")
            continue
        module = ".".join([PACKAGE, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")
        names = set(imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py"))
        for other in sorted(units_reached(names) - {unit}):
            if RANKS[other] >= RANKS[unit] and (unit, other) not in NEIGHBOURS:
                found.append(f"{place} imports {other}, whose rank is not lower")
        for library, home in ONLY_IN.items():
            if unit != home and any(f"{name}.".startswith(f"{library}.") for name in names):
                found.append(f"{place} imports {library}, which only {home} may")
    return found


def torch_headers(csrc: Path) -> list[str]:
    return [path.name for path in sorted(csrc.iterdir()) if TORCH_HEADER.search(path.read_text())]


def test_every_target_that_make_tells_of_has_a_rule() -> None:
    """A name in .PHONY or in the help, but without a rule, is a target that does nothing and says all is well."""
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    declared = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert len(declared) == 1
    told = set(re.findall(r"(?:^#   | {2})make ([a-z-]+)", makefile, re.MULTILINE))
    assert set(declared[0].split()) == rules
    assert told < rules


def test_imports_go_downward() -> None:
    assert violations(ROOT / PACKAGE) == []


def test_exceptions_are_between_equals() -> None:
    assert all(RANKS[unit] == RANKS[other] for unit, other in NEIGHBOURS)


def test_csrc_includes_no_torch_header() -> None:
    assert any((ROOT / "csrc").glob("*.cpp"))
    assert torch_headers(ROOT / "csrc") == []


def test_import_stays_light() -> None:
    """Whatever torch itself brings, ours adds none of what a machine that only steps and measures can do without."""
    code = (
        "import sys, torch; before = set(sys.modules); import noetherperf;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert PACKAGE in loaded
    assert not {"matplotlib", "rich", "scipy", "triton", "typer", "xarray", "zarr"} & set(loaded)
    assert not {"accelerate", "lightning", "tensorboard", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("plan.py", "from noetherperf.sgd import SGD", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "from noetherperf import sgd", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "from .sgd import SGD", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "from . import sgd", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "import noetherperf.sgd", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "def f():\n    import noetherperf.sgd", "noetherperf/plan.py imports sgd, whose rank is not lower"),
        ("plan.py", "import noetherperf", "noetherperf/plan.py imports __init__, whose rank is not lower"),
        ("plan.py", "from noetherperf import SGD", "noetherperf/plan.py imports __init__, whose rank is not lower"),
        ("plan.py", "from noetherperf.detect import f", "noetherperf/plan.py imports detect, whose rank is not lower"),
        ("laws.py", "import noetherperf.reference", "noetherperf/laws.py imports reference, whose rank is not lower"),
        (
            "triton_kernels/launch.py",
            "import noetherperf.sgd",
            "noetherperf/triton_kernels/launch.py imports sgd, whose rank is not lower",
        ),
        (
            "recipes/digits.py",
            "from ..cli import main",
            "noetherperf/recipes/digits.py imports cli, whose rank is not lower",
        ),
        ("new.py", "", "noetherperf/new.py has no rank: give it one in RANKS"),
        ("cli.py", "from matplotlib import pyplot", "noetherperf/cli.py imports matplotlib, which only plots may"),
        (
            "sgd.py",
            "import torch.distributed as d",
            "noetherperf/sgd.py imports torch.distributed, which only distributed may",
        ),
        (
            "recorder.py",
            "from torch.utils.tensorboard import SummaryWriter",
            "noetherperf/recorder.py imports torch.utils.tensorboard, which only integrations may",
        ),
        (
            "integrations/lightning.py",
            "from noetherperf.plots import f",
            "noetherperf/integrations/lightning.py imports plots, whose rank is not lower",
        ),
        (
            "sgd.py",
            "from torch import distributed",
            "noetherperf/sgd.py imports torch.distributed, which only distributed may",
        ),
        (
            "sgd.py",
            "import torch\ntorch.distributed.f()",
            "noetherperf/sgd.py imports torch.distributed, which only distributed may",
        ),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    package = tmp_path / PACKAGE
    for name in ("sgd.py", "detect.py", "reference.py", "cli.py", file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / file).write_text(source)
    assert violations(package) == [complaint]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("sgd.py", "from noetherperf.plan import Plan\nimport torch"),
        ("reference.py", "from noetherperf import laws"),
        ("recipes/digits.py", "from noetherperf.recipes.models import net\nfrom .models import net"),
        ("__init__.py", "from noetherperf.sgd import SGD"),
    ],
)
def test_a_kept_rule_is_not_blamed(tmp_path: Path, file: str, source: str) -> None:
    package = tmp_path / PACKAGE
    for name in ("plan.py", "laws.py", "sgd.py", "recipes/models.py", file):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / file).write_text(source)
    assert violations(package) == []


def test_a_torch_header_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text('#include <vector>\n  # include "torch/extension.h"\n')
    (tmp_path / "b.cpp").write_text("// torch/extension.h stays out\n#include <vector>\n")
    assert torch_headers(tmp_path) == ["a.cpp"]
