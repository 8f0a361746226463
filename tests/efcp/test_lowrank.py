"""The low-rank window: what it keeps, what it hands on, and that nothing is ever as large as the window times d."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp import EFCP, MFAC, Identity, LowRank, LowRankGGT, LowRankMFAC, estimate_memory
from efcp.windows import batched
from tests.efcp.problems import Problem, window_rows
from tests.efcp.test_step import Operations

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def run(gradients, compressor, dtype=torch.float64, **options):
    """An optimizer of one parameter after some gradients."""
    p = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=dtype))
    optimizer = EFCP([p], compressor=compressor, **{"window": len(gradients), **options})
    for gradient in gradients:
        p.grad = gradient.to(dtype)
        optimizer.step()
    return optimizer, p


def matrix(rows, columns, rank, seed=0):
    """A matrix whose singular values are 1, 0.7, 0.49, …, as many as its rank."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    return (U * 0.7 ** torch.arange(rank)) @ V.t()


# ---- what it keeps


@given(
    shape=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    rank=st.integers(1, 5),
    iterations=st.integers(1, 3),
    value_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    feedback=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_error_and_row_add_up_to_the_gradients(shape, rank, iterations, value_dtype, dtype, feedback, seed):
    """e + PQᵀ = a, with the factors as they are stored: what their rounding loses is in the error."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    compressor = LowRank(rank, iterations, value_dtype, error_feedback=feedback)
    optimizer = EFCP([p], compressor=compressor, window=3)
    error = torch.zeros(p.numel(), dtype=dtype)
    for slot in (0, 1, 2, 0):
        p.grad = torch.randn(shape, generator=generator, dtype=dtype)
        total = error + p.grad.reshape(-1)
        optimizer.step()
        state, row = optimizer.state[p], window_rows(optimizer, p)[slot]
        if "rows" in state:
            assert torch.equal(row.to(dtype), p.grad.reshape(-1))
            continue
        assert ("error" in state) == feedback
        if feedback:
            error = state["error"].clone()
            torch.testing.assert_close(error + row, total.double(), rtol=0, atol=20 * TOLERANCE[dtype])
        P = state["left"][slot].double()
        torch.testing.assert_close(P @ P.t(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("rank", [3, 5, 100])
@pytest.mark.parametrize("shape", [(3, 20), (20, 3), (4, 3, 1, 2), (2, 3), (40,), (), (0, 5), (1, 9)], ids=str)
def test_rank_of_the_smaller_side_is_dense(shape, rank):
    """Exactly, for what has no fewer factors than elements is kept whole."""
    low, dense = (
        Problem(shapes=[shape], compressor=c, lr=0.1, window=4) for c in (LowRank(max(rank, *shape, 1)), Identity())
    )
    for problem in (low, dense):
        problem.step(7)
    assert torch.equal(low.flat(), dense.flat())
    torch.testing.assert_close(*(problem.optimizer.shared["gram"] for problem in (low, dense)), rtol=1e-12, atol=1e-12)


def test_gradients_of_at_most_the_rank_are_kept_as_they_are():
    """Hence the updates are dense M-FAC's. Two iterations, as one from a random start need not find all directions."""
    gradients = [matrix(20, 30, rank=2, seed=s) for s in range(9)]
    low, p = run(gradients, LowRank(rank=3, power_iterations=2, value_dtype=torch.float32), window=4, lr=1.0)
    dense, q = run(gradients, Identity(), window=4, lr=1.0)
    torch.testing.assert_close(window_rows(low, p), window_rows(dense, q), rtol=0, atol=1e-6)
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4 * q.abs().max().item())


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [30, 31])
def test_more_iterations_compress_better(rows, value_dtype):
    """Of the same matrix again and again, and never better than the best approximation of that rank."""
    A = matrix(rows, 40, rank=25)
    best = torch.linalg.svdvals(A)[4:].norm()
    lost = []
    for iterations in (1, 2, 4):
        optimizer, p = run([A] * 4, LowRank(4, iterations, value_dtype, error_feedback=False))
        lost.append((window_rows(optimizer, p) - A.view(1, -1)).norm(dim=1))
    rounding = 1 + 2 * torch.finfo(value_dtype).eps
    for some, more in itertools.pairwise(lost):
        assert (more <= some * rounding).all()
    for losses in lost:
        assert (losses.diff() <= best * (rounding - 1)).all()  # the next step starts where this one has ended
        assert (losses >= best / rounding).all()
        assert losses[-1] <= 1.1 * best


