"""Which backend runs an operation."""

import importlib
import subprocess
import sys

import pytest
import torch

from efcp import kernels
from efcp.kernels import BACKENDS, BackendError, Blocks, SparseRows, Update, backend_name, dispatch, use_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("EFCP_KERNELS", raising=False)


@pytest.mark.parametrize(("device", "package", "name"), [(CPU, "numba", "cpu"), (CUDA, "triton", "triton")], ids=str)
def test_the_compiled_backend_of_a_device_runs(device, package, name):
    pytest.importorskip(package)
    assert backend_name(device) == name


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_the_definition_runs_without_a_compiled_backend(monkeypatch, device):
    monkeypatch.setattr(dispatch, "_can_import", lambda name: False)
    assert backend_name(device) == "reference"


@pytest.fixture
def importing(monkeypatch):
    """What happens when a backend is imported, as if none had been before."""

    def forget():
        dispatch._module.cache_clear()
        dispatch._can_import.cache_clear()

    def fail_with(error):
        def fail(name):
            if name == BACKENDS["reference"]:
                return kernels.reference
            raise error

        forget()
        monkeypatch.setattr(importlib, "import_module", fail)

    monkeypatch.setattr(dispatch, "_broken", set())
    yield fail_with
    forget()


@pytest.mark.parametrize(("device", "package"), [(CPU, "numba"), (CUDA, "triton")], ids=str)
@pytest.mark.parametrize(
    "error",
    [
        ImportError("Numba needs NumPy 2.4 or less"),
        ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"),
        AttributeError("module 'numpy' has no attribute 'long'"),
        OSError("libllvmlite.so: cannot open shared object file"),
        RuntimeError("driver too old"),
        SystemError("initialization of _dispatcher failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_definition_runs_where_an_import_fails_and_one_warning_says_why(
    importing, monkeypatch, error, device, package
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # it is installed
    importing(error)
    text = f"^efcp: the definition runs in place of the kernels of {package}, and is slower: {type(error).__name__}: "
    with pytest.warns(RuntimeWarning, match=text + str(error)) as warned:
        assert [backend_name(device) for _ in range(2)] == ["reference"] * 2
    assert len(warned) == 1


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_is_not_installed_is_not_warned_of(importing, monkeypatch, recwarn, device):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    importing(ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"))
    assert backend_name(device) == "reference"
    assert not recwarn


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_forced_backend_that_cannot_be_imported_is_an_error(importing, monkeypatch, recwarn, name):
    importing(OSError("broken"))
    text = f"^the backend '{name}', which use_backend asks for, does not work: OSError: broken$"
    with use_backend(name), pytest.raises(BackendError, match=text):
        kernels.norm_is_finite([torch.ones(3)])
    monkeypatch.setenv("EFCP_KERNELS", name)
    with pytest.raises(BackendError, match=text.replace("use_backend", "the environment variable EFCP_KERNELS")):
        kernels.norm_is_finite([torch.ones(3)])
    assert not recwarn


def test_the_definition_runs_on_other_devices():
    assert backend_name(torch.device("meta")) == "reference"


@pytest.mark.parametrize("name", BACKENDS)
def test_the_environment_forces_a_backend(monkeypatch, name):
    monkeypatch.setenv("EFCP_KERNELS", name)
    assert backend_name(CPU) == backend_name(CUDA) == name


def test_an_empty_variable_forces_none(monkeypatch):
    monkeypatch.setenv("EFCP_KERNELS", "")
    assert backend_name(torch.device("meta")) == "reference"


def test_use_backend_goes_before_the_environment_and_ends(monkeypatch):
    monkeypatch.setenv("EFCP_KERNELS", "triton")
    with use_backend("reference"):
        assert backend_name(CUDA) == "reference"
        with use_backend("triton"):
            assert backend_name(CPU) == "triton"
        assert backend_name(CUDA) == "reference"
        with use_backend(None):
            assert backend_name(CPU) == "triton"
    assert backend_name(CPU) == "triton"


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert backend_name(CPU) != "triton"


def test_a_wrong_name_is_refused(monkeypatch):
    allowed = f"must be one of {', '.join(BACKENDS)}, got 'cudnn'"
    with pytest.raises(ValueError, match=f"^name {allowed}$"), use_backend("cudnn"):
        pass
    assert backend_name(CPU) in BACKENDS
    monkeypatch.setenv("EFCP_KERNELS", "cudnn")
    with pytest.raises(ValueError, match=f"^EFCP_KERNELS {allowed}$"):
        backend_name(CPU)


def test_operations_go_to_the_backend(monkeypatch):
    rows = [SparseRows(torch.zeros(3, 2, 2), torch.zeros(3, 2, 2, dtype=torch.uint8), Blocks(10, 4, 0.5))]
    slot, one, x = torch.tensor([0]), torch.tensor(1.0), [torch.zeros(10)]
    calls = {
        "norm_is_finite": (x,),
        "compress_": (x, [], rows, slot, []),
        "undo_compress_": (x, [], rows, slot, torch.tensor(True), []),
        "window_dots": (rows, slot, ()),
        "average_": (x, x, 0.9, torch.tensor(True)),
        "window_apply_": (x, [], rows, Update(torch.zeros(2), one, one)),
        "update_inverse_root_": (torch.eye(2), torch.ones(2), torch.eye(2), slot, 0.5),
    }
    for name, arguments in calls.items():
        received = []
        monkeypatch.setattr(f"efcp.kernels.reference.{name}", lambda *args, received=received: received.append(args))
        with use_backend("reference"):
            getattr(kernels, name)(*arguments)
        assert len(received) == 1
        assert all(a is b for a, b in zip(received[0], arguments, strict=True))


def test_works_without_triton_and_numba():
    script = """
import sys

sys.modules["triton"] = sys.modules["numba"] = None  # import fails from now on
import torch
from efcp.kernels import Blocks, SparseRows, Update, backend_name
from efcp.kernels import compress_, norm_is_finite, undo_compress_, window_apply_, window_dots

assert backend_name(torch.device("cuda", 0)) == backend_name(torch.device("cpu")) == "reference"
rows = [SparseRows(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2, dtype=torch.uint8), Blocks(5, 4, 0.5))]
slot, grad, one = torch.tensor([0]), torch.tensor([1.0, -3.0, 2.0, 0.0, 4.0]), torch.tensor(1.0)
finite = compress_([grad], [], rows, slot)
assert finite and norm_is_finite([grad])
undo_compress_([grad], [], rows, slot, finite)
assert window_dots(rows, slot).tolist() == [29.0]
window_apply_([grad], [], rows, Update(-torch.ones(1), one, one))
assert grad.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
