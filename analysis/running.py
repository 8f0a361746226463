"""Many runs: several at once, with a progress bar, and a CSV file that holds every record as soon as there is one."""

import csv
import multiprocessing
import pickle
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from efcp.analysis.data import DataSet
from efcp.analysis.training import COLUMNS, PLAN, TASK, Run, train


class RecordFile:
    """A CSV file of records that is whole after every record, whatever happens to the process."""

    def __init__(self, path: Path, resume: bool) -> None:
        """Starts a file anew, with the first record, or goes on with the records of an earlier one."""
        self.path = path
        self.rows: dict[tuple[str, ...], dict[str, str]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    self.rows[_key(row)] = row

    def __contains__(self, run: Run) -> bool:
        return _key(run.plan) in self.rows

    def check(self, runs: Iterable[Run]) -> None:
        """Raises ValueError where records of the file come from other settings than runs that are to join them."""
        for name in (*TASK, "window", "damping"):
            own = {_text(run.plan[name]) for run in runs} - {""}
            if other := {row.get(name, "?") for row in self.rows.values()} - {""} - own:
                raise ValueError(
                    f"{self.path} holds runs with {name} {', '.join(sorted(other))}, not {', '.join(sorted(own))}: "
                    "choose another --out, or leave out --resume to start anew"
                )

    def add(self, record: dict[str, Any]) -> None:
        self.rows[_key(record)] = {name: _text(record.get(name)) for name in COLUMNS}
        self._write()

    def sort(self, runs: Iterable[Run]) -> None:
        """Puts these runs first, in their order; before, it is that in which runs finished."""
        first = {_key(run.plan): self.rows[_key(run.plan)] for run in runs}
        self.rows = {**first, **self.rows}
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        partial.replace(self.path)


class Trainer:
    """Trains runs, in processes of their own where jobs > 1; records come as runs finish."""

    def __init__(self, data: DataSet, jobs: int) -> None:
        self.data = data
        self.pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")  # a fork would inherit threads that compute
            self.pool = ProcessPoolExecutor(jobs, context, _start_worker, (pickle.dumps(data),))

    def __call__(self, runs: list[Run]) -> Iterator[dict[str, Any]]:
        if self.pool is None:
            yield from (train(run, self.data) for run in runs)
        else:
            for future in as_completed([self.pool.submit(_train_in_worker, run) for run in runs]):
                yield future.result()

    def complete(self, runs: list[Run], records: RecordFile, name: str) -> None:
        """Trains what the records lack of the runs, under a progress bar of that name."""
        missing = [run for run in runs if run not in records]
        with tqdm(total=len(runs), initial=len(runs) - len(missing), desc=name, unit="run") as bar:
            for record in self(missing):
                records.add(record)
                bar.update()

    def close(self) -> None:
        """Ends the processes, after the runs that they are at; the others are dropped."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


_worker_data: DataSet


def _start_worker(data: bytes) -> None:
    """Keeps the data set of all runs. It comes as bytes, so that no memory is shared."""
    global _worker_data
    _worker_data = pickle.loads(data)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the parent, which ends the pool


def _train_in_worker(run: Run) -> dict[str, Any]:
    return train(run, _worker_data)


def _key(plan: dict[str, Any]) -> tuple[str, ...]:
    """What tells a record from all others of an experiment."""
    return tuple(_text(plan.get(name)) for name in PLAN)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
