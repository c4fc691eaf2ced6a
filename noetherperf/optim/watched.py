"""Measured tensors, watched between two steps: other code may write parameters and buffers too.

Autograd's version counters count the writes to a tensor, and step() raises them for its own. A buffer may also be
replaced. Writes that raise no counter (`p.data.clamp_()`, other libraries that write to memory) are not detected.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from noetherperf.engines import Call, carry_out
from noetherperf.engines.reader import Watch, make_watch
from noetherperf.optim.buffers import Buffers, Tensors


class Watched:
    """Parameters and their buffers in the state that the last step, or the last recorded change, left.

    Four lists are watched: parameters, buffers, and of sharded ones the parts in this rank's memory. The whole and its
    part have a counter each, and a write to one does not raise the other's.

    Args:
        measured: The indices of the measured parameters.
        params, here: All parameters, and the part of each in this rank's memory.
        buffers: Their buffers.
    """

    def __init__(
        self, measured: Sequence[int], params: Sequence[Tensor], here: Sequence[Tensor], buffers: Buffers
    ) -> None:
        self._measured, self._params, self._here = measured, params, list(here)
        cut = [i for i in measured if params[i] is not here[i]]
        self._any_cut = bool(cut)
        self._of_params, self._of_here = make_watch(measured, kept=True), make_watch(cut, kept=True)
        n = range(len(buffers.held))  # the rule's buffers
        self._of_held, self._of_buffers = [make_watch(measured) for _ in n], [make_watch(cut) for _ in n]
        self.know(measured, buffers)

    def watches(self) -> list[Watch | None]:
        """The watches of whole tensors: of parameters, None for gradients, of each of the rule's buffers."""
        return [self._of_params, None, *self._of_held]

    def changed(self, buffers: Buffers) -> tuple[list[int], list[int]]:
        """The indices of parameters, and of parameters with buffers, that other code has written or replaced since."""
        parameters, others = self._of_params.look(self._params), _look(self._of_held, buffers.held)
        if self._any_cut:
            parameters += self._of_here.look(self._here)
            others += _look(self._of_buffers, buffers.here)
        return parameters, others

    def know(self, which: Iterable[int], buffers: Buffers) -> None:
        """Record the present state of these parameters and their buffers."""
        for i in which:
            self._of_params.know(i, self._params[i])
            self._of_here.know(i, self._here[i])
            carry_out(self._known(i, buffers))

    def know_buffers(self, buffers: Buffers) -> None:
        """Record the present state of all buffers."""
        pairs = [*zip(self._of_held, buffers.held, strict=True)]
        if self._any_cut:
            pairs += zip(self._of_buffers, buffers.here, strict=True)
        for watch, tensors in pairs:
            for i in self._measured:
                watch.know(i, tensors[i])

    def know_no_buffers(self, i: int) -> None:
        """The optimizer itself has taken parameter i's buffers away."""
        for watch in (*self._of_held, *self._of_buffers):
            watch.know(i, None)

    def _known(self, i: int, buffers: Buffers) -> list[Call]:
        """The calls after which parameter i's buffers are known as they are now."""
        pairs = [*zip(self._of_held, buffers.held, strict=True), *zip(self._of_buffers, buffers.here, strict=True)]
        return [partial(watch.know, i, of_all[i]) for watch, of_all in pairs]

    def know_moved(self, here: Sequence[Tensor]) -> None:
        """Record that the parts in this rank's memory have moved; parameters added since are at the end."""
        for i, (old, new) in enumerate(zip(self._here, here, strict=False)):
            if old.data_ptr() != new.data_ptr():  # local() returns new tensors of the same memory and counter
                self._here[i] = new
                self._of_here.know(i, new)

    def expected(self, missing: bytes) -> Call:
        """The call that records a step, which raises the counters of all parameters but the missing ones."""
        return partial(self._of_params.expect, missing)

    def made(self, new: bytearray, buffers: Buffers) -> list[Call]:
        """The calls that record that a step makes buffers of the parameters that are 0 in `new`."""
        return [call for i, old in enumerate(new) if old == 0 for call in self._known(i, buffers)]


def _look(watches: Sequence[Watch], of_all: Sequence[Tensors]) -> list[int]:
    """The numbers of those that have changed, of any of these lists."""
    if len(watches) == 1:
        return watches[0].look(of_all[0])
    return [i for watch, tensors in zip(watches, of_all, strict=True) for i in watch.look(tensors)]
