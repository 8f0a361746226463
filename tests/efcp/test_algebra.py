"""Updates against the dense algebra in float64, built from the same compressed gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp import EFCP, GGT, MFAC, DenseMFAC, Identity, SparseMFAC, TopK
from efcp.preconditioners import mfac
from tests.efcp.problems import Problem, newest_slot, window_rows


def dense_update(preconditioner, G, slot):
    """u by the d × d definition: [λI + GᵀG/m]⁻¹c or [(GᵀD²G)^½ + εI]⁻¹c."""
    m, d = G.shape
    eye = torch.eye(d, dtype=torch.float64)
    if isinstance(preconditioner, MFAC):
        return torch.linalg.solve(preconditioner.damping * eye + G.t() @ G / m, G[slot])
    age = ((slot - torch.arange(m)) % m).double()
    decayed = G * preconditioner.beta2 ** age[:, None]
    eigenvalues, Q = torch.linalg.eigh(decayed.t() @ decayed)
    return Q @ ((Q.t() @ G[slot]) / (eigenvalues.clamp(min=0).sqrt() + preconditioner.eps))


def test_update_is_the_dense_one_before_and_after_the_ring_wraps(compressor, preconditioner):
    problem = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0, window=5)
    for _ in range(13):
        before = problem.flat()
        problem.step()
        G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params], 1)
        expected = dense_update(preconditioner, G, newest_slot(problem.optimizer))
        torch.testing.assert_close(before - problem.flat(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("window", [1, 2, 64])
def test_any_window_size(window, preconditioner):
    problem = Problem(compressor=TopK(0.2, 16), preconditioner=preconditioner, lr=1.0, window=window)
    problem.step(7)
    before = problem.flat()
    problem.step()
    G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params], 1)
    expected = dense_update(preconditioner, G, newest_slot(problem.optimizer))
    torch.testing.assert_close(before - problem.flat(), expected, rtol=1e-8, atol=1e-8)


def test_gram_matrix_is_that_of_the_window(compressor):
    problem = Problem(compressor=compressor)
    problem.step(8)
    G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params], 1)
    gram = problem.optimizer.shared["gram"]
    torch.testing.assert_close(gram, G @ G.t(), rtol=1e-12, atol=1e-12)


@given(
    density=st.floats(0.01, 1),
    block_size=st.integers(1, 60),
    numel=st.integers(1, 200),
    feedback=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_error_and_row_add_up_to_the_gradients(density, block_size, numel, feedback, seed):
    """e + c = a exactly where values are float32; without error feedback nothing is carried over."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.zeros(numel))
    compressor = TopK(density, block_size, value_dtype=torch.float32, error_feedback=feedback)
    optimizer = EFCP([p], compressor=compressor, window=3)
    error = torch.zeros(numel)
    for slot in (0, 1, 2, 0):
        p.grad = torch.randn(numel, generator=generator)
        total = error + p.grad
        optimizer.step()
        row = window_rows(optimizer, p)[slot].float()
        if feedback:
            error = optimizer.state[p]["error"].clone()
            assert torch.equal(error + row, total)
        else:
            assert "error" not in optimizer.state[p]
            assert torch.equal(row, torch.where(row != 0, total, 0))


@given(numel=st.integers(1, 100), block_size=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_density_one_is_dense(numel, block_size, seed):
    def run(compressor):
        problem = Problem(shapes=[(numel,)], compressor=compressor, lr=0.1, window=4)
        problem.generator.manual_seed(seed)
        for _ in range(6):
            problem.set_gradients()
            problem.params[0].grad = problem.params[0].grad.float().double()  # values that float32 holds exactly
            problem.optimizer.step()
        return problem.flat()

    sparse = run(TopK(density=1.0, block_size=block_size, value_dtype=torch.float32))
    torch.testing.assert_close(sparse, run(Identity()), rtol=1e-9, atol=1e-9)


@given(blocks=st.integers(1, 8), block_size=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permuting_blocks_permutes_the_update(blocks, block_size, seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(6, blocks, block_size, generator=generator, dtype=torch.float64)
    order = torch.randperm(blocks, generator=generator)

    def run(gradients):
        p = torch.nn.Parameter(torch.zeros(blocks * block_size, dtype=torch.float64))
        optimizer = SparseMFAC([p], lr=0.1, window=4, density=0.2, block_size=block_size)
        for g in gradients:
            p.grad = g.reshape(-1)
            optimizer.step()
        return p.detach().view(blocks, block_size)

    torch.testing.assert_close(run(gradients[:, order]), run(gradients)[order], rtol=1e-9, atol=1e-12)


def test_norm_of_the_update_comes_from_the_gram_matrix(compressor, preconditioner):
    free = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0)
    clipped = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0, max_update_norm=0.05)
    loose = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0, max_update_norm=1e9)
    for _ in range(7):
        before = [problem.flat() for problem in (free, clipped, loose)]
        for problem in (free, clipped, loose):
            problem.step()
        u, v, w = (b - problem.flat() for b, problem in zip(before, (free, clipped, loose), strict=True))
        assert u.norm() > 0.05
        torch.testing.assert_close(v.norm(), torch.tensor(0.05, dtype=torch.float64), rtol=1e-9, atol=0)
        torch.testing.assert_close(v / v.norm(), u / u.norm(), rtol=1e-8, atol=1e-9)
        assert torch.equal(w, u)


