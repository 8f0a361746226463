"""The compiled CPU operations against the definition, and what must not change their results: threads and forks."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efcp.kernels import Update, reference
from tests.kernels.kernel_cases import (
    BFLOAT16,
    BITS4,
    BITS8,
    FINITE,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    KINDS_OF_UPDATE,
    TOLERANCE,
    Case,
    applied,
    assert_all_same_bits,
    assert_same_bits,
    check_apply,
    check_average,
    check_compress,
    check_compress_without_gradients,
    check_dots,
    check_lowbit,
    check_norm_is_finite,
    check_undo,
    make,
)
from tests.kernels.row_steps import CASES as ROW_STEPS
from tests.kernels.row_steps import check_row_steps

pytest.importorskip("numba")

import numpy as np

from efcp.kernels import cpu
from efcp.kernels.cpu import apply, compress, dots, dtypes, finite, inverse_root, launch, llvm, machine_code, memory

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
    Case(4097, 1024, 0.05, kind="wide", grad=FLOAT64, error=FLOAT64, values=FLOAT32),
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
    # Windows of which few entries meet the newest row.
    Case(6400, 64, 1 / 64, values=FLOAT16, window=64),
    Case(20003, 256, 0.05, window=65, slot=64),
    Case(20003, 300, 0.16, kind="ties", window=100),
    Case(20003, 4096, 0.0117, values=FLOAT32, window=64, slot=0),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (Case(100003, 4096, 0.012, window=70), Case(100003, 32768, 0.001, window=64, slot=63))
    ),
]
FEW_BITS = [  # of errors
    *(
        Case(4097, 4096, 0.01, kind=kind, error=error)
        for kind in ("random", "wide", "ties", "equal", "zero", "signed zero", "denormal")
        for error in (BITS8, BITS4)
    ),
    Case(0, 4096, 0.01, error=BITS4),
    Case(1, 4096, 0.01, error=BITS8),
    Case(63, 7, 0.37, kind="ties", error=BITS4),
    Case(100, 1, 1.0, error=BITS4, values=FLOAT32),
    Case(4097, 257, 0.1, grad=BFLOAT16, error=BITS8),
    Case(4097, 257, 0.1, grad=FLOAT16, error=BITS4),
    Case(4097, 129, 0.1, grad=FLOAT64, error=BITS4, values=FLOAT32),
    Case(4097, 1000, 0.3, grad=FLOAT64, error=BITS8, kind="wide"),
    Case(4097, 1000, 0.3, error=BITS8, finite=False),
    Case(4097, 1000, 0.3, error=BITS4, finite=False),
    Case(100003, 4096, 0.01, error=BITS8),
    Case(100003, 4096, 0.01, error=BITS4),
    Case(100003, 32768, 0.1, error=BITS4),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
LARGE = Case(100003, 4096, 0.01, window=5, slot=2)  # large enough for several threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [*CASES, *FEW_BITS], ids=str)
def test_compress_gives_the_bits_of_the_definition(case: Case) -> None:
    check_compress(cpu.compress_, case)
    check_undo(cpu.undo_compress_, case)


@pytest.mark.parametrize("error", [FLOAT32, BITS8, BITS4], ids=["floats", "8 bits", "4 bits"])
def test_compress_without_gradients(error: torch.dtype) -> None:
    check_compress_without_gradients(cpu.compress_, Case(9000, 4096, 0.01, error=error))


@cases
def test_dots_agree_with_the_definition(case: Case) -> None:
    check_dots(cpu.window_dots, case)


@cases
def test_apply_gives_the_bits_of_the_definition(case: Case) -> None:
    check_apply(cpu.window_apply_, case)
    weights = torch.linspace(-1.5, 2.0, 2 * case.window)[::2]  # not contiguous
    for kind, writes, squares in KINDS_OF_UPDATE:
        expected = applied(reference.window_apply_, case, kind, weights, writes, squares)
        actual = applied(cpu.window_apply_, case, kind, weights, writes, squares)
        if squares and case.grad is FLOAT64:  # PyTorch's root of float64 may be off by a last bit
            torch.testing.assert_close(actual, expected, **TOLERANCE[FLOAT64])
            continue
        for what, ours, theirs in zip(("target", "momentum"), actual, expected, strict=True):
            assert_all_same_bits(ours, theirs, what)


@cases
def test_average_gives_the_bits_of_the_definition(case: Case) -> None:
    check_average(cpu.average_, case)


@cases
def test_numbers_of_few_bits_are_those_of_the_definition(case: Case) -> None:
    check_lowbit((cpu.store_lowbit_, cpu.add_lowbit_), case)


@pytest.mark.parametrize("case", ROW_STEPS)
def test_row_steps_agree_with_the_definition(case: str) -> None:
    recomputed = ("inverse_root", "inverse_column") if case == "dependent rows" else ()
    check_row_steps(cpu.mfac_row_step_, case, recomputed)


@cases
def test_norm_is_finite_agrees_with_the_definition(case: Case) -> None:
    check_norm_is_finite(cpu.norm_is_finite, case)


@pytest.mark.parametrize(("name", "dtype", "gradients", "finite"), FINITE, ids=[row[0] for row in FINITE])
def test_norm_is_finite(name: str, dtype: torch.dtype, gradients: list[list[float]], finite: bool) -> None:
    assert bool(cpu.norm_is_finite([torch.tensor(grad, dtype=dtype) for grad in gradients])) is finite


@pytest.mark.parametrize("position", [0, 150_000, 299_999])
@pytest.mark.parametrize("gradient", [0, 1, 2])
def test_a_nan_is_found_in_a_large_gradient(gradient: int, position: int) -> None:
    grads = [torch.zeros(300_000) for _ in range(3)]
    assert cpu.norm_is_finite(grads)
    grads[gradient][position] = float("nan")
    assert not cpu.norm_is_finite(grads)


def test_a_parameter_without_gradient_gets_a_row_of_zeros_also_in_the_tail() -> None:
    case = Case(4097, 256, 0.1)
    rows, error = case.random_window(), case.error_before()
    before = [tensor.clone() for tensor in rows[:2]]
    assert error is not None
    cpu.compress_([None], [error], [rows], torch.tensor([case.slot]))
    for part in case.blocks.parts(1 << 18):
        before[0][part.blocks, case.slot, : part.kept] = 0.0
    assert_same_bits(rows.values, before[0], "values")
    assert_same_bits(rows.indices, before[1], "indices")
    assert_same_bits(error, case.error_before(), "error")


def test_as_many_tensors_as_parameters_are_taken() -> None:
    """Compiled code would read an address that is not there."""
    rows = [case.random_window() for case in LARGE.group]
    grads = [case.gradient() for case in LARGE.group]
    slot, one = torch.tensor([0]), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"^errors must hold 4 tensors, got 3$"):
        cpu.compress_(grads, grads[1:], rows, slot)
    with pytest.raises(ValueError, match=r"^targets must hold 3 tensors, got 4$"):
        cpu.window_apply_(grads, [], rows[1:], Update(torch.ones(LARGE.window), one, one))


@pytest.mark.parametrize("kind", ["random", "ties", "denormal"])
def test_blocks_that_differ_do_not_mislead_the_search(kind: str) -> None:
    """A block starts from the threshold of the one before, here from anywhere."""
    case = Case(64 * 300, 300, 0.05)
    scale = 10.0 ** torch.randint(-20, 20, (64, 1), generator=torch.Generator().manual_seed(0))
    grad = (make(kind, case.numel, FLOAT32, seed=1).view(64, 300) * scale).flatten()
    rows = []
    for compress_ in (reference.compress_, cpu.compress_):
        rows.append(case.poisoned_window())
        compress_([grad], [], rows[-1:], torch.tensor([1]))
    for what, actual, expected in zip(("values", "indices"), rows[1][:2], rows[0][:2], strict=True):
        assert_same_bits(actual, expected, what)


@pytest.mark.parametrize("newest", [1e-37, 1e-20, 1.0, 1e19, 3e38])
@pytest.mark.parametrize("others", [1e-25, 1.0, 1e19, 3e38])
def test_dots_of_tiny_and_huge_values_are_as_exact_as_any(newest: float, others: float) -> None:
    """Their products lie outside float32."""
    case = Case(4096, 4096, 0.01)
    rows = case.random_window()
    scale = torch.tensor([others, newest, others], dtype=FLOAT64).view(3, 1)
    rows.values.copy_(rows.values.double().clamp(-1, 1) * scale)
    slot = torch.tensor([1])
    expected = reference.window_dots([rows], slot)
    torch.testing.assert_close(cpu.window_dots([rows], slot), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("stride", [1, 16, 99])
def test_dots_of_rows_at_the_same_positions(stride: int) -> None:
    """All entries of one block meet the newest row; of the other those of every second row, and else many or none."""
    case = Case(8192, 4096, 0.01, window=70)
    rows = case.random_window()
    rows.indices.copy_(stride * torch.arange(case.blocks.kept))
    rows.indices[1, 1::2] += 1
    slot = torch.tensor([1])
    expected = reference.window_dots([rows], slot)
    torch.testing.assert_close(cpu.window_dots([rows], slot), expected, rtol=1e-12, atol=1e-12)


def test_few_entries_are_looked_at_that_do_not_meet_the_newest_row() -> None:
    generator = torch.Generator().manual_seed(0)
    newest = torch.randperm(4096, generator=generator)[: dots.FEW]
    indices = torch.randint(4096, (dots.PORTION,), dtype=torch.int16, generator=generator)
    found, tables = np.zeros(dots.PORTION + 4, np.uint64), np.zeros(dots.TABLES, np.uint8)
    for position in newest.tolist():
        dots._include(tables, 4, position)
    address, entries = tables.ctypes.data, len(indices)
    count = dots._may_overlap(2, indices.data_ptr(), 0, entries, entries, address, 4, indices.data_ptr(), 2, found)
    meeting = set(torch.isin(indices.long(), newest).nonzero().flatten().tolist())
    assert meeting <= set(found[:count].tolist())
    if llvm.HAS_AVX2:
        assert count - len(meeting) < entries / 10
    else:
        assert count == entries


OTHER_PROCESSOR = """
import numpy as np, torch
from efcp.kernels import reference
from efcp.kernels.cpu import dots, llvm
from tests.kernels.kernel_cases import Case

