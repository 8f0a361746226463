"""The kernels compiled for GPUs that are not here, and what the compilation tells."""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from efcp.kernels import Blocks, triton_ops
from efcp.perf.offline import GPUTarget, compile_for

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
WINDOW = 4
FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64


def window(blocks):
    shape = (blocks.count, WINDOW, blocks.kept)
    return torch.zeros(shape, dtype=BFLOAT16), torch.zeros(shape, dtype=blocks.index_dtype)


def compress(dtype, blocks):
    x = torch.zeros(blocks.numel, dtype=dtype)
    slot, finite = torch.zeros(1, dtype=torch.int64), torch.ones((), dtype=torch.bool)
    triton_ops.compress_(x, x, *window(blocks), slot, finite, blocks)


def dots(blocks):
    triton_ops.window_dots(*window(blocks), torch.zeros(1, dtype=torch.int64), blocks)


def apply(dtype, blocks):
    triton_ops.window_apply_(
        torch.zeros(blocks.numel, dtype=dtype), *window(blocks), torch.zeros(WINDOW), torch.zeros(()), blocks
    )


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="configurations are chosen for the registers that Triton 3.8 needs; 3.7 spills 16 bytes in one of them",
)
@pytest.mark.parametrize("block_size", [256, 4096, 32768])
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942"])
def test_registers_suffice(target, block_size):
    """Nothing is spilled to memory, and no thread uses memory of its own."""
    sparse, full = (Blocks(2 * block_size + 1, block_size, density) for density in (0.01, 1.0))
    with compile_for(TARGETS[target]) as compiled:
        for dtype in (FLOAT32, BFLOAT16, FLOAT64):
            compress(dtype, sparse)  # the density is no part of the kernel
        dots(sparse)
        dots(full)
        apply(FLOAT32, sparse)
        apply(BFLOAT16, full)
        apply(FLOAT64, full)
    assert {kernel.name for kernel in compiled} == {
        "_compress_kernel", "_spread_kernel", "_dots_kernel", "_apply_kernel",
    }  # fmt: skip
    assert [kernel for kernel in compiled if kernel.spilled or kernel.stack] == []


@pytest.mark.parametrize("target", ["gfx90a", "gfx942"])
def test_the_barrier_between_rows_orders_global_memory(target):
    """On AMD a barrier alone does not. (On NVIDIA `bar.sync` does.)

    Fences of workgroup scope on both sides do: the wavefronts of a workgroup share a compute unit and its cache, as
    long as the mode that spreads them over several units is off.
    """
    with compile_for(TARGETS[target]) as compiled:
        apply(FLOAT32, Blocks(4096, 4096, 0.1))
    assert compiled[0].num_warps > 1
    code = compiled[0].stages["llir"].read_text()
    fenced = r'fence syncscope\("workgroup"\) release.*\n.*@llvm\.amdgcn\.s\.barrier\(\).*\n.*("workgroup"\) acquire)'
    assert len(re.findall(fenced, code)) == len(re.findall(r"call void @llvm\.amdgcn\.s\.barrier", code)) > 0
    assert ".amdhsa_tg_split 0" in compiled[0].stages["amdgcn"].read_text()


def test_blocks_are_numbered_in_64_bits():
    """The number of a block is widened before anything is computed from it."""
    blocks = Blocks(8193, 4096, 0.01)
    with compile_for(TARGETS["sm90"]) as compiled:
        compress(FLOAT32, blocks)
        dots(blocks)
        apply(FLOAT32, blocks)
    assert len(compiled) == 4
    for kernel in compiled:
        code = kernel.stages["ttir"].read_text()
        (block,) = re.findall(r"(%\w+) = tt\.get_program_id x", code)
        uses = [line for line in code.splitlines() if re.search(rf" {block}[ ,)]", line.split("=", 1)[-1])]
        assert len(uses) > 0
        assert all("arith.extsi" in line for line in uses), kernel.name


@triton.jit
def _normalise_kernel(x, SIZE: tl.constexpr):
    position = tl.arange(0, SIZE)
    value = tl.load(x + position)
    tl.store(x + position, value / tl.sum(value, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_reads_what_a_kernel_occupies(target):
    x = torch.ones(1024)
    with compile_for(TARGETS[target]) as compiled:
        _normalise_kernel[(1,)](x, SIZE=256, num_warps=2)
        _normalise_kernel[(9,)](x, SIZE=256, num_warps=2)  # the same kernel
    assert len(compiled) == 1
    kernel = compiled[0]
    assert (kernel.name, kernel.target, kernel.num_warps) == ("_normalise_kernel", TARGETS[target], 2)
    assert 6 <= kernel.registers <= 64
    assert (kernel.spilled, kernel.spilled_scalars, kernel.stack) == (0, 0, 0)
    assert kernel.shared > 0
    assert kernel.name in kernel.stages["ptx" if kernel.target.backend == "cuda" else "amdgcn"].read_text()
    assert (x == 1).all()  # nothing has run


def test_sees_spilled_registers():
    with compile_for(TARGETS["sm90"]) as compiled:
        _normalise_kernel[(1,)](torch.ones(4096), SIZE=4096, num_warps=1, maxnreg=64)  # 128 elements a thread
    assert compiled[0].registers <= 64
    assert compiled[0].spilled == compiled[0].stack > 0


def test_the_driver_is_put_back():
    before = triton.runtime.driver._active
    with pytest.raises(KeyError), compile_for(TARGETS["sm90"]):
        raise KeyError
    assert triton.runtime.driver._active is before
