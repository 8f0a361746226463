"""How many programs of a kernel a streaming multiprocessor (NVIDIA) or compute unit (AMD) holds at a time.

A multiprocessor has four partitions (SIMDs), each with 512 registers of 32 bits for every lane of a warp (wavefront),
given out in eights.

| | where from |
|---|---|
| NVIDIA | CUDA C++ Programming Guide, appendix Compute Capabilities, table Technical Specifications; 1 KB of shared memory that each program costs besides: section Shared Memory of 8.x and later; granules: `cuda_occupancy.h` |
| AMD | CDNA 2 and CDNA 3 ISA reference guides (vector registers, LDS); waves, work-groups and granules: LLVM, AMDGPUBaseInfo.cpp |

Scalar registers of AMD are left out: only more than 100 of them would cost a wave of eight.
"""  # noqa: E501

from dataclasses import dataclass

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


LIMITS: dict[int | str, Limits] = {
    80: Limits(64, 32, 32, 164 * KB, 163 * KB, 1 * KB, 128),
    90: Limits(64, 32, 32, 228 * KB, 227 * KB, 1 * KB, 128),
    100: Limits(64, 32, 32, 228 * KB, 227 * KB, 1 * KB, 128),
    120: Limits(48, 24, 24, 100 * KB, 99 * KB, 1 * KB, 128),
    "gfx90a": Limits(32, 16, 32, 64 * KB, 64 * KB, 0, 512),
    "gfx942": Limits(32, 16, 32, 64 * KB, 64 * KB, 0, 512),
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
