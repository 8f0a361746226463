"""The memory–accuracy plot, from the CSV of runs alone."""

from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

from efcp.analysis.methods import ADAM_BYTES, LOW_RANK, power_iterations_label

# Dark to light, so that they differ in grey too; markers and lines differ besides.
_FEEDBACK = {"color": "#08306b", "marker": "o", "linestyle": "-", "markersize": 8}
_NO_FEEDBACK = {"color": "#e6862e", "marker": "s", "linestyle": "--", "markersize": 8, "markerfacecolor": "white"}
_LOW_RANK = (
    {"color": "#5aa5d6", "marker": "v", "linestyle": "-.", "markersize": 7},
    {"color": "#b0387e", "marker": "P", "linestyle": ":", "markersize": 8},
    {"color": "#7f7f00", "marker": "h", "linestyle": (0, (5, 1)), "markersize": 8},
)
_OTHERS = {
    "dense M-FAC": {"color": "black", "marker": "*", "markersize": 14},
    "sparse GGT": {"color": "#2f8f6b", "marker": "^", "markersize": 9},
    "Adam": {"color": "#7a1f5c", "marker": "X", "markersize": 9},
    "SGD (momentum 0.9)": {"color": "#808080", "marker": "D", "markersize": 8},
}


def plot_tradeoff(summary: pd.DataFrame, title: str, path: Path) -> None:
    """Writes a PNG: test accuracy (mean and standard deviation over seeds) against measured state per parameter.

    Args:
        summary: of `efcp.analysis.summary.summarise`.
        title: above the plot.
        path: of the file.
    """
    figure = Figure(figsize=(8.2, 4.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")

    sparse = summary[summary["method"] == "sparse M-FAC"]
    for feedback, style in ((True, _FEEDBACK), (False, _NO_FEEDBACK)):
        line = sparse[sparse["error_feedback"].eq(feedback)].sort_values("bytes_per_parameter")
        if not line.empty:
            _draw(axes, line, f"sparse M-FAC, {'with' if feedback else 'without'} error feedback", style)
            names = [f"{100 * density:g}%" for density in line["density"]]
            _name_points(axes, line, names, below=feedback, color=style["color"])
    low_rank = summary[summary["method"] == LOW_RANK].sort_values("bytes_per_parameter")
    for style, number in zip(cycle(_LOW_RANK), sorted(low_rank["power_iterations"].unique().tolist())):
        line = low_rank[low_rank["power_iterations"] == number]
        _draw(axes, line, f"{LOW_RANK}, {power_iterations_label(number)}", style)
        _name_points(axes, line, [f"r={rank:g}" for rank in line["rank"]], below=True, color=style["color"])
    for name, style in _OTHERS.items():
        rows = summary[summary["method"] == name]
        if not rows.empty:
            density = rows["density"].iloc[0]
            label = name if pd.isna(density) else f"{name}, {100 * density:g}%"
            _draw(axes, rows, label, {"linestyle": "none", **style})

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
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("optimizer state, bytes per parameter (measured, log scale)")
    axes.set_ylabel("test accuracy, % (mean ± std over seeds)")
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="0.88", linewidth=0.8)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw(axes: Axes, rows: pd.DataFrame, label: str, style: dict[str, object]) -> None:
    axes.errorbar(
        rows["bytes_per_parameter"],
        rows["test_mean"],
        yerr=rows["test_std"].fillna(0),
        label=label,
        capsize=4,
        linewidth=1.6,
        **style,  # type: ignore[arg-type]
    )


def _name_points(axes: Axes, rows: pd.DataFrame, names: list[str], below: bool, color: object) -> None:
    """Writes a name beside each point of a line, on the side where the other line is not expected."""
    side = 1 if below else -1
    for name, (_, row) in zip(names, rows.iterrows(), strict=True):
        text = axes.annotate(
            name,
            (row["bytes_per_parameter"], row["test_mean"]),
            xytext=(7 * side, -5 * side),
            textcoords="offset points",
            ha="left" if below else "right",
            va="top" if below else "bottom",
            color=str(color),
            fontsize=9,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
