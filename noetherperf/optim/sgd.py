"""SGD: torch.optim.SGD that measures its symmetries' charges, and every law's integrals, while it steps."""

import itertools
import operator
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from noetherperf.common.untrusted import shown
from noetherperf.engines import Call, Engine, OnDevice, carry_out, gradient_dtypes
from noetherperf.engines.backends import Backend, check_measured, check_parameter, resolve, why_reference
from noetherperf.engines.overlap import check_apart
from noetherperf.engines.reader import has_own_dispatch, make_gatherer, unreadable
from noetherperf.measure.openness import Openness
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.measure.readout import Readout, Source, read
from noetherperf.optim import checkpoint
from noetherperf.optim.distributed import (
    Ranks,
    check_alike,
    check_whole,
    is_distributed,
    local,
    local_buffer,
    local_gradient,
    moved,
)
from noetherperf.optim.names import names_in
from noetherperf.optim.watched import Tensors, Watched
from noetherperf.rules import sgd
from noetherperf.rules.rule import Rule
from noetherperf.rules.sgd import device_lr
from noetherperf.symmetry import Symmetry, validate

T = TypeVar("T")
P = ParamSpec("P")


def _outside_inference(method: Callable[P, T]) -> Callable[P, T]:
    """A method that runs as outside of torch.inference_mode(): the tensors that it makes are written later."""

    @wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return outside


@dataclass
class _Device:
    """The parameters on one device that one backend steps, and what steps and measures them."""

    device: torch.device
    members: list[int]  # their numbers among all parameters
    groups: frozenset[int]  # the parameter groups that they are in
    backend: Backend
    ranks: Ranks  # and the plan
    measurement: Measurement  # of what is on this rank
    engine: Engine
    alone: bool  # there are no others
    stream: "torch.cuda.Stream | None" = None  # of the last step, on a GPU

    @property
    def is_host(self) -> bool:
        """Whether the host reads here without waiting."""
        return self.device.type == "cpu"

    def pick(self, values: Sequence[T]) -> Sequence[T]:
        """This device's values among those of all parameters."""
        return values if self.alone else [values[i] for i in self.members]

    def note_stream(self) -> None:
        """A step is about to be queued on the device's current stream."""
        if self.device.type == "cuda":
            self.stream = torch.cuda.current_stream(self.device)

    def copy(self) -> Measurement:
        """What is measured after the last step that was queued, whichever stream that was on and which is current now;
        on the device, and without waiting for it."""
        here = torch.cuda.current_stream(self.device) if self.stream is not None else None
        if here is None or here == self.stream:
            return self.measurement.clone()
        assert self.stream is not None
        here.wait_stream(self.stream)
        copied = self.measurement.clone()
        self.stream.wait_stream(here)  # the next step must not write what is being copied
        return copied

    def bring(self, rule: Rule[Any], options: list[Any], on_device: OnDevice) -> tuple[list[Any], OnDevice]:
        """A step's inputs, wherever they are, as the engine here reads them."""
        lrs, others = on_device.lrs, (on_device.grad_scale, on_device.found_inf)
        if not any(x is not None for x in (*lrs, *others)):
            return options, on_device
        if self.is_host:
            read = {i: float(lr) for i, lr in enumerate(lrs) if lr is not None and i in self.groups}
            options = [rule.with_lr(x, read[i]) if i in read else x for i, x in enumerate(options)]
            lrs = [None] * len(options)
        here = [None if x is None else x.to(self.device, non_blocking=True) for x in (*lrs, *others)]
        return options, OnDevice(here[:-2], *here[-2:])


class _Copies(NamedTuple):
    """Copies of what all devices have measured after one step; whoever has them needs the optimizer's lock no more."""

    ranks: list[Ranks]
    measurements: list[Measurement]  # where the devices are
    openness: Openness
    began: bool
    measurement_id: str
    home: int  # the device that has the first parameter group
    step: int  # with those that a device may have skipped
    n_corrections: int


