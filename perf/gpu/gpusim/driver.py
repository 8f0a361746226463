"""A stand-in for Triton's CUDA driver.

Triton specialises and compiles a kernel as it would for the GPU that the driver names, PTX and cubin included. Where
the CUDA driver loads the cubin, this one lowers the kernel's LLVM IR for the host; a launch goes to the simulator.
The names and signatures are what Triton 3.4 to 3.9 expect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .errors import UnsupportedError
from .program import Program

if TYPE_CHECKING:
    from .simulator import Simulator

# What Triton or a kernel's wrapper may ask about a device, by architecture
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}

TRAFFIC_PER_MS = 2e9  # bytes, in the model for the autotuner


class Driver:
    """The stand-in for `triton.runtime.driver.active`, with all that Triton asks of it."""

    def __init__(self, simulator: "Simulator") -> None:
        arch = simulator.arch
        self.simulator = simulator
        self.device = f"gpusim:{arch}"  # Triton keys its caches by device, so every architecture is another device
        properties = {
            "max_shared_mem": SHARED_BYTES[arch],
            "multiprocessor_count": MULTIPROCESSORS[arch],
            "max_num_regs": 65536,
            "warpSize": 32,
        }
        self.utils = SimpleNamespace(
            # module, function, registers, spills, maximal threads; without a module Triton has nothing to unload
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
            get_device_properties=lambda device: properties,
        )
        self.launcher_cls = Launcher

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.simulator.arch, 32)

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        return self.modelled_time

    def modelled_time(self, call: Callable[[], object], quantiles: list[float] | None = None, **_: object) -> Any:
        """Milliseconds of a call, for `triton.autotune`: by its global memory traffic, without a measurement."""
        simulator = self.simulator
        before, counting = len(simulator.launches), simulator.counters
        simulator.counters = True
        try:
            call()
        finally:
            simulator.counters = counting
        counters = [launch.counters for launch in simulator.launches[before:]]
        milliseconds = sum(32 * c.global_memory.sectors for c in counters if c is not None) / TRAFFIC_PER_MS
        return [milliseconds] * len(quantiles) if quantiles else milliseconds


@contextmanager
def stand_in(driver: Any) -> Iterator[None]:
    """Within the context, Triton uses this driver, and looks for no GPU."""
    drivers = triton.runtime.driver
    name = "_active" if hasattr(drivers, "_active") else "active"  # 3.4 has only the latter; later ones look for a GPU
    before = getattr(drivers, name)
    drivers.set_active(driver)
    try:
        yield
    finally:
        setattr(drivers, name, before)


class Launcher:
    """Passes the launches of a kernel to the simulator. Triton makes one for every compiled kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        for name, wanted in (("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0)):
            if getattr(metadata, name, wanted) != wanted:
                raise UnsupportedError(f"{metadata.name}: {name}={getattr(metadata, name)}")
        llir = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.llir")
        if llir is None:
            raise RuntimeError(f"no LLVM IR of {metadata.name} in Triton's cache; is TRITON_STORE_BINARY_ONLY set?")
        self.program = Program(Path(llir).read_text(), metadata.name, metadata.enable_fp_fusion)
        self.signature, self.metadata = src.signature, metadata

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: None,
        packed_metadata: object,
        launch_metadata: object,
        enter_hook: object,
        exit_hook: object,
        *args: object,
    ) -> None:
        arguments = list(_flatten(list(self.signature), list(self.signature.values()), args))
        simulator = triton.runtime.driver.active.simulator
        simulator.launch(self.program, self.metadata, (grid_x, grid_y, grid_z), arguments)


def _flatten(names: list[str], types: Any, args: Any) -> Iterator[tuple[str, object]]:
    """Name and value of the arguments that the compiled kernel takes: no constexpr, tuples flattened."""
    for name, ty, arg in zip(names, types, args, strict=True):
        if isinstance(ty, tuple):
            yield from _flatten([f"{name}[{i}]" for i in range(len(ty))], ty, arg)
        elif ty.startswith("tensordesc"):
            raise UnsupportedError("tensor descriptors (TMA)")
        elif ty != "constexpr":
            yield name, arg
