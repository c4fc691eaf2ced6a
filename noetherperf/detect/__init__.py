"""Find every axis-aligned conservation law of a model, from its gradients alone.

    symmetries = nperf.find_symmetries(model, example_input)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=symmetries)

A symmetry is a linear relation between the products ⟨g, ψ⟩ of gradients with generators that holds on every batch.

    probe        random batches through a float64 copy of the model, and their gradients
    sums         the products for each index of each axis, over those gradients
    flow         which operations stand in the way of a law, for the reasons
    search       relations between the products: of parts, then of whole tensors
    softmax      which relations a softmax in the loss makes hold
    naming       relations become symmetries with names and meanings
    mixes        which rescales are the diagonal of a law of matrices
    balances     that law, which is claimed in their place
    verify       every symmetry is tested on parameters and batches that it was not found with
    found        the result
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from noetherperf.detect.balances import balances_of, mixed
from noetherperf.detect.found import Symmetries
from noetherperf.detect.mixes import mixing_units
from noetherperf.detect.naming import Named, name_all
from noetherperf.detect.outputs import Loss
from noetherperf.detect.probe import Probe
from noetherperf.detect.progress import Stage, bar
from noetherperf.detect.search import Search
from noetherperf.detect.softmax import of_the_loss
from noetherperf.detect.threads import threads
from noetherperf.detect.verify import defects_of
from noetherperf.engines.cost import cost
from noetherperf.symmetry import Part, Shape, Symmetry, balances_in, validate

__all__ = ["Symmetries", "find_symmetries"]

TOLERANCE = 1e-9
SMALL = 2_000_000  # parameters
N_LOSSES = 2  # that verify each symmetry


def find_symmetries(
    model: nn.Module,
    *example_inputs: Any,
    loss: Loss = "cross_entropy",
    verify: bool = True,
    matrix: bool | Literal["both"] = True,
    largest_matrix: int = 512,
    progress: bool | None = None,
    **example_options: Any,
) -> Symmetries:
    """Find the symmetries of a model whose groups are slices of its parameters along an axis.

    For all groups A of one symmetry, with ψ = 1_A (translation) or ψ = θ_A with coefficients (scale, rescale),

        ⟨g, ψ⟩ = 0 on every batch.

    These relations are the null vectors of the matrix of products over random batches. It is evaluated in float64, with
    the eps of every normalisation at 1e-20, on a copy with random parameters, so a relation is a property of the
    architecture and not of the present values. Dropout is active as in training, so a relation that one mask breaks is
    not claimed. Coefficients are small integers (2 after a squared ReLU). What follows from finer relations is left
    out. A grouped convolution that is not depthwise is matched both by block and by channel of all blocks.

    The model, its buffers, gradients, mode and all random states stay as they are. Memory is about four times the
    parameters in float64. A model of less than two million parameters is searched on one thread.

    Args:
        model: Any module. If it is in training mode, its modules in evaluation mode stay so; if it is in evaluation
            mode, the copy is in training mode.
        example_inputs: Inputs of its forward: tensors, or tuples, lists and dicts of tensors. Batches like these are
            drawn at random, smaller ones where the first axis is a batch. Integers that go to an embedding are drawn
            from all its rows.
        loss: What the loss ignores in the output. "cross_entropy": a constant added to all logits (classes on axis 1 of
            four or more; of three on the last, or on axis 1 where more parameters write to it). "mse" or None: nothing.
            The loss reads the first tensor of a tuple and all others of its last size, or the logits of a dict or
            object, and auxiliary heads; `outputs` of the result names them. Where it reads something else, give a
            function from the model's output to a scalar, which is differentiated with the model; batches then have the
            size of the example's, because the function may hold targets.
        verify: Check every claim on fresh parameters and batches, a matrix in every entry; those with a relative defect
            above 1e-9 are listed as rejected.
        matrix: Whether a Balance is claimed in the place of the Rescale that is its diagonal, where any mix of units
            keeps the loss (linear pairs, attention). False: the Rescale alone. "both": the Rescale beside it.
        largest_matrix: The most units that mix with each other, n, for a Balance. It keeps about nine numbers for each
            of n(n + 1)/2 entries, 10 MB of 512 units; of more units the Rescale is claimed, whose meaning says so.
        progress: Show a bar with an estimate of the time left on stderr; None: if stderr is a terminal.
        example_options: Keyword inputs of the forward.

    Returns:
        The symmetries with meanings and defects, for each other parameter the reason why it is in none, and what the
        matrices cost.

    Raises:
        TypeError: `model` is no module or a ScriptModule, or no logits can be found in its output.
        ValueError: The model has no trainable parameters of real numbers, or a tensor on the meta device; `loss` is
            unknown, or the cross entropy of one class; the example is an empty batch; `matrix` is none of the above, or
            `largest_matrix` below 1.
        RuntimeError: The model cannot be copied, is not deterministic, or its output is not finite.

    Source: Kunin et al. (2021), arXiv:2012.04728, for the symmetries; the search is derived here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_symmetries takes a torch.nn.Module, got {type(model).__name__}")
    if not any(p.requires_grad and not p.is_complex() for p in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no trainable parameters of real numbers, so nothing is conserved")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{name or type(module).__name__!r} is a ScriptModule, whose operations cannot be followed; "
                "give the module that was scripted or traced"
            )
    for name, x in itertools.chain(model.named_parameters(), model.named_buffers()):
        if x.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values; give the model memory by to_empty()")
    if not (isinstance(matrix, bool) or matrix == "both"):
        raise ValueError(f'matrix={matrix!r} is unknown; use True, False, or "both" for the diagonals beside matrices')
    if isinstance(largest_matrix, bool) or not isinstance(largest_matrix, int) or largest_matrix < 1:
        raise ValueError(f"largest_matrix must be a number of units, at least 1, got {largest_matrix!r}")
    with bar(progress) as report, threads(_n_threads(model)), torch.inference_mode(False):
        probe = Probe(model, example_inputs, example_options, loss)
        search = Search(probe, report)
        relations = search.run()
        named = name_all(relations, probe.model, search.shapes, of_the_loss(relations, probe))
        report(Stage.VERIFICATION, 0.0)
        mixes = mixing_units([item.symmetry for item in named], probe, search.sums.large)
        whole = balances_of(named, mixes, search.shapes, largest_matrix if matrix else 0)
        candidates = [item.symmetry for items in (named, *whole.values()) for item in items]
        validate(candidates, search.shapes)
        tested = defects_of(candidates, probe, 1 if search.sums.large else N_LOSSES) if verify else {}
        report(Stage.VERIFICATION, 1.0)
    rejected = {name: defect for name, defect in tested.items() if not defect <= TOLERANCE}
    claimed: list[Named] = []
    for item in named:
        name = item.symmetry.name
        of_matrices = whole.get(name, ())
        if any(one.symmetry.name in rejected for one in of_matrices):
            of_matrices = ()
        claimed += of_matrices
        if name not in rejected and (not of_matrices or matrix == "both"):
            n = max((mix.n for mix in mixes.get(name, ())), default=1)
            how = f"{mixed(n)} unit by unit" if n > 1 else ""
            too_large = f" (more than largest_matrix={largest_matrix})" if matrix and n > largest_matrix else ""
            claimed.append(replace(item, meaning=item.meaning + how + too_large))
    symmetries = [item.symmetry for item in claimed]
    return Symmetries(
        symmetries,
        meanings={item.symmetry.name: item.meaning for item in claimed},
        defects={symmetry.name: tested[symmetry.name] for symmetry in symmetries if verify},
        unmatched=_unmatched(model, symmetries, [one for one in candidates if one.name in rejected], search),
        rejected={
            name: f"its relative defect is {defect:.1e} on fresh batches, above {TOLERANCE:g}"
            for name, defect in rejected.items()
        },
        outputs=probe.outputs,
        undecided=search.undecided,
        costs=_costs(symmetries, search.shapes),
    )