def test_error_feedback_hands_on_what_one_step_cannot_keep():
    """A constant gradient of rank 8 through a window of rank 1: the mean of the rows approaches it."""
    A = matrix(16, 24, rank=8)
    for feedback, low, high in ((True, 0, 0.1), (False, 0.6, 1)):
        optimizer, p = run([A] * 64, LowRank(1, error_feedback=feedback))
        assert low <= (window_rows(optimizer, p).mean(0) - A.view(-1)).norm() / A.norm() <= high


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3), (5, 1, 3, 7)], ids=str)
def test_first_dimension_is_the_rows(shape):
    gradients = torch.randn(5, *shape, dtype=torch.float64)
    tensor, p = run(gradients, LowRank(2))
    flat, q = run(gradients.flatten(2), LowRank(2))
    assert torch.equal(p.view(shape[0], -1), q)
    assert tensor.state[p]["left"].shape == (5, 2, shape[0])
    assert flat.state[q]["right"].shape == (5, 2, p[0].numel())


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_do_not_depend_on_the_parts(shape, value_dtype, monkeypatch):
    gradients = [torch.randn(shape) for _ in range(6)]
    _, p = run(gradients, LowRank(3, value_dtype=value_dtype), torch.float32)
    monkeypatch.setattr(batched, "BATCH", -1)
    monkeypatch.setattr(batched, "CPU_PART", 2500)
    parts, q = run(gradients, LowRank(3, value_dtype=value_dtype), torch.float32)
    tolerance = 1e-4 if value_dtype == torch.float32 else 1e-2  # a factor may be rounded to the other neighbour
    torch.testing.assert_close(p, q, rtol=0, atol=tolerance * p.abs().max().item())
    G = window_rows(parts, q)
    torch.testing.assert_close(parts.shared["gram"], G @ G.t(), rtol=1e-12, atol=1e-9)


def test_reduced_precision_of_products_leaves_the_gram_matrix_exact():
    """bfloat16 parameters, float32 sums; inner products in float64 from the factors as stored."""
    optimizer, p = run([torch.randn(40, 50) for _ in range(5)], LowRank(3), torch.bfloat16)
    G = window_rows(optimizer, p)
    torch.testing.assert_close(optimizer.shared["gram"], G @ G.t(), rtol=1e-12, atol=1e-9)


# ---- the power iteration's start


