"""Gallery figures in the plane of two parameters: fields, manifolds, modified.

The files of noetherperf.figures that compute the data describe its arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from noetherperf.plots.style import BLUE, FLOW, GREEN, MUTED, RED, SAND, WIDTH, styled

__all__ = ["fields", "manifolds", "modified"]

Data = Mapping[str, NDArray[Any]]

COMPONENTS = {
    "translation": "translation\ntwo logits, softmax",
    "scale": "scale\na normalised weight",
    "rescale": "rescale\nweights into and out of a unit",
}
CHARGE = {
    "translation": r"$\theta_1 + \theta_2$",
    "scale": r"$\theta_1^2 + \theta_2^2$",
    "rescale": r"$\theta_1^2 - \theta_2^2$",
}
MOTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "noise": ("noise", {"color": "0.55", "linewidth": 0.9, "zorder": 3}),
    "steps": (
        "finite steps",
        {"color": RED, "linewidth": 0.8, "marker": "o", "markersize": 2.6, "linestyle": "-", "zorder": 4},
    ),
    "momentum": ("momentum", {"color": GREEN, "linewidth": 1.3, "linestyle": (0, (5, 1.5, 1, 1.5)), "zorder": 3}),
    "decay": ("weight decay", {"color": SAND, "linewidth": 1.5, "linestyle": (0, (5, 1.5)), "zorder": 3}),
    "flow": ("gradient flow", {"color": BLUE, "linewidth": 3.4, "linestyle": "-", "alpha": 0.55, "zorder": 2}),
}
ARROWS: tuple[tuple[str, float, dict[str, Any]], ...] = (  # of the fields
    ("generator", 1.0, {"facecolor": "white", "edgecolor": RED, "linewidth": 0.8}),
    ("gradient", -1.0, {"facecolor": BLUE, "edgecolor": BLUE, "linewidth": 0.3}),
)
LAW = FLOW | {"zorder": 6}
MODELS: dict[str, dict[str, Any]] = {
    "gradient flow": {"color": SAND, "linestyle": (0, (5, 1.5)), "marker": "s", "markersize": 6.5},
    "modified loss": {"color": RED, "linestyle": (0, (5, 1.5, 1, 1.5)), "marker": "^", "markersize": 4},
    "modified flow": {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4},
}


@styled
def fields(data: Data) -> Figure:
    """Descent directions and generators over the loss, one panel for each symmetry."""
    figure = Figure(figsize=(WIDTH, 2.95), layout="constrained")
    for axes, (kind, title) in zip(figure.subplots(1, 3), COMPONENTS.items(), strict=True):
        _landscape(axes, data[f"{kind}/axis"], data[f"{kind}/loss"])
        points = data[f"{kind}/points"]
        inside = np.linalg.norm(points, axis=1) > 0.3  # near the origin a normalised weight has no direction
        for name, sign, look in ARROWS:
            vectors = sign * data[f"{kind}/{name}"][inside]
            unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
            axes.quiver(*points[inside].T, *unit.T, **look, pivot="tail", angles="xy", scale_units="xy", scale=3.1,
                        width=0.0085, headwidth=4.2, headlength=4.6, headaxislength=4.6, zorder=3)  # fmt: skip
        axes.set_title(title)
        _plane(axes)
    lines = [
        Line2D([], [], color=BLUE, marker=">", markersize=5, label="downhill, $-g$: filled"),
        Line2D([], [], color=RED, marker=">", markersize=5, markerfacecolor="white", label=r"generator $\psi$: open"),
        Line2D([], [], color="0.6", linewidth=0.6, label="equal loss"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3)
    return figure


@styled
def manifolds(data: Data) -> Figure:
    """Paths in the plane (top) and the charge along them (bottom)."""
    figure = Figure(figsize=(WIDTH, 4.7), layout="constrained")
    above, below = figure.subplots(2, 3, height_ratios=(1.55, 1.0))
    for plane, over_time, (kind, title) in zip(above, below, COMPONENTS.items(), strict=True):
        paths = {motion: data[f"{kind}/{motion}/path"] for motion in MOTIONS}
        _frame(plane, np.concatenate(list(paths.values())))
        _manifold(plane, kind, data[f"{kind}/flow/charge"][0])
        for motion, (_, look) in MOTIONS.items():
            plane.plot(*paths[motion].T, **look)
            time, charge = data[f"{kind}/{motion}/time"], data[f"{kind}/{motion}/charge"]
            over_time.plot(time, charge, **look)
        over_time.plot(data[f"{kind}/steps/time"], data[f"{kind}/steps/law"], **LAW)
        plane.plot(*paths["flow"][0], marker="o", color="black", markerfacecolor="none", markersize=7, zorder=6)
        plane.plot(*paths["flow"][-1], marker="*", color="black", markerfacecolor="none", markersize=11, zorder=6)
        plane.set_title(title)
        _plane(plane)
        over_time.set_xlabel("time η·steps")
        over_time.set_ylabel(CHARGE[kind])
        over_time.margins(x=0.02)
        low, high = over_time.get_ylim()
        if high - low < 0.5:
            over_time.set_ylim(low - 0.25, high + 0.25)
    lines = [Line2D([], [], **look, label=label) for label, look in reversed(MOTIONS.values())]
    lines.append(Line2D([], [], **LAW, label="discrete law of the steps"))
    figure.legend(handles=lines, loc="outside lower center", ncols=6, handlelength=2.0, columnspacing=1.2)
    return figure


@styled
def modified(data: Data) -> Figure:
    """Paths of the steps and of three models, without and with momentum; the models' errors over learning rate."""
    figure = Figure(figsize=(WIDTH, 2.95), layout="constrained")
    plain, momentum, orders = figure.subplots(1, 3)
    titles = {"plain": "without momentum\nη = 0.48", "momentum": "with momentum\nη = 0.1, β = 0.8"}
    for axes, name in ((plain, "plain"), (momentum, "momentum")):
        _landscape(axes, data["axis"], data["loss"])
        for model, look in MODELS.items():
            axes.plot(*data[f"{name}/{model}"].T, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
        axes.plot(*data[f"{name}/steps"].T, "o", color="black", markersize=2.4, zorder=5)
        axes.set_title(titles[name])
        _plane(axes)
        hidden = 0 if name == "momentum" else 1  # the first plain step is long and the same in all models
        paths = [data[f"{name}/steps"][hidden:], *(data[f"{name}/{model}"][8 * hidden :] for model in MODELS)]
        _frame(axes, np.concatenate(paths))
    for name, filled in (("plain", True), ("momentum", False)):
        for model, look in MODELS.items():
            axes = orders
            axes.loglog(data[f"{name}/lr"], data[f"{name}/{model}/error"], linewidth=1.0,
                        markerfacecolor=look["color"] if filled else "white", **look)  # fmt: skip
    lr = data["plain/lr"]
    for power, model in ((1, "gradient flow"), (2, "modified loss")):
        at = data[f"plain/{model}/error"][0] * (lr / lr[0]) ** power
        side = 0.3 if power == 1 else 0.35
        orders.plot(lr, side * at, color="0.6", linewidth=0.7)
        orders.annotate(f"$\\propto\\eta^{power}$", (lr[1], side * at[1]), xytext=(3, -9), textcoords="offset points",
                        color=MUTED, fontsize=7)  # fmt: skip
    orders.set_xticks([0.003, 0.01, 0.03], ["0.003", "0.01", "0.03"])
    orders.minorticks_off()
    orders.set_title("distance from the steps\nfilled: β = 0, open: β = 0.4")
    orders.set_xlabel("learning rate η")
    orders.set_ylabel(r"largest distance $|\theta - \theta_k|$")
    lines = [Line2D([], [], linestyle="", marker="o", markersize=3, color="black", label="steps")]
    lines += [
        Line2D([], [], color=look["color"], linestyle=look["linestyle"], label=model) for model, look in MODELS.items()
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    return figure


def _landscape(axes: Axes, axis: NDArray[np.float64], loss: NDArray[np.float64]) -> None:
    """Contour lines of the loss at equidistant quantiles."""
    levels = np.unique(np.quantile(loss, np.linspace(0.02, 0.97, 12)))
    axes.contour(axis, axis, loss, levels, colors="0.72", linewidths=0.6)


def _manifold(axes: Axes, kind: str, charge: float) -> None:
    """The line, circle or hyperbola on which the charge is constant."""
    (x_low, x_high), (y_low, y_high) = axes.get_xlim(), axes.get_ylim()
    x, y = np.meshgrid(np.linspace(x_low, x_high, 300), np.linspace(y_low, y_high, 300))
    value = {"translation": x + y, "scale": x * x + y * y, "rescale": x * x - y * y}[kind]
    axes.contour(x, y, value, [charge], colors="0.8", linewidths=4.0, zorder=1)


def _frame(axes: Axes, points: NDArray[np.float64]) -> None:
    """Square axis limits around all points, with a margin."""
    low, high = points.min(0), points.max(0)
    middle, half = (low + high) / 2.0, 0.58 * (high - low).max()
    axes.set_xlim(middle[0] - half, middle[0] + half)
    axes.set_ylim(middle[1] - half, middle[1] + half)


def _plane(axes: Axes) -> None:
    axes.set_aspect("equal")
    axes.set_xlabel(r"$\theta_1$")
    axes.set_ylabel(r"$\theta_2$", labelpad=1)
    axes.locator_params(nbins=5)
