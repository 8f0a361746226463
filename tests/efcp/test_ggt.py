"""GGT's weights: the decayed window, and eigendecompositions less often than every step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp import EFCP, GGT, DenseGGT, Identity, LowRank, TopK
from efcp.gram import Gram, allocate_gram
from efcp.preconditioners.ggt import floor, weights_with_border
from tests.efcp.problems import Problem, newest_slot, window_rows
from tests.efcp.test_algebra import dense_update
from tests.efcp.test_step import Operations


class Weights:
    """A preconditioner over a window (m, d) in float64, without an optimizer."""

    def __init__(self, preconditioner, window, size):
        self.preconditioner = preconditioner
        self.G = torch.zeros(window, size, dtype=torch.float64)
        self.state = allocate_gram(window, self.G.device) | preconditioner.allocate(window, self.G.device)
        self.count = 0

    def update(self, gradient):
        """u of the next step."""
        slot = torch.tensor([self.count % len(self.G)])
        self.G[slot] = gradient
        Gram(self.state).replace(slot, self.G @ gradient)
        self.count += 1
        return self.G.t() @ self.preconditioner.weights(Gram(self.state), slot)

    def exact(self):
        """u of the last step, from singular values: small ones are not lost in their squares. With GGT's floor."""
        slot = (self.count - 1) % len(self.G)
        age = ((slot - torch.arange(len(self.G))) % len(self.G)).double()
        _, values, V = torch.linalg.svd(self.preconditioner.beta2 ** age[:, None] * self.G, full_matrices=False)
        roots = (values**2 + floor(values.square().sum(), torch.finfo(torch.float64).eps)).sqrt()
        return V.t() @ (V @ self.G[slot] / (roots + self.preconditioner.eps))


# ---- the decayed window


