"""Whatever is wrong around Numba, a step works, and one warning says why."""

import io
import multiprocessing
import os
import random
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from efcp import kernels
from efcp.kernels import BackendError, Update, dispatch, use_backend
from tests.kernels.kernel_cases import Case

pytest.importorskip("numba")

import numba

from efcp.kernels.cpu import apply, compress, dots, finite, inverse_root, machine_code, memory

ROOT = Path(__file__).parents[2]
AGAIN = "^efcp: compiled kernels in .* cannot be used, and are compiled again: "
NOT_KEPT = "^efcp: compiled kernels cannot be kept in .*, and each process compiles them: "
NO_CACHE = "^efcp: compiled kernels cannot be kept, and each process compiles them: "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, about which nobody has been warned."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine_code, "_has_warned", False)
    return tmp_path


def five() -> Any:
    """A kernel that compiles in no time, and stores 5."""

    @machine_code.cached_kernel()
    def store_five(call: int) -> None:
        memory.store_f64(call, 0, 5.0)

    number = torch.zeros(1, dtype=torch.float64)
    store_five.ctypes(number.data_ptr())
    assert number == 5
    return store_five


def cached(folder: Path) -> Path:
    (file,) = folder.glob("*/*")
    return file


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warning")
def test_a_kernel_is_compiled_once_and_then_loaded(folder: Path) -> None:
    assert [five().cache_hits for _ in range(3)] == [0, 1, 1]
    cached(folder)


def a_few_bytes(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for position in rng.sample(range(len(content)), rng.choice((1, 1, 8, 500))):
        damaged[position] ^= rng.randrange(1, 256)
    return bytes(damaged)


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, 31, 32, 33, rng.randrange(len(content))))]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 4096)))


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(len(content))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("damage", [a_few_bytes, truncated, longer, noise])
def test_a_damaged_file_is_not_run_but_replaced(
    damage: Callable[[bytes, random.Random], bytes], seed: int, folder: Path
) -> None:
    five()
    file = cached(folder)
    file.write_bytes(damage(file.read_bytes(), random.Random(seed)))
    with pytest.warns(RuntimeWarning, match=rf"{AGAIN}ValueError: {file.name} is damaged$") as warned:
        assert five().cache_hits == 0
    assert len(warned) == 1
    assert cached(folder) == file
    assert five().cache_hits == 1


def test_a_file_that_cannot_be_read_or_replaced(folder: Path) -> None:
    five()
    file = cached(folder)
    file.unlink()
    (file / "within").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=f"{AGAIN}IsADirectoryError: ") as warned:
        assert [five().cache_hits for _ in range(2)] == [0, 0]
    assert len(warned) == 1
    assert cached(folder) == file  # and nothing unfinished is left


def test_code_that_numba_does_not_understand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code.pickle, "loads", lambda code: ("another", "version's"))
    five()
    with pytest.warns(RuntimeWarning, match=f"{AGAIN}TypeError: ") as warned:
        assert five().cache_hits == 0
    assert len(warned) == 1


def test_code_that_holds_addresses_of_this_process_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.core.codegen.CodeLibrary, "has_dynamic_globals", True)
    with pytest.warns(RuntimeWarning, match=f"{NOT_KEPT}ValueError: with these settings Numba makes code") as warned:
        assert [five().cache_hits for _ in range(2)] == [0, 0]
    assert len(warned) == 1
    assert list(folder.glob("*/*")) == []


EDITED = """
from efcp.kernels.cpu import memory

def store(call):
    memory.store_f64(call, 0, {number})
"""


@pytest.mark.usefixtures("no_warning")
def test_an_edited_source_does_not_get_the_code_from_before(folder: Path) -> None:
    source = folder / "edited.py"
    for number in (5.0, 75.0):
        source.write_text(EDITED.format(number=number))
        for hits in range(2):
            kernel: Any = machine_code.cached_kernel()(runpy.run_path(str(source))["store"])
            stored = torch.zeros(1, dtype=torch.float64)
            kernel.ctypes(stored.data_ptr())
            assert (kernel.cache_hits, stored) == (hits, number)


def test_another_numba_does_not_get_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five()
    monkeypatch.setattr(numba, "__version__", "another")
    assert [five().cache_hits for _ in range(2)] == [0, 1]


def test_a_function_without_a_file_is_compiled(folder: Path) -> None:
    scope: dict[str, Any] = {"store": memory.store_f64}
    exec("def kernel(call):\n    store(call, 0, 5.0)", scope)
    number = torch.zeros(1, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=f"{NO_CACHE}RuntimeError: cannot cache"):
        machine_code.cached_kernel()(scope["kernel"]).ctypes(number.data_ptr())
    assert number == 5


