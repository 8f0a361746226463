"""Adam in subspaces against plain restatements of the papers in float64, and what users expect of any optimizer."""

import copy
import io
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import efcp
from efcp import (
    DCT,
    SVD,
    AdaRankGrad,
    GaLoreAdamW,
    LDAdamError,
    LDAdamTransport,
    LDAdamW,
    NoError,
    NoTransport,
    PlainError,
    PowerIteration,
    RandomizedSVD,
    SubspaceAdam,
)
from efcp.subspace import Projector, projectors
from efcp.subspace import optimizer as module

LR, BETAS, EPS, DECAY, SCALE, RANK, STEPS = 0.1, (0.8, 0.95), 1e-6, 0.3, 0.25, 3, 12
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def dct_adam(params, lr=LR, *, rank=RANK, every=1, **options):
    parts = {"projector": DCT(rank, every), "transport": LDAdamTransport()}
    return SubspaceAdam(params, lr, **parts, error=PlainError() if every == 1 else NoError(), **options)


OPTIMIZERS = {
    "GaLore": lambda params, **o: GaLoreAdamW(params, **{"rank": RANK, "every": 4, "lr": LR, **o}),
    "LDAdam": lambda params, **o: LDAdamW(params, **{"rank": RANK, "lr": LR, **o}),
    "AdaRankGrad": lambda params, **o: AdaRankGrad(params, **{"rank": RANK, "every": 4, "lr": LR, **o}),
    "DCT": dct_adam,
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


# ---- the papers, of one matrix in float64, as they are written


class Paper:
    """Adam in a subspace: what papers have in common. Matrices are projected on their shorter side, from the left."""

    def __init__(self, theta, scale=1.0):
        self.theta, self.t, self.scale = theta.clone(), 0, scale
        self.P = self.M = self.V = None

    def step(self, G):
        self.t += 1
        if G.shape[0] > G.shape[1]:
            self.theta = self.theta.T
            self.theta = self.turned_step(G.T).T
        else:
            self.theta = self.turned_step(G)

    def adam(self, X):
        """The direction of Adam, from projected gradients."""
        (b1, b2), t = BETAS, self.t
        self.M = b1 * self.M + (1 - b1) * X
        self.V = b2 * self.V + (1 - b2) * X**2
        return (self.M / (1 - b1**t)) / ((self.V / (1 - b2**t)).sqrt() + EPS)

    def moved(self, N):
        return (1 - LR * DECAY) * self.theta - LR * self.scale * self.P @ N

    def transport(self, Q):
        """LDAdam's rule, after c steps."""
        (b1, b2), c = BETAS, self.t - 1
        if c:
            m, v = self.M / (1 - b1**c), self.V / (1 - b2**c)
            self.M, self.V = Q @ self.M, (1 - b2**c) * ((Q**2) @ (v - m**2) + (Q @ m) ** 2).abs()


class GaLore(Paper):
    def turned_step(self, G):
        if self.t % 4 == 1:
            self.P = torch.linalg.svd(G)[0][:, :RANK]
            for column in self.P.T:
                column *= column[column.abs().argmax()].sign()
        if self.M is None:
            self.M = self.V = torch.zeros(RANK, G.shape[1], dtype=torch.float64)
        return self.moved(self.adam(self.P.T @ G))


class AdaRank(Paper):
    def turned_step(self, G):
        if self.t % 4 == 1:
            U = torch.linalg.svd(G)[0]
            old, self.P = self.P, U[:, :RANK].clone()
            for r in range(1, RANK):
                if (G - U[:, :r] @ U[:, :r].T @ G).norm() ** 2 <= (1 - 0.95) * G.norm() ** 2:
                    self.P[:, r:] = 0
                    break
            if self.M is None:
                self.M = self.V = torch.zeros(RANK, G.shape[1], dtype=torch.float64)
            else:
                self.transport(self.P.T @ old)
        return self.moved(self.adam(self.P.T @ G))


class LDAdam(Paper):
    E, rho = 0, 0.7

    def turned_step(self, G):
        A, b1 = G + self.E, BETAS[0]
        if self.t == 1:
            self.P = torch.linalg.svd(A)[0][:, :RANK]
            self.M = self.V = torch.zeros(RANK, A.shape[1], dtype=torch.float64)
        old, before = self.P, self.M
        if self.t > 1:
            B = self.rho * old @ before / (1 - b1 ** (self.t - 1)) + (1 - self.rho) * A
            self.P = torch.linalg.qr(B @ (B.T @ old))[0]
            self.transport(self.P.T @ old)
        X = self.P.T @ A
        self.E = (A - self.P @ X) + b1 / (1 - b1) * (old @ before - self.P @ self.M)
        return self.moved(self.adam(X))


class DCTAdam(Paper):
    E = 0

    def turned_step(self, G):
        A, n = G + self.E, len(G)
        D = torch.cos(torch.outer(2 * torch.arange(n) + 1, torch.arange(n)).double() * math.pi / (2 * n))
        D = D / D.norm(dim=0)
        chosen = sorted((D.T @ A).abs().sum(1).topk(RANK).indices.tolist())
        old, self.P = self.P, D[:, chosen]
        if old is None:
            self.M = self.V = torch.zeros(RANK, A.shape[1], dtype=torch.float64)
        else:
            self.transport(self.P.T @ old)
        X = self.P.T @ A
        self.E = A - self.P @ X
        return self.moved(self.adam(X))


PAPERS = {
    "GaLore": (GaLore, lambda p, **o: GaLoreAdamW(p, LR, rank=RANK, every=4, scale=SCALE, **o), SCALE),
    "AdaRankGrad": (
        AdaRank,
        lambda p, **o: AdaRankGrad(p, LR, rank=RANK, energy=0.95, every=4, scale=SCALE, **o),
        SCALE,
    ),
    "LDAdam": (LDAdam, lambda p, **o: LDAdamW(p, LR, rank=RANK, rho=0.7, **o), 1.0),
    "DCT": (DCTAdam, dct_adam, 1.0),
}


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)], ids=str)
@pytest.mark.parametrize(("paper", "make", "scale"), PAPERS.values(), ids=PAPERS)
def test_steps_are_those_of_the_paper(paper, make, scale, shape):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator).double())
    expected = paper(p.detach(), scale)
    optimizer = make([p], betas=BETAS, eps=EPS, weight_decay=DECAY)
    ranks = set()
    for _ in range(STEPS):
        p.grad = gradient(shape, generator)
        expected.step(p.grad)
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected.theta, **CLOSE)
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].abs(), expected.M.abs(), **CLOSE)
        ranks.add(int(expected.P.any(0).sum()))
    assert len(ranks) > 1 or paper is not AdaRank  # the rule for the rank has had something to say