rows, slot = Case(8192, 4096, 0.01, window=70).random_window(), torch.tensor([1])
torch.testing.assert_close(dots.window_dots([rows], slot), reference.window_dots([rows], slot))
found, tables = np.zeros(104, np.uint64), np.zeros(dots.TABLES, np.uint8)
values, indices = rows.values.data_ptr(), rows.indices.data_ptr()
count = dots._may_overlap(2, indices, 0, 100, 100, tables.ctypes.data, 4, values, 2, found)
print(llvm.HAS_AVX2, count, (found[:100] == np.arange(100)).all())
"""


@pytest.mark.slow
def test_a_processor_that_cannot_look_up_bytes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", OTHER_PROCESSOR]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False", "100", "True"]


def after_replacing_rows(update: Callable[..., tuple[Tensor, Tensor]], window: int) -> tuple[Tensor, ...]:
    """R, S, x, what it misses and the following column, when some rows of a window of gradients were replaced, the last
    two often; and the exact inverse, and its column that x should be."""
    generator = torch.Generator().manual_seed(window)
    G = torch.randn(window, 40, dtype=FLOAT64, generator=generator)
    ridge = 0.01 * window
    identity = torch.eye(window, dtype=FLOAT64)
    R = torch.linalg.inv(torch.linalg.cholesky(G @ G.t() + ridge * identity)).contiguous()
    for step in range(8):
        slot = torch.tensor([[0, window // 2, window - 1, window - 1][step % 4]])
        G[slot] = torch.randn(1, 40, dtype=FLOAT64, generator=generator) * 3.0**step
        S = G @ G.t()
        column = R.t() @ R[:, slot.item()]
        x, miss = update(R, column, S, slot, ridge)
    inverse = torch.linalg.inv(S + ridge * identity)
    return R, S, x, miss, column, inverse, inverse[slot.item()]


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 300])
def test_inverse_root_agrees_with_the_definition(window: int) -> None:
    R, S, x, miss, column, inverse, wanted = after_replacing_rows(cpu.update_inverse_root_, window)
    defined = after_replacing_rows(reference.update_inverse_root_, window)
    pairs = (
        (R.t() @ R, inverse),
        (x, wanted),
        (column, inverse[0]),
        (R, defined[0]),
        (x, defined[2]),
        (column, defined[4]),
    )
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))
    unit = torch.zeros(window, dtype=FLOAT64).index_fill_(0, torch.tensor([window - 1]), 1.0)
    exact = unit - (S + 0.01 * window * torch.eye(window, dtype=FLOAT64)) @ x
    torch.testing.assert_close(miss, exact, rtol=0, atol=1e-13 * float(S.abs().max() * x.abs().max() * window))


@pytest.mark.parametrize("name", ["R", "column", "S"])
def test_inverse_root_in_another_memory_format_is_refused(name: str) -> None:
    arguments = {"R": torch.eye(4, dtype=FLOAT64), "column": torch.ones(4, dtype=FLOAT64), "S": torch.eye(4).double()}
    arguments[name] = torch.stack([arguments[name]] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous, with {arguments[name].numel()} elements of"):
        cpu.update_inverse_root_(**arguments, slot=torch.tensor([0]), ridge=1.0)


def run_all(case: Case) -> dict[str, Tensor]:
    """All operations, one after the other."""
    group, slot = case.group, torch.tensor([case.slot])
    grads, errors = [member.gradient() for member in group], [member.error_before() for member in group]
    targets, momenta = [member.target() for member in group], [member.target() for member in group]
    rows = [member.random_window() for member in group]
    finite = cpu.compress_(grads, errors, rows, slot)
    assert finite == cpu.norm_is_finite(grads)
    dots = cpu.window_dots(rows, slot)
    update = Update(torch.linspace(-1.5, 2.0, case.window), *torch.tensor([0.75, -0.3, 0.9]))
    cpu.window_apply_(targets, momenta, rows, update)
    vectors = {"error": errors, "target": targets, "momentum": momenta}
    vectors |= {"values": [r.values for r in rows], "indices": [r.indices for r in rows]}
    every = {f"{what} {number}": tensor for what, tensors in vectors.items() for number, tensor in enumerate(tensors)}
    return every | {"finite": finite.byte(), "dots": dots}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for what, tensor in actual.items():
        assert_same_bits(tensor, expected[what], what)


@pytest.fixture(params=["OpenMP", "Python"])
def kind_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "OpenMP" and launch._team is None:
        pytest.skip("this PyTorch has no OpenMP team that can be called")
    if request.param == "Python":
        monkeypatch.setattr(launch, "_team", None)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
    launch._pool.cache_clear()
    yield request.param
    launch._pool.cache_clear()


def test_pytorch_for_linux_has_a_team() -> None:
    assert (
        sys.platform != "linux" or "backend: OpenMP" not in torch.__config__.parallel_info() or launch._team is not None
    )


@pytest.mark.parametrize("case", [LARGE, Case(100003, 256, 0.1, window=4), Case(4097, 4096, 0.01)], ids=str)
@pytest.mark.usefixtures("kind_of_threads")
def test_the_number_of_threads_does_not_change_a_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    expected = run_all(case)
    monkeypatch.setattr(launch, "PARALLEL", 0)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_same(run_all(case), expected)


@pytest.mark.usefixtures("kind_of_threads")
def test_the_number_of_threads_does_not_change_a_bit_of_the_inverse_root(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_threads(threads: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def update(*arguments: Any) -> tuple[Tensor, Tensor]:
            torch.set_num_threads(threads)
            result = cpu.update_inverse_root_(*arguments)
            torch.set_num_threads(1)  # of PyTorch's operations, whose results may depend on it
            return result

        return update

    torch.set_num_threads(1)
    monkeypatch.setattr(launch, "PARALLEL", 0)
    expected = after_replacing_rows(on_threads(1), 300)
    for threads in (2, 3, 8):
        for actual, one_thread in zip(after_replacing_rows(on_threads(threads), 300), expected, strict=True):
            assert_same_bits(actual, one_thread, f"{threads} threads")


class PythonKernel:
    """Takes shares as a compiled kernel does, and calls `work` with each."""

    def __init__(self, work: Callable[[range], object]) -> None:
        self.work, self.lock = work, threading.Lock()
        self.workers: set[int] = set()
        self.ctypes = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.take_shares)
        self.address = ctypes.cast(self.ctypes, ctypes.c_void_p).value

    def take_shares(self, address: int) -> None:
        self.workers.add(threading.get_ident())
        call = (ctypes.c_int64 * 3).from_address(address)
        while True:
            with self.lock:
                share, shares, pieces = call
                call[0] += 1
            if share >= shares:
                return
            self.work(range(pieces * share // shares, pieces * (share + 1) // shares))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_work_as_pytorch_is_set_to(threads: int, kind_of_threads: str) -> None:
    torch.set_num_threads(threads)
    workers, pieces = set(), []
    everyone = threading.Barrier(threads)

    def work(share: range) -> None:
        if threading.get_ident() not in workers:
            workers.add(threading.get_ident())
            everyone.wait(timeout=60)
        time.sleep(0.001)
        pieces.extend(share)

    launch.run(PythonKernel(work), (), 100, launch.PARALLEL)
    assert len(workers) == threads
    assert threading.get_ident() in workers
    assert any(thread.name.startswith("efcp") for thread in threading.enumerate() if thread.ident in workers) is (
        kind_of_threads == "Python" and threads > 1
    )
    assert sorted(pieces) == list(range(100))
    assert torch.get_num_threads() == threads


def test_a_small_operation_runs_in_the_caller() -> None:
    workers = []
    kernel = PythonKernel(lambda share: workers.append((threading.get_ident(), share)))
    launch.run(kernel, (), 100, launch.PARALLEL - 1)
    assert workers == [(threading.get_ident(), range(100))]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("kind_of_threads")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_operation_for_which_no_thread_finds_memory_is_an_error(threads: int) -> None:
    torch.set_num_threads(threads)
    slot = torch.tensor([0])
    with pytest.raises(MemoryError, match=r"^no thread could allocate its scratch$"):
        launch.run(dots._dots_kernel(dtypes.BFLOAT16, 2), (0, 0, 1 << 60, 0, 0, slot.data_ptr(), 1), 2, launch.PARALLEL)


@pytest.mark.skipif(launch._team is None, reason="this PyTorch has no OpenMP team that can be called")
def test_a_team_keeps_its_size_where_it_is_larger_than_needed() -> None:
    torch.set_num_threads(3)
    kernel = PythonKernel(lambda share: None)
    launch.run(kernel, (), 2, launch.PARALLEL)
    assert len(kernel.workers) == 3


@pytest.mark.skipif(launch._team is None, reason="this PyTorch has no OpenMP team that can be called")
def test_threads_of_a_team_may_call() -> None:
    expected = run_all(LARGE)
    results = []
    launch.run(PythonKernel(lambda share: results.append(run_all(LARGE))), (), 2, launch.PARALLEL)
    for result in results:
        assert_same(result, expected)
    assert len(results) == 2


def test_each_share_is_taken_once() -> None:
    @machine_code.cached_kernel()
    def mark(call: int) -> None:
        _, marks = llvm.pieces_and_arguments(call, 1)
        first, last = launch.take_share(call)
        while first < last:
            for piece in range(first, last):
                memory.store_f64(marks, piece, memory.load_f64(marks, piece) + 1.0)
            first, last = launch.take_share(call)

    marks = torch.zeros(1 << 22, dtype=FLOAT64)
    call = array("q", [0, len(marks), len(marks), marks.data_ptr()])
    everyone = threading.Barrier(2)

    def take_shares() -> None:
        everyone.wait(timeout=60)
        mark.ctypes(call.buffer_info()[0])

    callers = [threading.Thread(target=take_shares) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (marks == 1).all()


@pytest.mark.usefixtures("kind_of_threads")
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


KERNELS = {
    "compress": compress._compress_kernel(False),
    "compress, few bits": compress._compress_kernel(False, True),
    "dots": dots._dots_kernel(dtypes.BFLOAT16, 2),
    "add_up": dots._add_up_kernel(),
    "apply": apply._apply_kernel(False, dtypes.BFLOAT16, 2, False),
    "squares": finite._squares_kernel(),
    "reflect": inverse_root._reflect_kernel(),
    "border": inverse_root._border_kernel(),
    "residual": inverse_root._residual_kernel(),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_kernels_refer_to_nothing_that_another_process_cannot_find_in_the_cache(kernel: Any) -> None:
    for cell in kernel.__wrapped__.__closure__ or ():
        assert isinstance(cell.cell_contents, int | type)


CACHE = """
from efcp.kernels.cpu import apply, compress, dots, dtypes, finite, inverse_root

