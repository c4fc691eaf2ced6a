"""Counts of steps: the age of every tensor, in torch's state and on the host.

Torch keeps a tensor of no dimensions for each parameter, state[p]["step"]. Here these tensors are views of a few
one-dimensional ones: a single addition counts a step of thousands of parameters. The host counts along, so a step
reads none of them; the counts are read again only after other code has written or replaced them.

Only a device knows how often a CUDA graph was replayed, and which steps it skipped. A step that can be captured
(capturable=True) reads its counts there; the host's are then right up to a number that is the same for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import Watch, make_watch
from noetherperf.optim.following import Group, Parameters


class Block(NamedTuple):
    """Counts of one device and dtype, whose views are in torch's state."""

    counts: Tensor  # [m]
    members: np.ndarray  # [m]: the parameters' indices; −1 if the state has another tensor in a view's place

    def without(self, gone: np.ndarray) -> "Block":
        """The same tensor; the parameters that are true in `gone`, [n], are no members any more."""
        return Block(self.counts, np.where((self.members >= 0) & ~gone[self.members], self.members, -1))

    def mask(self, grows: np.ndarray) -> Tensor:
        """[m], 1 for the members that are true in `grows`, [n], and 0 for the others.

        A view that has left the state stays as it is: a state_dict may still hold it.
        """
        mask = torch.from_numpy((self.members >= 0) & grows[self.members])
        return mask.to(self.counts.device, self.counts.dtype)


class Addition(NamedTuple):
    """How a step counts, for the parameters that have a gradient in it."""

    missing: bytes
    grows: np.ndarray  # [n], false where one is missing
    masks: Sequence[Tensor]  # one for each block
    calls: list[Call]  # that add, where nothing is skipped


class Place(NamedTuple):
    """Where a block's counts are among those of some parameters: counts[which] in the places `where`."""

    counts: Tensor
    which: Tensor
    where: Tensor


