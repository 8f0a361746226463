"""Makes a rule for the learning rate and damping of M-FAC on one task, and tests it on others.

    python -m efcp.analysis.rule cnn --on probe resnet20

A point to start from (start.csv) is a pair of lr · m and damping. At each point of the grid, every method loses some
accuracy against its own best point; at the point to start from, the largest of these losses is least. On another task
it is tested at the nearest point of the grid: its validation accuracy is compared with that of the best point.

A rule for the learning rate is tested in rule.csv. If the gradients of the window were orthogonal with squared norm s,
M-FAC's update would be u = g/(λ + s/m). A step lr · u would then be a step of SGD with the rate η = lr/(λ + s/m). The
rule keeps that rate:

    lr = η (λ + s/m)

η is the median of lr/(λ + s/m) over the best learning rates at each damping, in a task's tuning runs. s is the square
of the gradient norm in the best of a method's runs, the median over its steps. On another task the rule is tested at
the nearest point of the grid: its validation accuracy is compared with that of the best point at the same damping.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.analysis.rule")

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from efcp.analysis.methods import DENSE, LOW_RANK, SPARSE
from efcp.analysis.summary import read_runs
from efcp.perf.command import ending, locked
from efcp.perf.tables import check_filled, first_line, write_csv

COLUMNS = {
    "task": "the experiment",
    "method": "",
    "window": "m",
    "damping": "λ",
    "squared_norm": "s",
    "best_lr": "of the grid at this damping, by validation accuracy",
    "best_accuracy": "validation accuracy there, %",
    "rate": "η = best_lr/(λ + s/m)",
    "rule_lr": "what the rule says",
    "tried_lr": "the nearest of the grid",
    "accuracy": "validation accuracy there, %",
    "lost": "best_accuracy − accuracy, points",
}
"""The columns of rule.csv."""
START_COLUMNS = {
    "task": "the experiment",
    "method": "",
    "window": "m",
    "best_lr": "of all tuning runs, by validation accuracy",
    "best_damping": "λ there",
    "best_accuracy": "validation accuracy there, %",
    "tried_lr": "of the point nearest to the start",
    "tried_damping": "λ there",
    "accuracy": "validation accuracy there, %",
    "lost": "best_accuracy − accuracy, points",
}
"""The columns of start.csv."""
Point = tuple[float, float]  # lr · m, damping


def read_tuning(folder: Path) -> pd.DataFrame:
    """Reads the runs that tuned damping and learning rate of M-FAC, without those that have no error feedback.

    Raises:
        FileNotFoundError, ValueError: if there are none.
    """
    runs = read_runs(folder / "runs.csv")
    own = runs[runs["phase"].isin(["tune", "map"]) & runs["method"].isin([DENSE, SPARSE, LOW_RANK])]
    own = own[own["error_feedback"].ne(False)]
    if own.empty:
        raise ValueError(f"{folder / 'runs.csv'} has no tuning runs of {DENSE}, {SPARSE} or {LOW_RANK}")
    check_filled(own, ("window", "damping", "grad_norm"), folder / "runs.csv")
    if (wrong := own[["lr", "damping", "window"]].le(0).any(axis=1)).any():
        where = f"{folder / 'runs.csv'}, line {first_line(wrong)}"
        raise ValueError(f"{where}: lr, damping and window must be > 0, since points are compared by their ratios")
    return own


def start(runs: pd.DataFrame) -> Point:
    """The point to start from: of those that all methods have tried, the one whose greatest loss over methods is least.

    Raises:
        ValueError: if there is none.
    """
    runs = runs.assign(scaled=runs["lr"] * runs["window"])
    accuracy = runs.pivot_table(index=["label", "window"], columns=["scaled", "damping"], values="val_accuracy").T
    greatest = (accuracy.max() - accuracy).dropna().max(axis=1)
    if greatest.empty:
        raise ValueError(f"no point lr · window, damping has been tried by all of {', '.join(runs['label'].unique())}")
    scaled, damping = greatest.index[int(greatest.argmin())]
    return scaled, damping


def started(task: str, runs: pd.DataFrame, point: Point) -> list[dict[str, Any]]:
    """Tests a point on a task; returns rows of start.csv."""
    rows = []
    for (label, window), own in runs.groupby(["label", "window"], sort=False):
        ratios = own[["lr", "damping"]] / [point[0] / window, point[1]]
        near, best = own.loc[ratios.map(math.log).abs().sum(axis=1).idxmin()], _best(own)
        rows.append(
            {
                "task": task,
                "method": label,
                "window": int(window),
                "best_lr": best["lr"],
                "best_damping": best["damping"],
                "best_accuracy": best["val_accuracy"],
                "tried_lr": near["lr"],
                "tried_damping": near["damping"],
                "accuracy": near["val_accuracy"],
                "lost": round(best["val_accuracy"] - near["val_accuracy"], 2),
            }
        )
    return rows


def best_points(runs: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.DataFrame, float]]:
    """Yields for each method and damping the best run, all runs, and the squared norm of the method's gradients."""
    for _, own in runs.groupby(["label", "window"], sort=False):
        squared_norm = float(_best(own)["grad_norm"]) ** 2
        for _, some in own.groupby("damping"):
            yield _best(some), some, squared_norm


