"""torch.inference_mode(): what is made in it could not be written in a step later."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")


def outside_inference(method: Callable[P, T]) -> Callable[P, T]:
    """A method that runs as outside of torch.inference_mode(), whoever calls it there."""

    @wraps(method)
    def outside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return outside
