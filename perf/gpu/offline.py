"""Compiles kernels for a GPU that is not there, and reads from the binaries which resources they need.

    with compile_for(GPUTarget("hip", "gfx942", 64)) as compiled:
        compress_(grad, error, values, indices, slot, finite, blocks)
    print(compiled[0].registers)

Launchers run as they are, on CPU or meta tensors: Triton specialises and compiles for the target as for a real launch,
but nothing is executed. Works for NVIDIA GPUs (`ptxas` comes with Triton) and AMD GPUs (LLVM does).
"""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from efcp.perf.gpu.gpusim.driver import stand_in

__all__ = ["Compiled", "GPUTarget", "compile_for"]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, and what it occupies."""

    name: str
    target: GPUTarget
    num_warps: int
    registers: int  # of a thread: vector registers on AMD, with those for accumulation
    spilled: int  # of a thread, bytes of (vector) registers; on AMD also those kept in accumulation registers
    spilled_scalars: int  # of a warp, bytes: on AMD, scalar registers in lanes of a vector register, not in memory
    stack: int  # of a thread, bytes in memory, spilled registers included
    shared: int  # of a program, bytes
    constants: dict[str, Any] = field(repr=False)  # compile-time arguments, and others that Triton made constant
    seconds: float | None  # to compile; None where the kernel came from Triton's cache
    stages: dict[str, Path] = field(repr=False)  # what the compiler wrote: ttir, ttgir, llir, ptx or amdgcn, ...


@contextmanager
def compile_for(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Within the context, launches compile for a target and do nothing more.

    Yields:
        A list to which every kernel is added when it is first launched within the context.

    Raises:
        RuntimeError: where kernels are interpreted, not compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    driver = _Driver(target)
    with stand_in(driver), triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = driver.note_time
        yield driver.compiled


class _Driver:
    """A stand-in for `triton.runtime.driver.active`, with all that Triton asks of it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.compiled: list[Compiled] = []
        self.hashes: set[str] = set()
        self.seconds: dict[str, float] = {}  # by hash
        self.launcher_cls = _Launcher
        self.utils = SimpleNamespace(
            # module, function, registers, spills, most threads of a program; nothing is loaded
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
            # No limit here: whoever reads `shared` decides what is too much.
            get_device_properties=lambda device: {"max_shared_mem": 1 << 30},
        )

    def note_time(self, *, metadata: dict[str, Any], times: Any, cache_hit: bool, **rest: object) -> None:
        """Notes how long a kernel took; Triton calls it after compiling one, or finding it in its cache."""
        if not cache_hit:
            self.seconds[metadata["hash"]] = times.total / 1e6

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keeps kernels by device, and their files in a folder that may change.
        return f"offline:{self.target.arch}:{triton.knobs.cache.dir}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Launcher:
    """Notes a kernel that is launched. Triton makes one for each compiled kernel, and calls it for each launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, *launch: object) -> None:
        driver: Any = triton.runtime.driver.active
        if self.metadata.hash not in driver.hashes:
            driver.hashes.add(self.metadata.hash)
            driver.compiled.append(_compiled(self.source, self.metadata, driver.seconds.get(self.metadata.hash)))


def _compiled(source: Any, metadata: Any, seconds: float | None) -> Compiled:
    files = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
    stages = {Path(path).suffix[1:]: Path(path) for path in files.values()}
    read = _read_hip if metadata.target.backend == "hip" else _read_cuda
    arguments = source.fn.arg_names
    constants = {".".join([arguments[path[0]], *map(str, path[1:])]): value for path, value in source.constants.items()}
    return Compiled(
        name=metadata.name,
        target=metadata.target,
        num_warps=metadata.num_warps,
        shared=metadata.shared,
        constants=constants,
        seconds=seconds,
        stages=stages,
        **read(stages),
    )


def _read_cuda(stages: dict[str, Path]) -> dict[str, int]:
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(stages["cubin"])]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    stack = found["STACK"] + found["LOCAL"]
    # Kernels have no calls and no arrays, so what they keep on a stack are spilled registers.
    return {"registers": found["REG"], "spilled": stack, "spilled_scalars": 0, "stack": stack}


def _read_hip(stages: dict[str, Path]) -> dict[str, int]:
    text = stages["amdgcn"].read_text()  # the kernel's metadata are at its end
    found = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return {
        "registers": found["vgpr_count"],
        "spilled": 4 * found["vgpr_spill_count"],
        "spilled_scalars": 4 * found["sgpr_spill_count"],
        "stack": found["private_segment_fixed_size"],
    }