def fitted_rate(runs: pd.DataFrame) -> float:
    """The rate η of the rule, from the tuning runs of a task."""
    rates = [best["lr"] / _scale(best, norm) for best, _, norm in best_points(runs)]
    return float(pd.Series(rates).median())


def tested(task: str, runs: pd.DataFrame, rate: float) -> list[dict[str, Any]]:
    """Tests the rule on a task; returns rows of rule.csv."""
    rows = []
    for best, some, norm in best_points(runs):
        lr = rate * _scale(best, norm)
        near = some.iloc[int((some["lr"] / lr).map(math.log).abs().argmin())]
        rows.append(
            {
                "task": task,
                "method": best["label"],
                "window": int(best["window"]),
                "damping": best["damping"],
                "squared_norm": float(f"{norm:.3g}"),
                "best_lr": best["lr"],
                "best_accuracy": best["val_accuracy"],
                "rate": float(f"{best['lr'] / _scale(best, norm):.3g}"),
                "rule_lr": float(f"{lr:.3g}"),
                "tried_lr": near["lr"],
                "accuracy": near["val_accuracy"],
                "lost": round(best["val_accuracy"] - near["val_accuracy"], 2),
            }
        )
    return rows


def _best(runs: pd.DataFrame) -> pd.Series:
    return runs.iloc[int(runs["val_accuracy"].argmax())]


def _scale(run: pd.Series, squared_norm: float) -> float:
    return float(run["damping"] + squared_norm / run["window"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m efcp.analysis.rule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="the experiment that the rule is made from")
    parser.add_argument("--on", nargs="*", default=[], help="experiments that it is tested on")
    parser.add_argument("--results", type=Path, default=Path("analysis/results"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with ending(parser, "the same command begins anew"), locked(args.results):
        _write(args.task, {task: read_tuning(args.results / task) for task in (args.task, *args.on)}, args.results)


def _write(task: str, runs: dict[str, pd.DataFrame], folder: Path) -> None:
    """Makes rule and point from a task, and writes and prints both tables over all tasks."""
    rate, point = fitted_rate(runs[task]), start(runs[task])
    for name, columns, rows, title in (
        ("rule", COLUMNS, [row for t, own in runs.items() for row in tested(t, own, rate)], f"rate {rate:.3g}"),
        (
            "start",
            START_COLUMNS,
            [row for t, own in runs.items() for row in started(t, own, point)],
            f"lr {point[0]:g}/m, damping {point[1]:g}",
        ),
    ):
        frame = pd.DataFrame(rows, columns=list(columns))
        write_csv(frame, folder / f"{name}.csv")
        print(f"{frame.to_string(index=False)}\n\n{title}, from {task}; points lost, over the rows of a task:")
        print(f"{frame.groupby('task', sort=False)['lost'].agg(['median', 'max']).to_string()}\n")
