"""Updates of each direction against the dense algebra in float64, built from the same compressed gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp import EFCP, GGT, MFAC, Identity, LowRank, Preconditioner, SparseMFAC, TopK
from efcp.preconditioners.ggt import floor
from efcp.windows.base import floats
from tests.efcp.problems import Problem, newest_slot, window_rows

BETA = 0.8
COMPRESSORS = {
    "dense": Identity(),
    "sparse": TopK(density=0.3, block_size=16, value_dtype=torch.float32),
    "sparse-bf16": TopK(density=0.1, block_size=8),
    "low-rank": LowRank(rank=2, value_dtype=torch.float32),
}
PRECONDITIONERS = {
    "mfac": MFAC(damping=0.1),
    "mfac-relative": MFAC(damping=0.01, relative=True),
    "mfac-relative-small": MFAC(damping=1e-3, relative=True),
    "ggt": GGT(eps=0.1),
    "ggt-decay": GGT(eps=0.1, beta2=0.9),
    "ggt-relative": GGT(eps=0.1, beta2=0.9, relative=True),
}


@pytest.fixture(params=COMPRESSORS)
def compressor(request):
    return COMPRESSORS[request.param]


@pytest.fixture(params=PRECONDITIONERS)
def preconditioner(request):
    return PRECONDITIONERS[request.param]


def rows_of(optimizer, params):
    return torch.cat([window_rows(optimizer, p) for p in params], 1)


def momenta_of(optimizer):
    """The dense momenta of all parameters as one vector, in float64."""
    return torch.cat([floats(x).double() for s in optimizer._sets(alone=True) for x in s.momenta])


def metric(preconditioner, G, slot):
    """(φ, D): the d × d matrix that a vector is multiplied with, and the decay of the rows."""
    m, d = G.shape
    eye = torch.eye(d, dtype=torch.float64)
    squares = (G * G).sum(1)
    mean = squares[squares > 0].mean()
    if isinstance(preconditioner, MFAC):
        damping = preconditioner.damping * mean / m if preconditioner.relative else preconditioner.damping
        return torch.linalg.inv(damping * eye + G.t() @ G / m), torch.ones(m, dtype=torch.float64)
    eps = preconditioner.eps * mean.sqrt() if preconditioner.relative else preconditioner.eps
    decay = preconditioner.beta2 ** ((slot - torch.arange(m)) % m).double()
    eigenvalues, Q = torch.linalg.eigh((G.t() * decay**2) @ G)
    lowest = floor(eigenvalues.sum(), torch.finfo(torch.float64).eps)
    return Q @ ((1 / ((eigenvalues.clamp(min=0) + lowest).sqrt() + eps))[:, None] * Q.t()), decay


def expected_update(direction, preconditioner, G, slot, steps, momentum):
    m = len(G)
    phi, decay = metric(preconditioner, G, slot)
    if direction == "momentum":
        return phi @ momentum
    age = (slot - torch.arange(m)) % m
    average = torch.where(age < steps, BETA ** age.double(), 0.0)
    alpha = average / average.sum() if direction == "average" else (age == 0).double()
    return phi @ (G.t() @ (decay**2 * alpha))


def check(problem, direction, steps, tolerance):
    before = problem.flat()
    problem.step()
    optimizer, params = problem.optimizer, problem.params
    G = rows_of(optimizer, params)
    momentum = momenta_of(optimizer) if direction == "momentum" else None
    preconditioner = optimizer.preconditioner
    expected = expected_update(direction, preconditioner, G, newest_slot(optimizer), steps, momentum)
    torch.testing.assert_close(before - problem.flat(), expected, rtol=tolerance, atol=tolerance * expected.norm())
    norm = optimizer.shared["update_norm"]
    torch.testing.assert_close(norm, expected.norm(), rtol=max(tolerance, 1e-6), atol=0)
    inner = G[newest_slot(optimizer)] @ expected
    torch.testing.assert_close(optimizer.shared["inner_product"], inner, rtol=1e-5, atol=1e-6 * inner.abs() + 1e-9)


@pytest.mark.parametrize("direction", ["row", "average", "momentum"])
def test_update_is_the_dense_one_before_and_after_the_ring_wraps(compressor, preconditioner, direction):
    options = {"compressor": compressor, "preconditioner": preconditioner, "lr": 1.0, "window": 5}
    momentum = 0.0 if direction == "row" else BETA
    problem = Problem(direction=direction, momentum=momentum, **options)
    for step in range(13):
        check(problem, direction, step + 1, 1e-7)


def test_a_momentum_in_8_bits_is_preconditioned_as_it_is_stored(compressor, preconditioner):
    options = {"compressor": compressor, "preconditioner": preconditioner, "lr": 1.0, "window": 5}
    problem = Problem(direction="momentum", momentum=BETA, momentum_dtype=torch.int8, **options)
    for step in range(7):
        check(problem, "momentum", step + 1, 2e-6)
    assert problem.optimizer.state[problem.params[0]]["momentum"].dtype == torch.int8


def test_a_dense_momentum_averages_the_gradients():
    problem = Problem(direction="momentum", momentum=BETA, compressor=TopK(0.1, 16))
    expected = 0
    for _ in range(9):
        problem.step()
        gradient = torch.cat([p.grad.reshape(-1) for p in problem.params])
        expected = BETA * expected + (1 - BETA) * gradient
        torch.testing.assert_close(momenta_of(problem.optimizer), expected)


@pytest.mark.parametrize("compressor", ["dense", "sparse", "low-rank"])
def test_length_of_an_update_is_known_where_little_is_left_of_the_momentum(compressor):
    """The momentum lies in the span of the rows but for a thousandth: what is left of it is 10⁻³ as long."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 12)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    options = {"preconditioner": MFAC(1e-5, relative=True), "direction": "momentum", "momentum": BETA, "window": 8}
    optimizer = EFCP([p], 1.0, COMPRESSORS[compressor], **options)
    left, right = (torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in shape)
    support = torch.zeros(shape, dtype=torch.float64).view(-1, 16)
    support[:, :3] = 1.0  # as many as are kept
    for step in range(40):
        mixed = left @ torch.randn(2, 2, generator=generator, dtype=torch.float64) @ right.t()
        p.grad = mixed * support.view(shape) if compressor == "sparse" else mixed
        if step == 39:
            p.grad += 2e-3 * p.grad.norm() * torch.randn(shape, generator=generator, dtype=torch.float64) / 14
        before = p.detach().clone()
        optimizer.step()
    u = (before - p.detach()).reshape(-1)
    ridge = 1e-5 * optimizer.shared["gram"].trace() / 8 / 8  # λ
    assert u.norm() * ridge < 0.05 * momenta_of(optimizer).norm()
    torch.testing.assert_close(optimizer.shared["update_norm"], u.norm(), rtol=1e-6, atol=0)