class SGD(Optimizer):
    """torch.optim.SGD, with the charges of the model's symmetries measured in the pass that makes the step.

    The step, with s = −1 for maximize and +1 otherwise, and a = 1 the first time the buffer is written, 1 − τ after:

        d = s g + λ θ,   v ← β v + a d,   θ ← θ − η u,   u = v, or d + β v with nesterov, or d without momentum

    A drop-in: signature, defaults, errors, parameter groups, state_dict (checkpoints go both ways), hooks, closures and
    schedulers are those of torch.optim.SGD. Arithmetic is in float32 for 16-bit parameters, in their own dtype for
    others; measurements are float64.

    Args:
        params: Parameters or parameter groups; named (model.named_parameters()) where symmetries are given.
        lr: Learning rate η, a float or a tensor of one element.
        momentum: β.
        dampening: τ.
        weight_decay: λ. This, momentum or dampening as a tensor on a device is waited for in every step, as in torch.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        maximize: Ascend instead.
        foreach: Accepted for compatibility.
        fused: Every backend makes one fused step. True also has it unscale gradients for torch.amp.GradScaler, and
            skip steps that overflow, as torch's fused one does; else the scaler does both, and waits for the device.
        differentiable: Not supported.
        symmetries: What to measure: Translation, Scale, Rescale or Norm (neurons(model), layers(model)).
        backend: "auto", or one of noetherperf.engines.backends().

    Raises:
        ValueError: A hyperparameter out of range; symmetries that do not fit the parameters; an unknown backend;
            parameters that share memory.
        TypeError: A parameter of a kind that the backend cannot step or measure.
        RuntimeError: The named backend cannot run here; differentiable=True; foreach and fused both True.

    Source: Kunin et al. (2021), "Neural Mechanics", arXiv:2012.04728; Sutskever et al. (2013) for the momentum.
    """

    rule: ClassVar[Rule[Any]] = sgd.SGD

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        symmetries: Sequence[Symmetry] = (),
        backend: str = "auto",
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not float(lr) >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not momentum >= 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if foreach and fused:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if differentiable:
            raise RuntimeError("noetherperf.SGD steps in place and is not differentiable; use torch.optim.SGD for that")
        self._lock = threading.RLock()
        self._requested = backend
        self._may_be_fresh = False  # a device may have skipped the step that a new buffer was made for
        self._devices: list[_Device] | None = None
        self._params: list[Tensor] = []
        self._group_sizes: list[int] = []
        self._kinds: list[object] = []
        self._here: list[Tensor] = []  # what of them is in this rank's memory
        self._sharded = False
        self._watched: Watched | None = None  # none before there is something to compare with
        self._symmetries: tuple[Symmetry, ...] = ()
        self._openness: Openness
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
        self._symmetries = self._check_symmetries(symmetries)
        self._restart()
        self._prepare()
        self.register_state_dict_post_hook(_add_measurement)

    # ---- what there is to step and to measure -----------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch.amp.GradScaler, and by libraries that clip: whether step() unscales and skips by itself."""
        return bool(self.defaults["fused"])

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries that are measured."""
        return self._symmetries

    @property
    def backend(self) -> str:
        """Name of the backend that makes the step; joined by "+" where parameters have different ones."""
        with self._lock:
            return "+".join(dict.fromkeys(device.backend.name for device in self._prepare()))

    @property
    def step_count(self) -> int:
        """Steps since measuring began.

        Only a GPU knows which steps a gradient scaler made it skip; they count here until the next readout().
        """
        return self._step_count

    @property
    def measurement_id(self) -> str:
        """Names this measurement: another one whenever measuring starts anew, the same in its checkpoints and copies.

        Readouts of one measurement_id belong to one series; readout() itself may start a measurement anew.
        """
        return self._measurement_id

    def paused(self) -> AbstractContextManager[object]:
        """A context in which no other thread steps, loads or measures anew with this optimizer.

        A readout needs none: it is of one step, whichever thread asks. A checkpoint from another thread than the one
        that trains does, for it holds the parameters and momentum buffers themselves:

            with optimizer.paused():
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        """
        return self._lock

    def _names(self) -> list[str | None]:
        """One name per parameter, over all groups; None where parameters came, or were put there, without names."""
        return names_in(self.param_groups)

    def _check_symmetries(self, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
        names = [name for name in self._names() if name is not None]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(names) < len(params) and not (isinstance(symmetries, Sequence) and len(symmetries) == 0):
            raise ValueError(
                "symmetries name parameters, and these parameters came without names; pass model.named_parameters() "
                "instead of model.parameters(), and where you change group['params'] of a parameter group, change its "
                "group['param_names'] too. ZeroRedundancyOptimizer hands each rank some parameters without names, so "
                "that nothing can be measured in it: give it no symmetries, or shard "
                "with torch.distributed.fsdp.fully_shard instead"
            )
        if symmetries:
            check_whole(names, params)
        checked = validate(symmetries, dict(zip(names, (tuple(p.shape) for p in params), strict=False)))
        twice = {name for name, count in Counter(names).items() if count > 1}
        for symmetry in checked:
            for part in symmetry.parts:
                if part.parameter in twice:
                    raise ValueError(
                        f"symmetry {symmetry.name!r}: two parameters have the name {part.parameter!r}; "
                        "give each its own, such as [(f'student.{n}', p) for n, p in student.named_parameters()]"
                    )
        return checked

    def _restart(self) -> None:
        """Forget what was measured; measuring begins at the next step or readout."""
        self._began = False
        self._step_count = 0
        self._n_corrections = 0  # times that a device said it had skipped steps
        self._measurement_id = uuid.uuid4().hex
        self._carried: list[list[Tensor]] | None = None  # measurements to go on from when engines are made
        self._open_reasons: dict[str, Any] | None = None
        self._watched = None

    def _prepare(self) -> list[_Device]:
        """The devices with their plans and engines, made when first needed and after every change of parameters.

        Raises:
            RuntimeError, ValueError: Parameters were replaced, and what was measured does not go on with the new ones.
        """
        if self._replaced():
            self._follow()
        elif len(self.param_groups) > len(self._group_sizes) or (self._sharded and moved(self._params, self._here)):
            self._set_down()
        return self._build() if self._devices is None else self._devices

    @_outside_inference
    def _build(self) -> list[_Device]:
        """Make the devices."""
        self._note_parameters()
        self._sharded = any(map(is_distributed, self._params))
        self._here = list(map(local, self._params))
        self._gatherer = make_gatherer(self._params)
        names, self._labels = self._names(), self._label()
        group_index = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        by_place: dict[tuple[torch.device, str], list[int]] = {}
        for i, (p, backend) in enumerate(zip(self._params, self._resolve(self._labels, self._here), strict=True)):
            by_place.setdefault((p.device, backend.name), []).append(i)
        tensors = dict(zip(names, self._here, strict=True))
        for symmetry in self._symmetries:
            for part in symmetry.parts:
                check_measured(part.parameter, tensors[part.parameter], symmetry.name)
        devices = []
        for number, ((device, name), members) in enumerate(by_place.items()):
            backend = resolve(name, device)
            params = [self._params[i] for i in members]
            here = [self._here[i] for i in members]
            labels = [self._labels[i] for i in members]
            plan = make_plan(self._symmetries, [names[i] for i in members], [tuple(p.shape) for p in params], self.rule)
            ranks = Ranks(plan, labels, params)
            measurement = Measurement.empty(ranks.plan, device, len(self.param_groups))
            if self._carried is not None and number < len(self._carried):
                for mine, carried in zip(measurement.tensors(), self._carried[number], strict=True):
                    _take_over(mine, carried)
            groups = [group_index[i] for i in members]
            engine = backend.engine(ranks.plan, here, labels, groups, measurement)
            alone = len(by_place) == 1
            devices.append(_Device(device, members, frozenset(groups), backend, ranks, measurement, engine, alone))
        n_groups = len(self.param_groups)
        openness = Openness(self._symmetries, self._labels, group_index, n_groups, shared=self._sharded, rule=self.rule)
        if self._open_reasons is not None:
            openness.load_state_dict(self._open_reasons)
        if self._watched is not None:
            self._watched.know_moved(self._here)
        # At once, for an interrupt between would lose what was carried; that lives on in the engines' measurements.
        self.__dict__.update(_openness=openness, _devices=devices, _carried=None, _open_reasons=None)
        return devices

    def _label(self) -> list[str]:
        """What errors call every parameter."""
        places = [(g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))]
        named = zip(places, self._names(), strict=True)
        return [name or f"parameter {i} of group {g}" for (g, i), name in named]

    def _resolve(self, labels: Sequence[str], here: Sequence[Tensor]) -> list[Backend]:
        """The backend that steps each of these parameters.

        Raises:
            TypeError, ValueError: None does, or two of them share memory.
        """
        backends = []
        for label, x in zip(labels, here, strict=True):
            backends.append(resolve(self._requested, x.device, only_reference=why_reference(x) is not None))
            check_parameter(label, x, backends[-1])
        in_memory = [i for i, x in enumerate(here) if unreadable(x) is None]
        check_apart([labels[i] for i in in_memory], [here[i] for i in in_memory])
        return backends

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch.optim.SGD does.

        Raises:
            TypeError, ValueError: A parameter in it cannot be stepped; the optimizer is as it was.
        """
        with self._lock:
            super().add_param_group(param_group)
            if hasattr(self, "_began"):  # else the optimizer is being made, and will look at all groups together
                try:
                    params = [p for group in self.param_groups for p in group["params"]]
                    self._resolve(self._label(), list(map(local, params)))
                except BaseException:
                    self.param_groups.pop()
                    raise

    def _note_parameters(self) -> None:
        """Remember what is in param_groups: what is measured from now on is measured on these."""
        self._params = [p for group in self.param_groups for p in group["params"]]
        self._group_sizes = [len(group["params"]) for group in self.param_groups]
        self._kinds = list(map(_kind, self._params))

    def _replaced(self) -> bool:
        """Whether others are in their places now, or the same were converted before the first step."""
        groups = self.param_groups[: len(self._group_sizes)]  # after those come added ones
        now = itertools.chain.from_iterable(group["params"] for group in groups)
        return (
            [len(group["params"]) for group in groups] != self._group_sizes
            or not all(map(operator.is_, now, self._params))
            or (self._step_count == 0 and list(map(_kind, self._params)) != self._kinds)
        )

    def _follow(self, *, anew: bool = False) -> None:
        """Go on with the parameters that are in param_groups now, as torch.optim.SGD does; accelerate shards so.

        Raises:
            RuntimeError: Laws would go on from what was measured on others; not where they are to start anew.
            ValueError: The symmetries do not fit the new ones.
        """
        if self._symmetries and self._step_count > 0 and not anew:
            raise RuntimeError(
                f"param_groups hold other parameters than the {self._step_count} steps that were measured; call "
                "optimizer.reset_measurement() after replacing them, and measuring starts anew, or replace them (or "
                "shard the model) before the first step"
            )
        self._check_symmetries(self._symmetries)
        self._devices = None
        self._may_be_fresh = False
        self._restart()

    def _set_down(self) -> None:
        """Drop the engines and keep what was measured, so that both can be made anew for changed parameters."""
        self._drop_fresh_buffers()
        if self._devices is not None:
            self._carried = [[x.clone() for x in device.measurement.tensors()] for device in self._devices]
            self._open_reasons = self._openness.state_dict()
            self._devices = None

    # ---- the step ---------------------------------------------------------------------------------------------------

    @_disable_dynamo  # as torch.compiler.disable, which would import the compiler together with this module
    @_outside_inference
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step and measure it.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError, TypeError: A gradient that cannot be stepped with (sparse, complex, of another dtype); raised
                before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        with self._lock:
            self._step()
        return loss

    def _step(self) -> None:
        """Make one step; the lock is held."""
        devices = self._prepare()
        on_device = self._on_device(devices)
        if on_device is None:
            return
        grads, missing = self._gatherer.attributes(self._params, "grad")
        if self._sharded:
            grads = list(map(local_gradient, self._labels, self._params, grads))
        admitted = [device.engine.admit(device.pick(grads)) for device in devices]
        held, buffers, unwritten = self._buffers()
        self._catch_up(held, buffers)

        # All that is written, engines' and the host's own, is written at once: an interrupt finds all or nothing done.
        options = [self.rule.options(group) for group in self.param_groups]
        ages, calls = self._ready_buffers(held, buffers, unwritten, grads)
        for device, taken in zip(devices, admitted, strict=True):
            engine_options, inputs = device.bring(self.rule, options, on_device)
            device.note_stream()
            calls += device.engine.prepare(taken, device.pick(buffers), engine_options, device.pick(ages), inputs)
            if inputs.grad_scale is not None:
                calls += _leave_divided(device.pick(grads), taken)
        step, openness = self._step_count + 1, self._openness
        if self._symmetries:
            openness = openness.after(step, options, on_device.lrs, bytes(ages), missing)
        may_be_fresh = self._may_be_fresh or (on_device.found_inf is not None and 0 in ages)
        calls.append(partial(self.__dict__.update, _step_count=step, _may_be_fresh=may_be_fresh, _openness=openness))
        # Engines write past autograd's eyes; what it saved for a backward pass must be seen to have changed.
        written = (
            self._params if 1 not in missing else [p for p, no in zip(self._params, missing, strict=True) if not no]
        )
        calls.append(partial(torch._C._increment_version, written))
        if self._watched is not None:
            calls += self._watched.stepped(missing, ages, held, buffers)
        carry_out(calls)

    def _on_device(self, devices: list[_Device]) -> OnDevice | None:
        """What this step takes from devices; None if the host sees that a gradient scaler wants it skipped.

        torch.amp.GradScaler sets grad_scale (None if it has unscaled already) and found_inf for the time of a step.
        """
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # a sum over no gradients at all is no tensor
            found_inf = None
        elif any(device.is_host for device in devices):
            if found_inf.item() != 0.0:  # of several devices, their sum
                return None
            found_inf = None
        return OnDevice([device_lr(group) for group in self.param_groups], getattr(self, "grad_scale", None), found_inf)

    def _buffers(self) -> tuple[Tensors, Tensors, bytes]:
        """Every parameter's momentum buffer as the state holds it now, None where there is none; what of it is in this
        rank's memory; and 1 where there is none."""
        held, unwritten = self._gatherer.items(self.state, "momentum_buffer")
        buffers = list(map(local_buffer, self._labels, self._params, held)) if self._sharded else held
        return held, buffers, unwritten

    def _ready_buffers(
        self, held: Tensors, buffers: Tensors, unwritten: bytes, grads: Sequence[Tensor | None]
    ) -> tuple[bytearray, list[Call]]:
        """Make buffers where this step writes one for the first time: 0 for those tensors and 1 for the others, and the
        calls that put them into the state."""
        ages = bytearray(b"\x01") * len(held)
        calls: list[Call] = []
        if 1 in unwritten:
            groups = [group for group in self.param_groups for _ in group["params"]]
            for i, p in enumerate(self._params):
                if unwritten[i] and groups[i]["momentum"] != 0 and (grad := grads[i]) is not None:
                    ages[i] = 0
                    held[i] = made = _new_buffer(p, grad, decays=groups[i]["weight_decay"] != 0)
                    calls.append(partial(self.state[p].__setitem__, "momentum_buffer", made))
                    buffers[i] = local(made)
        return ages, calls

    def _drop_fresh_buffers(self) -> None:
        """Unmake the buffers whose first step a device skipped, as the host would not have made them; waits for it."""
        while self._may_be_fresh:
            with self._lock:
                devices, step = self._devices or [], self._step_count
                copies = [x.clone() if isinstance(x := device.engine.ages, Tensor) else x for device in devices]
            ages = [x.tolist() if isinstance(x, Tensor) else x for x in copies]  # waits, and holds nobody up
            with self._lock:
                if self._step_count != step or (self._devices or []) != devices:  # another thread has stepped since
                    continue
                for device, of_device in zip(devices, ages, strict=True):
                    for i in itertools.compress(device.members, (age == 0 for age in of_device)):
                        self.state.get(self._params[i], {}).pop("momentum_buffer", None)
                        if self._watched is not None:
                            self._watched.know_buffer(i, None, None)
                self._may_be_fresh = False

    # ---- measuring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self) -> None:
        """Measure the parameters and buffers as they are: where the laws start."""
        devices = self._prepare()
        held, buffers, _ = self._buffers()
        for device in devices:
            own = device.pick(buffers)
            device.engine.measure(own)
            device.measurement.start(device.ranks.plan, [v is not None for v in own])
        self._openness.reset()
        self._began = True
        if self._symmetries:
            self._watch(held, buffers)

    def _watch(self, held: Tensors, buffers: Tensors) -> None:
        """Know what is measured as it is now."""
        devices = self._prepare()
        measured = sorted({device.members[view.tensor] for device in devices for view in device.ranks.whole.views})
        self._watched = Watched(measured, self._params, self._here, held, buffers)

    def _catch_up(self, held: Tensors, buffers: Tensors) -> None:
        """Begin to measure, or take note of what others have written since; held, buffers: as _buffers gives them."""
        if not self._began:
            self._begin()
        elif self._watched is None:
            if self._symmetries:  # loaded, or a copy: there is nothing yet to compare with
                self._watch(held, buffers)
        else:
            parameters, others = self._watched.changed(held, buffers)
            if not parameters and not others:
                return
            if self._step_count == 0:  # no law has begun to run
                self._restart()
                self._begin()
                return
            which = {*parameters, *others}
            self._follow_changes(which, buffers)
            self._openness.changed(self._step_count, parameters, others)
            self._watched.know(which, held, buffers)

    def _follow_changes(self, which: set[int], buffers: Tensors) -> None:
        """Measure what others have written, and have the laws go on from there."""
        for device in self._prepare():
            changed = [i in which for i in device.members]
            if any(changed):
                own, moments = device.pick(buffers), device.measurement.moments
                before, measured = moments.clone(), moments.clone()
                # At once, for an interrupt between would lose the moments that the laws go on from.
                carry_out(
                    [
                        *device.engine.prepare_to_measure(own),
                        partial(measured.copy_, moments),
                        partial(moments.copy_, before),
                    ]
                )
                warm = [v is not None for v in own]
                new = device.measurement.followed(device.ranks.plan, measured, warm, changed)
                pairs = zip(device.measurement.tensors(), new.tensors(), strict=True)
                carry_out([partial(x.copy_, y) for x, y in pairs])

    @torch.no_grad()
    def _catch_up_now(self) -> list[_Device]:
        """The devices, with what others have written taken note of, if measuring has begun."""
        devices = self._prepare()
        if self._began:
            self._catch_up(*self._buffers()[:2])
        return devices

    @torch.no_grad()
    def _copy(self, *, begin: bool) -> _Copies:
        """Copy what is measured, with what others have written taken note of.

        Args:
            begin: To measure now, if nothing has been measured yet.
        """
        with self._lock:
            devices = self._prepare()
            if begin or self._began:
                self._catch_up(*self._buffers()[:2])
            return _Copies(
                [device.ranks for device in devices],
                [device.copy() for device in devices],
                self._openness.copy(),
                self._began,
                self._measurement_id,
                next((i for i, device in enumerate(devices) if 0 in device.groups), 0),
                self._step_count,
                self._n_corrections,
            )

    def _gather(self, copies: _Copies) -> list[Measurement]:
        """Each device's measurement of the whole parameters; a collective where they are sharded.

        Raises:
            RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
        """
        if self._symmetries and any(ranks.groups for ranks in copies.ranks):
            marks = copies.openness.marks([measurement.clock.tolist() for measurement in copies.measurements])
            changed = check_alike(copies.ranks, marks)
            copies.openness.agree(changed)
            with self._lock:
                self._openness.agree(changed)
        return [ranks.gather(x) for ranks, x in zip(copies.ranks, copies.measurements, strict=True)]

    @_outside_inference
    @torch.no_grad()
    def reset_measurement(self) -> None:
        """Start the laws anew from the present parameters and momentum buffers; parameters and buffers stay."""
        with self._lock:
            if self._replaced():
                self._follow(anew=True)
            self._set_down()
            self._restart()
            self._begin()

    @_outside_inference
    @torch.no_grad()
    def readout(self) -> Readout:
        """Charges, predictions and residuals of every symmetry, after the last step; a copy on the CPU.

        Any thread may ask, while another one steps: what it gets is of one step. Where parameters are sharded over
        ranks this adds up what each has measured, and is a collective: every rank must call it, after the same step.

        Raises:
            RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
        """
        copies = self._copy(begin=True)
        wholes = self._gather(copies)
        sources = [Source(ranks.whole, x.cpu()) for ranks, x in zip(copies.ranks, wholes, strict=True)]
        step, time = sources[copies.home].measurement.clock[:2].tolist()
        if step != copies.step:  # a device has skipped steps
            with self._lock:
                if self._n_corrections == copies.n_corrections:  # no other thread has said so since
                    self._step_count -= copies.step - int(step)
                    self._n_corrections += 1
        return read(self._symmetries, sources, copies.openness.reasons, int(step), time)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @_outside_inference
    def state_dict(self) -> dict[str, Any]:
        """torch.optim.SGD's state_dict, with everything that was measured under "measurement".

        What was measured is that of the whole parameters, however they are sharded; where they are, this is a
        collective, as readout() is.
        """
        if self._symmetries:
            with self._lock:
                self._catch_up_now()
        self._drop_fresh_buffers()
        return super().state_dict()  # _add_measurement, the first of the hooks, adds it

    def _measured(self) -> dict[str, Any]:
        """What a checkpoint needs to go on measuring."""
        copies = self._copy(begin=False)
        return checkpoint.write(
            self._gather(copies),
            self._symmetries,
            self._names(),
            copies.openness,
            identity=copies.measurement_id,
            began=copies.began,
        )

    @_outside_inference
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.SGD; without measurement in it, measuring starts anew.

        Goes by position, as torch does, and keeps this optimizer's names; where the checkpoint has names too, they say
        whether positions mean the same parameters.

        Raises:
            TypeError: It is no dict.
            ValueError: It has this optimizer's names in other places, was measured with other symmetries, or is
                damaged; raised before anything is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {shown(state_dict)}")
        rest = {key: value for key, value in state_dict.items() if key != "measurement"}
        saved: list[checkpoint.Saved | None] = []

        def check(_: Optimizer, hooked: dict[str, Any]) -> None:
            """The last of the hooks: what the others have made of it is what torch will load."""
            checkpoint.check_state(hooked, self.param_groups)
            saved.append(self._read(state_dict.get("measurement"), hooked["param_groups"]))

        with self._lock:
            handle = self.register_load_state_dict_pre_hook(check)
            try:
                super().load_state_dict(rest)
            finally:
                handle.remove()
            self._resume(saved[0])

    @_outside_inference
    @torch.no_grad()
    def load_measurement(self, measured: Mapping[str, Any] | None) -> None:
        """Go on from what was measured, a state_dict's "measurement", and leave all else; None: measuring starts anew.

        Raises:
            ValueError: It was measured with other symmetries, or is damaged; raised before anything is changed.
        """
        with self._lock:
            self._resume(self._read(measured, self.param_groups))

    def _read(self, measured: object, groups: Sequence[Mapping[str, Any]]) -> checkpoint.Saved | None:
        """A state_dict's "measurement" as it fits this optimizer; groups: the options that it was measured with."""
        if measured is None:
            return None
        plans = [device.ranks.whole for device in self._prepare()]
        return checkpoint.read(measured, plans, self._symmetries, self._names(), self._openness, groups)

    def _resume(self, saved: checkpoint.Saved | None) -> None:
        """Go on from what was read; None: measuring starts anew."""
        carried = None
        if saved is not None and self._symmetries:
            places = zip(self._prepare(), saved.wholes, strict=True)
            carried = [[x.clone() for x in device.ranks.scatter(whole).tensors()] for device, whole in places]
        self._devices = None
        self._restart()
        if saved is not None and carried is not None:
            self._began = saved.began
            self._carried = carried
            self._measurement_id = saved.id or self._measurement_id
            self._step_count = saved.steps
            self._open_reasons = saved.openness

    def __getstate__(self) -> dict[str, Any]:
        self._drop_fresh_buffers()
        with self._lock:
            return self._state()

    def _state(self) -> dict[str, Any]:
        """What a copy needs; the lock is held."""
        carried, openness = self._carried, self._open_reasons
        if self._devices is not None:
            devices = self._catch_up_now()
            carried = [device.copy().tensors() for device in devices]
            openness = self._openness.state_dict()
        state = dict(super().__getstate__())
        state["_measured"] = {
            "_version": checkpoint.VERSION,
            "_requested": self._requested,
            "_may_be_fresh": False,
            "_symmetries": self._symmetries,
            "_began": self._began,
            "_step_count": self._step_count,
            "_measurement_id": self._measurement_id,
            "_carried": carried,
            "_open_reasons": openness,
        }
        return state

    @_outside_inference
    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        measured = state.pop("_measured", None)
        version = measured.pop("_version", None) if measured is not None else None
        if measured is None:  # load_state_dict, which has changed nothing yet: from here on names are our own
            for group, own in zip(state["param_groups"], self.param_groups, strict=True):
                group.update({"param_names": own["param_names"]} if "param_names" in own else {})
        elif measured["_carried"] is not None and version != checkpoint.VERSION:
            raise ValueError(
                "optimizer: it was pickled by another version, and its measurement cannot be read; what is "
                "to be kept is an optimizer's state_dict(), which later versions read"
            )
        super().__setstate__(state)
        if measured is not None:  # unpickling or copying
            self.__dict__.update(measured, _lock=threading.RLock(), _n_corrections=0)
            self._devices, self._sharded, self._watched = None, False, None
            self._note_parameters()
            self.register_state_dict_post_hook(_add_measurement)
        for slot in self.state.values():  # what was made in inference mode could not be written in a step
            slot.update({key: x.clone() for key, x in slot.items() if isinstance(x, Tensor) and x.is_inference()})
        for group in self.param_groups:
            for option, default in (("nesterov", False), ("maximize", False), ("differentiable", False)):
                group.setdefault(option, default)
            group.setdefault("foreach", None)
            group.setdefault("fused", None)


