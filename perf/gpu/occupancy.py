"""How many programs of a kernel a streaming multiprocessor (NVIDIA) or compute unit (AMD) holds at a time.

Each lane of a warp gets a multiple of eight registers. The sources are `cuda_occupancy.h` (256 for a warp) and LLVM's
AMDGPUBaseInfo.cpp (getTotalNumVGPRs 512, getVGPRAllocGranule 8). Scalar registers of AMD are left out: only more than
100 of them would cost one wave of eight. The other limits of a multiprocessor are in `efcp.kernels.gpus`.
"""

from efcp.kernels.gpus import ARCHITECTURES

__all__ = ["resident_programs"]

PARTITIONS = 4
REGISTERS = 512  # of a lane, in a partition
REGISTER_GRANULE = 8


def resident_programs(arch: int | str, num_warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor holds at a time, with its memory split in favour of shared memory.

    Args:
        arch: one of `efcp.kernels.gpus.ARCHITECTURES`.
        num_warps: warps of a program.
        registers: of a thread; on AMD vector registers, with those for accumulation.
        shared: bytes of shared memory of a program.

    Returns:
        0 where not even one fits.

    Raises:
        KeyError: for another architecture.
    """
    limits = ARCHITECTURES[arch]
    if shared > limits.program_shared:
        return 0
    warps = PARTITIONS * min(limits.warps // PARTITIONS, REGISTERS // _up(max(registers, 1), REGISTER_GRANULE))
    taken = _up(shared + limits.reserved, limits.shared_granule)
    programs = limits.single_programs if num_warps == 1 else limits.programs
    return min(programs, warps // num_warps, limits.shared // taken if taken else programs)


def _up(number: int, granule: int) -> int:
    return -(-number // granule) * granule
