"""The guard against regressions flags what is slower, and not noise."""

from pathlib import Path

import pandas as pd
import pytest

from efcp.perf.compare import compare, main
from tests.perf.bench_rows import bench_rows

QUANTILES = ["p20_ms", "p50_ms", "p80_ms"]
ROW = 4  # one of window_dots


def changed(factor: float, rows: slice | int, bandwidth: float = 1.0) -> pd.DataFrame:
    frame = bench_rows()
    frame.loc[rows, QUANTILES] *= factor
    frame["bandwidth GB/s"] *= bandwidth
    return frame


@pytest.mark.parametrize(("factor", "verdict"), [(1.5, "slower"), (1.1, ""), (1.0, ""), (0.95, ""), (0.5, "faster")])
def test_verdict(factor: float, verdict: str) -> None:
    table = compare(bench_rows(), changed(factor, ROW))
    assert table["verdict"][ROW] == verdict
    assert table["ratio"][ROW] == pytest.approx(factor)
    assert set(table["verdict"].drop(ROW)) == {""}


def test_a_slower_machine_is_no_regression() -> None:
    table = compare(bench_rows(), changed(2.0, slice(None), bandwidth=0.5))
    assert set(table["verdict"]) == {""}
    assert table["ratio"].to_numpy() == pytest.approx(2.0)
    assert table["ratio_of_bandwidth"].to_numpy() == pytest.approx(1.0)


@pytest.mark.parametrize(("factor", "bandwidth"), [(1.05, 2.0), (0.95, 0.5)])
def test_another_bandwidth_alone_is_no_change(factor: float, bandwidth: float) -> None:
    assert set(compare(bench_rows(), changed(factor, slice(None), bandwidth))["verdict"]) == {""}


@pytest.mark.parametrize("how", ["wrong", "missing"])
def test_what_has_no_time_any_more_is_lost(how: str) -> None:
    new = bench_rows()
    if how == "wrong":
        new.loc[ROW, "status"] = "wrong"
        new.loc[ROW, QUANTILES] = float("nan")
    else:
        new = new.drop(index=ROW)
    assert compare(bench_rows(), new)["verdict"][ROW] == "lost"


@pytest.mark.parametrize(("factor", "status"), [(2.0, 1), (1.0, 0)])
def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, status: int) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    bench_rows().to_csv(old, index=False)
    changed(factor, ROW).to_csv(new, index=False)
    assert main([str(old), str(new)]) == status
    shown = capsys.readouterr().out
    assert f"{status} of 28 of our measurements fell" in shown
    assert ("window_dots" in shown) == bool(status)


def test_others_may_become_slower(tmp_path: Path) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    bench_rows().to_csv(old, index=False)
    changed(2.0, ROW + 1).to_csv(new, index=False)
    assert main([str(old), str(new)]) == 0


def test_files_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = tmp_path / "good.csv", tmp_path / "other.csv"
    bench_rows().to_csv(good, index=False)
    bench_rows().drop(columns=["p80_ms", "m"]).to_csv(other, index=False)
    for path, message in ((other, "lacks the columns m, p80_ms"), (tmp_path / "none.csv", "there is no file")):
        with pytest.raises(SystemExit, match="2"):
            main([str(good), str(path)])
        assert message in capsys.readouterr().err