def _add_measurement(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A state_dict hook of every SGD, its first."""
    if isinstance(optimizer, SGD) and optimizer.symmetries:
        state_dict["measurement"] = optimizer._measured()


def _kind(p: Tensor) -> tuple[object, ...]:
    """What model.to(), and others, may change of a parameter."""
    return type(p), p.device, p.dtype, p.shape, gradient_dtypes(p)


def _new_buffer(p: Tensor, grad: Tensor, *, decays: bool) -> Tensor:
    """A momentum buffer of zeros, of the dtype that torch.optim.SGD gives it: that of the first g, or g + λp.

    Laid out as the parameter; beside one that is a tensor subclass it is like the gradient, as torch's.
    """
    dtype = torch.promote_types(p.dtype, grad.dtype) if decays else grad.dtype
    if has_own_dispatch(p) and not is_distributed(p):
        return torch.zeros_like(grad, dtype=dtype)
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _leave_divided(grads: Sequence[Tensor | None], taken: Sequence[Tensor | None]) -> list[Call]:
    """The calls that bring gradients that were written out for a step, and divided, back to where they came from."""
    pairs = zip(grads, taken, strict=True) if taken is not grads else ()
    return [
        partial(g.copy_, x)
        for g, x in pairs
        if g is not None and x is not None and x is not g and not g._is_zerotensor()
    ]


def _take_over(mine: Tensor, carried: Tensor) -> None:
    """Copy a carried measurement; where parameters were added since, the new ones come last and start afresh."""
    mine[: len(carried)].copy_(carried)
