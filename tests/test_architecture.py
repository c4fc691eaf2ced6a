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

# A room is a folder (or a file) directly inside the package; it imports only rooms of lower rank, without exception.
RANKS = {
    "_cpu": 0,
    "_cuda": 0,
    "common": 0,
    "symmetry": 1,
    "rules": 1,
    "measure": 2,
    "triton_kernels": 2,
    "engines": 3,
    "checks": 3,
    "optim": 4,
    "detect": 4,
    "record": 5,
    "theory": 6,
    "plots": 7,
    "view": 7,
    "integrations": 7,
    "recipes": 7,
    "figures": 8,
    "cli": 9,
    "__init__": 10,
    "__main__": 10,
    "control": 10,  # the public names of two modules in optim
    "distributed": 10,
}

# Imported in one room or file only, so that the rest works without it.
ONLY_IN = {
    "matplotlib": "plots",
    "torch.distributed": "optim/distributed",
    "plotly": "view",
    **dict.fromkeys(
        ("accelerate", "lightning", "tensorboard", "torch.utils.tensorboard", "transformers"), "integrations"
    ),
}

TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|caffe2)/', re.MULTILINE)


def room_of(path: Path, package: Path) -> str:
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


def rooms_reached(names: set[str]) -> set[str]:
    """The package's rooms among dotted names; what is no room is taken from the package's __init__."""
    inside = (name.split(".") for name in names if name.split(".")[0] == PACKAGE)
    return {parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__" for parts in inside}


def violations(package: Path) -> list[str]:
    """Every broken rule in the Python files of a package, one line each."""
    found = []
    # rglob follows no link, and triton_kernels is one
    files = sorted({*package.rglob("*.py"), *(package / "triton_kernels").rglob("*.py")})
    for path in files:
        room, place = room_of(path, package), path.relative_to(package.parent).as_posix()
        if room not in RANKS:
            found.append(f"{place} has no rank: give it one in RANKS")
            continue
        module = ".".join([PACKAGE, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")
        names = set(imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py"))
        for other in sorted(rooms_reached(names) - {room}):
            if RANKS[other] >= RANKS[room]:
                found.append(f"{place} imports {other}, whose rank is not lower")
        for library, home in ONLY_IN.items():
            is_home = place.removeprefix(f"{PACKAGE}/").removesuffix(".py").startswith(home)
            if not is_home and any(f"{name}.".startswith(f"{library}.") for name in names):
                found.append(f"{place} imports {library}, which only {home} may")
    return found


def torch_headers(csrc: Path) -> list[str]:
    sources = [path for path in sorted(csrc.rglob("*")) if path.is_file()]
    return [path.name for path in sources if TORCH_HEADER.search(path.read_text())]


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


def test_csrc_includes_no_torch_header() -> None:
    assert any((ROOT / "csrc").glob("*.cpp"))
    assert torch_headers(ROOT / "csrc") == []


def test_import_stays_light() -> None:
    """Whatever torch itself brings, ours adds none of what a machine that only steps and measures can do without."""
    code = (
        "import sys, torch; before = set(sys.modules); import noetherperf as n;"
        "n.SGD, n.AdamW, n.Probe, n.Readout, n.Scale, n.backends, n.control, n.cost, n.distributed;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert PACKAGE in loaded
    assert not {"matplotlib", "plotly", "rich", "scipy", "triton", "typer", "xarray", "zarr"} & set(loaded)
    assert not {"accelerate", "lightning", "tensorboard", "transformers"} & set(loaded)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        *(
            ("measure/plan.py", source, "noetherperf/measure/plan.py imports optim, whose rank is not lower")
            for source in (
                "from noetherperf.optim.sgd import SGD",
                "from noetherperf.optim import sgd",
                "from ..optim.sgd import SGD",
                "from .. import optim",
                "import noetherperf.optim.sgd",
                "def f():\n    import noetherperf.optim",
            )
        ),
        *(
            ("measure/plan.py", source, "noetherperf/measure/plan.py imports __init__, whose rank is not lower")
            for source in ("import noetherperf", "from noetherperf import SGD")
        ),
        (
            "rules/sgd.py",
            "from noetherperf.symmetry import Part",
            "noetherperf/rules/sgd.py imports symmetry, whose rank is not lower",
        ),
        (
            "triton_kernels/launch.py",
            "import noetherperf.optim.sgd",
            "noetherperf/triton_kernels/launch.py imports optim, whose rank is not lower",
        ),
        (
            "recipes/digits.py",
            "from ..cli import main",
            "noetherperf/recipes/digits.py imports cli, whose rank is not lower",
        ),
        ("new.py", "", "noetherperf/new.py has no rank: give it one in RANKS"),
        ("cli.py", "from matplotlib import pyplot", "noetherperf/cli.py imports matplotlib, which only plots may"),
        (
            "record/writer.py",
            "from torch.utils.tensorboard import SummaryWriter",
            "noetherperf/record/writer.py imports torch.utils.tensorboard, which only integrations may",
        ),
        (
            "integrations/lightning.py",
            "from noetherperf.plots import f",
            "noetherperf/integrations/lightning.py imports plots, whose rank is not lower",
        ),
        *(
            (
                "optim/sgd.py",
                source,
                "noetherperf/optim/sgd.py imports torch.distributed, which only optim/distributed may",
            )
            for source in (
                "import torch.distributed as d",
                "from torch import distributed",
                "import torch\ntorch.distributed.f()",
            )
        ),
    ],
)
def test_a_broken_rule_is_found(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    package = tmp_path / PACKAGE
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(source)
    assert violations(package) == [complaint]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optim/sgd.py", "from noetherperf.measure.plan import Plan\nimport torch"),
        ("optim/distributed.py", "import torch.distributed"),
        ("rules/sgd.py", "from noetherperf.rules import law\nfrom .law import f"),
        ("__init__.py", "from noetherperf.optim.sgd import SGD"),
    ],
)
def test_a_kept_rule_is_not_blamed(tmp_path: Path, file: str, source: str) -> None:
    package = tmp_path / PACKAGE
    (package / file).parent.mkdir(parents=True)
    (package / file).write_text(source)
    assert violations(package) == []


def test_a_torch_header_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text('#include <vector>\n  # include "torch/extension.h"\n')
    (tmp_path / "b.cpp").write_text("// torch/extension.h stays out\n#include <vector>\n")
    assert torch_headers(tmp_path) == ["a.cpp"]
