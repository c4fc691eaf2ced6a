"""A symmetry in words and formulas, in the notation of docs/theory.md, with the parameters' names.

Knows no symmetry classes, only a kind, a name and parts. The formulas are those of checks/ (generator, gradient,
Hessian) and of rules/ (discrete and flow law).
"""

import re
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

from noetherperf.common.printing import printable

WIDTH, INDENT = 110, 12
JOIN = "\N{NO-BREAK SPACE}"  # where a line must not break; replaced by a space in the result
SCATTERED = "I"  # stands for the indices of a group that are no slice; a legend defines it
PRODUCT = re.compile("⟨[^⟩]*⟩")
SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Described(Protocol):
    """The fields of a part that the formulas need; see noetherperf.symmetry.Part."""

    @property
    def parameter(self) -> str: ...
    @property
    def axis(self) -> int | None: ...
    @property
    def start(self) -> int | None: ...
    @property
    def stop(self) -> int | None: ...
    @property
    def fold(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def period(self) -> int | None: ...
    @property
    def weight(self) -> float: ...
    @property
    def offset(self) -> float: ...


class Explanation(str):
    """Text that a Python prompt shows as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(kind: str, name: str, parts: Sequence[Described]) -> Explanation:
    """One symmetry in full, as lines of at most 110 columns where names allow it.

    Args:
        kind: "translation", "scale", "rescale", "norm" or "balance".
        name: The symmetry's name.
        parts: Its parts, with signed weights.

    Returns:
        The transformation, generator, gradient and Hessian constraint, charge, discrete law and flow law. A "norm"
        claims nothing, so it has only the charge and the budget of the update. A "balance" has each for the entry [i,
        j] of its matrices.

    Source: Kunin et al. (2021), arXiv:2012.04728; the discrete law and Nesterov's: this project.
    """
    many = any(part.axis is not None for part in parts)
    scattered = [
        f"in {printable(part.parameter)}: the {_indices(part)} along axis {part.axis}"
        for part in parts
        if _is_scattered(part)
    ]
    title = f"{kind.capitalize()} “{printable(name)}”" + (
        ", a law for each group i = 0, 1, 2, …" if many else ", one law"
    )
    if kind == "balance":
        title = f"Balance “{printable(name)}”, a law for each pair of units i, j = 0, 1, 2, … of a block"
        sections = _balance(parts)
    elif kind == "norm":
        sections = [_charge(kind, parts), *_BUDGET, *_offset_of_norm(parts)]
    else:
        sections = [
            ("symmetry", _transformation(kind, parts)),
            ("generator", f"ψ = ({_terms(parts, '1 on {}' if kind == 'translation' else '{1}')}), zero elsewhere"),
            *_constraints(kind, parts),
            _charge(kind, parts),
            *_offset(parts),
            *(_TRANSLATION_LAWS if kind == "translation" else _NORM_LAWS),
        ]
    legend = [(SCATTERED, "\n".join(scattered))] if scattered else []
    return Explanation("\n".join([title, "", *(_section(heading, text) for heading, text in (*legend, *sections))]))


def charge_formula(kind: str, parts: Sequence[Described]) -> str:
    """The charge of group i in one line: "2·|a[i]|² − |b[:,i]|²", or "⟨a[:,i], 1⟩" for a translation. For a balance
    that of units i and j: "⟨a[i], a[j]⟩ − ⟨b[:,i], b[:,j]⟩"."""
    return _charge_sum(kind, parts, in_words=True).replace(JOIN, " ")


def _transformation(kind: str, parts: Sequence[Described]) -> str:
    """ "For every α > 0 the loss stays the same when a is multiplied by α and b is divided by α"."""
    clauses = []
    for weight, alike in groupby(sorted(parts, key=lambda part: -part.weight), key=lambda part: part.weight):
        names = [_counted(part) for part in alike]
        verb = "are" if len(names) > 1 else "is"
        if kind == "translation":
            number = f"{'−' if weight < 0 else ''}{_factor(weight)}s"
            clauses.append(f"{number} is added to every element of {_listed(names)}")
        else:
            done = "multiplied" if weight > 0 else "divided"
            clauses.append(f"{_listed(names)} {verb} {done} by α{_power(weight)}")
    every = "number s" if kind == "translation" else "α > 0"
    return f"for every {every} the loss stays the same when {', and '.join(clauses)}"


def _balance(parts: Sequence[Described]) -> list[tuple[str, str]]:
    """All sections of a balance."""
    inward, outward = ([part for part in parts if (part.weight > 0) == side] for side in (True, False))
    into, out_of = (_listed([_place(part) for part in side]) for side in (inward, outward))
    of_inward, of_outward = _sum(inward, "⟨∇{0}, {2}⟩"), _sum(outward, "⟨{0}, ∇{2}⟩")
    return [
        (
            "symmetry",
            f"for every invertible matrix M the loss stays the same when {into} are mixed by M, and {out_of} by its "
            "inverse transpose: row i becomes the sum of all rows j, times M[i, j]",
        ),
        ("generator", "ψ = (E W₁, −Eᵀ W₂) for each entry of E, with the rows above as W₁ and W₂"),
        ("gradient", f"{of_inward} {of_outward[0]}{JOIN}{of_outward[1:]} = 0\nfor all i and j, on every batch"),
        ("Hessian", "H ψ + (Eᵀ ∇W₁, −E ∇W₂) = 0\na vector over all parameters of the model"),
        ("charge", f"X = {_charge_sum('balance', parts)}, symmetric\ngradient flow conserves it: dX/dt = 0"),
        ("laws", "those of a norm, entry by entry, with (a bᵀ + b aᵀ)/2 in the place of ⟨a, b⟩, and X of Q"),
        *_NORM_LAWS,
    ]


def _constraints(kind: str, parts: Sequence[Described]) -> list[tuple[str, str]]:
    if kind == "translation":
        gradient, drift = _sum(parts, "⟨∇{0}, 1⟩"), ""
    else:
        gradient, drift = _sum(parts, "⟨∇{0}, {1}⟩"), f" + ({_terms(parts, '∇{0}')})"
    return [
        ("gradient", f"{gradient} = 0\non every batch; ∇x is the gradient g of the loss with respect to x"),
        ("Hessian", f"H ψ{drift} = 0\na vector over all parameters of the model"),
    ]


def _charge(kind: str, parts: Sequence[Described]) -> tuple[str, str]:
    flow = "" if kind == "norm" else "\ngradient flow conserves it: dQ/dt = 0"
    return "charge", f"Q = {_charge_sum(kind, parts)}{flow}"


def _charge_sum(kind: str, parts: Sequence[Described], *, in_words: bool = False) -> str:
    terms = {"translation": "⟨{0}, 1⟩", "balance": "⟨{0}, {2}⟩"}
    return _sum(parts, terms.get(kind, "|{1}|²"), in_words=in_words)


def _offset(parts: Sequence[Described]) -> list[tuple[str, str]]:
    """How decay acts on what counts from an offset; nothing if no part does."""
    moved = [part for part in parts if part.offset]
    if not moved:
        return []
    pulled = _listed([f"{_place(part)} to 0 and not to {_number(-part.offset)}" for part in moved])
    sources = " + ".join(f"{_number(part.weight * part.offset)}·⟨{_counted(part)}, 1⟩" for part in moved)
    text = (
        f"weight decay draws {pulled}. So in the laws below λ(Q − C) stands in the place of λQ, with\n"
        f"C = {sources.replace('+ −', '− ')}\n"
        "measured in each step. Without momentum Q ← Q − 2ηλ(Q − C) + η²U; in the flow law, f gains ω²C"
    )
    return [("offset", text)]


_STEP = (
    "exact for torch's SGD: d = g + λθ, v ← βv + (1 − τ)d, θ ← θ − ηu, where u = v,\n"
    "without momentum u = d, with Nesterov's u = d + βv; in the first step 1 − τ counts as 1"
)
_DISCRETE = ("discrete law", _STEP)
_FLOW = (
    "flow law",
    "the continuous-time model; t = ηk after k steps, with momentum t = Tk, T = η(1 − τ)",
)
_DEFECT = (
    "defect",
    "where the gradient constraint is not exactly zero, as with a normalisation's eps, the discrete law gains a term "
    "that is linear in it: discrete.defect in the readout",
)

_TRANSLATION_LAWS = (
    _DISCRETE,
    ("  β = 0", "Q ← (1 − ηλ) Q;  after k steps Q = (1 − ηλ)^k Q₀"),
    ("  β > 0", "P ← βP + (1 − τ)λQ, then Q ← Q − ηP;  P is summed as Q is, with ⟨v, 1⟩ in place of ⟨θ, 1⟩"),
    ("  Nesterov", "P ← βP + λQ, and Q ← Q − η(λQ + βP) with the new P and the old Q"),
    _FLOW,
    ("  β = 0", "Q(t) = e^(−λt) Q(0)"),
    ("  β > 0", "Q̈ + 2γQ̇ + ω²Q = 0 from rest,  γ = (1 − β)/(T(1 + β)),  ω² = 2λ/(T(1 + β))"),
    ("  Nesterov", "the same with γ = (1 − β + βλη)/(T(1 + β))"),
    _DEFECT,
)

_NORM_LAWS = (
    _DISCRETE,
    ("  β = 0", "Q ← (1 − ηλ)² Q + η²F;  after k steps Q = (1 − ηλ)^(2k) Q₀ + η² Σⱼ (1 − ηλ)^(2(k−1−j)) Fⱼ"),
    ("  β > 0", "R = βP + (1 − τ)λQ, then Q ← Q − 2ηR + η²U and P ← R − ηU"),
    ("  Nesterov", "R = βP + λQ, then Q ← Q − 2η(λQ + βR) + η²U and P ← R − ηW, with the old Q on the right"),
    ("", "F, U, P, W are summed over the parts as Q is, with |g|², |u|², ⟨θ, v⟩, ⟨u, v⟩ in place of |θ|²"),
    _FLOW,
    ("  β = 0", "Q(t) = e^(−2λt) Q(0) + η ∫₀ᵗ e^(−2λ(t−s)) F(s) ds"),
    ("  β > 0", "Q̈ + 2γQ̇ + ω²Q = f from rest,  γ = (1 − β)/(T(1 + β)),  ω² = 4λ/(T(1 + β)),  f = 2U/(1 − τ)²"),
    ("  Nesterov", "γ = (1 − β + βλη)/(T(1 + β)), and f gains −4β/(1 + β) times the sum of ⟨g, u⟩"),
    _DEFECT,
)

_BUDGET = (
    ("claim", "none: no symmetry is known here; Q is measured with everything that changes it"),
    (
        "budget",
        f"{_STEP}\nQ ← Q − 2η⟨θ, u⟩ + η²|u|², each summed as Q is; without momentum\n"
        "Q ← (1 − ηλ)² Q − 2η(1 − ηλ)⟨g, θ⟩ + η²|g|²",
    ),
)


def _place(part: Described, *, in_words: bool = False, i: str = "i") -> str:
    """The elements of group i: "fc.weight[:,i]"; of a slice or a fold: "fc.weight[:,8+4i:12+4i]".

    Indices that are no slice are SCATTERED, or in words.
    """
    if part.axis is None:
        return printable(part.parameter)
    start, fold = part.start or 0, part.fold
    if _is_scattered(part):
        index = _indices(part, i).replace(" ", JOIN) if in_words else SCATTERED if i == "i" else i.upper()
    elif fold == 1:
        index = f"{start}+{i}" if start else i
    else:
        index = f"{f'{start}+' if start else ''}{fold}{i}:{start + fold}+{fold}{i}"
    return f"{printable(part.parameter)}[{':,' * part.axis}{index}]"


def _offset_of_norm(parts: Sequence[Described]) -> list[tuple[str, str]]:
    """What θ is in the budget where a part counts from an offset; nothing if none does."""
    counted = [_counted(part) for part in parts if part.offset]
    if not counted:
        return []
    return [
        ("offset", f"θ counts as {_listed(counted)} in ⟨θ, u⟩ and ⟨g, θ⟩; the formula without momentum needs λ = 0")
    ]


def _counted(part: Described, *, in_words: bool = False) -> str:
    """The elements of group i as they count: "1 + norm.weight[i]"."""
    place = _place(part, in_words=in_words)
    return f"{_number(part.offset)}{JOIN}+{JOIN}{place}" if part.offset else place


def _number(x: float) -> str:
    return f"{'−' if x < 0 else ''}{abs(x):g}"


def _is_scattered(part: Described) -> bool:
    """Whether the groups of a part are no slices of the axis."""
    return part.stride != 1 or part.period is not None


def _indices(part: Described, i: str = "i") -> str:
    """The indices of group i in words: "i-th 2 indices 4 apart among 8:24"."""
    indices = f"indices {part.stride} apart" if part.stride != 1 else "indices" if part.fold != 1 else "index"
    number = f"{part.fold} " if part.fold != 1 else ""
    stop = part.period if part.stop is None else part.stop
    among = f" among {part.start or 0}:{'' if stop is None else stop}" if part.start or stop is not None else ""
    every = f" of every {part.period}" if part.period is not None else ""
    return f"{i}-th {number}{indices}{among}{every}"


def _sum(parts: Sequence[Described], term: str, *, in_words: bool = False) -> str:
    """ "2·|a|² − |b|²": the term of every part with its weight, {0} its place and {1} what counts there."""
    text = ""
    for part in parts:
        sign = "−" if part.weight < 0 else "+" if text else ""
        others = _counted(part, in_words=in_words), _place(part, in_words=in_words, i="j")
        places = _place(part, in_words=in_words), *others
        text += f"{f' {sign}{JOIN}' if text else sign}{_factor(part.weight)}{term.format(*places)}"
    return text


def _terms(parts: Sequence[Described], term: str) -> str:
    """ "a, −2b, −(1 + c)": a vector over the parts."""
    found = []
    for part in parts:
        sign = f"{'−' if part.weight < 0 else ''}{_factor(part.weight)}"
        counted = f"({_counted(part)})" if sign and part.offset else _counted(part)
        found.append(sign + term.format(_place(part), counted).replace(" ", JOIN))
    return ", ".join(found)


def _factor(weight: float) -> str:
    return "" if abs(weight) == 1 else f"{abs(weight):g}·"


def _power(weight: float) -> str:
    number = f"{abs(weight):g}"
    return "" if number == "1" else number.translate(SUPERSCRIPT) if number.isdigit() else f"^{number}"


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _section(heading: str, text: str) -> str:
    """A heading with its text beside it; lines are wrapped."""
    margin = " " * (INDENT + 1)
    text = PRODUCT.sub(lambda product: product[0].replace(" ", JOIN), text)
    wrapper = textwrap.TextWrapper(WIDTH - len(margin), break_long_words=False, break_on_hyphens=False)
    body = textwrap.indent("\n".join(wrapper.fill(line) for line in text.split("\n")), margin)
    return (heading.ljust(len(margin)) + body[len(margin) :]).replace(JOIN, " ")
