"""What GPUs have: one table, from which kernels are launched and their performance is reckoned.

A multiprocessor (on AMD a compute unit) has four partitions (SIMDs), each with 512 registers of 32 bits for every lane
of a warp (wavefront).

| | where from |
|---|---|
| NVIDIA: warps, programs, shared memory | CUDA C++ Programming Guide, table Technical Specifications per Compute Capability (8.0, 9.0, 10.0: 64 warps, 32 programs; 12.0: 48 and 24). The tuning guides agree, but for the one of Blackwell, which says 32 programs and 128 KB for 12.0: the latter is with the L1 cache |
| NVIDIA: shared memory that a program costs besides its own | Hopper Tuning Guide: 1 KB |
| NVIDIA: granule of shared memory | `cuda_occupancy.h`: 128 bytes |
| AMD | LLVM, AMDGPUBaseInfo.cpp, for gfx90a, whose features gfx942 has, too: getMaxWavesPerEU 8, getEUsPerCU 4, getMaxWorkGroupsPerCU 16, getLocalMemorySize 64 KB, getLdsDwGranularity 128 words |
| products | datasheets and whitepapers, named with each |
"""  # noqa: E501

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "PRODUCTS", "Architecture", "Product", "architecture"]

KB = 1 << 10


@dataclass(frozen=True)
class Architecture:
    """What a multiprocessor holds.

    Attributes:
        warps, programs: at a time, at most.
        single_programs: programs of one warp; on AMD they take none of the 16 barriers.
        shared: bytes of shared memory.
        program_shared: bytes of it, the most for one program.
        reserved: bytes of it that each program takes besides its own.
        shared_granule: bytes, the unit in which it is given out.
    """

    warps: int
    programs: int
    single_programs: int
    shared: int
    program_shared: int
    reserved: int
    shared_granule: int


def _nvidia(program_shared: int, warps: int, programs: int) -> Architecture:
    return Architecture(warps, programs, programs, program_shared + KB, program_shared, KB, 128)


_CDNA = Architecture(32, 16, 32, 64 * KB, 64 * KB, 0, 512)
_LEAST = _nvidia(99 * KB, 48, 24)  # of compute capability 8.0 and above
ARCHITECTURES: dict[int | str, Architecture] = {
    80: _nvidia(163 * KB, 64, 32),
    87: _nvidia(163 * KB, 48, 16),
    90: _nvidia(227 * KB, 64, 32),
    100: _nvidia(227 * KB, 64, 32),
    103: _nvidia(227 * KB, 64, 32),
    120: _LEAST,
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
}
"""By compute capability without the dot, or by AMD's name."""


def architecture(target: int | str) -> Architecture:
    """What is known of a target; of other NVIDIA GPUs of compute capability 8.0 and above, what all of them have.

    Raises:
        KeyError: for other targets.
    """
    if isinstance(target, int) and target >= 80:
        return ARCHITECTURES.get(target, _LEAST)
    return ARCHITECTURES[target]


@dataclass(frozen=True)
class Product:
    """What a datasheet says of a GPU.

    Attributes:
        targets: whose compiled code stands for it, the first that there is.
        bandwidth: of memory, bytes a second.
        multiprocessors: or compute units.
        clock: Hz, boost.
        lanes: threads of which an instruction is issued in a cycle, on a multiprocessor.
        source: where the figures are from.
    """

    targets: tuple[str, ...]
    bandwidth: float
    multiprocessors: int
    clock: float
    lanes: int
    source: str


PRODUCTS = {
    "A100 SXM 80 GB": Product(("80", "90"), 2.039e12, 108, 1.41e9, 128, "NVIDIA A100 datasheet and GA100 whitepaper"),
    "H100 SXM": Product(("90",), 3.35e12, 132, 1.98e9, 128, "NVIDIA H100 datasheet and GH100 whitepaper"),
    "MI300X": Product(("gfx942",), 5.3e12, 304, 2.1e9, 64, "AMD Instinct MI300X datasheet and CDNA 3 whitepaper"),
}
