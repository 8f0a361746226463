"""The definition against slow and independent ones: loops over blocks and sorting, dense algebra in float64."""

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp.kernels import Blocks, accumulation_dtype, reference
from tests.kernels.kernel_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    TOLERANCE,
    Case,
    assert_same_bits,
    bits,
    make,
)

CASES = [
    Case(0, 4096, 0.01),
    Case(1, 4096, 0.01),
    Case(1, 1, 0.001, error=None, kind="signed zero"),
    Case(63, 1, 0.37, slot=2),
    Case(63, 7, 0.37, kind="ties", slot=0),
    Case(63, 4096, 0.1, kind="wide", grad=FLOAT64, error=FLOAT32, values=FLOAT32),
    Case(4096, 4096, 0.001),
    Case(4096, 256, 0.01, kind="equal", grad=BFLOAT16, error=BFLOAT16),
    Case(4097, 4096, 0.01, kind="ties", values=FLOAT32),
    Case(4097, 4096, 0.1, kind="zero"),
    Case(4097, 4096, 0.1, kind="signed zero", values=FLOAT32),
    Case(4097, 4096, 0.37, kind="denormal", values=FLOAT32),
    Case(4097, 256, 1.0, kind="wide", error=BFLOAT16),
    Case(4097, 257, 0.37, grad=FLOAT16, error=FLOAT32),
    Case(4097, 32768, 0.01, error=None),
    Case(100003, 4096, 0.01, grad=BFLOAT16, error=FLOAT64, window=5, slot=4),
    Case(100003, 257, 0.1, kind="ties", grad=FLOAT64, error=FLOAT64),
    Case(100003, 32768, 1.0, kind="wide", slot=0),
    Case(100003, 32768, 0.37, kind="equal", error=None, values=FLOAT32),
    Case(100003, 4096, 0.01, finite=False),
    Case(63, 7, 0.37, finite=False, grad=BFLOAT16, error=BFLOAT16),
    Case(63, 7, 0.37, finite=False, error=None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def lengths(case):
    """Of the blocks, first to last."""
    return [min(case.block_size, case.numel - start) for start in range(0, case.numel, case.block_size)]


def count(case, length):
    return math.ceil(Decimal(str(case.density)) * length)


def oracle(case):
    """What `compress_` ought to write: (values, indices) of the new row, block by block, and the error."""
    dtype = accumulation_dtype(case.grad)
    before = case.error_before()
    a = case.gradient().to(dtype)
    if before is not None:
        a = before.to(dtype) + a
    if not case.finite:
        a = torch.zeros_like(a)
    values, indices, error, start = [], [], a.clone(), 0
    for length in lengths(case):
        block = a[start : start + length]
        descending = np.argsort(-np.abs(block.numpy()), kind="stable")
        index = torch.from_numpy(np.sort(descending[: count(case, length)]))
        value = block[index].to(case.values)
        error[start + index] -= value.to(dtype)
        indices.append(index)
        values.append(value)
        start += length
    if before is None:
        return values, indices, None
    return values, indices, error.to(case.error) if case.finite else before


def compressed(case):
    """`compress_` on a poisoned window: (values, indices, error)."""
    grad, error = case.gradient(), case.error_before()
    values, indices = case.poisoned_window()
    arguments = torch.tensor([case.slot]), torch.tensor(case.finite), case.blocks
    reference.compress_(grad, error, values, indices, *arguments)
    assert_same_bits(grad, case.gradient(), "grad")
    return values, indices, error


@cases
def test_compress(case):
    values, indices, error = compressed(case)
    untouched_values, untouched_indices = case.poisoned_window()
    expected_values, expected_indices, expected_error = oracle(case)
    for block, (value, index) in enumerate(zip(expected_values, expected_indices, strict=True)):
        untouched_values[block, case.slot, : len(value)] = value
        untouched_indices[block, case.slot, : len(index)] = index.to(indices.dtype)
    assert_same_bits(indices, untouched_indices, "indices")
    assert_same_bits(values, untouched_values, "values")
    if error is not None:
        assert_same_bits(error, expected_error, "error")


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "zero", "signed zero", "denormal", "wide"])
def test_rows_have_exactly_k_ascending_indices_and_ties_go_to_the_lower(kind):
    case = Case(4097, 256, 0.1, kind=kind, error=None, values=FLOAT32)
    values, indices, _ = compressed(case)
    for block, (length, a) in enumerate(zip(lengths(case), case.gradient().split(256), strict=True)):
        k = count(case, length)
        index = indices[block, case.slot, :k].long()
        assert (index.diff() > 0).all()
        assert index[-1] < length
        assert torch.equal(values[block, case.slot, :k], a[index])
        left_out = torch.ones(length, dtype=torch.bool)
        left_out[index] = False
        smallest = a[index].abs().min()
        assert (a[left_out].abs() <= smallest).all()
        tied = (a.abs() == smallest).nonzero().squeeze(1)
        assert left_out[tied].long().diff().ge(0).all()  # of tied elements, first those kept, then those left out


