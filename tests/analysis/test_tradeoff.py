"""The experiment from end to end, on images written here: what is recorded, and what decides."""

import csv
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from efcp import memory_report
from efcp.analysis.data import DataSet, Split, load_data
from efcp.analysis.methods import Method, compared_methods
from efcp.analysis.models import small_cnn
from efcp.analysis.running import Plan, RecordFile, Trainer
from efcp.analysis.summary import POINT, choose, markdown, read_runs, remarks, summarise
from efcp.analysis.tasks import Task
from efcp.analysis.tradeoff import main
from efcp.analysis.training import COLUMNS, Result, Run, accuracy, batches, time_steps, train
from tests.analysis.image_sets import write_image_set

TASK = Task("small-cnn", "fashion-mnist", (1, 8, 8), train_size=200, epochs=1, batch_size=20, width=4)


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    """A command line of few and short runs."""
    settings = "--data fashion-mnist --train-size 200 --epochs 2 --batch-size 20 --width 4 --window 4 --jobs 1"
    grid = "--densities 0.1 --ranks 2 --power-iterations 1 2 --lrs 0.01 0.03 0.1 --seeds 1"
    return [*settings.split(), *grid.split(), "--data-dir", str(images), "--out", str(out), *more]


@pytest.fixture(scope="module", autouse=True)
def _few_timed_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efcp.analysis.tradeoff.time_steps", partial(time_steps, steps=2, warm_up=1))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished experiment."""
    folder = tmp_path_factory.mktemp("finished")
    main(arguments(write_image_set(folder / "images"), folder))
    return folder


# ---- the files


def test_the_csv_holds_every_run(finished: Path) -> None:
    with (finished / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    methods = len(compared_methods(4, 1e-3, [0.1], [2], [1, 2]))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["phase"] for row in rows] == ["tune"] * 3 * methods + ["final"] * methods + ["timing"] * methods
    for row in rows:
        assert bool(row["test_accuracy"]) == (row["phase"] == "final")
        assert bool(row["val_accuracy"]) == (row["phase"] != "timing")
        assert bool(row["step_ms"]) == (row["phase"] == "timing")
        assert row["data_set"] == "fashion-mnist"
        assert row["torch_version"] == torch.__version__
    final = {row["method"]: row for row in rows if row["phase"] == "final"}
    assert float(final["Adam"]["bytes_per_parameter"]) == pytest.approx(8, abs=0.1)
    assert final["Adam"]["window"] == final["Adam"]["state_bytes_estimated"] == ""
    assert final["dense M-FAC"]["state_bytes"] == final["dense M-FAC"]["state_bytes_estimated"]
    assert final["sparse M-FAC"]["steps"] == "20"


