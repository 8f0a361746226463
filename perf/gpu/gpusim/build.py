"""Compile native code for the host, and keep it in a cache."""

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import triton
from triton._C import libtriton

from .host import find_compiler
from .native import NativeLaunch

HERE = Path(__file__).parent
HOST_CPU = "x86-64-v3"


def cached(name: str, key: bytes, build: Callable[[Path], None]) -> Path:
    """Path of a cached file or directory, which `build(path)` makes where it is missing.

    The cache is in GPUSIM_CACHE_DIR, or in `gpusim` in Triton's cache directory. Several processes may use it.
    """
    cache = Path(os.environ.get("GPUSIM_CACHE_DIR") or Path(triton.knobs.cache.dir) / "gpusim")
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}-{hashlib.sha256(_code_key() + key).hexdigest()[:20]}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / path.name
            build(made)
            try:
                made.replace(path)
            except OSError:
                if not path.exists():  # else another process was faster
                    raise
    return path


@functools.cache
def _code_key() -> bytes:
    """A part of the cache's keys. It changes with this package, so that code made by another version is not used."""
    sources = sorted([*HERE.glob("*.py"), HERE / "runtime.c"])
    return b"\0".join([triton.__version__.encode(), *(source.read_bytes() for source in sources)])


@functools.cache
def runtime() -> ctypes.PyDLL:
    """The library made from runtime.c. Its calls keep Python's global lock, as it runs one launch at a time."""
    flags = ("-O3", "-fPIC", "-fvisibility=hidden", f"-march={HOST_CPU}", "-std=gnu11")
    path = cached("runtime", b"", lambda made: _compile(*flags, HERE / "runtime.c", "-shared", "-o", made, "-lm"))
    library = ctypes.PyDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # global: the kernels' code resolves against it
    library.gs_launch.argtypes = [ctypes.POINTER(NativeLaunch)]
    return library


def build_ir(ir: str, folder: Path, fp_fusion: bool) -> None:
    """Compile LLVM IR for the host: writes kernel.so to a folder."""
    source, code = folder / "kernel.ll", folder / "kernel.o"
    source.write_text(ir)
    _run(sys.executable, HERE / "codegen.py", libtriton.__file__, source, code, HOST_CPU, fp_fusion)
    _compile("-shared", code, "-o", folder / "kernel.so", "-lm")
    code.unlink()


def _compile(*arguments: str | Path) -> None:
    compiler = find_compiler()
    assert compiler is not None  # simulate() has asked why_unavailable()
    _run(compiler, *arguments)


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)}\n{done.stderr}")