@pytest.mark.parametrize("values", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", ["random", "ties", "wide", "denormal"])
@pytest.mark.parametrize("numel", [1, 63, 4097])
def test_what_the_window_does_not_hold_stays_in_the_error(numel, kind, values):
    """e + c = a, without rounding: also what bfloat16 cuts off a value fits into the float32 error."""
    case = Case(numel, 256, 0.1, kind=kind, values=values)
    a = case.error_before() + case.gradient()
    window, indices, error = compressed(case)
    row = torch.cat(
        [
            torch.zeros(length, dtype=FLOAT64).scatter_(
                0, indices[block, case.slot, :k].long(), window[block, case.slot, :k].double()
            )
            for block, length in enumerate(lengths(case))
            for k in [count(case, length)]
        ]
    )
    assert torch.equal(error.double() + row, a.double())
    if values == FLOAT32:
        assert (error[row != 0] == 0).all()


def test_values_are_rounded_to_the_nearest_bfloat16():
    case = Case(4097, 256, 1.0, error=None)
    values, _, _ = compressed(case)
    word = case.gradient().view(torch.int32).long() & 0xFFFFFFFF
    nearest = (word + 0x7FFF + (word >> 16 & 1)) >> 16  # ties to even
    row = torch.cat([values[block, case.slot, :length] for block, length in enumerate(lengths(case))])
    assert torch.equal(bits(row).long() & 0xFFFF, nearest)


@pytest.mark.parametrize("error", [FLOAT32, BFLOAT16, FLOAT64])
def test_a_non_finite_step_writes_zeros_and_leaves_the_error(error):
    case = Case(4097, 256, 0.1, error=error, finite=False)
    values, _, after = compressed(case)
    assert_same_bits(after, case.error_before(), "error")
    assert (values[:-1, case.slot] == 0).all()
    assert values[-1, case.slot, 0] == 0
    assert values[-1, case.slot, 1:].isnan().all()  # padding: one element is kept of a tail of one


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 6), st.sampled_from([1, 7, 16]), st.sampled_from([0.01, 0.37, 1.0]))
def test_permuted_blocks_give_a_permuted_row(data, number, size, density):
    blocks = Blocks(number * size, size, density)
    elements = st.integers(-3, 3).map(float) | st.floats(-(2.0**100), 2.0**100, width=32)
    a = torch.tensor(data.draw(st.lists(elements, min_size=blocks.numel, max_size=blocks.numel)))
    order = torch.tensor(data.draw(st.permutations(range(number))))

    def row(grad):
        error = torch.zeros_like(grad)
        values = torch.empty(number, 1, blocks.kept)
        indices = torch.empty(number, 1, blocks.kept, dtype=blocks.index_dtype)
        reference.compress_(grad, error, values, indices, torch.tensor([0]), torch.tensor(True), blocks)
        return values, indices, error.view(number, size)

    permuted = row(a.view(number, size)[order].flatten())
    for actual, expected in zip(permuted, row(a), strict=True):
        assert torch.equal(actual, expected[order])


def dense(case, values, indices):
    """The window's rows as (m, n) float64, entry by entry."""
    rows = np.zeros((case.window, case.numel))
    for block, length in enumerate(lengths(case)):
        k = count(case, length)
        start = block * case.block_size
        for row in range(case.window):
            rows[row, start + indices[block, row, :k].numpy().astype(int)] = values[block, row, :k].double().numpy()
    return torch.from_numpy(rows)


WINDOWS = [
    Case(0, 4096, 0.01),
    Case(1, 4096, 0.01, window=1, slot=0),
    Case(63, 7, 0.37, values=FLOAT32),
    Case(63, 1, 1.0, grad=BFLOAT16),
    Case(4096, 256, 1.0, grad=FLOAT16),
    Case(4097, 257, 0.37, window=7, slot=6, grad=FLOAT64),
    Case(100003, 4096, 0.01, window=5, slot=0),
    Case(100003, 32768, 0.1, window=2, values=FLOAT16),
    Case(100003, 32768, 1.0, window=2, values=FLOAT32, grad=BFLOAT16),
]
windows = pytest.mark.parametrize("case", WINDOWS, ids=str)


@windows
def test_dots_are_inner_products_of_dense_rows(case):
    values, indices = case.random_window()
    rows = dense(case, values, indices)
    actual = reference.window_dots(values, indices, torch.tensor([case.slot]), case.blocks)
    torch.testing.assert_close(actual, rows @ rows[case.slot], **TOLERANCE[FLOAT64])


@windows
@pytest.mark.parametrize("scale", [1.0, 0.75])
def test_apply_is_a_weighted_sum_of_dense_rows(case, scale):
    values, indices = case.random_window()
    weights = torch.linspace(-1.5, 2.0, case.window, dtype=FLOAT64)
    target = make("random", case.numel, case.grad, seed=4)
    expected = scale * target.double() + weights @ dense(case, values, indices)
    reference.window_apply_(target, values, indices, weights, torch.tensor(scale), case.blocks)
    torch.testing.assert_close(target, expected.to(case.grad), **TOLERANCE[case.grad])


def test_work_in_parts_gives_the_same_bits(monkeypatch):
    case = Case(100003, 4096, 0.01, window=5, slot=2)

    def run():
        values, indices, error = compressed(case)
        window = case.random_window()
        target = case.gradient()
        reference.window_apply_(target, *window, torch.linspace(0, 1, 5), torch.tensor(0.5), case.blocks)
        return values, indices, error, target

    whole = run()
    monkeypatch.setattr(reference, "PART", 1)
    for what, actual, expected in zip(("values", "indices", "error", "target"), run(), whole, strict=True):
        assert_same_bits(actual, expected, what)
