"""What is known of other optimizers' steps: decoupled weight decay, and the share of an update that is carried over.

In p' = r p − η u, r = 1 − ηλ where weight decay λ acts on the parameter alone, otherwise 1. b is the share of u that
the next step carries over. It is a model where u is a decaying sum of past gradients, over a preconditioner that
changes slowly. Elsewhere the law is open, and says why:

    optimizer of torch            r           b                        open
    SGD                           1           momentum                 with nesterov; with weight decay
    SGD without momentum          1 − ηλ      0
    Adam, AdamW                   1 − ηλ if   β₁ c_k/c_{k+1},          with coupled weight decay
                                  decoupled   c_k = 1 − β₁^k
    Adamax                        1           the same                 with weight decay
    RMSprop                       1           momentum                 with weight decay
    Adagrad, Adadelta             1           0                        with weight decay
    Adafactor                     1 − ηλ      0
    NAdam, RAdam                  1 − ηλ if   –                        yes
                                  decoupled
    Muon                          1 − ηλ      –                        yes
    others                        1           –                        yes

Derived in docs/theory.md, section 8. Coupled weight decay goes through the buffer or the preconditioner, so that the
law's forced part grows without bound and its defect cancels it.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from noetherperf.common.untrusted import shown
from noetherperf.optim import adam, sgd
from noetherperf.optim.following import Group
from noetherperf.rules.adam import ADAM, AdamOptions
from noetherperf.rules.law import Law
from noetherperf.rules.numbers import betas_in, check_number, number_in

#: An option by hand: a number, or a function that reads it from a parameter group.
ByHand = float | Callable[[Group], float]


def _nothing(slot: Mapping[str, Any], age: int) -> Tensor | None:
    return None


@dataclass(frozen=True)
class Known:
    """What is known of the steps of one parameter group.

    Attributes:
        decay: λ of the parameter alone.
        carry: b, or β₁ of a corrected one.
        corrected: Whether b is β₁ c_k/c_{k+1}.
        reason: Why the law is open; empty if it is not.
        carried: What a tensor's state carries into its next step, in units of u without correction: of the state, and
            the steps that it has made.
    """

    decay: float = 0.0
    carry: float = 0.0
    corrected: bool = False
    reason: str = ""
    carried: Callable[[Mapping[str, Any], int], Tensor | None] = _nothing


def _coupled(group: Group, through: str) -> str:
    """The reason why coupled weight decay leaves a law open; empty without weight decay."""
    if number_in(group, "weight_decay") == 0.0:
        return ""
    return f"weight decay goes through the {through}, so that free + forced leaves out what it takes away"


def _buffer(slot: Mapping[str, Any], age: int) -> Tensor | None:
    return slot.get("momentum_buffer")


def _sgd(group: Group) -> Known:
    momentum = number_in(group, "momentum")
    if momentum == 0.0:
        return Known(decay=number_in(group, "weight_decay"))  # u = g: coupled and decoupled decay are one
    reason = _coupled(group, "momentum buffer")
    if group["nesterov"]:
        reason = "an update with Nesterov momentum is no decaying sum of gradients"
    return Known(carry=momentum, reason=reason and f"{reason}; noetherperf.SGD knows the law", carried=_buffer)


def _rmsprop(group: Group) -> Known:
    return Known(carry=number_in(group, "momentum"), reason=_coupled(group, "preconditioner"), carried=_buffer)


def _decoupled(group: Group) -> bool:
    return bool(group.get("decoupled_weight_decay"))


def _adam(group: Group) -> Known:
    beta1, beta2 = betas_in(group)
    decay, amsgrad = number_in(group, "weight_decay"), bool(group.get("amsgrad"))
    options = AdamOptions(0.0, beta1, beta2, number_in(group, "eps"), decay, amsgrad, decoupled=_decoupled(group))

    def carried(slot: Mapping[str, Any], age: int) -> Tensor | None:
        return ADAM.carried(tuple(map(slot.get, ADAM.buffers)), options, age)

    reason = ADAM.open_reason(options, Law.NORM)
    return Known(decay if options.decoupled else 0.0, beta1, corrected=True, reason=reason, carried=carried)


def _adamw(group: Group) -> Known:
    return _adam({**group, "decoupled_weight_decay": True})


def _adamax(group: Group) -> Known:
    def carried(slot: Mapping[str, Any], age: int) -> Tensor | None:
        mean, scale = slot.get("exp_avg"), slot.get("exp_inf")
        return None if mean is None or scale is None else torch.where(mean == 0.0, 0.0, mean / scale)

    reason = _coupled(group, "preconditioner")
    return Known(0.0, betas_in(group)[0], corrected=True, reason=reason, carried=carried)


def _without_memory(group: Group) -> Known:
    return Known(reason=_coupled(group, "preconditioner"))


def _adafactor(group: Group) -> Known:
    return Known(decay=number_in(group, "weight_decay"))


def _open(what: str) -> Callable[[Group], Known]:
    """Of an optimizer that decays decoupled if it is asked to."""

    def known(group: Group) -> Known:
        return Known(number_in(group, "weight_decay") if _decoupled(group) else 0.0, reason=what)

    return known


def _muon(group: Group) -> Known:
    return Known(number_in(group, "weight_decay"), reason="Muon's update is orthogonalized, and no sum of gradients")


#: The optimizers that are known, each with a function of a parameter group.
TABLE: dict[type[Optimizer], Callable[[Group], Known]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adamw,
    torch.optim.Adamax: _adamax,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _without_memory,
    torch.optim.Adadelta: _without_memory,
    torch.optim.Adafactor: _adafactor,
    torch.optim.NAdam: _open("NAdam's update looks ahead, and is no decaying sum of gradients"),
    torch.optim.RAdam: _open("RAdam rectifies its update anew in every step, so that it is no decaying sum"),
    torch.optim.Muon: _muon,
    sgd.SGD: _sgd,
    adam.Adam: _adam,
    adam.AdamW: _adamw,
}


class Knowledge:
    """What is known of one optimizer.

    Args:
        optimizer: The optimizer.
        like: The class of the table that it steps like; None: its own, or one that it has its step from.
        carry, decay: By hand, in the place of what the table says.

    Raises:
        ValueError: `like` is not in the table.
    """

    def __init__(
        self, optimizer: Optimizer, like: type[Optimizer] | None, carry: ByHand | None, decay: ByHand | None
    ) -> None:
        if like is not None and not (isinstance(like, type) and like in TABLE):
            names = ", ".join(dict.fromkeys(kind.__name__ for kind in TABLE))
            raise ValueError(f"like={shown(like)} is not known; it must be one of torch.optim's {names}")
        self._name = type(optimizer).__name__
        self._of = TABLE.get(like or _kind(type(optimizer)) or Optimizer, self._unknown)
        self._carry, self._decay = carry, decay

    def _unknown(self, group: Group) -> Known:
        return Known(
            reason=f"it is not known whether an update of {self._name} is a decaying sum of gradients; if it is, give "
            "Probe its carry= or like="
        )

    def of(self, group: Group) -> Known:
        """What is known of the steps of a parameter group with its present options.

        Raises:
            TypeError: An option, or what is given by hand, is no number.
            ValueError: It is out of range, or a tensor of several elements.
        """
        known = self._of(group)
        if self._carry is not None:
            # The known state is of the known carry.
            known = Known(known.decay, self._number("carry", self._carry, group, below=1.0))
        if self._decay is not None:
            known = replace(known, decay=self._number("decay", self._decay, group))
        return known

    def _number(self, name: str, given: ByHand, group: Group, below: float = float("inf")) -> float:
        found = given(group) if callable(given) else given
        check_number(name, found)
        value = float(found)
        if not 0.0 <= value < below:
            raise ValueError(f"{name} must be at least 0" + (" and below 1" if below == 1.0 else "") + f", got {value}")
        return value


def _kind(cls: type[Optimizer]) -> type[Optimizer] | None:
    """The known class that an optimizer's class is, or has its step from."""
    for base in cls.__mro__:
        if base in TABLE and inspect.unwrap(cls.step) is inspect.unwrap(base.step):
            return base
    return None
