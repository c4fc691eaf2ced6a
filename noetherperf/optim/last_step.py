"""The last step's options: what a readout must know of it beside its moments."""

import itertools
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from noetherperf.engines import Call, OnDevice
from noetherperf.measure.turning import LastStep
from noetherperf.rules.motion import STILL, UNKNOWN
from noetherperf.rules.rule import Rule


@dataclass(frozen=True)
class LastOptions:
    """The options of the last step.

    Attributes:
        options: One per parameter group.
        lrs: For each group a copy of its learning rate as the step read it, if it is on a device; else None. The user's
            own may have changed since.
        missing: A byte per parameter: had it no gradient?
        since: Steps before the first with these options and gradients, as the host counted them; a device may have
            skipped some.
        changed: The parameters that were changed outside step() since.
    """

    options: Sequence[Any]
    lrs: Sequence[Tensor | None]
    missing: bytes
    since: int
    changed: frozenset[int] = frozenset()

    @classmethod
    def after(
        cls, last: "LastOptions | None", step: int, options: Sequence[Any], on_device: OnDevice, missing: bytes
    ) -> "tuple[LastOptions, list[Call]]":
        """The options after one more step, number `step`, and the calls that copy what is on a device."""
        kept: Sequence[Tensor | None] = []
        if last is not None:
            same = options is last.options or (options == last.options and all(lr is None for lr in on_device.lrs))
            if same and missing == last.missing and not last.changed:
                return last, []
            kept = last.lrs[: len(on_device.lrs)]
        lrs = list(itertools.starmap(_place, itertools.zip_longest(on_device.lrs, kept)))
        both = zip(lrs, on_device.lrs, strict=True)
        calls: list[Call] = [partial(to.copy_, lr) for to, lr in both if to is not None and lr is not None]
        return cls(options, lrs, missing, step - 1), calls

    def with_changed(self, which: Iterable[int]) -> "LastOptions":
        """These, after parameters were changed outside step()."""
        return replace(self, changed=self.changed.union(which))

    def copied(self, streams: "Sequence[torch.cuda.Stream | None]") -> "LastOptions":
        """A copy that later steps leave as it is, made on the steps' streams: after the last step, before the next."""
        of_device = {stream.device: stream for stream in streams if stream is not None}
        copies: list[Tensor | None] = []
        for lr in self.lrs:
            stream = None if lr is None else of_device.get(lr.device)
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                copies.append(None if lr is None else lr.clone())
        return replace(self, lrs=copies)

    def read(self, rule: Rule[Any], members: Sequence[int], group_of: Sequence[int], step: int) -> LastStep:
        """How some tensors made the last step; waits for the device if a learning rate is there.

        Args:
            rule: The update rule.
            members: The tensors' indices among all parameters.
            group_of: For each parameter the number of its group.
            step: Steps made. If it is not more than `since`, a device has skipped all steps with these options, and
                the last step that was made is not known.
        """
        if step <= self.since:
            return LastStep([UNKNOWN], [0] * len(members))
        options = [
            x if lr is None else rule.with_lr(x, float(lr)) for x, lr in zip(self.options, self.lrs, strict=True)
        ]

        def number(i: int) -> int:
            if i in self.changed or i >= len(self.missing):  # or added since
                return 0
            return 1 if self.missing[i] else 2 + group_of[i]

        return LastStep([UNKNOWN, STILL, *map(rule.motion, options)], list(map(number, members)))


def _place(lr: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Where to copy a learning rate: the place of the last copy, if it fits."""
    if lr is None:
        return None
    if kept is not None and (kept.device, kept.dtype, kept.shape) == (lr.device, lr.dtype, lr.shape):
        return kept
    return torch.empty_like(lr)
