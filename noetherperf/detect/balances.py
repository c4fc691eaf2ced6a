"""Laws of matrices, claimed: a rescale whose units may also be mixed is the diagonal of a Balance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from noetherperf.detect.mixes import Mix
from noetherperf.detect.naming import Named, distinct
from noetherperf.symmetry import Balance, Part, Rescale, Shape

__all__ = ["balances_of", "mixed"]


def balances_of(
    named: Sequence[Named], mixes: Mapping[str, Sequence[Mix]], shapes: Mapping[str, Shape], largest: int
) -> dict[str, list[Named]]:
    """What may be claimed in the place of each rescale whose units mix in blocks, by the rescale's name.

    It is a Balance of all its units; or where only some mix, or blocks differ, a Balance of each stretch of alike
    blocks, and a Rescale of the units between. Only a test of every entry tells whether it holds.

    Args:
        named: What the search found.
        mixes: Which units mix, by the rescale's name (`mixing_units`).
        shapes: Of all parameters.
        largest: The most units of a block.
    """
    found: dict[str, list[Named]] = {}
    for item in named:
        of_blocks = [mix for mix in mixes.get(item.symmetry.name, ()) if mix.n <= largest]
        if isinstance(item.symmetry, Rescale) and of_blocks:
            found[item.symmetry.name] = list(_in_place_of(item, item.symmetry, of_blocks, shapes))
    names = iter(distinct([item for items in found.values() for item in items]))
    return {name: [next(names) for _ in items] for name, items in found.items() if items}


def mixed(n: int) -> str:
    """What a meaning says of units that mix."""
    return f"; any mix of {n:,} units keeps the loss: a law of matrices, claimed"


def _in_place_of(item: Named, rescale: Rescale, mixes: Sequence[Mix], shapes: Mapping[str, Shape]) -> Iterator[Named]:
    """The laws of stretches of its units; none where parts cannot name them."""
    first = rescale.parts[0]
    n_units = first.n_groups(shapes[first.parameter])
    stretches = [*mixes, *_between(mixes, n_units)]
    sides = [
        [[_sliced(part, stretch, shapes[part.parameter], n_units) for part in side] for stretch in stretches]
        for side in (rescale.inward, rescale.outward)
    ]
    plain = all(abs(part.weight) == 1.0 and not part.offset for part in rescale.parts)
    if not plain or any(part is None for side in sides for parts in side for part in parts):
        return
    for stretch, *both in zip(stretches, *sides, strict=True):
        inward, outward = ([part for part in parts if part is not None] for parts in both)
        n = n_units if stretch.period else stretch.stop - stretch.start
        if stretch.n > 1:
            size = None if stretch.period or stretch.n == n else stretch.n
            yield Named(Balance(None, inward, outward, size=size), f"{item.meaning}{mixed(stretch.n)} whole")
        else:
            yield Named(Rescale(None, inward, outward), item.meaning)


def _between(mixes: Sequence[Mix], n_units: int) -> Iterator[Mix]:
    """The stretches of units that do not mix."""
    taken = {i for mix in mixes for start in range(0, n_units, mix.period or n_units) for i in _of(mix, start)}
    rest = [i for i in range(n_units) if i not in taken]
    starts = [i for i in rest if i - 1 not in rest]
    stops = [i + 1 for i in rest if i + 1 not in rest]
    yield from (Mix(start, stop, 1) for start, stop in zip(starts, stops, strict=True))


def _of(mix: Mix, period_start: int) -> range:
    return range(period_start + mix.start, period_start + mix.stop)


def _sliced(part: Part, stretch: Mix, shape: Shape, n_units: int) -> Part | None:
    """Some of a part's units; None where no part has just these."""
    if (stretch.start, stretch.stop) == (0, n_units):
        return part
    if part.axis is None or part.stride != 1 or part.period is not None:
        return None
    length, (start, stop) = shape[part.axis], part.bounds(shape)
    if stretch.period is not None:
        whole = part.fold == 1 and (start, stop) == (0, length)
        end = stretch.stop if stretch.stop < stretch.period else None
        return replace(part, start=stretch.start or None, stop=end, period=stretch.period) if whole else None
    start, stop = start + part.fold * stretch.start, start + part.fold * stretch.stop
    return replace(part, start=start or None, stop=stop if stop < length else None)