def gradient(shape, generator):
    """A matrix with singular values of different sizes, (rows, columns) float64."""
    rows, columns = shape
    decay = 0.75 ** torch.arange(rows, dtype=torch.float64) * torch.randn(rows, generator=generator).exp()
    left = torch.randn(rows, rows, generator=generator, dtype=torch.float64)
    return left * decay @ torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@optimizers
def test_vectors_and_matrices_without_a_smaller_subspace_are_stepped_by_adamw(make):
    shapes = ((), (5,), (RANK, 20), (20, RANK), (0, 4), (2, 2, 1))
    ours, theirs = ([nn.Parameter(torch.ones(shape).double()) for shape in shapes] for _ in range(2))
    options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    optimizer, reference = make(ours, **options), torch.optim.AdamW(theirs, **options)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = torch.randn(p.shape).double()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, **CLOSE)


# ---- the parts


def matrix_of(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cosine_columns_are_orthonormal():
    for n in (1, 2, 63, 200):
        columns = projectors.cosines(n, torch.arange(n), torch.float64)
        torch.testing.assert_close(columns.T @ columns, torch.eye(n).double(), **CLOSE)


def test_moments_stay_exactly_where_the_basis_stays():
    mean, square = matrix_of(4, 6), matrix_of(4, 6, 1).square() + matrix_of(4, 6).square() * 2
    one = torch.ones((), dtype=torch.float64)
    moved = LDAdamTransport().move(torch.eye(4).double(), mean, square, (one, one))
    torch.testing.assert_close(moved, (mean, square), **CLOSE)
    assert NoTransport().move(matrix_of(4, 4), mean, square, (one, one)) == (mean, square)


def test_cosine_columns_that_stay_keep_their_moments_and_new_ones_start_at_zero():
    mean, square = matrix_of(3, 6), matrix_of(3, 6, 1).square()
    old, new = {"indices": torch.tensor([1, 4, 7])}, {"indices": torch.tensor([4, 5, 7])}
    rotation = DCT(3).rotation(new, old, torch.float64)
    bases = (DCT(3).basis(indices, 20, torch.float64) for indices in (new, old))
    torch.testing.assert_close(rotation, next(bases).T @ next(bases), **CLOSE)
    corrections = torch.tensor([0.5, 0.25]).double().unbind()
    moved, moved_square = LDAdamTransport().move(rotation, mean, square, corrections)
    assert torch.equal(moved, torch.stack([mean[1], torch.zeros(6), mean[2]]))
    expected = torch.stack([square[1], torch.zeros(6), square[2]])
    torch.testing.assert_close(moved_square, expected, **CLOSE)


def test_second_moments_never_turn_negative():
    one = torch.ones((), dtype=torch.float64)
    rotation = torch.linalg.qr(matrix_of(4, 4))[0]
    _, square = LDAdamTransport().move(rotation, 10 * matrix_of(4, 6, 1), matrix_of(4, 6, 2).square(), (one, one))
    assert (square >= 0).all()


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_a_randomised_basis_is_the_smallest_that_holds_the_energy(energy):
    a = gradient((30, 40), torch.Generator().manual_seed(3))
    chosen = RandomizedSVD(rank=20, energy=energy).choose({}, a, a, True)["basis"]
    r = int(chosen.any(0).sum())
    assert (chosen[:, r:] == 0).all()
    values = torch.linalg.svdvals(a).square()
    shares = values.cumsum(0) / values.sum()
    assert r == (20 if energy == 1 else min(20, int((shares < energy).sum()) + 1))
    exact = torch.linalg.svd(a)[0][:, :r]
    torch.testing.assert_close(chosen[:, :r] @ chosen[:, :r].T, exact @ exact.T, rtol=1e-3, atol=1e-3)


def test_a_basis_of_zero_gradients_is_orthonormal_and_finite():
    for projector in (SVD(3), RandomizedSVD(3), PowerIteration(3), DCT(3)):
        state = {name: torch.zeros(shape, dtype=d) for name, (shape, d) in projector.forms(6, torch.float32).items()}
        for first in (True, False):
            chosen = projector.choose(state, torch.zeros(6, 8), torch.zeros(3, 8), first)
            projector.check("here", chosen, 6)
            assert projector.basis(chosen, 6, torch.float32).any()


def test_a_basis_of_tiny_gradients_is_that_of_ordinary_ones():
    a = matrix_of(8, 10).float()
    for projector in (SVD(3), RandomizedSVD(3), PowerIteration(3), DCT(3)):
        state, basis = {"basis": torch.eye(8)[:, :3]}, []
        for factor in (1.0, 2.0**-90):
            chosen = projector.choose(state, a * factor, torch.zeros(3, 10), False)
            basis.append(projector.basis(chosen, 8, torch.float32))
        torch.testing.assert_close(*basis, rtol=1e-4, atol=1e-4)


def test_an_svd_that_does_not_converge_is_replaced_by_the_eigenvectors(monkeypatch):
    a = matrix_of(6, 9)
    expected = SVD(3).choose({}, a, a, True)["basis"]

    def fail(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    torch.testing.assert_close(SVD(3).choose({}, a, a, True)["basis"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "projector", [SVD(RANK, 1), DCT(RANK), RandomizedSVD(RANK, 0.5, 1), PowerIteration(RANK)], ids=repr
)
def test_what_is_applied_and_what_is_kept_is_what_came_in(projector):
    """With β₁ = 0 and one step the mean is Px; the error law is g + e = Px + e'."""
    p = nn.Parameter(torch.zeros(7, 12).double())
    parts = {"projector": projector, "transport": LDAdamTransport(), "error": PlainError()}
    optimizer = SubspaceAdam([p], LR, **parts, betas=(0.0, 0.9))
    came, applied = torch.zeros(7, 12).double(), torch.zeros(7, 12).double()
    for seed in range(STEPS):
        p.grad = matrix_of(7, 12, seed)
        optimizer.step()
        state = optimizer.state[p]
        came += p.grad
        applied += projector.basis(state, 7, torch.float64) @ state["exp_avg"]  # P x, for β₁ = 0
        torch.testing.assert_close(applied + state["error"], came, **CLOSE)
    assert state["error"].norm() > 0.1


def test_the_generalised_error_keeps_the_part_of_the_mean_that_is_lost():
    """Σ over all steps of what the mean will ever apply, plus the error, is what came in, whatever becomes of P."""
    p = nn.Parameter(torch.zeros(7, 12).double())
    optimizer = LDAdamW([p], LR, rank=RANK, betas=(0.8, 0.9))
    came, applied = torch.zeros(7, 12).double(), torch.zeros(7, 12).double()
    for seed in range(STEPS):
        p.grad = matrix_of(7, 12, seed)
        optimizer.step()
        state = optimizer.state[p]
        came += p.grad
        mean = state["basis"] @ state["exp_avg"]
        applied += mean
        torch.testing.assert_close(applied + 0.8 / (1 - 0.8) * mean + state["error"], came, **CLOSE)


# ---- refusals


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((SVD(RANK, 2), NoTransport(), PlainError()), "every must be 1 with PlainError, got 2.* only grows"),
        ((DCT(RANK, 5), LDAdamTransport(), LDAdamError()), "every must be 1 with LDAdamError, got 5"),
        ((PowerIteration(RANK), NoTransport(), NoError()), "transport must move the moments with PowerIteration"),
        ((SVD(RANK, 1), NoTransport(), LDAdamError()), "transport must move the moments with LDAdamError"),
    ],
    ids=lambda value: "-".join(type(part).__name__ for part in value) if isinstance(value, tuple) else "",
)
def test_parts_without_sense_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        SubspaceAdam(
            [nn.Parameter(torch.ones(5, 5))], **dict(zip(("projector", "transport", "error"), parts, strict=True))
        )


def test_other_things_than_parts_are_refused():
    parts = {"projector": SVD(), "transport": NoTransport(), "error": NoError()}
    for name in parts:
        with pytest.raises(TypeError, match=f"{name} must be an instance of a subclass of efcp.subspace"):
            SubspaceAdam([nn.Parameter(torch.ones(5, 5))], **{**parts, name: "SVD"})


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (GaLoreAdamW, {"rank": 0}),
        (GaLoreAdamW, {"every": 0}),
        (GaLoreAdamW, {"scale": -1.0}),
        (GaLoreAdamW, {"lr": -1.0}),
        (GaLoreAdamW, {"betas": (0.9, 1.0)}),
        (GaLoreAdamW, {"eps": 0.0}),
        (GaLoreAdamW, {"weight_decay": float("nan")}),
        (GaLoreAdamW, {"maximize": 1}),
        (LDAdamW, {"rho": 1.0}),
        (AdaRankGrad, {"energy": 0.0}),
        (AdaRankGrad, {"energy": 1.5}),
    ],
    ids=str,
)
def test_values_that_are_not_allowed_are_named(make, options):
    (name,) = options
    for given, of_group in ((options, {}), ({}, options)):
        with pytest.raises(ValueError, match=f"^{name} must"):
            make([{"params": [nn.Parameter(torch.ones(5, 5))], **of_group}], **given)


