"""Parameters' names in checkpoints: torch loads by position, and names say whether positions mean the same tensors."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Modules that wrap another one and put their name before its parameters' names: DataParallel and
#: DistributedDataParallel, torch.compile, FullyShardedDataParallel, checkpoint_wrapper.
_WRAPPERS = re.compile(r"\b(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """A name, or any text with names in it, without the names of wrappers."""
    return _WRAPPERS.sub("", name)


def names_in(groups: Iterable[Mapping[str, Any]]) -> list[str | None]:
    """One name per parameter of these groups, None where there is none."""
    names: list[str | None] = []
    for group in groups:
        given, n = group.get("param_names", ()), len(group["params"])
        names += given if len(given) == n else [None] * n
    return names


def check_order(saved: Sequence[str | None], own: Sequence[str | None]) -> None:
    """Raise where a checkpoint has a parameter of this optimizer in another place.

    Names of wrappers are left out on both sides. Names that only one side has, or that a side has twice, are ignored:
    parameters with wholly other names are loaded by position, as in torch.

    Args:
        saved: The checkpoint's names, over all parameter groups; None where a parameter has none.
        own: The optimizer's.

    Raises:
        ValueError: With the first place where they differ.
    """
    at_saved, at_own = _places(saved), _places(own)
    for name, i in at_own.items():
        there = at_saved.get(name, i)
        if there != i:
            raise ValueError(
                f"state_dict: it has the parameters in another order: {own[i]!r} is parameter {i} of this optimizer "
                f"and {there} of the checkpoint. Loading goes by position, so that buffers would go to "
                "other parameters; make the optimizer with its parameters in the checkpoint's order, or sort the "
                "checkpoint's state (Optimizer.register_load_state_dict_pre_hook) and drop its measurement "
                '(del state_dict["measurement"]), if it has one'
            )


def _places(names: Sequence[str | None]) -> dict[str, int]:
    """The position of each name that occurs once."""
    plain = [None if name is None else unwrapped(name) for name in names]
    counts = Counter(plain)
    return {name: i for i, name in enumerate(plain) if name is not None and counts[name] == 1}
