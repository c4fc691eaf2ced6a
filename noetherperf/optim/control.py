"""Control: learning rates that hold a charge's law on target, from what the optimizer measures while it steps.

optimizer = nperf.SGD(nperf.control.groups(model, symmetries), lr=0.1, symmetries=symmetries)
scheduler = nperf.control.EffectiveLearningRate(optimizer, ["conv1", "conv2"])
...
optimizer.step()
scheduler.step()

Effective learning rates are explained in docs/theory.md, section 6.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.rules.sgd import SgdRule
from noetherperf.symmetry import Scale, Symmetry
from noetherperf.symmetry.names import find, meant

__all__ = ["EffectiveLearningRate", "groups"]

BY_NAME = ("_group", "_charges", "_scaled", "targets")  # in a state_dict: by symmetry
PRESENT = "present_lrs"  # in a state_dict: the groups' learning rates, whichever scheduler set them


def groups(model: nn.Module, symmetries: Sequence[Symmetry]) -> list[dict[str, Any]]:
    """Named parameter groups for `SGD`: one for each Scale among the symmetries, and one for all other parameters.

    Some laws have parts in several groups, such as a Rescale from a BatchNorm to the next, normalised layer. Such a law
    is open as soon as the learning rates of these groups differ.

    Args:
        model: Its parameters are divided among the groups.
        symmetries: The Scales among them get a group each; others are ignored.

    Returns:
        Parameter groups of (name, parameter) pairs, without options of their own.

    Raises:
        ValueError: Two Scales share a parameter, or one names a parameter that the model does not have.
    """
    named = dict(model.named_parameters())
    made = []
    for symmetry in symmetries:
        if isinstance(symmetry, Scale):
            names = dict.fromkeys(part.parameter for part in symmetry.parts)
            if absent := [name for name in names if name not in named]:
                raise ValueError(
                    f"symmetry {symmetry.name!r}: parameter {absent[0]!r} is not in the model, or in a group already; "
                    "name symmetries of this model that share no parameter"
                )
            made.append({"params": [(name, named.pop(name)) for name in names]})
    return [*made, {"params": list(named.items())}] if named else made


class EffectiveLearningRate(LRScheduler):
    """Holds the effective learning rate of scale-symmetric layers, one parameter group each.

        η = target · f(t) · Q̄,   Q̄ = mean over the symmetry's groups of Q = Σ c|θ|²

    A normalised layer depends only on the direction of its weights. A step of length η|g| turns them by an angle
    proportional to η/|θ|², since |g| falls as 1/|θ|. Under an ordinary schedule |θ|² drifts by the scale law, and the
    effective learning rate with it. Here η follows |θ|² instead.

    Without weight decay |θ|² only grows, and η in proportion: both grow exponentially and overflow in the end. With
    weight decay λ both settle where decay and growth balance.

    It is a torch scheduler: call step() after each optimizer.step(), once a batch. After a warmup (SequentialLR) it
    starts on target, and groups that are not held get their initial η. In a ChainedScheduler, the other schedulers
    scale the targets that follow from names. A target given as a number is held, whatever they do. Between reads η
    changes only with f and with such schedulers.

    A read is `optimizer.readout()`. On the CPU it waits for nothing. On any other device it is a synchronous copy,
    which waits for the steps in flight. With `every=k` it does so once in k steps, and η is up to k − 1 steps late.
    With sharded parameters a read is a collective, so every rank must call step().

    Args:
        optimizer: `nperf.SGD`, which measures the symmetries.
        targets: Symmetry name → target of η/Q̄ at f = 1. Or names alone: the target is then the initial η of their
            group over the present Q̄. A group's initial η is its "initial_lr", as in torch's schedulers, or else its
            "lr".
        every: Steps between reads.
        factor: f, of the number of scheduler steps so far (0 before the first); by default 1. Parameter groups that no
            EffectiveLearningRate of the optimizer holds follow it too, as in torch's LambdaLR: η = initial η · f(t).
        last_epoch: As in torch's schedulers: −1, or the last epoch if training continues without a state_dict.

    Raises:
        TypeError: The optimizer measures no charges, or its steps are not SGD's.
        KeyError: A name is no symmetry of the optimizer; or last_epoch is not −1, and there is no "initial_lr".
        ValueError: No target is given, a target is not positive, or `every` is not a whole number of steps. Or a
            symmetry is no Scale, has parts in several parameter groups, shares its group with another one, or has Q̄ =
            0. Or its group's learning rate is a tensor that another group has, too.

    Source: van Laarhoven (2017), arXiv:1706.05350, for the effective learning rate; Li and Arora (2020),
        arXiv:1910.07454, for its exponential growth. The control by measured charges is new here.
    """

    def __init__(
        self,
        optimizer: MeasuredOptimizer,
        targets: Mapping[str, float] | Iterable[str],
        *,
        every: int = 1,
        factor: Callable[[int], float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, MeasuredOptimizer):
            raise TypeError(
                f"optimizer: {type(optimizer).__name__} measures no charges; control a noetherperf.MeasuredOptimizer, "
                "such as noetherperf.SGD"
            )
        if not isinstance(optimizer.rule, SgdRule):
            raise TypeError(
                "optimizer: η/|θ|² is the effective learning rate of noetherperf.SGD alone. That of "
                f"{type(optimizer).__name__} is another, and cannot be held yet; use noetherperf.SGD"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: must be a whole number of steps, at least 1, got {every!r}")
        if isinstance(targets, str):
            raise ValueError(f"targets: give a list of names, [{targets!r}], or a dict of name and target")
        asked: dict[str, float | None] = {**targets} if isinstance(targets, Mapping) else dict.fromkeys(targets)
        if not asked:
            raise ValueError("targets: name at least one Scale symmetry to hold")
        given = {_name(optimizer, name): target for name, target in asked.items()}
        if len(given) < len(asked):
            raise ValueError(f"targets: two of {', '.join(asked)} name one symmetry; give each once, by its name")
        self.every = every
        self._factor = factor
        self._group = {name: _group_of(optimizer, name) for name in given}
        for name, g in self._group.items():
            if other := next((o for o in given if o != name and self._group[o] == g), None):
                raise ValueError(
                    f"targets: {name!r} and {other!r} are both in parameter group {g}, which has one learning rate; "
                    "give each symmetry a group of its own (nperf.control.groups)"
                )
            if (sharing := _sharing(optimizer, g)) is not None:
                raise ValueError(
                    f"targets: parameter groups {g}, which {name!r} is in, and {sharing} have one tensor as their "
                    'learning rate, so that setting one sets both; give each its own, group["lr"] = group["lr"].clone()'
                )
        readout = optimizer.readout()
        self._charges = {name: float(readout[name].charge.mean()) for name in given}
        self.targets: dict[str, float] = {}
        for name, target in given.items():
            if not self._charges[name] > 0:
                raise ValueError(
                    f"targets: the charge of {name!r} is {self._charges[name]}, which must be above 0; leave it out, "
                    "or give its weights other initial values"
                )
            if target is None:
                group = optimizer.param_groups[self._group[name]]
                target = float(group.get("initial_lr", group["lr"])) / self._charges[name]
            if not (target > 0 and math.isfinite(target)):
                raise ValueError(f"targets: that of {name!r} must be positive and finite, got {target}")
            self.targets[name] = float(target)
        self._scaled = {name: 1.0 for name, target in given.items() if target is None}
        _SCHEDULERS.setdefault(optimizer, WeakSet()).add(self)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates for the next step; step() calls this.

        Returns:
            One for each parameter group.

        Raises:
            FloatingPointError: A charge is NaN or infinite: the training has diverged.
        """
        if self.last_epoch == 0:  # schedulers made before this one may have changed the learning rates
            self._follow(self.base_lrs)
        elif not self._is_initial:
            self._follow(self._last_lr)
        return self._lrs()

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        """The learning rates without other schedulers' scaling; torch calls this at a milestone of SequentialLR."""
        self._scaled = dict.fromkeys(self._scaled, 1.0)
        return self._lrs(anew=True)

    def _follow(self, before: Sequence[float | Tensor]) -> None:
        """Take over the factors by which other schedulers changed the learning rates since `before`; else exactly 1.

        A learning rate of 0 is skipped, since it has no factor.
        """
        for name, scale in self._scaled.items():
            lr, last = (float(lrs[self._group[name]]) for lrs in (self._present_lrs(), before))
            self._scaled[name] = scale * lr / last if lr != last != 0.0 else scale

    def _present_lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _lrs(self, *, anew: bool = False) -> list[float | Tensor]:
        """The learning rates that follow from the charges; anew: set groups that are not held even without `factor`."""
        if self.last_epoch % self.every == 0:
            readout = self.optimizer.readout()  # type: ignore[attr-defined]
            self._charges = {name: float(readout[name].charge.mean()) for name in self.targets}
        factor = 1.0 if self._factor is None else float(self._factor(self.last_epoch))
        control = (self, *_SCHEDULERS.get(self.optimizer, ()))
        held = {group for scheduler in control for group in scheduler._group.values()}
        lrs: list[float | Tensor] = [group["lr"] for group in self.optimizer.param_groups]
        for number, base in enumerate(self.base_lrs if anew or self._factor is not None else ()):
            if number not in held:
                lrs[number] = factor * float(base)
        for name, target in self.targets.items():
            if not math.isfinite(self._charges[name]):
                raise FloatingPointError(
                    f"the charge of {name!r} is {self._charges[name]} at step {self.last_epoch}: the training has "
                    "diverged; begin again with a smaller target or learning rate, or with weight decay"
                )
            lrs[self._group[name]] = target * factor * self._scaled.get(name, 1.0) * self._charges[name]
        return lrs

    def measured(self) -> dict[str, float]:
        """η/Q̄ of every held symmetry now: a read."""
        readout = self.optimizer.readout()  # type: ignore[attr-defined]
        lrs = self._present_lrs()
        return {name: lrs[self._group[name]] / float(readout[name].charge.mean()) for name in self.targets}

    def state_dict(self) -> dict[str, Any]:
        """Everything except the optimizer and `factor`, which the new scheduler is made with."""
        state = {name: value for name, value in super().state_dict().items() if name != "_factor"}
        return state | {PRESENT: self._present_lrs()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state_dict, with its targets, `every` and present learning rates.

        Raises:
            ValueError: It is of other symmetries or other parameter groups. Raised before anything is changed.
        """
        symmetries = self.optimizer.symmetries  # type: ignore[attr-defined]
        renamed = {name: names[0] for name in state_dict["_group"] if len(names := meant(name, symmetries)) == 1}
        own = {key: value for key, value in state_dict.items() if key != PRESENT}
        for key in BY_NAME:
            own[key] = {renamed.get(name, name): value for name, value in own[key].items()}
        if own["_group"] != self._group:
            raise ValueError(
                f"state_dict: it holds {_shown(state_dict['_group'])}, and this scheduler {_shown(self._group)}; "
                "make it with the same symmetries and parameter groups"
            )
        super().load_state_dict(own)
        # Not _last_lr: other schedulers may have changed the rates, and before its milestone this one has set none.
        for group, lr in zip(self.optimizer.param_groups, state_dict.get(PRESENT, self._last_lr), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(lr))
            else:
                group["lr"] = lr


_SCHEDULERS: WeakKeyDictionary[Optimizer, WeakSet[EffectiveLearningRate]] = WeakKeyDictionary()  # by their optimizer


def _name(optimizer: MeasuredOptimizer, key: str) -> str:
    """The name of the symmetry that is meant by a key, which may be an earlier name."""
    is_name = any(symmetry.name == key for symmetry in optimizer.symmetries)
    return key if is_name else find(key, optimizer.symmetries, f"no symmetry {key!r} is measured")


def _group_of(optimizer: MeasuredOptimizer, name: str) -> int:
    """The number of the one parameter group that all parts of a Scale are in."""
    symmetry = next(symmetry for symmetry in optimizer.symmetries if symmetry.name == name)
    if not isinstance(symmetry, Scale):
        raise ValueError(
            f"targets: {name!r} is a {symmetry.kind}, and an effective learning rate η/|θ|² is that of a scale symmetry"
        )
    number = {p: g for g, group in enumerate(optimizer.param_groups) for p in group["param_names"]}
    places = {part.parameter: number[part.parameter] for part in symmetry.parts}
    if len(set(places.values())) > 1:
        raise ValueError(
            f"targets: the parts of {name!r} are in several parameter groups ({_shown(places)}), and one learning rate "
            "holds one quantity; put them into one group (nperf.control.groups)"
        )
    return next(iter(places.values()))


def _sharing(optimizer: MeasuredOptimizer, number: int) -> int | None:
    """The number of another parameter group whose learning rate is the same tensor, or None."""
    lr = optimizer.param_groups[number]["lr"]
    others = (g for g, group in enumerate(optimizer.param_groups) if g != number and group["lr"] is lr)
    return next(others, None) if isinstance(lr, Tensor) else None


def _shown(places: Mapping[str, int]) -> str:
    return ", ".join(f"{name} in group {group}" for name, group in places.items())
