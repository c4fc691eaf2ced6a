"""SGD: torch.optim.SGD that measures its symmetries' charges, and every law's integrals, while it steps."""

import copy
import itertools
import operator
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from noetherperf.backends import Backend, check_parameter, resolve
from noetherperf.distributed import Ranks, check_whole, is_distributed, local, local_buffer, local_gradient, moved
from noetherperf.engines import Engine, OnDevice
from noetherperf.engines.reader import make_gatherer
from noetherperf.hyper import Hyper, device_lr
from noetherperf.openness import Openness
from noetherperf.plan import Measurement, make_plan
from noetherperf.readout import Readout, Source, read
from noetherperf.symmetry import Symmetry, from_json, to_json, validate

MEASUREMENT_VERSION = 2

T = TypeVar("T")


@dataclass
class _Device:
    """The parameters on one device, and what steps and measures them."""

    device: torch.device
    members: list[int]  # their numbers among all parameters
    groups: frozenset[int]  # the parameter groups that they are in
    backend: Backend
    ranks: Ranks  # and the plan
    measurement: Measurement  # of what is on this rank
    engine: Engine
    alone: bool  # there is no other device

    @property
    def is_host(self) -> bool:
        """Whether the host reads here without waiting."""
        return self.device.type == "cpu"

    def pick(self, values: Sequence[T]) -> Sequence[T]:
        """This device's values among those of all parameters."""
        return values if self.alone else [values[i] for i in self.members]

    def bring(self, hypers: list[Hyper], on_device: OnDevice) -> tuple[list[Hyper], OnDevice]:
        """A step's inputs, wherever they are, as the engine here reads them."""
        lrs, others = on_device.lrs, (on_device.grad_scale, on_device.found_inf)
        if not any(x is not None for x in (*lrs, *others)):
            return hypers, on_device
        if self.is_host:
            read = {i: float(lr) for i, lr in enumerate(lrs) if lr is not None and i in self.groups}
            hypers = [replace(hyper, lr=read[i]) if i in read else hyper for i, hyper in enumerate(hypers)]
            lrs = [None] * len(hypers)
        here = [None if x is None else x.to(self.device, non_blocking=True) for x in (*lrs, *others)]
        return hypers, OnDevice(here[:-2], *here[-2:])


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
        backend: "auto", or one of noetherperf.backends().

    Raises:
        ValueError: A hyperparameter out of range; symmetries that do not fit the parameters; an unknown backend.
        TypeError: A parameter of a dtype that the backend cannot step.
        RuntimeError: The named backend cannot run here; differentiable=True; foreach and fused both True.

    Source: Kunin et al. (2021), "Neural Mechanics", arXiv:2012.04728; Sutskever et al. (2013) for the momentum.
    """

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
        self._requested = backend
        self._may_be_fresh = False  # a device may have skipped the step that a new buffer was made for
        self._devices: list[_Device] | None = None
        self._params: list[Tensor] = []
        self._group_sizes: list[int] = []
        self._kinds: list[object] = []
        self._here: list[Tensor] = []  # what of them is in this rank's memory
        self._sharded = False
        self._symmetries: tuple[Symmetry, ...] = ()
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
        """Name of the backend that makes the step; joined by "+" where devices have different ones."""
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

    def _names(self) -> list[str | None]:
        """One name per parameter, over all groups; None where parameters came, or were put there, without names."""
        names: list[str | None] = []
        for group in self.param_groups:
            given, n = group.get("param_names", ()), len(group["params"])
            names += given if len(given) == n else [None] * n
        return names

    def _check_symmetries(self, symmetries: Sequence[Symmetry]) -> tuple[Symmetry, ...]:
        names = [name for name in self._names() if name is not None]
        params = [p for group in self.param_groups for p in group["params"]]
        if len(names) < len(params) and not (isinstance(symmetries, Sequence) and len(symmetries) == 0):
            raise ValueError(
                "symmetries name parameters, and these parameters came without names; "
                "pass model.named_parameters() instead of model.parameters(), and where you change group['params'] "
                "of a parameter group, change its group['param_names'] too"
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
        self._measurement_id = uuid.uuid4().hex
        self._carried: list[list[Tensor]] | None = None  # measurements to go on from when engines are made
        self._open_reasons: dict[str, Any] | None = None

    def _prepare(self) -> list[_Device]:
        """The devices with their plans and engines, made when first needed and after every change of parameters.

        Raises:
            RuntimeError, ValueError: Parameters were replaced, and what was measured does not go on with the new ones.
        """
        if self._replaced():
            self._follow()
        elif len(self.param_groups) > len(self._group_sizes) or (self._sharded and moved(self._params, self._here)):
            self._set_down()
        if self._devices is not None:
            return self._devices
        self._note_parameters()
        self._sharded = any(map(is_distributed, self._params))
        self._here = list(map(local, self._params))
        self._gatherer = make_gatherer(self._params)
        names = self._names()
        self._labels = [
            name or f"parameter {i} of group {g}"
            for (g, i), name in zip(
                ((g, i) for g, group in enumerate(self.param_groups) for i in range(len(group["params"]))),
                names,
                strict=True,
            )
        ]
        hyper_index = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        by_device: dict[torch.device, list[int]] = {}
        for i, p in enumerate(self._params):
            by_device.setdefault(p.device, []).append(i)
        devices = []
        for number, (device, members) in enumerate(by_device.items()):
            backend = resolve(self._requested, device)
            params = [self._params[i] for i in members]
            here = [self._here[i] for i in members]
            labels = [self._labels[i] for i in members]
            for label, x in zip(labels, here, strict=True):
                check_parameter(label, x, backend)
            plan = make_plan(self._symmetries, [names[i] for i in members], [tuple(p.shape) for p in params])
            ranks = Ranks(plan, labels, params)
            measurement = Measurement.empty(ranks.plan, device, len(self.param_groups))
            if self._carried is not None and number < len(self._carried):
                for mine, carried in zip(measurement.tensors(), self._carried[number], strict=True):
                    _take_over(mine, carried)
            groups = [hyper_index[i] for i in members]
            engine = backend.engine(ranks.plan, here, labels, groups, measurement)
            alone = len(by_device) == 1
            devices.append(_Device(device, members, frozenset(groups), backend, ranks, measurement, engine, alone))
        self._openness = Openness(self._symmetries, self._labels, hyper_index)
        if self._open_reasons is not None:
            self._openness.load_state_dict(self._open_reasons)
        self._carried = self._open_reasons = None  # they live on in the engines' measurements
        self._devices = devices
        return devices

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

        devices = self._prepare()
        on_device = self._on_device(devices)
        if on_device is None:
            return loss
        grads, missing = self._gatherer.attributes(self._params, "grad")
        if self._sharded:
            grads = list(map(local_gradient, self._labels, self._params, grads))
        for device in devices:
            device.engine.admit(device.pick(grads))
        if not self._began:
            self._begin()

        hypers = [Hyper.of(group) for group in self.param_groups]
        buffers, first = self._ready_buffers(missing)
        self._may_be_fresh |= on_device.found_inf is not None and 1 in first
        for device in devices:
            engine_hypers, inputs = device.bring(hypers, on_device)
            device.engine.step(device.pick(grads), device.pick(buffers), engine_hypers, device.pick(first), inputs)
        # Engines write past autograd's eyes; what it saved for a backward pass must be seen to have changed.
        written = (
            self._params if 1 not in missing else [p for p, no in zip(self._params, missing, strict=True) if not no]
        )
        torch.autograd.graph.increment_version(written)
        self._step_count += 1
        if self._symmetries:
            self._openness.update(self._step_count, hypers, on_device.lrs, bytes(first), missing)
        return loss

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

    def _buffers(self) -> tuple[list[Tensor | None], bytes]:
        """Every parameter's momentum buffer as the state holds it now, None where there is none; and 1 where so."""
        buffers, missing = self._gatherer.items(self.state, "momentum_buffer")
        if self._sharded:
            buffers = list(map(local_buffer, self._labels, self._params, buffers))
        return buffers, missing

    def _ready_buffers(self, without_grad: bytes) -> tuple[list[Tensor | None], bytearray]:
        """The buffers, made where this step writes one for the first time; and where it does."""
        buffers, missing = self._buffers()
        first = bytearray(len(buffers))
        if 1 in missing:
            momentum = [group["momentum"] != 0 for group in self.param_groups for _ in group["params"]]
            for i, p in enumerate(self._params):
                if missing[i] and momentum[i] and not without_grad[i]:
                    first[i] = 1
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    buffers[i] = local(self.state[p]["momentum_buffer"])
        return buffers, first

    def _drop_fresh_buffers(self) -> None:
        """Unmake the buffers whose first step a device skipped, as the host would not have made them; waits for it."""
        if self._may_be_fresh and self._devices is not None:
            for device in self._devices:
                fresh = device.engine.fresh
                for i in itertools.compress(device.members, fresh.tolist() if isinstance(fresh, Tensor) else fresh):
                    self.state.get(self._params[i], {}).pop("momentum_buffer", None)
        self._may_be_fresh = False

    # ---- measuring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _begin(self) -> None:
        """Measure the parameters and buffers as they are: where the laws start."""
        for device in self._prepare():
            buffers = device.pick(self._buffers()[0])
            device.engine.measure(buffers)
            device.measurement.start(device.ranks.plan, [v is not None for v in buffers])
        self._openness.reset()
        self._began = True

    @torch.no_grad()
    def reset_measurement(self) -> None:
        """Start the laws anew from the present parameters and momentum buffers; parameters and buffers stay."""
        if self._replaced():
            self._follow(anew=True)
        self._set_down()
        self._restart()
        self._begin()

    @torch.no_grad()
    def readout(self) -> Readout:
        """Charges, predictions and residuals of every symmetry, after the last step; a copy on the CPU.

        Where parameters are sharded over ranks this adds up what each has measured, and is a collective: every rank
        must call it, after the same step.

        Raises:
            RuntimeError: The ranks measure different things, or are not at the same step.
        """
        devices = self._prepare()
        if not self._began:
            self._begin()
        sources = [Source(device.ranks.whole, device.ranks.gather(device.measurement).cpu()) for device in devices]
        self._step_count = int(sources[0].measurement.clock[0])
        home = next((i for i, device in enumerate(devices) if 0 in device.groups), 0)
        time = sources[home].measurement.clock[1].item()
        return read(self._symmetries, sources, self._openness.reasons, self._step_count, time)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.SGD's state_dict, with everything that was measured under "measurement".

        What was measured is that of the whole parameters, however they are sharded; where they are, this is a
        collective, as readout() is.
        """
        if self._symmetries:
            self._prepare()
        self._drop_fresh_buffers()
        return super().state_dict()  # _add_measurement, the first of the hooks, adds it

    def _measured(self) -> dict[str, Any]:
        """What a checkpoint needs to go on measuring."""
        wholes = [device.ranks.gather(device.measurement) for device in self._prepare()]
        return {
            "version": MEASUREMENT_VERSION,
            "id": self._measurement_id,
            "symmetries": to_json(self._symmetries),
            "began": self._began,
            "openness": self._openness.state_dict(),
            "tensors": [[x.clone() for x in whole.tensors()] for whole in wholes],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.SGD; without measurement in it, measuring starts anew.

        Raises:
            ValueError: It was measured with other symmetries; raised before anything is changed.
        """
        measured = state_dict.get("measurement")
        self._check_measurement(measured)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "measurement"})
        self.load_measurement(measured)

    @torch.no_grad()
    def load_measurement(self, measured: Mapping[str, Any] | None) -> None:
        """Go on from what was measured, a state_dict's "measurement", and leave all else; None: measuring starts anew.

        Raises:
            ValueError: It was measured with other symmetries; raised before anything is changed.
        """
        self._check_measurement(measured)
        carried = None
        if measured is not None and self._symmetries:
            wholes = map(Measurement.of, measured["tensors"])
            scattered = [device.ranks.scatter(whole) for device, whole in zip(self._prepare(), wholes, strict=True)]
            carried = [[x.clone() for x in measurement.tensors()] for measurement in scattered]
        self._devices = None
        self._restart()
        if measured is not None and carried is not None:
            self._began = measured["began"]
            self._carried = carried
            self._measurement_id = measured.get("id", self._measurement_id)  # older checkpoints have none
            self._step_count = int(carried[0][-1][0])
            self._open_reasons = copy.deepcopy(measured["openness"])

    def _check_measurement(self, measured: Mapping[str, Any] | None) -> None:
        if measured is None:
            return
        if measured["version"] != MEASUREMENT_VERSION:
            raise ValueError(
                f"state_dict: its measurement has version {measured['version']}, this is version "
                f'{MEASUREMENT_VERSION}; drop it (del state_dict["measurement"]) to load the rest and measure anew'
            )
        saved = from_json(measured["symmetries"])
        if tuple(saved) != self._symmetries:
            saved_names, own_names = {s.name for s in saved}, {s.name for s in self._symmetries}
            changed = sorted(saved_names ^ own_names) or sorted(s.name for s in set(saved) ^ set(self._symmetries))
            raise ValueError(
                f"state_dict: it was measured with other symmetries (they differ in: {', '.join(changed) or 'order'}); "
                "make the optimizer with the same ones, or drop the measurement "
                '(del state_dict["measurement"]) to measure anew'
            )
        shapes = [[tuple(x.shape) for x in tensors] for tensors in measured["tensors"]]
        n_groups = len(self.param_groups)
        own = [Measurement.empty(device.ranks.whole, "meta", n_groups).tensors() for device in self._prepare()]
        if shapes != [[tuple(x.shape) for x in tensors] for tensors in own]:
            raise ValueError(
                "state_dict: it was measured on parameters of other shapes, groups or devices; "
                'drop the measurement (del state_dict["measurement"]) to measure anew'
            )

    def __getstate__(self) -> dict[str, Any]:
        self._drop_fresh_buffers()
        state = dict(super().__getstate__())
        carried = self._carried
        openness = self._open_reasons
        if self._devices is not None:
            carried = [device.measurement.tensors() for device in self._prepare()]
            openness = self._openness.state_dict()
        state["_measured"] = {
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        measured = state.pop("_measured", None)
        super().__setstate__(state)
        if measured is not None:  # unpickling or copying; load_state_dict comes here too, without it
            self.__dict__.update(measured)
            self._devices, self._sharded = None, False
            self._note_parameters()
            self.register_state_dict_post_hook(_add_measurement)
        for group in self.param_groups:
            for option, default in (("nesterov", False), ("maximize", False), ("differentiable", False)):
                group.setdefault(option, default)
            group.setdefault("foreach", None)
            group.setdefault("fused", None)


def _add_measurement(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A state_dict hook of every SGD, its first."""
    if isinstance(optimizer, SGD) and optimizer.symmetries:
        state_dict["measurement"] = optimizer._measured()


def _kind(p: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    """What model.to() may change of a parameter."""
    return p.device, p.dtype, p.shape


def _take_over(mine: Tensor, carried: Tensor) -> None:
    """Copy a carried measurement; where parameters were added since, the new ones come last and start afresh."""
    mine[: len(carried)].copy_(carried)
