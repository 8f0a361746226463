"""The operations of a step: one definition each, faster versions, and the choice between them.

| file | what |
|---|---|
| `blocks.py` | the layout: blocks, rows, padding |
| `addresses.py` | what a tensor must be for compiled code to read and write it |
| `reference.py` | the definition, in PyTorch |
| `triton_ops/` | Triton kernels, for GPUs |
| `cpu.py` | compiled by Numba, for CPUs |
| `machine_code.py` | compiles the kernels of `cpu.py`, and keeps what is compiled on disk |
| `operators.py` | the operations as nodes of a compiled graph |

A backend is a module with all operations: four of the sparse window, and one of the m × m matrices of M-FAC. On a GPU
it is `triton`, on a CPU `cpu`, where Triton or Numba is installed; else it is `reference`. If the installation turns
out not to work, `reference` takes its place, and one warning says why. The environment variable `EFCP_KERNELS`, or
`use_backend`, forces a backend; one that does not work is then an error.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from efcp.kernels import operators, reference
from efcp.kernels.addresses import has_plain_storage, is_fake
from efcp.kernels.blocks import MAX_BLOCK_SIZE, Blocks, Rows
from efcp.kernels.reference import accumulation_dtype

__all__ = [
    "BACKENDS",
    "MAX_BLOCK_SIZE",
    "BackendError",
    "Blocks",
    "Rows",
    "accumulation_dtype",
    "all_finite",
    "backend_name",
    "compress_",
    "has_plain_storage",
    "is_fake",
    "update_inverse_root_",
    "use_backend",
    "window_apply_",
    "window_dots",
]

BACKENDS = {
    "reference": "efcp.kernels.reference",
    "triton": "efcp.kernels.triton_ops",
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


def _run(operation: str, tensor: Tensor, *arguments: Any) -> Any:
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
    return getattr(reference, operation)(*arguments)


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether gradients can be compressed: no Inf, no NaN, and a squared norm that does not overflow.

    Args:
        grads: at least one, each (n,) contiguous, of one floating point dtype and on one device.

    Returns:
        () bool: whether the sum of all squares is finite in the dtype of arithmetic, `accumulation_dtype`.
    """
    if torch.compiler.is_compiling():
        return reference.all_finite(grads)
    return _run("all_finite", grads[0], grads)


def compress_(
    grads: Sequence[Tensor | None], errors: Sequence[Tensor], rows: Sequence[Rows], slot: Tensor, finite: Tensor
) -> None:
    """Blockwise Top-k with error feedback: a = e + g, the newest row c = Top-k(a), e = a − c.

    Of each block the k elements of largest magnitude are kept; of equal ones those at lower positions. The row is
    written to the window rounded to its dtype, and the error keeps what the rounding leaves. Where `finite` is false,
    the row is zero and the error stays as it was. (EFCP, arXiv 2306.06098, algorithm 1.)

    As in the other operations, there may be many parameters: with the same dtypes, block size, density and window, and
    on one device. There is at least one.

    Args:
        grads: of each parameter (n,) contiguous, floating point; never changed. None makes the values of the row zero,
            and nothing else.
        errors: of each parameter (n,) contiguous, floating point, updated in place; empty for no error feedback,
            that is a = g.
        rows: of each parameter, (blocks, m, k); row `slot` is overwritten.
        slot: (1,) int64, the row to write, on the device of the others.
        finite: () bool, on the device of the others.
    """
    if torch.compiler.is_compiling():
        operators.compress_(grads, errors, *operators.unpacked(rows), slot, finite)
    else:
        _run("compress_", slot, grads, errors, rows, slot, finite)


def window_dots(rows: Sequence[Rows], slot: Tensor) -> Tensor:
    """Inner products of every row of the window with row `slot`: one row of the Gram matrix S = G Gᵀ.

    Args:
        rows: of each parameter, (blocks, m, k).
        slot: (1,) int64, on the window's device.

    Returns:
        (m,) float64, summed over the parameters.
    """
    if torch.compiler.is_compiling():
        return operators.window_dots(*operators.unpacked(rows), slot)
    return _run("window_dots", slot, rows, slot)


def window_apply_(
    targets: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rows: Sequence[Rows],
    weights: Tensor,
    scale: Tensor,
    step: Tensor,
    decay: Tensor,
) -> None:
    """target ← scale · target + step · u with u = Σᵢ weightsᵢ · Gᵢ, and with momentum in place of u where there is.

    That is, with heavy ball: momentum ← decay · momentum + u, target ← scale · target + step · momentum.

    Args:
        targets: of each parameter (n,) contiguous, floating point, updated in place. Arithmetic is in float32 (float64
            for float64 targets), rounded once at the end.
        momenta: of each parameter (n,) contiguous, floating point, updated in place; empty for none.
        rows: of each parameter, (blocks, m, k): the rows Gᵢ of the window.
        weights: (m,) floating point, on the targets' device.
        scale, step, decay: () floating point, on the targets' device. Without momenta `decay` is not used.
    """
    if torch.compiler.is_compiling():
        operators.window_apply_(targets, momenta, *operators.unpacked(rows), weights, scale, step, decay)
    else:
        _run("window_apply_", weights, targets, momenta, rows, weights, scale, step, decay)


def update_inverse_root_(R: Tensor, column: Tensor, S: Tensor, slot: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Makes R, RᵀR = (ridge · I + S)⁻¹, follow a change of row and column `slot` of S, in O(m²).

    With t the slot: a Householder reflection of R from the left, which leaves RᵀR as it is, moves all of column t to
    row t. Without that row and column, RᵀR is the inverse of the matrix without its row and column t. The new column s,
    s_t on the diagonal, then adds the row (−sᵀRᵀR, 1 at t) / √σ with σ = ridge + s_t − ‖Rs‖², the Schur complement,
    which is at least the ridge.

    This is a square-root filter. Updates of the inverse itself lose twice as many digits: on windows of dependent rows
    its error grows without bound where squared norms of gradients are 10⁸ λ.

    Args:
        R: (m, m) float64, contiguous, changed in place.
        column: (m,) float64, contiguous, column t of RᵀR, with which one pass over R is enough; becomes that of slot
            (t + 1) mod m.
        S: (m, m) float64, contiguous, already with its new row and column.
        slot: (1,) int64.
        ridge: mλ.

    Returns:
        x, column t of RᵀR, and by how much it is not that of the inverse, e_t − (ridge · I + S) x: (m,) each.
    """
    if torch.compiler.is_compiling():
        return operators.update_inverse_root_(R, column, S, slot, ridge)
    return _run("update_inverse_root_", R, R, column, S, slot, ridge)
