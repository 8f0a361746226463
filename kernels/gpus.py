"""Hardware figures of GPUs: the one table that launches of kernels and predictions of their performance use.

A multiprocessor (on AMD a compute unit) has four partitions (SIMDs), each with 512 registers of 32 bits for every lane
of a warp (wavefront).

| figures | source |
|---|---|
| NVIDIA: warps, programs, shared memory | CUDA C++ Programming Guide, table Technical Specifications per Compute Capability (8.0, 9.0, 10.0: 64 warps, 32 programs; 12.0: 48 and 24). The tuning guides agree, except Blackwell's, which gives 32 programs and 128 KB for 12.0; the 128 KB include the L1 cache |
| NVIDIA: shared memory reserved for each program, on top of its own | Hopper Tuning Guide: 1 KB |
| NVIDIA: granule of shared memory | `cuda_occupancy.h`: 128 bytes |
| AMD | LLVM, AMDGPUBaseInfo.cpp, for gfx90a; gfx942 has the same features: getMaxWavesPerEU 8, getEUsPerCU 4, getMaxWorkGroupsPerCU 16, getLocalMemorySize 64 KB, getLdsDwGranularity 128 words |
| products | datasheets and whitepapers, named beside each |
"""  # noqa: E501

from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "PRODUCTS", "Architecture", "Product", "architecture"]

KB = 1 << 10


@dataclass(frozen=True)
class Architecture:
    """The limits of a multiprocessor of one architecture.

    Attributes:
        warps, programs: the most that are resident at a time.
        single_programs: the most resident programs of one warp each. On AMD these need none of the 16 barriers.
        shared: bytes of shared memory.
        program_shared: bytes of shared memory that one program can take, at most.
        reserved: bytes of shared memory that each program takes on top of its own.
        shared_granule: bytes, the unit in which shared memory is allocated.
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
_LEAST = _nvidia(99 * KB, 48, 24)  # what every GPU of compute capability 8.0 or above has
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
"""The architectures, by compute capability without the dot (90 for 9.0), or by AMD's name."""


def architecture(target: int | str) -> Architecture:
    """The architecture of a target. An NVIDIA GPU of 8.0 or above that is not listed gets the least that all have.

    Args:
        target: the compute capability without the dot, or AMD's name.

    Raises:
        KeyError: for other targets.
    """
    if isinstance(target, int) and target >= 80:
        return ARCHITECTURES.get(target, _LEAST)
    return ARCHITECTURES[target]


@dataclass(frozen=True)
class Product:
    """The figures of a GPU's datasheet.

    Attributes:
        targets: the targets whose compiled code may stand for this GPU, in order of preference.
        bandwidth: of memory, in bytes a second.
        multiprocessors: their number; on AMD, that of compute units.
        clock: the boost clock, in Hz.
        lanes: threads for which a multiprocessor issues an instruction in each cycle.
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
