"""Defines `simulate`, and runs the launches inside it."""

import ctypes
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .arguments import Extent, extent, merge, pack
from .build import runtime
from .counters import Access, Counters, Launch
from .driver import SHARED_BYTES, Driver, stand_in
from .errors import (
    DataRaceError,
    DeadlockError,
    DeviceAssertError,
    MisalignedError,
    OutOfBoundsError,
    SimulationError,
)
from .host import why_unavailable
from .native import MANY, Failure, Flag, NativeCount, NativeLaunch, NativeRegion
from .program import Program

Grid = tuple[int, int, int]


@contextmanager
def simulate(
    arch: int = 90,
    *,
    check_races: bool = False,
    counters: bool = False,
    schedule: int | None = None,
    drop_barriers: bool | Collection[int] = (),
    time_limit: float = 20.0,
) -> Iterator["Simulator"]:
    """Kernels that are launched inside the `with` block run on CPU tensors, as compiled for a GPU.

    Args:
        arch: compute capability without the dot: 80, 86, 89, 90, 100, 103 or 120
        check_races: report unordered accesses to a byte by two CTAs, or by two warps to shared memory
        counters: count the accesses to memory
        schedule: seed of a random order of CTAs, warps and lanes; None is a fixed order
        drop_barriers: numbers of barriers that do nothing, in program order, or True for all
        time_limit: seconds for one CTA, after which it counts as deadlocked

    Raises:
        RuntimeError: there is no simulation here; `why_unavailable` says why.
        ValueError: the architecture is unknown.

    A launch raises a SimulationError if the kernel does something wrong, and an UnsupportedError if the simulator
    cannot run it.
    """
    if reason := why_unavailable():
        raise RuntimeError(reason)
    if arch not in SHARED_BYTES:
        raise ValueError(f"arch must be one of {sorted(SHARED_BYTES)}, not {arch!r}")
    simulator = Simulator(arch, check_races, counters, schedule, drop_barriers, time_limit)
    with stand_in(Driver(simulator)):
        yield simulator


@dataclass
class Simulator:
    """What `simulate` yields: its options, and a record of the launches."""

    arch: int
    check_races: bool
    counters: bool
    schedule: int | None
    drop_barriers: bool | Collection[int]
    time_limit: float
    launches: list[Launch] = field(default_factory=list)
    allowed: list[torch.Tensor] = field(default_factory=list)

    @property
    def last_counters(self) -> Counters:
        """Counters of the latest launch.

        Raises:
            ValueError: nothing has been launched, or it was not counted.
        """
        if not self.launches or self.launches[-1].counters is None:
            raise ValueError("no launch, or simulate() without counters=True")
        return self.launches[-1].counters

    def allow(self, *tensors: torch.Tensor) -> None:
        """Let kernels touch tensors that they reach by other ways than their arguments, such as a table of pointers."""
        self.allowed += tensors

    def launch(self, program: Program, metadata: Any, grid: Grid, arguments: list[tuple[str, object]]) -> None:
        """Run a kernel.

        Args:
            program: the kernel
            metadata: Triton's; name, num_warps and shared are used
            grid: numbers of CTAs
            arguments: names and values of what the compiled kernel takes
        """
        if max(grid) >= 2**31 or min(grid) < 0 or max(grid[1:]) > 65535:
            raise ValueError(f"{metadata.name}: grid {grid} is not allowed on a GPU")
        if 0 in grid:
            return  # as the CUDA launcher does
        tensors = {name: value for name, value in arguments if isinstance(value, torch.Tensor)}
        extents = merge([*(extent(t) for t in [*tensors.values(), *self.allowed]), *program.tables])
        values = [value for _, value in arguments]
        values += [0] * (len(program.params) - len(values))  # pointers to scratch memory, which is empty
        slots = [pack(value, ty) for value, ty in zip(values, program.params, strict=True)]
        args = (ctypes.c_uint64 * len(slots))(*slots)
        counts = (NativeCount * len(program.sites))()
        for number, site in enumerate(program.barriers):
            dropped = self.drop_barriers
            program.native_sites[site].dropped = dropped if isinstance(dropped, bool) else number in dropped
        native = NativeLaunch(
            entry=program.entry,
            args=ctypes.addressof(args),
            sites=program.native_sites,
            regions=(NativeRegion * len(extents))(*(NativeRegion(*e) for e in extents)),
            site_counts=counts,
            seed=(self.schedule or 0) % 2**64,
            time_limit=self.time_limit,
            grid=grid,
            threads=32 * metadata.num_warps,
            num_sites=len(program.sites),
            num_regions=len(extents),
            shared_bytes=metadata.shared,
            arch=self.arch,
            flags=(Flag.COUNT if self.counters else 0)
            | (Flag.RACES if self.check_races else 0)
            | (Flag.SHUFFLE if self.schedule is not None else 0)
            | (Flag.FIBERS if program.needs_fibers else 0),
        )
        if runtime().gs_launch(ctypes.byref(native)):
            raise _exception(native, program, metadata.name, tensors)
        self.launches.append(
            Launch(
                kernel=metadata.name,
                grid=grid,
                num_warps=metadata.num_warps,
                shared_bytes=metadata.shared,
                barrier_sites=len(program.barriers),
                counters=_collect(native, program, counts) if self.counters else None,
            )
        )


