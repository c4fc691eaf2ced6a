"""Gallery figures of AdamW: adamw, equilibrium, decay.

The files of noetherperf.figures that compute the data describe its arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from noetherperf.plots.style import (
    BLUE,
    FLOW,
    GREEN,
    RED,
    SAND,
    SYMMETRY_LINES,
    WIDTH,
    colors,
    label_steps,
    styled,
)

__all__ = ["adamw", "decay", "equilibrium"]

Data = Mapping[str, NDArray[Any]]

N_SHOWN = 8  # groups of a symmetry
AVERAGED = 25  # rows of the running mean over a noisy curve
LABELS = {
    "translation": r"column sum $\langle\theta_A, 1\rangle$",
    "scale": r"$|\theta_A|^2$",
    "rescale": r"$|\theta_\mathrm{in}|^2 - |\theta_\mathrm{out}|^2$",
}
MEASURED: dict[str, Any] = {"linewidth": 1.6}
RULES: tuple[dict[str, Any], ...] = (  # the settings of `equilibrium`
    {"color": BLUE, "linestyle": "-"},
    {"color": RED, "linestyle": (0, (5, 1.5))},
    {"color": GREEN, "linestyle": (0, (5, 1.5, 1, 1.5))},
    {"color": SAND, "linestyle": (0, (2.5, 1))},
)
RULE_MARKERS = ("o", "s", "^", "D")
SCHEDULES = {
    "constant": (r"constant $\lambda$: decay $\propto\eta$ (torch)", RED),
    "proportional": (r"$\lambda\propto\eta$: decay $\propto\eta^2$", BLUE),
}
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))


@styled
def adamw(data: Data) -> Figure:
    """Charges under SGD (top) and AdamW (bottom), laws dotted; right, what the laws miss."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(2, 4)
    for row, rule in zip(panels, ("SGD", "AdamW"), strict=True):
        for axes, kind in zip(row, LABELS, strict=False):
            _charges(axes, data, rule, kind)
    _missed(panels[0, 3], data)
    _units(panels[1, 3], data)
    lines = [
        Line2D([], [], color=colors(3)[1], **MEASURED, label="measured"),
        Line2D([], [], **FLOW, label="discrete law"),
        *(Line2D([], [], **look, label=kind) for kind, look in SYMMETRY_LINES.items()),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=5)
    return figure


def _charges(axes: Axes, data: Data, rule: str, kind: str) -> None:
    """Some groups' charges, evenly spaced among the initial ones, and their law."""
    steps, charge, law = data[f"{rule}/steps"], data[f"{rule}/{kind}/charge"], data[f"{rule}/{kind}/law"]
    order = np.argsort(charge[0])
    shown = order[np.linspace(0, len(order) - 1, min(N_SHOWN, len(order))).round().astype(int)]
    for index, color in zip(shown, colors(len(shown)), strict=True):
        axes.plot(steps, charge[:, index], color=color, **MEASURED)
    axes.plot(steps, law[:, shown], **FLOW)
    axes.set_title(f"{rule}: {kind}")
    axes.set_ylabel(LABELS[kind])
    label_steps(axes)


def _missed(axes: Axes, data: Data) -> None:
    for rule in ("SGD", "AdamW"):
        for kind, look in SYMMETRY_LINES.items():
            axes.plot(
                data[f"{rule}/steps"][1:], np.median(data[f"{rule}/{kind}/missed"][1:], axis=1), linewidth=1.1, **look
            )
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 1e2)
    axes.set_title("missed by the law")
    axes.set_ylabel("|charge − law| / |change|")
    for rule, height in (("AdamW", 0.72), ("SGD", 0.28)):
        axes.text(0.97, height, f"{rule}, medians", transform=axes.transAxes, ha="right", color="0.25", fontsize=7)
    label_steps(axes)


def _units(axes: Axes, data: Data) -> None:
    """The distribution of the share over groups, at the end."""
    for kind, look in SYMMETRY_LINES.items():
        share = np.sort(data[f"AdamW/{kind}/missed"][-1])
        axes.step(share, np.arange(1, len(share) + 1) / len(share), where="post", linewidth=1.3, **look)
    axes.set_xscale("log")
    axes.set_xlim(3e-3, 10.0)
    axes.set_title("AdamW, unit by unit")
    axes.set_xlabel("share missed, at the end")
    axes.set_ylabel("share of units below")


