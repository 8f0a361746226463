"""`dense_dots`: every backend gives the inner products of the rows, in float64."""

import pytest
import torch
from torch.library import opcheck

from efcp import kernels
from efcp.kernels import operators, use_backend

SHAPES = [(1, 1), (3, 63), (5, 1000), (40, 4097), (2, 70_001), (1, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu":
        pytest.importorskip("numba")
    with use_backend(request.param):
        yield request.param


def rows_of(shape, dtype):
    """Rows that are nearly parallel, and some of them short: sums in float32 would lose what tells them apart."""
    generator = torch.Generator().manual_seed(shape[0])
    common = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    lengths = 10.0 ** torch.randint(-3, 3, (shape[0], 1), generator=generator)
    return ((common + 1e-3 * torch.randn(shape, generator=generator, dtype=torch.float64)) * lengths).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_to_float64(backend, shape, dtype):
    rows = rows_of(shape, dtype)
    for slot in {0, shape[0] - 1}:
        dots = kernels.dense_dots(rows, rows[slot])
        exact, size = rows.double() @ rows[slot].double(), rows.double().abs() @ rows[slot].double().abs()
        assert dots.dtype == torch.float64
        assert ((dots - exact).abs() <= 1e-12 * size).all()  # in any order


@pytest.mark.usefixtures("backend")
def test_numbers_that_float32_cannot_multiply():
    """Products that overflow float32, and denormal numbers."""
    rows = torch.tensor([[1e30, 1e-45, 0.0], [1e30, 1e-45, 3.0]])
    assert torch.equal(kernels.dense_dots(rows, rows[1]), rows.double() @ rows[1].double())


def test_results_do_not_depend_on_the_number_of_threads():
    pytest.importorskip("numba")
    rows, results = rows_of((7, 70_001), torch.float32), []
    try:
        with use_backend("cpu"):
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(kernels.dense_dots(rows, rows[3]))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("rows", "vector", "error", "message"),
    [
        (torch.ones(3, 8)[:, ::2], torch.ones(4), ValueError, "rows must be contiguous"),
        (torch.ones(3), torch.ones(3), ValueError, r"rows must be a matrix, got \(3,\)"),
        (torch.ones(3, 4, dtype=torch.int32), torch.ones(4), TypeError, "rows must be of dtype float16"),
        (torch.ones(3, 4), torch.ones(8)[::2], ValueError, "vector must be contiguous"),
        (torch.ones(3, 4), torch.ones(5), ValueError, "vector must be contiguous, with 4 elements"),
        (torch.ones(3, 4), torch.ones(4, dtype=torch.int64), TypeError, "vector must be of dtype float16"),
    ],
    ids=["gaps", "vector", "integers", "gaps in the vector", "another length", "integer vector"],
)
def test_other_arguments_are_refused(rows, vector, error, message):
    with pytest.raises(error, match=message):
        kernels.dense_dots(rows, vector)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_a_lawful_operator(dtype):
    opcheck(operators.dense_dots, (rows_of((3, 63), dtype), torch.randn(63)))