@optimizers
def test_misspelt_options_of_groups_are_refused_and_keys_of_others_kept(make):
    p = nn.Parameter(torch.ones(5, 5))
    with pytest.raises(ValueError, match="did you mean weight_decay"):
        make([{"params": [p], "wieght_decay": 0.1}])
    assert make([{"params": [p], "initial_lr": 0.1}]).param_groups[0]["initial_lr"] == 0.1
    with pytest.raises(ValueError, match="projector must be"):
        make([{"params": [p], "projector": "Other"}])


@optimizers
def test_a_group_that_is_refused_is_not_added(make):
    optimizer = make([nn.Parameter(torch.ones(5, 5))])
    for options, message in (({"lr": -1.0}, "lr must"), ({"params": [torch.ones(5).long()]}, "params must")):
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(5, 5))], **options})
        assert len(optimizer.param_groups) == 1


@dataclass(frozen=True)
class FirstRows(Projector):
    """A projector of a user's own: the first rows of a matrix, and options of its own."""

    rank: int = 2
    every: int = 3
    note: str = "mine"

    def choose(self, state, a, mean, first):
        return {"basis": torch.eye(a.shape[0], self.rank, dtype=a.dtype)}


@dataclass(frozen=True)
class Clashing(FirstRows):
    eps: float = 0.1


