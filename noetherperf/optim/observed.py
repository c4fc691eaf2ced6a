"""Torch's wrapper of step(), which calls hooks and labels the step for profilers, only where one of these is there.

The wrapper takes as long as the step of a small model.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import autograd
from torch.optim import Optimizer, optimizer


def where_observed(step: Callable[..., Any]) -> Callable[..., Any]:
    """A method step(), in torch's wrapper if the optimizer or all have hooks of steps, or if a profiler runs."""
    hooked = Optimizer.profile_hook_step(step)

    @wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (hooked if _is_observed(self) else step)(self, *args, **kwargs)

    return wrapper


def _is_observed(self: Optimizer) -> bool:
    return bool(
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or optimizer._global_optimizer_pre_hooks
        or optimizer._global_optimizer_post_hooks
        or autograd.profiler._is_profiler_enabled  # in any thread
        or autograd._profiler_enabled()  # type: ignore[attr-defined]  # in this one: older ones set no flag
    )
