"""Leaving torch.inference_mode(): a later step could not write tensors that were made in it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")


def outside_inference(method: Callable[P, T]) -> Callable[P, T]:
    """Wrap a method so that it runs outside of torch.inference_mode(), even if it is called inside."""

    @wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return outside