@styled
def equilibrium(data: Data) -> Figure:
    """Norms of all neurons over the predicted ones (top); angles, a start that is not forgotten, and the defect."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    for index, axes in enumerate(above.subplots(1, 4, sharey=True)):
        _norms(axes, data, index)
        if not index:
            axes.set_ylabel(r"$|\theta|^2$ / predicted")
    angles, late, off = below.subplots(1, 3)
    _angles(angles, data)
    _late(late, data)
    _off(off, data)
    return figure


def _norms(axes: Axes, data: Data, index: int) -> None:
    steps, norm = data[f"{index}/steps"], data[f"{index}/norm"] / data[f"{index}/predicted_norm"]
    order = np.argsort(norm[0])
    for column, color in zip(norm[:, order].T, colors(norm.shape[1]), strict=True):
        axes.plot(steps, column, color=color, linewidth=0.8)
    axes.axhline(1.0, **FLOW, zorder=5)
    axes.set_yscale("log")
    axes.set_title(_setting(data, index))
    label_steps(axes)


def _setting(data: Data, index: int) -> str:
    rule, lr, beta, decay = (data[f"{index}/{name}"] for name in ("rule", "lr", "momentum", "weight_decay"))
    momentum = r"\beta" if rule == "SGD" else r"\beta_1"
    return rf"{rule}, $\eta$ = {lr:g}" + "\n" + rf"${momentum}$ = {beta:g}, $\lambda$ = {decay:g}"


def _angles(axes: Axes, data: Data) -> None:
    for index, look in enumerate(RULES):
        steps, angle = data[f"{index}/steps"][1:], data[f"{index}/angle"][1:]
        smooth = np.stack([_running_rms(column) for column in angle.T], 1)
        rule, beta = str(data[f"{index}/rule"]), float(data[f"{index}/momentum"])
        axes.plot(steps / steps[-1], np.median(smooth, 1), **look, linewidth=1.3, label=f"{rule} {beta:g}")
        axes.axhline(float(data[f"{index}/predicted_angle"]), **FLOW, zorder=5)
    _log_ticks(axes, [0.002, 0.005, 0.01, 0.02, 0.05])
    axes.set_ylim(1.5e-3, 0.5)
    axes.legend(loc="upper center", ncols=2, fontsize=6.5, columnspacing=1.0)
    axes.set_title(f"angle of a step, median neuron\nrms of {AVERAGED} rows")
    axes.set_ylabel("rad per step")
    axes.set_xlabel("share of the run")


def _log_ticks(axes: Axes, ticks: list[float]) -> None:
    """A logarithmic y-axis with plain numbers at these values."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _late(axes: Axes, data: Data) -> None:
    steps, predicted = data["3/steps"], data["3/predicted_norm"].mean()
    norm, free, defect = (data[f"3/{name}"].mean(1) / predicted for name in ("norm", "free", "defect"))
    axes.plot(steps, norm, color=BLUE, linewidth=1.8, label="measured")
    axes.plot(steps, free, color="0.6", linestyle=(0, (5, 1.5)), linewidth=1.4, label="left of the start")
    axes.plot(steps, norm - free - defect, color=SAND, linestyle=(0, (2.5, 1)), linewidth=1.6, label="forced")
    axes.plot(steps, defect, color=RED, linewidth=1.0, label="defect")
    axes.axhline(1.0, **FLOW, zorder=5)
    axes.set_ylim(-0.3, 6.0)
    axes.set_title("AdamW 0.95, usual start,\nwhich is not forgotten yet")
    axes.set_ylabel(r"layer mean of $|\theta|^2$ / predicted")
    axes.legend(loc="upper right", fontsize=6.5)
    label_steps(axes)


def _off(axes: Axes, data: Data) -> None:
    drawn = []
    for index in range(1, 4):
        told, off = (100.0 * data[f"{index}/{name}"] for name in ("told", "off"))
        look = {"color": RULES[index]["color"], "marker": RULE_MARKERS[index], "linewidths": 0}
        axes.scatter(told, off, s=11, **look, label=f"AdamW {data[f'{index}/momentum']:g}")
        drawn += [told, off]
    ends = [np.concatenate(drawn).min(), np.concatenate(drawn).max()]
    axes.plot(ends, ends, **FLOW)
    axes.set_title("what is off is the defect\nevery neuron")
    axes.set_xlabel("measured defect / predicted, %")
    axes.set_ylabel(r"$|\theta|^2$ above predicted, %")
    axes.legend(loc="upper left", fontsize=6.5, handletextpad=0.1)


def _running_rms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square over AVERAGED rows around each row; fewer at both ends."""
    ones = np.ones(AVERAGED)
    total = np.convolve(values**2, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    rms: NDArray[np.float64] = np.sqrt(total)
    return rms


@styled
def decay(data: Data) -> Figure:
    """Left, what balances decay in each layer; then norms under two schedules of it, normalised layers and others."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    balance, *courses = figure.subplots(1, 3)
    layers, normalised, share = data["layers"].tolist(), data["normalised"].astype(bool), data["share"]
    places = np.arange(len(layers))[::-1]
    balance.barh(places, 100.0 * (1.0 - share), color=BLUE, height=0.35, align="edge", label="growth by the law")
    balance.barh(places, 100.0 * share, color=SAND, height=-0.35, align="edge", label="the rest: defect")
    balance.set_yticks(places, layers)
    balance.axvline(0.0, color="0.6", linewidth=0.6)
    balance.set_title("what balances weight decay\nconv1, conv2: normalised")
    balance.set_xlabel("share, %")
    balance.set_ylabel("layer")
    for axes, chosen, title in zip(courses, (normalised, ~normalised), ("normalised", "other"), strict=True):
        looks = dict(zip(np.flatnonzero(chosen).tolist(), DASHES, strict=False))
        for schedule, (_, color) in SCHEDULES.items():
            norm = data[f"{schedule}/norm"]
            for layer, dashes in looks.items():
                curve = norm[:, layer] / norm[0, layer]
                axes.plot(data[f"{schedule}/steps"], curve, color=color, linestyle=dashes, linewidth=1.4)
        axes.axhline(1.0, **FLOW)
        _log_ticks(axes, [0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6])
        axes.set_title(f"norms of {title} layers\nwhile η falls to {100 * data['lowest']:g} %")
        axes.set_ylabel(r"$|\theta|^2$ / $|\theta|^2$ before")
        handles = [Line2D([], [], color="0.3", linestyle=look, label=layers[layer]) for layer, look in looks.items()]
        axes.legend(handles=handles, loc="best", fontsize=7)
        label_steps(axes)
    bars, labels = balance.get_legend_handles_labels()
    lines = [Line2D([], [], color=color) for _, color in SCHEDULES.values()]
    labels += [label for label, _ in SCHEDULES.values()]
    figure.legend([*bars, *lines], labels, loc="outside lower center", ncols=4, columnspacing=1.2)
    return figure
