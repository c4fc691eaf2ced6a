"""Which symmetries of a record are drawn, and in which rows."""

from collections.abc import Collection, Sequence

from noetherperf.record import Record
from noetherperf.symmetry import Symmetry
from noetherperf.symmetry.names import meant, nearest

__all__ = ["chosen", "rows_of_layers"]

COLUMNS = 3

Rows = list[tuple[str, list[str]]]  # a layer, and the names of its symmetries


def chosen(record: Record, names: Sequence[str], modules: Sequence[str]) -> list[Symmetry]:
    """The symmetries of these names, and those with a part in one of these modules; all if neither is given.

    Balances are among them, after the others.

    Raises:
        ValueError: There is none of a name, or none in a module; the message has the nearest.
    """
    every = [*record.symmetries, *record.balances.values()]
    if not names and not modules:
        return every
    known = [symmetry.name for symmetry in every]
    wanted = set[str]()
    for name in names:
        found = [name] if name in known else meant(name, every)
        if not found:
            raise ValueError(f"symmetry: the record has no {name!r}; {nearest(name, known)}")
        wanted.update(found)
    there = {module for symmetry in every for module in _modules(symmetry)}
    for module in modules:
        if module not in there:
            raise ValueError(f"layer: no recorded symmetry has a part in {module!r}; {nearest(module, sorted(there))}")
    return [s for s in every if s.name in wanted or not _modules(s).isdisjoint(modules)]


def rows_of_layers(symmetries: Collection[Symmetry], n_columns: int = COLUMNS) -> Rows:
    """Rows of panels: a layer is the module of a symmetry's first part; of a layer so many symmetries are in a row."""
    of_layer: dict[str, list[str]] = {}
    for symmetry in symmetries:
        of_layer.setdefault(_module(symmetry.parts[0].parameter), []).append(symmetry.name)
    return [
        (layer, names[start : start + n_columns])
        for layer, names in of_layer.items()
        for start in range(0, len(names), n_columns)
    ]


def _modules(symmetry: Symmetry) -> set[str]:
    return {_module(part.parameter) for part in symmetry.parts}


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter
