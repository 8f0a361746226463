"""Memory against accuracy: what compressing the gradient window costs, and what error feedback gives back.

    python -m efcp.analysis.tradeoff

A small network learns to classify real images with SGD, Adam, dense M-FAC, sparse M-FAC at several densities with and
without error feedback, and sparse GGT. Every method has the same epochs, schedule, seeds and grid of learning rates.
Its learning rate is chosen on the validation split, with other seeds than those of the final runs. Each final run
evaluates the test split once. Damping is the same for all. The output folder gets `runs.csv`, with a row for each run,
`table.md` and `tradeoff.png`.

A run that is in the CSV is never repeated: the same command goes on from there. A folder with runs of other settings is
refused.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.analysis.tradeoff")

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from efcp.analysis.data import NAMES, DataSet, load_data, resolve_name
from efcp.analysis.methods import compared_methods
from efcp.analysis.plots import plot_tradeoff
from efcp.analysis.running import Plan, RecordFile, Trainer, cores
from efcp.analysis.summary import UnfinishedError, at_chosen, markdown, read_runs, remarks, summarise
from efcp.analysis.tasks import Task
from efcp.analysis.training import Run, time_steps
from efcp.perf.command import ending, locked

LRS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
_FIRST_TUNING_SEED = 1000  # far from those of final runs, which count from 0

EXAMPLES = """\
examples:
  the default, of a few minutes:
    python -m efcp.analysis.tradeoff
  remake table and plot from an earlier run's CSV:
    python -m efcp.analysis.tradeoff --plot-only --out results/tradeoff
  larger: Fashion-MNIST from a folder, all training images, five seeds, tuned on two, more densities:
    python -m efcp.analysis.tradeoff --data fashion-mnist --data-dir ~/data/fashion-mnist --train-size 55000 \\
        --epochs 5 --batch-size 128 --window 128 --densities 0.1 0.03 0.01 0.003 0.001 --seeds 5 --tune-seeds 2 \\
        --out results/tradeoff-large
  low-rank M-FAC as well, and its sensitivity to rank and power iterations:
    python -m efcp.analysis.tradeoff --ranks 1 2 4 --power-iterations 1 4 --out results/tradeoff-low-rank
  go on after an interruption:
    the same command
  more seeds, learning rates or methods beside what is there:
    the same command with more of them
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    with ending(parser, f"finished runs are in {args.out}, and the same command goes on from there"):
        planned = None if args.plot_only else plan_experiment(args)
        if planned:
            args.out.mkdir(parents=True, exist_ok=True)
        with locked(args.out):
            if planned:
                run_experiment(*planned, args.out, args.jobs)
            report(args.out)


def plan_experiment(args: argparse.Namespace) -> tuple[DataSet, list[Plan]]:
    """The data set, and the runs of each method.

    Raises:
        ValueError, FileNotFoundError: for settings that cannot work.
    """
    lists = {name: getattr(args, name) for name in ("lrs", "densities", "ranks", "power_iterations")}
    for name, values in lists.items():
        if len(set(values)) < len(values):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be distinct, got {' '.join(map(str, values))}")
    name = resolve_name(args.data, args.data_dir)
    data = load_data(name, args.data_dir, args.train_size)
    train_size, *shape = data.train.inputs.shape
    if args.batch_size > train_size:
        raise ValueError(f"--batch-size must be at most the training size {train_size}, got {args.batch_size}")
    task = Task("small-cnn", name, tuple(shape), train_size, args.epochs, args.batch_size, width=args.width)
    methods = compared_methods(args.window, args.damping, args.densities, args.ranks, args.power_iterations)
    tuning_seeds = range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + args.tune_seeds)
    return data, [
        Plan([Run("tune", task, m, lr, seed) for lr in sorted(args.lrs) for seed in tuning_seeds], range(args.seeds))
        for m in methods
    ]


