"""Measured tensors, watched between two steps: other code may write parameters and momentum buffers too.

Autograd's version counters count the writes to a tensor, and step() raises them for its own. A buffer may also be
replaced. Writes that raise no counter (`p.data.clamp_()`, other libraries that write to memory) are not detected.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from noetherperf.engines import Call
from noetherperf.engines.reader import make_watch
from noetherperf.optim.buffers import Buffers


class Watched:
    """Parameters and momentum buffers in the state that the last step, or the last recorded change, left.

    Four lists are watched: parameters, buffers, and of sharded ones the parts in this rank's memory. The whole and its
    part have a counter each, and a write to one does not raise the other's.

    Args:
        measured: The indices of the measured parameters.
        params, here: All parameters, and the part of each in this rank's memory.
        buffers: Their momentum buffers.
    """

    def __init__(
        self, measured: Sequence[int], params: Sequence[Tensor], here: Sequence[Tensor], buffers: Buffers
    ) -> None:
        self._params, self._here = params, list(here)
        cut = [i for i in measured if params[i] is not here[i]]
        self._any_cut = bool(cut)
        self._of_params, self._of_here = make_watch(measured, kept=True), make_watch(cut, kept=True)
        self._of_held, self._of_buffers = make_watch(measured), make_watch(cut)
        self.know(measured, buffers)

    def changed(self, buffers: Buffers) -> tuple[list[int], list[int]]:
        """The indices of parameters, and of parameters with buffers, that other code has written or replaced since."""
        parameters, others = self._of_params.look(self._params), self._of_held.look(buffers.held)
        if self._any_cut:
            parameters += self._of_here.look(self._here)
            others += self._of_buffers.look(buffers.here)
        return parameters, others

    def know(self, which: Iterable[int], buffers: Buffers) -> None:
        """Record the present state of these parameters and their buffers."""
        for i in which:
            self._of_params.know(i, self._params[i])
            self._of_here.know(i, self._here[i])
            self.know_buffer(i, buffers.held[i], buffers.here[i])

    def know_buffer(self, i: int, held: Tensor | None, here: Tensor | None) -> None:
        """Record that the optimizer itself has replaced parameter i's buffer."""
        self._of_held.know(i, held)
        self._of_buffers.know(i, here)

    def know_moved(self, here: Sequence[Tensor]) -> None:
        """Record that the parts in this rank's memory have moved; parameters added since are at the end."""
        for i, (old, new) in enumerate(zip(self._here, here, strict=False)):
            if old.data_ptr() != new.data_ptr():  # local() returns new tensors of the same memory and counter
                self._here[i] = new
                self._of_here.know(i, new)

    def stepped(self, missing: bytes, ages: bytearray, buffers: Buffers) -> list[Call]:
        """The calls that record a step: it raises the counters of all parameters but the missing ones, and makes the
        buffers of those at age 0."""
        calls: list[Call] = [partial(self._of_params.expect, missing)]
        if 0 in ages:
            for i in (i for i, age in enumerate(ages) if age == 0):
                calls.append(partial(self._of_held.know, i, buffers.held[i]))
                calls.append(partial(self._of_buffers.know, i, buffers.here[i]))
        return calls
