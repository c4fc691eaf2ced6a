"""Backends by name: which exist, which run here, and why others do not. "auto" is resolved once and recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from noetherperf.engines import FLOATING, Engine, gradient_dtypes
from noetherperf.engines.reader import has_own_dispatch, unreadable
from noetherperf.rules import adam, given, sgd
from noetherperf.rules.rule import Rule


@dataclass(frozen=True)
class Backend:
    """One way to make the step.

    Attributes:
        name: The name that users pass.
        device: Type of the devices whose tensors it steps; None: any.
        missing: Returns the reason why it cannot run here, None if it can.
        engine: Makes its Engine.
        rules: The update rules that it has kernels of; None: any rule.
    """

    name: str
    device: str | None
    missing: Callable[[], str | None]
    engine: Callable[..., Engine]
    rules: tuple[Rule[Any], ...] | None

    def steps(self, rule: Rule[Any]) -> bool:
        """Whether it steps by this rule; another one of the same name may be another."""
        return self.rules is None or any(rule is known for known in self.rules)


def _reference_engine(*args: object, **kwargs: object) -> Engine:
    from noetherperf.engines.reference import ReferenceEngine

    return ReferenceEngine(*args, **kwargs)  # type: ignore[arg-type]


def _cpu_engine(*args: object, **kwargs: object) -> Engine:
    from noetherperf.engines.cpu import CpuEngine

    return CpuEngine(*args, **kwargs)  # type: ignore[arg-type]


def _cuda_engine(*args: object, **kwargs: object) -> Engine:
    from noetherperf.engines.cuda import CudaEngine

    return CudaEngine(*args, **kwargs)  # type: ignore[arg-type]


def _cuda_missing() -> str | None:
    if find_spec("noetherperf._cuda") is None:
        return (
            "the compiled module noetherperf._cuda is not there; install again from source where nvcc is on PATH "
            "(CMAKE_ARGS=-DNPERF_CUDA=ON pip install -e . builds it, or tells why it cannot)"
        )
    from noetherperf.engines.cuda import unsupported

    return unsupported()


def _cpu_missing() -> str | None:
    if find_spec("noetherperf._cpu") is None:
        return (
            "the compiled module noetherperf._cpu is not there: this install is Python alone, and the backend "
            "reference steps in its place, slowly; install a wheel, or again where there is a C++17 compiler "
            "(pip install --force-reinstall --no-deps --no-cache-dir noetherperf)"
        )
    from noetherperf.engines.isa import unusable

    return unusable()


def _triton_engine(*args: object, **kwargs: object) -> Engine:
    from noetherperf.engines.triton import TritonEngine

    return TritonEngine(*args, **kwargs)  # type: ignore[arg-type]


def _triton_missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not there; pip install 'noetherperf[triton]'"
    if not torch.cuda.is_available():
        return "torch finds no CUDA or ROCm device"
    return None


#: The rules that compiled backends have kernels of (csrc/rules, triton_kernels/rules).
KERNELS: tuple[Rule[Any], ...] = (sgd.SGD, adam.ADAM, given.GIVEN)

#: Every backend, those that "auto" prefers first.
BACKENDS = {
    "cuda": Backend("cuda", "cuda", _cuda_missing, _cuda_engine, rules=KERNELS),
    "triton": Backend("triton", "cuda", _triton_missing, _triton_engine, rules=KERNELS),
    "cpu": Backend("cpu", "cpu", _cpu_missing, _cpu_engine, rules=KERNELS),
    "reference": Backend("reference", None, lambda: None, _reference_engine, rules=None),
}


def backends() -> dict[str, str]:
    """Every backend by name: "available", or the reason why it cannot run here.

    Returns:
        The backends in the order in which backend="auto" prefers them.
    """
    return {name: backend.missing() or "available" for name, backend in BACKENDS.items()}


def resolve(name: str, device: torch.device, *, rule: Rule[Any] = sgd.SGD, only_reference: bool = False) -> Backend:
    """The backend that a name means for parameters on a device.

    Args:
        name: A backend's name, or "auto": the first available one that serves the device.
        device: Where the parameters are.
        rule: The update rule that steps them.
        only_reference: Whether only "reference" can step the parameters, so that "auto" means it (why_reference).

    Raises:
        ValueError: Unknown name, or the named backend does not serve the device.
        RuntimeError: The named backend cannot run here.
    """
    if name == "auto":
        if only_reference:
            return BACKENDS["reference"]
        return next(
            b for b in BACKENDS.values() if b.device in (None, device.type) and b.steps(rule) and b.missing() is None
        )
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; choose one of {', '.join(['auto', *BACKENDS])}")
    backend = BACKENDS[name]
    if not backend.steps(rule):
        raise RuntimeError(
            f'backend="{name}" has no kernels of the update rule {rule.name!r}; use backend="reference", or "auto"'
        )
    reason = backend.missing()
    if reason is not None:
        raise RuntimeError(f'backend="{name}" cannot run here: {reason}; or use backend="auto"')
    if backend.device not in (None, device.type):
        raise ValueError(
            f'backend="{name}" steps parameters on {backend.device}, but there are parameters on {device}; '
            f'move the model to {backend.device} or use backend="auto"'
        )
    return backend


def why_reference(p: Tensor) -> str | None:
    """Why only "reference" can step a parameter, in words that follow its name; None if others can."""
    if has_own_dispatch(p):
        return unreadable(p)
    others = [str(dtype) for dtype in gradient_dtypes(p) if dtype != p.dtype]
    return f"is {p.dtype} and its grad_dtype lets gradients be {', '.join(others)}" if others else None


def check_parameter(name: str, p: Tensor, backend: Backend) -> None:
    """Raise if a backend cannot step a parameter of this kind.

    Raises:
        TypeError: A complex or unsupported dtype; a parameter that only "reference" can step, for another backend.
        ValueError: A view that torch negates on read.
    """
    if p.is_complex():
        raise TypeError(
            f"{name} is complex ({p.dtype}), which noetherperf does not step; store it as a real parameter "
            "(torch.view_as_real)"
        )
    if p.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f'{name} is {p.dtype}, which backend="{backend.name}" cannot step; it takes {names}')
    if backend.name != "reference" and (reason := why_reference(p)) is not None:
        raise TypeError(
            f'{name} {reason}, which backend="{backend.name}" cannot step; use backend="auto", which leaves it to '
            '"reference" and steps the others fast, or backend="reference"'
        )
    if p.layout == torch.strided and p.is_neg():
        raise ValueError(f"{name} {unreadable(p)}; give it memory of its own (.resolve_neg())")


def check_measured(name: str, p: Tensor, symmetry: str) -> None:
    """Raise if a symmetry's charges cannot be summed over a parameter.

    Raises:
        TypeError: A tensor subclass that stores its elements in its own way.
    """
    if has_own_dispatch(p):
        raise TypeError(
            f"symmetry {symmetry!r}: {name} {unreadable(p)}, so that its charges cannot be measured; leave out the "
            "symmetries of this parameter, or measure before the model is converted"
        )
