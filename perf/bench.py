"""Measures operations, steps and memory in one command: `python -m efcp.perf.bench [--quick] [--out DIR]`.

| part | file | what |
|---|---|---|
| sweep | bench.csv | each operation and the whole step, by density, block size, window, parameter size and dtype |
| breakdown | breakdown.csv | where the time of a step goes, for five models (`breakdown.py`) |
| memory | memory.csv | state and temporaries, measured beside the estimate (`memory.py`) |
| optimizers | optimizers.csv | steps and state of all optimizers that a user could choose (`optimizers.py`) |

From these it makes scaling.csv, prediction.csv, largest-model.csv, tables.md and the plots; `--plot-only` does only
this, with the CSVs of an earlier run. Measurements are never overwritten: a folder that already holds the file of a
part is refused. README.md in this folder says how to read them, GPU.md how to measure a GPU.

A row of bench.csv is one measurement:

| column | what |
|---|---|
| implementation | as in `implementations.py`; ", graph" at the end means that a CUDA graph was replayed |
| dtype | of gradient and parameter / error / values of the window |
| d, m, B, density, k | elements, rows of the window, block size, share and number of elements kept of a block |
| status | "ok"; "wrong" for a wrong result, which gets no time; or the reason why there is no time |
| p20_ms, p50_ms, p80_ms, runs | quantiles of the runs, and how many there were |
| bytes, GB/s | bytes that have to be moved, each once; the same divided by the median time |
| bound, bandwidth GB/s | what it is compared with, "read" or "copy", and the GB/s of that, measured in turn with it |
| of bandwidth | GB/s / bandwidth GB/s |
| temporary bytes | the most that a run allocates beyond what was allocated before |
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.bench")

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from efcp.kernels import backend_name
from efcp.perf import breakdown, memory, optimizers, report
from efcp.perf.command import PROVIDERS, ending, locked, reason
from efcp.perf.implementations import DEFINITION, OPERATIONS, OURS, PUBLISHED, Implementation, agree
from efcp.perf.machine import available_bytes, environment
from efcp.perf.problems import Case, Problem
from efcp.perf.tables import write_csv
from efcp.perf.timing import Call, Timer

__all__ = ["COLUMNS", "main", "measure", "sweep"]

COLUMNS = [
    *("operation", "implementation", "device", "dtype", "d", "m", "B", "density", "k", "status"),
    *("p20_ms", "p50_ms", "p80_ms", "runs", "bytes", "GB/s", "bound", "bandwidth GB/s", "of bandwidth"),
    *("temporary bytes", "timer", "machine", "threads", "versions", "commit"),
]
BOUNDS = {"norm_is_finite": "read", "window_dots": "read"}  # the others read and write: "copy"
GRAPH_ELEMENTS = 1 << 24  # up to this size ours is also replayed from a CUDA graph
PARTS = {"sweep": "bench.csv", "breakdown": "breakdown.csv", "memory": "memory.csv", "optimizers": "optimizers.csv"}

DENSITIES = (0.0005, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
GRAPH = ", graph"
SMALL, MEDIUM, LARGE = 25 << 12, 1 << 22, 1 << 24  # 102,400, 4.2M and 16.8M elements
LARGEST = 24415 << 12  # 100 million
Grid = list[tuple[Case, Sequence[str]]]


def grid(quick: bool) -> Grid:
    """The cases, and the operations that are measured on each."""
    every, step = tuple(OPERATIONS), ("step",)
    points: Grid
    if quick:
        points = [(Case(1 << 20, 64, density), every) for density in (0.001, 0.01, 0.05)]
        return [
            *points,
            (Case(SMALL, 64, 0.01), step),
            (Case(1 << 18, 64, 0.01), step),
            (Case(1 << 20, 16, 0.01), step),
        ]
    points = [(Case(LARGE, 256, density), every) for density in DENSITIES]
    points += [(Case(MEDIUM, 256, density), every) for density in (0.001, 0.01, 0.05, 0.1)]
    points += [(Case(MEDIUM, 256, 0.01, block), every) for block in (256, 1024, 16384, 32768)]
    points += [(Case(MEDIUM, window, 0.01), every) for window in (16, 64, 1024, 2048)]
    points += [(Case(MEDIUM, 256, 0.01, dtype=dtype), every) for dtype in ("bf16/bf16/bf16", "fp32/fp32/fp32")]
    points += [
        (Case(MEDIUM, 256, 0.01, dtype=f"fp32/{error}/bf16"), ("compress_", "step")) for error in ("int8", "int4")
    ]
    points += [(Case(SMALL, 256, 0.01), every), (Case(1 << 20, 256, 0.01), every)]
    return [*points, (Case(1 << 26, 256, 0.01), step), (Case(LARGEST, 256, 0.01), step)]


def needed_bytes(case: Case) -> int:
    """An upper bound on what all implementations of an operation take together: windows, vectors and matrices."""
    return 5 * case.window_bytes + 120 * case.numel + 64 * case.window**2


def measure(operation: str, problem: Problem, timer: Timer, seconds: float) -> list[dict[str, Any]]:
    """Measures one operation on one problem. A failure becomes a row that says so.

    Args:
        operation: one of `OPERATIONS`.
        problem: what the operation works on; it is left as it was.
        timer: of the device.
        seconds: about how long to repeat each implementation.
    """
    rows: list[dict[str, Any]] = []
    try:
        with problem.newest_row_kept():
            rows += _measurements(operation, problem, timer, seconds)
    except Exception as error:
        rows.append(_row(operation, OURS, problem.case, timer, status=reason(error)))
    return rows


def _measurements(operation: str, problem: Problem, timer: Timer, seconds: float) -> Iterator[dict[str, Any]]:
    case, implementations = problem.case, OPERATIONS[operation](problem)
    definition = implementations[DEFINITION]
    first = {DEFINITION: timer.milliseconds(definition.run)}
    right = [result.clone() for result in definition.results()]
    runs: dict[str, Call] = {DEFINITION: definition.run}
    for name, implementation in implementations.items():
        if name == DEFINITION:
            continue
        try:
            milliseconds = timer.milliseconds(implementation.run)
            expected = implementation.expected() if implementation.expected else right
            if not agree(implementation.results(), expected, implementation.tolerance):
                yield _row(operation, name, case, timer, status="wrong")
                continue
            runs[name] = implementation.run
            if name == PUBLISHED:  # slow, so that its first run may count; others may compile or allocate in theirs
                first[name] = milliseconds
            if implementation.capturable and case.numel <= GRAPH_ELEMENTS and (replay := _graph(timer, implementation)):
                runs[name + GRAPH] = replay
        except Exception as error:
            yield _row(operation, name, case, timer, status=reason(error))

    copying = {name: run for name, (run, _) in timer.transfers.items()}
    budget = {**dict.fromkeys(runs, seconds), **dict.fromkeys(copying, seconds / 2)}
    times = timer.in_turn({**runs, **copying}, budget, first)
    bandwidth = {name: size / float(np.median(times[name])) / 1e6 for name, (_, size) in timer.transfers.items()}
    bound = BOUNDS.get(operation, "copy")
    for name in runs:
        size, t = implementations[name.removesuffix(GRAPH)].bytes or case.floors[operation], times[name]
        p20, p50, p80 = (float(q) for q in np.quantile(t, (0.2, 0.5, 0.8)))
        speed = size / p50 / 1e6
        yield {
            **_row(operation, name, case, timer, status="ok"),
            **{"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "runs": len(t), "bytes": size, "GB/s": speed},
            **{"bound": bound, "bandwidth GB/s": bandwidth[bound], "of bandwidth": speed / bandwidth[bound]},
            "temporary bytes": timer.temporary_bytes(runs[name]) if len(t) > 1 else None,  # slow ones run no more
        }


def _graph(timer: Timer, implementation: Implementation) -> Call | None:
    try:
        return timer.as_graph(implementation.run)
    except RuntimeError as error:
        tqdm.write(f"no CUDA graph: {error}")
        return None


def _row(operation: str, name: str, case: Case, timer: Timer, status: str) -> dict[str, Any]:
    """A row without times."""
    values = {
        "operation": operation,
        "implementation": name,
        "dtype": case.dtype,
        "d": case.numel,
        "m": case.window,
        "B": case.block_size,
        "density": case.density,
        "k": case.blocks.kept,
        "status": status,
        "timer": timer.name,
        **environment(timer.device),
    }
    return {column: values.get(column) for column in COLUMNS}


def sweep(points: Grid, timer: Timer, seconds: float, path: Path) -> pd.DataFrame:
    """Measures operations on cases; the CSV is rewritten after each, so that an interruption loses little."""
    rows: list[dict[str, Any]] = []
    with tqdm(total=sum(len(operations) for _, operations in points), unit="measured") as progress:
        for case, operations in points:
            where = (
                f"d={case.numel / 1e6:.1f}M m={case.window} {100 * case.density:g}% B={case.block_size} {case.dtype}"
            )
            try:
                if (needed := needed_bytes(case)) > (available := available_bytes(timer.device)):
                    raise MemoryError(f"needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available")
                problem = Problem.random(case, timer.device)
            except Exception as error:
                rows += [_row(operation, OURS, case, timer, status=reason(error)) for operation in operations]
                progress.update(len(operations))
                continue
            for operation in operations:
                progress.set_description(f"{operation} {where}")
                rows += measure(operation, problem, timer, seconds)
                write_csv(pd.DataFrame(rows, columns=COLUMNS), path)
                gc.collect()
                if timer.device.type == "cuda":
                    torch.cuda.empty_cache()
                progress.update()
            del problem
    frame = pd.DataFrame(rows, columns=COLUMNS)
    write_csv(frame, path)
    return frame


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="efcp.perf.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, in a minute")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="measure these parts only")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing: tables and plots from the CSVs")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda where there is one")
    parser.add_argument("--out", type=Path, help="folder for what is made; by default results/bench or results/quick")
    options = parser.parse_args(arguments)
    if options.plot_only and options.only:
        parser.error("--plot-only measures nothing, so there is nothing that --only could choose")
    out = options.out or Path("results/quick" if options.quick else "results/bench")
    if options.plot_only and not out.is_dir():
        parser.error(f"--out must be a folder with CSVs of an earlier run, got {out}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if backend_name(device) == "reference" and not options.plot_only:
        module = "numba" if device.type == "cpu" else "triton"
        parser.error(f"there are no kernels for {device.type}: pip install {PROVIDERS[module]}")

    parts = () if options.plot_only else options.only or tuple(PARTS)
    with ending(parser, f"what has been measured is in {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            if there := [PARTS[part] for part in parts if (out / PARTS[part]).exists()]:
                raise ValueError(
                    f"{out} holds {', '.join(there)} already: choose another --out, other parts with --only, "
                    "or delete what is to be measured anew"
                )
            if "sweep" in parts:
                sweep(grid(options.quick), Timer(device), 0.05 if options.quick else 0.25, out / PARTS["sweep"])
            if "breakdown" in parts:
                breakdown.measure(device, out / PARTS["breakdown"], steps=10 if options.quick else 30)
            if "memory" in parts:
                memory.measure(device, out / PARTS["memory"], options.quick)
            if "optimizers" in parts:
                optimizers.measure(device, out / PARTS["optimizers"], options.quick)
            report.make(out, file=sys.stdout)