def test_start_is_the_same_in_every_process_and_does_not_touch_the_random_numbers_of_others():
    state = torch.get_rng_state()
    first, second = (LowRank(2).allocate(torch.zeros(6, 9), 3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first["basis"].any()
    assert torch.equal(first["basis"], second["basis"])
    torch.manual_seed(17)
    assert torch.equal(LowRank(2).allocate(torch.zeros(6, 9), 3)["basis"], first["basis"])


DEGENERATE = {
    "zero": lambda: torch.zeros(12, 18, dtype=torch.float64),
    "one entry": lambda: torch.zeros(12, 18, dtype=torch.float64).index_put_(
        (torch.tensor(3), torch.tensor(4)), torch.tensor(2.0, dtype=torch.float64)
    ),
    "rank one": lambda: matrix(12, 18, 1),
    "rank two": lambda: matrix(12, 18, 2),
    "constant": lambda: torch.ones(12, 18, dtype=torch.float64),
    "tiny": lambda: 1e-30 * matrix(12, 18, 9),
    "huge": lambda: 1e18 * matrix(12, 18, 9),
}


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_gradients_stay_finite_and_do_not_spoil_the_next(case, dtype, iterations):
    A, ordinary = DEGENERATE[case](), matrix(12, 18, 3, seed=5)
    compressor = LowRank(3, iterations, torch.float32, error_feedback=False)
    optimizer, p = run([A] * 3 + [ordinary] * 3, compressor, dtype, preconditioner=MFAC(1.0), lr=1e-6)
    for name, value in optimizer.state[p].items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name
    assert p.isfinite().all()
    rows = window_rows(optimizer, p)
    if case not in ("tiny", "huge"):
        torch.testing.assert_close(rows[2], A.view(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows[5], ordinary.view(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_scale_of_gradients_does_not_matter(scale):
    """Squares of float32 gradients would overflow, or vanish."""
    gradients = torch.stack([matrix(12, 18, 9, seed=s) for s in range(4)])
    plain, p = run(gradients, LowRank(2, value_dtype=torch.float32), torch.float32)
    scaled, q = run(
        gradients * scale, LowRank(2, value_dtype=torch.float32), torch.float32, preconditioner=MFAC(scale**2)
    )
    rows = window_rows(plain, p)
    torch.testing.assert_close(window_rows(scaled, q) / scale, rows, rtol=0, atol=1e-5 * rows.norm().item())


def test_skipped_step_leaves_start_and_error_as_they_were():
    optimizer, p = run([torch.randn(7, 9) for _ in range(3)], LowRank(2), torch.float32)
    before = {name: optimizer.state[p][name].clone() for name in ("basis", "error")}
    p.grad = torch.randn(7, 9).index_fill(0, torch.tensor([2]), float("nan"))
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(optimizer.state[p][name], value)
    assert not window_rows(optimizer, p)[0].any()
    assert all(optimizer.state[p][name].isfinite().all() for name in ("left", "right"))


def test_parameter_without_a_gradient_contributes_a_zero_row():
    optimizer, p = run([torch.randn(7, 9) for _ in range(4)], LowRank(2), torch.float32)
    other = torch.nn.Parameter(torch.zeros(7, 9))
    optimizer.add_param_group({"params": [other]})
    p.grad, other.grad = None, torch.randn(7, 9)
    optimizer.step()
    assert not window_rows(optimizer, p)[0].any()
    assert window_rows(optimizer, p)[1].any()
    assert window_rows(optimizer, other)[0].any()


# ---- options, memory, cost


def test_each_group_has_its_rank():
    params = [torch.nn.Parameter(torch.randn(8, 9)) for _ in range(3)]
    groups = [{"params": params[:1], "rank": 1}, {"params": params[1:2], "power_iterations": 3}, {"params": params[2:]}]
    optimizer = LowRankMFAC(groups, window=4, rank=2)
    groups[2]["rank"] = 50
    optimizer.param_groups[2]["rank"] = 50
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(8, 9)
        optimizer.step()
    assert optimizer.state[params[0]]["left"].shape == (4, 1, 8)
    assert optimizer.state[params[1]]["left"].shape == (4, 2, 8)
    assert optimizer.state[params[2]]["rows"].shape == (4, 72)


@pytest.mark.parametrize(("name", "value"), [("rank", 1), ("rank", 50), ("value_dtype", torch.float32)], ids=str)
def test_options_of_the_state_are_fixed_from_the_first_step_on(name, value):
    p = torch.nn.Parameter(torch.zeros(8, 9))
    optimizer = LowRankMFAC([p], window=4, rank=2)
    for change in (None, value):
        p.grad = torch.randn(8, 9)
        if change is None:
            optimizer.step()
            continue
        optimizer.param_groups[0][name] = change
        with pytest.raises(ValueError, match=f"{name} must stay"):
            optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 0, "rank must be an integer ≥ 1, got 0"),
        ("rank", 2.0, "rank must be an integer ≥ 1, got 2.0"),
        ("power_iterations", 0, "power_iterations must be an integer ≥ 1, got 0"),
        ("value_dtype", torch.float16, "value_dtype must be one of torch.bfloat16, torch.float32, got torch.float16"),
        (
            "error_dtype",
            torch.float16,
            "error_dtype must be one of torch.bfloat16, torch.float32, torch.float64, torch",
        ),
        ("error_feedback", None, "error_feedback must be True or False, got None"),
    ],
)
def test_bad_option_is_named(name, value, message):
    for cls in (LowRankMFAC, LowRankGGT):
        with pytest.raises(ValueError, match=message):
            cls([torch.nn.Parameter(torch.zeros(3, 3))], **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, r"param_groups\[0\]: rank is 2 in the state, but 3 in the optimizer"),
        ({"power_iterations": 2}, r"power_iterations is 2 in the state, but 1 in the optimizer"),
        ({"value_dtype": torch.float32}, r"value_dtype is 'float32' in the state, but 'bfloat16'"),
    ],
)
def test_state_of_another_rank_is_refused(changes, message):
    source, target = (
        Problem(shapes=[(9, 9)], compressor=LowRank(**{"rank": 3, **options})) for options in (changes, {})
    )
    source.step()
    with pytest.raises(ValueError, match=message):
        target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))


