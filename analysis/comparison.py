"""Plots of experiments that compare classes of optimizers: quality against time, learning rate, and memory.

Quality is the accuracy in %; where there are no classes the loss; of PINNs the relative error of the solution.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from efcp.analysis.methods import ADAM_BYTES
from efcp.analysis.summary import Finished, at_chosen, measure, without_classes

_STYLES = ("-", "--", "-.", ":", (0, (7, 1.5)), (0, (4, 1, 1, 1, 1, 1)), (0, (1, 3)))
_MARKERS = "osv^DPXh*<>"
_COLOURS = ("#000000", "#1f5fa8", "#c2571a", "#2a7f3f", "#8a3a8f", "#a88a00", "#7a7a7a", "#00838f", "#b0306a")


def comparison_figures(
    runs: pd.DataFrame, summary: pd.DataFrame, curves: pd.DataFrame, title: str
) -> dict[str, Figure]:
    """All plots, by name: "curves", "rates" and "memory".

    Args:
        runs: of `read_runs`.
        summary: of `summarise`.
        curves: the learning curves of the final runs, with the labels of their methods.
        title: of the experiment.
    """
    look = _look([str(label) for label in summary.index])
    drawn = {
        "curves": _curves(runs, curves, look, title),
        "rates": _rates(runs, look, title),
        "memory": _memory(runs, summary, look, title),
    }
    for figure in drawn.values():
        _legend(figure, figure.axes[0])
    return drawn


def overview_figure(finished: Finished, title: str) -> Figure:
    """Draws what the final runs reached in validation against seconds of computing, a panel for each experiment."""
    labels = list(dict.fromkeys(label for _, summary, _ in finished.values() for label in summary.index))
    columns = min(4, len(finished))
    rows = -(-len(finished) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(2.9 * columns, 2.6 * rows + 0.6), layout="constrained", squeeze=False
    )
    plt.close(figure)
    figure.suptitle(title, fontsize=10 if columns > 1 else 8)
    look = _look(labels)
    for axes, (name, (runs, _, curves)) in zip(panels.flat, finished.items(), strict=False):
        final = curves[curves["run"].isin(at_chosen(runs)["run"])]
        for label, style in look.items():
            own = (
                final[final["label"] == label]
                .groupby("step")
                .agg(x=("cpu_seconds", "mean"), y=(_column(runs), "median"))
            )
            axes.plot(own["x"], own["y"], **(style | {"marker": ""}), label=label)
        axes.set_title(name, fontsize=9)
        _scale(axes, runs)
        axes.tick_params(which="both", labelsize=7)
    for axes in panels.flat[len(finished) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, len(finished) - columns) : len(finished)]:  # those with no panel below
        axes.set_xlabel("seconds, one thread", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel(f"{measure(runs)}, median", fontsize=8)
    _legend(figure, panels.flat[0])
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    """Adds the legend of all axes below them, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    inches = 0.062 * max(map(len, labels)) + 0.65  # of a column
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _look(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each method."""
    return {
        label: {"color": _COLOURS[i % 9], "linestyle": _STYLES[i % 7], "marker": _MARKERS[i % 11]}
        for i, label in enumerate(labels)
    }


def _figure(panels: int, title: str) -> Figure:
    figure, _ = plt.subplots(
        1, panels, figsize=(4.6 * panels if panels > 1 else 5.6, 4.8), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    plt.close(figure)
    return figure


def _column(runs: pd.DataFrame) -> str:
    """The name of the column that is drawn."""
    return "val_loss" if without_classes(runs) else "val_accuracy"


def _scale(axes: Axes, runs: pd.DataFrame) -> None:
    """Makes the axis of losses logarithmic, with plain numbers at its ticks where it spans little."""
    axes.grid(alpha=0.3, which="both")
    if not without_classes(runs):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 30 * low:
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5) if high > 4 * low else range(2, 10)))
    axes.tick_params(axis="y", which="minor", labelsize=7)


def _curves(runs: pd.DataFrame, curves: pd.DataFrame, look: dict[str, dict[str, Any]], title: str) -> Figure:
    """Draws what the final runs reached in validation, against steps and against seconds of computing."""
    figure = _figure(2, title)
    labelled = curves[curves["run"].isin(at_chosen(runs)["run"])]
    for axes, x, what in zip(figure.axes, ("step", "cpu_seconds"), ("steps", "seconds, one thread"), strict=True):
        for label, style in look.items():
            own = labelled[labelled["label"] == label].groupby("step").agg(x=(x, "mean"), y=(_column(runs), "mean"))
            axes.plot(own["x"], own["y"], **(style | {"marker": ""}), label=label)
        axes.set_xlabel(what)
        axes.set_ylabel(f"validation {measure(runs)}")
        _scale(axes, runs)
    return figure


def _rates(runs: pd.DataFrame, look: dict[str, dict[str, Any]], title: str) -> Figure:
    """Draws what the tuning runs reached against the learning rate, with whatever else is tuned at its best."""
    figure = _figure(1, title)
    axes = figure.axes[0]
    tuning = runs[(runs["phase"] == "tune") & ~runs["diverged"].eq(True)]
    for label, style in look.items():
        own = tuning[tuning["label"] == label]
        means = own.groupby(["lr", "damping"], dropna=False)[_column(runs)].mean().groupby("lr")
        best = means.min() if without_classes(runs) else means.max()
        axes.plot(best.index, best.to_numpy(), **style, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(f"validation {measure(runs)}")
    _scale(axes, runs)
    return figure


def _memory(runs: pd.DataFrame, summary: pd.DataFrame, look: dict[str, dict[str, Any]], title: str) -> Figure:
    """Draws what the final runs reached in the test against bytes of state, with standard deviations over seeds."""
    figure = _figure(1, title)
    axes = figure.axes[0]
    for label, row in summary.iterrows():
        style: dict[str, Any] = {**look[str(label)], "linestyle": "none"}
        axes.errorbar(
            row["bytes_per_parameter"], row["test_mean"], row["test_std"], **style, capsize=3, label=str(label)
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(ADAM_BYTES, color="0.6", linewidth=1)
    axes.annotate(
        " Adam's 8 bytes", (ADAM_BYTES, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="0.4"
    )
    axes.set_xlabel("optimizer state, bytes a parameter")
    axes.set_ylabel(f"test {measure(runs)}")
    _scale(axes, runs)
    return figure
