"""The gallery: every figure of the paper and some that go beyond it, from one command.

    noetherperf figures [NAME …] [--out DIR] [--quick]

A figure has three functions. `compute` returns arrays. `draw`, in noetherperf.plots, makes a picture of these arrays
alone. `claims` checks on the same arrays the numbers that the caption states; the tests check them too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from noetherperf.figures import (
    adamw,
    balance,
    budget,
    decay,
    dynamics,
    equilibrium,
    errors,
    fields,
    manifolds,
    modified,
    neurons,
    noise,
    oscillation,
)
from noetherperf.figures.claims import Claim, Data
from noetherperf.plots import adaptive, heads, planar, training
from noetherperf.plots.style import Picture, save

__all__ = ["GALLERY", "Claim", "Data", "Figure", "load", "make"]


@dataclass(frozen=True)
class Figure:
    """One figure of the gallery.

    Attributes:
        title: Its subject, in one line.
        compute: quick -> data; quick=True computes a smaller version, for tests.
        draw: Data -> a matplotlib Figure.
        claims: Data -> the claims of the caption.
    """

    title: str
    compute: Callable[[bool], Data]
    draw: Callable[[Data], Picture]
    claims: Callable[[Data], list[Claim]]


GALLERY: dict[str, Figure] = {
    "fields": Figure(
        "gradients are orthogonal to the generators of symmetries", fields.compute, planar.fields, fields.claims
    ),
    "manifolds": Figure(
        "gradient flow stays on a line, a circle, a hyperbola; what training adds leaves them",
        manifolds.compute,
        planar.manifolds,
        manifolds.claims,
    ),
    "modified": Figure(
        "modified loss and modified flow follow the steps that gradient flow loses",
        modified.compute,
        planar.modified,
        modified.claims,
    ),
    "neurons": Figure(
        "single parameters are noisy, neurons are smooth", neurons.compute, training.neurons, neurons.claims
    ),
    "noise": Figure(
        "the noise of minibatches makes norms grow: four batch sizes, without and with momentum",
        noise.compute,
        training.noise,
        noise.claims,
    ),
    "dynamics": Figure(
        "exact dynamics of all three charges, VGG-16 with and without BatchNorm",
        dynamics.compute,
        training.dynamics,
        dynamics.claims,
    ),
    "oscillation": Figure(
        "momentum makes charges oscillate: three regimes of damping",
        oscillation.compute,
        training.oscillation,
        oscillation.claims,
    ),
    "errors": Figure(
        "errors of both flow laws and of the discrete law over learning rate, batch size and momentum",
        errors.compute,
        training.errors,
        errors.claims,
    ),
    "budget": Figure(
        "where the norm of a layer comes from and goes to, and the equilibrium of decay and growth",
        budget.compute,
        training.budget,
        budget.claims,
    ),
    "adamw": Figure(
        "the laws that AdamW keeps and those that it breaks, beside SGD", adamw.compute, adaptive.adamw, adamw.claims
    ),
    "equilibrium": Figure(
        "normalised neurons go to the norm and the angular update that theory predicts, under SGD and AdamW",
        equilibrium.compute,
        adaptive.equilibrium,
        equilibrium.claims,
    ),
    "decay": Figure(
        "in which layers independent updates balance weight decay, and which schedule of it keeps norms",
        decay.compute,
        adaptive.decay,
        decay.claims,
    ),
    "balance": Figure(
        "the matrices that heads and linear layers conserve: eigenvalues under SGD and AdamW, on their laws",
        balance.compute,
        heads.balance,
        balance.claims,
    ),
}


def make(name: str, directory: Path, *, quick: bool = False, redraw: bool = False) -> tuple[list[Claim], list[Path]]:
    """Compute a figure, draw it, check its claims, and save everything.

    Args:
        name: A key of GALLERY.
        directory: Created if missing. Gets the picture, name.png and name.pdf; its data, name.npz; and its claims with
            their values, name.json.
        quick: Compute the smaller version.
        redraw: Load the data from name.npz instead of computing it.

    Returns:
        All claims, whether they hold or not, and the files.

    Raises:
        KeyError: The name is unknown.
        FileNotFoundError: redraw is set and name.npz is missing.
    """
    figure, stem = GALLERY[name], directory / name
    directory.mkdir(parents=True, exist_ok=True)
    data_file = stem.with_suffix(".npz")
    if redraw:
        data = load(data_file)
    else:
        data = figure.compute(quick)
        np.savez_compressed(data_file, allow_pickle=False, **data)
    pictures = save(figure.draw(data), stem)
    claims = figure.claims(data)
    checked = {"figure": name, "title": figure.title, "claims": [claim.to_dict() for claim in claims]}
    claims_file = stem.with_suffix(".json")
    claims_file.write_text(json.dumps(checked, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return claims, [*pictures, data_file, claims_file]


def load(file: Path) -> Data:
    """The data of a figure from its .npz file. It holds numbers and text; nothing in it is executed."""
    if not file.exists():
        raise FileNotFoundError(f"there is no {str(file)!r} to draw again; make the figure without --redraw first")
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
