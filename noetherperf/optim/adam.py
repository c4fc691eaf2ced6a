"""AdamW and Adam: torch's, which measure their symmetries' charges, and every law's integrals, while they step.

They run on the backend "reference"; compiled backends have no kernels of this rule yet.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from noetherperf.optim.measured import MeasuredOptimizer
from noetherperf.rules import adam
from noetherperf.rules.rule import Rule
from noetherperf.symmetry import Symmetry


class Adam(MeasuredOptimizer):
    """torch.optim.Adam, with the charges of the model's symmetries measured in the pass that makes the step.

    The step is in rules/adam.py. A drop-in: signature, defaults, errors, parameter groups, state_dict (checkpoints go
    both ways), hooks, closures and schedulers are those of torch.optim.Adam. Arithmetic is in float32 for 16-bit
    parameters, in their own dtype for others; measurements are float64.

    Args:
        params: Parameters or parameter groups; named (model.named_parameters()) where symmetries are given.
        lr: Learning rate η, a float or a tensor of one element.
        betas: β₁, β₂; floats.
        eps: ε.
        weight_decay: λ. If this or eps is a tensor on a device, every step waits for it.
        amsgrad: Divide by the largest second moment so far.
        foreach: Accepted for compatibility.
        maximize: Ascend instead.
        capturable, differentiable: Not supported.
        fused: True has it unscale gradients for torch.amp.GradScaler, and skip steps that overflow.
        decoupled_weight_decay: Decay the parameter alone, as AdamW does.
        symmetries: What to measure: Translation, Scale, Rescale or Norm (neurons(model), layers(model)).
        backend: "auto" or "reference".

    Raises:
        ValueError: A hyperparameter out of range; symmetries that do not fit the parameters; an unknown backend;
            parameters that share memory.
        TypeError: A parameter of a kind that the backend cannot step or measure.
        RuntimeError: The named backend cannot run here; capturable=True, differentiable=True, or betas as tensors;
            foreach and fused both True.

    Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.
    """

    rule: ClassVar[Rule[Any]] = adam.ADAM

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
        if isinstance(lr, Tensor):
            if foreach and not capturable:
                raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
            if lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
        if not float(lr) >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not eps >= 0.0:
            raise ValueError(f"Invalid epsilon value: {eps}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if any(isinstance(beta, Tensor) for beta in betas) and all(isinstance(beta, Tensor) for beta in betas):
            raise RuntimeError(
                f"noetherperf.{type(self).__name__} does not support betas as tensors yet; "
                "pass floats, (float(betas[0]), float(betas[1]))"
            )
        if not all(isinstance(beta, float) for beta in betas):
            raise ValueError("betas must be either both floats or both Tensors")
        if capturable:
            raise RuntimeError(
                f"noetherperf.{type(self).__name__} counts its steps on the host and cannot be captured in a CUDA "
                f"graph yet; leave capturable=False, or use torch.optim.{type(self).__name__} for that"
            )
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            if foreach:
                raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        if differentiable:
            raise RuntimeError(
                f"noetherperf.{type(self).__name__} steps in place and is not differentiable; "
                f"use torch.optim.{type(self).__name__} for that"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
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


class AdamW(Adam):
    """torch.optim.AdamW: `Adam` whose weight decay acts on the parameter alone.

    Args:
        params, lr, betas, eps, amsgrad, maximize, foreach, capturable, differentiable, fused, symmetries, backend: As
            in `Adam`.
        weight_decay: λ; decoupled.

    Raises:
        ValueError, TypeError, RuntimeError: As in `Adam`.

    Source: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
