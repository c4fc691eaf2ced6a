"""Following parameters: what param_groups hold, under which names, and whether that has changed."""

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any

from torch import Tensor

from noetherperf.engines import gradient_dtypes
from noetherperf.engines.reader import make_gatherer
from noetherperf.optim.distributed import check_whole, is_distributed, local, local_gradient, moved
from noetherperf.optim.names import names_in
from noetherperf.symmetry import Symmetry, validate

Group = Mapping[str, Any]  # one of torch's parameter groups


class Change(Enum):
    """A change of the followed parameters."""

    REPLACED = auto()  # others are in their place, or they were converted before the first step
    GROWN_OR_MOVED = auto()  # there are more groups, or shards have moved in memory


class Parameters:
    """The parameters in param_groups at the time of construction. Later measurements are of these.

    Attributes:
        all: The parameters of all groups.
        names: One name for each, None if it has none.
        labels: The name of each in error messages.
        dtypes: The dtype of each that has a name, by name: "float32".
        group_of: The number of each one's parameter group.
        n_groups: The number of groups.
        sizes: How many of the parameters are in each group.
        here: The part of each in this rank's memory.
        sharded: Whether any of them is sharded over ranks.
        gatherer: Gathers their gradients and buffers.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.all = parameters_in(groups)
        self.sizes = [len(group["params"]) for group in groups]
        self._kinds = list(map(_kind, self.all))
        self.names, self.labels = names_in(groups), labels_in(groups)
        dtypes = (str(p.dtype).removeprefix("torch.") for p in self.all)
        self.dtypes = {name: dtype for name, dtype in zip(self.names, dtypes, strict=True) if name is not None}
        self.group_of = [g for g, group in enumerate(groups) for _ in group["params"]]
        self.n_groups = len(groups)
        self.sharded = any(map(is_distributed, self.all))
        self.here = list(map(local, self.all))
        self.gatherer = make_gatherer(self.all)

    def change(self, groups: Sequence[Group], *, stepped: bool) -> Change | None:
        """How param_groups have changed since; None if they have not.

        Args:
            groups: The optimizer's own, as they are now.
            stepped: Whether steps have been made; before the first, converted parameters are others too.
        """
        known = groups[: self.n_groups]  # after those come added ones
        now = itertools.chain.from_iterable(group["params"] for group in known)
        if (
            [len(group["params"]) for group in known] != self.sizes
            or not all(map(operator.is_, now, self.all))
            or (not stepped and list(map(_kind, self.all)) != self._kinds)
        ):
            return Change.REPLACED
        if len(groups) > self.n_groups or (self.sharded and moved(self.all, self.here)):
            return Change.GROWN_OR_MOVED
        return None

    def gradients(self) -> tuple[list[Tensor | None], bytes]:
        """The part of every gradient in this rank's memory, None if there is none; and a byte for each: 1 for None."""
        grads, missing = self.gatherer.attributes(self.all, "grad")
        return list(map(local_gradient, self.labels, self.all, grads)) if self.sharded else grads, missing


def parameters_in(groups: Sequence[Group]) -> list[Tensor]:
    """The parameters of these groups."""
    return [p for group in groups for p in group["params"]]


def labels_in(groups: Sequence[Group]) -> list[str]:
    """The name in error messages of every parameter of these groups."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    return [name or f"parameter {i} of group {g}" for (g, i), name in zip(places, names_in(groups), strict=True)]


def check_symmetries(symmetries: Sequence[Symmetry], groups: Sequence[Group]) -> tuple[Symmetry, ...]:
    """The symmetries, validated against the parameters that these groups hold.

    Raises:
        ValueError: They do not fit the parameters, or these have no names, or one name twice.
    """
    names, params = [name for name in names_in(groups) if name is not None], parameters_in(groups)
    if len(names) < len(params) and not (isinstance(symmetries, Sequence) and len(symmetries) == 0):
        raise ValueError(
            "symmetries name parameters, and these parameters came without names; pass model.named_parameters() "
            "instead of model.parameters(), and where you change group['params'] of a parameter group, change its "
            "group['param_names'] too. ZeroRedundancyOptimizer hands each rank some parameters without names, so "
            "that nothing can be measured in it: give it no symmetries, or shard "
            "with torch.distributed.fsdp.fully_shard instead"
        )
    if symmetries:
        check_whole(names, params)
    checked = validate(symmetries, dict(zip(names, (tuple(p.shape) for p in params), strict=False)))
    twice = {name for name, count in Counter(names).items() if count > 1}
    for symmetry in checked:
        for part in symmetry.parts:
            if part.parameter in twice:
                raise ValueError(
                    f"symmetry {symmetry.name!r}: two parameters have the name {part.parameter!r}; "
                    "give each its own, such as [(f'student.{n}', p) for n, p in student.named_parameters()]"
                )
    return checked


def _kind(p: Tensor) -> tuple[object, ...]:
    """The properties of a parameter that model.to() and others may change."""
    return type(p), p.device, p.dtype, p.shape, gradient_dtypes(p)
