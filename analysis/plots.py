"""Draws accuracy against memory from the CSV of runs alone, and defines the style of all plots."""

from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from efcp.analysis.methods import ADAM_BYTES, LOW_RANK, power_iterations_label

# Colours run from dark to light, so that they also differ in grey; markers and lines differ as well.
FEEDBACK: dict[str, Any] = {"color": "#08306b", "marker": "o", "linestyle": "-", "markersize": 8}
NO_FEEDBACK: dict[str, Any] = {
    "color": "#e6862e",
    "marker": "s",
    "linestyle": "--",
    "markersize": 8,
    "markerfacecolor": "white",
}
LOW_RANKS: tuple[dict[str, Any], ...] = (
    {"color": "#5aa5d6", "marker": "v", "linestyle": "-.", "markersize": 7},
    {"color": "#b0387e", "marker": "P", "linestyle": ":", "markersize": 8},
    {"color": "#7f7f00", "marker": "h", "linestyle": (0, (5, 1)), "markersize": 8},
)
OTHERS: dict[str, dict[str, Any]] = {
    "dense M-FAC": {"color": "black", "marker": "*", "markersize": 14},
    "sparse GGT": {"color": "#2f8f6b", "marker": "^", "markersize": 9},
    "Adam": {"color": "#7a1f5c", "marker": "X", "markersize": 9},
    "SGD (momentum 0.9)": {"color": "#808080", "marker": "D", "markersize": 8},
    "AdamW": {"color": "#c06090", "marker": "x", "markersize": 9},
    "Adagrad": {"color": "#a0a000", "marker": "<", "markersize": 8},
    "L-BFGS": {"color": "#404040", "marker": "p", "markersize": 9},
    "dense GGT": {"color": "#2f8f6b", "marker": "*", "markersize": 14},
}


def plot_tradeoff(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Writes the plot of `tradeoff` as a PNG."""
    tradeoff(summary, title).savefig(path)


def tradeoff(summary: pd.DataFrame, title: str) -> Figure:
    """Test accuracy (mean and standard deviation over seeds) against measured state per parameter.

    Args:
        summary: the result of `efcp.analysis.summary.summarise`.
        title: above the plot.
    """
    figure = Figure(figsize=(8.2, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")

    sparse = summary[summary["method"] == "sparse M-FAC"]
    for feedback, style in ((True, FEEDBACK), (False, NO_FEEDBACK)):
        line = sparse[sparse["error_feedback"].eq(feedback)].sort_values("bytes_per_parameter")
        if not line.empty:
            draw(axes, line, f"sparse M-FAC, {'with' if feedback else 'without'} error feedback", style)
            names = [f"{100 * density:g}%" for density in line["density"]]
            name_points(axes, line, names, below=feedback, color=style["color"])
    low_rank = summary[summary["method"] == LOW_RANK].sort_values("bytes_per_parameter")
    for style, number in zip(cycle(LOW_RANKS), sorted(low_rank["power_iterations"].unique().tolist())):
        line = low_rank[low_rank["power_iterations"] == number]
        draw(axes, line, f"{LOW_RANK}, {power_iterations_label(number)}", style)
        name_points(axes, line, [f"r={rank:g}" for rank in line["rank"]], below=False, color=style["color"])
    for name, style in OTHERS.items():
        rows = summary[summary["method"].eq(name) & summary["error_feedback"].ne(False)]
        if not rows.empty:
            densities = [f"{100 * density:g}%" for density in rows["density"].dropna()]
            label = ", ".join([name, *densities]) if densities else str(rows.index[0])
            draw(axes, rows, label, {"linestyle": "none", **style})

    adam_line(axes)
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("optimizer state, bytes per parameter (measured, log scale)")
    axes.set_ylabel("test accuracy, % (mean ± std over seeds)")
    axes.set_title(title, fontsize=10)
    plain_log(axes)
    light_grid(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def adam_line(axes: Axes) -> None:
    """Marks the bytes of Adam on an axis of bytes per parameter."""
    axes.axvline(ADAM_BYTES, color="0.35", linestyle=":", linewidth=1.4, zorder=0)
    axes.annotate(
        f"Adam: {ADAM_BYTES:g} bytes",
        (ADAM_BYTES, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color="0.25",
        fontsize=9,
    )


def plain_log(axes: Axes) -> None:
    """Makes the x axis logarithmic, with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def light_grid(axes: Axes) -> None:
    axes.grid(which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)


def draw(axes: Axes, rows: pd.DataFrame, label: str, style: dict[str, Any], x: str = "bytes_per_parameter") -> None:
    """Draws mean and standard deviation of test accuracy against a column."""
    kind = {"linewidth": 1.6, **style}
    axes.errorbar(
        rows[x],
        rows["test_mean"],
        yerr=rows["test_std"].fillna(0),
        label=label,
        capsize=4,
        **kind,
    )


def name_points(axes: Axes, rows: pd.DataFrame, names: list[str], below: bool, color: Any) -> None:
    """Writes a name beside each point of a line: to its lower right if `below`, otherwise to its upper left.

    Where the next point is near on the logarithmic axis, the name is always to the upper left.
    """
    x, y = (list(rows[name]) for name in ("bytes_per_parameter", "test_mean"))
    for number, name in enumerate(names):
        near = number + 1 < len(names) and (
            x[number + 1] < 1.5 * x[number] and abs(y[number + 1] - y[number]) < 0.1 * (max(y) - min(y))
        )
        right = below and not near
        text = axes.annotate(
            name,
            (x[number], y[number]),
            xytext=(7, -5) if right else (-7, 5),
            textcoords="offset points",
            ha="left" if right else "right",
            va="top" if right else "bottom",
            color=color,
            fontsize=9,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
