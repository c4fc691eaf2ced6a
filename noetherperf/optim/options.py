"""The options of an optimizer's parameter groups, as its rule reads them; read again only when one has changed."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from noetherperf.engines import OnDevice
from noetherperf.rules.numbers import device_lr
from noetherperf.rules.rule import Rule


class GroupOptions:
    """The options of parameter groups for the next step.

    Args:
        rule: The rule that reads them.

    Attributes:
        options: The rule's options, one per parameter group; the same list while none has changed.
        on_device: The learning rates that the host does not read, and nothing else.
    """

    def __init__(self, rule: Rule[Any]) -> None:
        self._rule = rule
        self._values_of = operator.itemgetter(*rule.option_names, "lr")  # of one name it would give no tuple
        self._values: list[Any] | None = None  # of the last reading; None where one may change in place
        self.options: list[Any] = []
        self.on_device = OnDevice([])

    def read(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Read them.

        Raises:
            TypeError, ValueError: An option is no number where it must be, or out of range.
        """
        values = list(map(self._values_of, groups))
        try:
            is_unchanged = self._values is not None and values == self._values
        except (RuntimeError, ValueError):  # of a tensor or array of several elements, which the rule will refuse
            is_unchanged = False
        if is_unchanged:
            return
        is_plain = all(map(_is_immutable, values))
        options, lrs = [self._rule.options(group) for group in groups], list(map(device_lr, groups))
        # At once, so that an interrupt cannot mix two readings.
        self.__dict__.update(options=options, on_device=OnDevice(lrs), _values=values if is_plain else None)


def _is_immutable(value: object) -> bool:
    """Whether a value stays what it is; tensors, arrays and lists may be written in place."""
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    return value is None or isinstance(value, float | int | str)
