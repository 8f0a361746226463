"""Damaged measurements give a report on what there is, or an error that names the file and what is missing."""

import io
import random
from pathlib import Path

import pandas as pd
import pytest

from efcp.perf import compare, plots, report
from efcp.perf.tables import NEEDED, read_measured, write_csv
from tests.damage import damaged
from tests.perf.bench_rows import bench_rows
from tests.perf.test_report import breakdown_rows, memory_rows, optimizer_rows

FILES = {
    "bench.csv": bench_rows,
    "breakdown.csv": breakdown_rows,
    "memory.csv": memory_rows,
    "optimizers.csv": optimizer_rows,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The CSVs of a run."""
    for name, rows in FILES.items():
        write_csv(rows(), tmp_path / name)
    return tmp_path


def test_the_files_that_come_along_are_whole() -> None:
    for name in NEEDED:
        assert not read_measured(report.REPORTS / name).empty


# ---- one kind of damage at a time


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["no rows", "one row", "empty numbers", "empty texts"])
def test_a_report_of_what_there_is(folder: Path, kind: str, name: str) -> None:
    frame, others = pd.read_csv(folder / name), NEEDED[name][1]
    numbers = [column for column in others if pd.api.types.is_numeric_dtype(frame[column])]
    if kind == "no rows":
        frame = frame.iloc[:0]
    elif kind == "one row":
        frame = frame.iloc[:1]
    else:
        frame[[c for c in others if (c in numbers) == (kind == "empty numbers")]] = float("nan")
    write_csv(frame, folder / name)
    for other in set(FILES) - {name}:
        (folder / other).unlink()
    report.make(folder, io.StringIO())
    assert (folder / "tables.md").exists()
    if kind in ("no rows", "empty numbers"):
        assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("column", ["filled", "other"])
def test_a_missing_column_is_named(folder: Path, name: str, column: str) -> None:
    missing = NEEDED[name][column == "other"][0]
    write_csv(pd.read_csv(folder / name).drop(columns=missing), folder / name)
    for make in (lambda: report.make(folder, io.StringIO()), lambda: plots.draw(folder)):
        with pytest.raises(ValueError, match=f"{name} lacks the columns {missing}$"):
            make()


@pytest.mark.parametrize("name", FILES)
def test_an_empty_cell_is_named_where_there_must_be_one(folder: Path, name: str) -> None:
    frame = pd.read_csv(folder / name)
    frame.loc[1, "status"] = float("nan")
    write_csv(frame, folder / name)
    with pytest.raises(ValueError, match=f"{name}, line 3 has no status"):
        report.make(folder, io.StringIO())


def test_plots_tell_it_in_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "bench.csv").write_text("")
    with pytest.raises(SystemExit, match="2"):
        plots.main([str(folder)])
    assert f"error: {folder / 'bench.csv'} is empty" in capsys.readouterr().err


# ---- comparing


def test_a_time_that_is_not_there_is_lost(folder: Path) -> None:
    new = bench_rows()
    new.loc[0, "p50_ms"] = float("nan")
    verdicts = compare.compare(bench_rows(), new)["verdict"]
    assert verdicts[0] == "lost"
    assert set(verdicts[1:]) == {""}


@pytest.mark.parametrize("which", ["old", "new"])
def test_nothing_is_compared_with_no_times(folder: Path, capsys: pytest.CaptureFixture[str], which: str) -> None:
    empty = folder / "empty.csv"
    write_csv(bench_rows().iloc[:0], empty)
    files = [str(empty), str(folder / "bench.csv")]
    with pytest.raises(SystemExit, match="2"):
        compare.main(files if which == "old" else files[::-1])
    assert f"{empty} holds no measurement with a time" in capsys.readouterr().err


def test_unknown_machines_are_no_obstacle(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = bench_rows()
    new["machine"] = [float("nan"), "another", *new["machine"][2:]]
    write_csv(new, folder / "new.csv")
    assert compare.main([str(folder / "bench.csv"), str(folder / "new.csv")]) == 0
    assert "not the same machine" in capsys.readouterr().out


# ---- at random


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", FILES)
def test_any_damage_ends_in_a_report_or_an_error_that_names_the_file(folder: Path, name: str, seed: int) -> None:
    path = folder / name
    path.write_text(damaged(path.read_text(encoding="utf-8"), random.Random(seed)), encoding="utf-8")
    for other in set(FILES) - {name}:
        (folder / other).unlink()
    try:
        report.make(folder, io.StringIO())
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017, since a report is right, too
    else:
        assert (folder / "tables.md").exists()


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_ends_in_a_verdict_or_an_error(folder: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    generator, old, new = random.Random(seed), folder / "bench.csv", folder / "new.csv"
    text = old.read_text(encoding="utf-8")
    for path in (old, new):
        path.write_text(damaged(text, generator) if generator.random() < 0.7 else text, encoding="utf-8")
    try:
        status = compare.main([str(old), str(new)])
    except SystemExit as error:
        assert error.code == 2  # noqa: PT017, since a verdict is right, too
        assert str(folder) in capsys.readouterr().err
    else:
        assert status in (0, 1)
