"""Growth, roofline, prediction, tables and plots: all of them from CSVs alone."""

import io
from pathlib import Path

import pandas as pd
import pytest

from efcp.kernels.gpus import PRODUCTS
from efcp.perf import plots, report, roofline, scaling
from efcp.perf.breakdown import PHASES
from efcp.perf.problems import Case
from efcp.perf.tables import markdown, write_csv
from tests.perf.bench_rows import CASES, bench_rows

REPORTS = report.REPORTS
LARGEST_PLOT = 200_000  # bytes


def breakdown_rows() -> pd.DataFrame:
    fixed = {
        "model": "a",
        "d": 9,
        "parameters": 2,
        "device": "cpu",
        "m": 4,
        "density": 0.1,
        "error": "int8",
        "threads": 1,
        "status": "ok",
        "floor_ms": 1.0,
    }
    return pd.DataFrame([{**fixed, "phase": phase, "p50_ms": 2.0} for phase in (*PHASES, "step")])


def memory_rows() -> pd.DataFrame:
    row = {"model": "a", "d": 10, "values": "bfloat16", "error": "float32", "status": "ok", "per parameter": 5.0}
    row |= {"state bytes": 50, "estimated bytes": 50, "resident bytes": 60, "temporary bytes": 1, "peak bytes": 99}
    sparse = [(0.01, "measured"), (0.1, "estimate")]
    rows = [{**row, "optimizer": "SparseMFAC", "m": 64, "density": density, "how": how} for density, how in sparse]
    return pd.DataFrame([*rows, {**row, "optimizer": "Adam", "how": "measured"}])


def optimizer_rows() -> pd.DataFrame:
    row = {"model": "a", "d": 1000, "settings": "", "status": "ok", "device": "cpu", "threads": 1, "of parameters": 0.5}
    row |= dict.fromkeys(("timer", "machine", "versions", "commit"), "x")
    numbers = [("AdamW, fused", "PyTorch", 2.0, 8.0), ("SparseMFAC", "efcp, Top-k", 4.0, 5.0)]
    rows = [
        {**row, "optimizer": name, "family": family, "p50_ms": ms, "times AdamW": ms / 2.0, "per parameter": size}
        for name, family, ms, size in numbers
    ]
    missing = {"optimizer": "AdamW, 8 bits", "family": "torchao", "status": "ModuleNotFoundError: torchao is missing"}
    return pd.DataFrame([*rows, {**row, **missing}])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_csv(bench_rows(), tmp_path / "bench.csv")
    write_csv(breakdown_rows(), tmp_path / "breakdown.csv")
    write_csv(memory_rows(), tmp_path / "memory.csv")
    write_csv(optimizer_rows(), tmp_path / "optimizers.csv")
    return tmp_path


def test_all_follows_from_the_csvs_alone(folder: Path) -> None:
    printed = io.StringIO()
    report.make(folder, printed)
    for name in plots.PLOTS:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
        assert (folder / name).stat().st_size < LARGEST_PLOT
    for name in ("scaling.csv", "largest-model.csv", "prediction.csv"):
        assert not pd.read_csv(folder / name).empty
    text = (folder / "tables.md").read_text()
    assert "**Not measured**" in text
    assert text.strip() in printed.getvalue()


@pytest.mark.parametrize("kept", ["breakdown.csv", "memory.csv", "optimizers.csv"])
def test_what_is_missing_is_left_out(folder: Path, kept: str) -> None:
    for name in {"bench.csv", "breakdown.csv", "memory.csv", "optimizers.csv"} - {kept}:
        (folder / name).unlink()
    report.make(folder, io.StringIO())
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {name for name, (source, _) in plots.PLOTS.items() if source == kept}


def test_nothing_breaks_where_nothing_has_a_time(folder: Path) -> None:
    frame = bench_rows().assign(status="wrong")
    frame[["p20_ms", "p50_ms", "p80_ms", "GB/s", "bandwidth GB/s", "of bandwidth", "bound"]] = float("nan")
    write_csv(frame, folder / "bench.csv")
    report.make(folder, io.StringIO())
    assert "| wrong |" in (folder / "tables.md").read_text()
    assert {path.name for path in folder.glob("*.png")} == {"memory.png", "breakdown.png", "optimizers.png"}


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "nowhere"])
def test_plots_need_a_folder_with_csvs(tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: bool) -> None:
    with pytest.raises(SystemExit, match="2"):
        plots.main([str(tmp_path if empty else tmp_path / "none")])
    message = "holds none of bench.csv, breakdown.csv, memory.csv, optimizers.csv" if empty else "there is no folder"
    assert message in capsys.readouterr().err


def test_ratios_and_where_ours_is_behind() -> None:
    table = report.ratios(bench_rows())
    assert len(table) == 4 * len(CASES)
    dots = table[table["operation"] == "window_dots"]
    assert dots["torch.sparse"].to_numpy() == pytest.approx(9.0 / 3.0)
    assert dots["of bandwidth"].to_numpy() == pytest.approx(0.9)
    behind = report.behind(bench_rows())
    assert set(behind["implementation"]) == {"Adam, fused"}
    assert behind["times ours"].to_numpy() == pytest.approx(6.0 / 50.0)
    assert len(report.behind(bench_rows(), density=0.01)) == len(CASES) - 1