@pytest.mark.parametrize("beta2", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("compressor", [Identity(), TopK(0.3, 8), LowRank(1)], ids=["dense", "sparse", "low-rank"])
def test_decayed_update_is_the_dense_one_while_the_window_fills_and_with_zero_rows(compressor, beta2, refresh_every):
    preconditioner = GGT(eps=1e-3, beta2=beta2, refresh_every=refresh_every)
    problem = Problem(compressor=compressor, preconditioner=preconditioner, lr=1.0, window=6)
    for step in range(20):
        before = problem.flat()
        problem.set_gradients()
        if step in (2, 9, 10):
            problem.params[0].grad[0, 0] = float("nan")  # skipped: a zero row
        if step == 12:
            problem.params[3].grad = None  # part of the row is zero
        problem.optimizer.step()
        G = torch.cat([window_rows(problem.optimizer, p) for p in problem.params if p.grad is not None], 1)
        if step in (2, 9, 10):
            assert torch.equal(problem.flat(), before)
            continue
        if step == 12:
            continue
        expected = dense_update(preconditioner, G, newest_slot(problem.optimizer))
        torch.testing.assert_close(before - problem.flat(), expected, rtol=1e-8, atol=1e-8)
    assert problem.optimizer.skipped_steps == 3


def test_decay_by_hand():
    """Two orthogonal gradients: the older counts β₂ times, and each direction is divided by its length."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = DenseGGT([p], lr=1.0, window=2, eps=0.5, beta2=0.25)
    for gradient, expected in (([4, 0], [4 / 4.5, 0]), ([0, 3], [0, 3 / 3.5]), ([4, 0], [4 / 4.5, 0])):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), torch.tensor(expected, dtype=torch.float64))
    p.grad = torch.tensor([4.0, 0.0], dtype=torch.float64)  # now a window of (4, 0) twice: 4² + (4 / 4)² = 17
    before = p.detach().clone()
    optimizer.step()
    assert (before - p.detach())[0].item() == pytest.approx(4 / (17**0.5 + 0.5))


# ---- eigendecompositions less often

TOLERANCE = {1e-8: 1e-4, 1e-5: 1e-7, 1e-2: 1e-8, 10.0: 1e-8}  # float64 S holds half the digits of small singular values


@given(
    window=st.integers(1, 14),
    size=st.integers(1, 20),
    refresh_every=st.integers(2, 16),
    beta2=st.sampled_from([1.0, 0.95, 0.5]),
    eps=st.sampled_from(list(TOLERANCE)),
    common=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_updates_are_the_same_however_seldom_it_decomposes(window, size, refresh_every, beta2, eps, common, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(size, generator=generator, dtype=torch.float64)

    seldom, shift = Weights(GGT(eps, beta2, refresh_every), window, size), common * draw()
    for step in range(3 * window + 2):
        update = seldom.update((draw() + shift) * (step % 5 != 3))
        torch.testing.assert_close(update, seldom.exact(), rtol=0, atol=TOLERANCE[eps])


@pytest.mark.parametrize("beta2", [1.0, 0.9])
def test_without_a_border_and_with_it_agree_to_rounding(beta2):
    """On windows of full rank: 12 digits of the weights themselves."""
    always, seldom = (Weights(GGT(1e-5, beta2, n), 30, 100) for n in (1, 8))
    for _ in range(100):
        gradient = torch.randn(100, dtype=torch.float64)
        torch.testing.assert_close(seldom.update(gradient), always.update(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_border_is_exact_at_any_scale(scale):
    X = scale * torch.randn(9, 30, dtype=torch.float64)
    A = X @ X.t()
    eigenvalues, Q = torch.linalg.eigh(A[:5, :5])
    for newest in (5, 8):
        weights = weights_with_border(
            eigenvalues, Q, A[:, 5:], newest, eps=torch.tensor(1e-5, dtype=torch.float64), rounding=0.0
        )
        values, V = torch.linalg.eigh(A)
        expected = V @ (V[newest] / (values.sqrt() + 1e-5))
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-11 * expected.norm().item())


def test_matrix_that_is_far_from_positive_semidefinite_gives_the_weights_of_the_newest_row():
    A = torch.tensor([[1.0, 10.0, 0.0], [10.0, 4.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    eigenvalues, Q = torch.linalg.eigh(A[:1, :1])
    weights = weights_with_border(eigenvalues, Q, A[:, 1:], 1, eps=torch.tensor(0.5, dtype=torch.float64), rounding=0.0)
    assert weights.tolist() == [0.0, 1 / 2.5, 0.0]


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_wildly_different_lengths_give_updates_no_longer_than_one(seed, refresh_every):
    """More rows than dimensions, lengths over 16 orders of magnitude: S is singular in float64."""
    generator = torch.Generator().manual_seed(seed)
    weights = Weights(GGT(10.0 ** -(2 + 2 * seed), 0.9, refresh_every), 12, 7)
    for _ in range(60):
        exponent = torch.randint(-8, 8, (), generator=generator).double()
        update = weights.update(torch.randn(7, generator=generator, dtype=torch.float64) * 10**exponent)
        assert update.isfinite().all()
        assert update.norm() < 1 + 1e-6


def test_number_of_decompositions():
    counts = {1: 24, 2: 11, 5: 4, 6: 3, 50: 3}  # none in the first n steps; n is at most the window
    for refresh_every, expected in counts.items():
        problem = Problem(compressor=Identity(), preconditioner=GGT(refresh_every=refresh_every), window=6)
        seen = 0
        for _ in range(24):
            problem.set_gradients()
            with Operations() as operations:
                problem.optimizer.step()
            seen += "_linalg_eigh" in operations.names
        assert seen == expected


def test_changed_eps_and_beta2_take_effect_at_once():
    changed, constant = (
        Problem(compressor=Identity(), preconditioner=GGT(eps, beta2, refresh_every=4), window=9, lr=0.1)
        for eps, beta2 in ((1e-3, 0.9), (1e-1, 0.5))
    )
    for problem in (changed, constant):
        problem.step(10)
        problem.optimizer.param_groups[0].update(eps=1e-1, beta2=0.5)
    for _ in range(9):
        before = changed.flat(), constant.flat()
        changed.step()
        constant.step()
        torch.testing.assert_close(before[0] - changed.flat(), before[1] - constant.flat(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0, 1.5, True])
def test_bad_refresh_is_named(value):
    with pytest.raises(ValueError, match=f"refresh_every must be an integer ≥ 1, got {value}"):
        GGT(refresh_every=value)


def test_state_of_another_refresh_is_refused():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    source, target = (EFCP([p], 0.1, Identity(), GGT(refresh_every=n), window=5) for n in (2, 3))
    source.step()
    with pytest.raises(ValueError, match="refresh_every is 2 in the state, but 3 in the optimizer"):
        target.load_state_dict(source.state_dict())
