"""The Kronecker metric against dense Shampoo of the same rows, in float64."""

from itertools import pairwise

import pytest
import torch

from efcp import EFCP, Kronecker, LowRank, TopK
from tests.efcp.problems import newest_slot, window_rows

SHAPES = ((6, 9), (5,), (13, 4), (3, 2), (4, 3, 3))  # the third from last and the vector are kept whole
WINDOW = 5


def power(A, exponent):
    eigenvalues, Q = torch.linalg.eigh(A)
    return (Q * eigenvalues.clamp(min=1e-300) ** exponent) @ Q.t()


def damped(A, kappa):
    return A + kappa * A.trace() / len(A) * torch.eye(len(A), dtype=torch.float64)


def shampoo(rows, momentum, shape, kappa, sides):
    """The update along a momentum, scaled to a root mean square of 0.2."""
    if len(shape) < 2 or 2 * (shape[0] + len(momentum) // shape[0]) >= len(momentum):
        u = power(damped(rows.t() @ rows, kappa), -0.5) @ momentum
    else:
        A, a = rows.view(len(rows), shape[0], -1), momentum.view(shape[0], -1)
        left, right = damped((A @ A.mT).sum(0), kappa), damped((A.mT @ A).sum(0), kappa)
        if sides == 2:
            u = power(left, -0.25) @ a @ power(right, -0.25)
        else:
            u = power(left, -0.5) @ a if len(left) <= len(right) else a @ power(right, -0.5)
    return u.flatten() * 0.2 * len(momentum) ** 0.5 / u.norm()


@pytest.mark.parametrize("kappa", [1.0, 1e-3])
@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("sides", [1, 2])
def test_update_is_that_of_dense_shampoo(sides, refresh_every, kappa):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in SHAPES]
    compressor, metric = LowRank(2, value_dtype=torch.float32), Kronecker(kappa, sides, refresh_every)
    options = {"window": WINDOW, "direction": "momentum", "momentum": 0.8, "update_rms": 0.2}
    optimizer = EFCP(params, 1.0, compressor, metric, **options)
    compared = 0
    for step in range(14):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        if step % refresh_every:
            continue  # the metric is that of an earlier step
        age = (newest_slot(optimizer) - torch.arange(WINDOW)) % WINDOW
        for p, old in zip(params, before, strict=True):
            rows = window_rows(optimizer, p) * (age <= WINDOW - refresh_every)[:, None]
            expected = shampoo(rows, optimizer.state[p]["momentum"], p.shape, kappa, sides)
            error = ((old - p.detach()).flatten() - expected).norm() / expected.norm()
            assert error < (1e-6 if refresh_every == 1 else 1e-3)  # a kept metric is in float32
            compared += 1
    assert compared >= len(SHAPES) * 5


def test_a_metric_that_is_kept_is_used_until_the_next_one():
    """Its state says how old it is, and rows that the next steps replace are not in it."""
    p = torch.nn.Parameter(torch.randn(12, 9))
    options = {"window": 4, "direction": "momentum", "update_rms": 0.2}
    optimizer = EFCP([p], 1.0, LowRank(2), Kronecker(0.1, refresh_every=3), **options)
    ages, metrics = [], []
    for _ in range(7):
        p.grad = torch.randn_like(p)
        optimizer.step()
        ages.append(optimizer.state[p]["metric_age"])
        metrics.append(optimizer.state[p]["metrics"].clone())
    assert ages == [1, 2, 3, 1, 2, 3, 1]
    assert [torch.equal(a, b) for a, b in pairwise(metrics)] == [True, True, False] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"direction": "row"}, ValueError, "direction must be 'momentum' with Kronecker, got 'row'"),
        ({"update_rms": None}, ValueError, "update_rms must be a number with Kronecker, got None"),
        ({"compressor": TopK()}, TypeError, "compressor must be efcp.LowRank with Kronecker, got TopK"),
    ],
    ids=["direction", "update_rms", "compressor"],
)
def test_what_it_does_not_go_with_is_refused(options, error, message):
    known = {"compressor": LowRank(), "direction": "momentum", "update_rms": 0.2, "window": 3}
    with pytest.raises(error, match=message):
        EFCP([torch.nn.Parameter(torch.zeros(3, 3))], preconditioner=Kronecker(), **known | options)


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"sides": 3}, {"refresh_every": 0}], ids=str)
def test_options_that_are_not_allowed_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
        Kronecker(**options)


def test_zero_rows_leave_the_momentum_as_it_is():
    p = torch.nn.Parameter(torch.zeros(12, 9))
    options = {"window": 4, "direction": "momentum", "momentum": 0.5, "update_rms": 0.2}
    optimizer = EFCP([p], 1.0, LowRank(2), Kronecker(0.1), **options)
    for _ in range(6):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, torch.zeros_like(p))


@pytest.mark.parametrize("dimension", [3, 7, 8, 20])
@pytest.mark.parametrize("held", [1, 4], ids=["one row held", "full window"])
@pytest.mark.parametrize("exponent", [-0.25, -0.5])
def test_metric_is_that_of_k_whichever_side_is_decomposed(exponent, held, dimension):
    """M = √B h(K) √B with h(s) = ((1 + s/δ)^p − 1) / s, also on the null space of K, by one dense decomposition."""
    m, r, kappa = 4, 2, 0.01
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(2, m, r, dimension, generator=generator, dtype=torch.float64)
    halves = torch.randn(2, m, r, r, generator=generator, dtype=torch.float64)
    roots = halves @ halves.mT * (torch.arange(m) < held)[:, None, None]
    for i, M in enumerate(Kronecker(kappa)._metric(roots, own, exponent)):
        root, stacked = torch.block_diag(*roots[i]), own[i].flatten(0, 1)
        K = root @ stacked @ stacked.t() @ root
        s, V = torch.linalg.eigh(K)
        delta = kappa * K.trace() / dimension
        h = torch.where(s > 1e-9 * s.max(), ((1 + s / delta) ** exponent - 1) / s, exponent / delta)
        expected = root @ (V * h) @ V.t() @ root
        torch.testing.assert_close(M, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