print(compress._compress_kernel(False).cache_hits, dots._dots_kernel(dtypes.BFLOAT16, 2).cache_hits,
    dots._add_up_kernel().cache_hits, apply._apply_kernel(False, dtypes.BFLOAT16, 2, False).cache_hits,
    finite._squares_kernel().cache_hits, inverse_root._reflect_kernel().cache_hits,
    inverse_root._border_kernel().cache_hits, inverse_root._residual_kernel().cache_hits)
"""


def test_another_process_finds_the_kernels_in_the_cache() -> None:
    run = subprocess.run([sys.executable, "-c", CACHE], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1"] * 8


MEMORY = """
import torch
from pathlib import Path
from efcp.kernels import Blocks, SparseRows, Update, cpu

def operations(numel):
    blocks = Blocks(numel, 4096, 0.01)
    values = torch.ones(blocks.count, 2, blocks.kept, dtype=torch.bfloat16)
    indices = torch.arange(blocks.kept, dtype=torch.int16).expand(values.shape).contiguous()
    rows, grads, errors = [SparseRows(values, indices, blocks)], [torch.ones(numel)], [torch.ones(numel)]
    slot, one = torch.tensor([1]), torch.tensor(1.0)
    yield
    cpu.undo_compress_(grads, errors, rows, slot, cpu.compress_(grads, errors, rows, slot))
    cpu.window_dots(rows, slot)
    cpu.window_apply_(grads, errors, rows, Update(torch.ones(2), one, one, one))
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
