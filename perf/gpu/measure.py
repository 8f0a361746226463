"""Checks and measures the kernels on a GPU in one command, with nothing installed but PyTorch and its Triton.

    make gpu                                # at most ten minutes, into results/gpu
    python -m efcp.perf.gpu.measure         # the same, from the root of the repository
    python -m efcp.perf.gpu.measure --rehearse --out /tmp/rehearsal   # without a GPU: small sizes, in gpusim

The same command goes on from what is in its folder. Stages, the most important first:

| stage | what | compared with |
|---|---|---|
| tests | the tests that need a GPU, where pytest is installed | |
| checks | every operation, for all dtypes, block sizes from 256 to 32768 and two densities | the definition |
| operations | time and bandwidth, over densities, windows, block sizes and dtypes; eager, from a CUDA graph | a copy |
| steps | whole steps of all optimizers of `steps.py`; eager, and from a CUDA graph | fused AdamW |
| autotune | operations with the fastest configuration, over densities and block sizes | the default |

Each line of measured.csv is one measurement. Its `status` is "ok"; "wrong", which is a bug in a kernel; or the reason
why there is none. summary.md has tables, and what is left to do. All is smaller than 16 MiB.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.gpu.measure")

import argparse
import csv
import gc
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from efcp.perf.command import ending, locked, reason
from efcp.perf.gpu.gpusim import simulate
from efcp.perf.implementations import DEFINITION, OPERATIONS, OURS, agree
from efcp.perf.machine import available_bytes, environment
from efcp.perf.problems import DTYPES, Case, Problem
from efcp.perf.steps import ADAMW, MODELS, OPTIMIZERS, Models, layers, ready, refusal, with_gradients
from efcp.perf.timing import Call, Timer

__all__ = ["COLUMNS", "main"]

COLUMNS = ("stage", "what", "case", "status", "ms", "graph ms", "GB/s", "of a copy", "default ms")
MINUTES = 10.0
SECONDS = 0.2  # how long to repeat a measurement
TESTS = ("tests/kernels/test_gpu.py", "tests/efcp/test_gpu.py", "tests/kernels/test_triton.py")
PRINTED = 1 << 20  # bytes of the tests' output that are kept

Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large the measurements are.

    Attributes:
        numel: elements of the parameter in `operations` and `autotune`.
        checked: elements in `checks`, of block sizes `checked_blocks`; a multiple of the largest.
        windows: the first is that of `checks` and `autotune`.
        densities, block_sizes, dtypes: of `operations`.
        models: whose steps are taken.
        optimizers: that take them.
        fill: the most steps before one is measured; None for those that fill the window.
    """

    numel: int
    checked: int
    checked_blocks: tuple[int, ...]
    windows: tuple[int, ...]
    densities: tuple[float, ...]
    block_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    models: Models
    optimizers: tuple[str, ...]
    fill: int | None = None


FULL = Size(
    numel=1 << 24,
    checked=1 << 20,
    checked_blocks=(256, 4096, 32768),
    windows=(32, 128, 256),
    densities=(0.0005, 0.001, 0.005, 0.01, 0.05, 0.1),
    block_sizes=(1024, 4096, 16384, 32768),
    dtypes=tuple(DTYPES),
    models=MODELS,
    optimizers=tuple(OPTIMIZERS),
)
REHEARSAL = Size(
    numel=1 << 14,
    checked=1 << 14,
    checked_blocks=(256,),
    windows=(3,),
    densities=(0.01,),
    block_sizes=(256,),
    dtypes=("fp32/fp32/bf16", "fp32/int8/bf16"),
    models={"2 layers of 16 × 16": partial(layers, 2, 16)},
    optimizers=(ADAMW, "SparseMFAC, int8", "MFACW"),
    fill=1,
)


@dataclass(frozen=True)
class Job:
    """One measurement. `run` gives the columns of its row from "status" on."""

    stage: str
    what: str
    case: str
    run: Callable[[], Row]


