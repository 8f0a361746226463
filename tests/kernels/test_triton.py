"""The Triton kernels against the definition: compiled for several GPUs and run on the CPU by gpusim, and interpreted.

Every launch in gpusim is checked for accesses out of bounds, unaligned accesses, use of uninitialised shared memory,
and races between programs, and between warps in shared memory.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from efcp.kernels import Blocks, reference
from efcp.perf.gpusim import SimulationError, why_unavailable
from tests.kernels.kernel_cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    assert_same_bits,
    check_apply,
    check_compress,
    check_dots,
)

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

from efcp.kernels import triton_ops
from efcp.kernels.triton_ops import apply, dots
from efcp.perf.gpusim import simulate

# A case with another block size, dtype or architecture costs a compilation, one with another input next to nothing.
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
    Case(100003, 4096, 0.01, window=5, slot=0),
    Case(100003, 4096, 0.01, grad=BFLOAT16, window=7, slot=3),
    Case(100003, 4096, 0.01, error=BFLOAT16, kind="equal", arch=120),
    Case(100003, 4096, 0.1, grad=FLOAT64, error=FLOAT64, values=FLOAT32),
    Case(100003, 256, 0.001, grad=FLOAT16, error=None, values=FLOAT16, arch=80),
    Case(100003, 32768, 0.37, values=FLOAT32, arch=80),
    Case(100003, 32768, 1.0, kind="ties"),
    Case(100003, 32768, 1.0, finite=False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_compress_gives_the_bits_of_the_definition(case):
    with simulate(case.arch, check_races=True):
        check_compress(triton_ops.compress_, case)


@cases
def test_dots_agree_with_the_definition(case):
    with simulate(case.arch, check_races=True):
        check_dots(triton_ops.window_dots, case)


@cases
def test_apply_agrees_with_the_definition(case):
    with simulate(case.arch, check_races=True):
        check_apply(triton_ops.window_apply_, case)


def collide():
    """`window_apply_` with rows whose entries at the same place are far apart, so that other threads treat them."""
    blocks = Blocks(4096, 4096, 0.1)
    window = 6
    indices = torch.stack([torch.arange(blocks.kept) + 37 * row for row in range(window)])[None].short()
    values = torch.randint(1, 9, indices.shape, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)
    return values, indices, torch.ones(window), torch.ones(()), blocks


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_warps_and_programs_does_not_matter(seed):
    case = Case(100003, 4096, 0.01, window=5, slot=0)
    weights, scale = torch.linspace(-1.5, 2.0, case.window), torch.tensor(0.75)

    def run(schedule):
        with simulate(90, schedule=schedule):
            values, indices = case.random_window()
            products = triton_ops.window_dots(values, indices, torch.tensor([2]), case.blocks)
            target = case.gradient()
            triton_ops.window_apply_(target, values, indices, weights, scale, case.blocks)
            error = case.error_before()
            arguments = (torch.tensor([case.slot]), torch.tensor(True), case.blocks)
            triton_ops.compress_(case.gradient(), error, values, indices, *arguments)
        return {"dots": products, "target": target, "error": error, "values": values, "indices": indices}

    expected = run(None)
    for what, tensor in run(seed).items():
        assert_same_bits(tensor, expected[what], what)


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_added_one_after_the_other(seed):
    values, *rest = collide()
    actual, expected = torch.zeros(4096), torch.zeros(4096)
    with simulate(90, schedule=seed, check_races=True):
        triton_ops.window_apply_(actual, values, *rest)
    reference.window_apply_(expected, values, *rest)
    assert torch.equal(actual, expected)  # small integers: no rounding


def test_a_missing_barrier_between_rows_would_be_noticed():
    values, *rest = collide()
    expected, actual = torch.zeros(4096), torch.zeros(4096)
    with simulate(90) as simulator:
        triton_ops.window_apply_(expected, values, *rest)
    wrong_without_race_in_shared_memory = []
    for barrier in range(simulator.launches[-1].barrier_sites):
        actual.zero_()
        try:
            with simulate(90, schedule=0, check_races=True, drop_barriers=[barrier]):
                triton_ops.window_apply_(actual, values, *rest)
        except SimulationError:  # a barrier that Triton put between accesses to shared memory
            continue
        if not torch.equal(actual, expected):
            wrong_without_race_in_shared_memory.append(barrier)
    assert len(wrong_without_race_in_shared_memory) == 1


ENTRIES = 3 << 30  # of a window, more than an int32 counts


def sparse_file(path, numel, dtype):
    """Zeros that take no memory until they are touched."""
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


@pytest.fixture
def huge(tmp_path):
    """(values, indices) of ENTRIES zeros."""
    yield sparse_file(tmp_path / "values", ENTRIES, BFLOAT16), sparse_file(tmp_path / "indices", ENTRIES, torch.uint8)
    for file in tmp_path.iterdir():
        file.unlink()


def test_compress_reaches_beyond_2_31_entries(huge):
    blocks = Blocks(3, 1, 1.0)
    values, indices = (tensor.view(3, 1 << 30, 1) for tensor in huge)
    slot = (1 << 30) - 1
    with simulate(90):
        triton_ops.compress_(
            torch.tensor([1.0, 2.0, 3.0]), None, values, indices, torch.tensor([slot]), torch.tensor(True), blocks
        )
    assert values[:, slot, 0].tolist() == [1.0, 2.0, 3.0]


def test_products_reach_beyond_2_31_entries(huge):
    """Two blocks, as if both were tails of one element, in a window of three rows of 2^29 entries."""
    values, indices = huge
    stride, full_blocks, window = 1 << 29, 0, 3
    rows = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    values.view(2, window, stride)[:, :, 0] = rows
    layout = (window, full_blocks, stride, 1)
    dense, partial, target, total = (
        torch.zeros(2),
        torch.zeros(window, 2, dtype=FLOAT64),
        torch.zeros(2),
        torch.zeros(2),
    )
    with simulate(90):
        dots._spread_kernel[(2,)](values, indices, torch.tensor([2]), dense, *layout, SIZE=1, COLUMNS=1)
        dots._dots_kernel[(2, 1)](values, indices, dense, partial, *layout, SIZE=1, ROWS=4, COLUMNS=1)
        apply._apply_kernel[(2,)](
            target, values, indices, torch.ones(window), torch.ones(()), total, 2, *layout, SIZE=1, COLUMNS=1
        )
    assert dense.tolist() == [4.0, 32.0]
    assert partial.T.tolist() == [[4.0, 8.0, 16.0], [256.0, 512.0, 1024.0]]
    assert target.tolist() == [7.0, 56.0]


def test_interpreted_kernels_agree_with_the_definition():
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    finished = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
