"""The choice of a backend: by device, by what is installed and works, or as it is forced.

A backend is a module with all operations: four of the sparse window, one of the dense one, and one of the m × m
matrices of M-FAC. On a GPU it is `triton`, on a CPU `cpu`, where Triton or Numba is installed; else it is `reference`.
If the installation turns out not to work, `reference` takes its place, and one warning says why. The environment
variable `EFCP_KERNELS`, or `use_backend`, forces a backend; one that does not work is then an error.
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
FASTEST = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}  # by type of device
PACKAGES = {"cpu": "numba", "triton": "triton"}  # with which they are made

_forced: str | None = None
_broken: set[str] = set()  # backends that were chosen, and turned out not to work


class BackendError(RuntimeError):
    """A backend does not work here. What it was asked for has not begun: no tensor is changed."""


def _checked(name: str | None, source: str) -> str | None:
    if name not in (None, *BACKENDS):
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, run the operations of a backend on every device.

    Args:
        name: "reference", "triton", "cpu" or None, which leaves the choice to the device. It goes before the variable
            `EFCP_KERNELS`.

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
    """A backend.

    Raises:
        BackendError: if it cannot be imported.
    """
    try:
        return importlib.import_module(BACKENDS[name])
    except Exception as error:  # a broken installation may raise anything
        raise BackendError(f"{type(error).__name__}: {error}") from error


def _replace(name: str, error: BackendError) -> None:
    """Leaves what a backend should do to the definition from now on."""
    _broken.add(name)
    text = f"efcp: the definition runs in place of the kernels of {PACKAGES[name]}, and is slower: {error}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@cache
def _can_import(name: str) -> bool:
    """Whether what a backend is made with is installed, and works."""
    try:
        _module(name)
    except BackendError as error:
        missing = isinstance(error.__cause__, ModuleNotFoundError) and importlib.util.find_spec(PACKAGES[name]) is None
        if not missing:  # it is installed, and broken
            _replace(name, error)
        return False
    return True


def _forced_name() -> str | None:
    return _forced or _checked(os.environ.get("EFCP_KERNELS") or None, "EFCP_KERNELS")


def backend_name(device: torch.device) -> str:
    """The backend for tensors on a device.

    Raises:
        ValueError: if the environment variable `EFCP_KERNELS` names none.
    """
    forced = _forced_name()
    if forced is not None:
        return forced
    fastest = FASTEST.get(device.type, "reference")
    return fastest if _can_import(fastest) and fastest not in _broken else "reference"


def run(operation: str, tensor: Tensor, *arguments: Any) -> Any:
    """Calls an operation of the backend for the device of a tensor.

    Raises:
        BackendError: if a backend that is forced does not work.
    """
    name = "reference" if is_fake(tensor) else backend_name(tensor.device)
    try:
        return getattr(_module(name), operation)(*arguments)
    except BackendError as error:
        if _forced_name() is not None:
            raise BackendError(f"the backend {name!r}, which is forced, does not work: {error}") from error
        _replace(name, error)
    return getattr(_module("reference"), operation)(*arguments)
