"""Draws all plots of a run from its CSVs alone: `python -m efcp.perf.plots DIR`.

A plot whose CSV is missing is left out. Each implementation, operation and window has one colour, marker and line in
all plots. Colours run from dark to light, so that they also differ in grey.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.plots")

import argparse
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from efcp.perf import scaling
from efcp.perf.command import ending, locked
from efcp.perf.roofline import standing
from efcp.perf.tables import read_measured, timed

__all__ = ["PLOTS", "draw", "main"]

OURS = "efcp"
STYLES: dict[str, dict[str, Any]] = {
    "efcp": {"color": "#08306b", "marker": "o", "linestyle": "-", "linewidth": 2.4},
    "efcp, graph": {"color": "#08306b", "marker": "o", "linestyle": ":", "markerfacecolor": "white"},
    "published": {"color": "#a02c6e", "marker": "^", "linestyle": "--"},
    "torch.sparse": {"color": "#2f8f6b", "marker": "D", "linestyle": "-."},
    "torch.topk": {"color": "#e08a2e", "marker": "v", "linestyle": "-."},
    "definition": {"color": "#9a9a9a", "marker": "s", "linestyle": "--"},
    "Adam, fused": {"color": "#1a1a1a", "marker": "X", "linestyle": ":"},
    "Adam, foreach": {"color": "#1a1a1a", "marker": "X", "linestyle": ":", "markerfacecolor": "white"},
    "SGD, fused": {"color": "#6f6f6f", "marker": "P", "linestyle": ":"},
    "SGD, foreach": {"color": "#6f6f6f", "marker": "P", "linestyle": ":", "markerfacecolor": "white"},
}
OPERATIONS: dict[str, dict[str, Any]] = {
    "norm_is_finite": {"color": "#b8b8b8", "marker": "s"},
    "compress_": {"color": "#e08a2e", "marker": "v"},
    "window_dots": {"color": "#2f8f6b", "marker": "D"},
    "window_apply_": {"color": "#a02c6e", "marker": "^"},
    "step": {"color": "#08306b", "marker": "o"},
}
WINDOWS: dict[int, dict[str, Any]] = {
    64: {"color": "#6baed6", "marker": "o", "linestyle": "-"},
    256: {"color": "#2171b5", "marker": "s", "linestyle": "--"},
    1024: {"color": "#08306b", "marker": "^", "linestyle": "-."},
}
PHASES: dict[str, dict[str, Any]] = {
    "compress": {"color": "#08306b"},
    "dots": {"color": "#2f8f6b", "hatch": "//"},
    "apply": {"color": "#e08a2e", "hatch": ".."},
    "algebra": {"color": "#d9d9d9", "hatch": "xx"},
    "Python": {"color": "#ffffff"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "efcp, Top-k": {"color": "#08306b", "marker": "o"},
    "efcp, low rank": {"color": "#2f8f6b", "marker": "D"},
    "efcp, low-rank Adam": {"color": "#6db6e8", "marker": "v"},
    "PyTorch": {"color": "#1a1a1a", "marker": "X"},
    "torchao": {"color": "#a02c6e", "marker": "^"},
    "pytorch_optimizer": {"color": "#e08a2e", "marker": "s"},
}
REFERENCE = "AdamW, fused"
SHOWN = ("compress_", "window_dots", "window_apply_", "step")


def draw(folder: Path) -> list[Path]:
    """Draws every plot whose CSV is in a folder, and writes it there.

    Returns:
        The paths of the plots.
    """
    made = []
    for name, (source, plot) in PLOTS.items():
        if not (folder / source).exists():
            continue
        figure = plot(read_measured(folder / source))
        if figure is not None:
            figure.savefig(folder / name)
            made.append(folder / name)
    return made


def throughput(bench: pd.DataFrame) -> Figure | None:
    """GB/s against density: the bytes that have to be moved, divided by the time."""
    figure, panels = _density_panels(bench, "GB/s: bytes that have to be moved / time")
    for axes, line in panels:
        _implementations(axes, line, "density", "GB/s")
        for bound, level in line.groupby("bound")["bandwidth GB/s"].median().dropna().items():
            axes.axhline(level, color="0.4", linewidth=1.2, zorder=0, label=f"bandwidth of a {bound}")
    return _finished(figure, "Throughput", bench, panels)


def speedup(bench: pd.DataFrame) -> Figure | None:
    """Times of other implementations, divided by ours, against density."""
    figure, panels = _density_panels(bench, "time / time of efcp")
    for axes, line in panels:
        own = line[line["implementation"] == OURS].groupby("density")["p50_ms"].median()
        others = line[line["implementation"] != OURS]
        _implementations(axes, others.assign(ratio=others["p50_ms"] / others["density"].map(own)), "density", "ratio")
        axes.axhline(
            1, color=STYLES[OURS]["color"], linewidth=1.6, zorder=0, label="efcp = 1; above it others are slower"
        )
    return _finished(figure, "Speed against others", bench, panels)


def memory_density(memory: pd.DataFrame) -> Figure | None:
    """Bytes of state for each parameter against density, estimated as lines and measured as points."""
    known = memory[(memory["status"] == "ok") & (memory["per parameter"] > 0)]
    sparse = known[(known["optimizer"] == "SparseMFAC") & known["density"].notna()]
    models = sparse[sparse["how"] == "measured"]["model"]
    if models.empty:
        return None
    model = models.value_counts().index[0]
    rows, sparse = known[known["model"] == model], sparse[sparse["model"] == model]
    own = sparse[(sparse["error"] == "float32") & (sparse["values"] == "bfloat16")]
    figure, (axes,) = _figure(1, 1, (7.4, 4.8))
    _log(axes, "x", percent=True)
    _log(axes, "y")
    for window, style in WINDOWS.items():
        line = own[own["m"] == window].sort_values("density")
        axes.plot(line["density"], line["per parameter"], **{**style, "marker": ""}, label=f"m = {window}, estimate")
        points = line[line["how"] == "measured"]
        if not points.empty:
            look = {**style, "linestyle": "none", "markersize": 7}
            axes.plot(points["density"], points["per parameter"], **look, label=f"m = {window}, measured")
    _ticks(axes, own["density"])
    others = (("Adam", "Adam", "right"), ("Shampoo-like", "Shampoo-like (formula)", "left"))
    for name, label, side in (*others, ("DenseMFAC", "dense M-FAC, m = 64", "left")):
        level = rows[(rows["optimizer"] == name) & (rows["m"].isna() | (rows["m"] == 64))]["per parameter"]
        if not level.empty:
            axes.axhline(level.iloc[0], color="0.3", linestyle=":", linewidth=1.4, zorder=0)
            at = own["density"].min() if side == "left" else own["density"].max()
            axes.annotate(
                f"{label}: {level.iloc[0]:.3g}",
                (at, level.iloc[0]),
                xytext=(0, 3),
                textcoords="offset points",
                ha=side,
                color="0.2",
                fontsize=9,
            )
    axes.set_xlabel("density")
    axes.set_ylabel("optimizer state, bytes per parameter")
    axes.set_title(f"Memory of sparse M-FAC: {model}, float32 error, bfloat16 values", fontsize=10)
    return _with_legend(figure, [axes])


def roofline(bench: pd.DataFrame) -> Figure | None:
    """Time against bytes that have to be moved; the roof is what the measured bandwidth allows."""
    rows = standing(bench)
    rows = rows[rows["implementation"].isin([OURS, "published"]) & (rows["bytes"] > 0)]
    if rows.empty:
        return None
    figure, (axes,) = _figure(1, 1, (7.4, 5.2))
    _log(axes, "x")
    _log(axes, "y")
    for operation, style in OPERATIONS.items():
        points = rows[rows["operation"] == operation]
        for name, face in (("published", "none"), (OURS, style["color"])):
            some = points[points["implementation"] == name]
            if not some.empty:
                look = {"marker": style["marker"], "s": 34, "facecolors": face, "edgecolors": style["color"]}
                axes.scatter(some["bytes"] / 1e6, some["p50_ms"], **look, label=f"{operation}, {name}", zorder=3)
    ends = rows["bytes"].min() / 1e6, rows["bytes"].max() / 1e6
    measured = timed(bench)
    for bound, stroke in (("copy", "-"), ("read", "--")):
        speed = measured[measured["bound"] == bound]["bandwidth GB/s"].median()
        if pd.notna(speed):
            label = f"roof: {speed:.3g} GB/s, {bound}"
            axes.plot(ends, [x / speed for x in ends], color="0.25", linestyle=stroke, linewidth=1.4, label=label)
    axes.set_xlabel("bytes that have to be moved, MB")
    axes.set_ylabel("time, ms (median)")
    axes.set_title(f"Against the roof of memory: {_machine(bench)}", fontsize=10)
    return _with_legend(figure, [axes], columns=3)


def breakdown(frame: pd.DataFrame) -> Figure | None:
    """Stacked bars of the phases' shares of a step's time, with the whole step in ms beside each bar."""
    rows = timed(frame)
    settings = rows["m"].map("\nm = {:.0f}, error ".format) + rows["error"].fillna("")
    rows = rows.assign(model=rows["model"] + settings)
    table = rows.pivot_table("p50_ms", "model", "phase", sort=False).reindex(columns=[*PHASES, "step"]).dropna()
    if table.empty:
        return None
    figure, (axes,) = _figure(1, 1, (7.4, 1.4 + 0.7 * len(table)))
    parts = table[[*PHASES]]
    shares = 100 * parts.div(parts.sum(axis=1), axis=0)
    left = pd.Series(0.0, index=shares.index)
    for phase, style in PHASES.items():
        axes.barh(
            shares.index, shares[phase], left=left, label=phase, edgecolor="0.15", linewidth=0.8, height=0.6, **style
        )
        left += shares[phase]
    for position, total in enumerate(table["step"]):
        axes.annotate(f" {total:.3g} ms", (100, position), va="center", fontsize=9)
    axes.set_xlim(0, 114)
    axes.set_xticks(range(0, 101, 20))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("share of the median times of the phases, %")
    first = rows.iloc[0]
    device = f"{first['device']}, {first['threads']:.0f} threads" if first["device"] == "cpu" else first["device"]
    text = f"Where a step of SparseMFAC goes: {100 * first['density']:g}%; {device}"
    axes.set_title(text, fontsize=10)
    return _with_legend(figure, [axes], columns=len(PHASES))


def growth(bench: pd.DataFrame) -> Figure | None:
    """Time of a step and bytes of state along d, m and density."""
    figure, panels = _figure(2, 3, (10.5, 6.2))
    names = {"d": "parameters d", "m": "window m", "density": "density"}
    drawn = []
    for axis, above, below in zip(scaling.AXES, panels[:3], panels[3:], strict=True):
        line, curve = scaling.series(bench, "step", axis), scaling.memory_curve(axis)
        for axes in (above, below):
            _log(axes, "x", percent=axis == "density")
            _log(axes, "y")
            axes.set_xlabel(names[axis])
        if not line.empty:
            _implementations(above, line, axis, "p50_ms")
            if axis != "d":
                _ticks(above, line[axis], apart=2.5)
            drawn.append(above)
            fixed = line.iloc[0]
            held = [f"d = {fixed['d'] / 1e6:.1f}M", f"m = {fixed['m']:g}", f"{100 * fixed['density']:g}%"]
            above.set_title(", ".join(h for a, h in zip(scaling.AXES, held, strict=True) if a != axis), fontsize=9)
        below.plot(curve[axis], curve["bytes"] / 1e6, color=STYLES[OURS]["color"], linewidth=2)
        held = ["d = 16.8M", "m = 256", "1%"]
        below.set_title(", ".join(h for a, h in zip(scaling.AXES, held, strict=True) if a != axis), fontsize=9)
    panels[0].set_ylabel("time of a step, ms (median)")
    panels[3].set_ylabel("state of SparseMFAC, MB (estimate)")
    figure.suptitle(f"Growth of time and memory: {_machine(bench)}", fontsize=10)
    return _with_legend(figure, drawn) if drawn else None


def optimizers(frame: pd.DataFrame) -> Figure | None:
    """Time of a step against bytes of state a parameter, a panel for each model; every point has its optimizer's name.

    The lines cross at fused AdamW. Within the grey corner an optimizer is better in both.
    """
    rows = timed(frame)
    rows = rows[rows["per parameter"] > 0]
    models = list(dict.fromkeys(rows["model"]))
    if not models:
        return None
    figure, panels = _figure(-(-len(models) // 2), min(2, len(models)), (10.4, 4.6 * -(-len(models) // 2)))
    for axes, model in zip_longest(panels, models):
        if model is None:
            axes.set_axis_off()
            continue
        own = rows[rows["model"] == model]
        _log(axes, "x")
        _log(axes, "y")
        axes.margins(0.16, 0.12)
        for family, style in FAMILIES.items():
            some = own[own["family"] == family]
            axes.plot(some["per parameter"], some["p50_ms"], linestyle="none", markersize=7.5, label=family, **style)
        for x, y in own[own["optimizer"] == REFERENCE][["per parameter", "p50_ms"]].to_numpy():
            axes.axvline(x, color="0.45", linestyle="--", linewidth=1, zorder=0)
            axes.axhline(y, color="0.45", linestyle="--", linewidth=1, zorder=0)
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            label = "smaller and faster than fused AdamW"
            axes.fill_between([left, x], bottom, y, color="0.93", linewidth=0, zorder=-1, label=label)
            axes.set(xlim=(left, right), ylim=(bottom, top))
        axes.set_title(model, fontsize=10)
    for axes in panels[::2]:
        axes.set_ylabel("time of a step, ms (median)")
    for axes in panels[max(0, len(models) - 2) : len(models)]:
        axes.set_xlabel("optimizer state, bytes a parameter")
    figure.suptitle(f"Time and memory of optimizers: {_machine(rows)}", fontsize=10)
    _with_legend(figure, panels[: len(models)])
    for axes, model in zip(panels, models, strict=False):
        own = rows[rows["model"] == model]
        _name_points(axes, own["per parameter"], own["p50_ms"], own["optimizer"])
    return figure


PLOTS: dict[str, tuple[str, Callable[[pd.DataFrame], Figure | None]]] = {
    "optimizers.png": ("optimizers.csv", optimizers),
    "throughput.png": ("bench.csv", throughput),
    "speedup.png": ("bench.csv", speedup),
    "memory.png": ("memory.csv", memory_density),
    "roofline.png": ("bench.csv", roofline),
    "breakdown.png": ("breakdown.csv", breakdown),
    "scaling.png": ("bench.csv", growth),
}


class Decades(LogLocator):
    """Ticks at powers of ten, and on a short axis also at 2 and 5 times these."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        self.set_params(subs=(1, 2, 5) if vmax < 300 * vmin else (1,))
        return super().tick_values(vmin, vmax)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(which="major", color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _log(axes: Axes, which: str, percent: bool = False) -> None:
    """A logarithmic axis with plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis.set_major_locator(Decades())
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%" if percent else _short(v)))


def _ticks(axes: Axes, values: pd.Series, apart: float = 1.0) -> None:
    """Puts ticks of the x-axis at measured values, each more than a factor `apart` from the one before."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value > apart * ticks[-1]:
            ticks.append(value)
    axes.xaxis.set_major_locator(FixedLocator(ticks))


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or value == size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


NEAR = 9
PLACES = [  # of a name beside its point: distance in points, horizontal and vertical part of the direction
    *((NEAR, dx, dy) for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))),
    *((r, dx, dy) for r in (16, 24, 34, 46) for dy in (1, -1, 0) for dx in (0, 1, -1, 0.5, -0.5) if dy or abs(dx) == 1),
]


