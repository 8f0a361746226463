"""The compiled CPU operations against the definition, and what must not change their results: threads and forks."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efcp.kernels import reference
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
    make,
)

pytest.importorskip("numba")

import numba

from efcp.kernels import cpu

# A new pair of a dtype of values and an index size costs a compilation (two with a float64 gradient); all else is free.
CASES = [
    Case(0, 4096, 0.01),
    Case(1, 4096, 0.01),
    Case(1, 1, 1.0, error=None, values=FLOAT16, slot=0, window=1),
    Case(63, 1, 0.001, window=2),
    Case(63, 7, 0.37, kind="ties", slot=0),
    Case(63, 4096, 0.1, slot=2),
    Case(64, 64, 0.02, kind="ties", values=FLOAT16),
    Case(4096, 256, 0.1, error=BFLOAT16),
    Case(4096, 4096, 0.01, slot=0),
    *(
        Case(4097, 4096, 0.01, kind=kind, window=5, slot=4)
        for kind in ("random", "wide", "ties", "equal", "zero", "signed zero", "denormal")
    ),
    *(
        Case(4097, 1000, 0.3, kind=kind, grad=FLOAT64, error=FLOAT64, values=FLOAT32)
        for kind in ("random", "wide", "ties", "equal", "zero", "signed zero", "denormal")
    ),
    Case(4097, 4096, 0.01, finite=False, window=5, slot=4),
    Case(4097, 256, 1.0, kind="signed zero"),
    Case(4097, 257, 0.37, kind="wide", grad=BFLOAT16, error=BFLOAT16),
    Case(4097, 257, 0.5, kind="denormal", grad=FLOAT16, error=FLOAT64, values=FLOAT32),
    Case(4097, 256, 0.1, kind="denormal", grad=FLOAT16, error=FLOAT16, values=FLOAT16),
    Case(4097, 256, 0.1, kind="wide", grad=FLOAT16, error=FLOAT32, values=FLOAT16),
    Case(100003, 1, 1.0),
    Case(100003, 7, 0.2, grad=BFLOAT16, error=FLOAT32),
    Case(100003, 4096, 0.01, window=5, slot=0),
    Case(100003, 4096, 0.001, kind="wide", error=FLOAT64),
    Case(100003, 4096, 0.1, grad=FLOAT64, error=BFLOAT16, values=FLOAT32),
    Case(100003, 4096, 0.01, kind="equal", error=BFLOAT16),
    Case(100003, 256, 0.001, grad=FLOAT16, error=None, values=FLOAT16),
    Case(100003, 32768, 0.37, values=FLOAT32),
    Case(100003, 32768, 0.9, kind="ties"),
    Case(100003, 32768, 1.0, kind="wide"),
    Case(100003, 32768, 1.0, finite=False),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
LARGE = Case(100003, 4096, 0.01, window=5, slot=2)  # large enough for several threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@cases
def test_compress_gives_the_bits_of_the_definition(case: Case) -> None:
    check_compress(cpu.compress_, case)


@cases
def test_dots_agree_with_the_definition(case: Case) -> None:
    check_dots(cpu.window_dots, case)


@cases
def test_apply_gives_the_bits_of_the_definition(case: Case) -> None:
    check_apply(cpu.window_apply_, case)
    values, indices = case.random_window()
    weights = torch.linspace(-1.5, 2.0, 2 * case.window)[::2]  # not contiguous
    targets = []
    for window_apply_ in (reference.window_apply_, cpu.window_apply_):
        targets.append(make("random", case.numel, case.grad, seed=4))
        window_apply_(targets[-1], values, indices, weights, torch.tensor(0.9, dtype=BFLOAT16), case.blocks)
    assert_same_bits(targets[1], targets[0], "target")


@pytest.mark.parametrize("kind", ["random", "ties", "denormal"])
def test_blocks_that_differ_do_not_mislead_the_search(kind: str) -> None:
    """A block starts from the threshold of the one before, here from anywhere."""
    case = Case(64 * 300, 300, 0.05)
    scale = 10.0 ** torch.randint(-20, 20, (64, 1), generator=torch.Generator().manual_seed(0))
    grad = (make(kind, case.numel, FLOAT32, seed=1).view(64, 300) * scale).flatten()
    rows = []
    for compress_ in (reference.compress_, cpu.compress_):
        values, indices = case.poisoned_window()
        compress_(grad, None, values, indices, torch.tensor([1]), torch.tensor(True), case.blocks)
        rows.append((values, indices))
    for what, actual, expected in zip(("values", "indices"), rows[1], rows[0], strict=True):
        assert_same_bits(actual, expected, what)


def test_infinities_from_an_overflowing_sum_are_kept_first() -> None:
    case = Case(4097, 256, 0.1, values=BFLOAT16)
    grad = torch.where(make("ties", case.numel, FLOAT32, seed=1) == 2, 3e38, 1.0)
    rows = []
    for compress_ in (reference.compress_, cpu.compress_):
        values, indices = case.poisoned_window()
        compress_(grad, grad.clone(), values, indices, torch.tensor([1]), torch.tensor(True), case.blocks)
        rows.append((values, indices))
    assert rows[0][0][0, 1].isinf().all()
    for what, actual, expected in zip(("values", "indices"), rows[1], rows[0], strict=True):
        assert_same_bits(actual, expected, what)


@pytest.mark.parametrize("newest", [1e-37, 1e-20, 1.0, 1e19, 3e38])
@pytest.mark.parametrize("others", [1e-25, 1.0, 1e19, 3e38])
def test_dots_of_tiny_and_huge_values_are_as_exact_as_any(newest: float, others: float) -> None:
    """Their products lie outside float32."""
    case = Case(4096, 4096, 0.01)
    values, indices = case.random_window()
    scale = torch.tensor([others, newest, others], dtype=FLOAT64).view(3, 1)
    values = (values.double().clamp(-1, 1) * scale).to(BFLOAT16)
    slot = torch.tensor([1])
    expected = reference.window_dots(values, indices, slot, case.blocks)
    torch.testing.assert_close(cpu.window_dots(values, indices, slot, case.blocks), expected, rtol=1e-12, atol=0)


def run_all(case: Case) -> dict[str, Tensor]:
    """All three operations, one after the other."""
    values, indices = case.random_window()
    error, target, slot = case.error_before(), case.gradient(), torch.tensor([case.slot])
    cpu.compress_(case.gradient(), error, values, indices, slot, torch.tensor(True), case.blocks)
    dots = cpu.window_dots(values, indices, slot, case.blocks)
    cpu.window_apply_(target, values, indices, torch.linspace(-1.5, 2.0, case.window), torch.tensor(0.9), case.blocks)
    assert error is not None
    return {"values": values, "indices": indices, "error": error, "dots": dots, "target": target}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, tensor in actual.items():
        assert_same_bits(tensor, expected[what], what)


@pytest.mark.parametrize("case", [LARGE, Case(100003, 256, 0.1, window=4), Case(4097, 4096, 0.01)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    expected = run_all(case)
    monkeypatch.setattr(cpu, "PARALLEL", 0)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(run_all(case), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_work_as_pytorch_is_set_to(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cpu._pool.cache_clear()
    torch.set_num_threads(threads)
    workers, pieces = set(), []
    everyone = threading.Barrier(threads)

    def kernel(first: int, last: int) -> None:
        if threading.get_ident() not in workers:
            workers.add(threading.get_ident())
            everyone.wait(timeout=60)
        time.sleep(0.001)
        pieces.extend(range(first, last))

    cpu._run(kernel, (), 100, cpu.PARALLEL)
    cpu._pool.cache_clear()
    assert len(workers) == threads
    assert threading.get_ident() in workers
    assert sorted(pieces) == list(range(100))
    assert torch.get_num_threads() == threads


def test_a_small_operation_runs_in_the_caller() -> None:
    workers = []
    cpu._run(lambda first, last: workers.append((threading.get_ident(), first, last)), (), 100, cpu.PARALLEL - 1)
    assert workers == [(threading.get_ident(), 0, 100)]


def test_threads_may_call_at_the_same_time() -> None:
    expected = run_all(LARGE)
    results: list[dict[str, Tensor]] = []
    callers = [threading.Thread(target=lambda: results.extend(run_all(LARGE) for _ in range(5))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 20
    for result in results:
        assert_same(result, expected)


def in_a_child(expected: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork, and it would wait for them
    assert_same(run_all(LARGE), expected)
    torch.get_num_threads = lambda: 2
    assert_same(run_all(LARGE), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    expected = run_all(LARGE)
    child = multiprocessing.get_context("fork").Process(target=in_a_child, args=(expected,))
    child.start()
    child.join(timeout=60)
    if child.is_alive():
        child.kill()
        pytest.fail("the child hangs")
    assert child.exitcode == 0
    assert_same(run_all(LARGE), expected)


class Windows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return run_all(LARGE)


def test_a_worker_of_a_data_loader_may_call() -> None:
    expected = run_all(LARGE)
    for result in DataLoader(Windows(), batch_size=None, num_workers=2, timeout=60):
        assert_same(result, expected)


def test_kernels_compile_where_no_cache_can_be_written() -> None:
    scope: dict[str, Any] = {}
    exec("def kernel(first, last):\n    return first + last", scope)  # Numba finds no file, and so no folder, for it
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(scope["kernel"])
    assert cpu._kernel()(scope["kernel"])(2, 3) == 5


MEMORY = """
import torch
from pathlib import Path
from efcp.kernels import Blocks, cpu

def operations(numel):
    blocks = Blocks(numel, 4096, 0.01)
    values = torch.ones(blocks.count, 2, blocks.kept, dtype=torch.bfloat16)
    indices = torch.arange(blocks.kept, dtype=torch.int16).expand(values.shape).contiguous()
    grad, error, slot = torch.ones(numel), torch.ones(numel), torch.tensor([1])
    yield
    cpu.compress_(grad, error, values, indices, slot, torch.tensor(True), blocks)
    cpu.window_dots(values, indices, slot, blocks)
    cpu.window_apply_(grad, values, indices, torch.ones(2), torch.tensor(1.0), blocks)
    yield

list(operations(1 << 17))
small = operations(1 << 24)
next(small)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
next(small)
print(peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory on this system")
def test_no_temporary_grows_with_the_parameter() -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 8 << 10  # KiB, where the gradient takes 64 << 10
