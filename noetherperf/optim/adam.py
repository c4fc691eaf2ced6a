"""AdamW and Adam: the steps of torch's, which also measure the charges of symmetries and advance their laws."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from noetherperf.optim.following import labels_in
from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.rules import adam
from noetherperf.rules.numbers import check_betas, check_number
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry


class Adam(MeasuredOptimizer):
    """torch.optim.Adam, with the charges of the model's symmetries measured in the pass that makes the step.

    The k-th step of a tensor, with s = −1 for maximize and +1 otherwise, and d = s g + λ θ (AdamW: d = s g, and
    θ ← (1 − ηλ) θ first):

        m ← β₁ m + (1 − β₁) d,   n ← β₂ n + (1 − β₂) d²,   θ ← θ − η u,   u = m/(1 − β₁ᵏ) / (√n/√(1 − β₂ᵏ) + ε)

    With amsgrad, the largest n so far takes the place of n.

    A drop-in for torch.optim.Adam. Signature, defaults, errors, parameter groups, state_dict (step, exp_avg,
    exp_avg_sq, max_exp_avg_sq), hooks, closures and schedulers are the same, and each loads the other's checkpoints.
    Arithmetic is in float32 for 16-bit parameters, and in their own dtype for others. Measurements are float64.

    The host counts every tensor's steps, so it must know which steps torch.amp.GradScaler skips. On a GPU, a step
    under a scaler therefore waits for the device, unless all parameter groups are capturable. Without a scaler no step
    waits, except the first after other code, such as load_state_dict, has put counts of steps on a device.

    Args:
        params: Parameters or parameter groups. With symmetries they need names: model.named_parameters().
        lr: Learning rate η, a float or a tensor of one element.
        betas: β₁, β₂; two floats, or two tensors of one element.
        eps: ε.
        weight_decay: λ. If this, eps or a beta is a tensor on a device, every step waits for it.
        amsgrad: Divide by the largest second moment so far.
        foreach: Accepted for compatibility; has no effect. As in torch, True does not go with lr or betas as tensors.
        maximize: Maximize the objective instead.
        capturable: Allow steps in a CUDA graph. Counts of steps are then on the device, and every step computes there
            what depends on them. As in torch, step() refuses parameters on the CPU, unless fused.
        differentiable: Not supported.
        fused: Every backend makes one fused step. With True the step also unscales gradients for torch.amp.GradScaler
            and skips steps that overflow, as torch's fused step does. Counts of steps are then on the parameters'
            device. Otherwise the scaler does both.
        decoupled_weight_decay: Decay the parameter alone, as AdamW does.
        symmetries: What to measure: Translation, Scale, Rescale, Balance or Norm (neurons(model), layers(model)).
        backend: "auto", or one of noetherperf.backends() that has this rule's kernels.

    Raises:
        ValueError: A hyperparameter is out of range or a tensor of several elements; betas are neither two floats nor
            two tensors. Or symmetries do not fit the parameters, the backend is unknown, or parameters share memory.
        TypeError: A hyperparameter is no number, or the backend cannot step or measure a parameter of this kind.
        RuntimeError: The named backend cannot run here or has no kernels of this rule, differentiable is True, or
            foreach and fused are both True.

    Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.
    """

    rule: ClassVar[Rule[Any]] = adam.ADAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        symmetries: Sequence[Symmetry] = (),
        backend: str = "auto",
    ) -> None:
        if isinstance(lr, Tensor) and foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            check_number(name, value)
        check_betas(betas)
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i in range(2):
            if not 0.0 <= betas[i] < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if not any(all(isinstance(beta, kind) for beta in betas[:2]) for kind in (float, Tensor)):
            raise ValueError("betas must be either both floats or both Tensors")
        for i, beta in enumerate(betas):
            if isinstance(beta, Tensor) and foreach and not capturable:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            if foreach:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if differentiable:
            name = type(self).__name__
            raise RuntimeError(
                f"noetherperf.{name} steps in place and is not differentiable; use torch.optim.{name} for that, and "
                f"noetherperf.Probe(torch.optim.{name}(..., differentiable=True)) to measure it"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(x.squeeze() if isinstance(x, Tensor) and x.ndim > 0 else x for x in betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, symmetries, backend)

    def _step(self) -> None:
        for group in self.param_groups:
            if group["capturable"]:
                self._check_capturable(group)
        super()._step()

    def _check_capturable(self, group: Mapping[str, Any]) -> None:
        """Raise if no step of this parameter group can be captured in a CUDA graph, as torch does."""
        for label, p in zip(labels_in([group]), group["params"], strict=True):
            if p.grad is not None and p.device.type == "cpu" and not group["fused"]:
                raise AssertionError(  # torch's error, and its first words
                    "If capturable=True, params and state_steps must be on supported devices, which are GPUs, but "
                    f"{label} is on {p.device}; set capturable=False for it"
                )


class AdamW(Adam):
    """torch.optim.AdamW, with the charges measured: `Adam` whose weight decay acts on the parameter alone.

        θ ← (1 − ηλ) θ − η u,   u as in `Adam`, of the gradient without weight decay

    Arguments are those of `Adam`. weight_decay is λ, 0.01 by default.

    Raises:
        ValueError, TypeError, RuntimeError: As in `Adam`.

    Source: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        symmetries: Sequence[Symmetry] = (),
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            symmetries=symmetries,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam's, or of an early version of torch
            group["decoupled_weight_decay"] = True
