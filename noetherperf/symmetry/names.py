"""Names of symmetries: what their parts are called, in characters that every keyboard has; and old names, found.

The search and a symmetry written by hand without a name (`Rescale(None, ...)`) are named alike.
"""

import difflib
import hashlib
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol

__all__ = ["find", "meant", "name_of", "nearest"]

LONGEST = 50  # characters of a name that is written out although it has a sum of more than two terms
LISTED = 12  # names that an error lists
PLAIN = (".weight", ".bias")  # "fc1" says enough of them


class Placed(Protocol):
    """The fields of a part that its name needs; see noetherperf.symmetry.Part."""

    @property
    def parameter(self) -> str: ...
    @property
    def start(self) -> int | None: ...
    @property
    def stop(self) -> int | None: ...
    @property
    def period(self) -> int | None: ...
    @property
    def weight(self) -> float: ...


class Named(Protocol):
    """A symmetry: its name, and what it is made of."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def parts(self) -> Sequence[Placed]: ...


def name_of(kind: str, parts: Sequence[Placed]) -> str:
    """The name of a symmetry that is given none.

        scale, norm     its modules: "conv1"; "tok + pos" for a sum that is normalised as a whole
        rescale         what enters, and what leaves: "fc1->fc2", "block.attn.v->o"
        balance         what enters the units, and what leaves them: "attn.q<->k"
        translation     its modules, with signs; a bias by its own name: "fc2", "bn2.bias - downsample.1.bias"

    A slice of an axis follows its parameter: "qkv[0:12]->qkv[12:24]". In a name of more than 50 characters, a sum of
    more than two terms is its first term and the number of the others, and the name then ends with four hexadecimal
    digits of the SHA-256 of the name in full: "wte + 25 more ~3fa2".

    Args:
        kind: "translation", "scale", "rescale", "norm" or "balance".
        parts: Its parts, with signed weights.

    Returns:
        ASCII, where the parameters' names are.
    """
    sides = _sides(kind, parts)
    arrow = "<->" if kind == "balance" else "->"
    whole = _arrow(sides, _sum, arrow)
    if len(whole) <= LONGEST or all(len(side) <= 2 for side in sides):
        return whole
    return f"{_arrow(sides, _shortened, arrow)} ~{hashlib.sha256(whole.encode()).hexdigest()[:4]}"


def find(key: str, symmetries: Sequence[Named], miss: str) -> str:
    """The name of the only symmetry that is meant by a key which is no name. A FutureWarning tells the caller's caller.

    Args:
        key: What was asked for.
        symmetries: Among which.
        miss: The error message's beginning.

    Raises:
        KeyError: None or several are meant; it lists the nearest names.
    """
    names = meant(key, symmetries)
    if len(names) == 1:
        warnings.warn(f"the symmetry {key!r} is named {names[0]!r} here; use that name", FutureWarning, stacklevel=3)
        return names[0]
    raise KeyError(f"{miss}; {_hint(key, names, symmetries)}")


def meant(key: str, symmetries: Iterable[Named]) -> list[str]:
    """The symmetries that a key means: it is the name of their parts, or the one that the search gave them earlier."""
    return [symmetry.name for symmetry in symmetries if key in _aliases(symmetry)]


def _hint(key: str, meant: Sequence[str], symmetries: Sequence[Named]) -> str:
    if meant:
        return f"it may be each of: {', '.join(meant)}"
    if having := [s.name for s in symmetries if any(part.parameter == key for part in s.parts)]:
        return f"but the parameter of that name is in: {', '.join(having[:LISTED])}"
    return nearest(key, [symmetry.name for symmetry in symmetries])


def nearest(name: str, known: Collection[str]) -> str:
    """The end of an error message on a name that is not known: all that are if they are few, else the nearest."""
    if len(known) <= LISTED:
        return f"there are: {', '.join(known) or 'none'}"
    near = difflib.get_close_matches(name, known, n=3)
    some = itertools.islice(known, LISTED)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(some)}, and others"


def _aliases(symmetry: Named) -> set[str]:
    plain = {name_of(symmetry.kind, symmetry.parts), _earlier_name(symmetry.kind, symmetry.parts)}
    return plain | {f"{name} ({symmetry.kind})" for name in plain}


# ---- parts ----------------------------------------------------------------------------------------------------------

Side = list[tuple[str, str]]  # terms: a sign, "+" or "-", and a place


def _sides(kind: str, parts: Sequence[Placed]) -> list[Side]:
    terms = _terms(parts, PLAIN[:1] if kind == "translation" else PLAIN)
    if kind not in ("rescale", "balance"):
        return [terms]
    return [[("+", place) for sign, place in terms if sign == side] for side in "+-"]


def _terms(parts: Sequence[Placed], plain: Sequence[str]) -> Side:
    """What the parts are called, each once."""
    return list(dict.fromkeys(("-" if part.weight < 0 else "+", _place(part, plain)) for part in parts))


def _place(part: Placed, plain: Sequence[str] = ()) -> str:
    """The parameter of a part without a plain ending, and its slice if it is one."""
    slice_ = ""
    if part.start is not None or part.stop is not None:
        every = f" of {part.period}" if part.period is not None else ""
        slice_ = f"[{part.start or 0}:{'' if part.stop is None else part.stop}{every}]"
    ending = next((ending for ending in plain if part.parameter.endswith(ending)), "")
    return part.parameter.removesuffix(ending) + slice_


def _sum(terms: Side) -> str:
    first, *others = terms
    return ("- " if first[0] == "-" else "") + first[1] + "".join(f" {sign} {place}" for sign, place in others)


def _shortened(terms: Side) -> str:
    return _sum(terms) if len(terms) <= 2 else f"{_sum(terms[:1])} + {len(terms) - 1} more"


def _arrow(sides: Sequence[Side], write: Callable[[Side], str], arrow: str) -> str:
    """Both sides, or the only one; the modules that both begin with stand once."""
    source, *targets = map(write, sides)
    if not targets:
        return source
    (target,) = targets
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(source, target, strict=False))
    shared = "".join(a for a, _ in alike)
    shared = shared[: shared.rfind(".") + 1]
    rest = target[len(shared) :]
    return source + arrow + (target if not shared or rest[:1].isdigit() or " + " in rest else rest)


# ---- earlier names --------------------------------------------------------------------------------------------------


def _earlier_name(kind: str, parts: Sequence[Placed]) -> str:
    """The name that the search gave earlier: with → and −, weights in translations, and no digits at the end."""
    if kind == "translation":
        return _sum(_terms(parts, ())).replace(" - ", " − ")
    return _arrow(_sides(kind, parts), _shortened_earlier, " → ")


def _shortened_earlier(terms: Side) -> str:
    return _sum(terms) if len(terms) <= 2 else f"{terms[0][1]} + {len(terms) - 2} more + {terms[-1][1]}"
