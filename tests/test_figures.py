"""The gallery: what its captions say holds on the data, a spoiled datum is noticed, every picture can be drawn."""

import json
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from typer.testing import CliRunner

from noetherperf import cli
from noetherperf.figures import GALLERY, Claim, Data, load, make
from noetherperf.figures.claims import slope
from noetherperf.figures.components import COMPONENTS
from noetherperf.figures.oscillation import measured_frequency
from noetherperf.optim.sgd import SGD
from noetherperf.recipes.vgg import vgg16
from noetherperf.symmetry import Symmetry

SLOW = (
    "modified",
    "noise",
    "errors",
    "dynamics",
    "oscillation",
    "budget",
    "adamw",
    "equilibrium",
    "decay",
    "balance",
)  # seconds to half a minute each
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in GALLERY]

_computed: dict[str, Data] = {}


def quick(name: str) -> Data:
    """A figure's quick data, computed once."""
    if name not in _computed:
        torch.set_num_threads(1)
        _computed[name] = GALLERY[name].compute(True)
    return _computed[name]


@pytest.mark.parametrize("name", NAMES)
def test_claims_hold(name: str) -> None:
    claims = GALLERY[name].claims(quick(name))
    assert claims
    assert not [claim for claim in claims if not claim.holds]
    assert len({claim.text for claim in claims}) == len(claims)
    for claim in claims:  # a claim without a bound could not fail
        assert np.isfinite([claim.low, claim.high]).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_drawn_of_the_data_alone(name: str, tmp_path: Path) -> None:
    data = quick(name)
    np.savez_compressed(tmp_path / "data.npz", allow_pickle=False, **data)
    before = dict(matplotlib.rcParams)
    figure = GALLERY[name].draw(load(tmp_path / "data.npz"))
    figure.draw_without_rendering()
    assert dict(matplotlib.rcParams) == before
    for axes in figure.get_axes():
        assert axes.get_lines() or axes.collections
        assert axes.get_xlabel()
        assert axes.get_ylabel() or len(axes.get_shared_y_axes().get_siblings(axes)) > 1


SPOILS: dict[str, tuple[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "fields": ("scale/gradient", lambda g: g + 1e-6),
    "manifolds": ("rescale/flow/charge", lambda q: q + 1e-6 * np.arange(len(q))),
    "modified": ("plain/modified flow/error", np.sqrt),
    "neurons": ("charges", lambda q: q + 0.1 * np.random.default_rng(0).standard_normal(q.shape)),
    "noise": ("momentum/growth", lambda q: 0.5 * q),
    "dynamics": ("plain/rescale/flow_error", lambda e: e + 0.1),
    "oscillation": ("2/measured", lambda w: 1.02 * w),
    "errors": ("lr/scale/flow", lambda e: e**2),
    "budget": ("rounding", lambda r: r + 1e-3),
    "adamw": ("SGD/scale/missed", lambda share: share + 1e-6),
    "equilibrium": ("1/angle", lambda angle: 1.2 * angle),
    "decay": ("share", lambda share: 1.0 - share),
    "balance": ("SGD/q, k/law", lambda x: x + 1e-9),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_spoiled_datum_breaks_a_claim(name: str) -> None:
    key, spoil = SPOILS[name]
    data = {**quick(name), key: spoil(quick(name)[key])}
    assert [claim for claim in GALLERY[name].claims(data) if not claim.holds]


def test_no_claim_holds_of_no_number() -> None:
    assert not Claim("a", float("nan"), low=0.0).holds
    assert not Claim("a", 2.0, 0.0, 1.0).holds
    assert Claim("a", 1.0, 0.0, 1.0).holds
    assert Claim("a", 0.5, high=1.0).to_dict() == {"text": "a", "value": 0.5, "high": 1.0, "holds": True}


def test_slope() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert slope(x, 3.0 * x**1.5) == pytest.approx(1.5)


def test_measured_frequency() -> None:
    steps = np.arange(0, 400, 5)
    swing = np.exp(-0.004 * steps) * np.cos(0.03 * steps + 0.1)
    assert measured_frequency(steps, np.outer(swing, [1.0, -2.0])) == pytest.approx(0.03, rel=1e-3)
    assert np.isnan(measured_frequency(steps, np.exp(-0.01 * steps)[:, None]))


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.kind)
def test_components_have_their_symmetry(component: object) -> None:
    move = {
        "translation": lambda theta: theta + 0.3,
        "scale": lambda theta: 1.7 * theta,
        "rescale": lambda theta: theta * torch.tensor([1.7, 1.0 / 1.7], dtype=torch.float64),
    }
    (found,) = (other for other in COMPONENTS if other is component)
    theta = torch.tensor([0.4, -1.1], dtype=torch.float64)
    torch.testing.assert_close(found.losses(move[found.kind](theta)), found.losses(theta))
    torch.testing.assert_close(found.generator_rate, torch.func.jacrev(found.generator)(theta))


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("image_size", [32, 64])
def test_vgg_has_the_symmetries_it_claims(batch_norm: bool, image_size: int) -> None:
    model, symmetries = vgg16(batch_norm=batch_norm, image_size=image_size, width=1 / 32, n_classes=4)
    model.double()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30
    optimizer = SGD(model.named_parameters(), lr=1e-3, symmetries=symmetries)
    images = torch.randn(8, 1, image_size, image_size, dtype=torch.float64)
    loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 4)
    loss.backward()
    optimizer.step()
    for name, law in optimizer.readout().items():
        assert law.defect.abs().max() < 1e-12 * (1.0 + law.charge.abs().max()), name


def kinds(symmetries: list[Symmetry]) -> dict[str, int]:
    found = [symmetry.kind for symmetry in symmetries]
    return {kind: found.count(kind) for kind in found}


def test_vgg_is_vgg16() -> None:
    model, symmetries = vgg16(batch_norm=False, in_channels=3, n_classes=200)
    shapes = [tuple(m.weight.shape) for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(shapes) == 16
    assert shapes[0] == (64, 3, 3, 3)
    assert shapes[12:] == [(512, 512, 3, 3), (512, 2048), (512, 512), (200, 512)]
    assert kinds(symmetries) == {"rescale": 15, "translation": 2}
    assert kinds(vgg16(batch_norm=True)[1]) == {"scale": 13, "rescale": 15, "translation": 2}
    with pytest.raises(ValueError, match="multiple of 32"):
        vgg16(batch_norm=True, image_size=48)


def test_make_saves_picture_data_and_claims(tmp_path: Path) -> None:
    claims, files = make("fields", tmp_path / "new", quick=True)
    assert [file.name for file in files] == ["fields.png", "fields.pdf", "fields.npz", "fields.json"]
    told = json.loads(files[3].read_text())
    assert told["claims"] == [claim.to_dict() for claim in claims]
    pixels = files[0].read_bytes()
    make("fields", tmp_path / "new", redraw=True)
    assert files[0].read_bytes() == pixels


def call(*arguments: object) -> tuple[int, str, str]:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(cli.app, ["figures", *map(str, arguments)])
    torch.set_num_threads(threads)
    return result.exit_code, result.stdout, result.stderr


def test_the_command(tmp_path: Path) -> None:
    status, out, _ = call("fields", "--quick", "--out", tmp_path)
    assert status == 0
    assert str(tmp_path / "fields.pdf") in out
    assert out.count("  holds  ") == 6


def test_the_command_refuses(tmp_path: Path) -> None:
    status, _, error = call("field", "--out", tmp_path)
    assert status == 2
    assert "'field'" in error
    assert "oscillation" in error
    status, _, error = call("fields", "--redraw", "--out", tmp_path / "empty")
    assert status == 2
    assert "--redraw" in error


def test_a_claim_that_fails_is_told(tmp_path: Path) -> None:
    make("fields", tmp_path, quick=True)
    data = dict(load(tmp_path / "fields.npz"))
    data["scale/gradient"] = data["scale/gradient"] + 1e-3
    np.savez_compressed(tmp_path / "fields.npz", allow_pickle=False, **data)
    status, out, error = call("fields", "--redraw", "--out", tmp_path)
    assert status == 1
    assert "  FAILS  scale: largest |cos(g, ψ)|" in out
    assert "1 of the claims" in error


DOCS = Path(__file__).parents[1] / "docs"


def test_the_gallery_page_shows_every_figure() -> None:
    page = (DOCS / "gallery.md").read_text()
    for name in GALLERY:
        assert f"noetherperf figures {name}\n" in page
        assert f"(images/gallery/{name}.png)" in page
        assert (DOCS / "images" / "gallery" / f"{name}.png").stat().st_size < 300_000


def formulas() -> dict[str, str]:
    """Each function named in the last section of the theory page, with the sections that derive its formulas."""
    last = (DOCS / "theory.md").read_text().rpartition("\n## ")[2]
    rows = re.findall(r"^\| (.*) \| (`.*`) \|$", last, re.MULTILINE)
    return {name: formula for formula, names in rows for name in re.findall(r"`([A-Za-z_.]+)`", names) if "." in name}


@pytest.mark.parametrize("name", formulas())
def test_the_theory_page_names_functions_that_exist(name: str) -> None:
    found = pkgutil.resolve_name(f"noetherperf.{name}")
    assert found.__doc__


@pytest.mark.parametrize("name", sorted(formulas()))
def test_what_computes_a_formula_points_at_its_derivation(name: str) -> None:
    """Itself, or the head of its file."""
    found = pkgutil.resolve_name(f"noetherperf.{name}")
    told = f"{found.__doc__} {sys.modules[found.__module__].__doc__}"
    (sections,) = re.findall(r"§(\d)", formulas()[name])
    pointed = re.findall(r"docs/theory\.md, sections? ([^.;:]*)", told)
    assert any(sections in pointer for pointer in pointed)