class Counts:
    """Every parameter's count of steps.

    A tensor that other code puts into the state is replaced by a view of the same value at the next step or readout.

    Args:
        key: Of the counts in torch's state of a parameter.
        parameters: The parameters whose steps are counted.
    """

    _ages: np.ndarray  # [n]
    _views: Sequence[Tensor | None]  # in the state
    _blocks: Sequence[Block]
    _watch: Watch  # of the views
    _addition: Addition | None  # of the last step, None if views have changed since
    _places: Mapping[torch.device, Sequence[Place]]  # for `on_device`
    _is_exact: bool  # whether the host's counts are those on the devices

    def __init__(self, key: str, parameters: Parameters) -> None:
        self._key, self._parameters = key, parameters
        n = len(parameters.all)
        self._set(np.zeros(n, np.int64), [None] * n, [])

    @property
    def ages(self) -> np.ndarray:
        """The counts as the host knows them, [n], int64; right if the watched views are as they were."""
        return self._ages

    @property
    def watch(self) -> Watch:
        """Of the views in the state; another one whenever the counts are read again."""
        return self._watch

    def _set(self, ages: np.ndarray, views: Sequence[Tensor | None], blocks: Sequence[Block]) -> None:
        """Know these counts."""
        watch = make_watch(range(len(views)), kept=True)
        for i, view in enumerate(views):
            watch.know(i, view)
        self.__dict__.update(
            _ages=ages, _views=views, _blocks=blocks, _watch=watch, _addition=None, _places={}, _is_exact=True
        )

    def read(self, state: dict[Tensor, Any]) -> np.ndarray:
        """The counts in the state as far as the host knows them, [n], int64; 0 where there is none. It waits for a
        device only after other code has changed counts there.

        Raises:
            RuntimeError: A count is no tensor of one element.
            ValueError: A count is no whole number of steps.
        """
        held, _ = self._parameters.gatherer.items(state, self._key)
        if changed := self._watch.look(held):
            self._read_again(changed, held, state)
        return self._ages

    def exact(self) -> np.ndarray:
        """The counts as they are, [n], int64, after `read`; it waits for a device that alone knows some."""
        if not self._is_exact:
            ages = self._ages.copy()
            for counts, members in self._blocks:
                here = members >= 0
                ages[members[here]] = counts.cpu().numpy()[here]
            self.__dict__.update(_ages=ages, _is_exact=True)
        return self._ages

    def on_device(self, members: Sequence[int], device: torch.device) -> Tensor:
        """The counts of some parameters on their device, [len(members)], float64, without waiting; after `read`.

        Args:
            members: Their indices; always the same ones for a device.
            device: The device.

        Raises:
            RuntimeError: A count is elsewhere.
        """
        if device not in self._places:
            self._places = {**self._places, device: list(self._find(members, device))}
        found = torch.zeros(len(members), dtype=torch.float64, device=device)
        for counts, which, where in self._places[device]:
            found.index_copy_(0, where, counts[which].to(torch.float64))
        return found

    def _find(self, members: Sequence[int], device: torch.device) -> Iterator[Place]:
        for counts, of_block in self._blocks:
            place = {i: k for k, i in enumerate(of_block.tolist()) if i >= 0}
            where = [k for k, i in enumerate(members) if i in place]
            which = [place[members[k]] for k in where]
            if where and counts.device != device:
                raise RuntimeError(
                    f"{self._parameters.labels[members[where[0]]]}: its {self._key!r} in the optimizer's state is on "
                    f"{counts.device}, but capturable=True needs it on {device}; move it there, or load the checkpoint "
                    "with load_state_dict, which does"
                )
            yield Place(counts, *(torch.tensor(x, dtype=torch.int64, device=device) for x in (which, where)))

    def _read_again(self, changed: Sequence[int], held: Sequence[Any], state: dict[Tensor, Any]) -> None:
        """Read the counts that other code has written or replaced, and replace its tensors by views."""
        ages, views = self.exact().copy(), list(self._views)
        written, replaced, gone = [], [], np.zeros(len(ages), bool)
        for i in changed:
            self._check(i, held[i])
            if held[i] is not None and held[i] is views[i]:
                written.append(i)
                continue
            ages[i], views[i], gone[i] = 0, None, True
            if held[i] is not None:
                replaced.append(i)
        for members in _by_kind(written, held):
            ages[members] = self._numbers(members, _stacked(members, held))
        blocks = [block.without(gone) for block in self._blocks]
        for members in _by_kind(replaced, held):
            counts = _stacked(members, held)
            ages[members] = self._numbers(members, counts)
            blocks.append(Block(counts, np.array(members)))
            for i, view in zip(members, _views(counts), strict=True):
                views[i] = state[self._parameters.all[i]][self._key] = view
        self._set(ages, views, [block for block in blocks if (block.members >= 0).any()])

    def _check(self, i: int, count: object) -> None:
        if count is not None and not (isinstance(count, Tensor) and count.numel() == 1):
            raise RuntimeError(
                f"{self._parameters.labels[i]}: its {self._key!r} in the optimizer's state must be a tensor of one "
                f"element, as torch has it, got {type(count).__name__}; use torch.tensor(float(steps))"
            )

    def _numbers(self, members: Sequence[int], counts: Tensor) -> list[int]:
        """The counts as whole numbers."""
        numbers = counts.tolist()
        for i, number in zip(members, numbers, strict=True):
            if not (number >= 0 and float(number).is_integer()):
                raise ValueError(
                    f"{self._parameters.labels[i]}: its {self._key!r} in the optimizer's state must be a whole number "
                    f"of steps, got {number}; bias corrections need the number of steps that its buffers have seen"
                )
        return list(map(int, numbers))

    def count(
        self,
        groups: Sequence[Group],
        state: Mapping[Tensor, Any],
        missing: bytes,
        found_inf: Tensor | None,
        *,
        exact: bool,
    ) -> list[Call]:
        """The calls that count a step, after `read`.

        Args:
            groups: The parameter groups.
            state: Torch's.
            missing: 1 for a parameter without gradient, which does not count.
            found_inf: If it is not zero, nothing counts. None: 0.
            exact: Whether the host knows afterwards what is on the devices.
        """
        addition, blocks = self._addition, self._blocks
        calls: list[Call] = []
        views: Sequence[Tensor | None] = self._views
        late: list[int] = []
        if addition is None or addition.missing != missing:
            late = [i for i, view in enumerate(views) if view is None and not missing[i]]
            if late:
                views, blocks = list(views), list(blocks)
                for block in self._begin(late, groups):
                    blocks.append(block)
                    for i, view in zip(block.members.tolist(), _views(block.counts), strict=True):
                        views[i] = view
                        calls.append(partial(state[self._parameters.all[i]].__setitem__, self._key, view))
            grows = np.frombuffer(missing, np.uint8) == 0
            masks = [block.mask(grows) for block in blocks]
            addition = Addition(missing, grows, masks, self._adding(blocks, masks))
        added = addition.calls
        if found_inf is not None:
            counted = [found_inf.to(mask.device, non_blocking=True) == 0.0 for mask in addition.masks]
            masks = [mask * one.to(mask.dtype) for mask, one in zip(addition.masks, counted, strict=True)]
            added = self._adding(blocks, masks)
        ages = self._ages + addition.grows
        calls += [partial(self.__dict__.update, _ages=ages, _addition=addition, _is_exact=exact), *added]
        if late:
            calls.append(partial(self.__dict__.update, _views=views, _blocks=blocks, _places={}))
        return calls + [partial(self._watch.know, i, views[i]) for i in late]

    def _adding(self, blocks: Sequence[Block], masks: Sequence[Tensor]) -> list[Call]:
        """The calls that add these masks; they raise the counters of all views."""
        calls: list[Call] = [partial(block.counts.add_, mask) for block, mask in zip(blocks, masks, strict=True)]
        return [*calls, partial(self._watch.expect, bytes(len(self._views)))]

    def _begin(self, which: Sequence[int], groups: Sequence[Group]) -> list[Block]:
        """Blocks of zeros for parameters that have no count yet."""
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in which:
            p, group = self._parameters.all[i], groups[self._parameters.group_of[i]]
            kinds.setdefault(kind_of_count(p, group), []).append(i)
        return [
            Block(torch.zeros(len(members), dtype=dtype, device=device), np.array(members))
            for (device, dtype), members in kinds.items()
        ]


def kind_of_count(p: Tensor, group: Group) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a parameter's count, as torch makes it."""
    fused = group.get("fused")
    is_double = torch.get_default_dtype() == torch.float64 and not fused
    device = p.device if fused or group.get("capturable") else torch.device("cpu")
    return device, torch.float64 if is_double else torch.float32


def new_count(steps: float, p: Tensor, group: Group) -> Tensor:
    """A parameter's count of steps, as torch makes it."""
    device, dtype = kind_of_count(p, group)
    return torch.tensor(float(steps), dtype=dtype, device=device)


def _by_kind(which: Sequence[int], held: Sequence[Any]) -> list[list[int]]:
    """The indices, by the device and dtype of the tensors held there."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i in which:
        kinds.setdefault((held[i].device, held[i].dtype), []).append(i)
    return list(kinds.values())


def _stacked(which: Sequence[int], held: Sequence[Any]) -> Tensor:
    """A copy of tensors of one element, [len(which)]."""
    return torch.stack([held[i].detach().reshape(()) for i in which])


def _views(counts: Tensor) -> list[Tensor]:
    """Each element, as a view of no dimensions."""
    return [counts[k] for k in range(len(counts))]
