"""Gallery figures of training runs: neurons, noise, dynamics, oscillation, errors, budget.

The files of noetherperf.figures that compute the data describe its arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from noetherperf.plots.style import (
    BLUE,
    FLOW,
    GREEN,
    MUTED,
    RED,
    SAND,
    SYMMETRY_LINES,
    WIDTH,
    colors,
    label_steps,
    log_axis,
    styled,
)

__all__ = ["budget", "dynamics", "errors", "neurons", "noise", "oscillation"]

Data = Mapping[str, NDArray[Any]]

MEASURED: dict[str, Any] = {"linewidth": 1.8}
TERMS: dict[str, tuple[str, dict[str, Any]]] = {  # of a norm's budget
    "norm": ("measured", {"color": BLUE, "linewidth": 1.8}),
    "free": ("left by decay", {"color": "0.6", "linewidth": 1.4, "linestyle": (0, (5, 1.5))}),
    "forced": ("grown by finite steps", {"color": SAND, "linewidth": 1.6, "linestyle": (0, (2.5, 1))}),
    "defect": ("defect", {"color": RED, "linewidth": 1.0}),
    "rounding": ("rounding", {"color": GREEN, "linewidth": 0.8, "linestyle": (0, (5, 1.5, 1, 1.5))}),
}
PERIODS = {
    "frequency": "period by the flow law",
    "discrete_frequency": "by the discrete law",
    "measured": "measured",
}
ERROR_MARKERS: dict[str, dict[str, Any]] = {
    "flow": {"marker": "o"},
    "modified": {"marker": "o", "markerfacecolor": "white"},
    "discrete": {"marker": "s"},
}
AVERAGED = 25  # rows of the running mean over a noisy curve


@styled
def neurons(data: Data) -> Figure:
    """Single weights of the last layer (left) and the sums of their columns (right), in the same colours."""
    figure = Figure(figsize=(WIDTH * 0.8, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = data["steps"]
    order = np.argsort(data["charges"][0])
    for index, color in zip(order, colors(len(order)), strict=True):
        left.plot(steps, data["parameters"][:, index], color=color, linewidth=0.7)
        right.plot(steps, data["charges"][:, index], color=color, **MEASURED)
    for index in order:
        right.plot(steps, data["modified"][:, index], **FLOW)
    left.set_title("parameters\none weight of each of ten columns")
    left.set_ylabel(r"$\theta_i$")
    right.set_title("neurons\nthe sums of these columns")
    right.set_ylabel(r"column sum $\langle\theta_A, 1\rangle$")
    for axes in (left, right):
        label_steps(axes)
    _explain(figure, "modified flow law")
    return figure


@styled
def noise(data: Data) -> Figure:
    """Growth of a norm under four batch sizes, without and with momentum; and the growth at the end over batch size."""
    figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
    *over_time, at_end = figure.subplots(1, 3)
    markers: tuple[dict[str, Any], ...] = (
        {"marker": "o", "markersize": 4},
        {"marker": "s", "markersize": 8, "fillstyle": "none"},
    )
    for axes, name, marker in zip(over_time, ("plain", "momentum"), markers, strict=True):
        growth, predicted, batches = (data[f"{name}/{key}"] for key in ("growth", "noise", "batch"))
        beta, steps = data[f"{name}/momentum"], data[f"{name}/steps"]
        for column, batch, color in zip(growth.T, batches, colors(len(batches)), strict=True):
            axes.plot(steps, column, color=color, **MEASURED)
            axes.annotate(f"S = {batch:g}", (steps[-1], column[-1]), xytext=(-2, 3), textcoords="offset points",
                          ha="right", va="bottom", color=MUTED, fontsize=7)  # fmt: skip
            at_end.plot(batch, column[-1], color=color, linestyle="", **marker)
        axes.plot(steps, predicted, **FLOW)
        axes.set_title(f"β = {beta:g}\nη = {data[f'{name}/lr']:g}")
        axes.set_ylabel(r"growth of $|\theta|^2$, of its start")
        log_axis(axes, [growth[1:]])
        label_steps(axes)
        at_end.plot(batches, predicted[-1], **FLOW)
    at_end.set_xscale("log")
    at_end.set_xticks(data["plain/batch"], [f"{batch:g}" for batch in data["plain/batch"]])
    at_end.minorticks_off()
    log_axis(at_end, [data["plain/growth"][-1], data["momentum/growth"][-1]])
    at_end.set_title("growth at the end\nround: β = 0, square: β = 0.9")
    at_end.set_xlabel("batch size S")
    at_end.set_ylabel(r"growth of $|\theta|^2$, of its start")
    _explain(figure, r"$\int (T/S)\,\mathrm{tr}\,GG^{\mathsf{T}}/(1-\beta)^2\,dt$")
    return figure


@styled
def dynamics(data: Data) -> Figure:
    """Charges of both networks, coloured by the layer's depth or the column; and the errors of the laws."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    above, below = figure.subplots(2, 3)
    labels = {
        "translation": ("translation", r"column sum $\langle\theta_A, 1\rangle$"),
        "scale": ("scale", r"layer mean of $|\theta_A|^2$"),
        "rescale": ("rescale", r"layer mean of $|\theta_\mathrm{in}|^2 - |\theta_\mathrm{out}|^2$"),
    }
    panels = {
        ("bn", "translation"): above[0],
        ("bn", "scale"): above[1],
        ("bn", "rescale"): above[2],
        ("plain", "translation"): below[0],
        ("plain", "rescale"): below[1],
    }
    names = {"bn": "with BatchNorm", "plain": "without BatchNorm"}
    for (network, kind), axes in panels.items():
        stem, steps = f"{network}/{kind}", data[f"{network}/steps"]
        charge, modified = data[f"{stem}/charge"], data[f"{stem}/modified"]
        for column, color in zip(charge.T, colors(charge.shape[1]), strict=True):
            axes.plot(steps, column, color=color, **MEASURED)
        axes.plot(steps, modified, **FLOW)
        what, label = labels[kind]
        some = "columns of the last layer" if kind == "translation" else "layers, dark: first"
        axes.set_title(f"{what}, {names[network]}\n{charge.shape[1]} {some}")
        axes.set_ylabel(label)
        label_steps(axes)
    _errors_over_time(below[2], data)
    _explain(figure, "modified flow law")
    return figure


