"""The quantities that can be recorded of every group: how each is read, what it means, and how it follows from others.

Parts of the change are recorded, not the large numbers that they are differences of:

    charge − initial = decay + forced + defect + rounding

In float32 each part keeps seven digits of its own, however small it is beside the charge. From `free` and `total` in
float32 nothing would be left of a decay, a forced term or a rounding of 1e-9 of the charge.
"""

from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from noetherperf.rules.moments import Moment

if TYPE_CHECKING:
    from torch import Tensor

    from noetherperf.measure.charges import Charges

__all__ = ["DEFAULT", "INITIAL", "SAMPLES", "SAMPLE_BITS", "SERIES", "Series", "Terms", "derivations"]


class Series(NamedTuple):
    """One quantity of every group.

    Attributes:
        read: From a readout; None for a rule that does not have it.
        meaning: In words.
        formula: In the notation of docs/theory.md, or by the names of other series.
        units: "1", or "rad".
    """

    read: "Callable[[Charges], Tensor | None]"
    meaning: str
    formula: str
    units: str = "1"


def _moment(name: str, formula: str) -> Series:
    return Series(lambda charge: charge.moments[name], f"moment {name} of the last step, summed over parts", formula)


def _decayed(charge: "Charges") -> "Tensor | None":
    """The rest of the budget's change beside growth and transport: these three need no law."""
    if charge.growth is None or charge.transport is None:
        return None
    return charge.discrete.budget - charge.initial - charge.growth - charge.transport


_MOMENTS = {
    Moment.SUM_P: "Σ c⟨θ', 1⟩",
    Moment.SQ_P: "Σ c|θ'|²",
    Moment.SUM_G: "Σ c⟨g, 1⟩",
    Moment.SQ_G: "Σ c|g|²",
    Moment.DOT_PG: "Σ c⟨θ, g⟩",
    Moment.SQ_U: "Σ c|u|²",
}

SERIES: dict[str, Series] = {
    "charge": Series(lambda q: q.charge, "measured charge", "Q = Σ c⟨θ, 1⟩ for a translation, else Σ c|θ|²"),
    "discrete_free": Series(lambda q: q.discrete.free, "discrete law: what the initial charge became", "free"),
    "discrete_decay": Series(
        lambda q: q.discrete.free - q.initial, "discrete law: what decay took of the initial charge", "free - initial"
    ),
    "discrete_forced": Series(lambda q: q.discrete.forced, "discrete law: what finite steps drove", "forced"),
    "discrete_defect": Series(lambda q: q.discrete.defect, "discrete law: what a broken constraint drove", "defect"),
    "discrete_budget": Series(
        lambda q: q.discrete.budget, "discrete law: the sum of these, kept by itself", "free + forced + defect"
    ),
    "discrete_total": Series(lambda q: q.discrete.total, "discrete law: predicted charge", "free + forced"),
    "flow_free": Series(lambda q: q.flow.free, "flow law: what the initial charge became", "free"),
    "flow_decay": Series(
        lambda q: q.flow.free - q.initial, "flow law: what decay took of the initial charge", "free - initial"
    ),
    "flow_forced": Series(lambda q: q.flow.forced, "flow law: what the gradient's norm drove", "forced"),
    "flow_total": Series(lambda q: q.flow.free + q.flow.forced, "flow law: predicted charge", "free + forced"),
    "residual": Series(
        lambda q: q.residual, "charge less the discrete law's prediction", "charge - discrete_total = defect + rounding"
    ),
    "rounding": Series(
        lambda q: q.rounding, "charge less the budget: loss by rounding to the dtype", "charge - discrete_budget"
    ),
    "flow_residual": Series(
        lambda q: q.charge - (q.flow.free + q.flow.forced),
        "charge less the flow law's prediction",
        "charge - flow_total",
    ),
    "defect": Series(lambda q: q.defect, "gradient constraint of the last step", "Σ c⟨g, 1⟩ or Σ c⟨g, θ⟩"),
    "relative_defect": Series(
        lambda q: q.relative_defect, "gradient constraint of the last step, as a cosine", "|defect| / (|g_A| |ψ_A|)"
    ),
    **{moment.name.lower(): _moment(moment.name.lower(), formula) for moment, formula in _MOMENTS.items()},
    "decayed": Series(_decayed, "what weight decay took, whether or not a law holds", "Π r² initial - initial"),
    "growth": Series(
        lambda q: q.growth, "what the updates' own squares added", "r² growth + η²|u|²; 0 for a translation"
    ),
    "transport": Series(
        lambda q: q.transport, "what the updates' overlap with the group added", "r² transport - 2ηr Σ c⟨θ, u⟩"
    ),
    "relative_update": Series(lambda q: q.relative_update, "length of the last step, relative", "η|u| / |θ'|"),
    "angular_update": Series(
        lambda q: q.angular_update, "angle that the last step turned the group by", "∠(θ, θ')", "rad"
    ),
    "effective_lr": Series(
        lambda q: q.effective_lr, "effective learning rate of the last step", "η/Q for SGD, η/√Q for Adam"
    ),
}

