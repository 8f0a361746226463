"""The choice of a backend, by device and by what is installed; users can force one.

A backend is a module with all operations: four on sparse windows, one on dense windows, and one on the m × m matrices
of M-FAC. GPUs use `triton` and CPUs use `cpu`, where Triton or Numba is installed; everything else uses `reference`. If
an installed package turns out not to work, `reference` takes its place, and one warning says why. Where a single kernel
of Triton does not compile, this holds for its operation alone. The environment variable `EFCP_KERNELS` or the context
`use_backend` forces a backend; if that one does not work, it is an error.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efcp.kernels.addresses import is_fake

BACKENDS = {
    "reference": "efcp.kernels.reference",
    "triton": "efcp.kernels.triton",
    "cpu": "efcp.kernels.cpu",
}
FASTEST = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}  # the fastest backend, by type of device
PACKAGES = {"cpu": "numba", "triton": "triton"}  # the package that a backend needs

_forced: str | None = None
_broken: set[str] = set()  # backends that turned out not to work, and operations of them: "triton.compress_"


class BackendError(RuntimeError):
    """A backend does not work on this machine. It has not started the operation, so no tensor has changed."""


class KernelError(BackendError):
    """One kernel does not compile or load on this machine; others of its backend may. No tensor has changed."""


def _checked(name: str | None, source: str) -> str | None:
    if name not in (None, *BACKENDS):
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, run the operations of a backend on every device.

    Args:
        name: "reference", "triton" or "cpu"; it takes precedence over the variable `EFCP_KERNELS`. None forces nothing.

    Raises:
        ValueError: for another name.
    """
    global _forced
    before, _forced = _forced, _checked(name, "name")
    try:
        yield
    finally:
        _forced = before


@cache
def _module(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        BackendError: if it cannot be imported.
    """
    try:
        return importlib.import_module(BACKENDS[name])
    except Exception as error:  # a broken installation may raise anything
        raise BackendError(f"{type(error).__name__}: {error}") from error


def _replace(name: str, operation: str | None, error: BackendError) -> None:
    """From now on, the definition runs in place of a backend, or of one operation of it. Warns once."""
    _broken.add(name if operation is None else f"{name}.{operation}")
    warn_of_slower(f"the definition runs in place of {operation or 'the kernels'} of {PACKAGES[name]}", error)


def warn_of_slower(what: str, error: BackendError) -> None:
    """Warns that something slower runs, and why."""
    warnings.warn(f"efcp: {what}, and is slower: {error}", RuntimeWarning, stacklevel=3)


@cache
def _can_import(name: str) -> bool:
    """Whether a backend can be imported. Warns where its package is installed but does not work."""
    try:
        _module(name)
    except BackendError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError) and importlib.util.find_spec(PACKAGES[name]) is None
        if not missing:  # the package is installed, but broken
            _replace(name, None, error)
        return False
    return True


def _forced_name() -> str | None:
    return _forced or _checked(os.environ.get("EFCP_KERNELS") or None, "EFCP_KERNELS")


def _forced_by() -> str:
    return "use_backend" if _forced is not None else "the environment variable EFCP_KERNELS"


def backend_name(device: torch.device) -> str:
    """The backend for tensors on a device.

    Raises:
        ValueError: if the environment variable `EFCP_KERNELS` names no backend.
    """
    forced = _forced_name()
    if forced is not None:
        return forced
    fastest = FASTEST.get(device.type, "reference")
    return fastest if _can_import(fastest) and fastest not in _broken else "reference"


def is_fused(tensor: Tensor) -> bool:
    """Whether `mfac_row_step_` is one kernel for a tensor's device. A compiled graph holds it as one node."""
    if torch.compiler.is_compiling():
        return tensor.device.type in FASTEST
    return not is_fake(tensor) and backend_name(tensor.device) != "reference"


def run(operation: str, tensor: Tensor, *arguments: Any) -> Any:
    """Runs an operation with the backend for the device of `tensor`.

    Raises:
        BackendError: if a backend is forced and does not work.
    """
    name = "reference" if is_fake(tensor) else backend_name(tensor.device)
    forced = _forced_name() is not None
    if forced or f"{name}.{operation}" not in _broken:
        try:
            return getattr(_module(name), operation)(*arguments)
        except BackendError as error:
            if forced:
                text = f"the backend {name!r}, which {_forced_by()} asks for, does not work: {error}"
                raise BackendError(text) from error
            _replace(name, operation if isinstance(error, KernelError) else None, error)
    return getattr(_module("reference"), operation)(*arguments)
