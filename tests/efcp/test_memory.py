"""Estimates are the bytes of the tensors in `optimizer.state`, exactly."""

import pytest
import torch

import efcp
from efcp import (
    DenseGGT,
    DenseMFAC,
    LowRankGGT,
    LowRankMFAC,
    MicroAdam,
    SparseGGT,
    SparseMFAC,
    estimate_memory,
    memory_report,
)

OPTIMIZERS = [
    (SparseMFAC, {"window": 20, "density": 0.03, "momentum": 0.9}),
    (SparseMFAC, {"window": 20, "value_dtype": torch.float32, "error_dtype": torch.bfloat16, "block_size": 200}),
    (SparseMFAC, {"window": 3, "error_dtype": torch.int8}),
    (SparseMFAC, {"window": 3, "error_dtype": torch.int4, "block_size": 77}),
    (SparseMFAC, {"window": 3, "error_feedback": False}),
    (MicroAdam, {}),
    (MicroAdam, {"window": 3, "error_dtype": None, "value_dtype": torch.float32, "block_size": 200}),
    (DenseMFAC, {"window": 5}),
    (SparseGGT, {"window": 7, "beta1": 0.9}),
    (DenseGGT, {"window": 7}),
    (DenseGGT, {"window": 7, "refresh_every": 3}),
    (DenseGGT, {"window": 2, "refresh_every": 3}),
    (LowRankMFAC, {"window": 7, "rank": 3}),
    (LowRankMFAC, {"window": 7, "value_dtype": torch.float32, "error_dtype": torch.bfloat16, "momentum": 0.9}),
    (LowRankGGT, {"window": 7, "error_feedback": False, "beta1": 0.9}),
]


def bytes_in_state(optimizer):
    """Counted independently of the report."""
    return sum(
        t.untyped_storage().nbytes()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    )


@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_estimate_is_what_is_allocated(cls, options, dtype):
    model = torch.nn.Sequential(torch.nn.Linear(71, 67), torch.nn.BatchNorm1d(67), torch.nn.Linear(67, 1)).to(dtype)
    model[1].weight.requires_grad_(False)
    estimate = estimate_memory(model, cls, **options)
    optimizer = cls([p for p in model.parameters() if p.requires_grad], **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for _ in range(3):
        optimizer.step()
    assert memory_report(optimizer) == estimate
    assert estimate.total == bytes_in_state(optimizer)
    assert estimate.numel == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_estimate_allocates_nothing_and_takes_groups():
    large, small = (torch.nn.Parameter(torch.empty(n, device="meta")) for n in (1 << 30, 1 << 20))
    groups = [{"params": large, "density": 1 / 1024}, {"params": [("named", small)]}]
    groups[0]["params"] = [("large", large)]
    report = estimate_memory(groups, SparseMFAC, window=1024, density=1 / 4096)
    assert report.numel == (1 << 30) + (1 << 20)
    assert report.tensors["error"] == 4 * report.numel
    assert report.tensors["values"] == 2 * 1024 * (4 * (1 << 18) + (1 << 8))


def test_report_counts_tensors_in_lists():
    param = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.LBFGS([param], max_iter=1, history_size=3)
    for _ in range(6):
        optimizer.step(lambda: param.square().sum().backward() or param.square().sum())
    report = memory_report(optimizer)
    assert report.tensors["old_dirs"] == report.tensors["old_stps"] == 4 * 100 * len(optimizer.state[param]["old_dirs"])
    assert report.tensors["d"] == 4 * 100


def test_paper_settings():
    """At m = 1024 and 1% a parameter takes 41 bytes of window; at m = 128, with its error, less than Adam's 8."""
    large = estimate_memory(11_000_000, window=1024, density=0.01, error_dtype=torch.bfloat16)
    assert large.tensors["values"] + large.tensors["indices"] == pytest.approx(41 * 11e6, rel=0.01)
    assert large.tensors["error"] == 2 * 11_000_000
    assert estimate_memory(11_000_000, window=128, density=0.01, error_dtype=torch.bfloat16).per_parameter < 8


def test_report_of_adam():
    p = torch.nn.Parameter(torch.ones(100))
    optimizer = torch.optim.Adam([p])
    p.grad = torch.ones(100)
    optimizer.step()
    assert memory_report(optimizer).tensors == {"step": 4, "exp_avg": 400, "exp_avg_sq": 400}


def test_report_prints_a_table():
    text = str(estimate_memory(1000, window=4))
    assert "per parameter" in text.splitlines()[0]
    assert text.splitlines()[-1].split()[0] == "total"


def test_bad_options_are_refused_as_by_the_optimizer():
    with pytest.raises(ValueError, match="density must lie in"):
        efcp.estimate_memory(10, density=2)


def test_state_in_wrapped_tensors_counts_as_what_is_held():
    """torchao's 8-bit state says that it is float32, and holds a byte an element and a scale for 64 elements."""
    wrapped = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit.zeros((64, 32), block_size=64)
    p = torch.nn.Parameter(torch.zeros(64, 32))
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p]["exp_avg"] = wrapped
    assert memory_report(optimizer).tensors == {"exp_avg": 2048 + 4 * 2048 // 64 + 4 * 256}