def run_experiment(data: DataSet, plans: Sequence[Plan], folder: Path, jobs: int) -> None:
    """Tunes, trains and times all runs that the folder's `runs.csv` lacks; writes them to it as they finish.

    Raises:
        ValueError: if the file holds runs that the plans do not have.
    """
    records = RecordFile(folder / "runs.csv")
    records.check(plans)
    steps = sum(map(len, plans)) * plans[0].tuning[0].steps
    print(
        f"{data.name}: {len(data.train.labels):,} training images, {len(plans)} methods, {steps:,} steps in all",
        flush=True,
    )
    if records.rows:
        print(f"{records.path} holds {len(records.rows)} runs, which are kept; for new ones choose another --out")
    with Trainer(data, jobs) as trainer:
        trainer.complete(plans, records, "training")
    known = [run for plan in plans for run in plan.known(records)]
    final = [run for run in known if run.phase == "final"]
    timing = [replace(run, phase="timing") for run in final if run.seed == 0]
    if missing := [run for run in timing if run not in records]:
        for record in time_steps(missing, data):
            records.add(record)
    records.sort([*(run for run in known if run.phase == "tune"), *final, *timing])


def report(folder: Path) -> None:
    """Prints and writes the table, and draws the plot, from the CSV in a folder."""
    path = folder / "runs.csv"
    runs = read_runs(path)
    try:
        summary = summarise(runs)
    except UnfinishedError as error:
        raise ValueError(f"{path} is not finished: {error}") from error
    text = markdown(summary) + "\n\n" + "\n".join(f"- {line}" for line in remarks(runs, summary)) + "\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    first, window = at_chosen(runs).iloc[0], runs["window"].max()
    title = f"{first['data_set']}, CNN of {first['numel']:,.0f} parameters"
    if window > 0:  # NaN where no method has a window
        title += f", window {window:g}"
    plot_tradeoff(summary, title, folder / "tradeoff.png")
    print(f"\n{text}\nWritten to {folder}: runs.csv, table.md, tradeoff.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efcp.analysis.tradeoff",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=_HelpFormatter,
    )
    count, positive, share = _number(int, 1), _number(float, 0, open_low=True), _number(float, 0, 1, open_low=True)
    parser.add_argument("--data", choices=("auto", *NAMES), default="auto", help="auto: Fashion-MNIST where found")
    parser.add_argument(
        "--data-dir", type=Path, help="folder of Fashion-MNIST's IDX files; else EFCP_DATA is looked at"
    )
    parser.add_argument("--train-size", type=count, help="training images (3,000 of MNIST 5k, 4,000 of Fashion-MNIST)")
    parser.add_argument("--epochs", type=count, default=5)
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--width", type=count, default=16, help="of the network: 16 gives 105,866 parameters")
    parser.add_argument("--window", type=count, default=64, help="gradients kept, m")
    parser.add_argument("--densities", type=share, nargs="+", default=[0.1, 0.01, 0.001], help="of sparse M-FAC, k/d")
    parser.add_argument("--ranks", type=count, nargs="*", default=[], help="of low-rank M-FAC; none: leave it out")
    parser.add_argument("--power-iterations", type=count, nargs="+", default=[1], help="of low-rank M-FAC, each step")
    parser.add_argument("--damping", type=positive, default=3e-3, help="of M-FAC, λ")
    parser.add_argument("--lrs", type=positive, nargs="+", default=list(LRS), help="the grid, the same for all methods")
    parser.add_argument("--seeds", type=count, default=3, help="final runs of each method")
    parser.add_argument("--tune-seeds", type=count, default=1, help="tuning runs of each method at each lr")
    parser.add_argument("--jobs", type=count, default=cores(), help="runs at once")
    parser.add_argument("--out", type=Path, default=Path("results/tradeoff"), help="folder for CSV, table and plot")
    parser.add_argument("--plot-only", action="store_true", help="remake table and plot from the CSV of --out")
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of description and examples."""


def _number(
    kind: Callable[[str], float], low: float, high: float = math.inf, *, open_low: bool = False
) -> Callable[[str], float]:
    """A type of argument: a finite number in [low, high], or in (low, high] where `open_low`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value) or (open_low and value == low):
            what = "an integer" if kind is int else "a number"
            bounds = f"{'>' if open_low else '≥'} {low:g}" + (f" and ≤ {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text!r}")
        return value

    return parse
