"""Makes tables.md, the plots and some further CSVs of a run from its measured CSVs alone.

| from | is made |
|---|---|
| bench.csv | scaling.csv; tables of ratios; throughput, speedup, roofline and scaling plots |
| breakdown.csv | its table and plot |
| optimizers.csv | its table and plot |
| memory.csv | largest-model.csv; its table and plot |
| compile-report.csv, traffic.csv | prediction.csv and its table |
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pandas as pd

from efcp.perf import plots, roofline, scaling
from efcp.perf.implementations import OURS
from efcp.perf.memory import largest_models
from efcp.perf.tables import markdown, read_measured, timed, write_csv

__all__ = ["behind", "make", "ratios"]

REPORTS = Path(__file__).parent / "results"  # reports on the compiled kernels, the same on every machine
PREDICTED = 1 << 24  # elements
GIGA = 1e9
BREAKDOWN_TABLES = {"p50_ms": "Medians in ms.", "floor_ms": "What the bytes alone take, in ms: see `breakdown.py`."}
OPTIMIZER_COLUMNS = {
    "p50_ms": "ms",
    "times AdamW": "in times of fused AdamW",
    "per parameter": "state, bytes a parameter",
    "of parameters": "temporaries, % of the parameters' bytes",
}


def make(out: Path, file: TextIO) -> None:
    """Writes tables.md, plots and further CSVs into a folder, from the measured CSVs in it, and prints the tables.

    Args:
        out: folder with the CSVs of a run.
        file: where the tables are also printed.
    """
    text = "\n\n".join(["# Measurements", "Made by `python -m efcp.perf.bench`; README.md explains.", *_sections(out)])
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text, file=file)
    for path in plots.draw(out):
        print(f"drawn: {path}", file=file)


def _sections(out: Path) -> Iterator[str]:
    if (bench := _read(out / "bench.csv")) is not None:
        yield _environment(bench)
        yield "## Times in turn with ours\n\nIn times of `efcp`: above 1 it is faster. Ours in ms."
        yield markdown(ratios(bench))
        yield "## Where ours is behind\n\nUp to a density of 5%."
        slower = behind(bench)
        yield markdown(slower) if not slower.empty else "Nowhere."
        without = bench[bench["status"] != "ok"]
        if not without.empty:
            yield "## Without a time\n\n" + markdown(without[["operation", "implementation", *_CASE, "status"]])
        table = scaling.exponents(bench)
        write_csv(table, out / "scaling.csv")
        yield "## Growth\n\nExponents of power laws (`scaling.py`).\n\n" + markdown(table)
    if (optimizers := _read(out / "optimizers.csv")) is not None:
        yield "## Steps and state of optimizers\n\n" + _environment(optimizers)
        columns = ["p50_ms", "times AdamW", "per parameter", "of parameters"]
        table = timed(optimizers)[["model", "optimizer", "settings", *columns]].fillna({"settings": ""})
        table["of parameters"] = (100 * table["of parameters"]).round(3)
        for name, rows in table.groupby("model", sort=False):
            yield f"{name}:"
            yield markdown(rows.drop(columns="model").rename(columns=OPTIMIZER_COLUMNS))
        without = optimizers[optimizers["status"] != "ok"]
        if not without.empty:
            yield "Without a measurement:\n\n" + markdown(without[["model", "optimizer", "status"]])
    if (breakdown := _read(out / "breakdown.csv")) is not None and not (rows := timed(breakdown)).empty:
        yield "## Where a step's time goes"
        for column, what in BREAKDOWN_TABLES.items():
            yield what
            index = ["model", "d", "m", "density", "error"]
            yield markdown(rows.pivot_table(column, index, "phase", sort=False).reset_index())
    if (memory := _read(out / "memory.csv")) is not None:
        kept = ["model", "optimizer", "m", "density", "values", "error", "how", "state bytes", "estimated bytes"]
        kept += ["per parameter", "resident bytes", "temporary bytes", "peak bytes"]
        seen = memory[(memory["how"] != "estimate") | ~memory["optimizer"].str.startswith("Sparse")]
        yield "## Memory\n\nMeasured, and what others would take.\n\n" + markdown(seen[kept])
        largest = largest_models()
        write_csv(largest, out / "largest-model.csv")
        table = largest.assign(d=largest["largest d"] / GIGA).pivot_table("d", "optimizer", "memory GiB", sort=False)
        yield "## Largest model"
        yield "Billions of float32 parameters that fit with gradients and optimizer state; by GiB, by estimate."
        yield markdown(table.reset_index())
    if (REPORTS / "compile-report.csv").exists() and (REPORTS / "traffic.csv").exists():
        yield "## Prediction for GPUs"
        try:
            predicted = roofline.predict(REPORTS, PREDICTED)
        except ValueError as error:
            yield f"None: {error}."
            return
        write_csv(predicted, out / "prediction.csv")
        table = predicted.pivot_table("predicted_ms", ["gpu", "density"], "operation", sort=False).reset_index()
        yield "**Not measured**: ms for 16.8M float32 parameters, m = 256; `roofline.py` says under which assumptions."
        yield markdown(table)


_CASE = ["dtype", "d", "m", "B", "density"]


def ratios(bench: pd.DataFrame) -> pd.DataFrame:
    """For each operation and case: our median in ms, its share of the bandwidth, and others' medians over ours."""
    lines = []
    for key, rows in timed(bench).groupby(["operation", *_CASE], sort=False):
        own = rows[rows["implementation"] == OURS]
        if own.empty:
            continue
        ms = float(own["p50_ms"].iloc[0])
        others = rows[rows["implementation"] != OURS].set_index("implementation")["p50_ms"] / ms
        line = dict(zip(["operation", *_CASE], key, strict=True))
        lines.append({**line, "ms": ms, "of bandwidth": float(own["of bandwidth"].iloc[0]), **others.to_dict()})
    return pd.DataFrame(lines)


def behind(bench: pd.DataFrame, density: float = 0.05) -> pd.DataFrame:
    """Where another implementation takes less time than ours.

    Args:
        bench: bench.csv.
        density: the greatest density that is looked at.

    Returns:
        Rows: operation, case, implementation, and times ours: its median divided by ours, below 1.
    """
    table = ratios(bench)
    if table.empty:
        return table
    others = [
        c for c in table.columns if c not in ("operation", *_CASE, "ms", "of bandwidth") and not c.startswith(OURS)
    ]
    long = table.melt(["operation", *_CASE], others, "implementation", "times ours")
    return long[(long["times ours"] < 1) & (long["density"] <= density)].reset_index(drop=True)


def _environment(bench: pd.DataFrame) -> str:
    """A sentence on the machine, versions and commit of the first measurement."""
    for row in bench.head(1).to_dict("records"):
        known = {str(name): "unknown" if pd.isna(value) else value for name, value in row.items()}
        return "{machine}, {threads} threads; {versions}; commit {commit}; {timer}.".format_map(known)
    return "Nothing has been measured."


def _read(path: Path) -> pd.DataFrame | None:
    return read_measured(path) if path.exists() else None