@given(
    rms=st.floats(1e-3, 10),
    direction=st.sampled_from(["row", "average", "momentum"]),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_update_has_the_root_mean_square_that_was_asked_for(rms, direction, scale, seed):
    """Whatever the scale of the loss."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in ((5, 7), (11,), ())]
    options = {"direction": direction, "momentum": 0.5 if direction != "row" else 0.0, "update_rms": rms}
    optimizer = SparseMFAC(params, 1.0, window=4, density=0.3, damping=0.1, relative_damping=True, **options)
    for _ in range(3):
        before = torch.cat([p.detach().reshape(-1) for p in params])
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator).double()
        optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in params]) - before
    assert math.isclose(moved.square().mean().sqrt().item(), rms, rel_tol=1e-6)


def test_parameters_without_gradient_do_not_count_in_the_length():
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(2)]
    optimizer = SparseMFAC(params, 1.0, window=4, density=0.5, update_rms=0.5)
    params[0].grad = torch.randn(10)
    optimizer.step()
    assert math.isclose(params[0].norm().item(), 0.5 * 10**0.5, rel_tol=1e-5)
    assert params[1].norm() == 0


def test_a_gradient_of_zeros_takes_no_step():
    p = torch.nn.Parameter(torch.ones(10))
    for direction in ("row", "average", "momentum"):
        for preconditioner in PRECONDITIONERS.values():
            optimizer = EFCP([p], 1.0, TopK(0.5), preconditioner, window=3, direction=direction, update_rms=0.2)
            p.grad = torch.zeros(10)
            optimizer.step()
            assert torch.equal(p, torch.ones(10))


def test_relative_damping_does_not_depend_on_the_scale_of_the_loss():
    """Updates of a fixed length are then the same to the last bits for losses that differ by a factor of 2²⁰."""
    results = []
    for scale in (1.0, 2.0**20):
        problem = Problem(
            compressor=TopK(0.2, 16, torch.float32),
            preconditioner=MFAC(0.01, relative=True),
            direction="momentum",
            momentum=BETA,
            update_rms=0.2,
        )
        for _ in range(9):
            problem.set_gradients()
            for p in problem.params:
                p.grad *= scale
            problem.optimizer.step()
        results.append(problem.flat())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


class Halving(Preconditioner):
    """One that knows rows alone."""

    def weights(self, gram, slot):
        return torch.zeros_like(gram.matrix[0]).index_fill_(0, slot, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, "direction must be one of row, average, momentum, got 'sideways'"),
        ({"update_rms": 0.0}, "update_rms must be a finite number > 0, got 0.0"),
        ({"update_rms": 0.2, "max_update_norm": 1.0}, "max_update_norm must be None where update_rms gives updates"),
        ({"momentum_dtype": torch.int8, "momentum": 0.5}, "momentum_dtype must be a floating point dtype, or None"),
        ({"momentum_dtype": torch.int16}, "momentum_dtype must be one of torch.float32"),
        ({"direction": "average", "beta1": 0.5}, "beta1 must be 0 with direction 'average', got 0.5"),
        ({"direction": "average", "preconditioner": Halving()}, "direction must not be 'average' with Halving"),
        ({"direction": "momentum", "preconditioner": Halving()}, "direction must not be 'momentum' with Halving"),
        ({"direction": "momentum", "preconditioner": GGT(refresh_every=2)}, "refresh_every must be 1 with direction"),
        ({"adamw": True, "params": {"betas": (0.9, 1.0)}}, r"betas must be two numbers in \[0, 1\), got"),
        ({"adamw": 1}, "adamw must be True or False, got 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_that_make_no_sense_are_refused(options, message):
    options = dict(options)
    own = options.pop("params", {})
    with pytest.raises(ValueError, match=message):
        EFCP([{"params": [torch.nn.Parameter(torch.zeros(3))], **own}], window=3, **options)


def test_groups_must_agree_on_the_direction():
    optimizer = SparseMFAC([torch.nn.Parameter(torch.zeros(3))], window=3)
    with pytest.raises(ValueError, match="direction must be the same in all param groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "direction": "average"})
