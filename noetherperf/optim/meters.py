"""Meters: they step and measure an optimizer's parameters, one meter for each device and backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from noetherperf.engines import Call, Engine, OnDevice
from noetherperf.engines.backends import Backend, check_measured, check_parameter, resolve, why_reference
from noetherperf.engines.overlap import check_apart
from noetherperf.engines.reader import unreadable
from noetherperf.measure.cells import GramPlan, GramsCopy, make_gram_plan, scatter
from noetherperf.measure.grams import Grams
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.optim.distributed import Ranks
from noetherperf.optim.following import Group, Parameters
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry, balances_in

T = TypeVar("T")


@dataclass(eq=False)
class Meter:
    """The parameters on one device with one backend, and the engine that steps and measures them."""

    device: torch.device
    members: list[int]  # their indices among all parameters
    groups: frozenset[int]  # the parameter groups that they are in
    ranks: Ranks  # and the plan
    engine: Engine
    grams: Grams
    gram_plan: GramPlan  # of whole tensors
    alone: bool  # there is no other meter
    stream: "torch.cuda.Stream | None" = None  # of the last step, on a GPU

    @property
    def measurement(self) -> Measurement:
        """Of this rank's shards, after all steps so far; Engine.measurement describes it."""
        return self.engine.measurement

    def tensors(self) -> list[Tensor]:
        """All that is measured here."""
        return [*self.measurement.tensors(), *self.grams.tensors()]

    @property
    def measured(self) -> set[int]:
        """The numbers of the members that are measured."""
        return {view.tensor for view in self.ranks.whole.views} | self.grams.plan.measured

    @property
    def is_host(self) -> bool:
        """Whether the host can read here without waiting."""
        return self.device.type == "cpu"

    @property
    def _is_captured(self) -> bool:
        """Whether the step goes into a CUDA graph."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def counts_there(self, groups: Sequence[Group]) -> bool:
        """Whether steps take their counts from the device, as those in a CUDA graph must: all of its parameter groups
        have capturable=True."""
        return not self.is_host and self.engine.reads_counts and all(groups[i].get("capturable") for i in self.groups)

    def host_knows_skips(self, groups: Sequence[Group]) -> bool:
        """Whether the host must know if a step is skipped: it can without waiting, or it counts the steps."""
        return self.is_host or (self.ranks.plan.rule.step_key is not None and not self.counts_there(groups))

    def pick(self, values: Sequence[T]) -> Sequence[T]:
        """This meter's values among those of all parameters."""
        return values if self.alone else [values[i] for i in self.members]

    def prepare(
        self,
        taken: Sequence[Tensor | None],
        grads: Sequence[Tensor | None],
        buffers: Sequence[Sequence[Tensor | None]],
        options: list[Any],
        ages: Sequence[int],
        on_device: OnDevice,
    ) -> list[Call]:
        """The calls that make one step on the device's current stream; Engine.prepare describes them.

        Args:
            taken: This meter's gradients, as Engine.admit gave them.
            grads, buffers, ages: Of all parameters; a list for each of the rule's buffers.
            options: Of the rule, one per parameter group.
            on_device: What the host has not read: scalars on any device, counts on this one.
        """
        options, inputs = self._bring(options, on_device)
        if self.device.type == "cuda":
            self.stream = torch.cuda.current_stream(self.device)
        own, ages = list(map(self.pick, buffers)), self.pick(ages)
        lrs, grad_scale, found_inf = inputs.lrs, inputs.grad_scale, inputs.found_inf
        # First, since it reads what the engine writes.
        counts, fixed = inputs.counts, inputs.counts is not None or self._is_captured
        known = ages if counts is None else counts.to(torch.float64)
        calls = self.grams.prepare(taken, own, options, known, lrs, grad_scale, found_inf, fixed=fixed)
        calls += self.engine.prepare(taken, own, options, ages, inputs)
        return calls if inputs.grad_scale is None else calls + _leave_divided(self.pick(grads), taken)

    def _bring(self, options: list[Any], on_device: OnDevice) -> tuple[list[Any], OnDevice]:
        """A step's inputs, from any device, as this meter's engine reads them."""
        if on_device.is_empty:
            return options, on_device
        lrs, others = on_device.lrs, (on_device.grad_scale, on_device.found_inf)
        if self.is_host:
            read = {i: float(lr) for i, lr in enumerate(lrs) if lr is not None and i in self.groups}
            rule = self.ranks.plan.rule
            options = [rule.with_lr(x, read[i]) if i in read else x for i, x in enumerate(options)]
            lrs = [None] * len(options)
        here = [None if x is None else x.to(self.device, non_blocking=True) for x in (*lrs, *others)]
        return options, OnDevice(here[:-2], here[-2], here[-1], on_device.counts)

    def scatter_grams(self, whole: Sequence[Tensor]) -> Sequence[Tensor]:
        """This rank's part of the products of the whole parameters, to continue from."""
        first = self.ranks.has_first
        return whole if first is None or not whole else scatter(whole, self.gram_plan, self.grams.plan, first)

    def copy(self) -> tuple[Measurement, GramsCopy]:
        """A copy of what is measured after the last queued step, whatever its stream and the current one; on the
        device, without waiting for it."""
        here = torch.cuda.current_stream(self.device) if self.stream is not None else None
        if here is None or here == self.stream:
            return self.measurement.clone(), self.grams.copy()
        assert self.stream is not None
        here.wait_stream(self.stream)
        copied = self.measurement.clone(), self.grams.copy()
        self.stream.wait_stream(here)  # the next step must not write what is being copied
        return copied


