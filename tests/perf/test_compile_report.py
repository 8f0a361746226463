"""The report on compiled kernels: what it finds in the small kernels of this file, and what it calls a problem."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from efcp.perf.gpu import report as compile_report
from efcp.perf.gpu.code import accesses, read_code, source_lines
from efcp.perf.gpu.occupancy import resident_programs
from efcp.perf.gpu.offline import Compiled, GPUTarget, compile_for
from efcp.perf.gpu.report import Case, problems, unreached

SM90, GFX942 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
TARGETS = pytest.mark.parametrize("target", [SM90, GFX942], ids=["sm90", "gfx942"])
SIZE = 1024  # elements of a block


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """A cache for this file alone: kernels that another copy of the file has left in Triton's know that copy's path."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@triton.jit
def _load(x, position, numel, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(x + position, mask=position < numel, other=0.0)
    else:
        return tl.load(x + position)


@triton.jit
def _double_kernel(x, y, numel, SIZE: tl.constexpr):
    position = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    if tl.program_id(0) * SIZE + SIZE <= numel:
        a = _load(x, position, numel, False)  # stream
        tl.store(y + position, 2 * a)  # stream
    else:
        a = _load(x, position, numel, True)
        tl.store(y + position, 2 * a, mask=position < numel)


@triton.jit
def _sum_kernel(x, y, rounds, SIZE: tl.constexpr, STEPS: tl.constexpr):
    position = tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for first in range(0, rounds):
        for step in tl.static_range(STEPS):
            total += tl.load(x + (first * STEPS + step) * SIZE + position)  # stream
    tl.store(y + position, total)


@triton.jit
def _normalise_kernel(x, SIZE: tl.constexpr):
    position = tl.arange(0, SIZE)
    value = tl.load(x + position)  # stream
    tl.store(x + position, value / tl.sum(value, 0))  # stream


@triton.jit
def _scale_kernel(x, FACTOR: tl.constexpr):
    position = tl.arange(0, 64)
    value = tl.load(x + position) * FACTOR  # stream
    power = tl.exp(value)  # stream
    if FACTOR > 2:
        tl.store(x + 64 + position, value)  # stream
    tl.store(x + position, power)


@triton.jit
def _plain_kernel(x):
    tl.store(x, 1.0)


def compiled(target: GPUTarget, kernel, *arguments, **options) -> Compiled:
    with compile_for(target) as kernels:
        kernel[(1,)](*arguments, **options)
    return kernels[0]


def double(target: GPUTarget, x=None, y=None) -> Compiled:
    x, y = (torch.zeros(4 * SIZE) if t is None else t for t in (x, y))
    return compiled(target, _double_kernel, x, y, 4 * SIZE, SIZE=SIZE, num_warps=2)


def line_of(text: str) -> int:
    """The first line of this file that has the text."""
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


FULL, TAIL = line_of("numel, False)"), line_of("numel, True)")


@TARGETS
def test_nothing_to_say_about_a_good_kernel(target):
    assert problems(double(target)) == []


@TARGETS
def test_accesses_know_the_calls_that_led_to_them(target):
    """A helper that is called with masks and without has the same lines for both; the lines of the calls differ."""
    found = accesses(double(target))
    name = Path(__file__).name
    loads = {access.lines for access in found if access.kind == "load"}
    masked, plain = line_of("position < numel, other=0.0)"), line_of("return tl.load(x + position)")
    assert loads == {((name, plain), (name, FULL)), ((name, masked), (name, TAIL))}
    assert {access.bits for access in found} == {128}
    assert {access.lines[-1] for access in found if access.streams({(name, FULL)})} == {(name, FULL)}


@TARGETS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_streams_of_every_dtype_must_be_wide(target, dtype):
    """A wide access holds 8 elements of bfloat16, or 2 of float64."""
    x = torch.zeros(4 * SIZE, dtype=dtype)
    assert problems(double(target, x, x)) == []


@TARGETS
def test_notices_narrow_loads_and_stores(target):
    odd = torch.zeros(4 * SIZE + 1)[1:]  # not aligned, so Triton takes 32 bits at a time
    (found,) = problems(double(target, x=odd))
    assert f".py:{FULL} streams 32 bits" in found
    (found,) = problems(double(target, y=odd))  # on AMD both paths share the store
    assert f".py:{FULL + 1} streams 32 bits" in found


def test_notices_spilled_registers():
    kernel = compiled(SM90, _normalise_kernel, torch.ones(4096), SIZE=4096, num_warps=1, maxnreg=64)
    assert [re.sub(r"\d+", "N", text) for text in problems(kernel)] == [
        "spills N bytes of registers, and takes N bytes of stack"
    ]


def test_notices_a_program_that_does_not_fit():
    kernel = compiled(SM90, _normalise_kernel, torch.ones(4096), SIZE=4096, num_warps=4)
    assert problems(kernel) == []
    (found,) = problems(Compiled(**{**vars(kernel), "shared": 300_000}))
    assert re.search("does not fit.* 300000 bytes", found)


@TARGETS
def test_notices_lines_that_are_marked_for_nothing(target):
    x = torch.zeros(128)
    kernel = compiled(target, _scale_kernel, x, FACTOR=2, num_warps=1)
    name, line = Path(__file__).name, line_of("value = tl.load(x + position) * FACTOR")
    narrow, nothing = problems(kernel)
    assert narrow == f"{name}:{line} streams {64 * 32 // target.warp_size} bits at a time"
    assert nothing == f"{name}:{line + 1} is marked, but has no access to global memory"
    left_out = f"{__file__}:{line + 3} is marked, but in no kernel"
    reached = [(str(path), line) for path, line in source_lines(kernel)]
    assert left_out in unreached(reached)
    more = compiled(target, _scale_kernel, x, FACTOR=3)
    assert left_out not in unreached(reached + [(str(path), line) for path, line in source_lines(more)])


@TARGETS
def test_a_kernel_must_stream_or_be_exempt(target):
    kernel = compiled(target, _plain_kernel, torch.zeros(2))
    assert problems(kernel) == ["has no line marked `# stream`"]
    assert problems(kernel, exempt=frozenset({"_plain_kernel"})) == []


@TARGETS
@pytest.mark.parametrize("steps", [1, 4])
def test_finds_the_main_loop_and_what_it_has_in_flight(target, steps):
    x = torch.zeros(64 * SIZE)
    kernel = compiled(target, _sum_kernel, x, x, 16, SIZE=SIZE, STEPS=steps, num_warps=4)
    code = read_code(kernel, accesses(kernel))
    assert code.loop_lines == {(Path(__file__).name, line_of("first * STEPS + step"))}
    round_bytes = 4 * SIZE // (4 * target.warp_size) * steps  # of a thread
    assert code.loop_bytes % round_bytes == 0  # the loop may be unrolled
    assert 16 <= code.in_flight <= code.loop_bytes
    assert code.in_flight >= round_bytes // 2
    assert 0 < code.loop_instructions < code.instructions
    assert read_code(kernel, []).in_flight == 0


AMD_LOOP = """
	.loc	1 7 1  ; a.py:7:1
	global_load_dwordx4 v[0:3], v8, s[0:1]
.LBB0_1:
	.loc	1 8 1  ; a.py:8:1 @[ a.py:20:1 ]
	global_load_dwordx4 v[4:7], v8, s[0:1]
	buffer_load_dwordx2 v[4:7], v8, s[0:3], 0 offen
	.loc	1 9 1  ; a.py:9:1
	global_load_ushort v9, v8, s[0:1]
	s_waitcnt vmcnt(2)
	s_barrier
	v_add_f32 v0, v0, v1
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.end_amdhsa_kernel
"""


def test_bytes_in_flight_by_hand(tmp_path):
    """A round loads 16, 8 and 2 bytes, and waits for all but the last two: at most 8 + 2 + 16 + 8 + 2 in flight."""
    (tmp_path / "text").write_text(AMD_LOOP)
    sample = compiled(GFX942, _plain_kernel, torch.zeros(2))
    kernel = Compiled(**{**vars(sample), "stages": {"amdgcn": tmp_path / "text"}})
    found = accesses(kernel)
    assert [(a.bits, a.lines[0][1]) for a in found] == [(128, 7), (128, 8), (64, 8), (16, 9)]
    assert found[1].lines == (("a.py", 8), ("a.py", 20))
    code = read_code(kernel, found)
    assert (code.instructions, code.loop_instructions, code.barriers) == (9, 7, 1)
    assert (code.loop_bytes, code.in_flight) == (26, 36)
    code = read_code(kernel, [access for access in found if access.streams({("a.py", 20)})])
    assert (code.loop_bytes, code.in_flight) == (24, 8 + 24)


def test_copies_to_shared_memory_are_waited_for_in_groups(tmp_path, monkeypatch):
    sass = "\n".join(
        f"        /*{16 * n:04x}*/  {text} ;"
        for n, text in enumerate(["LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGDEPBAR"] * 3)
    )
    sass += "\n        /*0100*/  DEPBAR.LE SB0, 0x1 ;\n        /*0110*/  LDGSTS.E.64 [R1], [R2.64] ;\n"
    ptx = '.file 1 "/a.py"\n.loc 1 3 1\ncp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;\n'
    (tmp_path / "ptx").write_text(ptx)
    sample = double(SM90)
    monkeypatch.setattr(
        "efcp.perf.gpu.code.subprocess.run",
        lambda *_, **__: SimpleNamespace(stdout='//## File "/a.py", line 3\n' + sass),
    )
    kernel = Compiled(**{**vars(sample), "stages": {"ptx": tmp_path / "ptx", "cubin": tmp_path}})
    (copy,) = accesses(kernel)
    assert (copy.kind, copy.bits, copy.lines) == ("load", 128, (("a.py", 3),))
    assert read_code(kernel, [copy]).in_flight == 48  # three groups of 16; then one of them and 8


def test_source_lines_leave_out_what_is_not_compiled():
    kernel = double(SM90)
    lines = {line for path, line in source_lines(kernel) if path == Path(__file__)}
    assert {FULL, TAIL} <= lines
    assert line_of("total += ") not in lines


@pytest.mark.parametrize(
    ("arch", "num_warps", "registers", "shared", "programs"),
    [
        (90, 4, 32, 0, 16),  # 64 warps
        (90, 1, 32, 0, 32),  # programs
        (90, 8, 168, 0, 1),  # 512 // 168 = 3 warps in each of 4 partitions
        (90, 4, 168, 0, 3),
        (90, 4, 65, 0, 7),  # 65 registers cost 72: 7 warps in a partition
        (90, 4, 255, 0, 2),
        (90, 4, 32, 16 * 1024, 13),  # 228 // 17
        (90, 4, 32, 227 * 1024, 1),
        (90, 4, 32, 227 * 1024 + 1, 0),
        (80, 4, 32, 16 * 1024, 9),  # 164 // 17
        (100, 4, 40, 16 * 1024, 12),  # 512 // 40 = 12 warps in a partition
        (120, 4, 32, 0, 12),  # 48 warps
        (120, 4, 32, 8 * 1024, 11),  # 100 // 9
        (90, 32, 64, 0, 1),
        (90, 32, 65, 0, 0),  # 28 warps
        ("gfx942", 4, 64, 0, 8),  # 8 waves in each of 4 SIMDs
        ("gfx942", 4, 65, 0, 7),
        ("gfx90a", 4, 128, 0, 4),
        ("gfx90a", 8, 512, 0, 0),
        ("gfx90a", 1, 8, 0, 32),
        ("gfx90a", 2, 8, 0, 16),
        ("gfx942", 4, 8, 16 * 1024, 4),
        ("gfx942", 4, 8, 16 * 1024 + 4, 3),
    ],
)
def test_resident_programs_by_hand(arch, num_warps, registers, shared, programs):
    assert resident_programs(arch, num_warps, registers, shared) == programs


def test_occupancy_agrees_with_the_compiler_of_amd():
    for size, num_warps in ((1024, 4), (16384, 1), (16384, 4)):
        kernel = compiled(GFX942, _normalise_kernel, torch.ones(size), SIZE=size, num_warps=num_warps)
        (waves,) = re.findall(r"; Occupancy: (\d+)", kernel.stages["amdgcn"].read_text())
        assert resident_programs("gfx942", 1, kernel.registers, 0) == 4 * int(waves)


def broken(*_: object) -> None:
    raise ValueError("no such layout")


@pytest.fixture
def small(monkeypatch):
    """Four operations: one is nothing, and all others are one small kernel."""

    def run(grads, *_):
        _double_kernel[(1,)](grads[0], grads[0], 4 * SIZE, SIZE=SIZE, num_warps=operations.num_warps)

    names = ("norm_is_finite", "compress_", "window_dots", "window_apply_")
    others = dict.fromkeys(("undo_compress_", "average_", "store_lowbit_", "add_lowbit_", "mfac_row_step_"), broken)
    operations = SimpleNamespace(**dict.fromkeys(names, run), **others)
    operations.window_dots = lambda *_: None
    monkeypatch.setattr(compile_report, "OPERATIONS", names)
    operations.num_warps = 4
    monkeypatch.setattr(compile_report, "triton_ops", operations)
    monkeypatch.setattr(compile_report, "quick_cases", lambda: [Case(SIZE, 0.01, *[torch.float32] * 3, 4)])
    monkeypatch.setattr(compile_report, "unreached", lambda reached: [])  # this file has many unreached lines
    return operations


CHECK = ["--quick", "--check", "--processes", "1"]


def test_check_tells_by_its_exit_status(small, capsys):
    assert compile_report.main(CHECK) == 0
    assert capsys.readouterr().out == "6 kernels, 0 problems\n"  # of three operations for two targets
    small.window_dots = broken
    assert compile_report.main(CHECK) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("window_dots, 90, B=1024 1% fp32/fp32/fp32 m=4: does not compile: ValueError no such layout")
    assert lines[-1] == "6 kernels, 2 problems"


def test_check_notices_too_few_bytes_in_flight(small, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "KB_IN_FLIGHT", 1000)
    assert compile_report.main(CHECK) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "6 kernels, 3 problems"
    assert all(re.search(r"_double_kernel\(.*\), 90, .*: has \d+\.\d KB in flight$", line) for line in lines)


def test_goes_on_where_it_was_interrupted(small, monkeypatch, tmp_path):
    cases = compile_report.quick_cases()

    def parts():
        return compile_report.compile_all([SM90], cases, 1, tmp_path / "parts")

    def interrupt(*_):
        raise KeyboardInterrupt

    expected = compile_report.compile_all([SM90], cases, 1, None)
    small.window_dots = interrupt
    with pytest.raises(KeyboardInterrupt):
        parts()
    small.norm_is_finite = small.compress_ = interrupt  # these are done
    small.window_dots = lambda *_: None
    assert [len(part.rows) for part in parts()] == [len(part.rows) for part in expected] == [1, 1, 0, 1]


@pytest.mark.slow
def test_processes_share_the_work(monkeypatch):
    """Each process compiles the real operations."""
    monkeypatch.setattr(compile_report, "OPERATIONS", ("norm_is_finite",))
    cases = [Case(4096, 0.01, *[torch.float32] * 3, 4)]
    ((first,), (second,)) = (compiled.rows for compiled in compile_report.compile_all([SM90, GFX942], cases, 2, None))
    assert (first["kernel"], second["kernel"]) == ("_squares_kernel", "_squares_kernel")
    assert (first["target"], second["target"]) == (90, "gfx942")


def test_the_report(small, tmp_path):
    small.window_dots = broken
    small.num_warps = 1  # no other test has compiled this in the process, and it goes to a cache of its own
    csv, text = tmp_path / "a" / "report.csv", tmp_path / "report.md"
    assert compile_report.main(["--quick", "--processes", "1", "--csv", str(csv), "--markdown", str(text)]) == 0
    frame = pd.read_csv(csv)
    assert list(frame["operation"]) == [name for name in compile_report.OPERATIONS for _ in range(2)]
    row = frame.iloc[0]
    assert (row["kernel"], row["target"], row["warps"]) == ("_double_kernel", "90", 1)
    assert row["configuration"] == f"SIZE={SIZE}"
    assert re.fullmatch(r"test_compile_report: \d+ 128×8, \d+\* 128×8", row["loads"])
    assert row["KB in flight"] == 4 * SIZE * row["programs"] / 1024  # both loads of the full block
    assert row["compile s"] > 0
    assert "## window_dots" in text.read_text()
    assert "no such layout" in text.read_text()
