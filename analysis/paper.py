"""Tests the paper's claims on real data: runs experiments from files, each with its CSVs, table and plots.

    python -m efcp.analysis.paper

Every experiment trains many methods on one task. Each method has the same number of points of a grid (learning rate,
and damping or what else it has), epochs, schedule and seeds. The best point is chosen on the validation split, with
other seeds than those of the final runs. Each final run evaluates the test split once. Each experiment has a folder
with `runs.csv`, a row for each run; `curves.csv` and `diagnostics.csv`, what happened within the final runs; and a
table and plots made from them.

A run that is in the CSV is never repeated: the same command goes on from there.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.analysis.paper")

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from efcp.analysis.comparison import comparison_figures, overview_figure
from efcp.analysis.data import DataSet
from efcp.analysis.experiments import Experiment, find_experiment, names, read_experiments
from efcp.analysis.figures import ExperimentFiles, figures
from efcp.analysis.methods import DENSE, LOW_RANK, SPARSE
from efcp.analysis.optimum import keep_optimum
from efcp.analysis.running import Plan, RecordFile, Trainer, cores
from efcp.analysis.summary import (
    LOOKED_AT,
    UnfinishedError,
    losses_columns,
    markdown,
    measure,
    overview,
    remarks,
    without_classes,
)
from efcp.analysis.tasks import load_task_data
from efcp.analysis.training import time_steps
from efcp.perf.command import FAILURES, ending, explain, locked
from efcp.perf.tables import table

EXAMPLES = """\
examples:
  two experiments, on two cores:
    python -m efcp.analysis.paper probe cnn-ablations --jobs 2
  an hour of work now, the rest later, by the same command:
    python -m efcp.analysis.paper --minutes 60
  how long each method takes for an evaluation of loss and gradient, with its share of the optimizer's step:
    python -m efcp.analysis.paper pinns-more-points --times
  remake tables and plots from the CSVs:
    python -m efcp.analysis.paper --plot-only
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    errors = []
    with ending(parser, f"finished runs are in {args.out}, and the same command goes on from there"):
        experiments = [
            experiment for name in args.names or names() for experiment in read_experiments(find_experiment(name))
        ]
        for experiment in experiments:
            folder = args.out / experiment.name
            try:
                if args.times:
                    print(times(experiment, args.data_dir), flush=True)
                    continue
                if args.plot_only and not folder.is_dir():
                    print(f"{folder}: no table yet, there is no such folder")
                elif args.plot_only:
                    with locked(folder):
                        report(experiment, folder)
                else:
                    task = experiment.task
                    data = load_task_data(task["data_set"], task.get("train_size"), args.data_dir)
                    plans = experiment.plans(data)
                    folder.mkdir(parents=True, exist_ok=True)
                    with locked(folder):
                        run_experiment(experiment.name, data, plans, folder, args.jobs, end)
                        report(experiment, folder)
                if experiment.group:
                    report_group(experiment.group, [e for e in experiments if e.group == experiment.group], args.out)
            except FAILURES as error:  # data that is not there, say: the others can go on
                errors.append(f"{experiment.name}: {explain(error)}")
                print(errors[-1], file=sys.stderr)
    if errors:
        parser.exit(2, "".join(f"{parser.prog}: error: {error}\n" for error in errors))


def run_experiment(
    name: str, data: DataSet, plans: Sequence[Plan], folder: Path, jobs: int, end: float | None = None
) -> None:
    """Tunes and trains all methods; writes `runs.csv`, `curves.csv` and `diagnostics.csv` as runs finish.

    Args:
        name: of the experiment.
        data: what it learns from.
        plans: their runs are trained, unless they are in the folder's records.
        folder: for the CSV files.
        jobs: runs at once.
        end: time.monotonic() after which no more runs are started; None for no limit.

    Raises:
        ValueError: if the folder holds runs that the plans do not have.
    """
    records = RecordFile(folder / "runs.csv")
    records.check(plans)
    if (task := plans[0].tuning[0].task).l2:
        keep_optimum(task, data, folder)
    with Trainer(data, jobs) as trainer:
        trainer.complete(plans, records, name, end)
    records.sort([run for plan in plans for run in plan.known(records)])


def times(experiment: Experiment, directory: Path | None) -> str:
    """A table in Markdown of the time of an evaluation with each method, in turn on one thread; nothing is kept."""
    data = load_task_data(experiment.task["data_set"], experiment.task.get("train_size"), directory)
    runs = [plan.tuning[0] for plan in experiment.plans(data)]
    milliseconds = [record["evaluation_ms"] for record in time_steps(runs, data, steps=20, warm_up=5)]
    rows = [(run.method.label, f"{ms:.1f}") for run, ms in zip(runs, milliseconds, strict=True)]
    return table([(experiment.name, "CPU time of an evaluation, ms"), *rows], aligned=True)


def report(experiment: Experiment, folder: Path) -> None:
    """Writes table and plots from the CSV files in a folder, or prints that no method has finished yet.

    Raises:
        ValueError: if a file is damaged.
    """
    results = ExperimentFiles(folder, experiment.title)
    try:
        summary = results.summary
    except (FileNotFoundError, UnfinishedError) as error:
        print(f"{folder}: no table yet, {error}")
        return
    lines = "\n".join(f"- {line}" for line in remarks(results.runs, summary, timed=False))
    losses = without_classes(results.runs)
    columns = losses_columns(measure(results.runs)) if losses else LOOKED_AT
    text = f"{markdown(summary, columns)}\n\n{lines}\n"
    (folder / "table.md").write_text(text, encoding="utf-8")
    if losses or not summary["method"].isin([DENSE, SPARSE, LOW_RANK]).any():
        drawn = comparison_figures(results.runs, summary, results.curves, experiment.title)
    else:
        drawn = figures(results)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png")
    print(f"Written to {folder}: table.md, {', '.join(f'{name}.png' for name in drawn)}")


def report_group(name: str, experiments: Sequence[Experiment], out: Path) -> None:
    """Writes a table and a plot of all the experiments of a file, as far as they are finished.

    Raises:
        ValueError: if a file is damaged.
    """
    finished = {}
    for experiment in experiments:
        try:
            results = ExperimentFiles(out / experiment.name, experiment.title)
            finished[experiment.name.rpartition("/")[2]] = results.runs, results.summary, results.curves
        except (FileNotFoundError, UnfinishedError):
            continue
    if not finished:
        return
    (out / name / "overview.md").write_text(f"{overview(finished)}\n", encoding="utf-8")
    overview_figure(finished, experiments[0].title.rpartition(": ")[0]).savefig(out / name / "overview.png")
    print(f"Written to {out / name}: overview.md, overview.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efcp.analysis.paper",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(names())
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"experiments, by name or .toml file (default: all of {known})"
    )
    parser.add_argument("--jobs", type=int, default=cores(), help="runs at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("analysis/results"), help="(default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, help="folder of the data sets (default: $EFCP_DATA)")
    parser.add_argument("--minutes", type=float, help="minutes after which no more runs are started")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--times", action="store_true", help="time a few steps of each method, and train nothing")
    instead.add_argument("--plot-only", action="store_true", help="remake tables and plots from the CSVs of --out")
    return parser
