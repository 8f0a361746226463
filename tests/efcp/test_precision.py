"""Rounding does not lead steps astray: gradients that depend on each other, in every dtype."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp import DenseGGT, DenseMFAC, LowRankGGT, LowRankMFAC, SparseGGT, SparseMFAC
from efcp.windows.dense import DenseWindow

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GGT = {
    "dense": lambda params, **options: DenseGGT(params, **options),
    "sparse": lambda params, **options: SparseGGT(params, density=0.2, block_size=64, **options),
    "low-rank": lambda params, **options: LowRankGGT(params, rank=2, **options),
}


def gradients(kind, shape, generator):
    """Endless gradients, float64, any two of which are nearly or wholly parallel, or of very different lengths."""
    base, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    step = 0
    while True:
        step += 1
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = torch.randn((), generator=generator, dtype=torch.float64)
        yield {
            "same": lambda: base,
            "parallel": lambda: scale * base,  # noqa: B023
            "nearly parallel": lambda: base + 1e-5 * noise,  # noqa: B023
            "two directions": lambda: base + scale * other,  # noqa: B023
            "growing": lambda: base * step**2 / 50,  # noqa: B023
            "of any length": lambda: noise * 10.0 ** (4 * scale.tanh()),  # noqa: B023
        }[kind]()


# ---- GGT


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    method=st.sampled_from(list(GGT)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["same", "parallel", "nearly parallel", "two directions", "growing", "of any length"]),
    window=st.integers(1, 24),
    eps=st.sampled_from([1e-12, 1e-8, 1e-5, 1e-2]),
    beta2=st.sampled_from([1.0, 0.9]),
    refresh_every=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_updates_of_ggt_are_no_longer_than_one_and_as_long_as_reported(
    method, dtype, kind, window, eps, beta2, refresh_every, seed
):
    shapes, generator = ((12, 40), (33,)), torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    options = {"window": window, "eps": eps, "beta2": beta2, "refresh_every": refresh_every}
    optimizer = GGT[method](params, lr=1.0, **options)
    streams = [gradients(kind, shape, generator) for shape in shapes]
    tolerance = 1e-3 + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)  # where -u itself is rounded
    for _ in range(2 * window + 3):
        for p, stream in zip(params, streams, strict=True):
            p.data.zero_()
            p.grad = next(stream).to(dtype)
        optimizer.step()
        length = torch.cat([p.detach().flatten().double() for p in params]).norm().item()
        assert length <= 1 + tolerance
        assert optimizer.diagnostics()["update_norm"] == pytest.approx(length, rel=tolerance)


@pytest.mark.parametrize("refresh_every", [1, 3])
@pytest.mark.parametrize("method", GGT)
def test_ggt_goes_downhill_along_parallel_gradients(method, refresh_every):
    """Of all parameters that meet one input, gradients differ in the factor of that input only."""
    for seed in range(5):
        torch.manual_seed(seed)
        w, b, x = torch.nn.Parameter(torch.randn(10, 5)), torch.nn.Parameter(torch.randn(10)), torch.randn(5)
        optimizer = GGT[method]([w, b], lr=1e-2, window=50, refresh_every=refresh_every)
        losses = []
        for _ in range(150):
            optimizer.zero_grad()
            loss = (w.mv(x) + b).pow(2).sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        assert max(losses) <= losses[0]


# ---- M-FAC

MFAC = {
    "dense": DenseMFAC,
    "low-rank": LowRankMFAC,
    "sparse": lambda params, **options: SparseMFAC(params, density=1.0, value_dtype=torch.float32, **options),
}


@pytest.mark.parametrize("length", [1.0, 100.0, 1000.0, 10000.0])
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *(("dense", dtype) for dtype in (torch.float64, torch.float32)),
        *(("low-rank", dtype) for dtype in (torch.float64, torch.float32)),
        ("sparse", torch.float32),  # whose rows float32 holds exactly
    ],
    ids=str,
)
def test_steps_along_a_constant_gradient_are_as_long_as_in_exact_arithmetic(method, length, dtype):
    """At the default damping: u = g / (λ + ‖g‖² t/m) with t of m rows. In float32, terms as long as g/λ cancel."""
    window, damping = 16, 1e-4
    grad = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = (grad * (length / grad.norm())).to(dtype)
    p = torch.nn.Parameter(torch.zeros(300, dtype=dtype))
    optimizer = MFAC[method]([p], lr=1.0, window=window)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 3 * window):
            p.data.zero_()
            p.grad = grad
            optimizer.step()
            expected = grad / (damping + length**2 * min(step, window) / window)
            assert (p + expected).norm() < 0.1 * expected.norm()
    imprecise = dtype == torch.float32 and length >= 100
    assert bool(optimizer.shared["imprecise_steps"]) == imprecise
    assert [str(w.message)[:20] for w in caught] == ["damping is too small"] * imprecise


def test_ordinary_gradients_are_not_taken_for_imprecise_ones():
    p = torch.nn.Parameter(torch.zeros(300))
    optimizer = DenseMFAC([p], lr=1.0, window=16)
    for _ in range(40):
        p.grad = 30 * torch.randn(300)  # squared norms of 3e5, 3e9 times the damping
        optimizer.step()
    assert optimizer.shared["imprecise_steps"] == 0


# ---- inner products


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(DTYPES),
    window=st.integers(1, 70),
    numel=st.sampled_from([1, 63, 1000, 4097, 20000]),
    seed=st.integers(0, 1000),
)
def test_inner_products_of_dense_rows_are_summed_in_float64(dtype, window, numel, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(window, numel, generator=generator).to(dtype)
    slot = int(torch.randint(window, (), generator=generator))
    dots = DenseWindow(rows).dots(torch.tensor([slot]))
    exact, size = rows.double() @ rows[slot].double(), rows.double().abs() @ rows[slot].double().abs()
    assert dots.dtype == torch.float64
    assert ((dots - exact).abs() <= 1e-12 * size).all()  # 20,000 terms, in any order


# ---- skipped steps


def skipping(steps, optimizer, params, value=float("nan")):
    """The warnings of so many steps with a bad gradient in the second parameter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones_like(p)
            params[1].grad[0] = value
            optimizer.step()
    return [str(w.message) for w in caught]


