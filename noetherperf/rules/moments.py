"""Moments: the sums of a step over each segment, as a list of pairs of operands.

A moment is the sum of a product, ⟨a, b⟩, over a segment's elements. Kernels fold over a rule's list (csrc/moments.h,
triton_kernels/moments.py) and write one row per moment: an array [n moments, n segments], float64.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Operand(Enum):
    """A factor of a moment, element by element."""

    ONE = "1"
    P = "p"  # the parameter before the step
    P_NEW = "p'"  # and after it, as stored
    G = "g"  # the gradient of the loss alone
    U = "u"  # the update
    V = "v'"  # the first buffer after the step


class Pair(NamedTuple):
    """The moment ⟨a, b⟩; in ⟨a, 1⟩ the second operand is ONE."""

    name: str
    a: Operand
    b: Operand


class Moment(IntEnum):
    """Rows of the moments that every rule sums, the first of its list."""

    SUM_P = 0
    SQ_P = 1
    SUM_G = 2
    SQ_G = 3
    DOT_PG = 4
    SQ_U = 5


#: The moments that every rule sums and a readout shows. charges: sum_p, sq_p; constraints: sum_g, dot_pg.
COMMON = (
    Pair("sum_p", Operand.P_NEW, Operand.ONE),
    Pair("sq_p", Operand.P_NEW, Operand.P_NEW),
    Pair("sum_g", Operand.G, Operand.ONE),
    Pair("sq_g", Operand.G, Operand.G),
    Pair("dot_pg", Operand.P, Operand.G),
    Pair("sq_u", Operand.U, Operand.U),
)


def take(
    grouped: "Callable[[Tensor], Tensor]", pairs: Sequence[Pair], operands: "Mapping[Operand, Tensor]"
) -> "Tensor":
    """The moments of one view's segments, summed in float64 (docs/theory.md, section 2).

    Args:
        grouped: Reshapes a tensor to [outer, n_segments, inner] (View.grouped).
        pairs: What to sum.
        operands: Tensors of one shape and any floating dtype.

    Returns:
        [len(pairs), n_segments], float64.
    """
    import torch

    values = {which: grouped(x).double() for which, x in operands.items()}
    products = (values[a] if b == Operand.ONE else values[a] * values[b] for _, a, b in pairs)
    return torch.stack([product.sum((0, 2)) for product in products])
