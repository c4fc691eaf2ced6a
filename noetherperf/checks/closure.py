"""The loss that a user's closure returns, or an error that says what is wrong with the closure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noetherperf.checks.exact import Stage

__all__ = ["check_same", "evaluate", "first_line"]

MAX_LOSS_CHANGE = 100  # machine epsilons between two evaluations; a change in the order of sums stays below


def evaluate(closure: Callable[[], Any], stage: Stage) -> Tensor:
    """The closure's loss, or an error that says what is wrong with the closure."""
    try:
        loss = closure()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if stage == "as_is":
            raise
        raise ValueError(
            f"the closure runs as the model is, but not in float64: {first_line(error)}; something in it insists on "
            "another dtype; set float64=False to check the model only as it is"
        ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the closure must return the loss as a tensor, got {type(loss).__name__}; is a return missing?"
        )
    if loss.numel() != 1:
        raise ValueError(f"the closure must return one number, got shape {tuple(loss.shape)}; reduce it with mean()")
    if not loss.requires_grad:
        raise ValueError(
            "the closure's loss has no gradient: it was detached, computed under no_grad, or is of no parameter; "
            "return the loss as it comes from the model"
        )
    if not loss.isfinite():
        raise ValueError(
            f"the closure's loss is {loss.item()}, and has no derivatives to check; take a batch and parameters that "
            "make it finite"
        )
    if stage != "as_is" and loss.dtype != torch.float64:
        raise ValueError(
            f"the closure's loss is {loss.dtype} although model and inputs are in float64: something in it casts where "
            "it cannot be seen; set float64=False to check the model only as it is"
        )
    return loss


def check_same(first: Tensor, second: Tensor) -> None:
    """Raise where two evaluations from the same state gave two losses."""
    a, b = first.item(), second.item()
    if abs(a - b) > MAX_LOSS_CHANGE * torch.finfo(first.dtype).eps * abs(a):
        raise ValueError(
            f"the closure is not deterministic: it returned {a:.9g} and then {b:.9g}, from the same parameters, "
            "buffers and random state; take one batch outside the closure, and no random numbers of your own generator"
        )


def first_line(error: BaseException) -> str:
    """Of an error's message; torch's have many."""
    return str(error).partition("\n")[0].rstrip(".")
