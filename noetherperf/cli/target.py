"""What a user's MODULE:CALLABLE returns: a model, and a loss on one batch or example inputs."""

import functools
import importlib
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from noetherperf.cli.errors import fail

if TYPE_CHECKING:
    from torch import nn

    from noetherperf.detect import Symmetries

__all__ = ["Matrices", "SearchLoss", "inputs_of", "made_by", "search"]

#: Positional and keyword inputs of a model's forward.
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Matrices(StrEnum):
    yes = "yes"
    no = "no"
    both = "both"


class SearchLoss(StrEnum):
    cross_entropy = "cross_entropy"
    mse = "mse"
    none = "none"


def made_by(target: str) -> tuple[Any, ...]:
    """What "module:callable" returns, as a tuple; fails where there is none."""
    module_name, colon, name = target.partition(":")
    if not (module_name and colon and name):
        fail(f"{target!r} is no MODULE:CALLABLE; write it as in mypackage.training:make")
    sys.path.insert(0, str(Path.cwd()))  # as for `python -m`
    try:
        make = functools.reduce(getattr, name.split("."), importlib.import_module(module_name))
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise
        fail(f"there is no module {error.name!r} here; run this in the module's folder, or install it")
    except AttributeError:
        fail(f"module {module_name!r} has no {name!r}")

    from torch import nn

    made = make() if callable(make) and not isinstance(make, nn.Module) else make
    return tuple(made) if isinstance(made, tuple | list) else (made,)


def inputs_of(model: "nn.Module", closure: Callable[[], Any]) -> Inputs:
    """The inputs that a closure gives its model."""
    calls: list[Inputs] = []
    hook = model.register_forward_pre_hook(lambda _, args, options: calls.append((args, options)), with_kwargs=True)
    try:
        closure()
    finally:
        hook.remove()
    if not calls:
        fail("closure() never called the model returned beside it, so the model's inputs are not known")
    return calls[0]


def search(model: "nn.Module", inputs: Inputs, loss: SearchLoss, **how: Any) -> "Symmetries":
    """The symmetries that a search finds with these inputs as the example."""
    from noetherperf.detect import find_symmetries

    losses: dict[SearchLoss, Literal["cross_entropy", "mse"]] = {
        SearchLoss.cross_entropy: "cross_entropy",
        SearchLoss.mse: "mse",
    }
    args, options = inputs
    return find_symmetries(model, *args, loss=losses.get(loss), **how, **options)
