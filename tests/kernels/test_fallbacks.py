"""What runs where a Triton kernel does not compile, and where there is no GPU."""

from contextlib import contextmanager

import pytest
import torch

from efcp import kernels
from efcp.kernels import BackendError, dispatch, use_backend
from efcp.perf.gpu.gpusim import SimulationError, simulate, why_unavailable
from tests.kernels.kernel_cases import Case, check_apply, check_compress, check_dots

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

from efcp.kernels import triton as triton_ops
from efcp.kernels.triton import apply, compress, dots, gpu, portable

CASE = Case(700, 256, 0.05, window=4)
OPERATIONS = {  # the check of each, the modules with its kernels, the names of these
    "compress_": (check_compress, [(compress, "_compress_kernel")]),
    "window_dots": (check_dots, [(dots, "_dots_kernel"), (portable, "_portable_dots_kernel")]),
    "window_apply_": (check_apply, [(apply, "_apply_kernel"), (portable, "_portable_apply_kernel")]),
}
VERSIONS = f"with triton {triton.__version__} and torch {torch.__version__}: ".replace("+", r"\+")


class Uncompilable:
    """A kernel that the compiler of this version refuses."""

    def __init__(self, name):
        self.__name__, self.compilations = name, 0

    def __getitem__(self, grid):
        return self.warmup

    def warmup(self, *arguments, **options):
        self.compilations += 1
        raise RuntimeError("PassManager::run failed")


@pytest.fixture(autouse=True)
def nothing_broken(monkeypatch):
    monkeypatch.delenv("EFCP_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "_broken", set())
    monkeypatch.setattr(triton_ops, "_broken", set())
    monkeypatch.setitem(dispatch.FASTEST, "cpu", "triton")


def break_kernels(monkeypatch, kernels):
    broken = [Uncompilable(name) for _, name in kernels]
    for (module, name), kernel in zip(kernels, broken, strict=True):
        monkeypatch.setattr(module, name, kernel)
    return broken


def check(name):
    with simulate(90) as simulator:
        OPERATIONS[name][0](getattr(kernels, name), CASE, simulator.allow)
        return [launch.kernel for launch in simulator.launches]


@pytest.mark.parametrize("name", ["window_dots", "window_apply_"])
@pytest.mark.filterwarnings("default")
def test_the_portable_kernel_runs_in_place_of_one_in_gluon(monkeypatch, name):
    (module, kernel), (_, substitute) = OPERATIONS[name][1]
    (broken,) = break_kernels(monkeypatch, [(module, kernel)])
    text = f"^efcp: the portable kernel of {name} runs in place of that in Gluon, and is slower: {kernel} "
    with pytest.warns(RuntimeWarning, match=f"{text}does not compile {VERSIONS}RuntimeError: PassManager") as warned:
        launched = check(name)
    assert len(warned) == 1
    assert substitute in launched
    assert broken.compilations == 2  # when it was launched, and to see why that failed; never again


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("default")
def test_the_definition_runs_in_place_of_an_operation_whose_kernels_do_not_compile(monkeypatch, name):
    broken = break_kernels(monkeypatch, OPERATIONS[name][1])
    text = f"^efcp: the definition runs in place of {name} of triton, and is slower: {broken[-1].__name__} "
    with pytest.warns(RuntimeWarning, match=f"{text}does not compile {VERSIONS}") as warned:
        check(name)
    assert len(warned) == len(broken)
    other = next(other for other in OPERATIONS if other != name)
    assert len(check(other)) > 0  # others still have kernels


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.filterwarnings("default")
def test_a_kernel_of_a_forced_backend_that_does_not_compile_is_an_error(monkeypatch, name):
    break_kernels(monkeypatch, OPERATIONS[name][1])
    text = "^the backend 'triton', which use_backend asks for, does not work: .* does not compile with triton "
    with use_backend("triton"), pytest.raises(BackendError, match=text):
        check(name)


@triton.jit
def _store_kernel(x, SIZE: tl.constexpr):
    tl.store(x + tl.arange(0, SIZE), 1.0)


def test_a_kernel_that_fails_while_it_runs_is_an_error_of_its_own():
    """Its tensors may have changed."""
    with simulate(90), pytest.raises(SimulationError, match="offset 64"):
        gpu.launch_kernel(_store_kernel, (1,), torch.zeros(16), torch.zeros(16), SIZE=32, enable_fp_fusion=True)


def test_wrong_arguments_are_an_error_of_their_own():
    with simulate(90), pytest.raises(TypeError):
        gpu.launch_kernel(_store_kernel, (1,), torch.zeros(16), SIZE=32, enable_fp_fusion=True)


@triton.jit
def _wrong_kernel(x):
    tl.store(x, tl.no_such_function())


def test_a_message_says_what_the_compiler_says():
    text = f"^_wrong_kernel does not compile {VERSIONS}.*no_such_function"
    with simulate(90), pytest.raises(dispatch.KernelError, match=text):
        gpu.launch_kernel(_wrong_kernel, (1,), torch.zeros(16), torch.zeros(16), enable_fp_fusion=True)


@contextmanager
def no_gpu():
    class Driver:
        def __getattr__(self, name):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Driver())
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


@pytest.mark.parametrize("by", ["use_backend", "the environment variable EFCP_KERNELS"])
def test_triton_without_a_gpu_is_an_error_that_says_so(monkeypatch, by):
    if by != "use_backend":
        monkeypatch.setenv("EFCP_KERNELS", "triton")
    text = f"^the backend 'triton', which {by} asks for, does not work: Triton finds no GPU: 0 active drivers"
    grad, rows, slot = CASE.gradient(), CASE.random_window(), torch.tensor([0])
    with no_gpu(), use_backend("triton" if by == "use_backend" else None):
        with pytest.raises(BackendError, match=text):
            kernels.norm_is_finite([grad])
        with pytest.raises(BackendError, match=text):
            kernels.compress_([grad], [], [rows], slot)
        with pytest.raises(BackendError, match=text):
            kernels.window_dots([rows], slot)


def test_each_of_several_gpus_is_asked_about_itself(monkeypatch):
    current = [0]

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Driver:
        def get_current_target(self):
            return ["old", "new"][current[0]]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    gpu._target_of_gpu.cache_clear()
    try:
        found = [gpu.target_of(torch.device("cuda", index)) for index in (1, 0, 1)]
    finally:
        gpu._target_of_gpu.cache_clear()
    assert found == ["new", "old", "new"]
    assert current == [0]
