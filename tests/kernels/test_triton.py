"""The Triton kernels against the definition: compiled for several GPUs and run on the CPU by gpusim, and interpreted.

Every launch in gpusim is checked for accesses out of bounds, unaligned accesses, use of uninitialised shared memory,
and races between programs, and between warps in shared memory.
"""

import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from efcp.kernels import Blocks, LowBit, SparseRows, Update, allocate_lowbit, reference
from efcp.kernels.lowbit import encoded
from efcp.perf.gpu.gpusim import SimulationError, why_unavailable
from tests.kernels.kernel_cases import (
    BETA,
    BFLOAT16,
    BITS4,
    BITS8,
    FINITE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    KINDS_OF_UPDATE,
    MOMENTA,
    Case,
    assert_all_same_bits,
    check_apply,
    check_average,
    check_compress,
    check_compress_without_gradients,
    check_dots,
    check_lowbit,
    check_norm_is_finite,
    check_undo,
    momenta_of,
    parts_of,
    tensors_of,
)

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from efcp.kernels import triton as triton_ops
from efcp.kernels.triton import apply, average, compress, dots, lowbit, portable
from efcp.kernels.triton.launch import launch_at, launch_of
from efcp.perf.gpu.gpusim import simulate

# A case with another block size, dtype or architecture costs compilations, one with another input next to nothing.
# Those of more than `QUICK` elements, among them most of the rarer dtypes, are slow.
QUICK = 5000
CASES = [
    Case(0, 4096, 0.01),
    Case(1, 4096, 0.01, arch=80),
    Case(63, 1, 0.001, window=2, arch=90),
    Case(63, 7, 0.37, kind="ties", slot=0, arch=120),
    Case(63, 4096, 0.1, slot=2, values=FLOAT32, arch=100),
    Case(4096, 4096, 0.01, slot=0, arch=80),
    *(
        Case(4097, 4096, 0.01, kind=kind, window=5, slot=4)
        for kind in ("random", "wide", "ties", "equal", "zero", "signed zero", "denormal")
    ),
    Case(4097, 4096, 0.01, finite=False, window=5, slot=4),
    Case(4097, 256, 1.0, kind="signed zero", values=FLOAT32),
    Case(4097, 257, 0.37, kind="wide", grad=BFLOAT16, error=BFLOAT16, arch=100),
    Case(50003, 4096, 0.01, window=131, slot=130, arch=120),
    Case(50003, 4096, 0.01, grad=BFLOAT16, window=7, slot=3, arch=80),
    Case(50003, 4096, 0.05, error=BFLOAT16, kind="equal", arch=120),
    Case(50003, 4096, 0.1, grad=FLOAT64, error=FLOAT64, values=FLOAT32),
    Case(50003, 256, 0.001, grad=FLOAT16, error=None, values=FLOAT16, arch=80),
    Case(50003, 32768, 0.01, values=FLOAT32, arch=80),
    Case(50003, 32768, 1.0, kind="ties"),  # too much for shared memory
    Case(50003, 32768, 1.0, finite=False),
]
FEW_BITS = [  # of errors
    *(
        Case(4097, 4096, 0.01, kind=kind, window=5, slot=4, error=error)
        for kind in ("wide", "ties", "equal", "signed zero", "denormal")
        for error in (BITS8, BITS4)
    ),
    Case(63, 7, 0.37, kind="ties", error=BITS4, arch=120),
    Case(63, 1, 1.0, error=BITS8, arch=80),
    Case(9000, 300, 0.1, grad=BFLOAT16, error=BITS8),
    Case(9000, 301, 0.1, grad=BFLOAT16, error=BITS4),
    Case(9000, 4096, 0.1, grad=BFLOAT16, error=BITS4, finite=False),
    Case(9000, 1024, 0.05, grad=FLOAT64, error=BITS4, arch=100),
    Case(9000, 1024, 0.05, grad=FLOAT64, error=BITS8, finite=False),
    Case(99999, 32768, 0.01, kind="ties", error=BITS8, arch=80),  # Triton takes minutes to compile these
    Case(99999, 32768, 0.01, error=BITS4),
]


