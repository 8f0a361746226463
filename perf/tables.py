"""Reads and writes CSV files, and makes tables in Markdown."""

import csv
import io
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

__all__ = [
    "Kinds",
    "check_filled",
    "first_line",
    "markdown",
    "read_csv",
    "read_measured",
    "read_rows",
    "table",
    "timed",
    "write_csv",
]

Kinds = Mapping[str, type]
"""Columns, and whether each holds texts (str), numbers (float) or True and False (bool)."""


TEXTS = {
    *("operation", "implementation", "device", "dtype", "status", "bound", "timer", "machine", "versions", "commit"),
    *("model", "optimizer", "family", "settings", "values", "error", "how", "phase"),
    *("target", "case", "kernel", "configuration", "support", "launch"),
}
"""The columns that hold texts, over all files of measurements; all others hold numbers."""
_CASE = ("operation", "implementation", "device", "dtype", "d", "m", "B", "density", "status")
NEEDED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bench.csv": (
        _CASE,
        (
            *("p20_ms", "p50_ms", "p80_ms", "bytes", "GB/s", "bound", "bandwidth GB/s", "of bandwidth"),
            *("timer", "machine", "threads", "versions", "commit"),
        ),
    ),
    "breakdown.csv": (
        ("model", "status"),
        ("d", "device", "m", "density", "error", "threads", "phase", "p50_ms", "floor_ms"),
    ),
    "memory.csv": (
        ("model", "d", "optimizer", "how", "status"),
        (
            *("m", "density", "values", "error", "state bytes", "estimated bytes", "per parameter"),
            *("resident bytes", "temporary bytes", "peak bytes"),
        ),
    ),
    "optimizers.csv": (
        ("optimizer", "family", "model", "d", "status"),
        (
            *("settings", "device", "p50_ms", "times AdamW", "per parameter", "of parameters"),
            *("timer", "machine", "threads", "versions", "commit"),
        ),
    ),
    "compile-report.csv": (
        ("target", "case", "operation"),
        ("kernel", "configuration", "warps", "KB in flight", "an element", "instructions"),
    ),
    "traffic.csv": (("operation", "launch"), ("density", "m", "error", "support", "times floor")),
}
"""For each file, the columns that tables and plots need: those without empty cells, and the others."""


def read_measured(path: Path, file: str | None = None) -> pd.DataFrame:
    """Reads a file of measurements.

    Args:
        path: of the file.
        file: its key in `NEEDED`; None if that is its own name.

    Raises:
        FileNotFoundError, ValueError: as `read_csv`.
    """
    filled, others = NEEDED[file or path.name]
    kinds = {column: str if column in TEXTS else float for column in (*filled, *others)}
    return read_csv(path, kinds, filled=filled)


def read_rows(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, as texts.

    Args:
        path: of the file.
        columns: those that it must have; it may have others.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no header, lacks columns, or has a line that is not whole.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        text = path.read_bytes().decode("utf-8")
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    if not lines or not lines[0]:
        raise ValueError(f"{path} is empty: it has not even the names of its columns")
    header = lines[0]
    if missing := [column for column in columns if column not in header]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    if not text.endswith("\n"):
        raise ValueError(f"{path} ends within line {len(lines)}: it was cut off, delete that line")
    for number, line in enumerate(lines, start=1):
        if line and len(line) != len(header):
            raise ValueError(f"{path}, line {number} has {len(line)} fields, and the header {len(header)}: delete it")
    return [dict(zip(header, line, strict=True)) for line in lines[1:] if line]


def read_csv(path: Path, kinds: Kinds, optional: Iterable[str] = (), filled: Iterable[str] = ()) -> pd.DataFrame:
    """The rows of a CSV file, with dtypes that do not depend on which of its cells are empty.

    Args:
        path: of the file.
        kinds: its columns; others are left as pandas reads them.
        optional: columns that the file may lack.
        filled: columns that have no empty cells.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks columns, has a line that is not whole, or a cell that is empty or of another kind.
    """
    read_rows(path, [column for column in kinds if column not in set(optional)])
    texts: dict[Hashable, type[str]] = {column: str for column, kind in kinds.items() if kind is str}
    frame = pd.read_csv(path, dtype=texts, float_precision="round_trip")
    for column, kind in kinds.items():
        if column in frame and kind is not str:
            values = frame[column] if kind is float else frame[column].dropna()
            wrong = pd.to_numeric(values, errors="coerce").isna() & values.notna()
            if kind is bool:
                wrong = ~values.isin([True, False])
            if wrong.any():
                what, got = "a number" if kind is float else "True or False", values[wrong].iloc[0]
                raise ValueError(f"{path}, line {first_line(wrong)}: {column} must be {what}, got {got!r}")
            if kind is float and frame.empty:
                frame[column] = frame[column].astype(float)
    check_filled(frame, filled, path)
    return frame


def check_filled(frame: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    """Raises ValueError where one of these columns of a file has an empty cell."""
    for column in columns:
        if (empty := frame[column].isna()).any():
            raise ValueError(f"{path}, line {first_line(empty)} has no {column}")


def first_line(chosen: "pd.Series[bool]") -> int:
    """The line number in a file of the first chosen row. Line 1 is the header; rows are numbered as by `read_csv`."""
    return int(chosen.index[int(chosen.to_numpy().argmax())]) + 2


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of bench.csv or breakdown.csv that have a time."""
    return rows[(rows["status"] == "ok") & (rows["p50_ms"] > 0)]


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Writes a CSV file; an older one of that name is replaced only when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    frame.round(9).to_csv(partial, index=False, lineterminator="\n")
    partial.replace(path)


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown. Numbers have three digits; cells without a number are empty."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    rows = frame.astype(object).itertuples(index=False)
    return table([frame.columns, *([text(value) for value in row] for row in rows)])


def table(rows: Sequence[Iterable[object]], *, aligned: bool = False) -> str:
    """A table in Markdown.

    Args:
        rows: of the table, the heads of its columns first.
        aligned: pad the cells for reading as plain text; all columns but the first are right-aligned.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    rule = ["---"] * len(lines[0])
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        lines = [
            [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        rule = ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)]
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