def _errors_over_time(axes: Axes, data: Data) -> None:
    drawn = []
    for network, faded in (("bn", 1.0), ("plain", 0.55)):
        for kind, look in SYMMETRY_LINES.items():
            for law in ("modified", "budget"):
                key = f"{network}/{kind}/{law}_error"
                if key in data:
                    axes.plot(data[f"{network}/steps"], data[key], alpha=faded, linewidth=1.1, **look)
                    drawn.append(data[key][1:])
    log_axis(axes, drawn)
    axes.set_title("error of the worst group\nfaint: without BatchNorm")
    axes.set_ylabel("error / largest initial charge")
    label_steps(axes)
    for law, height in (("modified flow law", 0.96), ("discrete law with defect", 0.06)):
        axes.text(0.98, height, law, transform=axes.transAxes, ha="right", va="center", color="0.25", fontsize=7)
    lines = [Line2D([], [], linewidth=1.1, **look, label=kind) for kind, look in SYMMETRY_LINES.items()]
    axes.legend(handles=lines, loc="upper right", bbox_to_anchor=(1.0, 0.95), fontsize=7, labelspacing=0.25)
    axes.set_ylim(top=30.0)


@styled
def oscillation(data: Data) -> Figure:
    """Column sums under four settings of momentum and decay; the modified flow law is dotted."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    for index, axes in enumerate(figure.subplots(2, 2).flat):
        get = {name: data[f"{index}/{name}"] for name in ("steps", "charge", "modified", "lr", "gamma", "omega")}
        steps, charge = get["steps"], get["charge"]
        for column, color in zip(charge.T, colors(charge.shape[1]), strict=True):
            axes.plot(steps, column, color=color, **MEASURED)
        axes.plot(steps, get["modified"], **FLOW)
        axes.axhline(0.0, color="0.75", linewidth=0.6, zorder=0)
        lr = get["lr"]
        beta, decay = data[f"{index}/momentum"], data[f"{index}/weight_decay"]
        axes.set_title(f"{data[f'{index}/regime']}\nη = {lr:g}, β = {beta:g}, λ = {decay:.3g}")
        note = f"γ = {get['gamma'] * lr:.4f} per step, ω = {get['omega'] * lr:.4f} rad per step"
        if np.isfinite(data[f"{index}/measured"]):
            note += "".join(f"\n{name} {2 * np.pi / data[f'{index}/{key}']:.1f} steps" for key, name in PERIODS.items())
        axes.text(0.98, 0.97, note, transform=axes.transAxes, ha="right", va="top", color="0.25", fontsize=7)
        axes.set_ylabel(r"column sum $\langle\theta_A, 1\rangle$")
        axes.set_ylim(top=1.6 * charge.max())  # room for the note
        label_steps(axes)
    _explain(figure, "modified flow law")
    return figure


@styled
def errors(data: Data) -> Figure:
    """Errors over learning rate, batch size and momentum: the flow laws' slopes, the discrete law's floor."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    sweeps = {
        "lr_plain": ("learning rate η\nβ = 0", "learning rate η"),
        "lr": ("learning rate η\nβ = 0.9", "learning rate η"),
        "batch": ("batch size\nβ = 0.9, η = 0.05", "images in a batch"),
        "momentum": ("momentum\nη = 0.05", "momentum β"),
    }
    drawn = []
    for axes, (sweep, (title, label)) in zip(panels, sweeps.items(), strict=True):
        values = data[f"{sweep}/values"]
        for kind, look in SYMMETRY_LINES.items():
            for law, marker in ERROR_MARKERS.items():
                error = np.maximum(data[f"{sweep}/{kind}/{law}"], 1e-17)
                axes.plot(values, error, markersize=3, **marker, **look)
                drawn.append(error)
        if sweep != "momentum":
            axes.set_xscale("log")
            axes.set_xticks(values[::2], [f"{value:g}" for value in values[::2]])
            axes.minorticks_off()
        if sweep.startswith("lr"):
            for law, power, text in (("flow", 1, r"$\propto\eta$"), ("modified", 2, r"$\propto\eta^2$")):
                last = data[f"{sweep}/translation/{law}"][-1]
                guide = 0.3 * last * (values / values[-1]) ** power
                axes.plot(values, guide, color="0.6", linewidth=0.8)
                axes.annotate(text, (values[-1], guide[-1]), xytext=(2, -9), textcoords="offset points",
                              color=MUTED, fontsize=7.5)  # fmt: skip
        axes.axhline(np.finfo(np.float64).eps, color="0.7", linewidth=0.8, zorder=0)
        axes.set_title(title)
        axes.set_xlabel(label)
    log_axis(panels[0], drawn)
    panels[0].set_ylim(bottom=1e-17)
    panels[0].set_ylabel("relative error at η·steps = 1.5")
    panels[3].annotate("float64 ε", (1, np.finfo(np.float64).eps), xycoords=("axes fraction", "data"), color=MUTED,
                       fontsize=6.5, xytext=(0, -8), textcoords="offset points", ha="right")  # fmt: skip
    lines = [Line2D([], [], **look, label=kind) for kind, look in SYMMETRY_LINES.items()]
    lines += [
        Line2D([], [], **ERROR_MARKERS[law], color="0.3", linestyle="", markersize=4, label=label)
        for law, label in (("flow", "flow law"), ("modified", "modified flow law"), ("discrete", "discrete law"))
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=6)
    return figure