class Bench:
    """What all jobs use: the device, its timer, and the speed of a copy.

    Args:
        device: "cuda"; "cpu" in a rehearsal.
        size: of the measurements.
        out: folder of results.
    """

    def __init__(self, device: torch.device, size: Size, out: Path) -> None:
        self.device, self.size, self.out, self.timer = device, size, out, Timer(device)
        copy, moved = self.timer.transfers["copy"]
        copy()
        self.copy_speed = moved / statistics.median(self.timer.milliseconds(copy) for _ in range(9)) / 1e6  # GB/s

    def jobs(self) -> Iterator[Job]:
        """All jobs, the most important first."""
        yield Job("tests", "tests that need a GPU", "", self._tests)
        size = self.size
        for dtype in size.dtypes:
            for block_size in size.checked_blocks:
                for density in (0.01, 0.1):
                    case = Case(size.checked, size.windows[0], density, block_size, dtype)
                    for operation in OPERATIONS:
                        yield Job("checks", operation, _name(case), partial(self._check, operation, case))
        block = min(4096, size.block_sizes[-1])
        cases = [Case(size.numel, window, 0.01, block) for window in size.windows]
        cases += [Case(size.numel, size.windows[-1], density, block) for density in size.densities]
        cases += [Case(size.numel, size.windows[-1], 0.01, block_size) for block_size in size.block_sizes]
        cases += [Case(size.numel, size.windows[0], 0.01, block, dtype) for dtype in size.dtypes]
        for case in dict.fromkeys(cases):
            for operation in OPERATIONS:
                yield Job("operations", operation, _name(case), partial(self._operation, operation, case))
        for model in size.models:
            for optimizer in size.optimizers:
                yield Job("steps", optimizer, model, partial(self._step, optimizer, model))
        for block_size in size.block_sizes:
            for density in size.densities:
                case = Case(size.numel, size.windows[0], density, block_size)
                for operation in ("compress_", "window_dots", "window_apply_"):
                    yield Job("autotune", operation, _name(case), partial(self._autotune, operation, case))

    def _tests(self) -> Row:
        if self.device.type != "cuda":
            return {"status": "skipped: no GPU"}
        if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
            return {"status": f"skipped: {' and '.join(missing)} missing"}
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
        (self.out / "tests.txt").write_text(done.stdout[-PRINTED:])
        return {"status": "ok" if done.returncode == 0 else "wrong: see tests.txt"}

    def _problem(self, case: Case) -> Problem:
        needed, available = 3 * case.window_bytes + 60 * case.numel, available_bytes(self.device)
        if needed > available:
            raise MemoryError(f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available")
        return Problem.random(case, self.device)

    def _check(self, operation: str, case: Case) -> Row:
        problem = self._problem(case)
        with problem.newest_row_kept():
            return {"status": "ok" if self._right(operation, problem) else "wrong"}

    def _right(self, operation: str, problem: Problem) -> bool:
        made = OPERATIONS[operation](problem, others=False)
        ours, definition = made[OURS], made[DEFINITION]
        definition.run()
        right = [result.clone() for result in definition.results()]
        ours.run()
        return agree(ours.results(), right, ours.tolerance)

    def _operation(self, operation: str, case: Case) -> Row:
        problem = self._problem(case)
        with problem.newest_row_kept():
            if not self._right(operation, problem):
                return {"status": "wrong"}
            run = OPERATIONS[operation](problem, others=False)[OURS].run
            eager, graph = self._times(run)
            fastest = min(eager, graph or eager)
        speed = case.floors[operation] / fastest / 1e6
        times = {"ms": eager, "graph ms": graph}
        return {"status": "ok", **times, "GB/s": speed, "of a copy": speed / self.copy_speed}

    def _step(self, optimizer: str, model_name: str) -> Row:
        entry, model = OPTIMIZERS[optimizer], with_gradients(self.size.models[model_name], self.device)
        entry = replace(entry, fill=self.size.fill or entry.fill)
        if reasons := refusal(entry, model, self.device):
            return {"status": reasons}
        step = ready(entry, model, self.timer)
        eager, graph = self._times(step.run)
        return {
            "status": "ok",
            "ms": eager / entry.cycle,
            "graph ms": None if graph is None else graph / entry.cycle,
        }

    def _autotune(self, operation: str, case: Case) -> Row:
        problem = self._problem(case)
        with problem.newest_row_kept():
            run = OPERATIONS[operation](problem, others=False)[OURS].run
            default = self._times(run)
            with patch.dict(os.environ, {"EFCP_AUTOTUNE": "1", "EFCP_CACHE": str(self.out)}):
                run()
                chosen = self._times(run)
        fastest = min(t for t in chosen if t is not None)
        usual = min(t for t in default if t is not None)
        return {"status": "ok", "ms": fastest, "default ms": usual}

    def _times(self, run: Call) -> tuple[float, float | None]:
        """Median milliseconds, eager and from a CUDA graph; None where there can be none."""
        run()
        runs = {"eager": run}
        try:
            if replay := self.timer.as_graph(run):
                runs["graph"] = replay
        except RuntimeError as error:
            print(f"no CUDA graph: {error}", file=sys.stderr)
        times = self.timer.in_turn(runs, dict.fromkeys(runs, SECONDS if self.device.type == "cuda" else 0.0))
        medians = {name: statistics.median(t) for name, t in times.items()}
        return medians["eager"], medians.get("graph")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="efcp.perf.gpu.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="when to stop (default: %(default)g)")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on simulated GPUs, where there is no GPU")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU; --rehearse does without one")
    device = torch.device("cpu" if options.rehearse else "cuda")
    with ending(parser, f"what has been measured is in {options.out}"):
        options.out.mkdir(parents=True, exist_ok=True)
        with locked(options.out), _untuned(options.out), _simulated() if options.rehearse else nullcontext():
            _measure(Bench(device, REHEARSAL if options.rehearse else FULL, options.out), options.minutes)
            print((options.out / "summary.md").read_text())