def test_weights_do_not_drift_over_many_steps():
    """The inverse follows 600 replaced rows by updates; the refresh every m steps is part of that."""
    p = torch.nn.Parameter(torch.zeros(80, dtype=torch.float64))
    optimizer = DenseMFAC([p], lr=1.0, window=32, damping=1e-4)
    common = torch.randn(80, dtype=torch.float64)
    for step in range(600):
        p.grad = common + 0.1 * torch.randn(80, dtype=torch.float64)
        if step % 50 == 7:
            p.grad *= 30  # outliers, as at the start of training
        before = p.detach().clone()
        optimizer.step()
        if step % 37 == 0:
            expected = dense_update(MFAC(1e-4), window_rows(optimizer, p), newest_slot(optimizer))
            torch.testing.assert_close(before - p.detach(), expected, rtol=1e-6, atol=1e-6 * expected.norm().item())


def test_weights_recover_from_gradients_that_float64_could_not_solve_for():
    """What such gradients leave behind in the inverse must not spoil the weights once they have left the window."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = DenseMFAC([p], lr=1.0, window=16, damping=1e-4)
    for step in range(48):
        p.grad = torch.randn(4, dtype=torch.float64) * (1e7 if 18 <= step < 24 else 1)
        before = p.detach().clone()
        optimizer.step()
        if not 18 <= step < 40:
            expected = dense_update(MFAC(1e-4), window_rows(optimizer, p), newest_slot(optimizer))
            torch.testing.assert_close(before - p.detach(), expected, rtol=1e-6, atol=1e-6 * expected.norm().item())


@pytest.mark.parametrize("norm", [1.0, 10.0, 1e3, 1e6])
def test_window_of_dependent_gradients_gives_finite_updates(norm):
    """More rows than parameters and hardly any damping: float64 cannot solve the system for large norms."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = DenseMFAC([p], lr=1.0, window=16, damping=1e-6)
    for _ in range(100):
        p.grad = norm * torch.randn(4, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        update = before - p.detach()
        assert update.isfinite().all()
        assert update.norm() <= p.grad.norm() / 1e-6
        if norm <= 10:
            expected = dense_update(MFAC(1e-6), window_rows(optimizer, p), newest_slot(optimizer))
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-3 * expected.norm().item())


def test_changed_damping_takes_effect_at_once():
    changed, constant = (Problem(compressor=Identity(), preconditioner=MFAC(d), window=6) for d in (1e-3, 1e-1))
    for problem in (changed, constant):
        problem.step(9)
        problem.optimizer.param_groups[0]["damping"] = 1e-1
        problem.optimizer.param_groups[0]["lr"] = 1.0
    before = changed.flat(), constant.flat()
    changed.step()
    constant.step()
    torch.testing.assert_close(before[0] - changed.flat(), before[1] - constant.flat(), rtol=1e-10, atol=1e-12)


def test_refresh_restores_what_is_kept_beside_the_gram_matrix():
    problem, same = (Problem(compressor=Identity(), preconditioner=MFAC(damping=1e-2), lr=0.1) for _ in range(2))
    problem.step(7)
    same.step(7)
    state = problem.optimizer.shared
    state["inverse_root"].mul_(1.5)
    state["inverse_column"].zero_()
    problem.optimizer.refresh()
    problem.step()
    same.step()
    torch.testing.assert_close(problem.flat(), same.flat(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e9], ids=["solved", "unsolved"])
def test_the_column_kept_for_the_next_step_is_that_of_the_inverse(scale):
    problem = Problem(compressor=Identity(), preconditioner=MFAC(damping=1e-9), window=5)
    for _ in range(12):
        problem.set_gradients()
        for p in problem.params:
            p.grad = torch.full_like(p, scale) if scale > 1 else p.grad
        problem.optimizer.step()
        state, following = problem.optimizer.shared, (newest_slot(problem.optimizer) + 1) % 5
        R, column = state["inverse_root"], state["inverse_column"]
        torch.testing.assert_close(column, (R.t() @ R)[following], rtol=1e-9, atol=1e-12 * float(column.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 1e9], ids=["solved", "unsolved"])
def test_weights_do_not_depend_on_where_the_host_looks_at_them(scale, monkeypatch):
    """On a CPU it does, on an accelerator it would have to wait."""
    looking, blind = (Problem(compressor=Identity(), preconditioner=MFAC(damping=1e-9)) for _ in range(2))
    for _ in range(12):
        for problem in (looking, blind):
            with monkeypatch.context() as patch:
                if problem is blind:
                    patch.setattr(mfac, "is_on_cpu", lambda tensor: False)
                problem.set_gradients()
                for p in problem.params:
                    p.grad = torch.full_like(p, scale) if scale > 1 else p.grad
                problem.optimizer.step()
        if scale > 1:
            assert torch.equal(looking.flat(), blind.flat())
        else:  # the host leaves refinement out where nothing is to be gained
            torch.testing.assert_close(looking.flat(), blind.flat(), rtol=1e-9, atol=1e-12)


def test_beta1_averages_gradients_before_compression():
    averaged = Problem(compressor=Identity(), preconditioner=GGT(eps=1e-2), beta1=0.7, lr=0.1)
    plain = Problem(compressor=Identity(), preconditioner=GGT(eps=1e-2), lr=0.1)
    average = [torch.zeros_like(p) for p in plain.params]
    for _ in range(8):
        averaged.step()
        plain.set_gradients()
        for p, mean in zip(plain.params, average, strict=True):
            mean.mul_(0.7).add_(p.grad, alpha=0.3)
            p.grad = mean.clone()
        plain.optimizer.step()
    torch.testing.assert_close(averaged.flat(), plain.flat(), rtol=1e-10, atol=1e-12)
