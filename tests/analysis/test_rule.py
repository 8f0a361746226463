"""The point to start from and the rule for the learning rate, on made-up runs that follow the rule."""

import math
from pathlib import Path

import pandas as pd
import pytest

from efcp.analysis import rule
from efcp.analysis.training import COLUMNS

LRS = (0.001, 0.01, 0.1, 1.0)
DAMPINGS = (1e-3, 1e-1)
WINDOW, NORM = 100, 2.0  # so that s/m = 0.04


def write_runs(folder: Path, rate: float, method: str = "dense M-FAC") -> Path:
    """Writes runs whose validation accuracy falls with the distance of log lr from the rule with this rate."""
    rows = [
        {
            **dict.fromkeys(COLUMNS),
            "phase": phase,
            "method": method,
            "window": WINDOW,
            "damping": damping,
            "lr": lr,
            "seed": 1000,
            "steps": 9,
            "diverged": False,
            "run": f"{damping}-{lr}-{phase}",
            "grad_norm": NORM,
            "val_accuracy": 90 - abs(math.log10(lr / (rate * (damping + NORM**2 / WINDOW)))),
        }
        for phase, lrs in (("tune", LRS), ("map", (0.3,)))
        for lr in lrs
        for damping in DAMPINGS
    ]
    folder.mkdir(parents=True)
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(folder / "runs.csv", index=False)
    return folder


def test_the_rate_is_found(tmp_path: Path) -> None:
    runs = rule.read_tuning(write_runs(tmp_path / "a", rate=1.0))
    # λ + s/m is 0.041 and 0.14, and the best learning rates of the grid 0.1 and 0.1
    assert rule.fitted_rate(runs) == pytest.approx((0.1 / 0.041 + 0.1 / 0.14) / 2)


def test_a_task_that_follows_the_rule_loses_nothing(tmp_path: Path) -> None:
    rows = rule.tested("a", rule.read_tuning(write_runs(tmp_path / "a", rate=1.0)), 1.0)
    assert [(row["damping"], row["rule_lr"], row["tried_lr"], row["lost"]) for row in rows] == [
        (1e-3, 0.041, 0.1, 0.0),
        (1e-1, 0.14, 0.1, 0.0),
    ]


def test_a_task_that_does_not_follow_it_shows_what_is_lost(tmp_path: Path) -> None:
    rows = rule.tested("b", rule.read_tuning(write_runs(tmp_path / "b", rate=0.01)), 1.0)
    assert rows[1]["best_lr"] == 0.001
    assert rows[1]["tried_lr"] == 0.1
    assert rows[1]["lost"] == pytest.approx(math.log10(0.1 / 0.0014) - math.log10(0.0014 / 0.001), abs=0.01)


def test_start_is_good_for_the_method_that_it_suits_least(tmp_path: Path) -> None:
    """One method is best at lr 0.01 and the other at lr 1; at lr 0.1 neither loses much."""
    runs = pd.concat(
        rule.read_tuning(write_runs(tmp_path / name, rate, name)).query("damping == 0.001")
        for name, rate in (("dense M-FAC", 0.01 / 0.041), ("sparse M-FAC", 1 / 0.041))
    )
    assert rule.start(runs) == (0.1 * WINDOW, 1e-3)
    rows = rule.started("a", runs, (9.0, 2e-3))
    assert [(row["best_lr"], row["tried_lr"], row["lost"]) for row in rows] == [(0.01, 0.1, 1.0), (1.0, 0.1, 1.0)]


def test_start_is_a_point_that_all_methods_have_tried(tmp_path: Path) -> None:
    runs = rule.read_tuning(write_runs(tmp_path / "a", rate=1.0))
    other = runs[runs["lr"] > 0.5].assign(label="another")
    assert rule.start(pd.concat([runs, other])) == (1.0 * WINDOW, 1e-1)


def test_start_is_a_higher_rate_for_a_shorter_window(tmp_path: Path) -> None:
    runs = rule.read_tuning(write_runs(tmp_path / "a", rate=1.0)).assign(window=10)
    assert [row["tried_lr"] for row in rule.started("a", runs, (1.0, 1e-3))] == [0.1]


def test_the_command_writes_a_table_of_all_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_runs(tmp_path / "a", rate=1.0)
    write_runs(tmp_path / "b", rate=3.0)
    rule.main(["a", "--on", "b", "--results", str(tmp_path)])
    frame = pd.read_csv(tmp_path / "rule.csv")
    assert list(frame.columns) == list(rule.COLUMNS)
    assert frame["task"].tolist() == ["a", "a", "b", "b"]
    assert pd.read_csv(tmp_path / "start.csv")["task"].tolist() == ["a", "b"]
    assert "points lost" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["Adam", None])
def test_without_runs_it_says_so(tmp_path: Path, method: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if method:
        write_runs(tmp_path / "a", rate=1.0, method=method)
    with pytest.raises(SystemExit):
        rule.main(["a", "--results", str(tmp_path)])
    assert "runs.csv" in capsys.readouterr().err