def test_memory_of_a_large_layer():
    """At m = 1024 and rank 4 a 1024 × 1024 layer takes 16 bytes an element in bfloat16, and its error 4."""
    p = torch.nn.Parameter(torch.empty(1024, 1024, device="meta"))
    report = estimate_memory([p], LowRankMFAC, window=1024)
    assert report.tensors["left"] + report.tensors["right"] == 16 * p.numel()
    assert report.tensors["error"] == 4 * p.numel()
    assert report.tensors["basis"] == 4 * 4 * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_has_no_temporary_of_the_size_of_a_parameter(dtype):
    p = torch.nn.Parameter(torch.zeros(2048, 1024, dtype=dtype))
    optimizer = LowRankMFAC([p], window=8, rank=2, momentum=0.9, weight_decay=0.1, max_update_norm=1.0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    with Operations() as operations:
        optimizer.step()
    assert max(operations.allocated) <= 8 * batched.CPU_PART <= p.numel()


def test_non_contiguous_parameters_and_gradients():
    plain, strided = (Problem(shapes=[(6, 8), (4, 3, 5, 7)], compressor=LowRank(2)) for _ in range(2))
    strided.params[0].data = torch.empty(8, 6, dtype=torch.float64).t().copy_(strided.params[0].data)
    strided.params[1].data = strided.params[1].data.contiguous(memory_format=torch.channels_last)
    for _ in range(6):
        plain.step()
        strided.set_gradients()
        strided.params[1].grad = strided.params[1].grad.contiguous(memory_format=torch.channels_last)
        strided.optimizer.step()
    assert not any(p.is_contiguous() for p in strided.params)
    assert torch.equal(plain.flat(), strided.flat())


@pytest.mark.parametrize(
    ("cls", "options"),
    [(LowRankMFAC, {"lr": 0.3, "damping": 1e-2}), (LowRankGGT, {"lr": 1.0, "refresh_every": 4})],
    ids=["mfac", "ggt"],
)
def test_trains_a_regression_from_mini_batches(cls, options):
    inputs = torch.randn(512, 20)
    targets = inputs @ torch.randn(20, 9)
    model = torch.nn.Linear(20, 9)
    optimizer = cls(model.parameters(), window=20, rank=2, **options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)

    def loss(rows):
        return torch.nn.functional.mse_loss(model(inputs[rows]), targets[rows])

    first = loss(slice(None)).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss(torch.randint(512, (16,))).backward()
        optimizer.step()
        scheduler.step()
    assert "left" in optimizer.state[model.weight]
    assert loss(slice(None)) < 0.02 * first


def test_parts_are_interchangeable():
    p = torch.nn.Parameter(torch.ones(5, 6))
    optimizer = EFCP([p], 0.1, LowRank(1), MFAC(), window=3)
    p.grad = torch.ones(5, 6)
    optimizer.step()
    assert (p < 1).all()
