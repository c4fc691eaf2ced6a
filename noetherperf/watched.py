"""What is measured, watched between two steps: others may write parameters and momentum buffers too.

Autograd counts the writes to a tensor, and step() tells it of its own; a buffer may be another tensor than it was. What
raises no counter (`p.data.clamp_()`, other libraries that write to memory) is not seen.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor

from noetherperf.engines.reader import make_watch

Tensors = list[Tensor | None]


class Watched:
    """Parameters and momentum buffers as the last step, or whoever else is known to have written them, left them.

    Four lists are watched: parameters, buffers, and what of both is in this rank's memory where ranks share them out;
    for the whole and the part have a counter each, and who writes one does not raise the other's.

    Args:
        measured: The numbers of the parameters that are measured.
        params, here: All parameters, and what of each is in this rank's memory.
        held, buffers: Their momentum buffers, None where there is none, and what of each is in this rank's memory.
    """

    def __init__(
        self, measured: Sequence[int], params: Sequence[Tensor], here: Sequence[Tensor], held: Tensors, buffers: Tensors
    ) -> None:
        cut = [i for i in measured if params[i] is not here[i]]
        self._params, self._held, self._here, self._buffers = map(make_watch, (measured, measured, cut, cut))
        for i, p in enumerate(params):
            self._params.know(i, p)
            self.know_buffer(i, held[i], buffers[i])
        self.know_here(here)

    def know_here(self, here: Sequence[Tensor]) -> None:
        """What is in this rank's memory was brought to another place."""
        for i, x in enumerate(here):
            self._here.know(i, x)

    def know_buffer(self, i: int, held: Tensor | None, buffer: Tensor | None) -> None:
        """Parameter i has been given another buffer by the optimizer itself."""
        self._held.know(i, held)
        self._buffers.know(i, buffer)

    def stepped(self, missing: bytes, first: bytearray, held: Tensors, buffers: Tensors) -> None:
        """A step has raised the counters of all parameters but the missing ones, and made the first ones' buffers."""
        self._params.expect(missing)
        if 1 in first:
            for i in itertools.compress(range(len(first)), first):
                self.know_buffer(i, held[i], buffers[i])

    def changed(
        self, params: Sequence[Tensor], here: Sequence[Tensor], held: Tensors, buffers: Tensors
    ) -> tuple[set[int], set[int]]:
        """The numbers of the parameters, and of those whose buffers, somebody else has written or replaced since."""
        parameters, parts = self._params.look(params), self._here.look(here)
        whole, of_whole = self._held.look(held), self._buffers.look(buffers)
        return {*parameters, *parts}, {*whole, *of_whole}