def test_a_projector_of_ones_own_steps_is_saved_and_loaded():
    parts = {"transport": NoTransport(), "error": NoError()}
    problem, other = (Problem(lambda params: SubspaceAdam(params, projector=FirstRows(), **parts)) for _ in range(2))
    before = problem.params[2].detach().clone()
    problem.step(4)
    moved = (problem.params[2] != before).T  # (20, 8): the shorter side is that of the rows
    assert moved[:, :2].all()
    assert not moved[:, 2:].any()
    other.optimizer.load_state_dict(through_a_file(problem.optimizer.state_dict()))
    assert_equal(other.optimizer.state_dict(), problem.optimizer.state_dict())
    with pytest.raises(ValueError, match="projector must not have options named eps"):
        SubspaceAdam(problem.params, projector=Clashing(), **parts)


@optimizers
def test_parameters_and_gradients_that_are_not_dense_real_tensors_are_refused(make):
    with pytest.raises(TypeError, match="complex64"):
        make([nn.Parameter(torch.ones(5, 5, dtype=torch.complex64))])
    p = nn.Parameter(torch.ones(5, 5))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="twice"):
        make([p, p])
    optimizer = make([p, nn.Parameter(torch.ones(4, 4))])
    optimizer.param_groups[0]["params"][1].grad = torch.ones(4, 4)
    p.grad = torch.ones(5, 5).to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()
    assert not optimizer.state


