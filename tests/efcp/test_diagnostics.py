"""Diagnostics against dense computation."""

import copy
import math

import pytest
import torch

from efcp import EFCP, GGT, DenseMFAC, Identity, SparseMFAC, TopK
from efcp.kernels import Update
from tests.efcp.problems import Problem, newest_slot, window_rows

QUANTILES = {"scaling_q25": 0.25, "scaling_q50": 0.5, "scaling_q75": 0.75}


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double()


def check(diagnostics, **expected):
    for name, value in expected.items():
        assert diagnostics[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


def error_in(state, compressor):
    """The error of a state, (n,), whose blocks are so short that each has one scale; None without one."""
    if "error_codes" not in state:
        return state.get("error")
    parts, codes, four = [], state["error_codes"].tolist(), "error_draws" in state
    for number, scale in enumerate(state["error_scales"].tolist()):
        length = min(compressor.block_size, state["numel"] - number * compressor.block_size)
        own = [codes.pop(0) for _ in range((length + 1) // 2 if four else length)]
        if four:
            own = [half - 8 for byte in own for half in (byte & 15, byte >> 4)][:length]
        parts += [code * scale for code in own]
    assert not codes
    return torch.tensor(parts)


def test_norms_and_rotation(compressor, preconditioner):
    problem = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0)
    for _ in range(8):
        before = problem.flat()
        problem.step()
        u, g = before - problem.flat(), flat(p.grad for p in problem.params)
        c = torch.cat([window_rows(problem.optimizer, p)[newest_slot(problem.optimizer)] for p in problem.params])
        errors = [error_in(s, compressor) for s in problem.optimizer.state.values()]
        errors = [error for error in errors if error is not None]
        diagnostics = problem.optimizer.diagnostics()
        assert list(diagnostics) == ["grad_norm", "compressed_norm", "error_norm", "update_norm", "cosine"]
        assert all(type(value) is float for value in diagnostics.values())
        check(diagnostics, grad_norm=g.norm(), compressed_norm=c.norm())
        assert diagnostics["update_norm"] == pytest.approx(u.norm().item(), rel=1e-8)
        assert diagnostics["cosine"] == pytest.approx((c @ u / (c.norm() * u.norm())).item(), rel=1e-8)
        expected = flat(errors).norm().item() if errors else 0.0
        tolerance = 1e-9 if {e.dtype for e in errors} <= {torch.float64} else 1e-6
        assert diagnostics["error_norm"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantiles_of_the_scaling(compressor, preconditioner, dtype):
    problem = Problem(compressor=compressor, preconditioner=preconditioner, dtype=dtype, lr=0.1)
    problem.step(6)
    problem.set_gradients()
    problem.params[3].grad[5:25] = 0
    problem.optimizer.step()
    state = problem.optimizer.shared
    G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params], 1)
    u, g = G.t() @ state["weights"], flat(p.grad for p in problem.params)
    ratios = (u / g).abs()[g != 0]
    diagnostics = problem.optimizer.diagnostics(quantiles=True)
    for name, q in QUANTILES.items():
        expected = torch.quantile(ratios, q, interpolation="lower").item()
        assert diagnostics[name] == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 1000, 70_001])
def test_quantiles_are_exact(numel):
    """One of the float32 ratios, to the last bit."""
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (numel, 3)]
    optimizer = EFCP(params, 1.0, TopK(0.5, 64, torch.float32), GGT(eps=1.0), window=3)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    weights = optimizer.shared["weights"]
    ratios = []
    for p in params:
        update, one = torch.zeros_like(p), torch.ones((), dtype=torch.float64)
        optimizer.compressor.bind([optimizer.state[p]], [p]).apply_([update], [], Update(weights, one, one))
        ratios.append((update / p.grad).abs())
    ratios = torch.cat(ratios).sort().values
    diagnostics = optimizer.diagnostics(quantiles=True)
    for name, q in QUANTILES.items():
        assert diagnostics[name] == ratios[math.floor(q * (len(ratios) - 1))].item()


def test_before_the_first_step_and_without_gradients():
    problem = Problem(compressor=TopK(0.2, 16))
    nothing = {"grad_norm": None, "compressed_norm": 0.0, "error_norm": 0.0, "update_norm": 0.0, "cosine": None}
    quantiles = dict.fromkeys(QUANTILES)
    assert problem.optimizer.diagnostics(quantiles=True) == nothing | quantiles
    assert not problem.optimizer.state
    problem.step(2)
    problem.optimizer.zero_grad()
    diagnostics = problem.optimizer.diagnostics(quantiles=True)
    assert diagnostics["grad_norm"] is None
    assert diagnostics["update_norm"] > 0
    assert all(diagnostics[name] is None for name in QUANTILES)
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    diagnostics = problem.optimizer.diagnostics(quantiles=True)
    assert diagnostics["grad_norm"] == 0
    assert all(diagnostics[name] is None for name in QUANTILES)


def test_skipped_step():
    problem = Problem(compressor=TopK(0.2, 16), lr=0.1)
    problem.step(3)
    error = problem.optimizer.diagnostics()["error_norm"]
    problem.set_gradients()
    problem.params[0].grad[0, 0] = float("inf")
    problem.optimizer.step()
    expected = {"grad_norm": math.inf, "compressed_norm": 0.0, "error_norm": error, "update_norm": 0.0, "cosine": None}
    assert problem.optimizer.diagnostics() == pytest.approx(expected)


def test_clipped_update_is_reported_as_it_was_applied():
    problem = Problem(compressor=Identity(), lr=1.0, max_update_norm=0.05)
    problem.step(3)
    check(problem.optimizer.diagnostics(), update_norm=0.05)


def test_one_row_is_not_turned():
    p = torch.nn.Parameter(torch.zeros(50))
    optimizer = DenseMFAC([p], window=4)
    p.grad = torch.randn(50)
    optimizer.step()
    assert optimizer.diagnostics()["cosine"] == pytest.approx(1.0)


def test_nothing_is_changed_and_a_copy_gives_the_same():
    problem, other = (Problem(compressor=TopK(0.2, 16), lr=0.1, momentum=0.5) for _ in range(2))
    for each in (problem, other):
        each.step(7)
    before = copy.deepcopy(problem.optimizer.state_dict())
    diagnostics = problem.optimizer.diagnostics(quantiles=True)
    for state, own in zip(before["state"].values(), problem.optimizer.state_dict()["state"].values(), strict=True):
        for name, value in state.items():
            assert torch.equal(value, own[name]) if isinstance(value, torch.Tensor) else value == own[name]
    other.optimizer.load_state_dict(before)
    assert other.optimizer.diagnostics(quantiles=True) == diagnostics


def test_parameters_without_gradient_or_window_do_not_take_part():
    params = [torch.nn.Parameter(torch.zeros(30)) for _ in range(3)]
    optimizer = SparseMFAC(params, window=4, density=0.2)
    for p in params[:2]:
        p.grad = torch.randn(30)
    optimizer.step()
    params[0].grad, params[2].grad = None, torch.ones(30)
    diagnostics = optimizer.diagnostics(quantiles=True)
    check(diagnostics, grad_norm=params[1].grad.norm())
    assert diagnostics["scaling_q75"] is not None
