"""Where a step's time goes: phases are those of a step, and nothing stays patched."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from efcp import MFAC, kernels
from efcp.gram import Gram
from efcp.perf import breakdown, models
from efcp.perf.breakdown import PHASES, full_optimizer, phases_of_steps
from efcp.perf.problems import Case

OPERATIONS = (kernels.compress_, kernels.undo_compress_, kernels.window_dots, kernels.window_apply_)
CPU = torch.device("cpu")
SHAPES: models.Shapes = [(70, 100), (63,)]


def test_phases_add_up_to_the_step() -> None:
    frame = phases_of_steps(full_optimizer(SHAPES, CPU, 5), 3, CPU)
    assert list(frame.columns) == [*PHASES, "step"]
    assert len(frame) == 3
    assert (frame > 0).all(axis=None)
    assert frame[list(PHASES)].sum(axis=1).to_numpy() == pytest.approx(frame["step"].to_numpy())


def test_time_counts_in_its_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: next(clock) / 1e3)
    frame = phases_of_steps(full_optimizer(SHAPES, CPU, 5), 2, CPU)
    in_one = 1 if kernels.is_fused(torch.zeros(())) else 3
    for step, algebra in enumerate((3, in_one)):  # the first, in which M-FAC computes R anew, goes by parts
        calls = {"compress": 2, "dots": 1, "algebra": algebra, "apply": 1}  # each takes a tick; all the rest is Python
        assert frame[list(calls)].loc[step].to_dict() == pytest.approx(calls)
        assert frame["step"][step] == pytest.approx(2 * sum(calls.values()) + 1)


def test_nothing_stays_patched() -> None:
    before = [getattr(owner, name) for owner, name, _ in breakdown.TIMED]
    assert before == [*OPERATIONS, Gram.replace, MFAC.step_along_row, MFAC.weights]
    phases_of_steps(full_optimizer(SHAPES, CPU, 5), 1, CPU)
    assert before == [getattr(owner, name) for owner, name, _ in breakdown.TIMED]


def test_the_window_is_full_and_valid() -> None:
    optimizer = full_optimizer(SHAPES, CPU, 5)
    for param, state in optimizer.state.items():
        optimizer.compressor.check("state", {k: state[k] for k in ("values", "indices", "error")}, param)
        assert (state["values"] != 0).float().mean() > 0.8  # all but padding


def test_the_csv_tells_of_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "MEASURED", (("large", 4, torch.float32), ("tiny", 4, torch.int8)))
    monkeypatch.setitem(models.MODELS, "large", lambda: [(1 << 60,)])
    monkeypatch.setitem(models.MODELS, "tiny", lambda: SHAPES)
    breakdown.measure(CPU, tmp_path / "breakdown.csv", steps=2)
    frame = pd.read_csv(tmp_path / "breakdown.csv").set_index("model")
    assert "memory" in frame.loc["large", "status"]
    assert set(frame.loc["tiny", "phase"]) == {*PHASES, "step"}
    assert set(frame.loc["tiny", "d"]) == {7063}
    assert set(frame.loc["tiny", "error"]) == {"int8"}
    floors = frame.loc["tiny"].set_index("phase")["floor_ms"]
    assert floors["step"] == pytest.approx(floors[["compress", "dots", "apply"]].sum(), abs=1e-8)
    assert floors[["algebra", "Python"]].isna().all()


@pytest.mark.parametrize("error", ["float32", "int8"])
def test_floors_are_those_of_the_benchmark(error: str) -> None:
    case = Case(1 << 15, 5, 0.01, dtype="fp32/fp32/bf16" if error == "float32" else f"fp32/{error}/bf16")
    found = breakdown.floors(full_optimizer([(1 << 15,)], CPU, 5, getattr(torch, error)))
    names = {"compress": "compress_", "dots": "window_dots", "apply": "window_apply_", "step": "step"}
    assert found == {phase: case.floors[name] for phase, name in names.items()}