def parametrized(cases):
    marked = [pytest.param(case, marks=[pytest.mark.slow] * (case.numel > QUICK)) for case in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


cases = parametrized(CASES)


def kinds_for(case, kinds):
    """Those of the kinds of momenta or updates that a case is checked with: all for the commonest layout and dtypes.

    Other cases, for which each kind is a compilation, have two each, in turn, and so has a parameter of no elements.
    """
    if case.numel and replace(case, numel=1, window=3, slot=1, kind="random", finite=True) == Case(1, 4096, 0.01):
        return kinds
    place = CASES.index(case)
    return [kinds[place % len(kinds)], kinds[(place + len(kinds) // 2) % len(kinds)]]


PORTABLE = [case for case in CASES if case.kind == "random" and case.finite]


@parametrized([*CASES, *FEW_BITS])
def test_compress_gives_the_bits_of_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_compress(triton_ops.compress_, case, simulator.allow)
        check_undo(triton_ops.undo_compress_, case, simulator.allow)


@pytest.mark.parametrize("error", [FLOAT32, BITS8, BITS4], ids=["floats", "8 bits", "4 bits"])
def test_compress_without_gradients(error):
    with simulate(90) as simulator:
        check_compress_without_gradients(triton_ops.compress_, Case(9000, 4096, 0.01, error=error), simulator.allow)


@cases
def test_average_gives_the_bits_of_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_average(triton_ops.average_, case, simulator.allow)


LOWBIT = triton_ops.store_lowbit_, triton_ops.add_lowbit_


@cases
def test_numbers_in_8_and_4_bits_are_those_of_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_lowbit(LOWBIT, case, simulator.allow)


@cases
def test_dots_agree_with_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_dots(triton_ops.window_dots, case, simulator.allow, kinds_for(case, MOMENTA))


@cases
def test_apply_agrees_with_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_apply(triton_ops.window_apply_, case, simulator.allow, kinds_for(case, KINDS_OF_UPDATE))


@cases
def test_finite_agrees_with_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_norm_is_finite(triton_ops.norm_is_finite, case, simulator.allow)


@pytest.mark.parametrize(("dtype", "grads", "expected"), [f[1:] for f in FINITE], ids=[f[0] for f in FINITE])
def test_what_is_finite(dtype, grads, expected):
    grads = [torch.tensor(grad, dtype=dtype) for grad in grads]
    with simulate(90) as simulator:
        for grad in grads:
            simulator.allow(grad)
        assert triton_ops.norm_is_finite(grads).item() == expected


@parametrized(PORTABLE)
def test_portable_kernels_agree_with_the_definition(case):
    with simulate(case.arch, check_races=True) as simulator:
        check_dots(portable.window_dots, case, simulator.allow, kinds_for(case, MOMENTA))
        check_apply(portable.window_apply_, case, simulator.allow, kinds_for(case, KINDS_OF_UPDATE))


def test_supports_that_hardly_meet():
    """Values that are not read do not count, whatever they are."""
    blocks = Blocks(8192, 4096, 0.01)
    indices = (torch.arange(blocks.kept) + 45 * torch.arange(64)[:, None]).expand(2, 64, -1).short().contiguous()
    values = torch.full(indices.shape, float("nan"), dtype=BFLOAT16)
    values[:, [6, 8, 62]] = 1.0  # these share groups of 16 bytes with what does meet
    values[:, 7] = 1.5
    values[:, 63] = 2.0
    indices[:, 63] = indices[:, 7]
    rows = [SparseRows(values, indices, blocks)]
    with simulate(90) as simulator:
        for tensor in (values, indices):
            simulator.allow(tensor)
        dots = triton_ops.window_dots(rows, torch.tensor([7]))
    assert dots[7].item() == 2 * blocks.kept * 1.5**2
    assert dots[63].item() == 2 * blocks.kept * 3.0
    assert dots.count_nonzero() == 2


@contextmanager
def simulated(*tensors, **options):
    with simulate(90, **options) as simulator:
        for tensor in tensors:
            simulator.allow(tensor)
        yield simulator


@pytest.mark.parametrize("operations", [triton_ops, portable], ids=["default", "portable"])
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_warps_and_programs_does_not_matter(operations, seed):
    case = Case(30003, 4096, 0.05, window=5, slot=0)
    update = Update(torch.linspace(-1.5, 2.0, 5), *(torch.tensor(x) for x in (0.75, -0.3, 0.9)), writes_momenta=True)

    def run(schedule):
        rows, target, momentum, error, grad = (
            case.random_window(), case.target(), case.target(), case.error_before(), case.gradient(),
        )  # fmt: skip
        with simulated(*tensors_of([rows]), target, momentum, error, grad, schedule=schedule):
            products = operations.window_dots([rows], torch.tensor([2]), [momentum])
            operations.window_apply_([target], [momentum], [rows], update)
            triton_ops.compress_([grad], [error], [rows], torch.tensor([case.slot]))
        return products, target, momentum, error, rows.values, rows.indices

    assert_all_same_bits(run(seed), run(None), "output")


@pytest.mark.slow  # Triton takes minutes to compile blocks of 32768
@pytest.mark.parametrize("error", [BITS8, BITS4], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("seed", range(3))
def test_errors_in_few_bits_do_not_depend_on_the_order_of_warps(error, seed):
    """Also where a block is so long that its last elements are read again in every pass."""
    with simulate(90, schedule=seed, check_races=True) as simulator:
        check_compress(triton_ops.compress_, Case(99999, 32768, 0.01, error=error), simulator.allow)


def collide(density):
    """(targets, momenta, rows, ...) with rows whose entries at the same place are far apart, in other threads."""
    blocks = Blocks(4096, 4096, density)
    window = 6
    indices = torch.stack([torch.arange(blocks.kept) + 37 * row for row in range(window)])[None].short()
    values = torch.randint(1, 9, indices.shape, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    one = torch.ones(())
    return [torch.zeros(4096)], [], [SparseRows(values, indices, blocks)], Update(torch.ones(window), one, one)


def simulate_collision(operation, density, **options):
    arguments = collide(density)
    with simulated(arguments[0][0], *tensors_of(arguments[2]), **options) as simulator:
        operation(*arguments)
    return arguments[0][0], simulator


@pytest.mark.parametrize("operation", [triton_ops.window_apply_, portable.window_apply_], ids=["gluon", "portable"])
@pytest.mark.parametrize("density", [0.01, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_rows_are_added_one_after_the_other(operation, density, seed):
    actual, _ = simulate_collision(operation, density, schedule=seed, check_races=True)
    expected = collide(density)
    reference.window_apply_(*expected)
    assert torch.equal(actual, expected[0][0])  # small integers: no rounding


def test_a_missing_barrier_between_steps_of_a_row_would_be_noticed():
    """In shared memory, by the check for races."""
    _, simulator = simulate_collision(triton_ops.window_apply_, 0.1, check_races=True)
    noticed = 0
    for barrier in range(simulator.launches[-1].barrier_sites):
        try:
            simulate_collision(triton_ops.window_apply_, 0.1, schedule=0, check_races=True, drop_barriers=[barrier])
        except SimulationError:
            noticed += 1
    assert noticed >= 2


def test_a_missing_barrier_between_rows_would_be_noticed():
    """In global memory, where the portable kernel adds them, by a wrong sum."""
    expected, simulator = simulate_collision(portable.window_apply_, 0.1)
    wrong = []
    for barrier in range(simulator.launches[-1].barrier_sites):
        try:
            actual, _ = simulate_collision(portable.window_apply_, 0.1, schedule=0, drop_barriers=[barrier])
        except SimulationError:  # a barrier that Triton put between accesses to shared memory
            continue
        if not torch.equal(actual, expected):
            wrong.append(barrier)
    assert wrong


@pytest.mark.parametrize("shift", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_tensors_that_begin_anywhere(shift):
    """A view of a flat buffer need not be aligned to what an access of 128 bits takes."""
    case = Case(9000, 4096, 0.01, window=4)

    def shifted(tensor):
        buffer = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype)
        return buffer[shift:].copy_(tensor.flatten()).view(tensor.shape)

    def moved(operation):
        def run(*arguments):
            def move(x):
                if isinstance(x, SparseRows):
                    return SparseRows(shifted(x.values), shifted(x.indices), x.blocks)
                return LowBit(*map(shifted, x)) if isinstance(x, LowBit) else shifted(x)

            there = [[move(x) if x is not None else None for x in a] if isinstance(a, list) else a for a in arguments]
            with simulate(90) as simulator:
                for tensor in flat(there):
                    simulator.allow(tensor)
                result = operation(*there)
            for here, copy in zip(flat(arguments), flat(there), strict=True):
                here.copy_(copy)
            return result

        return run

    def flat(arguments):
        found = []
        for x in (x for a in arguments if isinstance(a, list) for x in a if x is not None):
            found += [x.values, x.indices] if isinstance(x, SparseRows) else parts_of([x])
        return found

    for error in (FLOAT32, BITS8, BITS4):
        check_compress(moved(triton_ops.compress_), replace(case, error=error))
    check_average(moved(triton_ops.average_), case)
    check_lowbit([moved(operation) for operation in LOWBIT], case)
    check_dots(moved(triton_ops.window_dots), case)
    check_apply(moved(triton_ops.window_apply_), case)


FAR = 1 << 33  # blocks


def far_away(modules, monkeypatch):
    """Makes the kernels believe that the first parameter's blocks come after FAR others of it, where they are."""

    def shifted(rows, **others):
        group = launch_of(rows, **others)
        table = group.table.clone()
        y = others.pop("errors", ()) or others.pop("momenta", ())
        x = next((own for name, own in others.items() if name in ("grads", "targets")), ())
        four = 2 if y and isinstance(y[0], LowBit) and y[0].codes.dtype == BITS4 else 1  # numbers of a byte
        entry, (values, indices, blocks) = table[:8], rows[0]
        entries = FAR * values.shape[1] * blocks.kept
        sizes = [parts_of(some)[0].element_size() if some else 0 for some in (x, y)]
        entry[:4] -= torch.tensor([
            FAR * blocks.block_size * sizes[0], FAR * blocks.block_size * sizes[1] // four,
            entries * values.element_size(), entries * indices.element_size(),
        ])  # fmt: skip
        entry[4] += FAR
        entry[6] -= FAR * blocks.block_size // (64 * four) * 4  # of a float32
        table[8 * len(rows)] -= FAR
        return group._replace(table=table)

    for module in modules:
        monkeypatch.setattr(module, "launch_of", shifted)


@pytest.mark.parametrize(
    "operators", [pytest.param(triton_ops, marks=pytest.mark.slow), portable], ids=["default", "portable"]
)
def test_addresses_are_computed_in_64_bits(monkeypatch, operators):
    """More blocks than an int32 counts, and with them elements and entries of the window."""
    far_away((compress, dots, apply, portable), monkeypatch)
    case = Case(700, 256, 0.05, window=7)
    members = [replace(case, numel=numel) for numel in (700, 512)]  # at least a block each
    slot, one = torch.tensor([3]), torch.tensor(0.9)
    update = Update(torch.linspace(-1.5, 2.0, 7), one, one, one, writes_momenta=True)
    results = []
    for there in (False, True):
        rows, grads, errors, targets, momenta = (
            [make(m) for m in members]
            for make in (Case.random_window, Case.gradient, Case.error_before, Case.target, Case.target)
        )
        small = [encoded(momentum, torch.int8) for momentum in momenta]
        few = [[replace(member, error=error).error_before() for member in members] for error in (BITS8, BITS4)]
        keys = [torch.tensor([5])] * 2
        tensors = [*grads, *errors, *targets, *momenta, *parts_of([*small, *few[0], *few[1]]), *keys]
        with simulated(*tensors_of(rows), *tensors):
            operations = operators if there else reference
            products = [operations.window_dots(rows, slot, *own) for own in ((), (momenta,), (small,))]
            operations.window_apply_(targets, momenta, rows, update)
            operations.window_apply_(targets, small, rows, update._replace(writes_momenta=False))
            operations = triton_ops if there else reference
            for some in (*few, errors):
                operations.compress_(grads, some, rows, slot, keys)
            for some in (*few, errors):
                operations.undo_compress_(grads, some, rows, slot, torch.tensor(False), keys)
        results.append([*products, *tensors, *tensors_of(rows)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("number_bits", [8, 4])
def test_addresses_of_numbers_are_computed_in_64_bits(monkeypatch, number_bits):
    """As above. Random numbers take the lower half of a position, which is as if no other block came before."""
    before, block = FAR * lowbit.SIZE, 64 if number_bits == 8 else 128

    def far(x, y):
        """Lets blocks come after others, with so many bits for each number of x and y."""

        def shifted(*arguments, **others):
            group = launch_at(*arguments, **others)
            moved = torch.tensor([before * x // 8, before * y // 8, 0, 0, -FAR, 0, before // block * 4, 0, FAR])
            return group._replace(table=group.table - moved)  # of one parameter

        for module in (average, lowbit):
            monkeypatch.setattr(module, "launch_at", shifted)

    results = []
    for operations in (reference, triton_ops):
        grad, target = torch.linspace(-1, 2, 5000), torch.linspace(3, -4, 5000)
        number, key = allocate_lowbit(5000, number_bits, torch.device("cpu")), torch.tensor([12345])
        with simulated(grad, target, key, *number):
            far(32, number_bits)
            operations.store_lowbit_([number], [target], torch.tensor(True), [key] if number_bits == 4 else [])
            operations.add_lowbit_([target], [number])
            if number_bits == 8:
                far(8, 32)
                operations.average_([number], [grad], 0.9, torch.tensor(True))
        results.append([target, *number])
    assert_all_same_bits(results[1], results[0], "result")


@pytest.mark.parametrize("kind", MOMENTA[1:])
def test_the_number_of_launches_does_not_grow_with_the_number_of_parameters(kind):
    case = Case(5000, 256, 0.05)
    members, finite, slot = case.group, torch.tensor(True), torch.tensor([1])
    momenta = momenta_of(case, kind)
    numbers = [allocate_lowbit(m.numel, 4, torch.device("cpu")) for m in members]
    keys, rows = [torch.tensor([m.numel]) for m in members], [m.random_window() for m in members]
    grads, targets, one = [m.gradient() for m in members], [m.target() for m in members], torch.tensor(1.0)
    update = Update(torch.ones(case.window), one, one, one)
    counts = []
    for n in (1, len(members)):
        with simulated(*tensors_of(rows), *grads, *targets, *keys, *parts_of([*momenta, *numbers])) as simulator:
            triton_ops.average_(momenta[:n], grads[:n], BETA, finite)
            triton_ops.store_lowbit_(numbers[:n], targets[:n], finite, keys[:n])
            triton_ops.add_lowbit_(targets[:n], numbers[:n])
            triton_ops.window_dots(rows[:n], slot, momenta[:n])
            triton_ops.window_apply_(targets[:n], momenta[:n], rows[:n], update)
            counts.append(len(simulator.launches))
    assert counts == [6, 6]  # two for the inner products


def test_momenta_in_8_bits_are_not_written():
    case, one = Case(300, 256, 0.05), torch.tensor(1.0)
    update = Update(torch.ones(case.window), one, one, one, writes_momenta=True)
    momentum = momenta_of(case, "8 bits")[1:2]
    for operations in (triton_ops, portable):
        with simulated(), pytest.raises(ValueError, match="momenta must be floating point where they are written"):
            operations.window_apply_([case.target()], momentum, [case.random_window()], update)


@pytest.mark.parametrize("cases", ["few", pytest.param("all", marks=pytest.mark.slow)])
def test_interpreted_kernels_agree_with_the_definition(cases):
    command = [sys.executable, "-m", "tests.kernels.interpreted", cases]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
