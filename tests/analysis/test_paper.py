"""Experiments from files: configurations, tasks, what is run and resumed, and what is made of the CSV files."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from efcp.analysis.data import DataSet
from efcp.analysis.experiments import find_experiment, names, read_experiments
from efcp.analysis.figures import ExperimentFiles, accuracy_drops, figures
from efcp.analysis.methods import named_method
from efcp.analysis.models import resnet20
from efcp.analysis.optimum import keep_optimum, optimum
from efcp.analysis.paper import main
from efcp.analysis.running import RecordFile
from efcp.analysis.summary import read_runs, summarise
from efcp.analysis.tasks import Task
from efcp.analysis.training import Result, Run, objective, time_steps, train
from tests.analysis.synthetic import invented, noise

CONFIG = """\
title = "a title"
[task]
network = "small-cnn"
data_set = "fashion-mnist"
width = 4
epochs = 1
batch_size = 16
evaluations = 2
diagnostics = 2
[seeds]
tuning = [1000]
final = [0, 1]
[grids.m-fac]
lr = [0.003, 0.03]
damping = [1e-3, 1e-2]
[grids.adam]
lr = [0.001, 0.003, 0.01, 0.03]
[[methods]]
name = "dense M-FAC"
grid = "m-fac"
window = 4
map = { lr = [0.003, 0.3], damping = [1e-3] }
[[methods]]
name = "sparse M-FAC"
grid = "m-fac"
window = 4
density = [0.5, 0.1]
error_feedback = [true, false]
[[methods]]
name = "Adam"
grid = "adam"
"""
MORE = """
[[methods]]
name = "low-rank M-FAC"
grid = "m-fac"
window = 4
rank = [1, 2]
power_iterations = [1, 2]
[[methods]]
name = "sparse M-FAC"
grid = "m-fac"
window = 10
density = 0.2
[[methods]]
name = "sparse M-FAC"
grid = "m-fac"
window = 4
density = 0.1
block_size = 256
[[methods]]
name = "sparse M-FAC"
grid = "m-fac"
window = 4
density = 0.1
value_dtype = "float32"
error_dtype = "bfloat16"
"""
"""Methods for every question that can be asked of results."""
PROBE = Task("linear-probe", "fashion-mnist-features", (1280,), 64, 1, 16, l2=0.1, evaluations=2, diagnostics=2)
TIMES = ["seconds", "cpu_seconds"]


@pytest.fixture(autouse=True)
def _data_of_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efcp.analysis.paper.load_task_data", lambda *_: noise((1, 8, 8)))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "trial.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of the configuration, after real training."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "trial.toml").write_text(CONFIG, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efcp.analysis.paper.load_task_data", lambda *_: noise((1, 8, 8)))
        main([str(folder / "trial.toml"), "--jobs", "1", "--out", str(folder)])
    return folder / "trial"


# ---- configurations


@pytest.mark.parametrize("name", names())
def test_the_experiments_that_come_along_can_be_run(name: str) -> None:
    for experiment in read_experiments(find_experiment(name)):
        assert len({len(entry.points) for entry in experiment.entries}) == 1
        assert len(experiment.final_seeds) >= (5 if name == "probe" else 3)


BAD = {
    "no network": ('network = "small-cnn"\n', "", r"\[task\] lacks network"),
    "network": ('"small-cnn"', '"vgg"', "task.network must be one of small-cnn, .* got 'vgg'"),
    "decay": ("[task]", '[task]\ndecay = "exponential"', "task.decay must be one of linear, cosine, got 'exponential'"),
    "data set": ('"fashion-mnist"', '"movie-reviews"', "task.data_set must be one of .* for small-cnn, got 'movie-rev"),
    "width": ("width = 4\n", "", r"\[task\] lacks width"),
    "epochs": ("epochs = 1", "epochs = 0", "task.epochs must be an integer ≥ 1, got 0"),
    "task key": ("[seeds]", "depth = 3\n[seeds]", r"\[task\] has no depth; it has network"),
    "seeds": ("final = [0, 1]", "final = [1000]", "seeds.final must differ from seeds.tuning, both hold 1000"),
    "grid size": ("0.003, 0.01, 0.03]", "0.01]", "as many points, .* m-fac has 4, adam has 2"),
    "grid name": ('grid = "adam"', 'grid = "eve"', r"methods\[2\]: grid must be one of m-fac, adam, got 'eve'"),
    "no lr": ("lr = [0.003, 0.03]\n", "", "grids.m-fac must be a table with lr"),
    "lr": ("[0.003, 0.03]", "[0.003, inf]", "grids.m-fac.lr must hold finite numbers"),
    "method": ('"Adam"', '"Adamant"', r"methods\[2\]: a method's name must be one of SGD .* got 'Adamant'"),
    "option": ("density = [0.5, 0.1]", "sparsity = 0.9", r"methods\[1\]: sparse M-FAC: .*'sparsity'"),
    "value": (
        "density = [0.5, 0.1]",
        "density = 1.5",
        r"methods\[1\]: sparse M-FAC: density must lie in \(0, 1\], got 1.5",
    ),
    "syntax": ("title = ", "title ", "trial.toml: "),
    "batch": ("batch_size = 16", "batch_size = 65", "batch_size must be at most the training size 64, got 65"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_configuration_is_refused_before_anything_runs(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    old, new, message = BAD[bad]
    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main([str(config), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_unknown_experiment_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cnm"])
    assert "one of autoencoder, batch-size, cnn, cnn-ablations" in capsys.readouterr().err


def test_a_method_of_several_tables_is_run_once(config: Path) -> None:
    again = '[[methods]]\nname = "sparse M-FAC"\ngrid = "m-fac"\nwindow = 4\ndensity = 0.1\nerror_feedback = true\n'
    config.write_text(CONFIG + again, encoding="utf-8")
    assert len(read_experiments(config)[0].entries) == 6


def test_a_method_may_have_its_own_epochs_and_batches(config: Path) -> None:
    config.write_text(CONFIG + "batch_size = 64\nepochs = 5\n", encoding="utf-8")
    plans = read_experiments(config)[0].plans(noise((1, 8, 8)))
    steps = {run.method.name: (run.task.batch_size, run.steps) for plan in plans for run in plan.tuning}
    assert steps == {"dense M-FAC": (16, 4), "sparse M-FAC": (16, 4), "Adam": (64, 5)}


def test_data_sets_may_have_their_own_epochs(config: Path) -> None:
    sets = CONFIG.replace('"fashion-mnist"', '["fashion-mnist", "cifar10"]').replace("epochs = 1\n", "")
    config.write_text(f"{sets}[task.epochs]\nfashion-mnist = 2\ncifar10 = 3\n", encoding="utf-8")
    assert [experiment.task["epochs"] for experiment in read_experiments(config)] == [2, 3]
    config.write_text(f"{sets}[task.epochs]\nfashion-mnist = 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"task\.epochs lacks cifar10"):
        read_experiments(config)
    config.write_text(sets, encoding="utf-8")
    with pytest.raises(ValueError, match=r"\[task\] lacks epochs"):
        read_experiments(config)


# ---- tasks


@pytest.mark.parametrize(
    ("task", "data"),
    [
        (Task("small-cnn", "cifar10", (3, 8, 8), 64, 1, 32, width=4, evaluations=1, diagnostics=1), noise((3, 8, 8))),
        (Task("resnet20", "cifar10", (3, 8, 8), 64, 1, 32, width=4, evaluations=1, diagnostics=1), noise((3, 8, 8))),
        (PROBE, noise((1280,))),
    ],
    ids=lambda value: value.network if isinstance(value, Task) else "",
)
@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "L-BFGS", "sparse M-FAC", "low-rank GGT"])
def test_every_task_trains(task: Task, data: DataSet, name: str) -> None:
    options = {"window": 4} if name.endswith(("FAC", "GGT")) else {}
    result = train(Run("final", task, named_method(name, options), 1e-3, 0), data)
    assert result.record["steps"] == 64 // task.batch_size
    assert not result.record["diverged"]
    assert len(result.curve) == task.evaluations
    assert result.curve[-1]["val_accuracy"] == result.record["val_accuracy"]
    assert len(result.diagnostics) == task.diagnostics
    assert -1 <= result.record["cosine"] <= 1
    assert result.record["state_bytes"] > 0
    assert (result.record["objective"] is None) == (task.l2 == 0)


def test_resnet20_has_the_parameters_of_the_paper() -> None:
    assert sum(p.numel() for p in resnet20(16, 3).parameters()) == 272_474
    assert resnet20(4)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_schedule_rises_and_falls() -> None:
    task = Task("linear-probe", "fashion-mnist-features", (1280,), 64, 1, 16, warm_up=0.25)
    assert [task.factor(step, 8) for step in range(8)] == pytest.approx(
        [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    assert PROBE.factor(0, 8) == 1
    assert PROBE.factor(7, 8) == 1 / 8
    falling = replace(task, decay="cosine")
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [falling.factor(step, 8) for step in range(8)] == pytest.approx([1 / 2, 1, *cosine])


def test_times_are_printed_and_nothing_is_kept(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efcp.analysis.paper.load_task_data", lambda *_: noise((1, 8, 8)))
    main([str(config), "--times", "--out", str(tmp_path / "out")])
    rows = re.findall(r"^\| (.+?) +\| +([\d.]+) \|$", capsys.readouterr().out, re.MULTILINE)
    sparse = [f"sparse M-FAC {kept}{own}" for kept in ("50%", "10%") for own in ("", ", no error feedback")]
    assert [name for name, _ in rows] == ["dense M-FAC", *sparse, "Adam"]
    assert all(float(milliseconds) > 0 for _, milliseconds in rows)
    assert not (tmp_path / "out").exists()


def test_a_step_of_several_evaluations_is_timed_by_evaluation() -> None:
    task = replace(PROBE, batch_size=16)
    runs = [Run("timing", task, named_method(name, {}), 1e-3, 0) for name in ("Adam", "L-BFGS, line search")]
    adam, lbfgs = time_steps(runs, noise((1280,)), steps=3, warm_up=1)
    assert adam["evaluation_ms"] == adam["step_ms"] > adam["optimizer_ms"]
    assert lbfgs["evaluation_ms"] < lbfgs["step_ms"] / 2


def test_each_run_is_timed_on_a_batch_of_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, loss = [], Task.loss
    monkeypatch.setattr(Task, "loss", lambda task, model, x, y: sizes.append(len(x)) or loss(task, model, x, y))
    runs = [Run("timing", replace(PROBE, batch_size=n), named_method("Adam", {}), 1e-3, 0) for n in (16, 32)]
    time_steps(runs, noise((1280,)), steps=1, warm_up=1)
    assert sizes == [16, 32, 16, 32]


def test_diagnostics_are_those_of_the_step() -> None:
    """SGD has u = g, neither turned nor scaled."""
    method = named_method("SGD (momentum 0.9)", {"momentum": 0.0})
    record = train(Run("tune", PROBE, method, 1e-2, 0), noise((1280,))).record
    assert record["cosine"] == pytest.approx(1, abs=1e-3)
    assert [record[f"scaling_q{q}"] for q in (25, 50, 75)] == pytest.approx([1, 1, 1], abs=1e-2)


def test_the_test_split_is_looked_at_by_final_runs_only() -> None:
    data = noise((1280,))
    for phase in ("tune", "map", "final"):
        record = train(Run(phase, PROBE, named_method("Adam", {}), 1e-3, 0), data).record
        assert (record["test_accuracy"] is not None) == (phase == "final")


def test_the_optimum_is_below_every_loss(tmp_path: Path) -> None:
    data = noise((1280,))
    least = optimum(PROBE, data)
    assert 0 <= float(least["objective"]) - float(least["lower_bound"]) < 1e-9
    model = PROBE.model(0)
    assert objective(PROBE, model, data.train) == pytest.approx(2.302585, abs=1e-5)
    assert float(least["objective"]) < 2.3
    keep_optimum(PROBE, data, tmp_path)
    before = (tmp_path / "optimum.csv").stat().st_mtime_ns
    keep_optimum(PROBE, data, tmp_path)
    assert (tmp_path / "optimum.csv").stat().st_mtime_ns == before


# ---- runs


def test_every_run_is_recorded(finished: Path) -> None:
    runs = read_runs(finished / "runs.csv")
    assert runs.groupby("phase").size().to_dict() == {"tune": 6 * 4, "final": 6 * 2, "map": 1}
    final = set(runs.loc[runs["phase"] == "final", "run"])
    for name in ("curves.csv", "diagnostics.csv"):
        details = pd.read_csv(finished / name, dtype={"run": str})
        assert details.groupby("run").size().to_dict() == dict.fromkeys(final, 2)
    assert runs.loc[runs["window"].notna(), "state_bytes"].equals(
        runs.loc[runs["window"].notna(), "state_bytes_estimated"].astype(int)
    )


def test_an_interrupted_experiment_ends_as_an_uninterrupted_one(
    finished: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    attempts = 0

    def stopping(run: Run, data: DataSet) -> Result:
        nonlocal attempts
        attempts += 1
        if attempts % 7 == 0:
            raise KeyboardInterrupt
        trained.append(run.key)
        return train(run, data)

    monkeypatch.setattr("efcp.analysis.running.train", stopping)
    for _ in range(6):
        with pytest.raises(SystemExit):
            main([str(config), "--jobs", "1", "--out", str(tmp_path)])
    main([str(config), "--jobs", "1", "--out", str(tmp_path)])
    assert len(trained) == len(set(trained)) == 37
    for name in ("runs.csv", "curves.csv", "diagnostics.csv"):
        own, other = (pd.read_csv(f / name, dtype={"run": str}) for f in (tmp_path / "trial", finished))
        varying = [column for column in TIMES if column in own]
        pd.testing.assert_frame_equal(own.drop(columns=varying), other.drop(columns=varying))


def test_details_without_a_record_are_of_an_unfinished_run(finished: Path, tmp_path: Path) -> None:
    for name in ("runs.csv", "curves.csv", "diagnostics.csv"):
        lines = (finished / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:-1] if name == "runs.csv" else lines))
    records = RecordFile(tmp_path / "runs.csv")
    assert len(records.rows) == 36
    for _, rows in records.details.values():
        assert set(rows) <= set(records.rows)


def test_minutes_limit_what_is_started(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efcp.analysis.running.train", invented)
    main([str(config), "--jobs", "1", "--out", str(tmp_path), "--minutes", "0"])
    assert not (tmp_path / "trial" / "runs.csv").exists()


def test_an_experiment_without_data_does_not_stop_the_others(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace('"fashion-mnist"', '"mnist5k"'), encoding="utf-8")

    def load(name: str, *_: object) -> DataSet:
        if name == "mnist5k":
            raise FileNotFoundError("no such images")
        return noise((1, 8, 8))

    monkeypatch.setattr("efcp.analysis.paper.load_task_data", load)
    monkeypatch.setattr("efcp.analysis.running.train", invented)
    with pytest.raises(SystemExit) as error:
        main([str(other), str(config), "--jobs", "1", "--out", str(tmp_path)])
    assert error.value.code == 2
    assert "other: no such images" in capsys.readouterr().err
    assert (tmp_path / "trial" / "table.md").is_file()


def test_a_missing_package_is_explained_and_does_not_stop_the_others(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(CONFIG, encoding="utf-8")

    def without(run: Run, data: DataSet) -> Result:
        if not (tmp_path / "other" / "table.md").exists():
            (tmp_path / "other" / "table.md").touch()
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return invented(run, data)

    monkeypatch.setattr("efcp.analysis.running.train", without)
    with pytest.raises(SystemExit) as error:
        main([str(other), str(config), "--jobs", "1", "--out", str(tmp_path)])
    assert error.value.code == 2
    assert "error: other: transformers is missing: pip install 'efcp[paper]'\n" in capsys.readouterr().err
    assert (tmp_path / "trial" / "table.md").is_file()


def test_runs_that_a_configuration_has_no_more_are_not_dropped(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trial").mkdir()
    before = (finished / "runs.csv").read_bytes()
    (tmp_path / "trial" / "runs.csv").write_bytes(before)
    config.write_text(CONFIG.replace("density = [0.5, 0.1]", "density = [0.5]"), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(config), "--jobs", "1", "--out", str(tmp_path)])
    assert "holds runs with density 0.1, not 0.5: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "trial" / "runs.csv").read_bytes() == before


def test_jobs_are_checked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(config), "--jobs", "0"])
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err


def test_records_of_another_task_are_not_joined(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "runs.csv").write_bytes((finished / "runs.csv").read_bytes())
    config.write_text(CONFIG.replace("epochs = 1", "epochs = 2"), encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(config), "--jobs", "1", "--out", str(tmp_path)])
    assert "holds runs with epochs 1, not 2" in capsys.readouterr().err


# ---- what is made of the CSV files


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with results of an experiment that every question can be asked of; nothing is trained."""
    monkeypatch.setattr("efcp.analysis.running.train", invented)
    (tmp_path / "whole.toml").write_text(CONFIG + MORE, encoding="utf-8")
    main([str(tmp_path / "whole.toml"), "--jobs", "1", "--out", str(tmp_path)])
    (tmp_path / "whole" / "optimum.csv").write_text("objective\n0.5\n")
    return tmp_path