def make_meters(
    rule: Rule[Any],
    parameters: Parameters,
    symmetries: Sequence[Symmetry],
    backend: str,
    carried: Sequence[Sequence[Tensor]],
) -> list[Meter]:
    """The meters of all parameters.

    Args:
        rule: The update rule.
        parameters: The parameters to step and measure.
        symmetries: The symmetries to measure, validated against the parameters.
        backend: As the user named it.
        carried: The measurement to continue, if any: the tensors of each meter. Tensors and meters of parameters
            added since come last, and start anew.

    Raises:
        TypeError, ValueError, RuntimeError: No backend steps a parameter, two of them share memory, or one cannot be
            measured.
    """
    by_place: dict[tuple[torch.device, str], list[int]] = {}
    backends = resolve_all(rule, backend, parameters.labels, parameters.here)
    for i, (p, resolved) in enumerate(zip(parameters.all, backends, strict=True)):
        by_place.setdefault((p.device, resolved.name), []).append(i)
    tensors: Mapping[str | None, Tensor] = dict(zip(parameters.names, parameters.here, strict=True))
    for symmetry in symmetries:
        for part in symmetry.parts:
            check_measured(part.parameter, tensors[part.parameter], symmetry.name)
    meters = []
    for number, ((device, _), members) in enumerate(by_place.items()):
        params, here = [parameters.all[i] for i in members], [parameters.here[i] for i in members]
        labels, groups = [parameters.labels[i] for i in members], [parameters.group_of[i] for i in members]
        names, shapes = [parameters.names[i] for i in members], [tuple(p.shape) for p in params]
        plan = make_plan(symmetries, names, shapes, rule)
        ranks = Ranks(plan, labels, params)
        measurement = Measurement.empty(ranks.plan, device, parameters.n_groups)
        of_balances = balances_in(symmetries), names, shapes, groups, rule
        gram_plan = make_gram_plan(*of_balances)
        own_plan = gram_plan if ranks.cuts is None else make_gram_plan(*of_balances, ranks.cuts)
        grams = Grams(own_plan, here, device, ranks.indices)
        mine = [*measurement.tensors(), *grams.tensors()]
        for x, known in zip(mine, carried[number], strict=True) if number < len(carried) else ():
            x[: len(known)].copy_(known)
        engine = backends[members[0]].engine(ranks.plan, here, labels, groups, measurement)
        meters.append(Meter(device, members, frozenset(groups), ranks, engine, grams, gram_plan, len(by_place) == 1))
    return meters


def resolve_one(rule: Rule[Any], requested: str, x: Tensor) -> Backend:
    """The backend that a name means for a parameter, or for its part in this rank's memory."""
    return resolve(requested, x.device, rule=rule, only_reference=why_reference(x) is not None)


def resolve_all(rule: Rule[Any], requested: str, labels: Sequence[str], here: Sequence[Tensor]) -> list[Backend]:
    """The backend that steps each of these parameters.

    Args:
        rule: The update rule.
        requested: As the user named it.
        labels: The parameters' names in error messages.
        here: The part of each in this rank's memory.

    Raises:
        TypeError, ValueError, RuntimeError: No backend steps a parameter, or two parameters share memory.
    """
    backends = []
    for label, x in zip(labels, here, strict=True):
        backends.append(resolve_one(rule, requested, x))
        check_parameter(label, x, backends[-1])
    in_memory = [i for i, x in enumerate(here) if unreadable(x) is None]
    check_apart([labels[i] for i in in_memory], [here[i] for i in in_memory])
    return backends


def step_inputs(
    meters: Sequence[Meter], groups: Sequence[Group], lrs: OnDevice, grad_scale: Tensor | None, found_inf: object
) -> OnDevice | None:
    """The scalars that a step reads on devices; None if the host reads that a gradient scaler skips the step.

    Args:
        meters: All meters of an optimizer.
        groups: Its parameter groups.
        lrs: The learning rates that are on a device.
        grad_scale, found_inf: The attributes that torch.amp.GradScaler sets on an optimizer during a step; no
            grad_scale if it has already unscaled.
    """
    if not isinstance(found_inf, Tensor):  # a sum over no gradients at all is no tensor
        found_inf = None
    elif any(meter.host_knows_skips(groups) for meter in meters):
        if found_inf.item() != 0.0:  # of several devices, their sum
            return None
        found_inf = None
    if grad_scale is None and found_inf is None:
        return lrs
    return OnDevice(lrs.lrs, grad_scale, found_inf)


def check_divisible(labels: Sequence[str], grads: Sequence[Tensor | None]) -> None:
    """Raise unless a step can divide gradients by a scale where they are, as torch's fused ones do.

    Args:
        labels: Of the parameters.
        grads: Theirs, None where there is none.

    Raises:
        RuntimeError: A gradient's elements share memory, or it was made in inference mode.
    """
    present = [g for g in grads if g is not None]
    if all(map(Tensor.is_contiguous, present)) and not any(map(Tensor.is_inference, present)):  # nearly always
        return
    for label, g in zip(labels, grads, strict=True):
        if g is None:
            continue
        reason = "was made in inference mode" if g.is_inference() else ""
        if any(stride == 0 and size > 1 for size, stride in zip(g.shape, g.stride(), strict=True)):
            reason = "has elements that share memory, as expand() makes them"
        if reason:
            raise RuntimeError(
                f"{label}: the gradient scaler's scale is divided out of gradients in place, and this gradient "
                f"{reason}; clone it before step() (p.grad = p.grad.clone())"
            )


def _leave_divided(grads: Sequence[Tensor | None], taken: Sequence[Tensor | None]) -> list[Call]:
    """The calls that copy gradients that a step materialized, and divided, back to their lazy originals."""
    pairs = zip(grads, taken, strict=True) if taken is not grads else ()
    return [
        partial(g.copy_, x)
        for g, x in pairs
        if g is not None and x is not None and x is not g and not g._is_zerotensor()
    ]
