"""Trains many runs, several at once, with a progress bar; each record is in a CSV file as soon as its run ends."""

import csv
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from tqdm import tqdm

from efcp.analysis.data import DataSet
from efcp.analysis.methods import TUNED, VARIANT
from efcp.analysis.summary import choose, read_runs
from efcp.analysis.training import COLUMNS, CURVE_COLUMNS, DIAGNOSTICS_COLUMNS, TASK, Result, Run, text, train
from efcp.perf.command import workers
from efcp.perf.tables import read_rows

T = TypeVar("T")
_POINT = ("method", *VARIANT, *TUNED, "lr")
_OTHER_FOLDER = "choose another --out, or the settings of these runs"


@dataclass(frozen=True)
class Plan:
    """The runs of a method: those that choose a point of its grid, those at the chosen point, and any others."""

    tuning: Sequence[Run]
    final_seeds: Sequence[int]
    others: Sequence[Run] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tuning) + len(self.final_seeds) + len(self.others)

    def known(self, records: "RecordFile") -> list[Run]:
        """All runs that are known by now. The final ones are known once tuning is complete."""
        return [*self.tuning, *self._final(records), *self.others]

    def _final(self, records: "RecordFile") -> list[Run]:
        if not all(run in records for run in self.tuning):
            return []
        runs = read_runs(records.path)
        best = choose(runs[runs["run"].isin([run.key for run in self.tuning])])["run"].item()
        chosen = next(run for run in self.tuning if run.key == best)
        return [replace(chosen, phase="final", seed=seed) for seed in self.final_seeds]


class RecordFile:
    """A CSV file of records that is whole after every record, even if the process is killed.

    Learning curves and diagnostics are in two more files beside it, if there are any.
    """

    def __init__(self, path: Path) -> None:
        """Reads the records that the file already holds, if it is there.

        Raises:
            ValueError: if it is another kind of file, or damaged.
        """
        self.path = path
        self.rows: dict[str, dict[str, str]] = {}
        self.details = {
            path.with_name("curves.csv"): (CURVE_COLUMNS, dict[str, list[dict[str, str]]]()),
            path.with_name("diagnostics.csv"): (DIAGNOSTICS_COLUMNS, dict[str, list[dict[str, str]]]()),
        }
        if path.exists():
            self.rows = {row["run"]: row for row in read_rows(path, COLUMNS)}
            for file, (columns, rows) in self.details.items():
                for row in read_rows(file, columns) if file.exists() else []:
                    if row["run"] in self.rows:  # else the run was not finished
                        rows.setdefault(row["run"], []).append(row)

    def __contains__(self, run: Run) -> bool:
        return run.key in self.rows

    def check(self, plans: Sequence[Plan]) -> None:
        """Raises ValueError if the file holds runs that these plans do not have.

        The plans may have more: methods, points of a grid, seeds. Final runs may be at any point of their grid, since
        more points can lead to another choice.
        """
        if not self.rows:
            return
        runs = [run for plan in plans for run in (*plan.tuning, *plan.others)]
        for name in (*TASK, *_POINT):
            own = {text(run.settings[name]) for run in runs} - {""}
            if other := {row[name] for row in self.rows.values()} - {""} - own:
                raise ValueError(
                    f"{self.path} holds runs with {name} {', '.join(sorted(other))}, not {', '.join(sorted(own))}: "
                    f"{_OTHER_FOLDER}"
                )
        keys, points = {run.key for run in runs}, {_point(run.settings) for run in runs}
        for key, row in self.rows.items():
            if (key not in keys) if row["phase"] in ("tune", "map") else (_point(row) not in points):
                what = ", ".join(f"{name} {row[name]}" for name in ("phase", *_POINT, "seed") if row[name])
                raise ValueError(f"{self.path} holds a run that these settings do not have, {what}: {_OTHER_FOLDER}")

    def add(self, record: dict[str, Any]) -> None:
        self.rows[record["run"]] = _texts(record, COLUMNS)
        self._save()

    def add_result(self, result: Result) -> None:
        """Adds a record and its details. Details are written first, since a run with a record counts as finished."""
        for (file, (columns, rows)), own in zip(self.details.items(), (result.curve, result.diagnostics), strict=True):
            if own:
                rows[result.record["run"]] = [_texts(row, columns) for row in own]
                self._save_details(file)
        self.add(result.record)

    def sort(self, runs: Sequence[Run]) -> None:
        """Puts the records of these runs first, in their order. Until then they stand in the order of finishing."""
        self.rows = _sorted(self.rows, runs)
        self._save()
        for name, (columns, rows) in self.details.items():
            self.details[name] = columns, _sorted(rows, runs)
            self._save_details(name)

    def _save(self) -> None:
        if self.rows:
            _write(self.path, COLUMNS, self.rows.values())

    def _save_details(self, path: Path) -> None:
        columns, rows = self.details[path]
        if rows or path.exists():
            _write(path, columns, (row for some in rows.values() for row in some))


