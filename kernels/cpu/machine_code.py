"""Compiles kernels with Numba, and keeps their machine code on disk for the next process.

A kernel is loaded from the cache on disk. If it is not there, it is compiled and saved. Where the cache does not work,
the kernel is compiled for this process only, and one warning says why. Where compiling fails, `BackendError` says why,
and the definition runs in its place.

Numba's own cache has no checksums: from a damaged file, it would run whatever code that holds, or end the process. Here
code is loaded only if its checksum is right. Otherwise it is compiled again and replaces the damaged file.
"""

import pickle
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numba
from numba import cfunc, config, njit, types

from efcp.kernels.dispatch import BackendError

__all__ = ["Kernel", "cached_kernel", "compiled", "jit"]

if vars(config)["DISABLE_JIT"]:
    raise ImportError("the environment variable NUMBA_DISABLE_JIT forbids Numba to compile")

CHECKSUM_BYTES = sha256().digest_size

_has_warned = False


class Kernel(Protocol):
    """A compiled function with one argument, the address of a call (see `launch.py`)."""

    address: int
    ctypes: Callable[[int], None]  # releases the GIL


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiles a function that kernels call."""
    return njit(nogil=True, error_model="numpy", **options)(function)


def cached_kernel(*constants: object) -> Callable[[Callable[[int], None]], Kernel]:
    """A decorator that compiles a kernel, or loads its machine code from disk.

    The constants that a kernel is compiled for become part of its name. The name is a symbol in the machine code, and
    two kernels of the same name could get each other's code. The cache key also contains the variables of the enclosing
    function that the kernel uses. These must be numbers and types: other objects differ from process to process.

    Raises:
        BackendError: if it cannot be compiled.
    """

    def kernel(function: Callable[[int], None]) -> Kernel:
        function.__qualname__ = "-".join(map(str, [function.__name__, *constants]))
        return compiled(function, (types.int64,), types.void, error_model="numpy")

    return kernel


@cache
def _sources() -> str:
    """A hash of all files in this folder, as a kernel may be made from any of them."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def _warn_once(trouble: str, error: Exception) -> None:
    """Warns of trouble with the cache, only once: the same trouble comes with every kernel."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(f"efcp: {trouble}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=2)


@contextmanager
def _shown_on_terminal(text: str) -> Iterator[None]:
    """Shows a text while the context lasts, if stderr is a terminal. Writes nothing to logs."""

    def write(line: str) -> None:
        with suppress(Exception):  # stderr may be None, closed, or whatever a program has put in its place
            if sys.stderr.isatty():
                print(line, end="\r", file=sys.stderr, flush=True)

    write(text)
    try:
        yield
    finally:
        write(" " * len(text))


class CodeCache:
    """The cache in which Numba's `CFunc` looks for machine code before it compiles, and saves it afterwards.

    Each kernel is a file, named by the kernel and a hash of everything that its code depends on. So processes that
    write at the same time write different files, or files with equivalent code. A file is written under a temporary
    name and renamed when it is complete.

    Args:
        function: the kernel in Python.
        before_compiling: called when the code is not in the cache.

    Raises:
        RuntimeError: if Numba finds no writable folder for the cache.
    """

    def __init__(self, function: Callable[..., Any], before_compiling: Callable[[], object]) -> None:
        from numba.core.caching import FunctionCache  # not at the top: see `compiled`
        from numba.core.serialize import dumps

        self._numba, self._dumps = FunctionCache(function), dumps
        self._before_compiling = before_compiling

    def _path(self, signature: Any, codegen: Any) -> Path:
        implementation = self._numba._impl
        sources = implementation.locator.get_source_stamp(), _sources()
        key = repr((numba.__version__, *sources, self._numba._index_key(signature, codegen)))
        name = f"{implementation.filename_base}-{sha256(key.encode()).hexdigest()[:32]}.code"
        return Path(self._numba.cache_path, name)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """The compiled kernel, or None if the cache does not have it."""
        kernel = None
        try:
            target_context.refresh()
            path = self._path(signature, target_context.codegen())
            content = path.read_bytes()
            checksum, code = content[:CHECKSUM_BYTES], content[CHECKSUM_BYTES:]
            if sha256(code).digest() != checksum:
                raise ValueError(f"{path.name} is damaged")
            kernel = self._numba._impl.rebuild(target_context, pickle.loads(code))
        except FileNotFoundError:
            pass
        except Exception as error:
            _warn_once(f"compiled kernels in {self._numba.cache_path} cannot be used, and are compiled again", error)
        if kernel is None:
            self._before_compiling()
        return kernel

    def save_overload(self, signature: Any, kernel: Any) -> None:
        try:
            if kernel.library.has_dynamic_globals:
                raise ValueError("with these settings Numba makes code that holds addresses of this process")
            path = self._path(signature, kernel.codegen)
            code = self._dumps(self._numba._impl.reduce(kernel))
            _write(path, sha256(code).digest() + code)
        except Exception as error:
            folder = self._numba.cache_path
            _warn_once(f"compiled kernels cannot be kept in {folder}, and each process compiles them", error)


def _write(path: Path, content: bytes) -> None:
    """Writes a file so that other processes see all of it, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], result: Any, **options: Any) -> Any:
    """Compiles a function to one that C can call, or loads it from the cache.

    The cache uses internals of Numba. Where a version of Numba differs in these, the kernel is compiled through the
    public interface, without the cache.

    Args:
        function: the kernel in Python.
        arguments, result: Numba's types of its arguments and its result.
        options: of Numba's `cfunc`.

    Raises:
        BackendError: if Numba cannot compile it.
    """

    def announced() -> AbstractContextManager[None]:
        return _shown_on_terminal(f"efcp: compiling kernels for this CPU, up to a minute: {function.__name__} ...")

    trouble: Exception
    try:
        from numba.core.ccallback import CFunc

        with ExitStack() as stack:
            kernel: Any = CFunc(function, (arguments, result), {}, options)
            kernel._cache = CodeCache(function, before_compiling=lambda: stack.enter_context(announced()))
            kernel.compile()
        return kernel
    except Exception as error:
        trouble = error
    try:
        with announced():
            kernel = cfunc(result(*arguments), **options)(function)
    except Exception as error:
        raise BackendError(f"Numba cannot compile the kernels: {type(error).__name__}: {error}") from error
    _warn_once("compiled kernels cannot be kept, and each process compiles them", trouble)
    return kernel
