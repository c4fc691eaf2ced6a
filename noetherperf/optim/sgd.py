"""SGD: the steps of torch.optim.SGD, which also measure the charges of symmetries and advance their laws."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.rules import sgd
from noetherperf.rules.numbers import check_number
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry


class SGD(MeasuredOptimizer):
    """torch.optim.SGD, with the charges of the model's symmetries measured in the pass that makes the step.

    The step, with s = −1 for maximize and +1 otherwise, and a = 1 the first time the buffer is written, 1 − τ after:

        d = s g + λ θ,   v ← β v + a d,   θ ← θ − η u,   u = v, or d + β v with nesterov, or d without momentum

    A drop-in for torch.optim.SGD. Signature, defaults, errors, parameter groups, state_dict, hooks, closures and
    schedulers are the same, and each loads the other's checkpoints. Arithmetic is in float32 for 16-bit parameters, and
    in their own dtype for others. Measurements are float64.

    Args:
        params: Parameters or parameter groups. With symmetries they need names: model.named_parameters().
        lr: Learning rate η, a float or a tensor of one element.
        momentum: β.
        dampening: τ.
        weight_decay: λ. If this, momentum or dampening is a tensor on a device, every step waits for it, as in torch.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        maximize: Maximize the objective instead.
        foreach: Accepted for compatibility; has no effect.
        fused: Every backend makes one fused step. With True the step also unscales gradients for torch.amp.GradScaler
            and skips steps that overflow, as torch's fused step does. Otherwise the scaler does both, and waits for the
            device.
        differentiable: Not supported.
        symmetries: What to measure: Translation, Scale, Rescale, Balance or Norm (neurons(model), layers(model)).
        backend: "auto", or one of noetherperf.engines.backends().

    Raises:
        ValueError: A hyperparameter is out of range or a tensor of several elements. Or symmetries do not fit the
            parameters, the backend is unknown, or parameters share memory.
        TypeError: A hyperparameter is no number, or the backend cannot step or measure a parameter of this kind.
        RuntimeError: The named backend cannot run here, differentiable is True, or foreach and fused are both True.

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
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        for name, value in numbers.items():
            check_number(name, value)
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
            raise RuntimeError(
                "noetherperf.SGD steps in place and is not differentiable; use torch.optim.SGD for that, and "
                "noetherperf.Probe(torch.optim.SGD(..., differentiable=True)) to measure it"
            )
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
        super().__init__(params, defaults, symmetries, backend)
