"""The definition against slow and independent ones: loops over blocks and sorting, dense algebra in float64."""

import math
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efcp.kernels import (
    Blocks,
    LowBit,
    SparseRows,
    Update,
    accumulation_dtype,
    allocate_lowbit,
    decoded_blocks,
    reference,
)
from efcp.kernels.lowbit import SMALLEST_SCALE, decoded, encoded, hashed, uniform
from tests.kernels.kernel_cases import (
    BETA,
    BFLOAT16,
    BITS4,
    BITS8,
    FINITE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    MOMENTA,
    TOLERANCE,
    Case,
    applied,
    assert_all_same_bits,
    assert_same_bits,
    bits,
    check_average,
    check_compress,
    check_lowbit,
    make,
    momenta_of,
    parts_of,
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
    grad = case.gradient().to(dtype)
    a = grad if before is None else before.to(dtype) + grad
    values, indices, error, start = [], [], a.clone(), 0
    for length in lengths(case):
        part = slice(start, start + length)
        block = a[part]
        if not grad[part].square().sum().isfinite():
            block = torch.zeros_like(block)
        descending = np.argsort(-np.abs(block.numpy()), kind="stable")
        index = torch.from_numpy(np.sort(descending[: count(case, length)]))
        value = block[index].to(case.values)
        error[start + index] -= value.to(dtype)
        if before is not None and not grad[part].square().sum().isfinite():
            error[part] = before[part]
        indices.append(index)
        values.append(value)
        start += length
    if before is None:
        return values, indices, None
    return values, indices, error.to(case.error)


def compressed(case):
    """`compress_` on a poisoned window: (values, indices, error)."""
    grad, error = case.gradient(), case.error_before()
    rows = case.poisoned_window()
    errors, keys = [] if error is None else [error], [KEY] if case.error == BITS4 else []
    finite = reference.compress_([grad], errors, [rows], torch.tensor([case.slot]), keys)
    assert bool(finite) == bool(grad.to(accumulation_dtype(case.grad)).norm().square().isfinite())
    assert_same_bits(grad, case.gradient(), "grad")
    return rows.values, rows.indices, error


@cases
def test_compress(case):
    values, indices, error = compressed(case)
    untouched_values, untouched_indices, _ = case.poisoned_window()
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


def blockwise(case, numbers):
    """An error in few bits as float64, block by block, and the scale of each number."""
    read, scale, codes, scales = [], [], *numbers
    for length in lengths(case):
        here = length if case.error == BITS8 else (length + 1) // 2
        own = LowBit(codes[:here], scales[: -(-length // (64 if case.error == BITS8 else 128))])
        codes, scales = codes[here:], scales[len(own.scales) :]
        target = torch.zeros(length, dtype=FLOAT64)
        reference.add_lowbit_([target], [own])
        read.append(target)
        scale.append(per_number(own, length))
    assert len(codes) == len(scales) == 0
    return torch.cat(read), torch.cat(scale)


FEW_BITS = [
    Case(4097, 256, 0.1, error=BITS8),
    Case(4097, 256, 0.1, error=BITS4, kind="wide"),
    Case(4097, 257, 0.1, error=BITS4, kind="ties"),
    Case(4097, 100, 0.37, error=BITS8, kind="denormal"),
    Case(4097, 4096, 0.01, error=BITS8, kind="zero"),
    Case(1001, 7, 0.3, error=BITS4, grad=BFLOAT16),
    Case(1001, 1, 1.0, error=BITS4),
    Case(63, 4096, 0.1, error=BITS8, grad=FLOAT64),
]
few_bits = pytest.mark.parametrize("case", FEW_BITS, ids=str)


def before_and_after(case, key=(1 << 40) + 11):
    """(a, the new row and the new error, all float64; the scales of the latter), of `compress_` on one parameter."""
    error, rows, grad = case.error_before(), case.poisoned_window(), case.gradient()
    before, _ = blockwise(case, error)
    a = before.to(accumulation_dtype(case.grad)) + grad.to(accumulation_dtype(case.grad))
    keys = [torch.tensor([key])] if case.error == BITS4 else []
    assert reference.compress_([grad], [error], [rows], torch.tensor([case.slot]), keys)
    row = torch.zeros(case.numel, dtype=FLOAT64)
    for block, length in enumerate(lengths(case)):
        k = count(case, length)
        index = rows.indices[block, case.slot, :k].long() + block * case.block_size
        row[index] = rows.values[block, case.slot, :k].double()
        assert (index.diff() > 0).all()
    return a.double(), row, *blockwise(case, error)


@few_bits
def test_row_and_error_in_few_bits_add_up_to_the_sum_within_a_quantum(case):
    """To half a scale in 8 bits, to less than one in 4; and what is zero stays zero."""
    a, row, error, scale = before_and_after(case)
    lost = (error + row - a).abs()
    bound = scale * (0.5 if case.error == BITS8 else 1.0) * (1 + 2.0**-15)
    smallest = SMALLEST_SCALE * (127 if case.error == BITS8 else 7)  # of a group that becomes zero
    assert (lost <= torch.where(scale > 0, bound, smallest)).all()
    assert (error[(a - row) == 0] == 0).all()


@few_bits
def test_an_error_in_few_bits_is_that_of_floats_rounded_block_by_block(case):
    """The same row; and of each block the numbers that `store_lowbit_` gives, whatever the blocks beside it."""
    _, row, error, _ = before_and_after(case)
    exact = replace(case, error=FLOAT64 if case.grad == FLOAT64 else FLOAT32)
    before, _ = blockwise(case, case.error_before())
    floats, rows = before.to(exact.error), exact.poisoned_window()
    reference.compress_([case.gradient()], [floats], [rows], torch.tensor([case.slot]))
    start = 0
    for block, length in enumerate(lengths(case)):
        part, k = slice(start, start + length), count(case, length)
        kept = rows.values[block, case.slot, :k].double()
        assert torch.equal(row[part][rows.indices[block, case.slot, :k].long()], kept)
        if case.error == BITS8:
            assert torch.equal(error[part], read(stored(floats[part], 8), length))
        else:
            key = torch.tensor([(1 << 40) + 11])
            own = encoded(floats[part].float(), BITS4, start, key)
            assert torch.equal(error[part], read(own, length))
        start += length


def test_what_an_error_in_4_bits_loses_is_zero_on_average():
    case = Case(1001, 300, 0.1, error=BITS4)
    a, row, _, scale = before_and_after(case)
    errors = torch.stack([before_and_after(case, key << 20)[2] for key in range(500)])
    y = (a - row) / scale
    up = y - y.floor()
    deviation = errors.mean(0) / scale - y
    normal = deviation / (up * (1 - up) / len(errors)).sqrt().clamp(min=1e-2)
    assert normal.abs().max() < 5
    assert abs(deviation.mean()) < 5 * 0.5 / (len(errors) * case.numel) ** 0.5


def test_errors_in_4_bits_depend_on_the_key_alone():
    case = Case(1001, 300, 0.1, error=BITS4)
    first, again, other = (before_and_after(case, key)[2] for key in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_values_are_rounded_to_the_nearest_bfloat16():
    case = Case(4097, 256, 1.0, error=None)
    values, _, _ = compressed(case)
    word = case.gradient().view(torch.int32).long() & 0xFFFFFFFF
    nearest = (word + 0x7FFF + (word >> 16 & 1)) >> 16  # ties to even
    row = torch.cat([values[block, case.slot, :length] for block, length in enumerate(lengths(case))])
    assert torch.equal(bits(row).long() & 0xFFFF, nearest)


@pytest.mark.parametrize("error", [FLOAT32, BFLOAT16, FLOAT64, BITS8, BITS4])
def test_a_non_finite_step_is_undone(error):
    """The row is zero with the first positions, and the error as before: in its blocks, and nearly so in others."""
    case = Case(4097, 256, 0.1, error=error, finite=False)
    grad, after, rows, slot = case.gradient(), case.error_before(), case.poisoned_window(), torch.tensor([case.slot])
    keys, others = [KEY] if error == BITS4 else [], [KEY + 1] if error == BITS4 else []
    assert not reference.compress_([grad], [after], [rows], slot, keys)
    reference.undo_compress_([grad], [after], [rows], slot, torch.tensor(False), others)
    for block, length in enumerate(lengths(case)):
        k = count(case, length)
        assert (rows.values[block, case.slot, :k] == 0).all()
        assert rows.indices[block, case.slot, :k].tolist() == list(range(k))
        assert rows.values[block, case.slot, k:].isnan().all()  # padding

    def floats(error):
        numbers = decoded_blocks(error, case.blocks) if case.few_bits else [error]
        return torch.cat([number.double().flatten() for number in numbers])

    before, now = floats(case.error_before()), floats(after)
    largest = max(before.abs().max(), grad[grad.isfinite()].abs().double().max())
    rounding = {FLOAT32: 2.0**-23, BFLOAT16: 2.0**-7, FLOAT64: 2.0**-23, BITS8: 2 / 127, BITS4: 3 / 7}[error]
    assert (now - before).abs().max() <= rounding * largest
    skipped = [not part.isfinite().all() for part in grad.split(256)]
    assert sum(skipped) == 2
    for whole, one, other in zip(skipped, before.split(256), now.split(256), strict=True):
        assert torch.equal(one, other) or not whole


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
        rows = [SparseRows(values, indices, blocks)]
        reference.compress_([grad], [error], rows, torch.tensor([0]))
        return values, indices, error.view(number, size)

    permuted = row(a.view(number, size)[order].flatten())
    for actual, expected in zip(permuted, row(a), strict=True):
        assert torch.equal(actual, expected[order])


def dense(case, rows_of_blocks):
    """The window's rows as (m, n) float64, entry by entry."""
    values, indices, _ = rows_of_blocks
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
    window = case.random_window()
    rows = dense(case, window)
    actual = reference.window_dots([window], torch.tensor([case.slot]))
    torch.testing.assert_close(actual, rows @ rows[case.slot], **TOLERANCE[FLOAT64])


SCALES = [(1.0, 1.0, 0.0), (0.75, -0.3, 0.9)]


@windows
@pytest.mark.parametrize(("target_factor", "update_factor", "momentum_factor"), SCALES, ids=["plain", "scaled"])
@pytest.mark.parametrize("with_momentum", [False, True], ids=["no momentum", "momentum"])
def test_apply_adds_a_weighted_sum_of_dense_rows(case, with_momentum, target_factor, update_factor, momentum_factor):
    window = case.random_window()
    weights = torch.linspace(-1.5, 2.0, case.window, dtype=FLOAT64)
    target = case.target()
    momentum = target.neg() * 2
    update = weights @ dense(case, window)
    if with_momentum:
        update += momentum_factor * momentum.double()
    expected = target_factor * target.double() + update_factor * update
    factors = [target_factor, update_factor, momentum_factor][: 3 if with_momentum else 2]
    applied_as = Update(weights, *torch.tensor(factors, dtype=FLOAT64))
    applied_as = applied_as._replace(writes_momenta=with_momentum)
    reference.window_apply_([target], [momentum] if with_momentum else [], [window], applied_as)
    torch.testing.assert_close(target, expected.to(case.grad), **TOLERANCE[case.grad])
    if with_momentum:
        torch.testing.assert_close(momentum, update.to(case.grad), **TOLERANCE[case.grad])


@windows
def test_square_weights_divide_by_the_root_of_a_weighted_sum_of_squares(case):
    window = case.random_window()
    weights, square_weights = torch.linspace(-1.5, 2.0, case.window), torch.linspace(0.5, 0.1, case.window).double()
    target, rows = case.target(), dense(case, window)
    update = weights.double() @ rows / ((square_weights @ rows**2).sqrt() + 1e-3)
    expected = 0.75 * target.double() - 0.3 * update
    target_factor, update_factor, eps = torch.tensor([0.75, -0.3, 1e-3], dtype=FLOAT64)
    applied_as = Update(weights, target_factor, update_factor, square_weights=square_weights, eps=eps)
    reference.window_apply_([target], [], [window], applied_as)
    torch.testing.assert_close(target, expected.to(case.grad), **TOLERANCE[case.grad])
    untouched = (rows == 0).all(0)
    assert torch.equal(target[untouched], (0.75 * case.target()[untouched]).to(case.grad))


def test_a_momentum_is_rounded_but_the_update_taken_from_it_is_not():
    """1 + 2⁻⁹ is no bfloat16; what it adds to −1 is."""
    blocks = Blocks(1, 1, 1.0)
    rows = SparseRows(torch.tensor([[[2.0**-9]]], dtype=BFLOAT16), torch.zeros(1, 1, 1, dtype=torch.uint8), blocks)
    target, momentum = torch.tensor([-1.0], dtype=BFLOAT16), torch.tensor([1.0], dtype=BFLOAT16)
    one = torch.tensor(1.0)
    update = Update(torch.ones(1), one, one, one, writes_momenta=True)
    reference.window_apply_([target], [momentum], [rows], update)
    assert target.item() == 2.0**-9
    assert momentum.item() == 1.0


def test_a_parameter_without_gradient_gets_a_row_of_zeros_and_no_other_change():
    case = Case(4097, 256, 0.1)
    rows, error = case.random_window(), case.error_before()
    before = [tensor.clone() for tensor in rows[:2]]
    assert reference.compress_([None], [error], [rows], torch.tensor([case.slot]))
    for part in case.blocks.parts(1 << 18):
        before[0][part.blocks, case.slot, : part.kept] = 0.0
        rows.values[part.blocks, case.slot, part.kept :] = float("nan")  # padding: nobody minds
    assert_same_bits(rows.values, before[0], "values")
    assert_same_bits(rows.indices, before[1], "indices")
    assert_same_bits(error, case.error_before(), "error")


GROUPS = [
    Case(63, 7, 0.37),
    Case(4097, 256, 0.1, kind="ties", error=BFLOAT16),
    Case(4097, 4096, 0.01, finite=False, grad=BFLOAT16),
    Case(4097, 1000, 0.3, error=None, values=FLOAT32, grad=FLOAT64),
    Case(4097, 1000, 0.3, error=BITS8),
    Case(4097, 257, 0.1, error=BITS4),
]


def one_at_a_time(compress_):
    """`compress_` as calls for one parameter each."""

    def each(grads, errors, rows, slot, keys=()):
        finite = torch.tensor(True)
        for i, (grad, row) in enumerate(zip(grads, rows, strict=True)):
            finite &= compress_([grad], errors[i : i + 1], [row], slot, keys[i : i + 1])
        return finite

    return each


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_a_group_is_compressed_as_its_parameters_are(case):
    check_compress(one_at_a_time(reference.compress_), case)


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_products_of_a_group_are_sums_over_its_parameters(case):
    rows, slot = [member.random_window() for member in case.group], torch.tensor([case.slot])
    single = [reference.window_dots([row], slot) for row in rows]
    torch.testing.assert_close(reference.window_dots(rows, slot), sum(single), **TOLERANCE[FLOAT64])


@pytest.mark.parametrize("kind", MOMENTA)
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_a_window_is_applied_to_a_group_as_to_its_parameters(case, kind):
    def each(targets, momenta, rows, update):
        for i, (target, row) in enumerate(zip(targets, rows, strict=True)):
            reference.window_apply_([target], momenta[i : i + 1], [row], update)

    weights = torch.linspace(-1.5, 2.0, case.window, dtype=FLOAT64)
    expected = applied(each, case, kind, weights, writes=kind == "float")
    actual = applied(reference.window_apply_, case, kind, weights, writes=kind == "float")
    for what, ours, theirs in zip(("target", "momentum"), actual, expected, strict=True):
        assert_all_same_bits(ours, theirs, what)


@pytest.mark.parametrize(("name", "dtype", "gradients", "finite"), FINITE, ids=[row[0] for row in FINITE])
def test_norm_is_finite(name, dtype, gradients, finite):
    assert bool(reference.norm_is_finite([torch.tensor(grad, dtype=dtype) for grad in gradients])) is finite


def test_work_in_parts_gives_the_same_bits(monkeypatch):
    case, tolerant = Case(100003, 4096, 0.01, window=5, slot=2), []

    def run():
        values, indices, error = compressed(case)
        few = [before_and_after(Case(10003, 301, 0.1, error=few_bits))[2] for few_bits in (BITS8, BITS4)]
        targets, momenta = applied(reference.window_apply_, case, "float", torch.linspace(0, 1, 5), writes=True)
        small = momenta_of(case, "8 bits")
        reference.average_(small, [member.gradient() for member in case.group], BETA, torch.tensor(True))
        numbers = [stored(target, 4) for target in targets]
        reference.add_lowbit_(targets, numbers)
        dots = [*reference.window_dots([case.random_window()], torch.tensor([2]), small[1:2])]
        tolerant.append(dots)
        return values, indices, error, *few, *targets, *momenta, *parts_of([*small, *numbers])

    whole = run()
    monkeypatch.setattr(reference, "PART", 1)
    assert_all_same_bits(run(), whole, "results")
    torch.testing.assert_close(*tolerant, **TOLERANCE[FLOAT64])  # sums of float64


KEY = torch.tensor([(5 << 32) + 7])
FINITE_STEP = torch.tensor(True)
KINDS = ["random", "ties", "equal", "zero", "signed zero", "denormal", "wide"]
LARGEST_CODE = {8: 127, 4: 7}


def stored(values: torch.Tensor, number_bits: int, key: torch.Tensor = KEY) -> LowBit:
    """Values in 8 or 4 bits."""
    numbers = allocate_lowbit(values.numel(), number_bits, values.device)
    reference.store_lowbit_([numbers], [values], FINITE_STEP, [key] if number_bits == 4 else [])
    return numbers


def read(numbers: LowBit, numel: int) -> torch.Tensor:
    """As float64, by `add_lowbit_`."""
    target = torch.zeros(numel, dtype=FLOAT64)
    reference.add_lowbit_([target], [numbers])
    return target


def per_number(numbers: LowBit, numel: int) -> torch.Tensor:
    """The scale of each number."""
    block = 64 if numbers.codes.dtype == torch.int8 else 128
    return numbers.scales.double().repeat_interleave(block)[:numel]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 127, 129, 4097])
@pytest.mark.parametrize("number_bits", [8, 4])
def test_numbers_are_rounded_to_a_neighbour(number_bits, numel, kind):
    """To the nearest of both in 8 bits: at most half a scale away; in 4 bits less than a scale."""
    values = make(kind, numel, FLOAT32, seed=numel)
    numbers = stored(values, number_bits)
    scale, block = per_number(numbers, numel), 512 // number_bits
    maxima = [part.abs().max() for part in values.split(block)] if numel else []
    for maximum, own in zip(maxima, numbers.scales, strict=True):
        expected = maximum / LARGEST_CODE[number_bits]
        assert own == (expected if expected >= SMALLEST_SCALE else 0.0)
    lost = (read(numbers, numel) - values.double()).abs()
    kept = scale > 0
    bound = scale * (0.5 if number_bits == 8 else 1.0) * (1 + 2.0**-15)  # as y = x / scale is rounded, too
    assert (lost <= bound)[kept].all()
    assert (read(numbers, numel)[~kept] == 0).all()
    assert (read(numbers, numel)[values == 0] == 0).all()


def test_the_layout_of_4_bits():
    """Two numbers a byte, the lower half first; each code with 8 added, also where the last byte has one number."""
    values = torch.arange(-7.0, 8.0)  # scale 1: whole numbers are stored as they are
    numbers = stored(values, 4)
    assert numbers.scales.tolist() == [1.0]
    codes = [*range(1, 16), 8]
    assert numbers.codes.tolist() == [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert torch.equal(read(numbers, 15), values.double())


def test_ties_in_8_bits_go_to_even():
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])
    assert stored(values, 8).codes.tolist() == [127, 0, 2, 2, 0, -2, -126]


def test_what_4_bits_lose_is_zero_on_average():
    """Of many keys; and they do not agree on what to round up."""
    values = make("random", 1001, FLOAT32, seed=0)
    reads = torch.stack([read(stored(values, 4, torch.tensor([key << 20])), 1001) for key in range(2000)])
    scale = per_number(stored(values, 4), 1001)
    up = values.double() / scale - (values.double() / scale).floor()
    deviation = (reads.mean(0) - values.double()) / scale
    normal = deviation / (up * (1 - up) / len(reads)).sqrt().clamp(min=1e-3)
    assert normal.abs().max() < 5
    assert abs(normal.square().mean() - 1) < 0.3
    assert abs(deviation.mean()) < 5 * 0.5 / (len(reads) * 1001) ** 0.5


def test_random_numbers_are_uniform_and_differ_with_key_and_position():
    first = uniform(KEY, 0, 1 << 16).double()
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 5 * (1 / 12 / len(first)) ** 0.5
    assert torch.histc(first, 16, 0, 1).sub(4096).abs().max() < 5 * 64
    assert torch.equal(uniform(KEY, 1000, 24).double(), first[1000:1024])
    for other in (uniform(KEY + 1, 0, 1 << 16), uniform(KEY + (1 << 32), 0, 1 << 16), uniform(KEY, 1, 1 << 16)):
        assert abs(torch.corrcoef(torch.stack([first, other.double()]))[0, 1]) < 5 / 256


def test_the_hash_is_lowbias32():
    """Known values, by another implementation in whole numbers."""

    def lowbias32(x):
        x = ((x ^ x >> 16) * 0x7FEB352D) % 2**32
        x = ((x ^ x >> 15) * 0x846CA68B) % 2**32
        return x ^ x >> 16

    numbers = [0, 1, 2, 12345, 2**31, 2**32 - 1]
    assert hashed(torch.tensor(numbers)).tolist() == [lowbias32(x) for x in numbers]
    key, position = (5 << 32) + 7, 300
    expected = (lowbias32(position ^ lowbias32(7 ^ lowbias32(5))) >> 8) / 2**24
    assert uniform(torch.tensor([key]), position, 1).item() == expected


@pytest.mark.parametrize("number_bits", [8, 4])
@pytest.mark.parametrize("numel", [1, 65, 4097])
def test_a_non_finite_step_leaves_all_bits(number_bits, numel):
    values = make("random", numel, FLOAT32, seed=1)
    numbers = stored(values, number_bits)
    before = [tensor.clone() for tensor in numbers]
    no = torch.tensor(False)
    poison = torch.full_like(values, float("nan"))
    reference.store_lowbit_([numbers], [poison], no, [KEY] if number_bits == 4 else [])
    assert_all_same_bits(numbers, before, "numbers")
    if number_bits == 8:
        norm = reference.average_([numbers], [poison], BETA, no)
        assert_all_same_bits(numbers, before, "momentum")
        torch.testing.assert_close(norm, read(numbers, numel).square().sum(), **TOLERANCE[FLOAT64])


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16, FLOAT32, FLOAT64])
@pytest.mark.parametrize("numel", [0, 1, 65, 4097])
def test_average_is_that_of_momentum_and_gradient(numel, dtype):
    momentum, grad = make("random", numel, dtype, seed=1), make("random", numel, FLOAT32, seed=2)
    expected = BETA * momentum.double() + (1 - BETA) * grad.double()
    norm = reference.average_([momentum], [grad], BETA, FINITE_STEP)
    torch.testing.assert_close(momentum, expected.to(dtype), **TOLERANCE[dtype])
    torch.testing.assert_close(norm, momentum.double().square().sum(), **TOLERANCE[FLOAT64])