@pytest.mark.parametrize("gone", ["numba.core.caching.FunctionCache", "numba.core.serialize.dumps"])
def test_other_internals_of_numba_cost_the_cache_only(gone: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gone)
    with pytest.warns(RuntimeWarning, match=f"{NO_CACHE}ImportError: ") as warned:
        assert [five().cache_hits for _ in range(2)] == [0, 0]
    assert len(warned) == 1


def in_a_child() -> None:
    warnings.simplefilter("error")
    five()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.usefixtures("no_warning")
def test_processes_may_compile_at_the_same_time(folder: Path) -> None:
    children = [multiprocessing.get_context("fork").Process(target=in_a_child) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=60)
    assert [child.exitcode for child in children] == [0] * 6
    cached(folder)
    assert five().cache_hits == 1


def test_a_terminal_shows_what_is_compiled_and_nothing_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, loading = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", compiling)
    five()
    monkeypatch.setattr(sys, "stderr", loading)
    five()
    text = "efcp: compiling kernels for this CPU, up to a minute: store_five ..."
    assert compiling.getvalue() == f"{text}\r{' ' * len(text)}\r"
    assert loading.getvalue() == ""


def test_a_terminal_also_shows_what_is_compiled_without_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("numba.core.caching.FunctionCache")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.warns(RuntimeWarning, match=NO_CACHE):
        five()
    assert "store_five ..." in terminal.getvalue()


@pytest.mark.usefixtures("no_warning")
def test_a_log_shows_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    five()
    assert log.getvalue() == ""


