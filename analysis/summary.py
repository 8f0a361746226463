"""Summarises the CSV of runs in one row for each method: the chosen point, accuracy over seeds, memory, time.

A point (learning rate, damping and what else is tuned) is chosen by validation accuracy of the tuning runs, or by
validation loss where there are no classes, and by nothing else.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from efcp import DenseMFAC, estimate_memory
from efcp.analysis.methods import LABELLED, TUNED, VARIANT, method_label
from efcp.analysis.tasks import WITHOUT_CLASSES
from efcp.analysis.training import COLUMNS
from efcp.perf.tables import Kinds, check_filled, read_csv, table

POINT = ("lr", *TUNED)
"""The columns that are tuned."""
DIAGNOSTICS = ("grad_norm", "cosine", "scaling_q25", "scaling_q50", "scaling_q75", "error_ratio")
PAPER_WINDOW = 1024
_TEXTS = (
    *("phase", "method", "value_dtype", "error_dtype", "run", "network", "data_set", "decay"),
    *("kernels", "torch_version", "efcp_version", "git_commit"),
)
_FLAGS = ("error_feedback", "diverged")
KINDS: Kinds = {name: str if name in _TEXTS else bool if name in _FLAGS else float for name in COLUMNS}
"""The type of each column of runs.csv."""
_TUNED = ("diverged",)
_MEASURED = ("train_size", "epochs", "batch_size", "numel", "state_bytes", "bytes_per_parameter")
_FILLED: dict[str, tuple[str, ...]] = {
    "tune": _TUNED,
    "map": _TUNED,
    "final": (*_TUNED, *_MEASURED, "data_set", "kernels", "torch_version"),
    "timing": ("step_ms", "optimizer_ms"),
}
"""For each phase, the columns that every run has, besides those that identify it."""
_ALWAYS = ("phase", "method", "val_accuracy", "test_accuracy", "window", "damping", "lr", "seed", "steps")
_NEEDED = {*_ALWAYS, *LABELLED, *sum(_FILLED.values(), ())}


class UnfinishedError(ValueError):
    """Raised for runs from which no table can be made yet."""


def read_runs(path: Path) -> pd.DataFrame:
    """Reads the runs of a CSV file, and adds the label of each one's method.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks a column, or a run lacks what all of its phase have.
    """
    optional = [name for name in COLUMNS if name not in _NEEDED]
    runs = read_csv(path, KINDS, optional, filled=("phase", "method", "lr", "seed", "steps"))
    for phase, names in _FILLED.items():
        check_filled(runs[runs["phase"] == phase], names, path)
    runs = runs.reindex(columns=[*COLUMNS])
    if not without_classes(runs):
        for phases, name in ((("tune", "map", "final"), "val_accuracy"), (("final",), "test_accuracy")):
            check_filled(runs[runs["phase"].isin(phases)], (name,), path)
    runs["label"] = _labels(runs)
    return runs


def without_classes(runs: pd.DataFrame) -> bool:
    """Whether the runs are of a task that has a loss and no accuracy."""
    return "network" in runs and bool(runs["network"].isin(WITHOUT_CLASSES).any())


def measure(runs: pd.DataFrame) -> str:
    """Names the quantity that runs are compared by."""
    if not without_classes(runs):
        return "accuracy, %"
    return "relative error" if runs["network"].eq("pinn").any() else "loss"


def choose(runs: pd.DataFrame) -> pd.DataFrame:
    """Chooses for each method the point with the best mean validation accuracy over the seeds of the tuning runs.

    Without classes it is the point with the smallest mean validation loss; a run that diverged has an infinite one.

    Of equally good points it takes the one with the smallest learning rate, then the largest damping.

    Returns:
        A row for each method, by label: the columns of `POINT`, the score, and the `run` of one of the point's runs.
    """
    tuning = runs[runs["phase"] == "tune"]
    score = tuning["val_accuracy"]
    if without_classes(runs):
        score = -tuning["val_loss"].where(~tuning["diverged"].eq(True), math.inf).fillna(math.inf)
    points = tuning.assign(score=score).groupby(["label", *POINT], dropna=False, sort=False)
    means = points.agg(score=("score", "mean"), run=("run", "first")).reset_index()
    order = means.sort_values(["score", "lr", "damping"], ascending=[False, True, False], kind="stable")
    return order.drop_duplicates("label").set_index("label")


def at_chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """The final runs at the chosen points of their methods; any others are left over from an earlier choice."""
    final, chosen = runs[runs["phase"] == "final"], choose(runs)
    same = [
        label in chosen.index
        and all(_equal(row, chosen.loc[label, name]) for row, name in zip(point, POINT, strict=True))
        for label, *point in final[["label", *POINT]].itertuples(index=False)
    ]
    return final[pd.Series(same, index=final.index, dtype=bool)]


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each method, by label, in the order of the runs.

    Columns: method and the options that tell methods apart; the chosen point; edge, which of its coordinates are the
    smallest or largest that were tried; points, how many were tried; validation and test accuracy in %, or loss where
    there are no classes (val_mean; test_mean and test_std over seeds); seeds, the number of final runs, and diverged,
    how many of them diverged; bytes_per_parameter, the part of it that grows with the network (growing_per_parameter),
    and estimated_per_parameter; step_ms and optimizer_ms where steps were timed; train_ms, a step's CPU time in the
    final runs; the diagnostics and the objective, as means over seeds.

    Raises:
        UnfinishedError: where the runs hold no final one at a chosen point.
    """
    for phase, what in (("tune", "tuning"), ("final", "final")):
        if not runs["phase"].eq(phase).any():
            raise UnfinishedError(f"there are no {what} runs")
    finals, rows = at_chosen(runs), []
    what_counts = "loss" if without_classes(runs) else "accuracy"
    for label, final in finals.groupby("label", sort=False):
        own = runs[runs["label"] == label]
        tried, timing, first = own[own["phase"] == "tune"], own[own["phase"] == "timing"], final.iloc[0]
        edge = [
            name
            for name in POINT
            if tried[name].nunique() > 1 and first[name] in (tried[name].min(), tried[name].max())
        ]
        rows.append(
            {
                "label": label,
                **{name: first[name] for name in ("method", *VARIANT, *POINT, "bytes_per_parameter")},
                "growing_per_parameter": (first["state_bytes"] - first["matrix_bytes"]) / first["numel"],
                "estimated_per_parameter": first["state_bytes_estimated"] / first["numel"],
                "edge": edge,
                "points": tried[[*POINT]].drop_duplicates().shape[0],
                "val_mean": final[f"val_{what_counts}"].mean(),
                "test_mean": final[f"test_{what_counts}"].mean(),
                "test_std": final[f"test_{what_counts}"].std(),
                "seeds": len(final),
                "diverged": int(final["diverged"].eq(True).sum()),
                "step_ms": timing["step_ms"].mean(),
                "optimizer_ms": timing["optimizer_ms"].mean(),
                "train_ms": 1e3 * (final["cpu_seconds"] / final["steps"]).mean(),
                **{name: final[name].mean() for name in (*DIAGNOSTICS, "objective")},
            }
        )
    if not rows:
        raise UnfinishedError("no final run is at the point of its method's grid that the tuning runs choose")
    return pd.DataFrame(rows).set_index("label")