def _name_points(axes: Axes, xs: pd.Series, ys: pd.Series, names: pd.Series) -> None:
    """Writes the name of each point beside it, where it hides nothing else, with a line where that is far away."""
    axes.figure.canvas.draw()  # places the panels
    to_data, scale = axes.transData.inverted(), axes.figure.dpi / 72
    points = axes.transData.transform(np.column_stack([xs, ys]))
    taken = 5 * [Bbox([point - 6 * scale, point + 6 * scale]) for point in points]  # it is worse to hide a point
    taken += [line.get_window_extent().padded(scale) for line in axes.lines if line.get_linestyle() == "--"]
    for point, name in zip(points, names, strict=True):
        text = axes.text(0, 0, name, fontsize=8)
        size = np.array(text.get_window_extent().size)
        text.remove()

        others = points[(points != point).any(axis=1)]
        boxes = [
            Bbox.from_bounds(*(point + r * scale * np.array(d) - size * (1 - np.array(d)) / 2), *size)
            for r, *d in PLACES
        ]
        costs = [_hidden(box, taken, axes.get_window_extent(), point, others) for box in boxes]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        (x, y), (left, bottom) = to_data.transform([point, boxes[best].p0])
        note = axes.annotate(
            name,
            (x, y),
            xytext=(left, bottom),
            fontsize=8,
            color="0.1",
            va="bottom",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if PLACES[best][0] > NEAR else None,
        )
        note.set_in_layout(False)


