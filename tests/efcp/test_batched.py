"""Windows of small parameters in batches, against the definition: each parameter by itself."""

import copy
from itertools import chain

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from efcp import EFCP, MFAC, DenseMFAC, Identity, Kronecker, LowRank, LowRankMFAC
from efcp.kernels import backend_name
from efcp.windows import batched
from efcp.windows.batched import Batched
from efcp.windows.dense import DenseWindow
from tests.efcp.problems import window_rows

WINDOW = 3
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.int8: 1e-9}
DIRECTIONS = {
    "row": {},
    "heavy ball": {"momentum": 0.9, "weight_decay": 0.1},
    "heavy ball in bfloat16": {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
    "momentum": {"direction": "momentum", "momentum": 0.8, "update_rms": 0.2},
    "momentum in 8 bits": {"direction": "momentum", "momentum_dtype": torch.int8, "momentum": 0.8, "update_rms": 0.2},
}


@pytest.fixture
def batch_of():
    """Sets how many numbers fit in a batch; −1 leaves every parameter alone."""
    before = batched.BATCH

    def change(size):
        batched.BATCH = size

    yield change
    batched.BATCH = before


def zero_or_none(kind, gradient):
    return {"zero": torch.zeros_like(gradient), "none": None}.get(kind, gradient)


def run(shapes, kinds, compressor, dtype=torch.float64, damping=0.1, preconditioner=None, **options):
    """Parameters and optimizer after as many steps as there are lists of kinds of gradients."""
    generator, preconditioner = torch.Generator().manual_seed(0), preconditioner or MFAC(damping, relative=True)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = EFCP(params, 0.1, compressor, preconditioner, window=WINDOW, **options)
    for step in kinds:
        for p, kind in zip(params, step, strict=True):
            p.grad = zero_or_none(kind, torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
        optimizer.step()
    return params, optimizer


def tensors(params, optimizer):
    """All numbers of parameters and states by name, those in few bits in the place of the codes."""
    for number, p in enumerate(params):
        yield f"parameter {number}", p.detach()
        for name, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                yield f"{name} of {number}", value


def assert_same(actual, expected, tolerance):
    expected = dict(tensors(*expected))
    for name, value in tensors(*actual):
        other = expected.pop(name)
        if value.is_floating_point():
            scale = max(other.double().abs().max().item(), 1e-30) if other.numel() else 1.0
            torch.testing.assert_close(value.double(), other.double(), rtol=0, atol=tolerance * scale, msg=name)
        else:
            assert torch.equal(value, other), name
    assert not expected


@given(
    shapes=st.lists(
        st.sampled_from([(8, 9), (9, 8), (3, 2, 5), (6, 4, 3, 1), (7,), (1,), (), (1, 1), (0, 4), (12, 1), (20, 13)]),
        min_size=2,
        max_size=9,
    ),
    data=st.data(),
    rank=st.integers(1, 5),
    iterations=st.integers(1, 2),
    value_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    error_dtype=st.sampled_from([None, torch.bfloat16, torch.float32, torch.int8, torch.int4]),
    feedback=st.booleans(),
    direction=st.sampled_from(sorted(DIRECTIONS)),
    batch=st.sampled_from([100, 700, 1 << 18]),
)
@settings(max_examples=150, deadline=None)
def test_batches_give_what_each_parameter_gives_by_itself(
    shapes, data, rank, iterations, value_dtype, error_dtype, feedback, direction, batch
):
    # The error alone, after a gradient of zeros, may have a lower rank than r: further directions would be arbitrary.
    first = ["random"] * 6 + ["zero", "none"]
    later = [kind for kind in first if kind != "zero" or not feedback]
    steps = data.draw(st.integers(2, 5))
    draws = [[st.sampled_from(later if step else first)] * len(shapes) for step in range(steps)]
    kinds = data.draw(st.tuples(*(st.tuples(*draw) for draw in draws)))
    compressor = LowRank(rank, iterations, value_dtype, error_dtype, feedback)
    before, results = batched.BATCH, []
    try:
        for batched.BATCH in (batch, -1):
            results.append(run(shapes, kinds, compressor, **DIRECTIONS[direction]))
    finally:
        batched.BATCH = before
    assert_same(*results, TOLERANCE[DIRECTIONS[direction].get("momentum_dtype") or torch.float64])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compressor", [LowRank(2, value_dtype=torch.float32), Identity()], ids=["low rank", "dense"])
def test_batches_give_the_same_in_every_dtype(compressor, dtype, direction, batch_of):
    shapes, kinds = [(8, 9)] * 5 + [(9, 8)] * 2 + [(4,), (7,)], [["random"] * 9] * 4
    results = []
    for size in (1 << 18, -1):
        batch_of(size)
        results.append(run(shapes, kinds, compressor, dtype, **DIRECTIONS[direction]))
    assert_same(*results, max(TOLERANCE[dtype], TOLERANCE[DIRECTIONS[direction].get("momentum_dtype") or dtype]))


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("sides", [1, 2])
def test_kronecker_metric_in_batches_is_that_of_each_parameter_by_itself(sides, refresh_every, batch_of):
    shapes = [(8, 9)] * 4 + [(9, 8), (4, 30), (30, 4), (4, 30), (7,), (5,), (7,), (0,), (0,)]
    kinds = [["random"] * 8 + ["none", "zero", *["random"] * 3], ["none", *["random"] * 12], *[["random"] * 13] * 2]
    results = []
    for size in (1 << 18, 500, -1):
        batch_of(size)
        metric = Kronecker(0.1, sides, refresh_every)
        options = {"direction": "momentum", "update_rms": 0.2, "momentum_dtype": torch.int8}
        results.append(run(shapes, kinds, LowRank(2), preconditioner=metric, **options))
    for result in results[:2]:
        assert_same(result, results[2], 1e-6 if refresh_every > 1 else TOLERANCE[torch.float64])


def low_rank(gradient):
    return gradient[:, :1] @ gradient[:1]


DEGENERATE = {
    "rank one": low_rank,
    "duplicated columns": lambda g: g[:, :1].expand_as(g) + 0.0,
    "one entry": lambda g: torch.zeros_like(g).index_put_((torch.tensor(2), torch.tensor(3)), torch.tensor(1.0).to(g)),
    "zero": torch.zeros_like,
    "tiny": lambda g: 1e-30 * g,
    "huge": lambda g: 1e17 * g,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (4, 30)], ids=str)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_matrices_are_kept_whole_and_leave_others_of_their_batch_alone(case, shape, dtype):
    """Every second matrix is degenerate. Left factors are orthonormal whatever the rank, so e + PQᵀ = a holds."""
    generator, rank = torch.Generator().manual_seed(0), 3
    together, apart = ([torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for _ in range(n)] for n in (6, 3))
    optimizers = [EFCP(p, 0.0, LowRank(rank, value_dtype=torch.float32), window=4) for p in (together, apart)]
    errors = [torch.zeros(shape, dtype=torch.float64) for _ in together]
    for slot in range(4):
        for number, p in enumerate(together):
            gradient = torch.randn(shape, generator=generator, dtype=dtype)
            degenerate = number % 2 == 0 and slot < 3
            p.grad = DEGENERATE[case](gradient) if degenerate else gradient
        for p, other in zip(apart, together[1::2], strict=True):
            p.grad = other.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for number, p in enumerate(together):
            state = optimizers[0].state[p]
            P, row = state["left"][slot].double(), window_rows(optimizers[0], p)[slot].view(shape)
            torch.testing.assert_close(P @ P.t(), torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
            total = errors[number] + p.grad.double()
            errors[number] = state["error"].double().view(shape).clone()
            scale = total.abs().max().item()
            assert (errors[number] + row - total).abs().max() <= 1e-5 * scale
            assert all(x.isfinite().all() for x in state.values() if isinstance(x, torch.Tensor))
            if number % 2 == 0 and case in ("rank one", "duplicated columns", "one entry") and slot < 3:
                assert errors[number].norm() <= 1e-5 * total.norm()
    for p, other in zip(apart, together[1::2], strict=True):
        rows = [window_rows(o, q) for o, q in zip(optimizers, (other, p), strict=True)]
        torch.testing.assert_close(*rows, rtol=0, atol=1e-5 * rows[0].abs().max().item())


@pytest.mark.parametrize("cls", [LowRankMFAC, DenseMFAC])
def test_non_finite_step_changes_nothing_of_a_batch_but_its_row(cls):
    params = [torch.nn.Parameter(torch.randn(8, 9)) for _ in range(4)] + [torch.nn.Parameter(torch.randn(7))]
    optimizer = cls(params, window=4)
    for step in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        if step == 2:
            params[1].grad[3, 4] = float("inf")
            before = copy.deepcopy({n: [optimizer.state[p].get(n) for p in params] for n in ("error", "basis")})
            expected = [p.detach().clone() for p in params]
        optimizer.step()
    for p, old in zip(params, expected, strict=True):
        assert torch.equal(p, old)
        rows = window_rows(optimizer, p)
        assert not rows[2].any()
        assert rows[1].any()
        assert rows.isfinite().all()
    for name, values in before.items():
        for p, old in zip(params, values, strict=True):
            assert old is None or torch.equal(optimizer.state[p][name], old)


@pytest.mark.parametrize("direction", ["heavy ball", "momentum in 8 bits"])
def test_runs_resume_bitwise(direction):
    shapes, options = [(8, 9)] * 4 + [(5,)] * 3 + [(9, 8)], DIRECTIONS[direction]
    compressor = LowRank(2, error_dtype=torch.int4)
    params, optimizer = run(shapes, [["random"] * 8] * 4, compressor, torch.float32, **options)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = EFCP(others, 0.1, compressor, MFAC(0.1, relative=True), window=WINDOW, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        resumed.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


# ---- cost


class Operations(TorchDispatchMode):
    """Counts operations that are not views, and notes how many bytes they allocate."""

    def __init__(self):
        super().__init__()
        self.count, self.allocated = 0, [0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += 1
            mine = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            known = {x.untyped_storage().data_ptr() for x in mine}
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                    self.allocated.append(x.untyped_storage().nbytes())
        return result


def step_of(shapes, compressor, **options):
    """What the third step does."""
    _, optimizer = run(shapes, [["random"] * len(shapes)] * 2, compressor, torch.float32, 1.0, **options)
    with Operations() as operations:
        optimizer.step()
    return operations


@pytest.mark.skipif(backend_name(torch.device("cpu")) == "reference", reason="the definition of kernels has loops")
@pytest.mark.parametrize("direction", ["row", "heavy ball", "momentum", "momentum in 8 bits"])
@pytest.mark.parametrize("compressor", [LowRank(2), LowRank(2, error_dtype=torch.int4), Identity()], ids=str)
def test_operations_do_not_grow_with_the_number_of_parameters(compressor, direction):
    few, many = (
        step_of([(12, 10)] * n + [(6,)] * n + [(16, 8)] * n, compressor, **DIRECTIONS[direction]).count for n in (3, 30)
    )
    assert many == few


def test_temporaries_are_bounded(batch_of):
    batch_of(1 << 12)
    for direction in ("heavy ball", "momentum in 8 bits"):
        operations = step_of([(16, 20)] * 60 + [(30,)] * 60, LowRank(2), **DIRECTIONS[direction])
        assert max(operations.allocated) <= 8 * batched.BATCH


@pytest.mark.parametrize("direction", ["row", "heavy ball", "momentum", "momentum in 8 bits"])
@pytest.mark.parametrize("error_dtype", [torch.float32, torch.int8, torch.int4], ids=str)
def test_what_is_large_is_alone_and_no_temporary_has_its_size(direction, error_dtype, monkeypatch):
    for name in ("BATCH", "CPU_PART"):
        monkeypatch.setattr(batched, name, 1 << 12)
    operations = step_of([(512, 384)] * 2, LowRank(2, error_dtype=error_dtype), **DIRECTIONS[direction])
    assert max(operations.allocated) <= 16 * batched.CPU_PART < 384 * 512


# ---- large parameters, in parts


@given(
    shapes=st.lists(
        st.sampled_from([(40, 33), (33, 40), (130, 7), (7, 130), (12, 4, 4, 8), (6, 128)]), min_size=1, max_size=3
    ),
    data=st.data(),
    rank=st.integers(1, 4),
    iterations=st.integers(1, 2),
    value_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    error_dtype=st.sampled_from([None, torch.bfloat16, torch.float32, torch.int8]),
    direction=st.sampled_from(sorted(DIRECTIONS)),
    numel=st.integers(1, 1500),
)
@settings(max_examples=100, deadline=None)
def test_parts_of_a_matrix_give_what_the_whole_gives(
    shapes, data, rank, iterations, value_dtype, error_dtype, direction, numel
):
    kind = st.sampled_from(["random"] * 6 + ["none"])
    kinds = data.draw(st.lists(st.tuples(*[kind] * len(shapes)), min_size=2, max_size=5))
    compressor = LowRank(rank, iterations, value_dtype, error_dtype)
    before, results = (batched.BATCH, batched.CPU_PART), []
    try:
        batched.BATCH = -1
        for batched.CPU_PART in (1 << 17, numel):
            results.append(run(shapes, kinds, compressor, **DIRECTIONS[direction]))
    finally:
        batched.BATCH, batched.CPU_PART = before
    assert_same(*results, TOLERANCE[DIRECTIONS[direction].get("momentum_dtype") or torch.float64])


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), numel=st.integers(1, 1 << 16))
@settings(deadline=None)
def test_parts_are_consecutive_and_begin_where_no_scale_is_shared(rows, columns, numel):
    assume(rows + columns < rows * columns)
    param, compressor = torch.empty(rows, columns), LowRank(1, error_dtype=torch.int4)
    (window,) = compressor.bind([compressor.allocate(param, 2)], [param]).windows
    before = batched.CPU_PART
    try:
        batched.CPU_PART = numel
        parts = list(window.parts())
    finally:
        batched.CPU_PART = before
    assert [some.start for some, _ in parts] == [0, *(some.stop for some, _ in parts[:-1])]
    assert parts[-1][0].stop == rows * columns
    for some, part in parts:
        assert some.start % batched.ALIGNED == 0
        assert some.stop - some.start <= max(numel, batched.ALIGNED * columns)
        assert part.numel == some.stop - some.start
        assert part.error.codes.numel() == -(-part.numel // 2)


def test_random_numbers_of_parts_differ(monkeypatch):
    monkeypatch.setattr(batched, "BATCH", -1)
    monkeypatch.setattr(batched, "CPU_PART", 16 * 32)
    p = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer = EFCP([p], 0.1, LowRank(2, error_dtype=torch.int4), MFAC(), window=2)
    p.grad = torch.randn(16, 32).repeat(2, 1)
    optimizer.step()
    first, second = optimizer.state[p]["error_codes"].chunk(2)
    assert (first != second).any()


@given(
    numels=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    absent=st.sets(st.integers(0, 29)),
    size=st.integers(0, 200),
)
@settings(deadline=None)
def test_every_parameter_is_in_one_batch_of_its_kind(numels, absent, size):
    windows = [DenseWindow(torch.zeros(1, n, dtype=(torch.float32, torch.float64)[n % 2])) for n in numels]
    before, batched.BATCH = batched.BATCH, size
    try:
        whole = Batched(windows)._by_rows
    finally:
        batched.BATCH = before
    present = [None if n in absent else n for n in range(len(windows))]
    for plan, expected in ((whole, set(range(len(windows)))), (whole.of(present), set(present) - {None})):
        found = [*chain.from_iterable(plan.batches), *plan.alone]
        assert sorted(found) == sorted(expected)
        assert all(numels[n] > size for n in plan.alone)
        for batch in plan.batches:
            assert len({windows[n].kind for n in batch}) == 1
            assert sum(numels[n] for n in batch) <= size