def test_optimizers_are_a_table_for_each_model(folder: Path) -> None:
    report.make(folder, io.StringIO())
    text = (folder / "tables.md").read_text()
    assert "| SparseMFAC |  | 4 | 2 | 5 | 50 |" in text
    assert "| a | AdamW, 8 bits | ModuleNotFoundError: torchao is missing |" in text


def test_series_vary_one_thing() -> None:
    for axis, values in (("d", 3), ("m", 3), ("density", 3)):
        line = scaling.series(bench_rows(), "step", axis)
        assert line[axis].nunique() == values
        assert line[axis].is_monotonic_increasing
        assert (line[[c for c in scaling.CONSTANT if c != axis]].nunique() == 1).all()


def test_exponents_of_power_laws() -> None:
    bench = bench_rows()
    law = bench["d"] ** 1.5 * bench["m"] ** 0.5 * bench["density"] ** 0.25
    table = scaling.exponents(bench.assign(p50_ms=law)).set_index(["quantity", "along", "implementation"])
    for axis, exponent in (("d", 1.5), ("m", 0.5), ("density", 0.25)):
        row = table.loc[("time of a step", axis, "efcp")]
        assert row["exponent"] == pytest.approx(exponent)
        assert row["exponent at the end"] == pytest.approx(exponent)
        assert row["points"] == 3
    assert table.loc[("bytes of state", "d", "efcp"), "exponent at the end"] == pytest.approx(1, abs=0.01)


def test_standing_is_in_floors() -> None:
    table = roofline.standing(bench_rows())
    ours = table[(table["implementation"] == "efcp") & (table["operation"] == "compress_")]
    assert ours["times floor"].to_numpy() == pytest.approx(10.0 / 8.0)


def test_prediction_is_one_of_its_reports() -> None:
    table = roofline.predict(REPORTS, 1 << 24)
    assert set(table["how"]) == {"prediction"}
    assert set(table["gpu"]) == set(PRODUCTS)
    for _, rows in table.groupby(["gpu", "density"]):
        times = rows.set_index("operation")["predicted_ms"]
        assert times["step"] == pytest.approx(times.drop(["step", "Adam"]).sum())
    operations = table[table["operation"].isin(roofline.OPERATIONS)]
    limits = operations[["memory_ms", "in_flight_ms", "instructions_ms"]]
    assert (operations["predicted_ms"] > limits.max(axis=1)).all()
    named = limits.rename(columns=lambda name: name.removesuffix("_ms").replace("_", " "))
    assert (named.idxmax(axis=1) == operations["limit"]).all()


def test_prediction_of_bytes() -> None:
    table = roofline.predict(REPORTS, 1 << 24).set_index(["gpu", "density", "operation"])
    counted = pd.read_csv(REPORTS / "traffic.csv")
    counted = counted.set_index(["operation", "density", "m", "support", "launch"]).sort_index()
    dots = table.loc[("H100 SXM", 0.01, "window_dots")]
    floor = Case(1 << 24, 256, 0.01).floors["window_dots"]
    expected = floor * counted.loc[("window_dots", 0.01, 256, "random", "all"), "times floor"]
    assert dots["bytes"] == pytest.approx(expected, rel=1e-6)
    assert dots["memory_ms"] == pytest.approx(expected / (0.9 * 3.35e9))
    double = roofline.predict(REPORTS, 1 << 25).set_index(["gpu", "density", "operation"])
    assert double.loc[("H100 SXM", 0.01, "window_dots"), "memory_ms"] == pytest.approx(2 * dots["memory_ms"], rel=1e-3)


def test_prediction_needs_a_window_that_was_counted() -> None:
    with pytest.raises(ValueError, match=r"window must be one of traffic.csv, \[32, 256\], got 100"):
        roofline.predict(REPORTS, 1 << 24, window=100)


def test_prediction_needs_the_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = pd.read_csv(REPORTS / "compile-report.csv")
    write_csv(compiled[compiled["operation"] != "window_dots"], folder / "compile-report.csv")
    write_csv(pd.read_csv(REPORTS / "traffic.csv"), folder / "traffic.csv")
    with pytest.raises(ValueError, match=r"compile-report.csv must have window_dots for B=4096 1% .*"):
        roofline.predict(folder, 1 << 24)
    monkeypatch.setattr(report, "REPORTS", folder)
    monkeypatch.setattr(plots, "draw", lambda out: [])
    report.make(folder, io.StringIO())
    assert "None: compile-report.csv must have window_dots" in (folder / "tables.md").read_text()


def test_small_launches_are_counted_without_those_on_windows() -> None:
    assert 3 <= roofline.small_launches() <= 9  # on a GPU a step launches nine kernels in all


def test_markdown() -> None:
    frame = pd.DataFrame({"a": ["x", "y"], "b": [1234567, 2], "c": [0.12345, float("nan")]})
    assert markdown(frame).splitlines()[2:] == ["| x | 1,234,567 | 0.123 |", "| y | 2 |  |"]


def test_csv_keeps_large_numbers(tmp_path: Path) -> None:
    write_csv(pd.DataFrame({"bytes": [4505814966288.0, float("nan")]}), tmp_path / "a" / "b.csv")
    assert pd.read_csv(tmp_path / "a" / "b.csv")["bytes"][0] == 4505814966288