@pytest.mark.parametrize("stderr", [None, object()], ids=["none", "no file"])
@pytest.mark.usefixtures("no_warning")
def test_no_stderr_is_needed(stderr: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    five()


# An operation of which a kernel cannot be compiled. Nothing may have changed when the definition takes over.


def of_window(operation: str) -> list[torch.Tensor]:
    case = Case(100003, 4096, 0.01, window=5, slot=2)
    rows, slot, grad, error, target, momentum = (
        case.random_window(), torch.tensor([2]), case.gradient(), case.error_before(), case.target(), case.target(),
    )  # fmt: skip
    one = torch.tensor(1.0)
    update = Update(torch.ones(5), one, one, one)
    assert error is not None
    calls: dict[str, Callable[[], Any]] = {
        "norm_is_finite": lambda: kernels.norm_is_finite([grad]),
        "compress_": lambda: kernels.compress_([grad], [error], [rows], slot),
        "window_dots": lambda: kernels.window_dots([rows], slot),
        "window_apply_": lambda: kernels.window_apply_([target], [momentum], [rows], update),
    }
    result = calls[operation]()
    return [rows.values, rows.indices, error, target, momentum, *([] if result is None else [result])]


def of_inverse_root(operation: str) -> list[torch.Tensor]:
    G = torch.randn(65, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    S, slot = G @ G.t(), torch.tensor([7])
    R = torch.linalg.inv(torch.linalg.cholesky(S + torch.eye(65, dtype=torch.float64))).contiguous()
    column = R.t() @ R[:, 7]
    return [R, column, *kernels.update_inverse_root_(R, column, 2 * S, slot, 1.0)]


KERNELS = {
    "squares": ("norm_is_finite", of_window),
    "compress": ("compress_", of_window),
    "dots": ("window_dots", of_window),
    "add_up": ("window_dots", of_window),
    "apply": ("window_apply_", of_window),
    "reflect": ("update_inverse_root_", of_inverse_root),
    "border": ("update_inverse_root_", of_inverse_root),
    "residual": ("update_inverse_root_", of_inverse_root),
}


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.delenv("EFCP_KERNELS", raising=False)
    backends: set[str] = set()
    monkeypatch.setattr(dispatch, "_broken", backends)
    return backends


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_definition_takes_over_where_a_kernel_cannot_be_compiled(
    kernel: str, broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*constants: object) -> None:
        raise BackendError("LLVM ERROR")

    operation, run = KERNELS[kernel]
    with use_backend("reference"):
        expected = run(operation)
    module = next(m for m in (apply, compress, dots, finite, inverse_root) if hasattr(m, f"_{kernel}_kernel"))
    monkeypatch.setattr(module, f"_{kernel}_kernel", fail)
    text = "^efcp: the definition runs in place of the kernels of numba, and is slower: LLVM ERROR$"
    with pytest.warns(RuntimeWarning, match=text) as warned:
        results = [run(operation) for _ in range(2)]
    assert len(warned) == 1
    assert kernels.backend_name(torch.device("cpu")) == "reference"
    for result in results:
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    forced = "^the backend 'cpu', which use_backend asks for, does not work: LLVM ERROR$"
    with use_backend("cpu"), pytest.raises(BackendError, match=forced):
        run(operation)


def test_a_kernel_that_does_not_compile_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise SystemError("no such instruction")

    monkeypatch.setattr(numba.core.lowering.Lower, "lower", fail)
    with pytest.raises(BackendError, match=r"^Numba cannot compile the kernels: SystemError: no such instruction"):
        five()
    assert list(folder.glob("*/*")) == []


# Steps in a process of their own.

STEPS = """
import sys, warnings
import torch
from efcp import EFCP, TopK
from efcp.kernels import backend_name, reference, use_backend

def steps():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5000, generator=generator))
    optimizer = EFCP([parameter], 0.1, TopK(), beta1=0.5, window=64)  # with beta1 it asks for norm_is_finite
    for _ in range(4):
        parameter.grad = parameter.detach() + torch.randn(5000, generator=generator)
        optimizer.step()
    return parameter.detach()

torch.set_num_threads(1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if sys.argv[1:]:  # operations that are not compiled, to save time
        from efcp.kernels import cpu
        for name in sys.argv[1:]:
            setattr(cpu, name, getattr(reference, name))
    actual = steps()
with use_backend("reference"):
    expected = steps()
torch.testing.assert_close(actual, expected)
print(backend_name(torch.device("cpu")), *(warning.message for warning in caught), sep="\\n")
"""


def run(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("EFCP_KERNELS", "PYTHONPATH")}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env={**variables, **environment}
    )


def backend_and_warning(script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> list[str]:
    finished = run(script, *arguments, cwd=cwd, **environment)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == 2, finished.stdout
    return lines


ALL_BUT_NORM_IS_FINITE = ("compress_", "window_dots", "window_apply_", "update_inverse_root_")
ALL_BUT_ROW_STEP = ("norm_is_finite", "compress_", "window_dots", "window_apply_")
LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size on this system")
def test_steps_where_a_file_cannot_be_written_to_its_end(tmp_path: Path) -> None:
    backend, warning = backend_and_warning(LIMIT + STEPS, *ALL_BUT_NORM_IS_FINITE, NUMBA_CACHE_DIR=str(tmp_path))
    assert backend == "cpu"
    assert warning.startswith("efcp: compiled kernels cannot be kept in ")
    assert str(tmp_path) in warning
    assert "OSError: " in warning
    assert list(tmp_path.glob("*/*")) == []


@pytest.mark.slow
def test_steps_where_no_folder_can_be_written(tmp_path: Path) -> None:
    for name in ("efcp", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "kernels" / "cpu" / "__pycache__"
    file.write_text("a file in place of the folder, below which nobody can write, whatever the permissions\n")
    places = dict.fromkeys(("NUMBA_CACHE_DIR", "HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(file / "below"))
    backend, warning = backend_and_warning(STEPS, *ALL_BUT_NORM_IS_FINITE, cwd=tmp_path, **places)
    assert backend == "cpu"
    assert warning.startswith("efcp: compiled kernels cannot be kept, and each process compiles them: RuntimeError: ")


def test_steps_where_numba_may_not_compile() -> None:
    backend, warning = backend_and_warning(STEPS, NUMBA_DISABLE_JIT="1")
    assert backend == "reference"
    assert warning == (
        "efcp: the definition runs in place of the kernels of numba, and is slower: "
        "ImportError: the environment variable NUMBA_DISABLE_JIT forbids Numba to compile"
    )


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("import numba.core.registry as r; del r.cpu_target", "ImportError: "),
        (
            "import numba.core.lowering as l; l.Lower.lower = lambda self: 1 / 0",
            "Numba cannot compile the kernels: ZeroDivisionError: ",
        ),
    ],
    ids=["internals", "compilation"],
)
def test_steps_where_numba_does_not_work(trouble: str, reason: str, tmp_path: Path) -> None:
    backend, warning = backend_and_warning(f"{trouble}\n{STEPS}", NUMBA_CACHE_DIR=str(tmp_path))
    assert backend == "reference"
    assert warning.startswith(f"efcp: the definition runs in place of the kernels of numba, and is slower: {reason}")


@pytest.mark.parametrize("package", ["numba", "llvmlite"])
def test_steps_where_an_import_fails(package: str, tmp_path: Path) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise SystemError('initialization failed')\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{STEPS}"
    backend, warning = backend_and_warning(script)
    assert backend == "reference"
    assert warning.endswith(": SystemError: initialization failed")


@pytest.mark.slow
def test_steps_where_the_cache_is_damaged(tmp_path: Path) -> None:
    first = run(STEPS, *ALL_BUT_ROW_STEP, NUMBA_CACHE_DIR=str(tmp_path))
    assert (first.returncode, first.stdout) == (0, "cpu\n"), first.stderr
    (file,) = tmp_path.glob("*/*")
    for number, damage in enumerate((a_few_bytes, truncated)):
        file.write_bytes(damage(file.read_bytes(), random.Random(number)))
        backend, warning = backend_and_warning(STEPS, *ALL_BUT_ROW_STEP, NUMBA_CACHE_DIR=str(tmp_path))
        assert backend == "cpu"
        assert warning.startswith("efcp: compiled kernels in ")
        assert warning.endswith(" is damaged")