def test_divided_parameters_are_refused(tmp_path):
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        p = nn.Parameter(distribute_tensor(torch.ones(5, 5), init_device_mesh("cpu", (1,)), [Replicate()]))
        with pytest.raises(TypeError, match="must not be divided over processes, got a DTensor"):
            GaLoreAdamW([p])
    finally:
        torch.distributed.destroy_process_group()


@optimizers
def test_another_rank_after_the_first_step_is_refused(make):
    problem = Problem(make)
    problem.step(2)
    before = copy.deepcopy(problem.everything())
    problem.optimizer.param_groups[0]["rank"] = RANK - 1
    problem.backward()
    with pytest.raises(ValueError, match="rank must stay what it was"):
        problem.optimizer.step()
    problem.optimizer.param_groups[0]["rank"] = RANK
    assert_equal(problem.everything(), before)


# ---- what users expect of any optimizer


class Problem:
    """A small regression with a convolution, a matrix each way, and vectors, in two param groups."""

    def __init__(self, make, dtype=torch.float32, **options):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 6))
        self.model.to(dtype)
        self.inputs, self.targets = torch.randn(32, 2, 4, 4).to(dtype), torch.randn(32, 6).to(dtype)
        self.params = list(self.model.parameters())
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "weight_decay": 0.1}]
        self.optimizer = make(groups, **options)

    def loss(self):
        return (self.model(self.inputs) - self.targets).float().square().mean()

    def backward(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self, number=1):
        for _ in range(number):
            self.backward()
            self.optimizer.step()

    def everything(self):
        saved = self.optimizer.state_dict()
        return {"model": self.model.state_dict(), **saved}