@styled
def budget(data: Data) -> Figure:
    """Top: the terms of three layers' norms and their rounding. Bottom: relative errors and rates of all layers."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    above, below = figure.subplots(2, 3)
    steps, norm, layers = data["steps"], data["norm"], data["layers"]
    for axes, layer in zip(above, (0, len(layers) // 2, len(layers) - 1), strict=True):
        start = norm[0, layer]
        for quantity, (_, look) in TERMS.items():
            axes.plot(steps, np.abs(data[quantity][:, layer]) / start, **look)
        axes.plot(steps, (data["free"] + data["forced"])[:, layer] / start, **FLOW)
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(3e-10, 5.0)
        axes.set_title(f"{layers[layer]}\nnorm and its sources")
        axes.set_ylabel(r"$|\theta|^2$ / initial $|\theta|^2$")
        label_steps(axes)
    lines = [Line2D([], [], **look, label=label) for label, look in TERMS.values()]
    lines.insert(1, Line2D([], [], **FLOW, label="discrete law"))
    figure.legend(handles=lines, loc="outside lower center", ncols=6, handlelength=2.0, columnspacing=1.2)

    rest, rate, angle = below
    palette = colors(len(layers))
    shown = []
    for quantity in ("defect", "rounding"):
        _, look = TERMS[quantity]
        share = np.abs(data[quantity][1:] / norm[1:])
        rest.plot(steps[1:], share.max(1), **look | {"linewidth": 1.6})
        rest.plot(steps[1:], np.median(share, 1), **look | {"linewidth": 0.7})
        shown.append(np.median(share, 1))
        shown.append(share.max(1))
    log_axis(rest, shown)
    rest.set_title("defect and rounding, of 13 layers\nthick: worst, thin: median")
    rest.set_ylabel(r"share of $|\theta|^2$")
    for layer, color in enumerate(palette):
        rate.plot(steps, data["effective_lr"][:, layer], color=color, linewidth=1.1)
        angle.plot(steps[1:], _running_rms(data["update"][1:, layer]), color=color, linewidth=1.1)
    rate.set_yscale("log")
    rate.set_title("effective learning rate\n13 layers, dark: first")
    rate.set_ylabel(r"$\eta\,/\,|\theta_A|^2$, layer mean")
    predicted = r"predicted equilibrium $\sqrt{2\eta\lambda}$"
    angle.axhline(data["equilibrium"], color="black", linewidth=1.3, linestyle=(0, (1, 1.6)), zorder=5, label=predicted)
    angle.legend(loc="upper left", fontsize=7)
    angle.set_yscale("log")
    angle.set_ylim(top=4.0 * data["equilibrium"])
    angle.set_title(f"angular update, 13 layers\nrms of {AVERAGED} rows, dark: first")
    angle.set_ylabel(r"$\eta|u|\,/\,|\theta|$, rad per step")
    for axes in below:
        label_steps(axes)
    return figure


def _running_rms(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square over AVERAGED rows around each row; fewer at both ends."""
    ones = np.ones(AVERAGED)
    total = np.convolve(values**2, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    rms: NDArray[np.float64] = np.sqrt(total)
    return rms


def _explain(figure: Figure, dotted: str) -> None:
    lines = [
        Line2D([], [], color=colors(3)[1], **MEASURED, label="measured"),
        Line2D([], [], **FLOW, label=dotted),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
