"""What is measured, watched between two steps: others may write parameters and buffers too.

Autograd counts the writes to a tensor, and step() tells it of its own; a buffer may be another tensor than it was. What
raises no counter (`p.data.clamp_()`, other libraries that write to memory) is not seen.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from noetherperf.engines import Call, carry_out
from noetherperf.engines.reader import Watch, make_watch
from noetherperf.optim.buffers import Buffers, Tensors


class Watched:
    """Parameters and their buffers as the last step, or whoever else is known to have written them, left them.

    Four lists are watched: parameters, buffers, and what of both is in this rank's memory where ranks share them out;
    for the whole and the part have a counter each, and who writes one does not raise the other's.

    Args:
        measured: The numbers of the parameters that are measured.
        params, here: All parameters, and what of each is in this rank's memory.
        buffers: Their buffers.
    """

    def __init__(
        self, measured: Sequence[int], params: Sequence[Tensor], here: Sequence[Tensor], buffers: Buffers
    ) -> None:
        self._params, self._here = params, list(here)
        cut = [i for i in measured if params[i] is not here[i]]
        self._any_cut = bool(cut)
        self._of_params, self._of_here = make_watch(measured, kept=True), make_watch(cut, kept=True)
        n = range(len(buffers.held))  # the rule's buffers
        self._of_held, self._of_buffers = [make_watch(measured) for _ in n], [make_watch(cut) for _ in n]
        self.know(measured, buffers)

    def changed(self, buffers: Buffers) -> tuple[list[int], list[int]]:
        """The numbers of the parameters, and of those whose buffers, somebody else has written or replaced since."""
        parameters, others = self._of_params.look(self._params), _look(self._of_held, buffers.held)
        if self._any_cut:
            parameters += self._of_here.look(self._here)
            others += _look(self._of_buffers, buffers.here)
        return parameters, others

    def know(self, which: Iterable[int], buffers: Buffers) -> None:
        """Take these parameters and their buffers as they are now."""
        for i in which:
            self._of_params.know(i, self._params[i])
            self._of_here.know(i, self._here[i])
            carry_out(self._known(i, buffers))

    def know_no_buffers(self, i: int) -> None:
        """The optimizer itself has taken parameter i's buffers away."""
        for watch in (*self._of_held, *self._of_buffers):
            watch.know(i, None)

    def _known(self, i: int, buffers: Buffers) -> list[Call]:
        """The calls after which parameter i's buffers are known as they are now."""
        pairs = [*zip(self._of_held, buffers.held, strict=True), *zip(self._of_buffers, buffers.here, strict=True)]
        return [partial(watch.know, i, of_all[i]) for watch, of_all in pairs]

    def know_moved(self, here: Sequence[Tensor]) -> None:
        """What is in this rank's memory is now there; parameters that came since are at the end."""
        for i, (old, new) in enumerate(zip(self._here, here, strict=False)):
            if old.data_ptr() != new.data_ptr():  # each asking gives another tensor of the same memory and counter
                self._here[i] = new
                self._of_here.know(i, new)

    def stepped(self, missing: bytes, ages: bytearray, buffers: Buffers) -> list[Call]:
        """The calls after which a step is known that raises the counters of all parameters but the missing ones, and
        makes the buffers of those at age 0."""
        calls: list[Call] = [partial(self._of_params.expect, missing)]
        if 0 in ages:
            for i in (i for i, age in enumerate(ages) if age == 0):
                calls += self._known(i, buffers)
        return calls


def _look(watches: Sequence[Watch], of_all: Sequence[Tensors]) -> list[int]:
    """The numbers of those that have changed, of any of these lists."""
    if len(watches) == 1:
        return watches[0].look(of_all[0])
    return [i for watch, tensors in zip(watches, of_all, strict=True) for i in watch.look(tensors)]
