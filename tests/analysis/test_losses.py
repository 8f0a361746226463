"""Tasks without classes: networks, data, choice by loss, and an experiment from its file to its plots."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from efcp.analysis.autoencoders import autoencoder, conv_autoencoder, reconstruction_loss, with_pixels
from efcp.analysis.data import DataSet, Split
from efcp.analysis.experiments import read_experiments
from efcp.analysis.gpt import GPT
from efcp.analysis.methods import CONSTRUCTORS, named_method
from efcp.analysis.paper import main
from efcp.analysis.source import LENGTH, load_source
from efcp.analysis.summary import choose, read_runs, summarise
from efcp.analysis.tasks import Task

EXPERIMENT = """
title = "A small autoencoder"
[task]
network = "conv-autoencoder"
data_set = "mnist5k-pixels"
train_size = 256
width = 2
epochs = 2
batch_size = 64
evaluations = 2
diagnostics = 2
[seeds]
tuning = [1000]
final = [0, 1]
[grids.plain]
lr = [0.001, 0.003, 0.01]
[grids.windowed]
lr = [0.001, 0.003, 0.01]
damping = [0.1]
[[methods]]
name = ["AdamW", "Muon", "normalised momentum"]
grid = "plain"
[[methods]]
name = ["MFACW", "KroneckerW, split"]
grid = "windowed"
"""


def test_the_deep_autoencoder_has_the_published_size():
    model = autoencoder()
    assert sum(p.numel() for p in model.parameters()) == 2_837_314
    assert model(torch.rand(3, 1, 28, 28)).shape == (3, 784)
    assert not any(isinstance(layer, torch.nn.Sigmoid) for layer in (model[8], model[-1]))  # code and logits


def test_the_loss_of_an_autoencoder_is_that_of_its_pixels():
    model, images = conv_autoencoder(4), torch.rand(5, 1, 28, 28)
    probabilities = model(images).sigmoid()
    expected = F.binary_cross_entropy(probabilities, images, reduction="sum") / 5
    torch.testing.assert_close(reconstruction_loss(model, images), expected)


def test_pixels_are_in_the_unit_interval_again():
    def split(n):
        return Split(3 * torch.randn(n, 1, 2, 2) - 1, torch.zeros(n, dtype=torch.int64))

    data = with_pixels(DataSet("some", split(50), split(20), split(20)))
    assert data.name == "some-pixels"
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 1)
    assert all(0 <= s.inputs.min() and s.inputs.max() <= 1 for s in (data.validation, data.test))


def test_a_prediction_does_not_look_ahead():
    model, tokens = GPT(32, 2, 8), torch.randint(0, 256, (2, 8))
    other = tokens.clone()
    other[:, 5] += 1
    ours, theirs = model(tokens), model(other % 256)
    assert torch.equal(ours[:, :5], theirs[:, :5])
    assert not torch.equal(ours[:, 5:], theirs[:, 5:])


def test_sequences_are_of_different_files_and_followed_by_their_next_bytes(tmp_path: Path):
    for number in range(60):
        name = f"{number:02d}"
        (tmp_path / f"{name}.py").write_text(f"{name}," * 60)
    data = load_source(100, tmp_path)
    again = load_source(100, tmp_path)
    assert torch.equal(data.train.inputs, again.train.inputs)
    assert data.train.inputs.shape == (100, LENGTH)
    for split in (data.train, data.validation, data.test):
        assert torch.equal(split.inputs[:, 1:], split.labels[:, :-1])
    found = [
        {bytes(row[:40].tolist()).split(b",")[1] for row in split.inputs}
        for split in (data.train, data.validation, data.test)
    ]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]
    with pytest.raises(ValueError, match="training size must lie in"):
        load_source(10**6, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold at least 20 \.py files, got 0"):
        load_source(1, tmp_path / "empty")


def test_python_itself_has_enough_text():
    data = load_source()
    assert len(data.train.inputs) == 20_000
    assert len(data.validation.inputs) == len(data.test.inputs) == 1000


COMPARED = [n for n in CONSTRUCTORS if "W" in n or n in ("Muon", "SOAP", "normalised momentum")]
COMPARED.remove("AdamW, 8 bits")  # which a compiler must build, for a minute


@pytest.mark.parametrize("name", COMPARED)
def test_methods_train_a_gpt(name: str):
    task = Task("gpt", "python-library", (16,), 64, 1, 8, width=32, layers=1)
    model = task.model(0)
    optimizer = named_method(name, {}).build(model, 3e-3)
    tokens = torch.randint(0, 7, (8, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = task.loss(model, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.slow
def test_an_experiment_is_tuned_by_loss_and_drawn(tmp_path: Path):
    file = tmp_path / "small.toml"
    file.write_text(EXPERIMENT)
    assert read_experiments(file)[0].task["network"] == "conv-autoencoder"
    main([str(file), "--out", str(tmp_path), "--jobs", "1"])
    folder = tmp_path / "small"
    for name in ("curves.png", "rates.png", "memory.png"):
        assert (folder / name).stat().st_size > 10_000
    table = (folder / "table.md").read_text()
    assert "test loss" in table
    runs = read_runs(folder / "runs.csv")
    assert runs["val_accuracy"].isna().all()
    summary, chosen = summarise(runs), choose(runs)
    for label, row in summary.iterrows():
        tuning = runs[(runs["label"] == label) & (runs["phase"] == "tune")]
        assert row["lr"] == tuning.loc[tuning["val_loss"].idxmin(), "lr"]
        finals = runs[(runs["label"] == label) & (runs["phase"] == "final")]
        assert row["test_mean"] == pytest.approx(finals["test_loss"].mean())
    assert set(chosen.index) == set(summary.index)


def test_a_run_that_diverged_is_not_chosen():
    rows = [
        {"label": "a", "phase": "tune", "lr": lr, "val_loss": loss, "diverged": lost, "run": str(lr), "network": "gpt"}
        for lr, loss, lost in ((0.1, 1.0, True), (0.2, 3.0, False), (0.3, float("nan"), True))
    ]
    runs = pd.DataFrame(rows)
    for name in ("damping", "eps", "weight_decay", "val_accuracy"):
        runs[name] = float("nan")
    assert choose(runs).loc["a", "lr"] == 0.2