def test_ten_skipped_steps_in_a_row_are_reported_once_with_the_names_of_parameters():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = SparseMFAC([("embedding", params[0]), ("head", params[1]), ("bias", params[2])], window=4)
    assert skipping(9, optimizer, params) == []
    [message] = skipping(15, optimizer, params, float("inf"))
    assert (
        message == "10 steps in a row were skipped: Inf or NaN in the gradients of param_groups[0], parameter 1 (head)"
    )
    assert skipping(1, optimizer, params, 1.0) == []  # a good step
    assert skipping(9, optimizer, params) == []
    assert len(skipping(1, optimizer, params)) == 1
    assert optimizer.skipped_steps == 34


def test_skipped_steps_of_gradients_whose_squares_overflow_are_reported_as_such():
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = SparseMFAC(params, window=4)
    [message] = skipping(10, optimizer, params, 1e30)
    assert message.startswith("10 steps in a row were skipped: squares of gradients overflow")


def test_counters_on_an_accelerator_are_read_only_once_they_have_arrived(monkeypatch):
    """An accelerator is played: a copy to the host arrives when its event says so."""
    from efcp import lookout

    class Event:
        arrived = False

        def __init__(self, device):
            pass

        def record(self):
            pass

        def query(self):
            return Event.arrived

    monkeypatch.setattr(lookout, "is_on_cpu", lambda tensor: False)
    monkeypatch.setattr(lookout, "pinned_like", torch.empty_like)
    monkeypatch.setattr(torch, "Event", Event)
    watch, counter = lookout.Lookout(), torch.tensor(12)
    state = {"skipped_in_a_row": counter}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.look(state, lambda: ["a"])  # starts the copy
        watch.look(state, lambda: ["a"])  # it has not arrived
    Event.arrived = True
    with pytest.warns(UserWarning, match="12 steps in a row were skipped"):
        watch.look(state, lambda: ["a"])