def markdown(summary: pd.DataFrame, columns: Mapping[str, Callable[[pd.Series], str]] | None = None) -> str:
    """The summary as a table in Markdown, aligned for reading as plain text.

    Args:
        summary: the result of `summarise`.
        columns: heads, and functions that make the cells below them; the default is `TIMED`.
    """
    columns = TIMED if columns is None else columns
    rows = ((label, *(cell(row) for cell in columns.values())) for label, row in summary.iterrows())
    return table([("method", *columns), *rows], aligned=True)


Finished = Mapping[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]
"""For each experiment of a file its runs, their summary and the learning curves of the final runs."""


def overview(finished: Finished) -> str:
    """Mean and standard deviation of the test loss or error, a row for each method, a column for each experiment."""
    labels = list(dict.fromkeys(label for _, summary, _ in finished.values() for label in summary.index))
    rows = []
    for label in labels:
        own = [summary.loc[label] if label in summary.index else None for _, summary, _ in finished.values()]
        rows.append((label, *("" if row is None else _loss(row, 3) for row in own)))
    return table([("method", *finished), *rows], aligned=True)


def remarks(runs: pd.DataFrame, summary: pd.DataFrame, timed: bool = True) -> list[str]:
    """Lines on what the table does not say: settings, what is missing, and what went wrong.

    Args:
        runs: the result of `read_runs`.
        summary: the result of `summarise`.
        timed: whether the table has the columns of `TIMED`; otherwise those of `LOOKED_AT`.
    """
    final = at_chosen(runs).iloc[0]
    tuning, seeds = runs[runs["phase"] == "tune"], sorted(summary["seeds"].unique())
    lrs = ", ".join(f"{lr:g}" for lr in sorted(tuning["lr"].unique()))
    greatest = runs[["window", "damping"]].max().dropna()
    fixed = "; " + ", ".join(f"{name} {value:g}" for name, value in greatest.items()) if timed and len(greatest) else ""
    grid = f"Each method's lr: the best of {lrs}" if timed else _budget(summary)
    time = "Steps timed" if timed else "Time of a step: what the final runs computed, beside other runs"
    lines = [
        f"{final['data_set']}, {final['train_size']:,.0f} training {'images' if timed else 'examples'}; "
        f"{final['numel']:,.0f} parameters; {final['epochs']:.0f} epochs, {final['steps']:.0f} steps of batch "
        f"{final['batch_size']:.0f}{fixed}.",
        f"Mean ± standard deviation over {' or '.join(map(str, seeds))} seeds. {grid} on "
        f"the validation split ({tuning['seed'].nunique()} other seed(s)).",
        f"{time} on one thread, sparse windows by the {final['kernels']} kernels; torch {final['torch_version']}.",
    ]
    if not timed:
        dense = estimate_memory(int(final["numel"]), DenseMFAC, window=PAPER_WINDOW)
        lines.append(
            f"Estimated: dense M-FAC with the paper's window of {PAPER_WINDOW:,} takes {dense.total / 1e9:.2g} GB, "
            f"{dense.per_parameter:,.0f} bytes a parameter."
        )
    if diverged := int(tuning["diverged"].eq(True).sum()):
        lines.append(f"{diverged} of {len(tuning)} tuning runs diverged, and count with the accuracy that they had.")
    if unfinished := [label for label in runs["label"].unique() if label not in summary.index]:
        lines.append(f"Missing, since there is no final run at the chosen point: {'; '.join(unfinished)}.")
    if timed and (untimed := summary.index[summary["step_ms"].isna()].tolist()):
        lines.append(f"Steps have not been timed of {'; '.join(untimed)}.")
    for label, row in summary.iterrows():
        if row["diverged"]:
            lines.append(f"{label}: {row['diverged']} of {row['seeds']} final runs diverged.")
        for name in row["edge"]:
            lines.append(f"{label}: the chosen {name} {row[name]:g} lies at the edge of the grid.")
    return lines


