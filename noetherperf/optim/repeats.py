"""Repeats: a step that sees what the step before saw is recognised by one compiled call, and made without another look.

All else goes the general way (optim/measured.py), which alone knows what a difference means.
"""

import operator
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import Glance, make_glance
from noetherperf.optim.buffers import Made

if TYPE_CHECKING:
    from noetherperf.optim.measuring import Measuring


class Repeats:
    """Whether the next step may be like the last one, and the calls that make it then.

    The last step must have been one on the CPU, of whole parameters, that made no new buffers.
    """

    def __init__(self) -> None:
        self._glance: Glance | None = None
        self._parts: tuple[object, ...] = ()  # that the glance is of
        self._last: Made | None = None  # what the last step made; None: the next one goes the general way
        self._missing = b""  # 1 for parameters that had no gradient in it
        self._n_written: list[int] = []  # buffers, for each parameter group

    def forget(self) -> None:
        """The next step goes the general way."""
        self._last = None

    def remember(self, measuring: "Measuring", missing: bytes, made: Made) -> None:
        """A step was made in the general way, and these were arguments of `Measuring.stepped`."""
        if 0 in made.new or measuring.parameters.sharded or not measuring.can_repeat:
            return
        if not self._is_of(parts := _parts(measuring)):
            self._glance, self._parts = _glance_of(measuring), parts
        if self._glance is not None:
            self._last, self._missing = Made(made.new, made.ages, []), missing
            self._n_written = list(map(measuring.rule.n_written, measuring.options.options))

    def calls(
        self, measuring: "Measuring", groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[Call] | None:
        """The calls that make the next step, with the present options; None if it must go the general way.

        Args:
            measuring: Its options were read.
            groups, state: Torch's.
        """
        last, self._last = self._last, None  # an error on the way leaves the next step to the general way
        options, on_device, counts = measuring.options.options, measuring.options.on_device, measuring.counts
        if last is None or self._glance is None or not on_device.is_empty or not self._is_of(_parts(measuring)):
            return None
        if list(map(measuring.rule.n_written, options)) != self._n_written:  # a buffer may have to be made
            return None
        kept = self._glance.look(groups, state)
        if kept is None:
            return None
        missing, made = self._missing, last
        if counts is not None:
            made = Made(last.new, counts.ages, counts.count(groups, state, missing, None, exact=True))
        (meter,) = measuring.meters or ()
        calls = made.calls + meter.engine.prepare_again(options, made.ages)
        calls += measuring.stepped(options, on_device, made, missing, None)
        return [*calls, partial(self.__dict__.update, _last=last), kept.clear]

    def _is_of(self, parts: tuple[object, ...]) -> bool:
        """Whether the glance is of these parts."""
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))


def _parts(measuring: "Measuring") -> tuple[object, ...]:
    """The present objects that a glance is of."""
    meters, counts = measuring.meters or [], measuring.counts
    watch = None if counts is None else counts.watch
    return measuring.meters, measuring.watched, watch, *(meter.engine.addresses for meter in meters)


def _glance_of(measuring: "Measuring") -> Glance | None:
    """A glance at all that a step sees; None if no step can be repeated."""
    if measuring.meters is None or len(measuring.meters) > 1:
        return None
    parameters, counts, rule, engine = measuring.parameters, measuring.counts, measuring.rule, measuring.meters[0].engine
    if engine.addresses is None:
        return None
    watched = measuring.watched
    return make_glance(
        parameters.all,
        parameters.sizes,
        parameters.gatherer,
        engine.readers,
        [None] * (2 + len(rule.buffers)) if watched is None else watched.watches(),
        rule.buffers,
        None if counts is None else counts.watch,
        rule.step_key,
        engine.addresses,
    )
