"""The benchmark of the CPU operations runs, and reports no time for a wrong result."""

from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("numba")

from efcp.kernels import cpu
from efcp.perf import cpu as benchmark

TINY = ["--numel", "8192", "--density", "0.01", "0.1", "--window", "5", "--seconds", "0"]
IMPLEMENTATIONS = {
    "all_finite": {"compiled", "definition"},
    "compress_": {"compiled", "definition", "torch.topk"},
    "window_dots": {"compiled", "definition", "torch.sparse"},
    "window_apply_": {"compiled", "definition", "torch.sparse"},
    "step": {"SparseMFAC", "Adam, fused"},
}


def test_every_measurement_is_a_row_of_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cpu.csv"
    benchmark.main([*TINY, "--csv", str(path)])
    frame = pd.read_csv(path)
    assert list(frame.columns) == [field.name for field in fields(benchmark.Measurement)]
    assert frame.notna().all(axis=None)
    assert (frame[["median_ms", "bytes", "gb_per_s", "of_bandwidth", "times_compiled"]] > 0).all(axis=None)
    assert (frame.p20_ms <= frame.median_ms).all()
    assert (frame.median_ms <= frame.p80_ms).all()
    for (operation, _), group in frame.groupby(["operation", "density"]):
        assert set(group.implementation) == IMPLEMENTATIONS[operation] | {"copy", "read"}
    shown = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in shown] == 2 * list(IMPLEMENTATIONS)


def test_csr_products_are_those_of_the_window() -> None:
    p = benchmark.Problem.random(8192, 5, 0.1)
    products = benchmark.dots_operations(p)
    torch.testing.assert_close(products["torch.sparse"]().double(), products["definition"](), rtol=1e-4, atol=1e-4)
    before = p.target.clone()
    sums = benchmark.apply_operations(p)
    sums["torch.sparse"]()
    actual = p.target.clone()
    p.target.copy_(before)
    sums["definition"]()
    torch.testing.assert_close(actual, p.target, rtol=1e-5, atol=1e-5)


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.window_dots
    monkeypatch.setattr(cpu, "window_dots", lambda *arguments: right(*arguments) + 1.0)
    frame = benchmark.measure([8192], 5, [0.01], 0.0)
    dots = frame[frame.operation == "window_dots"]
    assert list(dots.implementation) == ["compiled (wrong)"]
    assert dots[["median_ms", "gb_per_s", "times_compiled"]].isna().all(axis=None)
    assert "wrong" not in " ".join(frame[frame.operation != "window_dots"].implementation)
