"""The plots of an experiment, each the answer to a question, from its CSV files alone.

`FIGURES` names them. A figure without runs to show is not drawn.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from efcp.analysis.methods import DENSE, LOW_RANK, SPARSE, power_iterations_label
from efcp.analysis.optimum import FILE as OPTIMUM
from efcp.analysis.plots import (
    FEEDBACK,
    LOW_RANKS,
    NO_FEEDBACK,
    OTHERS,
    adam_line,
    draw,
    light_grid,
    name_points,
    plain_log,
    tradeoff,
)
from efcp.analysis.summary import at_chosen, read_runs, summarise
from efcp.analysis.training import CURVE_COLUMNS, DIAGNOSTICS_COLUMNS
from efcp.perf.tables import read_csv

_MARKERS = "osv^DPXh*<>"


@dataclass(frozen=True)
class ExperimentFiles:
    """The CSV files of an experiment's folder."""

    folder: Path
    title: str

    @cached_property
    def runs(self) -> pd.DataFrame:
        return read_runs(self.folder / "runs.csv")

    @cached_property
    def summary(self) -> pd.DataFrame:
        return summarise(self.runs)

    @cached_property
    def curves(self) -> pd.DataFrame:
        return self._details("curves.csv", CURVE_COLUMNS)

    @cached_property
    def diagnostics(self) -> pd.DataFrame:
        return self._details("diagnostics.csv", DIAGNOSTICS_COLUMNS)

    @cached_property
    def optimum(self) -> float | None:
        """The least loss of a convex task."""
        path = self.folder / OPTIMUM
        if not path.is_file():
            return None
        least = read_csv(path, {"objective": float}, filled=("objective",))["objective"]
        if least.empty:
            raise ValueError(f"{path} holds no optimum: delete it to have it computed again")
        return float(least.iloc[0])

    @cached_property
    def usual(self) -> pd.DataFrame:
        """The summary of the methods with the default block size and dtypes and the most frequent window.

        Dense M-FAC with that window may be missing, since it would take too much memory. Then those with others stay.
        """
        summary = self.summary
        windows = summary.loc[summary["method"].isin([SPARSE, LOW_RANK]), "window"]
        window = (windows if len(windows) else summary["window"]).mode()
        other = (
            summary["window"].notna() & ~summary["window"].isin(window[:1]) & summary["method"].str.contains("M-FAC")
        )
        dense = summary["method"].eq(DENSE)
        if other[dense].all():
            other &= ~dense
        varied = (
            other
            | (summary["block_size"].notna() & summary["block_size"].ne(4096))
            | (summary["value_dtype"].notna() & summary["value_dtype"].ne("bfloat16"))
            | summary["error_dtype"].notna()
        )
        return summary[~varied]

    def _details(self, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
        """The rows of a file for final runs at chosen points, with label, method and seed of their run."""
        path = self.folder / name
        if not path.is_file():
            return pd.DataFrame(columns=["label", "method", "seed", *columns])
        kinds = {column: str if column == "run" else float for column in columns}
        details = read_csv(path, kinds, filled=("run", "step"))
        return details.merge(at_chosen(self.runs)[["run", "label", "method", "seed"]], on="run")


def figures(results: ExperimentFiles) -> dict[str, Figure]:
    """All figures that can be drawn, by the name of the file without its extension."""
    drawn = {name: draw_one(results) for name, draw_one in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def memory(results: ExperimentFiles) -> Figure | None:
    """Accuracy against state bytes per parameter, all methods of the usual window; low rank with fewest iterations."""
    usual = results.usual
    fewest = usual["power_iterations"].isna() | usual["power_iterations"].eq(usual["power_iterations"].min())
    low_rank = usual["method"].eq(LOW_RANK)
    return tradeoff(usual[~low_rank | (fewest & usual["error_feedback"].ne(False))], results.title)


def windows(results: ExperimentFiles) -> Figure | None:
    """Accuracy against bytes, a line for each window; and against the window, a line for each window × density."""
    rows = _default_blocks(
        results.summary[results.summary["method"].eq(SPARSE) & results.summary["error_feedback"].eq(True)]
    )
    lengths = sorted(rows["window"].unique())
    budgets = (rows["window"] * rows["density"]).round(4)
    lines = [budget for budget in sorted(budgets.unique()) if (budgets == budget).sum() > 1]
    if not lines:
        return None
    figure, (left, right) = _figure(results.title, 2)
    for position, length in enumerate(lengths):
        line = rows[rows["window"] == length].sort_values("bytes_per_parameter")
        style = _series(position, len(lengths))
        draw(left, line, f"window {length:g}", style)
    left.set_xlabel("optimizer state, bytes per parameter (log scale)")
    plain_log(left)
    adam_line(left)
    for position, budget in enumerate(lines):
        line = rows[budgets == budget].sort_values("window")
        style = _series(position, len(lines))
        draw(right, line, f"window × density = {budget:g}: {4 * budget:.2g} bytes of window", style, x="window")
    right.set_xlabel("window (log scale); rows are the sparser, the more there are")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _dense_band(results, right)
    _finish(figure, (left, right), "test accuracy, % (mean ± std over seeds)")
    return figure


def feedback(results: ExperimentFiles) -> Figure | None:
    """Accuracy with and without error feedback at every density; and how the error grows."""
    rows = results.usual[results.usual["method"] == SPARSE]
    if rows["error_feedback"].nunique() < 2:
        return None
    figure, (left, right) = _figure(results.title, 2)
    for on, style in ((True, FEEDBACK), (False, NO_FEEDBACK)):
        line = rows[rows["error_feedback"].eq(on)].sort_values("density")
        draw(
            left,
            line.assign(density=100 * line["density"]),
            f"{'with' if on else 'without'} error feedback",
            style,
            x="density",
        )
    _dense_band(results, left)
    left.set_xlabel("density, % (log scale)")
    plain_log(left)
    own = (
        results.diagnostics[results.diagnostics["label"].isin(rows.index) & results.diagnostics["error_ratio"].notna()]
        if len(results.diagnostics)
        else results.diagnostics
    )
    labels = [label for label in rows.sort_values("density").index if label in set(own["label"])]
    for position, label in enumerate(labels):
        by_step = own[own["label"] == label].groupby("step")["error_ratio"]
        style = _series(position, len(labels))
        right.plot(
            by_step.mean().index, by_step.mean(), label=f"{100 * rows.loc[label, 'density']:g}%", markevery=1, **style
        )
    right.set_yscale("log")
    right.set_xlabel("step")
    right.set_ylabel("‖e‖ / Σ‖g‖ (log scale)")
    right.set_title("accumulated error, mean over seeds", fontsize=9)
    _finish(figure, (left, right), None)
    left.set_ylabel("test accuracy, % (mean ± std over seeds)")
    return figure


def breaking(results: ExperimentFiles) -> Figure | None:
    """Draws the accuracy lost against dense M-FAC, by density, with its uncertainty."""
    drops = accuracy_drops(results.usual)
    if len(drops) < 2:
        return None
    figure, (axes,) = _figure(results.title, 1)
    for on, style in ((True, FEEDBACK), (False, NO_FEEDBACK)):
        line = drops[drops["error_feedback"].eq(on)].sort_values("density")
        if len(line):
            axes.errorbar(
                100 * line["density"],
                line["drop"],
                yerr=line["interval"],
                capsize=4,
                linewidth=1.6,
                label=f"{'with' if on else 'without'} error feedback",
                **style,
            )
    axes.axhline(0, color="0.3", linewidth=1)
    axes.set_xlabel("density, % (log scale)")
    plain_log(axes)
    axes.invert_yaxis()
    _finish(figure, (axes,), "points of test accuracy below dense M-FAC\n(difference of means, 95% interval)")
    return figure


def accuracy_drops(summary: pd.DataFrame) -> pd.DataFrame:
    """How far each sparse M-FAC is below dense M-FAC of the same window.

    Returns:
        Rows with density, error_feedback, drop in points of mean test accuracy, and half the width of its 95%
        interval (Student's t); empty without dense M-FAC.
    """
    dense, rows = summary[summary["method"] == DENSE], []
    for label, row in summary[summary["method"] == SPARSE].iterrows():
        same = dense[dense["window"] == row["window"]]
        if same.empty:
            continue
        reference = same.iloc[0]
        freedom = int(row["seeds"] + reference["seeds"] - 2)
        squares = sum((r["seeds"] - 1) * r["test_std"] ** 2 for r in (row, reference)) / max(freedom, 1)
        interval = _T.get(freedom, 2.0) * np.sqrt(squares * (1 / row["seeds"] + 1 / reference["seeds"]))
        rows.append(
            {
                "label": label,
                "density": row["density"],
                "error_feedback": row["error_feedback"],
                "drop": reference["test_mean"] - row["test_mean"],
                "interval": interval,
            }
        )
    return pd.DataFrame(rows, columns=["label", "density", "error_feedback", "drop", "interval"])


_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""The 97.5% quantile of Student's t, by degrees of freedom."""


def low_rank(results: ExperimentFiles) -> Figure | None:
    """Top-k against low rank at equal bytes; and sensitivity to the number of power iterations, where it varies."""
    rows = results.usual[results.usual["method"].eq(LOW_RANK) & results.usual["error_feedback"].ne(False)]
    iterations = sorted(rows["power_iterations"].unique())
    if len(rows) < 2:
        return None
    figure, (left, *others) = _figure(results.title, 2 if len(iterations) > 1 else 1)
    sparse = results.usual[results.usual["method"].eq(SPARSE) & results.usual["error_feedback"].eq(True)].sort_values(
        "bytes_per_parameter"
    )
    if len(sparse):
        draw(left, sparse, "Top-k (sparse M-FAC)", FEEDBACK)
        name_points(left, sparse, [f"{100 * d:g}%" for d in sparse["density"]], below=True, color=FEEDBACK["color"])
    for position, number in enumerate(iterations):
        line = rows[rows["power_iterations"] == number].sort_values("bytes_per_parameter")
        series = _series(position, len(iterations), start=1)
        draw(left, line, f"low rank, {power_iterations_label(number)}", series)
        if position == 0:  # other numbers of iterations take the same bytes
            name_points(left, line, [f"r={rank:g}" for rank in line["rank"]], below=False, color=series["color"])
    left.margins(x=0.12)
    left.set_xlabel("optimizer state, bytes per parameter (log scale)")
    plain_log(left)
    adam_line(left)
    ranks = sorted(rows["rank"].unique())
    for right in others:
        for position, rank in enumerate(ranks):
            line = rows[rows["rank"] == rank].sort_values("power_iterations")
            draw(right, line, f"rank {rank:g}", _series(position, len(ranks)), x="power_iterations")
        right.set_xlabel("power iterations a step")
        right.set_xticks(iterations)
        _dense_band(results, right)
    _finish(figure, (left, *others), "test accuracy, % (mean ± std over seeds)")
    return figure


def storage(results: ExperimentFiles) -> Figure | None:
    """Sensitivity to block size, and to the dtypes of values and error."""
    rows = results.summary[results.summary["method"].eq(SPARSE) & results.summary["error_feedback"].eq(True)]
    usual = results.usual[results.usual["method"] == SPARSE]
    rows = rows[rows["window"].isin(usual["window"])]
    blocks = rows[rows["value_dtype"].eq("bfloat16") & rows["error_dtype"].isna()]
    densities = [d for d in sorted(blocks["density"].unique()) if (blocks["density"] == d).sum() > 1]
    dtypes = rows[rows["block_size"].eq(4096)]
    typed = [d for d in sorted(dtypes["density"].unique()) if (dtypes["density"] == d).sum() > 1]
    if not densities and not typed:
        return None
    figure, (left, right) = _figure(results.title, 2)
    for position, density in enumerate(densities):
        line = blocks[blocks["density"] == density].sort_values("block_size")
        draw(left, line, f"density {100 * density:g}%", _series(position, len(densities)), x="block_size")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    left.set_xlabel("block size (log scale)")
    names = ["bf16 / fp32", "fp32 / fp32", "bf16 / bf16", "fp32 / bf16"]
    short = {"bfloat16": "bf16", "float32": "fp32"}
    for position, density in enumerate(typed):
        line = dtypes[dtypes["density"] == density]
        places = [
            names.index(f"{short[v]} / {short.get(e, 'fp32')}") + 0.12 * position
            for v, e in zip(line["value_dtype"], line["error_dtype"], strict=True)
        ]
        style = {**_series(position, len(typed)), "linestyle": "none"}
        draw(right, line.assign(place=places), f"density {100 * density:g}%", style, x="place")
    right.set_xticks(range(len(names)), names)
    right.set_xlabel("dtype of values / error")
    right.margins(x=0.15)
    _finish(figure, (left, right), "test accuracy, % (mean ± std over seeds)")
    return figure


def heatmaps(results: ExperimentFiles) -> Figure | None:
    """Validation accuracy and median |u/g| over learning rate and damping, dense and sparse."""
    runs = results.runs[results.runs["phase"].isin(["tune", "map"]) & results.runs["damping"].notna()]
    mapped = runs.loc[runs["phase"] == "map", "label"].drop_duplicates()
    if mapped.empty:
        return None
    figure = Figure(figsize=(4.1 * len(mapped) + 1.2, 6.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(mapped), squeeze=False)
    figure.suptitle(results.title, fontsize=10)
    own = runs[runs["label"].isin(mapped)]
    scaling = own["scaling_q50"].where(own["scaling_q50"] > 0)
    norms = {
        "val_accuracy": Normalize(own["val_accuracy"].quantile(0.3), own["val_accuracy"].max()),
        "scaling_q50": LogNorm(max(scaling.min(), 1e-2), scaling.max()),
    }
    for column, label in enumerate(mapped):
        for row, (name, title) in enumerate(
            (("val_accuracy", "validation accuracy, %"), ("scaling_q50", "median |u/g|"))
        ):
            table = own[own["label"] == label].pivot_table(index="damping", columns="lr", values=name, dropna=False)
            axes = grid[row, column]
            image = axes.imshow(
                table.to_numpy(dtype=float), norm=norms[name], cmap="cividis", origin="lower", aspect="auto"
            )
            for (i, j), value in np.ndenumerate(table.to_numpy(dtype=float)):
                if not np.isnan(value):
                    shade = norms[name](value)
                    dark = shade is np.ma.masked or float(shade) < 0.55
                    axes.text(
                        j,
                        i,
                        f"{value:.1f}" if row == 0 else f"{value:.2g}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                    )
            axes.set_xticks(range(table.shape[1]), [f"{v:g}" for v in table.columns])
            axes.set_yticks(range(table.shape[0]), [f"{v:g}" for v in table.index])
            axes.set_title(f"{label}: {title}", fontsize=9)
            axes.set_xlabel("learning rate")
            axes.set_ylabel("damping λ")
            if column == len(mapped) - 1:
                figure.colorbar(image, ax=grid[row].tolist(), extend="min", pad=0.01)
    return figure


def scaling(results: ExperimentFiles) -> Figure | None:
    """Quartiles of |u/g| and cos(g, u) over training, of the main methods."""
    styles = _main(results, results.diagnostics)
    if not styles:
        return None
    figure, (left, right) = _figure(results.title, 2)
    for label, style in styles.items():
        own = results.diagnostics[results.diagnostics["label"] == label].groupby("step")
        middle = own["scaling_q50"].median()
        left.plot(middle.index, middle, label=label, **style)
        left.fill_between(
            middle.index,
            own["scaling_q25"].median(),
            own["scaling_q75"].median(),
            color=style["color"],
            alpha=0.13,
            linewidth=0,
        )
        right.plot(middle.index, own["cosine"].mean(), **style)
    left.set_yscale("symlog", linthresh=0.1)
    left.set_ylim(bottom=0)
    left.set_ylabel("|u/g|: median, and Q25 to Q75 as a band")
    right.set_ylabel("cos(g, u)")
    right.axhline(0, color="0.3", linewidth=1)
    for axes in (left, right):
        axes.set_xlabel("step")
    _finish(figure, (left, right), None)
    return figure


def cost(results: ExperimentFiles) -> Figure | None:
    """Validation accuracy against seconds of computing, and against epochs."""
    return _curves(results, "val_accuracy", "validation accuracy, % (mean over seeds)", None)


def distance(results: ExperimentFiles) -> Figure | None:
    """Distance to the least loss over training, for convex tasks."""
    if results.optimum is None:
        return None
    return _curves(results, "objective", "loss over the training split − least loss (log scale)", results.optimum)


def _curves(results: ExperimentFiles, name: str, ylabel: str, optimum: float | None) -> Figure | None:
    curves = results.curves
    styles = _main(results, curves)
    if not styles or curves[name].isna().all():
        return None
    figure, (left, right) = _figure(results.title, 2)
    for label, style in styles.items():
        own = curves[curves["label"] == label].groupby("step")
        values = own[name].mean() - (optimum or 0.0)
        left.plot(own["cpu_seconds"].mean(), values, label=label, **style)
        right.plot(own["epoch"].mean(), values, **style)
    left.set_xlabel("seconds of training on one thread (log scale)")
    plain_log(left)
    right.set_xlabel("epoch (log scale)")
    plain_log(right)
    for axes in (left, right):
        if optimum is not None:
            axes.set_yscale("log")
        else:
            finals = curves[curves["label"].isin(list(styles))][name]
            axes.set_ylim(bottom=max(finals.min(), finals.quantile(0.15)))
    _finish(figure, (left, right), ylabel)
    return figure


FIGURES: dict[str, Callable[[ExperimentFiles], Figure | None]] = {
    "memory": memory,
    "windows": windows,
    "feedback": feedback,
    "breaking": breaking,
    "low-rank": low_rank,
    "storage": storage,
    "heatmaps": heatmaps,
    "scaling": scaling,
    "cost": cost,
    "distance": distance,
}


def _main(results: ExperimentFiles, details: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """The main methods, for plots of many lines, and how to draw each. Methods without details are left out.

    Styles are those of the plot of memory, except that the sparser a window is, the more broken is its line.
    """
    usual, there = results.usual, set(details["label"])
    wanted = [(usual["method"] == name, {**style, "linestyle": "-"}) for name, style in OTHERS.items()]
    sparse, on = usual["method"] == SPARSE, usual["error_feedback"].eq(True)
    for density, line, color in ((0.1, "-", "#08306b"), (0.01, "--", "#2171b5"), (0.001, ":", "#6baed6")):
        own = sparse & np.isclose(usual["density"].astype(float), density)
        wanted.append((own & on, {**FEEDBACK, "linestyle": line, "color": color}))
        if density == 0.01:
            wanted.append((own & ~on, NO_FEEDBACK))
    wanted.append(((usual["method"] == LOW_RANK) & usual["rank"].eq(4), LOW_RANKS[0]))
    return {
        label: {**style, "markersize": 9 if style["marker"] == "*" else 5, "linewidth": 1.5}
        for rows, style in wanted
        for label in usual[rows].sort_values("power_iterations").index[:1]
        if label in there
    }


def _default_blocks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["block_size"].eq(4096) & rows["value_dtype"].eq("bfloat16") & rows["error_dtype"].isna()]


def _dense_band(results: ExperimentFiles, axes: Axes) -> None:
    """Draws mean and standard deviation of dense M-FAC, with the usual window if possible, across the plot."""
    dense = results.usual[results.usual["method"] == DENSE]
    if len(dense):
        mean, std = dense["test_mean"].iloc[0], np.nan_to_num(dense["test_std"].iloc[0])
        label = f"{dense.index[0]} (mean ± std)"
        axes.axhline(mean, color="black", linewidth=1.2, linestyle=(0, (6, 2)), label=label, zorder=0)
        axes.axhspan(mean - std, mean + std, color="0.85", linewidth=0, zorder=-1)


def _series(position: int, count: int, start: int = 0) -> dict[str, Any]:
    """The style of line number `position`. Colours run from dark to light, so that they also differ in grey."""
    color = colormaps["viridis"](0.9 * position / max(count - 1, 1))
    styles = ("-", "--", "-.", ":")
    return {
        "color": color,
        "marker": _MARKERS[(position + start) % len(_MARKERS)],
        "linestyle": styles[position % 4],
        "markersize": 5,
        "linewidth": 1.5,
    }


def _figure(title: str, columns: int) -> tuple[Figure, tuple[Axes, ...]]:
    figure = Figure(figsize=(6.2 if columns == 1 else 10.6, 4.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure, tuple(figure.subplots(1, columns, squeeze=False)[0])


def _finish(figure: Figure, every: Iterable[Axes], ylabel: str | None) -> None:
    """Adds grids, labels of the y axes, and below all plots their common legend."""
    handles: dict[str, Any] = {}
    for axes in every:
        light_grid(axes)
        if ylabel is not None:
            axes.set_ylabel(ylabel)
        own = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        handles |= own
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3, frameon=False, fontsize=8.5
    )
