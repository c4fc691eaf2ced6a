"""Shadows: copies of the parameters that another optimizer steps. Each step is measured from copy to parameter.

A shadow is equal to its live parameter before a step. After it, the rule `given` steps the shadow to the live
parameter, and the engines measure that step like any other: they read shadow, parameter and gradient, and write the
shadow. Nothing is copied before a step, except parameters that other code has written in between.
"""

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from noetherperf.engines import gradient_dtypes
from noetherperf.optim.buffers import Buffers
from noetherperf.optim.distributed import local, local_buffer, moved
from noetherperf.optim.following import Parameters
from noetherperf.optim.inference import outside_inference
from noetherperf.optim.known import Knowledge
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.optim.measuring import Measuring
from noetherperf.optim.meters import Meter
from noetherperf.rules import given
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry


class ShadowMeasuring(Measuring):
    """The measuring of shadows: what one carries is in the followed optimizer's state, its gradients are of others."""

    can_repeat = False
    shadows: "Shadows"

    def _carried_by(self, place: int, buffers: tuple[Tensor | None, ...], age: int) -> Tensor | None:
        return self.shadows.carried(place, age)


class Shadows(MeasuredOptimizer):
    """The optimizer of the shadows, which follows another optimizer's measured parameters.

    Args:
        optimizer: The optimizer to follow.
        knowledge: What is known of its steps.
        names: The names of parameters by id().
        symmetries: What to measure, validated.
        backend: As the user named it.
    """

    rule: ClassVar[Rule[Any]] = given.GIVEN
    _measuring_type: ClassVar[type[Measuring]] = ShadowMeasuring
    _measuring: ShadowMeasuring

    def __init__(
        self,
        optimizer: Optimizer,
        knowledge: Knowledge,
        names: Mapping[int, str],
        symmetries: Sequence[Symmetry],
        backend: str,
    ) -> None:
        self._followed, self._knowledge = optimizer, knowledge
        self._all = [list(group["params"]) for group in optimizer.param_groups]
        wanted = {part.parameter for symmetry in symmetries for part in symmetry.parts}
        measured = [[p for p in params if names.get(id(p)) in wanted] for params in self._all]
        self._outer = [number for number, params in enumerate(measured) if params]  # of each of our groups
        live = [p for params in measured for p in params]
        self._live = Parameters([{"params": live, "param_names": [names[id(p)] for p in live]}])
        self._is_stale = False  # whether the followed optimizer's buffers were replaced
        self._looks = True  # whether to look at the live parameters: not while the followed optimizer makes a step
        self._moved: set[int] = set()  # those that the last step has moved, as far as version counters tell
        groups = [{"params": [(names[id(p)], _shadow(p)) for p in params]} for params in measured if params]
        nothing_known = {"lr": 1.0, "decay": 0.0, "carry": 0.0, "corrected": False, "reason": ""}
        super().__init__(groups, nothing_known, symmetries, backend)
        self._measuring.shadows = self
        self._shadows = self._measuring.parameters.all
        for shadow, p in zip(self._shadows, live, strict=True):
            self.state[shadow]["live"] = p

    # ---- before and after a step ------------------------------------------------------------------------------------

    def before(self) -> None:
        """The followed optimizer is about to make a step; the lock is held."""
        self._looks = True
        self._catch_up(begin=True)
        self._looks = False

    def after(self) -> None:
        """It has made a step; the lock is held."""
        if self._looks:  # the Probe was made inside this step
            return
        self._looks = True
        self._prepare()
        buffers = self._gather()
        self._moved = self._measuring.written(buffers) or set()
        self._measuring.know_buffers(buffers)  # its own writes are no changes made outside steps
        self.found_inf = getattr(self._followed, "found_inf", None)  # it has skipped the step itself, and divided
        self._step()

    def _gradients(self) -> tuple[list[Tensor | None], bytes]:
        """The live parameters' gradients, as the step has left them; zeros for one that has moved without."""
        grads, missing = self._live.gradients()
        if 1 not in missing or not self._moved:
            return grads, missing
        marks = bytearray(missing)
        for i in self._moved:
            if marks[i]:
                grads[i], marks[i] = torch.zeros_like(self._live.here[i]), 0
        return grads, bytes(marks)

    def leave(self) -> None:
        """Follow no more; the measurement stays that of the last step."""
        with self._lock:
            self._looks = False

    def _buffers(self) -> Buffers:
        """The live parameters, which are the shadows' buffers: of sharded ones always the same objects."""
        buffers, live = super()._buffers(), self._live
        if live.sharded:
            has_moved = moved(live.all, live.here)
            if has_moved:
                live.here = list(map(local, live.all))
            buffers.here = [list(live.here)]
            if has_moved:
                self._measuring.know_buffers(buffers)
        return buffers

    # ---- between steps ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _catch_up(self, *, begin: bool = False) -> list[Meter]:
        if not self._looks:
            return self._prepare()
        self._check_followed()
        self._read_options()
        self._prepare()
        written = self._measuring.written(self._gather())
        if written is None:
            self._begin_again()
        for i in written or ():  # raises the shadow's version counter, so that the change is recorded
            self._shadows[i].copy_(self._live.all[i])
        if self._is_stale:
            self._know_new_buffers()
        return super()._catch_up(begin=begin)

    def _begin_again(self) -> None:
        """Bring every shadow, and its count of steps, up to date."""
        for shadow, p in zip(self._shadows, self._live.all, strict=True):
            shadow.copy_(p)
        self._count_again()

    def _count_again(self) -> None:
        """Take over the followed optimizer's counts of steps, where a law needs them."""
        for shadow, p, number in zip(self._shadows, self._live.all, self._measuring.parameters.group_of, strict=True):
            counts = self.param_groups[number]["corrected"]
            age = self._followed.state.get(p, {}).get("step", 0) if counts else 0
            self.state[shadow]["step"] = torch.tensor(float(age), dtype=torch.float64, device="cpu")

    def _know_new_buffers(self) -> None:
        """The followed optimizer has loaded a state: what it carries has changed, in a way that no law knows."""
        self._is_stale = False
        measuring = self._measuring
        if measuring.step_count == 0:
            measuring.restart()
        elif measuring.began:
            measuring.openness.changed(measuring.step_count, (), range(len(self._shadows)))
        self._count_again()

    def reset_measurement(self) -> None:
        with self._lock:
            self._check_followed()
            self._read_options()
            self._is_stale = False
            with torch.no_grad():
                self._begin_again()
            super().reset_measurement()

    def _resume(self, saved: Any) -> None:
        self._is_stale = False
        super()._resume(saved)

    @outside_inference
    def measured(self) -> dict[str, Any]:
        """The measurement for a checkpoint."""
        return self._measured()

    def known_groups(self) -> list[dict[str, Any]]:
        """The parameter groups with the live parameters in the place of their shadows."""
        live = dict(zip(self._shadows, self._live.all, strict=True))
        return [{**group, "params": [live[p] for p in group["params"]]} for group in self.param_groups]

    def lose_buffers(self) -> None:
        """The followed optimizer has loaded a state."""
        with self._lock:
            self._is_stale = True

    def carried(self, place: int, age: int) -> Tensor | None:
        """What a parameter carries into its next step, as far as it is known: a tensor like its shadow."""
        p, number = self._live.all[place], self._outer[self._measuring.parameters.group_of[place]]
        known = self._knowledge.of(self._followed.param_groups[number])
        found = known.carried(self._followed.state.get(p, {}), age)
        if not isinstance(found, Tensor) or found.shape != p.shape or not found.is_floating_point():
            return None
        return local_buffer(self._live.labels[place], "state", p, found.to(p.dtype))

    def _read_options(self) -> None:
        """What is known of the next step of each parameter group."""
        for own, number in zip(self.param_groups, self._outer, strict=True):
            group = self._followed.param_groups[number]
            known, lr = self._knowledge.of(group), group.get("lr")
            own.update(
                lr=1.0 if lr is None else lr,
                decay=known.decay,
                carry=known.carry,
                corrected=known.corrected,
                reason=known.reason,
            )

    def _check_followed(self) -> None:
        """Raise if the followed parameters were replaced, or converted before the first step."""
        now = [group["params"] for group in self._followed.param_groups[: len(self._all)]]
        if list(map(len, now)) != list(map(len, self._all)) or not all(
            map(operator.is_, itertools.chain(*now), itertools.chain(*self._all))
        ):
            raise RuntimeError(
                "the optimizer's param_groups hold other parameters than those that its Probe measures; make the Probe "
                "after they were replaced (by accelerate's prepare, or fully_shard), or probe.remove() and make another"
            )
        if self._measuring.step_count > 0:
            return
        for label, shadow, p in zip(self._live.labels, self._shadows, self._live.all, strict=True):
            if (p.dtype, p.device, p.shape) != (shadow.dtype, shadow.device, shadow.shape):
                raise RuntimeError(
                    f"{label} was {shadow.dtype} {tuple(shadow.shape)} on {shadow.device} and is now {p.dtype} "
                    f"{tuple(p.shape)} on {p.device}; make the Probe after moving or converting the model"
                )


def _shadow(p: Tensor) -> Tensor:
    """A copy of a parameter, with the dtypes of its gradients."""
    shadow = p.detach().clone(memory_format=torch.preserve_format)
    if gradient_dtypes(p) != gradient_dtypes(shadow):
        shadow.grad_dtype = p.grad_dtype
    return shadow