def assert_equal(one, other):
    """That two nests of dicts and tensors are the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_training_goes_down_and_goes_on_alike_from_a_file(make, dtype):
    problem = Problem(make, dtype, lr=0.03)
    start = problem.loss().item()
    problem.step(6)
    other = Problem(make, dtype, lr=0.5)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(through_a_file(problem.optimizer.state_dict()))
    assert_equal(other.everything(), problem.everything())
    for _ in range(2):
        problem.step(3)
        other.step(3)
        assert_equal(other.everything(), problem.everything())
    problem.step(20)
    assert problem.loss().item() < 0.8 * start


@optimizers
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: torch.load(_saved(o), weights_only=False)], ids=["deep", "pickle"]
)
def test_copies_of_an_optimizer_go_on_alike(make, copier):
    problem = Problem(make)
    problem.step(3)
    model, optimizer = copier((problem.model, problem.optimizer))
    other = Problem(make)
    other.model, other.optimizer, other.params = model, optimizer, list(model.parameters())
    problem.step(6)
    other.step(6)
    assert_equal(other.everything(), problem.everything())


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def spoil(saved, name, value):
    """A copy of a state dict in which an entry of one state is another."""
    spoilt = copy.deepcopy(saved)
    state = next(state for state in spoilt["state"].values() if name in state)
    state[name] = value(state[name])
    return spoilt


@optimizers
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exp_avg", lambda t: t * float("nan"), "exp_avg must be finite"),
        ("exp_avg_sq", lambda t: t - 1e6, "exp_avg_sq must not be negative"),
        ("exp_avg", lambda t: t[..., 1:], "the shape of exp_avg"),
        ("exp_avg", lambda t: t.double(), "the dtype of exp_avg"),
        ("step", lambda t: t - 100, "step must not be negative"),
        ("step", lambda t: 3, "the type of step"),
        ("basis", lambda t: 2 * t, "basis must have columns that are orthonormal or zero"),
        ("indices", lambda t: t + 100, "indices must lie in"),
        ("indices", lambda t: t.flip(0), "indices must be ascending"),
        ("error", lambda t: t / 0, "error must be finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_state_is_refused_and_changes_nothing(make, name, value, message):
    problem = Problem(make)
    problem.step(2)
    saved = problem.optimizer.state_dict()
    if not any(name in state for state in saved["state"].values()):
        pytest.skip("no such state")
    other = Problem(make)
    other.step(1)
    before = copy.deepcopy(other.everything())
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(spoil(saved, name, value))
    assert_equal(other.everything(), before)


def test_state_of_other_parts_and_ranks_is_refused_and_changes_nothing():
    other = Problem(dct_adam)
    other.step(1)
    before = copy.deepcopy(other.everything())
    sources = [*OPTIMIZERS.values(), lambda params: dct_adam(params, rank=2), lambda params: dct_adam(params, every=2)]
    for make in (*sources, lambda params: torch.optim.AdamW(params)):
        if make is dct_adam:
            continue
        problem = Problem(make)
        problem.step(1)
        with pytest.raises(ValueError, match=r"(projector|error|rank) is .* in the state|kind of optimizer"):
            other.optimizer.load_state_dict(problem.optimizer.state_dict())
        assert_equal(other.everything(), before)


@pytest.mark.parametrize("waits", [True, False], ids=["flag on the host", "flag on the device"])
@pytest.mark.parametrize("when", [0, 2, 4], ids="before step {}".format)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@optimizers
def test_a_step_that_is_not_finite_leaves_all_as_it_was(make, bad, when, waits, monkeypatch):
    problem, other = Problem(make), Problem(make)
    for each in (problem, other):
        each.step(when)
    if not waits:
        monkeypatch.setattr(module, "is_cheap", lambda flag: False)
    problem.backward()
    problem.params[2].grad[0, 0] = bad
    if when == 0:
        problem.optimizer.allocate_state()
    before = copy.deepcopy(problem.everything())
    problem.optimizer.step()
    problem.optimizer.step()
    after = problem.everything()
    for state in after["state"].values():
        assert state["skipped_steps"] == 2
        state["skipped_steps"] -= 2
    assert_equal(after, before)
    problem.step(9)
    other.step(9)
    torch.testing.assert_close(list(problem.model.parameters()), list(other.model.parameters()), rtol=0, atol=0)


def test_skipped_steps_are_counted_also_where_parameters_come_later():
    one, two = nn.Parameter(torch.ones(6, 6)), nn.Parameter(torch.ones(6, 6))
    optimizer = GaLoreAdamW([one, two], rank=2)
    assert optimizer.skipped_steps == 0
    one.grad = torch.full_like(one, math.nan)
    optimizer.step()
    one.grad, two.grad = None, torch.full_like(two, math.inf)
    optimizer.step()
    two.grad = torch.ones_like(two)
    optimizer.step()
    assert optimizer.skipped_steps == 2


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_a_basis_is_chosen_in_every_nth_step_whatever_is_skipped(every, monkeypatch):
    for cheap in (True, False):
        monkeypatch.setattr(module, "is_cheap", lambda flag, cheap=cheap: cheap)
        p = nn.Parameter(torch.zeros(6, 8))
        optimizer = GaLoreAdamW([p], rank=2, every=every)
        taken, basis = 0, None
        for call in range(25):
            p.grad = torch.randn(6, 8) * (math.nan if call % 4 == 1 or call == 0 else 1)
            optimizer.step()
            changed = basis is None or not torch.equal(optimizer.state[p]["basis"], basis)
            if p.grad.isfinite().all():
                assert changed == (taken % every == 0)
                taken += 1
                basis = optimizer.state[p]["basis"].clone()
        assert optimizer.state[p]["step"] == taken


class Reads(TorchDispatchMode):
    """Counts how often the host looks at a number on the device."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "reads"), [("LDAdam", 0), ("DCT", 0), ("GaLore", 2), ("AdaRankGrad", 2)])
