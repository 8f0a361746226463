"""The published algorithm is right: it agrees with the dense algebra, and with our steps where it can."""

import pytest
import torch
from torch import Tensor

from efcp import SparseMFAC
from efcp.perf import published
from efcp.perf.published import PublishedMFAC, RowMajorWindow

D, B, M, DENSITY, LR, DAMPING = 1000, 100, 6, 0.1, 0.1, 0.5


def optimizer() -> tuple[PublishedMFAC, Tensor]:
    kept = int(DENSITY * D)
    window = RowMajorWindow(torch.zeros(M, kept), torch.zeros(M, kept, dtype=torch.int16), D // B, B)
    param = torch.zeros(D)
    return PublishedMFAC(param, torch.zeros(D), window, torch.zeros(M, M), DAMPING, LR), param


def dense(window: RowMajorWindow) -> Tensor:
    rows = torch.zeros(M, D // B, B, dtype=torch.float64)
    shape = (M, D // B, -1)
    return rows.scatter_(2, window.indices.view(shape).long(), window.values.view(shape).double()).flatten(1)


@pytest.mark.parametrize("part", [1, 1 << 22])
def test_update_is_that_of_the_dense_algebra(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(published, "PART", part)
    made, param = optimizer()
    for step in range(2 * M + 1):
        param.grad = torch.randn(D)
        before = param.clone()
        made.step()
        G = dense(made.window)
        inverse = torch.linalg.inv(DAMPING * torch.eye(D, dtype=torch.float64) + G.t() @ G / M)
        expected = inverse @ G[step % M]
        torch.testing.assert_close((before - param).double() / LR, expected, rtol=1e-3, atol=1e-4)


def test_steps_are_ours_where_nothing_is_rounded() -> None:
    made, param = optimizer()
    own = torch.nn.Parameter(torch.zeros(D))
    options = {"window": M, "density": DENSITY, "block_size": B, "damping": DAMPING}
    ours = SparseMFAC([own], LR, value_dtype=torch.float32, **options)
    for _ in range(2 * M + 1):
        param.grad = torch.randn(D)
        own.grad = param.grad.clone()
        made.step()
        ours.step()
        torch.testing.assert_close(made.error, ours.state[own]["error"])
    torch.testing.assert_close(param, own.detach(), rtol=1e-4, atol=1e-4)


def test_small_damping_costs_it_digits_and_not_ours() -> None:
    """c/λ − Gᵀ(…)Gc/λ is a difference of vectors that are a million times as long as the result."""
    made, param = optimizer()
    made.damping = 1e-7
    own = torch.nn.Parameter(torch.zeros(D))
    options = {"window": M, "density": DENSITY, "block_size": B, "damping": 1e-7}
    ours = SparseMFAC([own], LR, value_dtype=torch.float32, **options)
    param.grad = own.grad = torch.randn(D)
    made.step()
    ours.step()
    G = dense(made.window)
    expected = -LR * G[0] * M / (M * 1e-7 + G[0] @ G[0])  # of a window of one row
    torch.testing.assert_close(own.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert (param - expected).norm() > 1e-2 * expected.norm()
