"""Find every axis-aligned conservation law of a model, from its gradients alone.

    symmetries = nperf.find_symmetries(model, example_input)
    optimizer = nperf.SGD(model.named_parameters(), lr=0.1, symmetries=symmetries)

A symmetry is a linear relation between the products ⟨g, ψ⟩ of gradients with generators that holds on every batch.

    probe        random batches through a float64 copy of the model, and their gradients
    sums         the products for each index of each axis, over those gradients
    flow         which operations stand in the way of a law, for the reasons
    search       relations between the products: of parts, then of whole tensors
    naming       relations become symmetries with names and meanings
    verify       every symmetry is tested on parameters and batches that it was not found with
    mixes        which rescales are the diagonal of a law of matrices
    balances     that law, claimed in their place where it is asked for
    found        the result
"""

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from noetherperf.detect.balances import balances_of
from noetherperf.detect.found import Symmetries
from noetherperf.detect.naming import Named, name_all
from noetherperf.detect.outputs import Loss
from noetherperf.detect.probe import Probe
from noetherperf.detect.progress import Stage, bar
from noetherperf.detect.search import Search
from noetherperf.detect.threads import threads
from noetherperf.detect.verify import Verified, verified
from noetherperf.symmetry import Part, Symmetry, validate

__all__ = ["Symmetries", "find_symmetries"]

TOLERANCE = 1e-9
SMALL = 2_000_000  # parameters
N_LOSSES = 2  # that verify each symmetry


def find_symmetries(
    model: nn.Module,
    *example_inputs: Any,
    loss: Loss = "cross_entropy",
    verify: bool = True,
    matrix: bool = False,
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
        verify: Check every claim on fresh parameters and batches; those with a relative defect above 1e-9 are listed
            as rejected. The meanings then tell which rescales are the diagonal of a law of matrices.
        matrix: Claim these laws, too: a Balance, tested in every entry, in the place of the Rescale that is its
            diagonal. It needs `verify`.
        progress: Show a bar with an estimate of the time left on stderr; None: if stderr is a terminal.
        example_options: Keyword inputs of the forward.

    Returns:
        The symmetries with meanings and defects, and for each other parameter the reason why it is in none.

    Raises:
        TypeError: `model` is no module or a ScriptModule, or no logits can be found in its output.
        ValueError: The model has no trainable parameters of real numbers, or a tensor on the meta device; `loss` is
            unknown, or the cross entropy of one class; `matrix` is set without `verify`.
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
    if matrix and not verify:
        raise ValueError("matrix=True claims laws that are tested in every entry, and verify=False tests none")
    with bar(progress) as report, threads(_n_threads(model)), torch.inference_mode(False):
        probe = Probe(model, example_inputs, example_options, loss)
        search = Search(probe, report)
        named = name_all(search.run(), probe.model, search.shapes, loss)
        validate([item.symmetry for item in named], search.shapes)
        report(Stage.VERIFICATION, 0.0)
        n_losses = 1 if search.sums.large else N_LOSSES
        tested = verified([item.symmetry for item in named], probe, n_losses) if verify else Verified({}, {})
        hold = [item.symmetry for item in named if tested.defects.get(item.symmetry.name, 1.0) <= TOLERANCE]
        whole = balances_of(hold, tested.mixing, probe, n_losses, TOLERANCE) if matrix else {}
        report(Stage.VERIFICATION, 1.0)
    rejected = {
        name: f"its relative defect is {defect:.1e} on fresh batches, above {TOLERANCE:g}"
        for name, defect in tested.defects.items()
        if not defect <= TOLERANCE
    }
    claimed = [item for item in named if item.symmetry.name not in rejected]
    meanings = {item.symmetry.name: _meaning(item, tested.mixing, whole) for item in claimed}
    defects = {name: defect for name, defect in tested.defects.items() if name not in rejected}
    names = {name: balance.name for name, (balance, _) in whole.items()}
    return Symmetries(
        [whole[name][0] if (name := item.symmetry.name) in whole else item.symmetry for item in claimed],
        meanings={names.get(name, name): meaning for name, meaning in meanings.items()},
        defects={names.get(name, name): whole[name][1] if name in whole else x for name, x in defects.items()},
        unmatched=_unmatched(model, claimed, [s.symmetry for s in named if s.symmetry.name in rejected], search),
        rejected=rejected,
        outputs=probe.outputs,
        undecided=search.undecided,
    )


def _meaning(item: Named, mixing: Mapping[str, int], whole: Container[str]) -> str:
    n, how = mixing.get(item.symmetry.name, 1), "whole" if item.symmetry.name in whole else "unit by unit"
    return item.meaning + (f"; any mix of {n} units keeps the loss: a law of matrices, claimed {how}" if n > 1 else "")


def _unmatched(
    model: nn.Module, claimed: Sequence[Named], rejected: Sequence[Symmetry], search: Search
) -> dict[str, str]:
    matched = {part.parameter for item in claimed for part in item.symmetry.parts}
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
