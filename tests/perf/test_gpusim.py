"""The simulator: kernels against torch, and its checks against kernels that are wrong on purpose."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from efcp.perf.gpu.gpusim import (
    DataRaceError,
    DeadlockError,
    DeviceAssertError,
    Launch,
    MisalignedError,
    OutOfBoundsError,
    UnsupportedError,
    simulate,
    why_unavailable,
)

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Elementwise kernels, reductions, scans, sorts


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask, other=0) + tl.load(y + i, mask=mask, other=0), mask=mask)


@pytest.mark.parametrize(
    ("arch", "dtype", "n"),
    [
        pytest.param(80, torch.float32, 1, id="sm80-fp32-1"),
        pytest.param(90, torch.bfloat16, 1000, id="sm90-bf16-1000"),
        pytest.param(100, torch.int16, 4096, id="sm100-int16-4096"),
        pytest.param(120, torch.float16, 999, id="sm120-fp16-999"),
    ],
)
def test_add(arch: int, dtype: torch.dtype, n: int) -> None:
    x, y = (torch.randn(n) * 100).to(dtype), (torch.randn(n) * 100).to(dtype)
    out = torch.zeros(n + 8, dtype=dtype)
    with simulate(arch):
        add_kernel[(triton.cdiv(n, 512),)](x, y, out, n, BLOCK=512)
    assert torch.equal(out[:n], x + y)
    assert not out[n:].any()


@triton.jit
def masked_load_kernel(x, out, n, other, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=(i < n) & (i % 3 != 1), other=other))


@pytest.mark.parametrize("num_warps", [1, 16], ids="{} warps".format)
def test_masked_load(num_warps: int) -> None:
    x, out, i = torch.randn(256), torch.zeros(256), torch.arange(256)
    with simulate(90):
        masked_load_kernel[(1,)](x, out, 200, -7.5, BLOCK=256, num_warps=num_warps)
    assert torch.equal(out, torch.where((i < 200) & (i % 3 != 1), x, -7.5))


@triton.jit
def one_block_kernel(x, out, WHAT: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    if WHAT == "cumsum":
        tl.store(out + i, tl.cumsum(v, 0))
    elif WHAT == "sort":
        tl.store(out + i, tl.sort(v))
    elif WHAT == "topk":
        tl.store(out + tl.arange(0, K), tl.topk(v, K))
    elif WHAT == "histogram":
        tl.store(out + tl.arange(0, K), tl.histogram(v, K))
    elif WHAT == "max":
        tl.store(out, tl.max(v, 0))
    elif WHAT == "argmax":
        value, where = tl.max(v, 0, return_indices=True)
        tl.store(out, value)
        tl.store(out + 1, where.to(value.dtype))
    elif WHAT == "math":
        y = tl.sqrt(tl.abs(v)) + tl.rsqrt(v * v + 1) + libdevice.tanh(v) + tl.exp(v) + tl.log(tl.abs(v) + 1)
        tl.store(out + i, y + tl.sin(v * 1e6) + 1 / (v * v + 2))
    elif WHAT == "transpose":
        tl.store(out + i, tl.ravel(tl.trans(tl.reshape(v, (K, BLOCK // K)))))


def one_block(
    what: str, x: torch.Tensor, like: torch.Tensor, arch: int, num_warps: int, **options: int
) -> torch.Tensor:
    """What the kernel writes. K is by default the number of elements of `like`, the expected result."""
    out = torch.zeros_like(like)
    k = options.get("k", like.numel())
    with simulate(arch, check_races=True):
        one_block_kernel[(1,)](x, out, what, BLOCK=x.numel(), K=k, num_warps=num_warps)
    return out


def integers(n: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, (n,), dtype=torch.int32)


@pytest.mark.parametrize(("arch", "num_warps"), [(80, 1), (120, 16)], ids=["sm80-1 warp", "sm120-16 warps"])
def test_cumsum(arch: int, num_warps: int) -> None:
    x = integers(2048, 9)
    expected = x.cumsum(0).int()
    assert torch.equal(one_block("cumsum", x, expected, arch, num_warps), expected)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(80, torch.float32, id="sm80-fp32"),
        pytest.param(90, torch.bfloat16, id="sm90-bf16"),
        pytest.param(100, torch.int64, id="sm100-int64"),
    ],
)
def test_sort(arch: int, dtype: torch.dtype) -> None:
    x = (torch.randn(128) * 100).to(dtype)
    expected = x.sort().values
    assert torch.equal(one_block("sort", x, expected, arch, 4), expected)


def test_topk() -> None:
    x = torch.randn(256)
    expected = x.topk(16).values
    assert torch.equal(one_block("topk", x, expected, 120, 2), expected)


def test_histogram() -> None:
    x = integers(2048, 64)
    expected = torch.bincount(x, minlength=64).int()
    assert torch.equal(one_block("histogram", x, expected, 100, 4), expected)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(90, torch.float32, id="sm90-fp32"),
        pytest.param(100, torch.float32, id="sm100-fp32"),  # by redux.sync on floats
        pytest.param(80, torch.int32, id="sm80-int32"),  # by redux.sync
    ],
)
def test_max(arch: int, dtype: torch.dtype) -> None:
    x = (torch.randn(1024) * 1000).to(dtype)
    expected = x.max().reshape(1)
    assert torch.equal(one_block("max", x, expected, arch, 4), expected)


def test_max_with_index() -> None:
    x = torch.randn(1024)
    expected = torch.stack([x.max(), x.argmax().float()])
    assert torch.equal(one_block("argmax", x, expected, 80, 4), expected)


@pytest.mark.parametrize("arch", [90, 120], ids="sm{}".format)
def test_math(arch: int) -> None:
    x = torch.randn(256)
    expected = x.abs().sqrt() + (x * x + 1).rsqrt() + x.tanh() + x.exp() + (x.abs() + 1).log()
    expected = (expected + (x * 1e6).double().sin() + 1 / (x * x + 2)).float()
    torch.testing.assert_close(one_block("math", x, expected, arch, 4), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", [90, 100], ids="sm{}".format)
def test_transposition_of_16_bit_numbers(arch: int) -> None:
    x = torch.randn(4096).bfloat16()
    expected = x.view(64, 64).T.flatten()
    assert torch.equal(one_block("transpose", x, expected, arch, 4, k=64), expected)


@triton.jit
def gather_kernel(x, index, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.gather(tl.load(x + i), tl.load(index + i), 0))


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [pytest.param(80, torch.float32, id="sm80-fp32"), pytest.param(100, torch.bfloat16, id="sm100-bf16")],
)
def test_gather(arch: int, dtype: torch.dtype) -> None:
    x, index = torch.randn(1024).to(dtype), integers(1024, 1024)
    out = torch.zeros_like(x)
    with simulate(arch, check_races=True):
        gather_kernel[(1,)](x, index, out, BLOCK=1024)
    assert torch.equal(out, x[index.long()])


# Atomics


@triton.jit
def atomic_kernel(x, index, out, n, BLOCK: tl.constexpr, MAX: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    target = out + tl.load(index + i, mask=mask, other=0)
    if MAX:
        tl.atomic_max(target, tl.load(x + i, mask=mask), mask=mask)
    else:
        tl.atomic_add(target, tl.load(x + i, mask=mask), mask=mask, sem="relaxed")


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        pytest.param(80, torch.float32, id="sm80-fp32"),
        pytest.param(90, torch.bfloat16, id="sm90-bf16"),
        pytest.param(120, torch.int32, id="sm120-int32"),
    ],
)
def test_atomic_add(arch: int, dtype: torch.dtype) -> None:
    n = 2000
    x, index = torch.randint(-2, 3, (n,)).to(dtype), torch.randint(0, 50, (n,))
    out = torch.zeros(50, dtype=dtype)
    with simulate(arch, check_races=True, schedule=1):
        atomic_kernel[(2,)](x, index, out, n, BLOCK=1024, MAX=False)
    assert torch.equal(out, torch.zeros(50, dtype=dtype).index_add_(0, index, x))


def test_atomic_max() -> None:
    x, index, out = torch.randn(500), torch.randint(0, 50, (500,)), torch.zeros(50)
    with simulate(90):
        atomic_kernel[(1,)](x, index, out, 500, BLOCK=512, MAX=True)
    assert torch.equal(out, torch.zeros(50).scatter_reduce(0, index, x, "amax"))


@triton.jit
def in_turn_kernel(turn, x, out):
    pid = tl.program_id(0)
    while tl.atomic_add(turn, 0) != pid:
        pass
    tl.store(out + pid, tl.load(x + pid))
    tl.atomic_add(turn, 1)


def test_waiting_for_another_cta() -> None:
    x, out = torch.randn(8), torch.zeros(8)
    with simulate(90):
        in_turn_kernel[(8,)](torch.zeros(1, dtype=torch.int32), x, out)  # in the order in which they run
    assert torch.equal(out, x)
    with simulate(90, schedule=0, time_limit=0.2), pytest.raises(DeadlockError, match="wait for another CTA"):
        in_turn_kernel[(8,)](torch.zeros(1, dtype=torch.int32), x, out)


# Selection in a block: reductions in a loop, a scan, a scatter. It has many barriers, and all of them matter.


@triton.jit
def select_kernel(x, out, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """Per block, the K numbers of the largest magnitude in their order; the threshold is found bit by bit."""
    lane = tl.arange(0, BLOCK)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + lane
    v = tl.load(x + offset, mask=offset < n, other=0.0)
    key = tl.abs(v).to(tl.int32, bitcast=True)
    threshold = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 30, tl.int32)
    for _ in range(31):
        candidate = threshold | bit
        threshold = tl.where(tl.sum((key >= candidate).to(tl.int32), 0) >= K, candidate, threshold)
        bit = bit >> 1
    chosen = key >= threshold
    slot = tl.program_id(0) * K + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + slot, v, mask=chosen)


def run_select(arch: int = 90, num_warps: int = 4, **options: object) -> tuple[bool, Launch]:
    """Runs the kernel; returns whether its result is right, and the launch."""
    n, k, block = 2 * 1024 + 300, 41, 1024
    x, out = torch.randn(n), torch.zeros(3, k)
    blocks = torch.nn.functional.pad(x, (0, -n % block)).view(-1, block)
    expected = blocks.gather(1, blocks.abs().topk(k).indices.sort(1).values)
    with simulate(arch, **options) as sim:  # type: ignore[arg-type]
        select_kernel[(3,)](x, out, n, K=k, BLOCK=block, num_warps=num_warps)
    return torch.equal(out, expected), sim.launches[0]


@pytest.mark.parametrize(
    ("arch", "num_warps"), [(80, 1), (100, 8), (120, 4)], ids=["sm80-1 warp", "sm100-8 warps", "sm120-4 warps"]
)
def test_select(arch: int, num_warps: int) -> None:
    assert run_select(arch, num_warps, check_races=True)[0]


def test_schedules_agree_on_a_right_kernel() -> None:
    assert all(run_select(schedule=seed)[0] for seed in range(4))


def test_races_show_that_every_barrier_is_needed() -> None:
    right, launch = run_select(check_races=True)
    assert right
    assert launch.barrier_sites >= 4
    for number in range(launch.barrier_sites):
        with pytest.raises((DataRaceError, OutOfBoundsError)):
            run_select(drop_barriers={number}, check_races=True)


# Gluon


@gluon.jit
def scatter_add_kernel(
    weights,
    values,
    indices,
    out,
    rows,
    blocks,
    K: gl.constexpr,
    KP: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """out = sum over rows of weight * sparse row; one block of columns per program, summed in shared memory."""
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    tile: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [gl.num_warps(), 1], [1, 0])
    total = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    total.store(gl.zeros([BLOCK], gl.float32, flat))
    gl.barrier()
    b = gl.program_id(0)
    j = gl.arange(0, KP, gl.SliceLayout(0, tile))[None, :]
    for first in range(0, rows, ROWS):
        r = first + gl.arange(0, ROWS, gl.SliceLayout(1, tile))[:, None]
        mask = (r < rows) & (j < K)
        p = (r.to(gl.int64) * blocks + b) * K + j
        v = gl.load(values + p, mask=mask, other=0.0).to(gl.float32) * gl.load(weights + r, mask=r < rows, other=0.0)
        i = gl.load(indices + p, mask=mask, other=0).to(gl.int32)
        size: gl.constexpr = [ROWS * KP]
        total.atomic_scatter_add(gl.reshape(v, size), gl.reshape(i, size), 0, mask=gl.reshape(mask, size))
    gl.barrier()
    gl.store(out + b.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, flat), total.load(flat))


@pytest.mark.parametrize(
    ("arch", "num_warps"), [(80, 1), (90, 8), (120, 4)], ids=["sm80-1 warp", "sm90-8 warps", "sm120-4 warps"]
)
def test_gluon_scatter_add(arch: int, num_warps: int) -> None:
    rows, blocks, k, block = 19, 3, 41, 1024
    weights = torch.randint(-4, 5, (rows,)).float()  # integers: the order of the sum does not matter
    values = torch.randint(-8, 9, (rows, blocks, k)).bfloat16()
    indices = torch.stack([torch.randperm(block)[:k] for _ in range(rows * blocks)]).view(rows, blocks, k).short()
    out, expected = torch.zeros(blocks, block), torch.zeros(blocks, block)
    for r in range(rows):
        expected.scatter_add_(1, indices[r].long(), weights[r] * values[r].float())

    def launch() -> None:
        arguments = (weights, values, indices, out, rows, blocks)
        scatter_add_kernel[(blocks,)](*arguments, K=k, KP=64, ROWS=16, BLOCK=block, num_warps=num_warps)

    with simulate(arch, check_races=True, counters=True) as sim:
        launch()
    assert torch.equal(out, expected)
    assert sim.last_counters.shared_atomic.lanes == rows * blocks * k
    if num_warps > 1:
        barriers = {0, 1}  # the kernel's first one, and one by Triton at the head of the loop's body
        with (
            simulate(arch, check_races=True, drop_barriers=barriers),
            pytest.raises(DataRaceError, match="shared memory"),
        ):
            launch()


@gluon.jit
def gather_scatter_kernel(x, index, out, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    buffer = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    i = gl.arange(0, BLOCK, layout)
    buffer.store(gl.load(x + i))
    gl.barrier()
    v = buffer.gather(gl.load(index + i), 0)
    gl.barrier()
    buffer.scatter(v * 2, gl.load(index + i), 0)
    gl.barrier()
    gl.store(out + i, buffer.load(layout))


def test_gluon_gather_and_scatter() -> None:
    x, index, out = torch.randn(512), torch.randperm(512).int(), torch.zeros(512)
    with simulate(100, check_races=True):
        gather_scatter_kernel[(1,)](x, index, out, BLOCK=512)
    assert torch.equal(out, 2 * x)


@gluon.jit
def uninitialised_kernel(out, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.store(out + gl.arange(0, BLOCK, layout), buffer.load(layout))


def test_gluon_memory_begins_as_nan() -> None:
    out = torch.zeros(32)
    with simulate(90):
        uninitialised_kernel[(1,)](out, BLOCK=32, num_warps=1)
    assert out.isnan().all()


@gluon.jit
def async_copy_kernel(x, out, n, PENDING: gl.constexpr, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    buffers = gl.allocate_shared_memory(gl.float32, [2, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    i = gl.arange(0, BLOCK, layout)
    for stage in gl.static_range(2):
        async_copy.async_load(buffers.index(stage), x + stage * BLOCK + i, mask=stage * BLOCK + i < n)
        async_copy.commit_group()
    async_copy.wait_group(PENDING)
    gl.barrier()
    gl.store(out + i, buffers.index(0).load(layout))
    async_copy.wait_group(0)
    gl.barrier()
    gl.store(out + BLOCK + i, buffers.index(1).load(layout))


@pytest.mark.parametrize(("pending", "right"), [(1, True), (2, False)], ids=["right wait", "wait that is too short"])
def test_gluon_async_copy(pending: int, right: bool) -> None:
    x, out = torch.randn(1024), torch.zeros(1024)
    with simulate(90):
        async_copy_kernel[(1,)](x, out, 1000, PENDING=pending, BLOCK=512)
    x[1000:] = 0
    assert torch.equal(out[512:], x[512:])
    assert torch.equal(out[:512], x[:512]) == right


@gluon.jit
def from_previous_warp_kernel(x, out, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    buffer = gl.allocate_shared_memory(gl.float32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    i = gl.arange(0, BLOCK, layout)
    buffer.store(gl.load(x + i))
    gl.barrier()
    gl.store(out + i, buffer.gather(gl.maximum(i - 128, 0), 0))


def test_schedules_show_a_missing_barrier() -> None:
    x = torch.randn(1024)

    def right(schedule: int | None, drop_barriers: bool) -> bool:
        out = torch.zeros(1024)
        with simulate(90, schedule=schedule, drop_barriers=drop_barriers):
            from_previous_warp_kernel[(1,)](x, out, BLOCK=1024, num_warps=8)
        return torch.equal(out, x[(torch.arange(1024) - 128).clamp(min=0)])

    assert all(right(seed, False) for seed in range(4))
    assert right(None, True)  # the fixed order happens to be right
    assert not any(right(seed, True) for seed in range(4))


# Launching: specialisation, options, autotuning


@triton.jit(do_not_specialize=["n"])
def launch_kernel(x, out, n, far, BLOCK: tl.constexpr = 64, SCALE: tl.constexpr = 2):
    i = tl.arange(0, BLOCK)
    y = tl.load(x + i, mask=i < n, other=-1.0) * SCALE
    tl.store(out + i, y + (far >> 32))


def test_arguments() -> None:
    x, out, i = torch.randn(64), torch.zeros(64), torch.arange(64)
    with simulate(90):
        launch_kernel[(1,)](x, out, 40, 7 << 32)  # a 64-bit argument, and defaults
        assert torch.equal(out, torch.where(i < 40, x, -1.0) * 2 + 7)
        launch_kernel[lambda meta: (meta["BLOCK"] // 32,)](x, out, n=1, far=1, SCALE=3, BLOCK=32, num_warps=1)
        assert torch.equal(out[:32], (torch.where(i < 1, x, -1.0) * 3)[:32])
        launch_kernel[(1,)](x, out, 16, -(1 << 40))
        assert torch.equal(out, torch.where(i < 16, x, -1.0) * 2 - 256)


def test_specialisation_by_divisibility() -> None:
    """Vector accesses only where the compiler may assume alignment."""

    def requests(n: int, first: int) -> int:
        x, y, out = torch.randn(4096 + first), torch.randn(4096), torch.zeros(4096)
        add_kernel[(1,)](x[first:], y, out, n, BLOCK=4096)
        assert torch.equal(out[:n], x[first : first + n] + y[:n])
        return sim.last_counters.global_load.requests

    with simulate(90, counters=True) as sim:
        vector, odd_length, odd_pointer = requests(4096, 0), requests(4095, 0), requests(4096, 1)
    assert vector == 2 * 4096 / 128
    assert odd_length == 4 * vector
    assert vector < odd_pointer <= 4 * vector


@triton.jit
def fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) * tl.load(y + i) + tl.load(z + i))


def test_fp_fusion_follows_the_kernel_option() -> None:
    x, y, z, out = (torch.randn(1024) for _ in range(4))
    fused = (x.double() * y.double() + z.double()).float()
    with simulate(90):
        fma_kernel[(1,)](x, y, z, out, BLOCK=1024)
        assert torch.equal(out, fused)
        fma_kernel[(1,)](x, y, z, out, BLOCK=1024, enable_fp_fusion=False)
    assert torch.equal(out, x * y + z)
    assert not torch.equal(out, fused)


@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((64, 2), (1024, 4), (256, 1))], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)
    tl.atomic_add(out + n, 1.0)  # traffic per program


def test_autotune_takes_the_least_traffic() -> None:
    n = 4096
    x, out = torch.randn(n), torch.zeros(n + 1)
    with simulate(90):
        tuned_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n)
    assert torch.equal(out[:n], 2 * x)
    assert tuned_kernel.best_config.kwargs["BLOCK"] == 1024


@triton.jit
def target_kernel(out):
    tl.store(out, 1 if cuda_capability_geq(9, 0) else 0)


def test_one_kernel_on_several_targets() -> None:
    out = torch.zeros(1, dtype=torch.int32)

    def is_hopper_or_later() -> bool:
        target_kernel[(1,)](out)
        return bool(out)

    with simulate(80) as outer:
        assert not is_hopper_or_later()
        with simulate(120) as inner:
            assert is_hopper_or_later()
        assert not is_hopper_or_later()
    assert (len(outer.launches), len(inner.launches)) == (2, 1)


@gluon.jit
def large_buffer_kernel(out, SIZE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    buffer = gl.allocate_shared_memory(gl.float32, [SIZE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffer.store(gl.full([SIZE], 1.0, gl.float32, layout))
    gl.store(out + gl.arange(0, SIZE, layout), buffer.load(layout))


def test_targets_differ_in_shared_memory() -> None:
    out = torch.zeros(32768)
    with simulate(90):
        large_buffer_kernel[(1,)](out, SIZE=32768, num_warps=32)
    assert out.all()
    with simulate(120), pytest.raises(triton.runtime.errors.OutOfResources):
        large_buffer_kernel[(1,)](out, SIZE=32768, num_warps=32)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="arch must be one of"), simulate(70):
        pass


# What is wrong with a kernel


@triton.jit
def copy_kernel(x, out, shift, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = out + i + shift
    if ALIGNED:
        target = tl.multiple_of(target, 16)
    tl.store(target, tl.load(x + i))


def test_out_of_bounds_store() -> None:
    x, out = torch.randn(512), torch.zeros(512)
    message = (
        r"copy_kernel, CTA \(3, 0, 0\), thread \d+, test_gpusim.py:\d+, `st.global.*: "
        r"4 bytes at offset 2048 of argument out \(.*, 2048 bytes\)"
    )
    with simulate(90), pytest.raises(OutOfBoundsError, match=message):
        copy_kernel[(4,)](x, out, 1, ALIGNED=False, BLOCK=128)


def test_out_of_bounds_load() -> None:
    x, out = torch.randn(1000), torch.zeros(1024)
    with simulate(90), pytest.raises(OutOfBoundsError, match=r"ld.global.*argument x"):
        copy_kernel[(2,)](x, out, 0, ALIGNED=False, BLOCK=512)


def test_bounds_are_those_of_the_view() -> None:
    base, out = torch.randn(1024), torch.zeros(1024)
    with simulate(90) as sim:
        with pytest.raises(OutOfBoundsError):
            copy_kernel[(2,)](base[:512], out, 0, ALIGNED=False, BLOCK=512)
        sim.allow(base)
        copy_kernel[(2,)](base[:512], out, 0, ALIGNED=False, BLOCK=512)
    assert torch.equal(out, base)


@triton.jit
def pointer_table_kernel(table, out, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    source = tl.load(table + row).to(tl.pointer_type(tl.float32))
    tl.store(out + row * BLOCK + i, tl.load(source + i))


def test_tables_of_pointers_need_permission() -> None:
    rows, out = [torch.randn(64) for _ in range(3)], torch.zeros(3, 64)
    table = torch.tensor([r.data_ptr() for r in rows])
    with simulate(90) as sim:
        with pytest.raises(OutOfBoundsError):
            pointer_table_kernel[(3,)](table, out, BLOCK=64)
        sim.allow(*rows)
        pointer_table_kernel[(3,)](table, out, BLOCK=64)
    assert torch.equal(out, torch.stack(rows))


def test_false_promise_of_alignment() -> None:
    with simulate(90), pytest.raises(MisalignedError):
        copy_kernel[(1,)](torch.randn(512), torch.zeros(513)[1:], 0, ALIGNED=True, BLOCK=512)


@triton.jit
def assert_kernel(x, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x + tl.arange(0, BLOCK)) > 0, "not positive")


def test_device_assert() -> None:
    x = torch.ones(128)
    with simulate(90):
        assert_kernel[(1,)](x, BLOCK=128, debug=True)
        x[77] = 0
        with pytest.raises(DeviceAssertError, match=r"thread 77.*not positive"):
            assert_kernel[(1,)](x, BLOCK=128, debug=True)


@triton.jit
def dot_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p = i[:, None] * BLOCK + i[None, :]
    tl.store(out + p, tl.dot(tl.load(x + p), tl.load(x + p)))


def test_unsupported_instruction_is_named() -> None:
    with simulate(90), pytest.raises(UnsupportedError, match=r"dot_kernel.*mma.sync"):
        dot_kernel[(1,)](torch.randn(32, 32).half(), torch.zeros(32, 32), BLOCK=32)


@triton.jit
def last_writer_kernel(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.program_id(0))


def test_dependence_on_the_order_of_ctas() -> None:
    def run(schedule: int | None = None, check_races: bool = False) -> int:
        out = torch.zeros(32, dtype=torch.int32)
        with simulate(90, schedule=schedule, check_races=check_races):
            last_writer_kernel[(8,)](out, BLOCK=32)
        return int(out[0])

    assert run() == 7
    assert len({run(schedule) for schedule in range(8)}) > 1
    assert run(3) == run(3)
    with pytest.raises(DataRaceError, match=r"CTA \(1, 0, 0\).*CTA \(0, 0, 0\) wrote"):
        run(check_races=True)


@triton.jit
def lost_update_kernel(x, index, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = out + tl.load(index + i)
    tl.store(target, tl.load(target) + tl.load(x + i))


def test_only_races_show_updates_without_atomics() -> None:
    x, index, out = torch.randn(256), torch.arange(128).repeat(2), torch.zeros(128)
    with simulate(90):
        lost_update_kernel[(2,)](x, index, out, BLOCK=128)
    torch.testing.assert_close(out, x[:128] + x[128:])  # as CTAs run one after the other
    with simulate(90, check_races=True), pytest.raises(DataRaceError):
        lost_update_kernel[(2,)](x, index, out, BLOCK=128)


@triton.jit
def flag_kernel(flag, out, VOLATILE: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.atomic_add(flag, 1)
    else:
        tl.store(out, tl.load(flag, volatile=VOLATILE))


def test_only_volatile_loads_do_not_race_with_atomics() -> None:
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with simulate(90, check_races=True):
        flag_kernel[(2,)](flag, out, VOLATILE=True)
        with pytest.raises(DataRaceError, match="updated atomically"):
            flag_kernel[(2,)](flag, out, VOLATILE=False)
    assert out == 1


@triton.jit
def barrier_kernel(out, BLOCK: tl.constexpr, THREADS: tl.constexpr):
    i = tl.arange(0, BLOCK)
    ASM: tl.constexpr = "bar.sync 1, " + THREADS + "; mov.u32 $0, $1;"
    tl.store(out + i, tl.inline_asm_elementwise(ASM, "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1))


def test_barrier_that_waits_for_too_many_threads() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    with simulate(90):
        barrier_kernel[(1,)](out, BLOCK=128, THREADS="128")
        assert torch.equal(out, torch.arange(128).int())
        with pytest.raises(DeadlockError, match="of 128 threads 128 wait at a barrier"):
            barrier_kernel[(1,)](out, BLOCK=128, THREADS="256")


# Counters


def test_counters_of_coalesced_vector_accesses() -> None:
    n = 4096
    x, y, out = torch.randn(n), torch.randn(n), torch.zeros(n)
    with simulate(90, counters=True) as sim:
        add_kernel[(4,)](x, y, out, n, BLOCK=1024)
    c = sim.last_counters
    assert c.ctas == 4
    assert (c.global_load.bytes, c.global_load.sectors, c.global_load.requests) == (8 * n, 8 * n / 32, 8 * n / 512)
    assert (c.global_store.bytes, c.global_store.sectors, c.global_store.lanes) == (4 * n, 4 * n / 32, n / 4)
    assert c.global_memory.bytes == 12 * n
    assert c.global_load.efficiency == 1
    assert c.barriers == c.shuffles == c.shared_load.requests == 0
    assert "ld.global.v4.b32" in c.table()


@triton.jit
def strided_kernel(x, out, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i * stride))


def test_counters_of_strided_accesses() -> None:
    x, out = torch.randn(256 * 11), torch.zeros(256)
    with simulate(90, counters=True) as sim:
        strided_kernel[(1,)](x, out, 11, BLOCK=256, num_warps=8)
    load = sim.last_counters.global_load
    assert (load.requests, load.lanes, load.bytes, load.sectors) == (8, 256, 1024, 256)  # a sector per lane
    assert load.efficiency == 1 / 8


@gluon.jit
def shared_kernel(out, stride, BLOCK: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    buffer = gl.allocate_shared_memory(gl.int32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    i = gl.arange(0, 32, layout)
    buffer.scatter(i, i * stride, 0)
    gl.barrier()
    gl.store(out + i, buffer.gather(i * stride, 0))
    buffer.atomic_scatter_add(i, i * stride, 0)


@pytest.mark.parametrize(
    ("stride", "words", "updates"),
    [(0, 1, 32), (2, 2, 2), (32, 32, 32), (33, 1, 1)],
    ids=["stride 0", "stride 2", "stride 32", "stride 33"],
)
def test_counters_of_bank_conflicts(stride: int, words: int, updates: int) -> None:
    """Wavefronts count the words of the busiest bank. A word is read or written once, and updated for each lane."""
    out = torch.zeros(32, dtype=torch.int32)
    with simulate(90, counters=True) as sim:
        shared_kernel[(1,)](out, stride, BLOCK=2048, num_warps=1)
    c = sim.last_counters
    assert (c.shared_store.requests, c.shared_store.bytes, c.shared_store.wavefronts) == (1, 128, words)
    assert (c.shared_load.requests, c.shared_load.wavefronts) == (1, words)
    assert (c.shared_atomic.requests, c.shared_atomic.wavefronts) == (1, updates)


@triton.jit
def row_sum_kernel(x, out, columns, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        total += tl.load(x + row * columns + start + i, mask=start + i < columns, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0))


def test_counters_of_a_reduction() -> None:
    x, out = torch.randn(3, 1500).bfloat16(), torch.zeros(3)
    with simulate(80, counters=True) as sim:
        row_sum_kernel[(3,)](x, out, 1500, BLOCK=512, num_warps=4)
    torch.testing.assert_close(out, x.float().sum(1), rtol=1e-5, atol=1e-4)
    c = sim.last_counters
    assert c.barriers == 3
    assert c.shuffles == 3 * (4 * 5 + 4 * 2)  # five rounds in each warp, then two over the sums of the four warps
    assert c.shared_store.requests == 3 * 4


# Inline PTX. Snippets have one output and two inputs, x and y, with a reference each: of one thread's numbers, or of
# the warp's and the lane.

Reference = Callable[[int, int], int]
WarpReference = Callable[[list[int], list[int], int], int]


def to_float(bits: int) -> torch.Tensor:
    return torch.tensor([bits]).to(torch.int32).view(torch.float32)


def to_bits(value: torch.Tensor) -> int:
    return int(value.view(torch.int32))


def bfloat_bits(bits: int) -> int:
    return int(to_float(bits).bfloat16().view(torch.int16)) & 0xFFFF


INTEGER_PTX: dict[str, Reference] = {
    "lop3.b32 $0, $1, $2, 255, 0xe8;": lambda x, y: x & y | x & 255 | y & 255,  # majority
    "prmt.b32 $0, $1, $2, 0x7a10;": lambda x, y: y & 0xFF000000 | (0xFF0000 if x & 0x800000 else 0) | x & 0xFFFF,
    "popc.b32 $0, $1;": lambda x, y: x.bit_count(),
    "clz.b32 $0, $1;": lambda x, y: 32 - x.bit_length(),
    "brev.b32 $0, $1;": lambda x, y: int(f"{x:032b}"[::-1], 2),
    "shl.b32 $0, $1, $2;": lambda x, y: x << y if y < 32 else 0,
    "shf.l.wrap.b32 $0, $1, $1, $2;": lambda x, y: x << y % 32 | x >> (32 - y % 32),
    "bfe.u32 $0, $1, 3, 7;": lambda x, y: x >> 3 & 127,
    "{ .reg .pred p; setp.lt.u32 p, $1, $2; selp.b32 $0, $1, $2, p; @!p add.u32 $0, $0, 1; }": lambda x, y: (
        x if x < y else y + 1
    ),
    "mul.hi.u32 $0, $1, $2;": lambda x, y: x * y >> 32,
    "{ .reg .b64 w; .reg .b32 lo; mul.wide.u32 w, $1, $2; mov.b64 {lo, $0}, w; }": lambda x, y: x * y >> 32,
    "mad.lo.u32 $0, $1, $2, 7;": lambda x, y: x * y + 7,
    "{ .reg .b32 lo; mad.lo.cc.u32 lo, $1, $2, $1; madc.hi.u32 $0, $1, $2, 0; }": lambda x, y: x * y + x >> 32,
    "{ .reg .b32 lo; add.cc.u32 lo, $1, $1; addc.u32 $0, $2, 0; }": lambda x, y: (x + x >> 32) + y,
}
FLOAT_PTX: dict[str, Reference] = {
    "cvt.rn.bf16x2.f32 $0, $1, $2;": lambda x, y: bfloat_bits(x) << 16 | bfloat_bits(y),
    "max.f32 $0, $1, $2;": lambda x, y: to_bits(torch.maximum(to_float(x), to_float(y))),
    "ex2.approx.ftz.f32 $0, $1;": lambda x, y: to_bits(to_float(x).exp2()),
    "rsqrt.approx.f32 $0, $1;": lambda x, y: to_bits(to_float(x).rsqrt()),
}
WARP_PTX: dict[str, WarpReference] = {
    "mov.u32 $0, %laneid;": lambda x, y, lane: lane,
    "redux.sync.add.s32 $0, $1, 0xffffffff;": lambda x, y, lane: sum(x),
    "redux.sync.max.u32 $0, $1, 0xffffffff;": lambda x, y, lane: max(x),
    "{ .reg .pred p; setp.ne.u32 p, $2, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }": lambda x, y, lane: sum(
        1 << i for i in range(32) if y[i]
    ),
    "{ .reg .b32 t; and.b32 t, $1, 1; match.any.sync.b32 $0, t, 0xffffffff; }": lambda x, y, lane: sum(
        1 << i for i in range(32) if x[i] % 2 == x[lane] % 2
    ),
    "shfl.sync.down.b32 $0, $1, 3, 0x1f, 0xffffffff;": lambda x, y, lane: x[lane + 3 if lane < 29 else lane],
}


@triton.jit
def ptx_kernel(x, y, out, SNIPPETS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    operands = [tl.load(x + i), tl.load(y + i)]
    for k in tl.static_range(COUNT):
        r = tl.inline_asm_elementwise(SNIPPETS[k], "=r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)
        tl.store(out + k * BLOCK + i, r)


def run_ptx(snippets: list[str], x: torch.Tensor, y: torch.Tensor) -> list[list[int]]:
    """What each snippet gives in each lane of a warp."""
    out = torch.zeros(len(snippets), 32, dtype=torch.int32)
    with simulate(100):
        ptx_kernel[(1,)](x, y, out, tuple(snippets), COUNT=len(snippets), BLOCK=32, num_warps=1)
    return unsigned(out)


def unsigned(numbers: torch.Tensor) -> list:
    return (numbers.long() & 0xFFFFFFFF).tolist()


def integer_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randint(-(2**31), 2**31, (32,)).int(), integers(32, 40)
    y[5] = 0
    return x, y


def test_ptx_on_integers() -> None:
    x, y = integer_inputs()
    lanes = list(zip(unsigned(x), unsigned(y), strict=True))
    expected = {asm: [f(*lane) & 0xFFFFFFFF for lane in lanes] for asm, f in INTEGER_PTX.items()}
    assert dict(zip(INTEGER_PTX, run_ptx(list(INTEGER_PTX), x, y), strict=True)) == expected


def test_ptx_on_floats() -> None:
    x, y = (torch.rand(32).add(0.5).view(torch.int32) for _ in range(2))
    lanes = list(zip(x.tolist(), y.tolist(), strict=True))
    for (asm, f), got in zip(FLOAT_PTX.items(), run_ptx(list(FLOAT_PTX), x, y), strict=True):
        for lane, bits in zip(lanes, got, strict=True):
            assert abs(bits - f(*lane)) <= (2 if "approx" in asm else 0), asm  # units in the last place


def test_ptx_on_warps() -> None:
    x, y = integer_inputs()
    xs, ys = unsigned(x), unsigned(y)
    expected = {asm: [f(xs, ys, lane) & 0xFFFFFFFF for lane in range(32)] for asm, f in WARP_PTX.items()}
    assert dict(zip(WARP_PTX, run_ptx(list(WARP_PTX), x, y), strict=True)) == expected


def test_ptx_beyond_shared_memory() -> None:
    with pytest.raises(OutOfBoundsError, match="of shared memory, which has 0 bytes"):
        run_ptx(["{ .reg .b32 p; mov.u32 p, 4096; ld.shared.b32 $0, [p]; }"], *integer_inputs())


@pytest.mark.parametrize("asm", ["cvt.rz.bf16x2.f32 $0, $1, $2;", "mov.u32 $0, %clock;"], ids=["form", "register"])
def test_ptx_that_is_unknown(asm: str) -> None:
    with pytest.raises(UnsupportedError):
        run_ptx([asm], *integer_inputs())


# Where there is no simulation


def test_interpreter_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert "TRITON_INTERPRET" in (why_unavailable() or "")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), simulate():
        pass


def test_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "compiler" in (why_unavailable() or "")


def test_import_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import efcp.perf; "
        "from efcp.perf.gpu.gpusim import DataRaceError, why_unavailable; print(why_unavailable())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert "triton, which is not installed" in done.stdout, done.stderr