def _costs(symmetries: Sequence[Symmetry], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """What their matrices cost; nothing where there are none."""
    balances = balances_in(symmetries)
    if not balances:
        return {}
    own = {part.parameter: shapes[part.parameter] for one in balances for part in one.parts}
    found = cost(own, balances)
    return {"products": found.products, "state": found.state - cost(own).state}


def _unmatched(
    model: nn.Module, claimed: Sequence[Symmetry], rejected: Sequence[Symmetry], search: Search
) -> dict[str, str]:
    matched = {part.parameter for symmetry in claimed for part in symmetry.parts}
    doubted = {part.parameter: symmetry.name for symmetry in rejected for part in symmetry.parts}
    sums, flow = search.sums, search.probe.flow
    reasons = {}
    for name, p in model.named_parameters():
        if name in matched:
            continue
        if not p.requires_grad:
            reasons[name] = "frozen: requires_grad is False"
        elif not p.numel():
            reasons[name] = "it has no elements"
        elif p.is_complex():
            reasons[name] = "it is complex, and a Part groups real numbers"
        elif name in sums.not_finite:
            reasons[name] = "its gradient is not finite"
        elif name not in sums.reached and not flow.is_read(name):
            reasons[name] = "the loss does not see it: the forward pass does not read it"
        elif name not in sums.reached:
            reasons[name] = "the loss does not see it: no gradient reaches it from the output"
        elif not bool(sums.alive(Part(name, None)).any()):
            reasons[name] = "the loss does not see it: its gradient is zero"
        elif name in search.fractional:
            reasons[name] = f"a relation holds, but not in small integers: {search.fractional[name]}"
        elif name in doubted:
            reasons[name] = f"its law {doubted[name]!r} did not hold on fresh batches"
        else:
            reasons[name] = flow.obstacles(name) or "no sum over its rows, columns, slices or whole vanishes"
    return reasons


def _n_threads(model: nn.Module) -> int:
    """One for small models, whose search is many small operations."""
    n_parameters = sum(p.numel() for p in model.parameters() if not nn.parameter.is_lazy(p))
    return 1 if n_parameters < SMALL else torch.get_num_threads()
