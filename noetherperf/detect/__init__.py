"""Find every axis-aligned conservation law of a model, from its gradients alone.

    symmetries = nperf.find_symmetries(model, example_input)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=symmetries)

A symmetry is a linear relation between the products ⟨g, ψ⟩ of gradients with generators that holds on every batch. The
search (search.py) takes random batches through a copy of the model that computes exactly (probe.py), solves for all
such relations (relations.py), and gives them names (naming.py). Each is then put to the test on parameters and batches
that it was not found with.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from noetherperf.detect.found import Symmetries
from noetherperf.detect.naming import Named, name_all
from noetherperf.detect.probe import EXACT_EPS, Loss, Probe
from noetherperf.detect.search import Search
from noetherperf.symmetry import Symmetry, validate

__all__ = ["EXACT_EPS", "Symmetries", "find_symmetries"]

TOLERANCE = 1e-9
#: Gradients are not asked to be smaller than this against those of their module: below, there is rounding.
FLOOR = 1e-3
N_BATCHES, N_LOSSES = 2, 2


def find_symmetries(
    model: nn.Module,
    *example_inputs: Any,
    loss: Loss = "cross_entropy",
    verify: bool = True,
    progress: bool | None = None,
    **example_options: Any,
) -> Symmetries:
    """Find the symmetries of a model whose groups are slices of its parameters along an axis.

    For all groups A of one symmetry, with ψ = 1_A (translation) or ψ = θ_A with coefficients (scale, rescale),

        ⟨g, ψ⟩ = 0 on every batch.

    These relations are found as null vectors of the products' matrix over random batches, in float64, with the eps of
    every normalisation at 1e-14, on a copy with parameters drawn anew: they are the architecture's and no accident of
    the present values. Dropout is at work as in training, so what one mask would break is not claimed. Coefficients
    are small integers (2 behind a squared ReLU). What follows from finer relations is left out. A grouped convolution
    that is not depthwise is matched block by block and channel by channel of all blocks. The model, its buffers,
    gradients, mode and all random states stay as they are; memory is about five times the parameters in float64.

    Args:
        model: Any module. A module in training mode may hold others in evaluation mode, and those are left so; a model
            in evaluation mode is examined as it would train.
        example_inputs: What its forward takes; batches like these are drawn at random, smaller ones where the first
            axis is a batch. Integers that go to an embedding are drawn from all its rows.
        loss: What makes the output symmetric. "cross_entropy": only differences between logits count (classes on the
            last axis, on axis 1 of four or more). "mse" or None: nothing. A function of the model's output that gives
            a scalar: it is differentiated with the model. Of a tuple the first tensor is taken with all of its last
            size, of a dict or object the logits; where the loss reads more, give a function.
        verify: Check every claim on fresh parameters and batches, and leave out, with a word, what has a relative
            defect above 1e-9.
        progress: Show a bar on stderr; None: if that is a terminal.
        example_options: Keyword inputs of the forward.

    Returns:
        The symmetries, with meanings, defects, and the reasons why other parameters are in none.

    Raises:
        TypeError: `model` is no module, or no logits can be found in its output.
        ValueError: The model has no trainable parameters, or `loss` is unknown.
        RuntimeError: The model cannot be copied, is not deterministic, or gives no finite output.

    Source: Kunin et al. (2021), arXiv:2012.04728, for the symmetries; the search is derived here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_symmetries takes a torch.nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters, so there is nothing to conserve")
    with _bar(progress) as report:
        probe = Probe(model, example_inputs, example_options, loss)
        search = Search(probe, report)
        named = name_all(search.run(), probe.model, search.shapes, loss)
        validate([item.symmetry for item in named], search.shapes)
        defects = _defects([item.symmetry for item in named], probe, 1 if search.large else N_LOSSES) if verify else {}
        report(1.0)
    rejected = {
        name: f"its relative defect is {defect:.1e} on fresh batches, above {TOLERANCE:g}"
        for name, defect in defects.items()
        if not defect <= TOLERANCE
    }
    claimed = [item for item in named if item.symmetry.name not in rejected]
    return Symmetries(
        [item.symmetry for item in claimed],
        meanings={item.symmetry.name: item.meaning for item in claimed},
        defects={name: defect for name, defect in defects.items() if name not in rejected},
        unmatched=_unmatched(model, claimed, search),
        rejected=rejected,
    )


def _unmatched(model: nn.Module, claimed: Sequence[Named], search: Search) -> dict[str, str]:
    matched = {part.parameter for item in claimed for part in item.symmetry.parts}
    reasons = {}
    for name, p in model.named_parameters():
        if name in matched:
            continue
        if not p.requires_grad:
            reasons[name] = "frozen: requires_grad is False"
        elif not p.numel():
            reasons[name] = "it has no elements"
        elif name not in search.reached:
            reasons[name] = "no gradient reaches it from the output"
        elif name in search.fractional:
            reasons[name] = f"a relation holds, but not in small integers: {search.fractional[name]}"
        else:
            reasons[name] = "no sum over its rows, columns, slices or whole vanishes, alone or with others"
    return reasons


def _defects(symmetries: Sequence[Symmetry], probe: Probe, n_losses: int) -> dict[str, float]:
    """The largest |⟨g, ψ⟩| / (|g_A| |ψ_A|) of each symmetry over fresh parameters and batches."""
    worst = dict.fromkeys((symmetry.name for symmetry in symmetries), 0.0)
    for _ in range(N_BATCHES):
        probe.redraw()
        for gradients in probe.gradients(n_losses):
            usual = _usual(gradients)
            for symmetry in symmetries:
                defect = _defect(symmetry, probe.parameters, gradients, usual)
                worst[symmetry.name] = max(worst[symmetry.name], float(defect.max()))
    return worst


def _usual(gradients: dict[str, Tensor]) -> dict[str, float]:
    """The largest root mean square of a gradient in each module."""
    usual: dict[str, float] = {}
    for name, g in gradients.items():
        module = name.rpartition(".")[0]
        usual[module] = max(usual.get(module, 0.0), float(g.square().mean().sqrt()))
    return usual


def _defect(
    symmetry: Symmetry, parameters: dict[str, nn.Parameter], gradients: dict[str, Tensor], usual: dict[str, float]
) -> Tensor:
    """Relative defect per group; gradients far below those of their module count as FLOOR of those."""
    constraint, sq_g, sq_psi, least = [], [], [], []
    for part in symmetry.parts:
        p = parameters[part.parameter].detach()
        g = gradients.get(part.parameter)
        g = part.grouped(torch.zeros_like(p) if g is None else g)
        psi = part.weight * (torch.ones_like(g) if symmetry.law == "translation" else part.grouped(p))
        constraint.append((g * psi).sum(1))
        sq_g.append(g.square().sum(1))
        sq_psi.append(psi.square().sum(1))
        least.append(g.shape[1] * (FLOOR * usual.get(part.parameter.rpartition(".")[0], 0.0)) ** 2)
    size = (torch.stack(sq_g).sum(0).clamp(min=sum(least)) * torch.stack(sq_psi).sum(0)).sqrt()
    total = torch.stack(constraint).sum(0).abs()
    return torch.where(total == 0.0, 0.0, total / size)


@contextmanager
def _bar(progress: bool | None) -> Iterator[Callable[[float], None]]:
    console = Console(stderr=True)
    shown = sys.stderr.isatty() if progress is None else progress
    with Progress(console=console, transient=console.is_terminal, disable=not shown) as bar:
        task = bar.add_task("finding symmetries", total=1.0)
        yield lambda done: bar.update(task, completed=done)
