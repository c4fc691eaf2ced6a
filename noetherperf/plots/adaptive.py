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
    KIND_LINES,
    RED,
    SAND,
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
RULE_COLORS = (BLUE, RED, GREEN, SAND)  # of the settings of `equilibrium`
SCHEDULES = {
    "constant": (r"constant $\lambda$: decay $\propto\eta$ (torch)", RED),
    "proportional": (r"$\lambda\propto\eta$: decay $\propto\eta^2$", BLUE),
}
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))


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
        *(Line2D([], [], **look, label=kind) for kind, look in KIND_LINES.items()),
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


def _share(data: Data, rule: str, kind: str) -> NDArray[np.float64]:
    charge, law = data[f"{rule}/{kind}/charge"], data[f"{rule}/{kind}/law"]
    share: NDArray[np.float64] = np.abs(charge - law)[1:] / np.abs(charge - charge[0])[1:]
    return share


def _missed(axes: Axes, data: Data) -> None:
    for rule in ("SGD", "AdamW"):
        for kind, look in KIND_LINES.items():
            axes.plot(data[f"{rule}/steps"][1:], np.median(_share(data, rule, kind), axis=1), linewidth=1.1, **look)
    axes.set_yscale("log")
    axes.set_ylim(1e-17, 1e2)
    axes.set_title("share missed by the law")
    axes.set_ylabel("|charge − law| / |change|")
    for rule, height in (("AdamW", 0.75), ("SGD", 0.42)):
        axes.text(0.97, height, f"{rule}, medians", transform=axes.transAxes, ha="right", color="0.25", fontsize=7)
    label_steps(axes)


def _units(axes: Axes, data: Data) -> None:
    """The distribution of the share over groups, at the end."""
    for kind, look in KIND_LINES.items():
        share = np.sort(_share(data, "AdamW", kind)[-1])
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
    above, below = figure.subfigures(2, 1)
    above.get_layout_engine()
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
    for index, color in enumerate(RULE_COLORS):
        steps, angle = data[f"{index}/steps"][1:], data[f"{index}/angle"][1:]
        smooth = np.stack([_running_rms(column) for column in angle.T], 1)
        share = steps / steps[-1]
        axes.plot(share, np.median(smooth, 1), color=color, linewidth=1.3)
        axes.axhline(data[f"{index}/predicted_angle"], **FLOW, zorder=5)
        rule, beta = str(data[f"{index}/rule"]), float(data[f"{index}/momentum"])
        axes.annotate(f"{rule} {beta:g}", (0.99, float(data[f"{index}/predicted_angle"])), xytext=(0, 3),
                      textcoords="offset points", ha="right", fontsize=6.5, color=color)  # fmt: skip
    axes.set_yscale("log")
    axes.set_title(f"angle of a step, median neuron\nrms of {AVERAGED} rows")
    axes.set_ylabel("rad per step")
    axes.set_xlabel("share of the run")


def _late(axes: Axes, data: Data) -> None:
    steps, predicted = data["3/steps"], data["3/predicted_norm"].mean()
    norm, free, defect = (data[f"3/{name}"].mean(1) / predicted for name in ("norm", "free", "defect"))
    axes.plot(steps, norm, color=BLUE, linewidth=1.8, label="measured")
    axes.plot(steps, free, color="0.6", linestyle=(0, (5, 1.5)), linewidth=1.4, label="left of the start")
    axes.plot(steps, norm - free - defect, color=SAND, linewidth=1.4, label="forced")
    axes.plot(steps, defect, color=RED, linewidth=1.0, label="defect")
    axes.axhline(1.0, **FLOW, zorder=5)
    axes.set_ylim(-0.3, 4.0)
    axes.set_title(f"AdamW, η = {data['3/lr']:g}: from usual weights\nequilibrium takes its time")
    axes.set_ylabel(r"layer mean of $|\theta|^2$ / predicted")
    axes.legend(loc="upper right", fontsize=6.5)
    label_steps(axes)


def _off(axes: Axes, data: Data) -> None:
    drawn = []
    for index in range(1, 4):
        late = slice(round(0.6 * len(data[f"{index}/steps"])), None)
        norm, free, defect = (data[f"{index}/{name}"][late].mean(0) for name in ("norm", "free", "defect"))
        predicted = data[f"{index}/predicted_norm"]
        told, off = 100.0 * defect / predicted, 100.0 * ((norm - free) / predicted - 1.0)
        axes.scatter(
            told, off, s=9, color=RULE_COLORS[index], linewidths=0, label=f"AdamW {data[f'{index}/momentum']:g}"
        )
        drawn += [told, off]
    ends = [np.concatenate(drawn).min(), np.concatenate(drawn).max()]
    axes.plot(ends, ends, **FLOW)
    axes.set_title("what is off is the defect\nevery neuron")
    axes.set_xlabel("measured defect / predicted, %")
    axes.set_ylabel(r"$|\theta|^2$ over predicted, %")
    axes.legend(loc="upper left", fontsize=6.5, handletextpad=0.1)


def _running_rms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square over AVERAGED rows around each row; fewer at both ends."""
    ones = np.ones(AVERAGED)
    total = np.convolve(values**2, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    rms: NDArray[np.float64] = np.sqrt(total)
    return rms


@styled
def decay(data: Data) -> Figure:
    """Left, what balances decay in each layer; then norms under two schedules of decay, normalised layers and others."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    balance, *courses = figure.subplots(1, 3)
    layers, normalised = data["layers"].tolist(), data["normalised"].astype(bool)
    late = slice(round(0.6 * len(data["steps"])), None)
    share = data["defect"][late].mean(0) / (data["norm"] - data["free"])[late].mean(0)
    places = np.arange(len(layers))[::-1]
    balance.barh(places, 100.0 * (1.0 - share), color=BLUE, height=0.35, align="edge", label="growth by the law")
    balance.barh(places, 100.0 * share, color=SAND, height=-0.35, align="edge", label="the rest: defect")
    balance.set_yticks(places, layers)
    balance.axvline(0.0, color="0.6", linewidth=0.6)
    balance.set_title("what balances weight decay\nconv1, conv2: normalised")
    balance.set_xlabel("share, %")
    balance.set_ylabel("layer")
    balance.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7)
    for axes, chosen, title in zip(
        courses, (normalised, ~normalised), ("normalised layers", "other layers"), strict=True
    ):
        for schedule, (_, color) in SCHEDULES.items():
            norm = data[f"{schedule}/norm"][:, chosen]
            for column, name, dashes in zip(norm.T, np.array(layers)[chosen], DASHES, strict=False):
                axes.plot(data[f"{schedule}/steps"], column / column[0], color=color, linestyle=dashes, linewidth=1.4)
        axes.axhline(1.0, **FLOW)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 0.7, 1.0, 1.5]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{title}\n$\\eta$ falls to {data['lowest']:.0%}".replace("%", r"%"))
        axes.set_ylabel(r"$|\theta|^2$ / that before")
        handles = [Line2D([], [], color="0.3", linestyle=dashes, label=name)
                   for name, dashes in zip(np.array(layers)[chosen], DASHES, strict=False)]  # fmt: skip
        axes.legend(handles=handles, loc="best", fontsize=7)
        label_steps(axes)
    lines = [Line2D([], [], color=color, label=label) for label, color in SCHEDULES.values()]
    figure.legend(handles=lines, loc="outside lower right", ncols=2)
    return figure
