"""Memory: what is measured is what was estimated, and what the models and formulas are."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
import torch

import efcp
from efcp.perf import memory, models
from efcp.perf.memory import Candidate, largest_models, measure_here, measured, shampoo_bytes

CPU = torch.device("cpu")
TINY = "tiny"
SHAPES: models.Shapes = [(63, 100), (63,), (4097,)]
CANDIDATES = [
    Candidate(TINY, "SparseMFAC", {"window": 8, "density": 0.05}),
    Candidate(TINY, "SparseMFAC", {"window": 8, "density": 0.05, "error_dtype": "bfloat16", "value_dtype": "float32"}),
    Candidate(TINY, "LowRankMFAC", {"window": 8}),
    Candidate(TINY, "DenseMFAC", {"window": 8}),
    Candidate(TINY, "Adam"),
    Candidate(TINY, "SGD", {"momentum": 0.9}),
]


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, TINY, lambda: SHAPES)


@pytest.mark.parametrize(
    "candidate", CANDIDATES, ids=lambda candidate: f"{candidate.optimizer}-{len(candidate.options)}"
)
def test_measured_state_is_the_estimate(candidate: Candidate) -> None:
    result = measure_here(candidate, CPU)
    assert result["state bytes"] == candidate.estimate(SHAPES)
    assert result["peak bytes"] is not None
    assert result["peak bytes"] > result["state bytes"]


def test_state_of_adam_and_sgd_is_known() -> None:
    numel = models.numel(SHAPES)
    assert Candidate(TINY, "SGD", {"momentum": 0.9}).estimate(SHAPES) == 4 * numel
    assert Candidate(TINY, "Adam").estimate(SHAPES) == 8 * numel + 4 * len(SHAPES)  # and a step counter each


def test_a_process_of_its_own_sees_the_state_grow() -> None:
    candidate = Candidate("ResNet-18, 11.7M", "SGD", {"momentum": 0.9})
    result = measured(candidate, CPU)
    assert result["state bytes"] == 4 * 11_689_512
    assert 0.9 < result["resident bytes"] / result["state bytes"] < 2


def test_a_failure_is_told() -> None:
    assert "has no attribute 'Nadir'" in measured(Candidate("CNN, 95k", "Nadir"), CPU)["status"]


def test_the_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory, "candidates", lambda quick: [(candidate, number < 2) for number, candidate in enumerate(CANDIDATES)]
    )
    monkeypatch.setattr(
        memory, "measured", lambda candidate, device: measure_here(Candidate(**asdict(candidate)), device)
    )
    memory.measure(CPU, tmp_path / "memory.csv", quick=True)
    frame = pd.read_csv(tmp_path / "memory.csv")
    assert list(frame.columns) == memory.COLUMNS
    assert list(frame["how"]) == 2 * ["measured"] + 4 * ["estimate"] + ["formula"]
    assert set(frame["status"]) == {"ok"}
    seen = frame[frame["how"] == "measured"]
    assert (seen["state bytes"] == seen["estimated bytes"]).all()
    assert frame["per parameter"].to_numpy() == pytest.approx((frame["state bytes"] / models.numel(SHAPES)).to_numpy())
    assert frame["error"][1] == "bfloat16"


@pytest.mark.parametrize(
    ("model", "numel"),
    [("ResNet-18, 11.7M", 11_689_512), ("BERT-base, 109M", 109_482_240), ("TinyLlama, 1.1B", 1_100_048_384)],
)
def test_models_have_as_many_parameters_as_published(model: str, numel: int) -> None:
    assert models.numel(models.MODELS[model]()) == numel


def test_bert_has_the_shapes_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
    assert sorted(tuple(p.shape) for p in bert.parameters()) == sorted(models.MODELS["BERT-base, 109M"]())


def test_shampoo_formula() -> None:
    assert shampoo_bytes([(10,)]) == 80
    assert shampoo_bytes([(10, 4)]) == 8 * 40 + 8 * (100 + 16)
    cut = 8 * (1024**2 + 4**2) + 8 * (6**2 + 4**2)
    assert shampoo_bytes([(1030, 2, 2)]) == 8 * 4120 + cut


def test_largest_models_fit_and_no_larger_ones_do() -> None:
    table = largest_models((1,)).set_index("optimizer")["largest d"]
    assert table["Adam"] == pytest.approx(2**30 / 16, rel=1e-3)
    options = {"window": 64, "density": 0.01}
    for d, fits in ((table["sparse M-FAC, m=64, 1%"], True), (table["sparse M-FAC, m=64, 1%"] + 10_000, False)):
        total = 8 * int(d) + efcp.estimate_memory(int(d), efcp.SparseMFAC, **options).total
        assert (total <= 2**30) == fits
