"""The kernels compiled for GPUs that are not here, and what the compilation tells."""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from efcp.kernels import Blocks, SparseRows, Update
from efcp.kernels.triton import portable
from efcp.perf.gpu.offline import GPUTarget, compile_for

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@pytest.mark.parametrize("target", ["gfx90a", "gfx942"])
def test_the_barrier_between_rows_orders_global_memory(target):
    """On NVIDIA `bar.sync` orders it. On AMD a barrier alone does not.

    There it takes fences of workgroup scope on both sides: the wavefronts of a workgroup share a compute unit and its
    cache, as long as the mode that spreads them over several units is off.
    """
    blocks, one = Blocks(4096, 4096, 0.1), torch.ones(())
    values = torch.zeros(1, 4, blocks.kept)
    rows = [SparseRows(values, values.to(blocks.index_dtype), blocks)]
    with compile_for(TARGETS[target]) as compiled:
        portable.window_apply_([torch.zeros(4096)], [], rows, Update(torch.ones(4), one, one))
    assert compiled[0].num_warps > 1
    code = compiled[0].stages["llir"].read_text()
    fenced = r'fence syncscope\("workgroup"\) release.*\n.*@llvm\.amdgcn\.s\.barrier\(\).*\n.*("workgroup"\) acquire)'
    assert len(re.findall(fenced, code)) == len(re.findall(r"call void @llvm\.amdgcn\.s\.barrier", code)) > 0
    assert ".amdhsa_tg_split 0" in compiled[0].stages["amdgcn"].read_text()


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