class Trainer:
    """Trains runs, in processes of their own where jobs > 1; results come as runs finish."""

    def __init__(self, data: DataSet, jobs: int) -> None:
        self.data, self.jobs = data, jobs
        self.pool: ProcessPoolExecutor | None = None
        self._open = ExitStack()
        if jobs > 1:
            folder = Path(self._open.enter_context(TemporaryDirectory(prefix="efcp-")))
            (folder / "data").write_bytes(pickle.dumps(data))
            self.pool = self._open.enter_context(workers(jobs, _start_worker, (folder / "data",)))

    def __call__(self, runs: Iterable[Run]) -> Iterator[Result]:
        """Yields results as runs finish. A run is taken only when it can start, so it may depend on earlier results.

        Raises:
            ChildProcessError: where a process has died.
        """
        if self.pool is None:
            yield from (train(run, self.data) for run in runs)
            return
        queue, training = iter(runs), set[Future[Result]]()
        while True:
            while len(training) < self.jobs and (run := next(queue, None)) is not None:
                training.add(self.pool.submit(_train_in_worker, run))
            if not training:
                return
            done, training = wait(training, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)

    def complete(self, plans: Sequence[Plan], records: RecordFile, name: str, end: float | None = None) -> None:
        """Trains the runs of the plans that the records lack, plan by plan, with a progress bar.

        Args:
            plans: a later plan begins while the last tuning runs of an earlier one still go on.
            records: where the results are added.
            name: of the bar.
            end: time.monotonic() after which no more runs are started; None for no limit.
        """
        known = sum(run in records for plan in plans for run in plan.known(records))
        with tqdm(total=sum(map(len, plans)), initial=known, desc=name, unit="run", smoothing=0.05) as bar:
            for result in self(_Missing(plans, records, end)):
                records.add_result(result)
                bar.update()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: Any) -> None:
        """Ends the processes, and drops the runs that have not finished."""
        self._open.__exit__(*error)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Missing:
    """Yields the runs still to do. It stops where the next ones depend on unfinished tuning, and can go on later."""

    def __init__(self, plans: Sequence[Plan], records: RecordFile, end: float | None) -> None:
        self.plans, self.records, self.end = list(plans), records, end
        self.started: set[str] = set()

    def __iter__(self) -> "_Missing":
        return self

    def __next__(self) -> Run:
        if self.end is not None and time.monotonic() >= self.end:
            raise StopIteration
        for plan in list(self.plans):
            runs = plan.known(self.records)
            for run in runs:
                if run not in self.records and run.key not in self.started:
                    self.started.add(run.key)
                    return run
            if len(runs) == len(plan):
                self.plans.remove(plan)
        raise StopIteration


_worker_data: DataSet


def _start_worker(data: Path) -> None:
    """Keeps the data set for all runs in this process. It comes in a file, so that no memory is shared."""
    global _worker_data
    _worker_data = pickle.loads(data.read_bytes())


def _train_in_worker(run: Run) -> Result:
    return train(run, _worker_data)


def _sorted(rows: dict[str, T], runs: Sequence[Run]) -> dict[str, T]:
    return {**{run.key: rows[run.key] for run in runs if run.key in rows}, **rows}


def _point(row: dict[str, Any]) -> tuple[str, ...]:
    """The method and grid point of a run's settings or of a record."""
    return tuple(text(row[name]) for name in _POINT)


def _texts(row: dict[str, Any], columns: Iterable[str]) -> dict[str, str]:
    return {name: text(row.get(name)) for name in columns}


def _write(path: Path, columns: Iterable[str], rows: Iterable[dict[str, str]]) -> None:
    partial = path.with_suffix(".part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
