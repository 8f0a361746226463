"""Steps of all optimizers: each gets a row, what cannot be measured says why, and a new one is one line."""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

pytest.importorskip("numba")

import efcp
from efcp.perf import machine, optimizers, plots, steps, timing
from efcp.perf.steps import ADAMW, LR, OPTIMIZERS, Entry, flat, gpt, layers
from tests.perf.test_command import run_without

CPU = torch.device("cpu")
MODELS = {"gpt": partial(gpt, 1, 16, 50, 8), "vector": partial(flat, 4097), "layers": partial(layers, 3, 16)}
COMPILED = "AdamW, 8 bits"  # takes seconds for each shape


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.ELEMENTS, "cpu", 1024)  # no time depends on it here
    monkeypatch.setattr(optimizers, "QUICK", MODELS)


def measured(path: Path, monkeypatch: pytest.MonkeyPatch, entries: dict[str, Entry]) -> pd.DataFrame:
    """The rows of optimizers.csv by model and optimizer."""
    monkeypatch.setattr(optimizers, "OPTIMIZERS", entries)
    optimizers.measure(CPU, path / "optimizers.csv", quick=True)
    return pd.read_csv(path / "optimizers.csv").set_index(["model", "optimizer"])


def sgd(**options: Any) -> Callable[[Any], list[torch.optim.Optimizer]]:
    return lambda params: [torch.optim.SGD(params, **{"lr": LR, **options})]


def entry(build: Callable[[Any], list[torch.optim.Optimizer]], **options: Any) -> Entry:
    return Entry("PyTorch", "", build, **options)


def test_every_optimizer_gets_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: own for name, own in OPTIMIZERS.items() if name != COMPILED}
    frame = measured(tmp_path, monkeypatch, installed)
    assert list(pd.read_csv(tmp_path / "optimizers.csv").columns) == optimizers.COLUMNS
    assert list(frame.index) == list(itertools.product(MODELS, installed))
    for (model, name), row in frame.iterrows():
        if OPTIMIZERS[name].matrices and model == "vector":
            assert row["status"] == "for matrices only"
        elif row["status"] != "ok":
            assert name in ("Muon", "SOAP"), row["status"]  # which not every version of a package has
        else:
            assert row.drop(["settings", "commit"]).notna().all()
            assert row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
            assert row["of parameters"] == pytest.approx(row["temporary bytes"] / (4 * row["d"]))
    assert (frame.xs(ADAMW, level="optimizer")["times AdamW"] == 1).all()


def test_state_is_what_the_report_of_memory_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (ADAMW, "SGD", "SparseMFAC, int4", "MFACW, split")
    frame = measured(tmp_path, monkeypatch, {name: OPTIMIZERS[name] for name in names})["state bytes"]
    model = gpt(1, 16, 50, 8)
    count, numel = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    assert frame["gpt", "SGD"] == 4 * numel
    assert frame["gpt", ADAMW] == 8 * numel + 4 * count  # and a step counter each
    sparse = efcp.estimate_memory(model, efcp.SparseMFAC, window=32, error_dtype=torch.int4)
    assert frame["gpt", "SparseMFAC, int4"] == sparse.total
    assert frame["gpt", "MFACW, split"] == efcp.estimate_memory(efcp.param_groups(model), efcp.MFACW).total


def test_what_fails_says_why_and_loses_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(params: Any) -> list[torch.optim.Optimizer]:
        raise RuntimeError("no such thing\nand more")

    for module in [name for name in sys.modules if name.partition(".")[0] == "torchao"] + ["torchao", "torchao.optim"]:
        monkeypatch.setitem(sys.modules, module, None)
    entries = {
        "fails": entry(fails),
        COMPILED: OPTIMIZERS[COMPILED],
        "stands still": entry(sgd(lr=0.0)),
        "diverges": entry(sgd(lr=1e38)),
        "SGD": entry(sgd()),
    }
    frame = measured(tmp_path, monkeypatch, entries).loc["gpt"]
    assert frame["status"].to_dict() == {
        "fails": "RuntimeError: no such thing",
        COMPILED: "ModuleNotFoundError: torchao is missing: pip install 'efcp[paper]'",
        "stands still": "FloatingPointError: a parameter has not moved, or is not finite",
        "diverges": "FloatingPointError: a parameter has not moved, or is not finite",
        "SGD": "ok",
    }
    assert frame.drop("SGD")["p50_ms"].isna().all()


def test_what_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "available_bytes", lambda device: 1 << 10)
    frame = measured(tmp_path, monkeypatch, {"SGD": entry(sgd())})
    assert frame["status"].str.startswith("may need ").all()


def test_a_cycle_counts_as_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count()

    def milliseconds(timer: timing.Timer, run: Callable[[], object]) -> float:
        before = next(steps)
        run()
        return next(steps) - before - 1.0

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            next(steps)
            super().step(closure)

    monkeypatch.setattr(timing.Timer, "milliseconds", milliseconds)
    entries = {str(n): entry(lambda params: [Counting(params, LR)], cycle=n) for n in (1, 10)}
    assert (measured(tmp_path, monkeypatch, entries)["p50_ms"] == 1).all()


def test_no_optimizer_needs_more_than_is_checked() -> None:
    """On the models of the full run, whose windows outweigh everything else where parameters are small."""
    for make in steps.MODELS.values():
        with torch.device("meta"):
            model = make()
        for own in OPTIMIZERS.values():
            if own.family.startswith("efcp") and not (own.matrices and all(p.dim() < 2 for p in model.parameters())):
                for optimizer in own.build(own.params(model)):
                    optimizer.allocate_state()
                    assert 2 * efcp.memory_report(optimizer).per_parameter < steps.NEEDED


def test_the_model_is_of_the_shape_of_a_gpt() -> None:
    model = gpt(2, 64, 1000, 32)
    hidden, others = efcp.param_groups(model)
    assert len(hidden["params"]) == 2 * 4  # of each block
    assert any(name == "tokens.weight" for name, _ in others["params"])
    assert sum(p.numel() for p in model.parameters()) == 1032 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_nothing_else_has_to_be_installed() -> None:
    done = run_without("efcp.perf.bench", ["torchao", "pytorch_optimizer", "triton"], "--help")
    assert done.returncode == 0, done.stderr


def test_names_hide_neither_points_nor_each_other() -> None:
    figure, (axes,) = plots._figure(1, 1, (6, 5))
    points = pd.DataFrame([(x, y + 0.2 * x) for x in range(4) for y in range(4)] + [(2.05, 2.4), (1, 1.25)])
    axes.plot(points[0], points[1], "o")
    axes.margins(0.2)
    plots._name_points(axes, points[0], points[1], pd.Series([f"name {number}" for number in range(len(points))]))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == len(points)
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)
    for box in boxes:
        assert not any(box.contains(*point) for point in axes.transData.transform(points.to_numpy()))


def test_versions_of_further_packages_are_recorded() -> None:
    assert "no_such_package" in machine.environment(CPU, ("no_such_package",))["versions"]
