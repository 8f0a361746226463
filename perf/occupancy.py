"""How many programs of a kernel a streaming multiprocessor (NVIDIA) or compute unit (AMD) holds at a time.

A multiprocessor has four partitions (SIMDs), each with 512 registers of 32 bits for every lane of a warp (wavefront),
given out in eights.

| | where from |
|---|---|
| NVIDIA: warps, programs, shared memory | CUDA C++ Programming Guide, table Technical Specifications per Compute Capability (8.0, 9.0, 10.0: 64 warps, 32 programs; 12.0: 48 and 24). The tuning guides agree, but for the one of Blackwell, which says 32 programs and 128 KB for 12.0: the latter is with the L1 cache |
| NVIDIA: shared memory that a program costs besides its own | Hopper Tuning Guide: 1 KB |
| NVIDIA: granules, partitions | `cuda_occupancy.h`: 128 bytes of shared memory; 256 registers of a warp, 8 of a lane; 4 partitions |
| AMD | LLVM, AMDGPUBaseInfo.cpp, for gfx90a, whose features gfx942 has, too: getMaxWavesPerEU 8, getEUsPerCU 4, getMaxWorkGroupsPerCU 16, getLocalMemorySize 64 KB, getLdsDwGranularity 128 words, getTotalNumVGPRs 512, getVGPRAllocGranule 8 |

Scalar registers of AMD are left out: only more than 100 of them would cost a wave of eight.
"""  # noqa: E501

from dataclasses import dataclass

from efcp.kernels.triton import LEAST_SHARED, SHARED
from efcp.kernels.triton.tuning import DRIVER_SHARED

__all__ = ["LIMITS", "Limits", "resident_programs"]

PARTITIONS = 4
REGISTERS = 512  # of a lane, in a partition
REGISTER_GRANULE = 8
KB = 1024


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds."""

    warps: int
    programs: int
    single_programs: int  # of one warp; on AMD they take none of the 16 barriers
    shared: int  # bytes
    program_shared: int  # bytes, the most for one program
    reserved: int  # bytes of shared memory that each program takes besides its own
    shared_granule: int  # bytes


def _nvidia(arch: int, warps: int, programs: int) -> Limits:
    shared = SHARED.get(arch, LEAST_SHARED)
    return Limits(warps, programs, programs, shared + DRIVER_SHARED, shared, DRIVER_SHARED, 128)


_CDNA = Limits(32, 16, 32, 64 * KB, 64 * KB, 0, 512)
LIMITS: dict[int | str, Limits] = {
    80: _nvidia(80, 64, 32),
    90: _nvidia(90, 64, 32),
    100: _nvidia(100, 64, 32),
    120: _nvidia(120, 48, 24),
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}


def resident_programs(arch: int | str, num_warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time, with its memory split in favour of shared memory.

    Args:
        arch: one of `LIMITS`.
        num_warps: warps of a program.
        registers: of a thread; on AMD vector registers, with those for accumulation.
        shared: bytes of shared memory of a program.

    Returns:
        0 where not even one fits.

    Raises:
        KeyError: for another architecture.
    """
    limits = LIMITS[arch]
    if shared > limits.program_shared:
        return 0
    warps = PARTITIONS * min(limits.warps // PARTITIONS, REGISTERS // _up(max(registers, 1), REGISTER_GRANULE))
    taken = _up(shared + limits.reserved, limits.shared_granule)
    programs = limits.single_programs if num_warps == 1 else limits.programs
    return min(programs, warps // num_warps, limits.shared // taken if taken else programs)


def _up(number: int, granule: int) -> int:
    return -(-number // granule) * granule