def test_a_device_is_waited_for_only_where_a_basis_may_be_due(name, reads, monkeypatch):
    """Twice in each period of `every` = 4 steps, and never where a basis is chosen in every step."""
    monkeypatch.setattr(module, "is_cheap", lambda flag: False)
    p = nn.Parameter(torch.zeros(6, 8))
    optimizer = OPTIMIZERS[name]([p])
    p.grad = torch.randn(6, 8)
    for _ in range(4):
        optimizer.step()
    with Reads() as seen:
        for _ in range(8):
            optimizer.step()
    assert seen.number == 2 * reads


@optimizers
def test_gradients_stay_as_they_are(make):
    for maximize in (False, True):
        problem = Problem(make, maximize=maximize)
        problem.step(2)
        problem.backward()
        grads = [p.grad.clone() for p in problem.params]
        problem.optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(problem.params, grads, strict=True))


@optimizers
def test_maximising_is_minimising_the_negative(make):
    up, down = Problem(make, maximize=True), Problem(make)
    for _ in range(5):
        up.backward()
        down.backward()
        for p, q in zip(up.params, down.params, strict=True):
            p.grad = -q.grad
        up.optimizer.step()
        down.optimizer.step()
    torch.testing.assert_close(up.params, down.params, rtol=0, atol=0)


@optimizers
def test_a_parameter_without_a_gradient_stays_and_has_no_state(make):
    problem = Problem(make)
    problem.backward()
    still = problem.params[2]
    before, still.grad = still.detach().clone(), None
    problem.optimizer.step()
    assert torch.equal(still, before)
    assert still not in problem.optimizer.state
    assert all(problem.optimizer.state[p] for p in problem.params if p is not still)
    problem.optimizer.zero_grad()
    before = copy.deepcopy(problem.everything())
    problem.optimizer.step()
    assert_equal(problem.everything(), before)


@optimizers
def test_named_parameters_are_named_in_errors_and_other_names_warned_of(make):
    one, other = nn.Linear(6, 6), nn.Linear(6, 6)
    optimizer = make(one.named_parameters())
    one.weight.grad = torch.ones(6, 6).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 0 \(weight\)"):
        optimizer.step()
    renamed = make([("head", other.weight), ("bias", other.bias)])
    with pytest.warns(UserWarning, match="'weight' goes to 'head'"):
        renamed.load_state_dict(optimizer.state_dict())
    assert renamed.param_groups[0]["param_names"] == ["head", "bias"]


