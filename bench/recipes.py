"""Optimizers to compare: of each update rule noetherperf's and torch's, with the same options, and the rule in plain
torch.

A case names its recipe.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import noetherperf as nperf
from noetherperf.optim.measured import MeasuredOptimizer

LR = 1e-3
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9
BETAS, EPS = (0.9, 0.999), 1e-8
STEPS = 10  # that warm buffers were made in, where torch counts them

Buffers = Sequence[Tensor]  # of one tensor, in the order of Recipe.buffers
#: (p, g, buffers) -> u, the update of one tensor.
UpdateOf = Callable[[Tensor, Tensor, Buffers], Tensor]


@dataclass(frozen=True)
class Recipe:
    """One update rule with its options.

    Attributes:
        ours, torch: Both optimizers' classes.
        options: Of both.
        buffers: Keys of the buffers in torch's state of a parameter.
        counts_steps: Whether the state has a "step" beside them.
        step: (p, g, buffers): one step of one tensor in the plainest torch, in place, for torch.compile to fuse.
        before, after: The update from what there is before, or after the step: one of them is None.
        sums_of_update: Whether its law needs ⟨p, u⟩ and ⟨u, 1⟩ beside the common moments.
        is_squared: Whether each buffer is a mean of squares.
    """

    ours: type[MeasuredOptimizer]
    torch: type[torch.optim.Optimizer]
    options: Mapping[str, Any]
    buffers: tuple[str, ...]
    counts_steps: bool
    step: Callable[[Tensor, Tensor, Buffers], None]
    before: UpdateOf | None
    after: UpdateOf | None
    sums_of_update: bool = False
    is_squared: tuple[bool, ...] = ()

    @property
    def passes(self) -> tuple[int, int]:
        """Streams that a step must read, and write: p, g and the buffers; p and the buffers."""
        return 2 + len(self.buffers), 1 + len(self.buffers)

    def state(self, buffers: Buffers) -> dict[str, Any]:
        """torch's state of a parameter with these buffers."""
        count = {"step": torch.tensor(float(STEPS))} if self.counts_steps else {}
        return count | dict(zip(self.buffers, buffers, strict=True))


# ---- SGD ------------------------------------------------------------------------------------------------------------


def _plain_step(p: Tensor, g: Tensor, buffers: Buffers) -> None:
    p.copy_(p - LR * (g + WEIGHT_DECAY * p))


def _momentum_step(p: Tensor, g: Tensor, buffers: Buffers) -> None:
    (v,) = buffers
    v.copy_(MOMENTUM * v + g + WEIGHT_DECAY * p)
    p.copy_(p - LR * v)


def _sgd(momentum: float) -> Recipe:
    return Recipe(
        nperf.SGD,
        torch.optim.SGD,
        {"lr": LR, "momentum": momentum, "weight_decay": WEIGHT_DECAY},
        ("momentum_buffer",) if momentum else (),
        counts_steps=False,
        step=_momentum_step if momentum else _plain_step,
        before=None if momentum else lambda p, g, _: g + WEIGHT_DECAY * p,
        after=(lambda p, g, buffers: buffers[0]) if momentum else None,
        is_squared=(False,) if momentum else (),
    )


# ---- AdamW ----------------------------------------------------------------------------------------------------------


def _adamw_update(p: Tensor, g: Tensor, buffers: Buffers) -> Tensor:
    """m/(c D); the steps' number counts as constant, which spares torch.compile a new compilation at each step."""
    m, n = buffers
    root = (1 - BETAS[1] ** (STEPS + 1)) ** 0.5
    u: Tensor = m / (1 - BETAS[0] ** (STEPS + 1)) / (n.sqrt() / root + EPS)
    return u


def _adamw_step(p: Tensor, g: Tensor, buffers: Buffers) -> None:
    m, n = buffers
    m.copy_(torch.lerp(m, g, 1 - BETAS[0]))
    n.copy_(BETAS[1] * n + (1 - BETAS[1]) * g * g)
    p.copy_((1 - LR * WEIGHT_DECAY) * p - LR * _adamw_update(p, g, buffers))


_ADAMW = Recipe(
    nperf.AdamW,
    torch.optim.AdamW,
    {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY},
    ("exp_avg", "exp_avg_sq"),
    counts_steps=True,
    step=_adamw_step,
    before=None,
    after=_adamw_update,
    sums_of_update=True,
    is_squared=(False, True),
)

#: By the name that cases give them; b is SGD's momentum.
RECIPES = {"b0.9": _sgd(MOMENTUM), "b0": _sgd(0.0), "adamw": _ADAMW}
