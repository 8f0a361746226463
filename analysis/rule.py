"""A rule for the learning rate of M-FAC from damping, window and gradient norm: made on one task, tested on others.

    python -m efcp.analysis.rule cnn --on probe resnet20

Were the gradients of the window orthogonal and of squared norm s, M-FAC's update would be u = g/(λ + s/m), and
a step lr · u one of SGD with the rate η = lr/(λ + s/m). The rule keeps that rate:

    lr = η (λ + s/m)

η is the median of lr/(λ + s/m) over the best rates at each damping, in a task's tuning runs of dense and sparse
M-FAC; s is the square of the gradient norm, median over the best of a method's runs. On another task the rule is worth
what validation accuracy its rate gives, at the nearest point of the grid, against the best point at the same damping.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from efcp.analysis.methods import DENSE, SPARSE
from efcp.analysis.summary import read_runs

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


def read_tuning(folder: Path) -> pd.DataFrame:
    """The runs that chose damping and learning rate of dense and sparse M-FAC with error feedback, of an experiment.

    Raises:
        FileNotFoundError, ValueError: if there are none.
    """
    runs = read_runs(folder / "runs.csv")
    own = runs[runs["phase"].isin(["tune", "map"]) & runs["method"].isin([DENSE, SPARSE])]
    own = own[own["error_feedback"].ne(False)]
    if own.empty:
        raise ValueError(f"{folder / 'runs.csv'} has no tuning runs of {DENSE} or {SPARSE}")
    return own


def best_points(runs: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.DataFrame, float]]:
    """For each method and damping its best run, all its runs, and the squared norm of the method's gradients."""
    for _, own in runs.groupby(["label", "window"], sort=False):
        squared_norm = float(_best(own)["grad_norm"]) ** 2
        for _, some in own.groupby("damping"):
            yield _best(some), some, squared_norm


def fitted_rate(runs: pd.DataFrame) -> float:
    """η of the rule."""
    rates = [best["lr"] / _scale(best, norm) for best, _, norm in best_points(runs)]
    return float(pd.Series(rates).median())


def tested(task: str, runs: pd.DataFrame, rate: float) -> list[dict[str, Any]]:
    """How the rule does on a task: rows of rule.csv."""
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
    try:
        own = read_tuning(args.results / args.task)
        rate = fitted_rate(own)
        rows = tested(args.task, own, rate)
        for task in args.on:
            rows += tested(task, read_tuning(args.results / task), rate)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.to_csv(args.results / "rule.csv", index=False)
    print(frame.to_string(index=False))
    lost = frame.groupby(["task", "method"], sort=False)["lost"]
    print(f"\nrate {rate:.3g}, from {args.task}; points lost, median and most over damping:")
    print(lost.agg(["median", "max"]).to_string())


if __name__ == "__main__":
    main()
