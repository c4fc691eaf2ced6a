"""Laws of matrices, claimed: a rescale whose units may also be mixed is the diagonal of a Balance."""

from collections.abc import Mapping, Sequence

from noetherperf.detect.naming import Named, distinct
from noetherperf.symmetry import Balance, Rescale, Shape

__all__ = ["balances_of", "mixed"]


def balances_of(
    named: Sequence[Named], mixing: Mapping[str, int], shapes: Mapping[str, Shape], largest: int
) -> dict[str, Named]:
    """The Balance of each rescale whose units mix in blocks, by the rescale's name.

    Blocks are runs of as many neighbouring units as mix with each other. Only a test of every entry tells whether it
    holds.

    Args:
        named: What the search found.
        mixing: How many units mix, by the rescale's name (`mixing_units`).
        shapes: Of all parameters.
        largest: The most units of a block.
    """
    found = {
        item.symmetry.name: Named(balance, f"{item.meaning}{mixed(n)} whole")
        for item in named
        if isinstance(item.symmetry, Rescale)
        and 1 < (n := mixing.get(item.symmetry.name, 1)) <= largest
        and (balance := _balance(item.symmetry, n, shapes))
    }
    return dict(zip(found, distinct(list(found.values())), strict=True))


def mixed(n: int) -> str:
    """What a meaning says of units that mix."""
    return f"; any mix of {n:,} units keeps the loss: a law of matrices, claimed"


def _balance(rescale: Rescale, n: int, shapes: Mapping[str, Shape]) -> Balance | None:
    """The Balance of a rescale's parts whose units mix in blocks of n; None if there is none."""
    part = rescale.parts[0]
    n_units = part.n_groups(shapes[part.parameter])
    if n_units % n or any(abs(part.weight) != 1.0 or part.offset for part in rescale.parts):
        return None
    return Balance(None, rescale.inward, rescale.outward, size=None if n == n_units else n)
