"""The GPU that tensors are on, as Triton describes it, and launches of single kernels on it.

Triton asks about the current GPU and launches on it. Here, both are the GPU of the tensors: a machine may have several,
of different kinds.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from efcp.kernels.dispatch import BackendError, KernelError

LONGEST = 300  # characters of a reason


def target_of(device: torch.device) -> Any:
    """Triton's description of a device: its backend ("cuda" or "hip"), arch and warp_size.

    Raises:
        BackendError: where Triton finds no GPU.
    """
    if device.type == "cuda":
        return _target_of_gpu(device.index)
    return _current_target()


@cache
def _target_of_gpu(index: int) -> Any:
    with torch.cuda.device(index):
        return _current_target()


def _current_target() -> Any:
    try:
        return triton.runtime.driver.active.get_current_target()
    except RuntimeError as error:
        raise BackendError(f"Triton finds no GPU: {error}") from error


def warp_size(device: torch.device) -> int:
    """Threads of a warp of a GPU."""
    return 32 if triton.knobs.runtime.interpret else int(target_of(device).warp_size)


def at_most_registers(number: int, device: torch.device) -> dict[str, int]:
    """The launch option that lets a thread use at most so many registers; empty where there is no such option."""
    if triton.knobs.runtime.interpret or target_of(device).backend != "cuda":
        return {}
    return {"maxnreg": number}


def launch_kernel(
    kernel: Any, grid: Sequence[int], on: Tensor, *arguments: Any, enable_fp_fusion: bool, **options: Any
) -> None:
    """Launches a kernel on the GPU of a tensor.

    Args:
        kernel: a function that Triton compiles.
        grid: the number of programs, in one or two dimensions.
        on: a tensor on the GPU.
        arguments: those of the kernel.
        enable_fp_fusion: whether a multiplication and an addition may become one operation, rounded once. Triton's
            default depends on its version.
        options: compile-time arguments, and other options of the launch.

    Raises:
        KernelError: if the kernel cannot be compiled or loaded. It has not been launched then.
    """
    options["enable_fp_fusion"] = enable_fp_fusion
    with torch.cuda.device_of(on):
        try:
            kernel[tuple(grid)](*arguments, **options)
        except Exception as error:  # of any kind: Triton's, LLVM's, or the assembler's
            if reason := _why_not_compiled(kernel, grid, on, arguments, options):
                raise KernelError(reason) from error
            raise


def _why_not_compiled(
    kernel: Any, grid: Sequence[int], on: Tensor, arguments: Sequence[Any], options: dict[str, Any]
) -> str | None:
    """Why a kernel whose launch has failed cannot be compiled or loaded, in words; None if it can be."""
    if triton.knobs.runtime.interpret:
        return None
    target_of(on.device)
    try:
        _ = kernel.warmup(*arguments, grid=tuple(grid), **options).run  # compiles, and then loads it
    except TypeError:  # of the arguments
        return None
    except Exception as trouble:
        error: BaseException = trouble
        while error.__cause__ is not None:  # Triton's own errors quote the kernel's source, and this says what is wrong
            error = error.__cause__
        text = " ".join(str(getattr(error, "error_message", None) or error).split())[:LONGEST]
        versions = f"triton {triton.__version__} and torch {torch.__version__}"
        return f"{kernel.__name__} does not compile with {versions}: {type(error).__name__}: {text}"
    return None
