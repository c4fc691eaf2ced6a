"""Repeats: one compiled call finds out that a step has the tensors of the step before; then nothing is read again.

All else goes the general way (optim/measured.py), which alone knows what a difference means.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noetherperf.engines import Call, Repeating
from noetherperf.engines.reader import Glance, make_glance
from noetherperf.measure.openness import Openness
from noetherperf.optim.buffers import Made
from noetherperf.optim.last_step import LastOptions

if TYPE_CHECKING:
    from noetherperf.optim.measuring import Measuring


@dataclass(frozen=True, slots=True)
class Last:
    """The last step, as far as the next one may be like it.

    Fields:
        missing: 1 for parameters that had no gradient.
        new: Of Made: all 1.
        n_written: Buffers that it wrote, for each parameter group.
        options: One per parameter group.
        openness, of_options: What it left in the measuring.
        calls: Those that raise version counters.
    """

    missing: bytes
    new: bytearray
    n_written: list[int]
    options: Sequence[Any]
    openness: Openness
    of_options: LastOptions | None
    calls: list[Call]

    def is_with(self, measuring: "Measuring") -> bool:
        """Whether nothing but tensors can differ in the next step: there are the same options, and it was recorded."""
        return (
            self.options is measuring.options.options
            and self.openness is measuring.openness
            and self.of_options is measuring.last
        )


class Repeats:
    """Whether the next step may be like the last one, and the calls that make it then.

    The last step must have been one on the CPU, of whole parameters, that made no new buffers and took no products.
    """

    def __init__(self) -> None:
        self._seen: tuple[Repeating, Glance] | None = None  # the engine, and a glance at what its steps see
        self._parts: tuple[object, ...] = ()  # that these are of
        self._last: Last | None = None  # None: the next step goes the general way

    def forget(self) -> None:
        """The next step goes the general way."""
        self._last = None

    def remember(self, measuring: "Measuring", missing: bytes, new: bytearray) -> None:
        """A step was made, and these were arguments of `Measuring.stepped`."""
        if 0 in new or measuring.parameters.sharded or not measuring.can_repeat:
            return
        if not self._is_of(parts := _parts(measuring)):
            self._seen, self._parts = _seen(measuring), parts
        if self._seen is None:
            return
        options = measuring.options.options
        self._last = Last(
            missing,
            new,
            list(map(measuring.rule.n_written, options)),
            options,
            measuring.openness,
            measuring.last,
            measuring.raise_counters(missing),
        )

    def calls(
        self, measuring: "Measuring", groups: list[dict[str, Any]], state: dict[Tensor, Any]
    ) -> list[Call] | None:
        """The calls that make the next step, with the present options; None if it must go the general way.

        Args:
            measuring: Its options were read.
            groups, state: Torch's.
        """
        last, self._last = self._last, None  # an error on the way leaves the next step to the general way
        if last is None or self._seen is None or not self._is_of(_parts(measuring)):
            return None
        engine, glance = self._seen
        same = last.is_with(measuring)
        if not same and not self._can_take_options(measuring, last):
            return None
        kept = glance.look(groups, state)
        if kept is None:
            return None
        counts, options = measuring.counts, measuring.options.options
        ages: Any = last.new if counts is None else counts.ages
        calls: list[Call] = []
        if counts is not None:
            calls += counts.count(groups, state, last.missing, None, exact=True)
        calls += engine.prepare_again(options, ages, same_options=same)
        if same:
            calls += [*last.calls, partial(measuring.__dict__.update, step_count=measuring.step_count + 1)]
            then = partial(self.__dict__.update, _last=last)
        else:
            made = Made(last.new, ages, [])
            calls += measuring.stepped(options, measuring.options.on_device, made, last.missing, None)
            then = partial(self.remember, measuring, last.missing, last.new)
        return [*calls, then, kept.clear]

    def _can_take_options(self, measuring: "Measuring", last: Last) -> bool:
        """Whether a step with the present options has the buffers that it writes, and all its options on the host."""
        options = measuring.options
        return options.on_device.is_empty and list(map(measuring.rule.n_written, options.options)) == last.n_written

    def _is_of(self, parts: tuple[object, ...]) -> bool:
        """Whether engine and glance are of these parts."""
        return len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))


def _parts(measuring: "Measuring") -> tuple[object, ...]:
    """The present objects that engine and glance are of."""
    meters, counts = measuring.meters or [], measuring.counts
    watch = None if counts is None else counts.watch
    return measuring.meters, measuring.watched, watch, *(getattr(x.engine, "addresses", None) for x in meters)


def _seen(measuring: "Measuring") -> tuple[Repeating, Glance] | None:
    """The engine, and a glance at all that its steps see; None if steps cannot be repeated."""
    meters, watched, counts = measuring.meters or [], measuring.watched, measuring.counts
    parameters, rule = measuring.parameters, measuring.rule
    engine: object = meters[0].engine if len(meters) == 1 and not meters[0].grams.tensors() else None
    if not isinstance(engine, Repeating):
        return None
    glance = make_glance(
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
    return None if glance is None else (engine, glance)