#: What views and plots need. The other terms of the laws follow from these.
DEFAULT = {
    "charge": "float64",
    "rounding": "float32",
    "discrete_decay": "float32",
    "discrete_forced": "float32",
    "discrete_defect": "float32",
    "flow_residual": "float32",
    "flow_decay": "float32",
    "flow_forced": "float32",
    "relative_defect": "float32",
    "decayed": "float32",
    "growth": "float32",
    "transport": "float32",
    "angular_update": "float32",
    "effective_lr": "float32",
}

#: Numbers of the last step alone: the next row has others. Where no precision is asked for, they keep four digits of
#: float32's seven, for the others would be a tenth of the record.
SAMPLES = ("relative_defect", "angular_update", "effective_lr")
SAMPLE_BITS = 13  # of the mantissa; a relative error of 2^-14

INITIAL = "initial"  # the charge when measuring began, which every record has
Terms = tuple[tuple[int, str], ...]  # a sum: sign, and series or INITIAL


def _differences(law: str) -> dict[str, tuple[Terms, ...]]:
    """Ways to a law's free, decay and forced."""
    free, decay, forced, total = (f"{law}_{term}" for term in ("free", "decay", "forced", "total"))
    return {
        free: (((1, decay), (1, INITIAL)), ((1, total), (-1, forced))),
        forced: (((1, total), (-1, free)),),
        decay: (((1, free), (-1, INITIAL)),),
    }


#: How a series follows from others, if it is not recorded. The first way that can be gone is gone.
WAYS: dict[str, tuple[Terms, ...]] = {
    "discrete_budget": (
        ((1, "charge"), (-1, "rounding")),
        ((1, "discrete_free"), (1, "discrete_forced"), (1, "discrete_defect")),
    ),
    "residual": (
        ((1, "discrete_defect"), (1, "rounding")),
        ((1, "charge"), (-1, "discrete_total")),
    ),
    "discrete_total": (
        ((1, "charge"), (-1, "residual")),
        ((1, "discrete_budget"), (-1, "discrete_defect")),
        ((1, "discrete_free"), (1, "discrete_forced")),
    ),
    **_differences("discrete"),
    "discrete_defect": (
        ((1, "residual"), (-1, "rounding")),
        ((1, "discrete_budget"), (-1, "discrete_total")),
    ),
    "flow_total": (
        ((1, "charge"), (-1, "flow_residual")),
        ((1, "flow_free"), (1, "flow_forced")),
    ),
    **_differences("flow"),
    "rounding": (((1, "charge"), (-1, "discrete_budget")),),
    "flow_residual": (((1, "charge"), (-1, "flow_total")),),
    "decayed": (((1, "discrete_budget"), (-1, INITIAL), (-1, "growth"), (-1, "transport")),),
}


def derivations(recorded: Collection[str], wanted: Iterable[str] | None = None) -> dict[str, Terms]:
    """How to get series from those that are recorded.

    Args:
        recorded: Names of the recorded series.
        wanted: Of which series; by default of all that there are or that follow.

    Returns:
        By name, in an order in which they can be computed: () for a recorded series, else its terms, which are such
        series and INITIAL. Those that do not follow are missing.
    """
    known: dict[str, Terms] = {name: () for name in SERIES if name in recorded}
    n_before = -1
    while len(known) > n_before:
        n_before = len(known)
        for name, ways in WAYS.items():
            way = next((way for way in ways if all(term in known or term == INITIAL for _, term in way)), None)
            if name not in known and way is not None:
                known[name] = way
    if wanted is None:
        return known
    needed, ask = set[str](), list(wanted)
    while ask:
        name = ask.pop()
        if name in known and name not in needed:
            needed.add(name)
            ask += [term for _, term in known[name]]
    return {name: terms for name, terms in known.items() if name in needed}