@optimizers
def test_schedulers_turn_lr_and_betas(make):
    problem = Problem(make, lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(problem.optimizer, max_lr=0.1, total_steps=8)
    for _ in range(5):
        problem.step()
        schedule.step()
    other = Problem(make)
    other.model.load_state_dict(problem.model.state_dict())
    other.optimizer.load_state_dict(through_a_file(problem.optimizer.state_dict()))
    assert other.optimizer.param_groups[0]["betas"] == list(problem.optimizer.param_groups[0]["betas"])
    problem.step()
    other.step()
    torch.testing.assert_close(problem.params, other.params, rtol=0, atol=0)


@optimizers
def test_groups_have_options_of_their_own(make):
    still, decayed, plain, small = params = [nn.Parameter(torch.ones(6, 6)) for _ in range(4)]
    groups = [
        {"params": [still], "lr": 0.0},
        {"params": [decayed], "weight_decay": 0.5, "lr": torch.tensor([0.1])},
        {"params": [plain], "lr": 0.1},
        {"params": [small], "rank": 2},
    ]
    optimizer = make(groups)
    for p in params:
        p.grad = matrix_of(6, 6).float()
    optimizer.step()
    assert torch.equal(still, torch.ones(6, 6))
    torch.testing.assert_close(plain - decayed, torch.full((6, 6), 0.1 * 0.5))
    ranks = [optimizer.state[p]["exp_avg"].shape[0] for p in params]
    assert ranks == [RANK, RANK, RANK, 2]


@optimizers
def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned(make):
    plain, closed = Problem(make), Problem(make)
    plain.step()
    loss = closed.optimizer.step(closed.backward)
    assert loss.requires_grad
    assert_equal(plain.everything(), closed.everything())


@optimizers
def test_steps_of_bfloat16_parameters_are_those_of_float32_rounded(make):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(7, 12, generator=generator).bfloat16())
    q = nn.Parameter(p.detach().float())
    one, other = make([p], weight_decay=DECAY), make([q], weight_decay=DECAY)
    for _ in range(STEPS):
        p.grad = torch.randn(7, 12, generator=generator).bfloat16()
        q.grad = p.grad.float()
        one.step()
        other.step()
        assert torch.equal(p, q.bfloat16())
        assert all(t.dtype in (torch.float32, torch.int64) for t in one.state[p].values())
        with torch.no_grad():
            q.copy_(p)


@optimizers
def test_a_convolution_is_stepped_as_its_matrix_whatever_its_strides(make):
    kernel = torch.randn(5, 2, 3, 3)
    params = [
        nn.Parameter(kernel.clone()),
        nn.Parameter(kernel.reshape(5, 18).clone()),
        nn.Parameter(kernel.to(memory_format=torch.channels_last)),
    ]
    kinds = [make([p]) for p in params]
    for _ in range(6):
        grad = torch.randn(5, 2, 3, 3)
        for p, optimizer in zip(params, kinds, strict=True):
            p.grad = grad.reshape(p.shape)
            optimizer.step()
    assert params[2].stride() != params[0].stride()
    for p in params[1:]:
        torch.testing.assert_close(p.reshape(kernel.shape), params[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(GaLoreAdamW, {"rank": RANK}), (LDAdamW, {"rank": RANK}), (AdaRankGrad, {"rank": RANK}), (dct_adam, {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_is_what_the_estimate_says(cls, options, dtype):
    problem = Problem(lambda params: cls(params, **options), dtype)
    problem.step()
    report = efcp.memory_report(problem.optimizer)
    assert report == efcp.estimate_memory(problem.model, cls, **options)
    assert report.total > 0


def test_memory_of_a_matrix_is_that_of_the_documentation():
    report = efcp.estimate_memory([torch.empty(300, 200)], GaLoreAdamW, rank=16)
    assert report.total == 4 * 16 * (200 + 2 * 300) + 16
    report = efcp.estimate_memory([torch.empty(300, 200)], LDAdamW, rank=16)
    assert report.total == 4 * 16 * (200 + 2 * 300) + 4 * 300 * 200 + 16


def test_state_and_options_are_tensors_and_plain_values():
    for make in OPTIMIZERS.values():
        problem = Problem(make)
        problem.step()
        saved = problem.optimizer.state_dict()
        assert all(isinstance(value, torch.Tensor) for state in saved["state"].values() for value in state.values())
        plain = (bool, int, float, str, list)
        assert all(isinstance(value, plain) for group in saved["param_groups"] for value in group.values())
        problem.optimizer.load_state_dict(saved)
        problem.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(6, 6))]})
        assert saved["param_groups"][0].keys() == problem.optimizer.param_groups[-1].keys()