def _collect(native: NativeLaunch, program: Program, counts: Any) -> Counters:
    sites = []
    for site, n in zip(program.sites, counts, strict=True):
        if site.kind.startswith("global"):
            sites.append((site, Access(n.requests, n.lanes, n.bytes, sectors=n.units)))
        elif site.kind.startswith("shared"):
            sites.append((site, Access(n.requests, n.lanes, n.bytes, wavefronts=n.units)))
    x, y, z = native.grid
    return Counters(x * y * z, native.barriers, native.shuffles, sites)


def _exception(native: NativeLaunch, program: Program, kernel: str, tensors: dict[str, torch.Tensor]) -> Exception:
    """The exception that a failed launch raises."""
    failure, text = Failure(native.error), native.err_text.decode()
    if failure == Failure.MEMORY:
        return MemoryError(f"{kernel}: out of host memory")
    where = f"{kernel}, CTA {tuple(native.err_cta)}, thread {native.err_thread}"
    kinds: dict[Failure, Callable[[str], SimulationError]] = {
        Failure.DEADLOCK: DeadlockError,
        Failure.TRAP: DeviceAssertError,
        Failure.OTHER: SimulationError,
    }
    if failure in kinds:
        return kinds[failure](f"{where}: {text}")
    site = program.sites[native.err_site]
    shared = site.kind.startswith("shared")
    where += f", {site.where}, `{site.op}`"
    address, size, other = native.err_address, native.err_bytes, native.err_other
    place = f"offset {address} of shared memory" if shared else _place(address, size, tensors)
    what = f"{where}: {size} bytes at {place}"
    if failure == Failure.BOUNDS:
        return OutOfBoundsError(what)
    if failure == Failure.SHARED_BOUNDS:
        return OutOfBoundsError(f"{what}, which has {other} bytes")
    if failure == Failure.MISALIGNED:
        return MisalignedError(f"{what}: the address {address:#x} is no multiple of {other}")
    if shared:
        party = "several warps" if other == MANY else f"warp {(other - 1) % 64}"  # see check_shared_race
        return DataRaceError(f"{what}, which {party} {text} with no barrier in between")
    x, y, _ = native.grid
    index = other - 1  # see check_global_race
    party = "several CTAs" if other == MANY else f"CTA {(index % x, index // x % y, index // x // y)}"
    return DataRaceError(f"{what}, which {party} {text} in the same launch")


def _place(address: int, size: int, tensors: dict[str, torch.Tensor]) -> str:
    """An address, in terms of the argument that is nearest to it."""

    def distance(item: tuple[str, Extent]) -> int:
        begin, end = item[1]
        return max(begin - address, address + size - end)

    extents = {name: extent(tensor) for name, tensor in tensors.items()}
    if not extents:
        return f"address {address:#x}"
    name, (begin, end) = min(extents.items(), key=distance)
    tensor = tensors[name]
    shape = f"{tuple(tensor.shape)}, {tensor.dtype}, {end - begin} bytes"
    return f"offset {address - begin} of argument {name} ({shape})"