def test_every_question_has_a_plot(whole: Path) -> None:
    drawn = figures(ExperimentFiles(whole / "whole", "a title"))
    wanted = {"memory", "windows", "feedback", "breaking", "low-rank", "storage", "heatmaps", "scaling", "cost"}
    assert set(drawn) == wanted
    for name in wanted:
        png = (whole / "whole" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 200_000


def test_comparisons_are_drawn_where_there_is_something_to_compare(whole: Path) -> None:
    path = whole / "whole" / "runs.csv"
    runs = pd.read_csv(path, dtype=str, keep_default_na=False)

    def drawn(kept: pd.Series) -> dict[str, Any]:
        runs[kept].to_csv(path, index=False)
        return figures(ExperimentFiles(whole / "whole", "a title"))

    assert len(drawn(runs["power_iterations"] != "2")["low-rank"].axes) == 1
    assert "low-rank" not in drawn((runs["power_iterations"] != "2") & (runs["rank"] != "2"))
    assert "windows" not in drawn(runs["window"] != "10")


def test_table_tells_what_the_papers_window_would_take(whole: Path) -> None:
    numel = read_runs(whole / "whole" / "runs.csv")["numel"].iloc[0]
    expected = 4 * 1024 + (2 * 8 * 1024**2 + 8 * 1024) / numel  # rows; S, the inverse root and the weights
    found = re.search(r"window of 1,024 takes .+ GB, ([\d,]+) bytes", (whole / "whole" / "table.md").read_text("utf-8"))
    assert found
    assert abs(int(found[1].replace(",", "")) - expected) < 1


def test_the_csv_alone_gives_the_same_table(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = whole / "whole"
    table = (folder / "table.md").read_bytes()
    for file in folder.iterdir():
        if file.suffix in (".md", ".png"):
            file.unlink()
    monkeypatch.setattr("efcp.analysis.running.train", None)
    main([str(whole / "whole.toml"), "--plot-only", "--out", str(whole)])
    assert (folder / "table.md").read_bytes() == table
    assert (folder / "memory.png").exists()


def test_variations_have_labels_of_their_own(whole: Path) -> None:
    labels = list(ExperimentFiles(whole / "whole", "").summary.index)
    assert len(labels) == len(set(labels)) == 6 + 4 + 3
    assert "sparse M-FAC 10%, block size 256" in labels
    assert "sparse M-FAC 10%, values float32, error bfloat16" in labels


def test_the_chosen_damping_counts_too(whole: Path) -> None:
    """The invented accuracy is best at lr 0.03 and damping 1e-3."""
    rows = summarise(read_runs(whole / "whole" / "runs.csv"))
    windowed = rows[rows["window"].notna()]
    assert set(windowed["lr"]) == {0.03}
    assert set(windowed["damping"]) == {1e-3}


def test_drops_are_against_the_same_window_with_an_interval() -> None:
    columns: dict[str, list[Any]] = {
        "method": ["dense M-FAC", "sparse M-FAC", "sparse M-FAC"],
        "window": [4, 4, 8],
        "density": [None, 0.1, 0.1],
        "error_feedback": [None, True, True],
        "test_mean": [90.0, 88.0, 70.0],
        "test_std": [0.3, 0.4, 0.1],
        "seeds": [3, 3, 3],
    }
    drops = accuracy_drops(pd.DataFrame(columns, index=["a", "b", "c"]))
    assert list(drops["label"]) == ["b"]
    assert drops["drop"].item() == pytest.approx(2)
    assert drops["interval"].item() == pytest.approx(2.776 * (0.125 * 2 / 3) ** 0.5)