def _budget(summary: pd.DataFrame) -> str:
    points = " or ".join(map(str, sorted(summary["points"].unique())))
    return f"Each method was tuned on {points} points, and the best is that"


def _number(name: str, format_spec: str) -> Callable[[pd.Series], str]:
    return lambda row: "" if pd.isna(row[name]) else f"{row[name]:{format_spec}}"


def _tuned(*names: str) -> Callable[[pd.Series], str]:
    """A cell with the first of these options that the method has."""

    def cell(row: pd.Series) -> str:
        name = next((n for n in names if not pd.isna(row[n])), None)
        return "" if name is None else f"{row[name]:g}{' (edge)' if name in row['edge'] else ''}"

    return cell


def _loss(row: pd.Series, digits: int = 4) -> str:
    return f"{row['test_mean']:.{digits}g}" + ("" if pd.isna(row["test_std"]) else f" ± {row['test_std']:.2g}")


def _accuracy(row: pd.Series) -> str:
    return f"{row['test_mean']:.2f}" + ("" if pd.isna(row["test_std"]) else f" ± {row['test_std']:.2f}")


TIMED = {
    "test accuracy, %": _accuracy,
    "lr": _tuned("lr"),
    "state, bytes/param": _number("bytes_per_parameter", ".2f"),
    "estimated": _number("estimated_per_parameter", ".2f"),
    "step, ms": _number("step_ms", ".1f"),
    "optimizer, ms": _number("optimizer_ms", ".1f"),
}
"""Columns of a table of methods whose steps were timed one after the other."""
LOOKED_AT = {
    "test accuracy, %": _accuracy,
    "validation": _number("val_mean", ".2f"),
    "lr": _tuned("lr"),
    "damping or eps": _tuned("damping", "eps"),
    "state, bytes/param": _number("bytes_per_parameter", ".2f"),
    "without m × m": _number("growing_per_parameter", ".2f"),
    "step, ms": _number("train_ms", ".0f"),
    "cos(g, u)": _number("cosine", ".2f"),
    "abs(u/g) Q25": _number("scaling_q25", ".3g"),
    "Q50": _number("scaling_q50", ".3g"),
    "Q75": _number("scaling_q75", ".3g"),
}
"""Columns of a table of methods with diagnostics of their steps."""


def losses_columns(what: str) -> dict[str, Callable[[pd.Series], str]]:
    """Columns of a table of methods on a task without classes, of which `what` is measured."""
    return {
        f"test {what}": _loss,
        "validation": _number("val_mean", ".4g"),
        "lr": _tuned("lr"),
        "damping": _tuned("damping"),
        "state, bytes/param": _number("bytes_per_parameter", ".2f"),
        "without m × m": _number("growing_per_parameter", ".2f"),
        "step, ms": _number("train_ms", ".0f"),
        "cos(g, u)": _number("cosine", ".2f"),
    }


def _labels(runs: pd.DataFrame) -> list[str]:
    """The label of each run's method.

    It shows the window if that is not the window of most runs. It shows block size and dtypes if they are unusual and
    otherwise equal methods differ in them.
    """
    options = runs[["method", *VARIANT]].astype(object)
    options = options.where(options.notna(), None)
    short = [method_label(*row) for row in options[["method", *LABELLED]].itertuples(index=False)]
    groups = options.groupby(short)
    differs = {name: groups[name].nunique(dropna=False) > 1 for name in _SHOWN}
    usual = {**_USUAL, "window": next(iter(runs["window"].mode()), None)}
    labels = []
    for label, (_, row) in zip(short, options.iterrows(), strict=True):
        shown = [name for name in _SHOWN if name == "window" or differs[name][label]]
        unusual = [name for name in shown if row[name] not in (None, usual.get(name))]
        labels.append(", ".join([label, *(f"{_SHOWN[name]} {_word(row[name])}" for name in unusual)]))
    return labels


_SHOWN = {"window": "window", "block_size": "block size", "value_dtype": "values", "error_dtype": "error"}
_USUAL = {"block_size": 4096, "value_dtype": "bfloat16"}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _equal(a: float, b: float) -> bool:
    return a == b or (pd.isna(a) and pd.isna(b))