def _hidden(box: Bbox, taken: list[Bbox], frame: Bbox, own: np.ndarray, others: np.ndarray) -> float:
    """How bad a place for a name is: the area that it shares with others or has outside; more beside a wrong point."""

    def shared(other: Bbox) -> float:
        common = Bbox.intersection(box, other)
        return common.width * common.height if common else 0.0

    def distance(point: np.ndarray) -> float:
        return float(np.linalg.norm(np.maximum(0, np.maximum(box.p0 - point, point - box.p1))))

    misleading = any(distance(point) <= distance(own) for point in others)
    return sum(map(shared, taken)) + 10 * (box.width * box.height - shared(frame)) + 100 * misleading


def _density_panels(bench: pd.DataFrame, label: str) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each operation, and the panels that have measurements along density, with these."""
    figure, panels = _figure(2, 2, (9.4, 7.0))
    drawn = []
    for axes in panels[2:]:
        axes.set_xlabel("density")
    for axes, operation in zip(panels, SHOWN, strict=True):
        _log(axes, "x", percent=True)
        _log(axes, "y")
        line = scaling.series(bench, operation, "density")
        axes.set_title(operation, fontsize=10)
        if not line.empty:
            _ticks(axes, line["density"])
            drawn.append((axes, line))
    figure.supylabel(label, fontsize=10)
    return figure, drawn


def _implementations(axes: Axes, line: pd.DataFrame, x: str, y: str) -> None:
    for name, style in STYLES.items():
        own = line[line["implementation"] == name]
        if not own.empty:
            axes.plot(own[x], own[y], **{"linewidth": 1.5, "markersize": 6, **style}, label=name)


def _finished(
    figure: Figure, title: str, bench: pd.DataFrame, panels: list[tuple[Axes, pd.DataFrame]]
) -> Figure | None:
    if not panels:
        return None
    case = panels[0][1].iloc[0]
    what = f"d = {case['d'] / 1e6:.1f}M, m = {case['m']:g}, B = {case['B']:g}, {case['dtype']}"
    figure.suptitle(f"{title}: {what}; {_machine(bench)}", fontsize=10)
    return _with_legend(figure, [axes for axes, _ in panels])


def _machine(bench: pd.DataFrame) -> str:
    for row in bench.head(1).to_dict("records"):
        threads = f"{row['threads']:g} thread{'' if row['threads'] == 1 else 's'}"
        return f"{row['machine']}, {threads}" if row["device"] == "cpu" else str(row["machine"])
    return ""


def _with_legend(figure: Figure, panels: Sequence[Axes], columns: int = 4) -> Figure:
    """Adds one legend for all panels below them, filled row by row."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    labels = list(entries)
    rows = [labels[i : i + columns] for i in range(0, len(labels), columns)]
    ordered = [label for column in zip_longest(*rows) for label in column if label is not None]
    handles = [entries[label] for label in ordered]
    figure.legend(handles, ordered, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="efcp.perf.plots", description="Draws all plots from the CSVs of a run.")
    parser.add_argument("folder", type=Path, help="with the CSVs; the plots go there")
    options = parser.parse_args(arguments)
    with ending(parser, "plots may be missing, and the same command draws them"), locked(options.folder):
        sources = sorted({source for source, _ in PLOTS.values()})
        if not any((options.folder / source).exists() for source in sources):
            raise FileNotFoundError(f"{options.folder} holds none of {', '.join(sources)}")
        for path in draw(options.folder):
            print(path)
