"""MeasuredOptimizer: the base of all optimizers here, for any update rule: torch's interface, and a readout."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from noetherperf.common.untrusted import shown
from noetherperf.engines import carry_out
from noetherperf.engines.backends import why_reference
from noetherperf.measure.balances import read_balances
from noetherperf.measure.cells import GramsCopy
from noetherperf.measure.plan import Measurement
from noetherperf.measure.readout import Readout, read
from noetherperf.measure.terms import Source
from noetherperf.optim import checkpoint
from noetherperf.optim.buffers import Buffers, gather
from noetherperf.optim.counts import new_count
from noetherperf.optim.distributed import local
from noetherperf.optim.following import Change, check_symmetries, labels_in, parameters_in
from noetherperf.optim.inference import outside_inference
from noetherperf.optim.measuring import Copies, Measuring
from noetherperf.optim.meters import Meter, check_divisible, resolve_all, resolve_one, step_inputs
from noetherperf.optim.names import names_in
from noetherperf.optim.observed import where_observed
from noetherperf.optim.torch_state import check_state
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry, balances_in, with_groups


class MeasuredOptimizer(Optimizer):
    """An optimizer of torch that measures the charges of a model's symmetries in the pass that makes its step.

    Use it for annotations and isinstance. A subclass, such as noetherperf.SGD, defines an update rule, and a
    constructor with its signature.

    Args:
        params: Parameters or parameter groups. With symmetries they need names.
        defaults: The options of parameter groups that do not give their own.
        symmetries: What to measure.
        backend: "auto", or one of noetherperf.backends().

    Attributes:
        rule: The update rule.

    Raises:
        ValueError: Symmetries do not fit the parameters, the backend is unknown, or parameters share memory.
        TypeError: The backend cannot step or measure a parameter of this kind.
        RuntimeError: The named backend cannot run here.
    """

    rule: ClassVar[Rule[Any]]
    _measuring_type: ClassVar[type[Measuring]] = Measuring

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], symmetries: Sequence[Symmetry], backend: str
    ) -> None:
        if not isinstance(getattr(self, "rule", None), Rule):
            raise TypeError(f"{type(self).__name__} has no update rule; give the class one (rule = ...)")
        self.rule.check()
        self._lock = threading.RLock()
        self._requested = backend
        super().__init__(params, defaults)
        checked = check_symmetries(symmetries, self.param_groups)
        self._measuring = self._measuring_type(self.rule, checked, self.param_groups)
        self._prepare()
        self.register_state_dict_post_hook(_add_measurement)

    # ---- what there is to step and to measure -----------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether step() unscales and skips by itself; read by torch.amp.GradScaler, and by libraries that clip."""
        return bool(self.defaults.get("fused"))

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries that are measured."""
        return self._measuring.symmetries

    @property
    def backend(self) -> str:
        """Name of the backend that makes the step; joined by "+" where parameters have different ones."""
        here = list(map(local, parameters_in(self.param_groups)))
        kinds = {(x.device, why_reference(x) is None): x for x in here}  # of thousands of tensors a few
        return "+".join(dict.fromkeys(resolve_one(self.rule, self._requested, x).name for x in kinds.values()))

    @property
    def step_count(self) -> int:
        """Steps since measuring began.

        Only a GPU knows which steps a gradient scaler made it skip. These steps count here until the next readout().
        """
        return self._measuring.step_count

    @property
    def measurement_id(self) -> str:
        """Identifies this measurement: new whenever measuring starts anew, the same in checkpoints and copies.

        Readouts of one measurement_id belong to one series; readout() itself may start a measurement anew.
        """
        return self._measuring.id

    def paused(self) -> AbstractContextManager[object]:
        """A context in which no other thread steps, loads or measures anew with this optimizer.

        A readout needs no such context: it is of one step, whichever thread calls it. A checkpoint from another thread
        needs one, because it holds the parameters and buffers themselves:

            with optimizer.paused():
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

        Returns:
            The context: the optimizer's lock. The thread that holds it may itself step and read out.
        """
        return self._lock

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch's optimizers do.

        Args:
            param_group: A dict with "params" and options of its own. If symmetries are measured, the parameters need
                names.

        Raises:
            TypeError, ValueError: A parameter in it cannot be stepped. The optimizer is as before.
        """
        with self._lock:
            super().add_param_group(param_group)
            if hasattr(self, "_measuring"):  # else they are checked when the optimizer is complete
                try:
                    here = list(map(local, parameters_in(self.param_groups)))
                    resolve_all(self.rule, self._requested, labels_in(self.param_groups), here)
                except BaseException:
                    self.param_groups.pop()
                    raise

    def _prepare(self) -> list[Meter]:
        """The meters, made when first needed and after every change of parameters.

        Raises:
            RuntimeError, ValueError: Parameters were replaced, and the measurement cannot continue with the new ones.
        """
        measuring = self._measuring
        change = measuring.parameters.change(self.param_groups, stepped=measuring.step_count > 0)
        if change is not None:
            self._follow(change)
        return self._set_up() if measuring.meters is None else measuring.meters

    def _follow(self, change: Change, *, anew: bool = False) -> None:
        """Continue with the parameters that param_groups hold now; the meters must be made anew.

        Args:
            change: How the parameters have changed.
            anew: Whether the laws are to start anew.

        Raises:
            RuntimeError: Laws would continue from a measurement of other parameters.
            ValueError: The symmetries do not fit the new ones.
        """
        measuring = self._measuring
        if change is Change.GROWN_OR_MOVED:
            self._set_down()
        elif measuring.symmetries and measuring.step_count > 0 and not anew:
            raise RuntimeError(
                f"param_groups hold other parameters than the {measuring.step_count} steps that were measured; call "
                "optimizer.reset_measurement() after replacing them, and measuring starts anew, or replace them (or "
                "shard the model) before the first step"
            )
        else:
            measuring.replace(self.param_groups)

    @outside_inference
    def _set_up(self) -> list[Meter]:
        """Make the meters."""
        return self._measuring.set_up(self.param_groups, self._requested)

    def _set_down(self) -> None:
        """Drop the meters and keep the measurement."""
        self._measuring.drop_fresh(self._lock, self.state)
        self._measuring.set_down()

    #: Torch wraps step() by it when the first optimizer of a class is made.
    profile_hook_step = staticmethod(where_observed)  # type: ignore[assignment]

    # ---- the step ---------------------------------------------------------------------------------------------------

    @_disable_dynamo  # as torch.compiler.disable, which would import the compiler together with this module
    @outside_inference
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step and measure it.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's result, None without a closure.

        Raises:
            RuntimeError, TypeError: A gradient does not fit (sparse, complex, of another dtype). Raised before anything
                is changed.
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
        measuring = self._measuring
        measuring.options.read(self.param_groups)
        scaler = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # torch.amp.GradScaler sets them
        if scaler[0] is None and scaler[1] is None:
            calls = measuring.repeats.calls(measuring, self.param_groups, self.state)
            if calls is not None:
                carry_out(calls)
                return
        with torch.no_grad():
            self._step_in_general(*scaler)

    def _step_in_general(self, *scaler: Any) -> None:
        """Make one step, with a look at all that may have changed; scaler: grad_scale and found_inf."""
        rule, measuring = self.rule, self._measuring
        measuring.repeats.forget()
        meters = self._prepare()
        options = measuring.options.options
        groups = self.param_groups
        on_device = step_inputs(meters, groups, measuring.options.on_device, *scaler)
        if on_device is None:
            return
        grads, missing = self._gradients()
        admitted = [meter.engine.admit(meter.pick(grads)) for meter in meters]
        if on_device.grad_scale is not None:
            check_divisible(measuring.parameters.labels, grads)
        buffers = self._buffers()
        measuring.catch_up(meters, buffers)

        # All writes, the engines' and the host's, are carried out at once: an interrupt leaves all or none.
        there = [meter.counts_there(groups) for meter in meters]
        inputs = grads, missing, on_device.found_inf, there
        made = buffers.make(rule, measuring.parameters, options, groups, self.state, *inputs)
        calls = made.calls
        for meter, taken, is_there in zip(meters, admitted, there, strict=True):
            unread = on_device
            if buffers.counts is not None and is_there:
                unread = replace(on_device, counts=buffers.counts.on_device(meter.members, meter.device))
            calls += meter.prepare(taken, grads, buffers.here, options, made.ages, unread)
        calls += measuring.stepped(options, on_device, made, missing, buffers if 0 in made.new else None)
        carry_out(calls)
        measuring.repeats.remember(measuring, missing, made.new)

    def _gradients(self) -> tuple[list[Tensor | None], bytes]:
        """What `Parameters.gradients` gives for a step."""
        return self._measuring.parameters.gradients()

    def _gather(self) -> Buffers:
        """The buffers in the present state; options are read too, because what buffers carry depends on them."""
        self._measuring.options.read(self.param_groups)
        return self._buffers()

    def _buffers(self) -> Buffers:
        """The buffers in the present state."""
        measuring = self._measuring
        return gather(self.rule, measuring.parameters, measuring.counts, self.state)

    # ---- measuring --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _catch_up(self, *, begin: bool = False) -> list[Meter]:
        """The meters, after changes made outside step() are recorded; the lock is held.

        Args:
            begin: Whether to measure now if nothing has been measured yet.
        """
        meters = self._prepare()
        if begin or self._measuring.began:
            self._measuring.catch_up(meters, self._gather())
        return meters

    def _copy(self, *, begin: bool) -> Copies:
        """Copy the measurement; begin: as for _catch_up."""
        with self._lock:
            return self._measuring.copy(self._catch_up(begin=begin))

    def _whole(self, copies: Copies) -> tuple[list[Measurement], list[GramsCopy]]:
        """What each meter measures of the whole parameters; a collective where they are sharded.

        Raises:
            RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
        """
        if self.symmetries:
            changed = copies.agree()
            with self._lock:
                self._measuring.openness.agree(changed)
        return copies.gather(), copies.gather_grams()

    @outside_inference
    @torch.no_grad()
    def reset_measurement(self) -> None:
        """Start the laws anew from the present parameters and buffers; parameters and buffers stay."""
        with self._lock:
            measuring = self._measuring
            change = measuring.parameters.change(self.param_groups, stepped=measuring.step_count > 0)
            if change is not None:
                self._follow(change, anew=True)
            self._set_down()
            measuring.restart()
            measuring.begin(self._prepare(), self._gather())

    @outside_inference
    @torch.no_grad()
    def readout(self) -> Readout:
        """Charges, predictions and residuals of every symmetry, after the last step; a copy on the CPU.

        Any thread may call it while another one steps: the readout is of one step. If parameters are sharded over
        ranks, it adds up the measurements of all ranks. It is then a collective: every rank must call it, after the
        same step.

        Returns:
            Symmetry name -> ChargeReadout, whose arrays are float64 [n groups].

        Raises:
            RuntimeError: The ranks measure different things, are not at the same step, or made different steps.
        """
        copies = self._copy(begin=True)
        wholes, grams = self._whole(copies)
        here = [whole.cpu() for whole in wholes]
        step, time = here[copies.home].clock[:2].tolist()
        if step != copies.step:  # a device has skipped steps
            with self._lock:
                self._measuring.correct(copies, int(step))
        last = copies.last_steps(self.rule, int(step))
        plans = [ranks.whole for ranks in copies.ranks]
        sources = list(map(Source, plans, here, last))
        reasons, dtypes = copies.openness.reasons, copies.dtypes
        balances = read_balances(balances_in(self.symmetries), [x.cpu() for x in grams], reasons)
        groups = with_groups(self.symmetries)
        return read(self.rule.name, groups, sources, reasons, int(step), time, dtypes, balances)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @outside_inference
    def state_dict(self) -> dict[str, Any]:
        """The state_dict of torch's optimizer of this kind, with the measurement under "measurement".

        The measurement is that of the whole parameters, for any sharding. If parameters are sharded, this is a
        collective, like readout().

        Returns:
            A dict that torch's optimizer loads, too. It refers to the buffers themselves, as torch's does.
        """
        if self.symmetries:
            with self._lock:
                self._catch_up()
        self._measuring.drop_fresh(self._lock, self.state)
        return super().state_dict()  # _add_measurement, the first of the hooks, adds it

    def _measured(self) -> dict[str, Any]:
        """The measurement for a checkpoint."""
        copies = self._copy(begin=False)
        wholes, grams = self._whole(copies)
        names = names_in(self.param_groups)
        return checkpoint.write(
            self.rule,
            wholes,
            grams,
            self.symmetries,
            names,
            copies.openness,
            identity=copies.id,
            began=copies.began,
        )

    @outside_inference
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's. If it has no measurement, measuring starts anew.

        Parameters are matched by position, as in torch, and this optimizer's names stay. If the checkpoint has names,
        too, they are used to check that each position means the same parameter.

        Raises:
            TypeError: It is no dict.
            ValueError: It has this optimizer's names in other places, was measured with other symmetries, or is
                damaged. Raised before anything is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {shown(state_dict)}")
        rest = {key: value for key, value in state_dict.items() if key != "measurement"}
        saved: list[checkpoint.Saved | None] = []

        def check(_: Optimizer, hooked: dict[str, Any]) -> None:
            """The last of the hooks, so that it checks what torch will load."""
            check_state(hooked, self.param_groups, self.rule)
            saved.append(self._read(state_dict.get("measurement"), hooked["param_groups"]))

        with self._lock:
            handle = self.register_load_state_dict_pre_hook(check)
            try:
                super().load_state_dict(rest)
            finally:
                handle.remove()
            self._resume(saved[0])

    @outside_inference
    @torch.no_grad()
    def load_measurement(self, measured: Mapping[str, Any] | None) -> None:
        """Continue from a state_dict's "measurement", and change nothing else. With None, measuring starts anew.

        Raises:
            ValueError: It was measured with another rule or other symmetries, or is damaged; raised before anything is
                changed.
        """
        with self._lock:
            self._resume(self._read(measured, self.param_groups))

    def _read(self, measured: object, groups: Sequence[Mapping[str, Any]]) -> checkpoint.Saved | None:
        """A state_dict's "measurement" as it fits this optimizer; groups: the options that it was measured with."""
        if measured is None:
            return None
        meters, names, openness = self._prepare(), names_in(self.param_groups), self._measuring.openness
        plans, gram_plans = [meter.ranks.whole for meter in meters], [meter.gram_plan for meter in meters]
        return checkpoint.read(measured, self.rule, plans, gram_plans, self.symmetries, names, openness, groups)

    def _resume(self, saved: checkpoint.Saved | None) -> None:
        """Continue from a checkpoint; None: measuring starts anew."""
        self._measuring.resume(saved, [] if saved is None else self._prepare())

    def __getstate__(self) -> dict[str, Any]:
        self._measuring.drop_fresh(self._lock, self.state)
        with self._lock:
            if self._measuring.meters is not None:
                self._catch_up()
            measured = {"version": checkpoint.VERSION, "backend": self._requested, **self._measuring.state()}
            return {**super().__getstate__(), "_measured": measured}

    @outside_inference
    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        measured = state.pop("_measured", None)
        if measured is None:  # load_state_dict, which has changed nothing yet: from here on names are our own
            for group, own in zip(state["param_groups"], self.param_groups, strict=True):
                group.update({"param_names": own["param_names"]} if "param_names" in own else {})
        elif measured["carried"] is not None and measured.get("version") != checkpoint.VERSION:
            raise ValueError(
                "optimizer: another version pickled it, and this one cannot read its measurement; save an "
                "optimizer's state_dict() instead, which later versions can read"
            )
        super().__setstate__(state)
        if measured is not None:  # unpickling or copying
            self._lock = threading.RLock()
            self._requested = measured["backend"]
            self._measuring = self._measuring_type.of_state(self.rule, measured, self.param_groups)
            self.register_state_dict_post_hook(_add_measurement)
        for slot in self.state.values():  # a step could not write tensors made in inference mode
            slot.update({key: x.clone() for key, x in slot.items() if isinstance(x, Tensor) and x.is_inference()})
        key = self.rule.step_key
        for group in self.param_groups:
            for option, default in self.rule.late_options:
                group.setdefault(option, default)
            for p in group["params"] if key is not None else ():
                count = self.state[p].get(key) if p in self.state else None
                if count is not None and not isinstance(count, Tensor):  # of an early version of torch
                    self.state[p][key] = new_count(count, p, group)


def _add_measurement(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """A state_dict hook of every measured optimizer, its first."""
    if isinstance(optimizer, MeasuredOptimizer) and optimizer.symmetries:
        state_dict["measurement"] = optimizer._measured()
