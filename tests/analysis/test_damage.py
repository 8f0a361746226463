"""Unfinished and damaged results give a report on what there is, or say what is missing, and never fail otherwise."""

import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from efcp.analysis import paper, rule, tradeoff
from efcp.analysis.experiments import Experiment
from efcp.analysis.summary import read_runs, summarise
from efcp.analysis.training import COLUMNS
from tests.analysis.synthetic import invented, noise
from tests.analysis.test_paper import CONFIG, MORE
from tests.damage import damaged

EXPERIMENT = Experiment("whole", "a title", {}, [], [], [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The CSV files of a finished experiment by name, with timing, and an optimum."""
    folder = tmp_path_factory.mktemp("damage")
    (folder / "whole.toml").write_text(CONFIG + MORE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efcp.analysis.paper.load_task_data", lambda *_: noise((1, 8, 8)))
        patch.setattr("efcp.analysis.running.train", invented)
        paper.main([str(folder / "whole.toml"), "--jobs", "1", "--out", str(folder)])
    path = folder / "whole" / "runs.csv"
    runs = pd.read_csv(path, dtype=str, keep_default_na=False).assign(grad_norm="1.0")
    timing = runs[(runs["phase"] == "final") & (runs["seed"] == "0")]
    timing = timing.assign(phase="timing", step_ms="2.0", optimizer_ms="1.0", run="timing" + timing["run"])
    pd.concat([runs, timing]).to_csv(path, index=False, lineterminator="\n")
    (folder / "whole" / "optimum.csv").write_text("objective\n0.5\n")
    return {file.name: file.read_text(encoding="utf-8") for file in (folder / "whole").glob("*.csv")}


@pytest.fixture
def folder(finished: dict[str, str], tmp_path: Path) -> Path:
    """A folder with these files."""
    for name, text in finished.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def kept(folder: Path, keep: Callable[[pd.DataFrame], "pd.Series[bool]"]) -> None:
    """Leaves only some of the runs."""
    runs = pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    runs[keep(runs)].to_csv(folder / "runs.csv", index=False, lineterminator="\n")


# ---- what is missing


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (["tune"], "there are no final runs"),
        (["final", "timing"], "there are no tuning runs"),
        ([], "there are no tuning runs"),
    ],
    ids=["tuning only", "no tuning", "header only"],
)
def test_an_unfinished_experiment_says_what_is_missing(
    folder: Path, capsys: pytest.CaptureFixture[str], phases: list[str], message: str
) -> None:
    kept(folder, lambda runs: runs["phase"].isin(phases))
    paper.report(EXPERIMENT, folder)
    assert f"{folder}: no table yet, {message}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        tradeoff.main(["--plot-only", "--out", str(folder)])
    assert f"error: {folder / 'runs.csv'} is not finished: {message}" in capsys.readouterr().err
    assert not (folder / "table.md").exists()


def test_final_runs_at_another_point_are_none(folder: Path) -> None:
    runs = read_runs(folder / "runs.csv")
    runs.loc[runs["phase"] == "final", "lr"] = 7.0
    with pytest.raises(ValueError, match="no final run is at the point"):
        summarise(runs)


def test_methods_without_final_runs_are_named(folder: Path) -> None:
    kept(folder, lambda runs: ~(runs["phase"].eq("final") & runs["method"].eq("Adam")))
    for report in (tradeoff.report, lambda path: paper.report(EXPERIMENT, path)):
        report(folder)
        table = (folder / "table.md").read_text(encoding="utf-8")
        assert "| Adam " not in table
        assert "- Missing, since there is no final run at the chosen point: Adam.\n" in table


def test_methods_that_were_not_timed_are_named(folder: Path) -> None:
    kept(folder, lambda runs: ~(runs["phase"].eq("timing") & runs["method"].isin(["Adam", "dense M-FAC"])))
    tradeoff.report(folder)
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "- Steps have not been timed of dense M-FAC; Adam.\n" in table


@pytest.mark.parametrize("name", ["curves.csv", "diagnostics.csv", "optimum.csv"])
def test_a_damaged_file_beside_the_runs_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text("")
    with pytest.raises(ValueError, match=f"{name} is empty"):
        paper.report(EXPERIMENT, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: text[:-1], "ends within line 93: it was cut off, delete that line"),
        (lambda text: text + "tune,Adam\n", f"line 94 has 2 fields, and the header {len(COLUMNS)}"),
        (lambda text: text.replace(",lr,", ",rate,", 1), "lacks the columns lr"),
        (lambda text: text.replace("\ntune,", "\n,", 1), "line 2 has no phase"),
        (lambda text: text.replace(",0.003,", ",little,", 1), "line 2: lr must be a number, got 'little'"),
    ],
    ids=["empty", "cut off", "short line", "column", "cell", "number"],
)
def test_a_damaged_file_is_told_apart(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[str], str], message: str
) -> None:
    path = folder / "runs.csv"
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        tradeoff.main(["--plot-only", "--out", str(folder)])
    found = capsys.readouterr().err
    assert str(path) in found
    assert message in found


# ---- at random


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_ends_in_a_report_or_an_error_that_names_the_file(
    folder: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """A fifth of the cases draw all plots of an experiment, and the others the plot of the trade-off."""
    generator = random.Random(seed)
    every = seed % 5 == 0
    path = folder / (generator.choice(sorted(file.name for file in folder.iterdir())) if every else "runs.csv")
    path.write_text(damaged(path.read_text(encoding="utf-8"), generator), encoding="utf-8")
    try:
        if every:
            paper.report(EXPERIMENT, folder)
        else:
            tradeoff.report(folder)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017, since a report is right, too
    else:
        assert (folder / "table.md").exists() or "no table yet" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(20))
def test_any_damage_ends_in_a_rule_or_an_error(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    results = tmp_path_factory.mktemp("rule")
    (results / "whole").mkdir()
    text = damaged((folder / "runs.csv").read_text(encoding="utf-8"), random.Random(seed))
    (results / "whole" / "runs.csv").write_text(text, encoding="utf-8")
    try:
        rule.main(["whole", "--results", str(results)])
    except SystemExit as error:
        assert error.code == 2  # noqa: PT017, since a rule is right, too
        assert "error: " in capsys.readouterr().err
    else:
        assert (results / "rule.csv").exists()