def test_average_in_8_bits_is_within_half_a_scale():
    old, grad = make("random", 4097, FLOAT32, seed=1), make("random", 4097, FLOAT32, seed=2)
    momentum = stored(old, 8)
    expected = BETA * read(momentum, 4097) + (1 - BETA) * grad.double()
    norm = reference.average_([momentum], [grad], BETA, FINITE_STEP)
    lost = (read(momentum, 4097) - expected).abs()
    assert (lost <= per_number(momentum, 4097) * 0.5001).all()
    torch.testing.assert_close(norm, read(momentum, 4097).square().sum(), **TOLERANCE[FLOAT64])


@pytest.mark.parametrize("kind", MOMENTA[1:])
def test_dots_with_momenta_are_inner_products(kind):
    case = Case(4097, 257, 0.37, window=7, slot=6, grad=FLOAT64)
    window, momentum = case.random_window(), momenta_of(case, kind)[1]
    rows = dense(case, window)
    whole = momentum if kind == "float" else decoded(momentum, slice(0, 4097)).double()
    actual = reference.window_dots([window], torch.tensor([case.slot]), [momentum])
    torch.testing.assert_close(actual, torch.stack([rows @ rows[case.slot], rows @ whole]), **TOLERANCE[FLOAT64])


def test_a_momentum_that_is_not_written_counts_all_the_same():
    case = Case(4097, 257, 0.37)
    for kind in MOMENTA[1:]:
        weights = torch.zeros(case.window)
        targets, _ = applied(reference.window_apply_, case, kind, weights)  # which checks that it stays
        for target, member, momentum in zip(targets, case.group, momenta_of(case, kind), strict=True):
            dense = momentum if kind == "float" else read(momentum, member.numel).float()
            torch.testing.assert_close(target, 0.75 * member.target() - 0.3 * 0.9 * dense, **TOLERANCE[FLOAT32])


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_numbers_and_averages_of_a_group_are_those_of_its_parameters(case):
    def average_each(momenta, grads, beta, finite):
        return sum(
            reference.average_([momentum], [grad], beta, finite) for momentum, grad in zip(momenta, grads, strict=True)
        )

    def store_each(numbers, values, finite, keys):
        for i, pair in enumerate(zip(numbers, values, strict=True)):
            reference.store_lowbit_([pair[0]], [pair[1]], finite, keys[i : i + 1])

    def add_each(targets, numbers):
        for target, number in zip(targets, numbers, strict=True):
            reference.add_lowbit_([target], [number])

    check_average(average_each, case)
    check_lowbit((store_each, add_each), case)