def _measure(bench: Bench, minutes: float) -> None:
    """Does all jobs that are not in measured.csv yet, as long as there is time, and writes summary.md."""
    path, end = bench.out / "measured.csv", time.monotonic() + 60 * minutes
    rows = _read(path)
    done = {(row["stage"], row["what"], row["case"]) for row in rows}
    jobs = [job for job in bench.jobs() if (job.stage, job.what, job.case) not in done]
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not rows:
            writer.writeheader()
        for number, job in enumerate(jobs):
            if time.monotonic() > end:
                break
            print(f"{number + 1} of {len(jobs)}: {job.stage}, {job.what} {job.case}", file=sys.stderr, flush=True)
            row = {"stage": job.stage, "what": job.what, "case": job.case}
            try:
                row |= job.run()
            except Exception as error:
                row["status"] = reason(error)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            writer.writerow({name: _text(row.get(name)) for name in COLUMNS})
            file.flush()
    rows = _read(path)
    done = {(row["stage"], row["what"], row["case"]) for row in rows}
    left = [job for job in bench.jobs() if (job.stage, job.what, job.case) not in done]
    (bench.out / "summary.md").write_text("\n".join(_summary(bench, rows, left)) + "\n")


def _summary(bench: Bench, rows: list[Row], left: list[Job]) -> Iterator[str]:
    yield f"# {environment(bench.device)['machine']}\n"
    known = {**environment(bench.device), "copy": f"{bench.copy_speed:.0f} GB/s"}
    yield "\n".join(f"- {name}: {value}" for name, value in known.items()) + "\n"
    wrong = [row for row in rows if row["status"].startswith("wrong")]
    yield f"**{len(wrong)} wrong** of {len(rows)}; {len(left)} left to do: the same command goes on.\n"
    without = [row for row in rows if row["status"] != "ok"]
    if without:
        yield "## Wrong, or without a measurement\n"
        yield _table(("stage", "what", "case", "status"), without)
    if left:
        stages = dict.fromkeys(job.stage for job in left)
        yield "## Left to do\n"
        yield "\n".join(f"- {stage}: {sum(job.stage == stage for job in left)}" for stage in stages) + "\n"
    checked = [row for row in rows if row["stage"] == "checks"]
    yield "## Checks\n"
    yield f"{sum(row['status'] == 'ok' for row in checked)} of {len(checked)} agree with the definition.\n"
    yield "## Operations\n"
    own = [row for row in rows if row["stage"] == "operations" and row["status"] == "ok"]
    yield _table(("what", "case", "ms", "graph ms", "GB/s", "of a copy"), own)
    yield "## Steps\n"
    steps = [row for row in rows if row["stage"] == "steps" and row["status"] == "ok"]
    adamw = {row["case"]: _fastest(row) for row in steps if row["what"] == ADAMW}
    for row in steps:
        row["times AdamW"] = _text(_fastest(row) / adamw[row["case"]]) if row["case"] in adamw else ""
    yield _table(("case", "what", "ms", "graph ms", "times AdamW"), steps)
    yield "## Autotuning\n"
    tuned = [row for row in rows if row["stage"] == "autotune" and row["status"] == "ok"]
    for row in tuned:
        row["default / chosen"] = _text(float(row["default ms"]) / float(row["ms"]))
    yield _table(("what", "case", "default ms", "ms", "default / chosen"), tuned)


def _fastest(row: Row) -> float:
    return min(float(row[name]) for name in ("ms", "graph ms") if row[name])


def _table(columns: tuple[str, ...], rows: list[Row]) -> str:
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _name(case: Case) -> str:
    size = f"d={case.numel} m={case.window}"
    return f"{size} {100 * case.density:g}% B={case.block_size} {case.dtype}"


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _read(path: Path) -> list[Row]:
    """The rows of measured.csv; a last line that is not whole, after an interruption, is removed from the file."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return list(csv.DictReader(whole.splitlines()))


@contextmanager
def _untuned(out: Path) -> Iterator[None]:
    """Within the context no choice of a configuration is found that an earlier run has saved."""
    with patch.dict(os.environ, {"EFCP_AUTOTUNE": "0", "EFCP_CACHE": str(out / "none")}):
        yield


@contextmanager
def _simulated() -> Iterator[None]:
    """Within the context kernels run in gpusim, and may reach all tensors that there are, by address."""

    class Everything(list[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            found = (x for x in gc.get_objects() if type(x) is torch.Tensor or type(x) is torch.nn.Parameter)
            return iter([x for x in found if x.is_cpu and x.layout == torch.strided and x.numel()])

    def milliseconds(launch: Callable[[], object]) -> float:
        before = time.perf_counter()
        launch()
        return (time.perf_counter() - before) * 1e3

    # imported here because Triton may be missing where nothing is rehearsed
    from efcp.kernels.triton import tuning

    small = patch.multiple(tuning, NUMEL=1 << 12, _milliseconds=milliseconds)
    with small, patch.dict(os.environ, {"EFCP_KERNELS": "triton"}), simulate(90) as simulator:
        simulator.allowed = Everything()
        yield
