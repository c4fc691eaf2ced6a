"""Norms that count from an offset: |θ + c|² as a sum of what the laws keep, without sums of its own.

    |θ + c|² = |θ|² + c 2⟨θ, 1⟩ + c² n

A norm's law is linear, so each of its numbers (initial, free, forced, defect, budget, flow, growth, transport) is

    that of |θ|²  +  c · that of 2⟨θ, 1⟩  +  c² n · that of 1

all three moved by the norm's matrices. Their budgets are those of the charges themselves: the norm's, twice the
translation's, and 1, which no step changes. Their free part is a product of matrices times the start. Of defect and
forced one is kept: the norm's, the component `offset`, and for 1 it follows, because nothing but decay moves it. So a
view with such a part keeps both laws, and norms have two components more, driven by ⟨g, 1⟩, or ⟨θ, 1⟩ and ⟨u, 1⟩.

Derived in docs/theory.md, section 3.

Source: this project.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from noetherperf.measure.defect import Numbers
from noetherperf.measure.terms import Source, Terms
from noetherperf.rules.law import OFFSET, OFFSET_FLOW, X0, Y0, Law
from noetherperf.rules.moments import Moment

__all__ = ["count_from_offset", "propagators_of", "split"]

_FLOW_FREE, _FLOW_FORCED = 5, 6  # rows of `split`


def propagators_of(source: Source, law: Law) -> Numbers:
    """A law's propagators of each of its segments' tensors, [n segments, PROPAGATED, 2, 2]."""
    tensor, *law_segments = (x.numpy() for x in source.plan.indices)
    return np.asarray(source.measurement.propagators.numpy()[tensor[law_segments[law]], law])


def split(
    propagators: Numbers, start: tuple[Numbers, Numbers], budget: Numbers, kept: Mapping[str, Numbers | None]
) -> Numbers:
    """The numbers of a law's segments by source, [9, n segments].

    Args:
        propagators: The law's, of each segment's tensor, [n segments, PROPAGATED, 2, 2].
        start: x₀ and y₀.
        budget: Free + forced + defect.
        kept: "forced" or "defect", the other being the rest of the budget, "flow" and "growth"; None: 0.

    Returns:
        Rows: initial; discrete free, forced, defect, budget; flow free, forced; growth, transport.
    """
    (xx, xy), flow_xx = propagators[:, 0, 0].T, propagators[:, 1, 0, 0]
    x0, y0 = start
    free, nothing = xx * x0 + xy * y0, np.zeros_like(x0)
    forced, defect, flow, growth = map(kept.get, ("forced", "defect", "flow", "growth"))
    if defect is not None:
        forced = budget - free - defect
    else:
        forced = nothing if forced is None else forced
        defect = budget - free - forced
    flow, growth = (nothing if x is None else x for x in (flow, growth))
    return np.stack([x0, free, forced, defect, budget, flow_xx * x0, flow, growth, budget - xx * x0 - growth])


def count_from_offset(sources: Sequence[Source], terms: Terms, moments: Numbers, sums: Numbers) -> None:
    """Make of the numbers of |θ|² those of |θ + c|², for the shares with an offset; in place.

    Args:
        sources: What is measured.
        terms: Of all groups' sums.
        moments: Of each share, [moments, n shares].
        sums: Rows of `split` of each share, [9, n shares].
    """
    at = np.flatnonzero(terms.offset)
    c, n = terms.offset[at], terms.n_elements[at]
    sum_p = moments[Moment.SUM_P, at]
    moments[Moment.SQ_P, at] += c * (2.0 * sum_p + c * n)
    moments[Moment.SUM_P, at] += c * n
    moments[Moment.DOT_PG, at] += c * moments[Moment.SUM_G, at]
    crossing, still = (np.concatenate(x, axis=1) for x in zip(*map(_of_sums, sources), strict=True))
    sums[:, at] += c * terms.shares(crossing[:, terms.state])[:, at]
    sums[:, at] += c * c * n * still[:, terms.state[terms.share[at]]]


def _of_sums(source: Source) -> tuple[Numbers, Numbers]:
    """Rows of `split` for 2⟨θ, 1⟩, and for 1, by the norm's matrices; [9, n states] in the order of all laws' states.

    They are of norms in views that also have translations; the others mean nothing.
    """
    shapes, (translations, norms) = source.plan.rule.laws, source.measurement.states
    at = source.plan.translation_of
    state = translations[:, at] if translations.shape[1] else translations.new_zeros(len(translations), len(at))
    budget = shapes[Law.TRANSLATION].x("budget", state)
    assert budget is not None, "every law keeps its budget"
    x0, y0 = 2.0 * state[X0].numpy(), state[Y0].numpy()
    nothing, one = np.zeros_like(x0), np.ones_like(x0)
    unknown = np.full_like(x0, np.nan)  # the rule has no such law

    def component(name: str) -> Numbers:
        x = shapes[Law.NORM].x(name, norms)
        return unknown if x is None else x.numpy()

    side = "defect" if "defect" in shapes[Law.NORM].rows else "forced"
    kept = {side: component(OFFSET), "flow": component(OFFSET_FLOW)}
    propagators = propagators_of(source, Law.NORM)
    crossing = split(propagators, (x0, y0), 2.0 * budget.numpy(), kept)
    still = split(propagators, (one, nothing), one, {"defect": nothing})
    still[_FLOW_FORCED] = 1.0 - still[_FLOW_FREE]
    before = np.zeros((len(still), translations.shape[1]))
    return np.concatenate([before, crossing], axis=1), np.concatenate([before, still], axis=1)
