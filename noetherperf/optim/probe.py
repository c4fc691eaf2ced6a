"""Probe: measures the charges of a model's symmetries while any optimizer of torch steps it, from outside."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from noetherperf.common.untrusted import shown
from noetherperf.measure.readout import Readout
from noetherperf.optim.following import check_symmetries
from noetherperf.optim.inference import outside_inference
from noetherperf.optim.known import ByHand, Knowledge
from noetherperf.optim.shadows import Shadows
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry

_probes: "weakref.WeakSet[Probe]" = weakref.WeakSet()


class Probe:
    """Measures any optimizer of torch from outside, and leaves its trajectory as it is, bit for bit.

        optimizer = torch.optim.Muon(model.parameters(), lr=0.02)
        probe = nperf.Probe(optimizer, symmetries, model.named_parameters())
        ...                                                  # the training loop as it was
        law = probe.readout()["features.3"]

    The Probe writes a step from θ to θ' as θ' = r θ − η u. η is the parameter group's learning rate before the step. If
    that is missing or 0, η counts as 1, and u is the displacement. r is 1 − ηλ if the optimizer is known to decay the
    parameter alone, and 1 otherwise. Charges, growth, transport and the budget need no more, and are exact for any
    optimizer.

    The law, free + forced, also needs b, the share of u that the next step carries over. If u is no decaying sum of
    gradients, or is not known to be one, the law is open, and `reason` says so. docs/probe.md lists what is known.

    The Probe keeps a copy of the measured parameters. Hooks run before and after `step`. After each step, one pass
    reads copy, parameter and gradient, and writes the copy. The gradient is what p.grad holds after the step, as the
    optimizer left it. If a step calls its closure several times, this is the last gradient. The gradient shows in
    sum_g, sq_g, dot_pg and the constraint's defect, and in no law.

    If a parameter has moved without a gradient, its gradient counts as zero. If it has not moved, it takes no part.
    Version counters tell which parameters were changed between steps. A change that raises no counter (p.data) counts
    as part of the next step's u.

    Not supported: optimizers that step inside backward, without step(); steps that a CUDA graph replays, because hooks
    do not run there; sparse gradients.

    Args:
        optimizer: A torch.optim.Optimizer. If a library wraps it, give the inner one.
        symmetries: What to measure: Translation, Scale, Rescale, Balance or Norm (neurons(model), layers(model)).
        named_parameters: model.named_parameters(), or a dict. Parameters that no symmetry needs are ignored.
        like: A class of torch whose steps this optimizer makes: like=torch.optim.AdamW for an 8-bit or fused AdamW. The
            options in its parameter groups must be the same, and also the state, if it has one.
        carry: b, for an optimizer that is not known: a number, or a function of a parameter group.
        decay: λ of a decay of the parameter alone, r = 1 − ηλ: a number, or a function of a parameter group.
        backend: "auto", or one of noetherperf.backends().

    Raises:
        TypeError: `optimizer` is no optimizer of torch, or its steps have no hooks. Or a parameter is of a kind that
            cannot be measured, or carry or decay is no number.
        ValueError: There are no symmetries, they do not fit the parameters, or they need a parameter that the optimizer
            does not step. Or carry, decay, like or the backend is invalid.
        RuntimeError: The named backend cannot run here.

    Source: this project.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        symmetries: Sequence[Symmetry],
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        *,
        like: type[Optimizer] | None = None,
        carry: ByHand | None = None,
        decay: ByHand | None = None,
        backend: str = "auto",
    ) -> None:
        if not isinstance(optimizer, Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
            raise TypeError(
                f"optimizer: {type(optimizer).__qualname__} is no torch.optim.Optimizer with hooks around its steps; "
                "if it wraps one, make the Probe of the one inside (usually .optimizer)"
            )
        named = dict(named_parameters)
        checked = check_symmetries(symmetries, [{"params": list(named.values()), "param_names": list(named)}])
        if not checked:
            raise ValueError("symmetries: there are none, so the Probe would measure nothing; give at least one")
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for symmetry in checked:
            for part in symmetry.parts:
                if id(named[part.parameter]) not in stepped:
                    raise ValueError(
                        f"symmetry {symmetry.name!r}: {part.parameter!r} is in none of the optimizer's parameter "
                        "groups, so that no step moves it; leave the symmetry out, or give the optimizer this parameter"
                    )
        self.optimizer = optimizer
        knowledge = Knowledge(optimizer, like, carry, decay)
        for group in optimizer.param_groups:
            knowledge.of(group)
        names = {id(p): name for name, p in named.items()}
        self._shadows = Shadows(optimizer, knowledge, names, checked, backend)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]
        _probes.add(self)

    def __repr__(self) -> str:
        return f"Probe({type(self.optimizer).__name__}, symmetries=[{', '.join(s.name for s in self.symmetries)}])"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Probe cannot be copied or pickled: it hangs on its optimizer; make another one of the copied optimizer, "
            "and load this one's state_dict() there"
        )

    # ---- the hooks ---------------------------------------------------------------------------------------------------

    @_disable_dynamo
    @outside_inference
    @torch.no_grad()
    def _before(self, *_: object) -> None:
        with self._shadows.paused():
            self._shadows.before()

    @_disable_dynamo
    @outside_inference
    @torch.no_grad()
    def _after(self, *_: object) -> None:
        with self._shadows.paused():
            self._shadows.after()

    def _loaded(self, *_: object) -> None:
        self._shadows.lose_buffers()

    def remove(self) -> None:
        """Remove the hooks from the optimizer. The last readout stays. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._shadows.leave()
        _probes.discard(self)

    # ---- what a recorder, a callback or a plot asks for --------------------------------------------------------------

    @property
    def rule(self) -> Rule[Any]:
        """The rule whose laws are measured."""
        return self._shadows.rule

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The measured parameters, by the optimizer's groups, and the laws' options of each: lr, decay, carry."""
        return self._shadows.known_groups()

    @property
    def symmetries(self) -> tuple[Symmetry, ...]:
        """The symmetries that are measured."""
        return self._shadows.symmetries

    @property
    def backend(self) -> str:
        """Name of the backend that measures; joined by "+" where parameters have different ones."""
        return self._shadows.backend

    @property
    def step_count(self) -> int:
        """Steps since measuring began; see MeasuredOptimizer."""
        return self._shadows.step_count

    @property
    def measurement_id(self) -> str:
        """Identifies this measurement; see MeasuredOptimizer."""
        return self._shadows.measurement_id

    def readout(self) -> Readout:
        """Charges, predictions and residuals of every symmetry, after the last step; see MeasuredOptimizer."""
        return self._shadows.readout()

    def paused(self) -> AbstractContextManager[object]:
        """A context in which no other thread begins a step, loads or measures anew.

        A step that another thread is making when the context begins may go on.
        """
        return self._shadows.paused()

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call a hook before each step of the optimizer."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Call a hook after each step of the optimizer, after it was measured."""
        return self.optimizer.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any) -> RemovableHandle:
        """Call a hook before each state_dict() of the optimizer."""
        return self.optimizer.register_state_dict_pre_hook(hook)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def reset_measurement(self) -> None:
        """Start the laws anew from the present parameters and buffers."""
        self._shadows.reset_measurement()

    def state_dict(self) -> dict[str, Any]:
        """{"measurement": ...}, to save beside the optimizer's own. With sharded parameters this is a collective."""
        return {"measurement": self._shadows.measured()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict()`. Load the model's and the optimizer's own first.

        Raises:
            TypeError: It is no dict.
            ValueError: It has no measurement, was measured with other symmetries, or is damaged; raised before anything
                is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {shown(state_dict)}")
        if "measurement" not in state_dict:
            raise ValueError("state_dict: 'measurement' is missing; Probe.state_dict() gives it")
        self.load_measurement(state_dict["measurement"])

    def load_measurement(self, measured: Mapping[str, Any] | None) -> None:
        """Continue from a state_dict's "measurement". With None, measuring starts anew.

        Raises:
            ValueError: It was measured with other symmetries, or is damaged; raised before anything is changed.
        """
        self._shadows.load_measurement(measured)


def probes_of(optimizer: Optimizer) -> list[Probe]:
    """The Probes that measure an optimizer."""
    return [probe for probe in _probes if probe.optimizer is optimizer]