def test_table_and_plot(finished: Path) -> None:
    table = (finished / "table.md").read_text(encoding="utf-8")
    for label in (
        "SGD (momentum 0.9)",
        "Adam",
        "dense M-FAC",
        "sparse M-FAC 10%, no error feedback",
        "sparse GGT 1%",
        "low-rank M-FAC rank 2, 1 power iteration",
        "low-rank M-FAC rank 2, 2 power iterations",
    ):
        assert f"| {label} " in table
    png = (finished / "tradeoff.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert 10_000 < len(png) < 200_000


def test_the_csv_alone_gives_the_same_table(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_bytes((finished / "runs.csv").read_bytes())
    main(["--plot-only", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_bytes() == (finished / "table.md").read_bytes()
    assert (tmp_path / "tradeoff.png").read_bytes() == (finished / "tradeoff.png").read_bytes()


def test_resume_runs_only_what_is_missing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (finished / "runs.csv").read_text().splitlines(keepends=True)
    kept = [row for row in whole if not row.startswith(("tune,Adam", "timing"))]
    (tmp_path / "runs.csv").write_text("".join(kept))
    trained: list[Run] = []

    def noted(run: Run, data: DataSet) -> Result:
        trained.append(run)
        return train(run, data)

    monkeypatch.setattr("efcp.analysis.running.train", noted)
    main(arguments(finished / "images", tmp_path))
    assert {(run.phase, run.method.name) for run in trained} == {("tune", "Adam")}
    varying = ["seconds", "cpu_seconds", "step_ms", "optimizer_ms"]
    own, other = (pd.read_csv(folder / "runs.csv").drop(columns=varying) for folder in (tmp_path, finished))
    pd.testing.assert_frame_equal(own, other)


def test_a_second_start_changes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "runs.csv", tmp_path)
    monkeypatch.setattr("efcp.analysis.running.train", None)
    monkeypatch.setattr("efcp.analysis.tradeoff.time_steps", None)
    main(arguments(finished / "images", tmp_path))
    assert "runs.csv holds 40 runs, which are kept" in capsys.readouterr().out
    for name in ("runs.csv", "table.md", "tradeoff.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    assert not (tmp_path / ".lock").exists()


def test_more_seeds_and_points_join_what_is_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(finished / "runs.csv", tmp_path)
    trained: list[Run] = []

    def noted(run: Run, data: DataSet) -> Result:
        trained.append(run)
        return train(run, data)

    monkeypatch.setattr("efcp.analysis.running.train", noted)
    before = set((finished / "runs.csv").read_text().splitlines())
    main(arguments(finished / "images", tmp_path, "--seeds", "2", "--lrs", "0.01", "0.03", "0.1", "1e-9"))
    assert {(run.phase, run.lr) for run in trained if run.phase == "tune"} == {("tune", 1e-9)}
    assert 1 in {run.seed for run in trained if run.phase == "final"}
    assert not {run.key for run in trained} & set(read_runs(finished / "runs.csv")["run"])
    assert before < set((tmp_path / "runs.csv").read_text().splitlines())


OTHER_SETTINGS = {
    "--epochs 1": "holds runs with epochs 2, not 1",
    "--window 5": "holds runs with window 4, not 5",
    "--densities 0.2": "holds runs with density 0.1, not 0.01, 0.2",
    "--lrs 0.01 0.03": "holds runs with lr 0.1, not 0.01, 0.03",
    "--ranks 1": "holds runs with rank 2, not 1",
}


@pytest.mark.parametrize("other", OTHER_SETTINGS)
def test_runs_of_other_settings_are_neither_joined_nor_overwritten(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    shutil.copy(finished / "runs.csv", tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments(finished / "images", tmp_path, *other.split()))
    assert caught.value.code == 2
    found = capsys.readouterr().err
    assert f"{tmp_path / 'runs.csv'} {OTHER_SETTINGS[other]}" in found
    assert "choose another --out" in found
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert (tmp_path / "runs.csv").read_bytes() == (finished / "runs.csv").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ("a,b\n1,2\n", "lacks the columns phase"), (",".join(COLUMNS) + "\ntune,Adam", "was cut off")],
    ids=["empty", "another file", "cut off"],
)
def test_a_file_that_is_not_whole_is_not_overwritten(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(arguments(finished / "images", tmp_path))
    assert message in capsys.readouterr().err
    assert (tmp_path / "runs.csv").read_text() == text


def test_a_run_that_no_plan_has_is_refused(finished: Path) -> None:
    """The settings have each of the run's values, but not together."""
    records = RecordFile(finished / "runs.csv")
    methods = compared_methods(4, 3e-3, [0.1], [2], [1, 2])
    size = {"train_size": 200, "epochs": 2, "batch_size": 20}
    task = replace(TASK, input_shape=(1, 28, 28), **size)
    plans = [Plan([Run("tune", task, m, lr, 1000) for lr in (0.01, 0.03, 0.1)], range(1)) for m in methods]
    records.check(plans)
    plans[1] = Plan(plans[1].tuning[1:], range(1))
    with pytest.raises(ValueError, match=r"settings do not have, phase tune, method Adam, lr 0\.01, seed 1000"):
        records.check(plans)


# ---- what decides


def test_test_labels_do_not_move_the_chosen_lr(finished: Path, tmp_path: Path) -> None:
    main(arguments(write_image_set(tmp_path / "images", shuffle_test=True), tmp_path))
    own, other = read_runs(tmp_path / "runs.csv"), read_runs(finished / "runs.csv")
    pd.testing.assert_frame_equal(choose(own)[[*POINT]], choose(other)[[*POINT]])
    assert own["val_accuracy"].equals(other["val_accuracy"])
    assert not own["test_accuracy"].equals(other["test_accuracy"])


def test_the_best_mean_on_the_validation_split_is_chosen() -> None:
    rows = [
        ("tune", "a", 0.1, 1e-3, 50, 99),
        ("tune", "a", 0.1, 1e-3, 90, 99),
        ("tune", "a", 0.1, 1e-2, 90, 99),
        ("tune", "a", 0.1, 1e-2, 50, 99),
        ("tune", "a", 0.3, 1e-2, 80, 0),
        ("tune", "a", 0.3, 1e-2, 70, 0),
        ("tune", "a", 0.3, 1e-3, 70, 0),
        ("tune", "a", 0.3, 1e-3, 70, 99),
    ]
    rows += [("final", "a", 0.1, 1e-3, 99, 99), ("map", "a", 0.1, 1e-1, 99, 99)]
    rows += [("tune", "b", 1.0, None, 60, 0), ("tune", "b", 0.1, None, 60, 0)]
    runs = pd.DataFrame(rows, columns=["phase", "label", "lr", "damping", "val_accuracy", "test_accuracy"])
    chosen = choose(runs.assign(eps=None, weight_decay=None, run=range(len(runs))))
    assert chosen["lr"].to_dict() == {"a": 0.3, "b": 0.1}
    assert chosen.loc["a", "damping"] == 1e-2
    assert chosen.loc["a", "run"] == 4


@pytest.mark.slow
def test_jobs_do_not_change_results(finished: Path) -> None:
    data = load_data("fashion-mnist", finished / "images", 200)
    runs = [Run("final", TASK, m, 0.01, seed) for m in compared_methods(4, 1e-3, [0.1])[2:4] for seed in (0, 1)]
    results = []
    for jobs in (1, 2):
        with Trainer(data, jobs) as trainer:
            records = sorted((result.record for result in trainer(runs)), key=lambda r: (r["method"], r["seed"]))
        results.append([(r["val_accuracy"], r["test_accuracy"], r["train_loss"]) for r in records])
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


def test_methods_share_initialisation_and_batches(finished: Path) -> None:
    first, again, other = (TASK.model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    data = load_data("fashion-mnist", finished / "images", 200)
    first_epoch = torch.cat(
        [images for images, _ in batches(data.train, Run("tune", TASK, compared_methods(4, 1e-3, [])[0], 0.1, 0))]
    )
    assert torch.equal(first_epoch.sort(0).values, data.train.inputs.sort(0).values)


# ---- a run


@pytest.mark.parametrize("method", compared_methods(8, 1e-3, [0.1, 0.001], [2], [1, 4])[2:], ids=lambda m: m.label)
def test_measured_memory_equals_the_estimate(method: Method) -> None:
    model = small_cnn(3)
    optimizer = method.build(model, 1e-3)
    model(torch.zeros(1, 1, 28, 28)).sum().backward()
    optimizer.step()
    assert memory_report(optimizer) == method.estimate(model)


def test_a_diverged_run_counts(finished: Path) -> None:
    data = load_data("fashion-mnist", finished / "images", 200)
    run = Run("final", TASK, compared_methods(4, 1e-3, [0.1])[0], 1e30, 0)
    record = train(run, data).record
    assert record["diverged"]
    assert record["steps"] < run.steps
    assert 0 <= record["test_accuracy"] < 50


def test_images_without_a_finite_output_are_wrong() -> None:
    model = nn.Identity()
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")]])
    assert accuracy(model, Split(logits, torch.tensor([1, 0, 1, 1]))) == 25


def test_divergence_and_edges_of_the_grid_are_reported(finished: Path) -> None:
    runs = read_runs(finished / "runs.csv")
    runs.loc[runs["method"] == "Adam", "diverged"] = True
    runs.loc[(runs["method"] == "Adam") & (runs["phase"] == "tune"), "val_accuracy"] = 0.0
    runs.loc[runs["method"] == "Adam", "lr"] = 0.01
    summary = summarise(runs)
    assert "0.01 (edge)" in markdown(summary)
    text = "\n".join(remarks(runs, summary))
    assert "3 of 24 tuning runs diverged" in text
    assert "Adam: 1 of 1 final runs diverged" in text


# ---- the command line

BAD_ARGUMENTS = {
    "--epochs 0": "must be an integer ≥ 1, got '0'",
    "--seeds two": "must be an integer ≥ 1, got 'two'",
    "--densities 0.1 1.5": "must be a number > 0 and ≤ 1, got '1.5'",
    "--damping 0": "must be a number > 0, got '0'",
    "--lrs 0.1 inf": "must be a number > 0, got 'inf'",
    "--lrs 0.1 0.1": "--lrs must be distinct, got 0.1 0.1",
    "--data cifar": "invalid choice: 'cifar'",
    "--batch-size 201": "--batch-size must be at most the training size 200, got 201",
    "--train-size 441": "the training size must lie in [1, 440], got 441",
    "--data-dir nowhere": "Fashion-MNIST was not found",
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_runs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments(finished / "images", tmp_path / "out", *bad.split()))
    assert caught.value.code == 2
    assert BAD_ARGUMENTS[bad] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_keeps_finished_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Run, data: DataSet) -> Result:
        if run.method.name == "Adam":
            raise KeyboardInterrupt
        return train(run, data)

    monkeypatch.setattr("efcp.analysis.running.train", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(arguments(finished / "images", tmp_path))
    assert caught.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert list(read_runs(tmp_path / "runs.csv")["phase"]) == ["tune"] * 3 + ["final"]


def test_plot_only_needs_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--plot-only", "--out", str(tmp_path)])
    assert f"there is no file {tmp_path / 'runs.csv'}" in capsys.readouterr().err
    (tmp_path / "runs.csv").write_text("phase,method\n")
    with pytest.raises(SystemExit):
        main(["--plot-only", "--out", str(tmp_path)])
    assert "lacks the columns density" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--data fashion-mnist --data-dir" in capsys.readouterr().out
