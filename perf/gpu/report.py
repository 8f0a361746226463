"""Compiles every shipped configuration of the Triton kernels for GPUs that are not here, and reports on the code.

    python -m efcp.perf.gpu.report            # results/gpu/compile-report.csv and .md
    python -m efcp.perf.gpu.report --check    # exit status 1 if a kernel is not as it should be

Several processes share the operations and targets (`--processes`). Without `--quick`, finished parts are kept in a
folder for temporary files until all are done, so that an interrupted report can go on from there.

| column | what |
|---|---|
| case | block size, density, dtypes of gradient / error / values, and window of its first launch |
| configuration | its compile-time numbers and types |
| registers, spilled, stack | of a thread; the last two in bytes |
| shared | of a program, bytes |
| programs | that a multiprocessor holds at a time, `occupancy.py` |
| occupancy | their warps, relative to the most warps of a multiprocessor |
| KB in flight | bytes in flight of a thread, as in `code.py`, times lanes, warps and resident programs, over 1024 |
| loads, stores | static, of global memory: file: line bits×count; * if streaming, ? for an unknown line |
| main loop | lines of its streaming loads |
| an element | instructions of a thread in the main loop for each element of gradient or window that it loads |
| instructions, barriers | static |
| compile s | seconds to compile |

An access streams if its line, or the line of a call through which it was inlined, ends with the comment `# stream`.
Of a call over several lines, the first line counts. Where two paths of a kernel end in the same way, the compiler for
AMD merges the ends, and their accesses lose their lines. Accesses without a line stand for marked lines without an
access, and must be as wide.

On sm_80 and sm_90, fewer than 32 KB in flight count as a problem.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.gpu.report")

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import triton
import triton.language as tl
from tqdm import tqdm

from efcp.kernels import Blocks, LowBit, RowStep, SparseRows, Update, allocate_lowbit
from efcp.kernels import triton as triton_ops
from efcp.kernels.gpus import ARCHITECTURES
from efcp.perf.command import ending, workers
from efcp.perf.gpu.code import Access, Line, accesses, read_code, source_lines, stream_lines
from efcp.perf.gpu.occupancy import resident_programs
from efcp.perf.gpu.offline import Compiled, GPUTarget, compile_for
from efcp.perf.tables import table, write_csv

__all__ = ["Case", "Compilation", "CompiledCase", "compile_cases", "compile_one", "problems", "unreached"]

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)]
TARGETS += [GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")]
OPERATIONS = (
    "norm_is_finite",
    "compress_",
    "undo_compress_",
    "average_",
    "store_lowbit_",
    "add_lowbit_",
    "window_dots",
    "window_dots with momenta",
    "window_apply_",
    "window_apply_ with squares",
    "mfac_row_step_",
)
BLOCK_SIZES = (256, 4096, 32768)
DENSITIES = (0.001, 0.1)
WINDOWS = (32, 1024)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
BITS8, BITS4 = torch.int8, torch.uint8  # of errors: the dtypes of codes
SHORT = {FP32: "fp32", BF16: "bf16", FP64: "fp64", BITS8: "8 bits", BITS4: "4 bits", None: "none"}
DTYPES: list[tuple[torch.dtype, torch.dtype | None, torch.dtype]] = [  # of gradient, error and values
    (FP32, FP32, BF16),
    (BF16, FP32, BF16),
    (BF16, BF16, BF16),
    (FP32, FP32, FP32),
    (FP64, FP64, BF16),
    (FP32, None, BF16),
]
FEW_BITS = [(grad, error) for grad in (FP32, BF16) for error in (BITS8, BITS4)]
# The fallbacks of portable.py read rows that begin anywhere, entry by entry. Undoing a step need not be fast. The m × m
# algebra is one program, whose matrices stay in caches.
EXEMPT = frozenset(
    {"_spread_kernel", "_portable_dots_kernel", "_portable_apply_kernel", "_undo_kernel", "_row_step_kernel"}
)
STREAM_BITS = 128
KB_IN_FLIGHT = 32  # the least, on these targets:
BUSY = (80, 90)
# With large blocks its sums take so much shared memory that too few programs fit.
FILLING, SHARED_OF_MANY = "_apply_kernel", 32 << 10
RESULTS = Path("results/gpu")


@dataclass(frozen=True)
class Case:
    """The settings of an optimizer that the kernels depend on."""

    block_size: int
    density: float
    grad: torch.dtype
    error: torch.dtype | None
    values: torch.dtype
    window: int

    def __str__(self) -> str:
        dtypes = "/".join(SHORT[dtype] for dtype in (self.grad, self.error, self.values))
        return f"B={self.block_size} {self.density:.1%} {dtypes} m={self.window}".replace(".0%", "%")


@dataclass(frozen=True)
class CompiledCase:
    """A kernel of an operation, or the reason why it was not compiled."""

    operation: str
    target: GPUTarget
    case: Case
    kernel: Compiled | None
    error: str = ""


Job = tuple[GPUTarget, str]  # an operation on a target


class Compilation(NamedTuple):
    """The result of compiling an operation for a target."""

    rows: list[dict[str, object]]  # of the table; columns as at the head of this file, and `problem`
    reached: list[tuple[str, int]]  # files and lines that its kernels have code from


def compile_one(target: GPUTarget, operation: str, cases: Sequence[Case]) -> Compilation:
    """Compile an operation in all cases, without Triton's cache, so that every kernel has a compile time."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        results = compile_cases(target, operation, cases)
        kernels = [result.kernel for result in results if result.kernel]
        reached = {(str(path), line) for kernel in kernels for path, line in source_lines(kernel)}
        return Compilation([_row(result) for result in results], sorted(reached))


def compile_cases(target: GPUTarget, operation: str, cases: Iterable[Case]) -> list[CompiledCase]:
    """Compile an operation in all cases, each kernel once."""
    results = []
    with compile_for(target) as compiled:
        for name, case, launch in _launches(cases):
            if name != operation:
                continue
            before = len(compiled)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", RuntimeWarning)  # another kernel would run in place of this one
                    launch()
            except Exception as error:  # of any kind: Triton's, LLVM's, or the assembler's
                last = str(error).strip().splitlines()[-1:]
                results.append(CompiledCase(operation, target, case, None, " ".join([type(error).__name__, *last])))
            results += [CompiledCase(operation, target, case, kernel) for kernel in compiled[before:]]
    return results


def problems(kernel: Compiled, exempt: frozenset[str] = EXEMPT) -> list[str]:
    """What is wrong with a kernel: spilled registers, use of a stack, more than a multiprocessor holds, narrow streams.

    Args:
        kernel: compiled for one of `ARCHITECTURES`.
        exempt: names of kernels that need not stream.

    Returns:
        Sentences without the kernel's name; none if all is well.
    """
    found = []
    if kernel.spilled or kernel.stack:
        found.append(f"spills {kernel.spilled} bytes of registers, and takes {kernel.stack} bytes of stack")
    if _programs(kernel) == 0:
        found.append(f"does not fit: {kernel.num_warps} warps, {kernel.registers} registers, {kernel.shared} bytes")
    marked = _marked(kernel)
    if not marked and kernel.name not in exempt:
        found.append("has no line marked `# stream`")
    bits = [(access.bits, access.lines) for access in accesses(kernel)]
    for line in sorted(marked):
        here = [width for width, lines in bits if line in lines] or [width for width, lines in bits if not lines]
        if not here:
            found.append(f"{_place(line)} is marked, but has no access to global memory")
        elif min(here) < STREAM_BITS:
            found.append(f"{_place(line)} streams {min(here)} bits at a time")
    return found


def unreached(reached: Iterable[tuple[str, int]]) -> list[str]:
    """Messages on marked lines in the source files of kernels that are compiled into no kernel."""
    lines = set(reached)
    marked = {(path, line) for path in {path for path, _ in lines} for line in stream_lines(Path(path))}
    return [f"{path}:{line} is marked, but in no kernel" for path, line in sorted(marked - lines)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="efcp.perf.gpu.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "compile-report.csv", help="where to write all columns")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "compile-report.md", help="where to write tables")
    parser.add_argument("--quick", action="store_true", help="some configurations, two targets")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is wrong")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many compile at a time")
    options = parser.parse_args(arguments)
    cases = list(quick_cases() if options.quick else all_cases())
    targets = [target for target in TARGETS if target.arch in (90, "gfx942") or not options.quick]
    folder = None if options.quick else Path(tempfile.gettempdir()) / f"efcp-compile-report-{_version(cases)}"
    with ending(parser, "the same command goes on from what has been compiled" if folder else "nothing is kept"):
        parts = compile_all(targets, cases, options.processes, folder)
    rows = [row for part in parts for row in part.rows]
    if options.check:
        status = _check(rows, unreached(place for part in parts for place in part.reached))
    else:
        status = 0
        rows = [row for operation in OPERATIONS for row in rows if row["operation"] == operation]
        frame = pd.DataFrame(rows).convert_dtypes()
        write_csv(frame, options.csv)
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(frame, options.quick))
        print(f"{len(frame)} kernels: {options.csv}, {options.markdown}")
    if folder:
        shutil.rmtree(folder)
    return status


def compile_all(
    targets: Sequence[GPUTarget], cases: Sequence[Case], processes: int, folder: Path | None
) -> list[Compilation]:
    """Compile all operations for all targets, in the order of the targets.

    Args:
        targets: the GPUs.
        cases: the settings to launch with.
        processes: how many compile at a time; 1 compiles in this process.
        folder: where each result is kept, and taken from if it is there; None keeps nothing.
    """
    jobs = [(target, operation) for target in targets for operation in OPERATIONS]
    files = {job: folder / f"{job[0].arch}-{job[1]}.json" for job in jobs} if folder else {}
    parts = {job: Compilation(**json.loads(file.read_text())) for job, file in files.items() if file.is_file()}
    todo = [job for job in jobs if job not in parts]
    for job, part in tqdm(_made(todo, cases, processes), total=len(todo), unit="operation"):
        parts[job] = part
        if job in files:
            files[job].parent.mkdir(parents=True, exist_ok=True)
            new = files[job].with_suffix(".new")
            new.write_text(json.dumps(part._asdict()))
            new.replace(files[job])
    return [parts[job] for job in jobs]


def _made(jobs: Sequence[Job], cases: Sequence[Case], processes: int) -> Iterator[tuple[Job, Compilation]]:
    """Yields each job with its result as soon as it is done."""
    if processes == 1:
        yield from ((job, compile_one(*job, cases)) for job in jobs)
        return
    with workers(processes) as pool:
        submitted = {pool.submit(compile_one, *job, cases): job for job in jobs}
        yield from ((submitted[future], future.result()) for future in as_completed(submitted))


def _version(cases: Sequence[Case]) -> str:
    """A hash of everything that the report depends on."""
    version = hashlib.sha256(f"{triton.__version__} {torch.__version__} {cases}".encode())
    for folder in (Path(triton_ops.__file__).parents[1], Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            version.update(path.read_bytes())
    return version.hexdigest()[:12]


def all_cases() -> Iterator[Case]:
    """Each block size with the main dtypes and densities; the default block size with all dtypes and windows."""
    for block_size in BLOCK_SIZES:
        for dtypes in DTYPES[:3]:
            yield Case(block_size, 0.01, *dtypes, 256)
        for density in DENSITIES:
            yield Case(block_size, density, *DTYPES[0], 256)
    for dtypes in DTYPES[3:]:
        yield Case(4096, 0.01, *dtypes, 256)
    for window in WINDOWS:
        yield Case(4096, 0.01, *DTYPES[0], window)
    for block_size in (4096, 32768):
        for grad, error in FEW_BITS:
            yield Case(block_size, 0.01, grad, error, BF16, 256)


def quick_cases() -> Iterator[Case]:
    """The cases where kernels differ most: the default, few and many entries, a block in pieces, the widest dtypes."""
    yield Case(4096, 0.01, FP32, FP32, BF16, 256)
    yield Case(4096, 0.1, BF16, BF16, BF16, 32)
    yield Case(256, 0.01, BF16, FP32, BF16, 256)
    yield Case(32768, 0.01, FP64, FP64, BF16, 1024)
    yield Case(4096, 0.01, FP32, BITS8, BF16, 256)
    yield Case(4096, 0.01, BF16, BITS4, BF16, 256)
    yield Case(32768, 0.01, FP32, BITS4, BF16, 256)


def markdown(frame: pd.DataFrame, quick: bool) -> str:
    """The report in Markdown, with a table for each operation."""
    text = [
        "# Compiled kernels",
        "",
        f"Made by `python -m efcp.perf.gpu.report{' --quick' * quick}`, whose head explains the columns.",
        "",
    ]
    for operation, rows in frame.groupby("operation", sort=False):
        text += [f"## {operation}", ""]
        shown = rows.drop(columns="operation").astype(object)
        shown = shown.where(shown.notna(), "")
        if (rows["problem"] == "").all():
            shown = shown.drop(columns="problem")
        text += [table([shown.columns, *shown.itertuples(index=False)]), ""]
    return "\n".join(text)


def _launches(cases: Iterable[Case]) -> Iterator[tuple[str, Case, Callable[[], object]]]:
    """Yields launches on two parameters, one with a shorter last block; no two launches have the same arguments."""
    seen: set[tuple[object, ...]] = set()
    for case in cases:
        meta = partial(torch.empty, device="meta")
        rows = [_rows(case, numel) for numel in (2 * case.block_size, 3 * case.block_size - case.block_size // 3)]
        grads = [meta(r.blocks.numel, dtype=case.grad) for r in rows]
        errors = [_error(case, r.blocks) for r in rows] if case.error else []
        slot, finite = meta(1, dtype=torch.int64), meta((), dtype=torch.bool)
        update = Update(meta(case.window), meta(()), meta(()))
        reads = update._replace(momentum_factor=meta(()))
        writes = reads._replace(writes_momenta=True)
        squares = update._replace(square_weights=meta(case.window), eps=meta(()))
        momenta, numbers = (
            [allocate_lowbit(r.blocks.numel, bits, torch.device("meta")) for r in rows] for bits in (8, 4)
        )
        keys = [slot] * len(rows)
        window = (case.block_size, case.density, case.window, case.values)
        dots = meta(case.window, dtype=FP64)
        calls: dict[tuple[object, ...], Callable[[], object]] = {
            ("norm_is_finite", case.grad): partial(triton_ops.norm_is_finite, grads),
            ("compress_", window, case.grad, case.error): partial(
                triton_ops.compress_, grads, errors, rows, slot, keys
            ),
            ("undo_compress_", window[:2], case.values, case.grad, case.error): partial(
                triton_ops.undo_compress_, grads, errors, rows, slot, finite, keys
            ),
            ("average_", case.grad): partial(triton_ops.average_, grads, grads, 0.9, finite),
            ("average_", case.grad, 8): partial(triton_ops.average_, momenta, grads, 0.9, finite),
            ("store_lowbit_", case.grad, 8): partial(triton_ops.store_lowbit_, momenta, grads, finite),
            ("store_lowbit_", case.grad, 4): partial(triton_ops.store_lowbit_, numbers, grads, finite, keys),
            ("add_lowbit_", case.grad, 8): partial(triton_ops.add_lowbit_, grads, momenta),
            ("add_lowbit_", case.grad, 4): partial(triton_ops.add_lowbit_, grads, numbers),
            ("window_dots", window): partial(triton_ops.window_dots, rows, slot),
            ("window_dots with momenta", window, case.grad): partial(triton_ops.window_dots, rows, slot, grads),
            ("window_dots with momenta", window, 8): partial(triton_ops.window_dots, rows, slot, momenta),
            ("window_apply_", window, case.grad): partial(triton_ops.window_apply_, grads, [], rows, update),
            ("window_apply_", window, case.grad, "reads"): partial(triton_ops.window_apply_, grads, grads, rows, reads),
            ("window_apply_", window, case.grad, "writes"): partial(
                triton_ops.window_apply_, grads, grads, rows, writes
            ),
            ("window_apply_", window, case.grad, 8): partial(triton_ops.window_apply_, grads, momenta, rows, reads),
            ("window_apply_ with squares", window, case.grad): partial(
                triton_ops.window_apply_, grads, [], rows, squares
            ),
            ("mfac_row_step_", case.window): partial(
                triton_ops.mfac_row_step_, _row_step(case.window), dots, slot, finite, 1e-3, 1e-7
            ),
        }
        for key, call in calls.items():
            if key not in seen:
                seen.add(key)
                yield str(key[0]), case, call


def _error(case: Case, blocks: Blocks) -> torch.Tensor | LowBit:
    device = torch.device("meta")
    if case.error in (BITS8, BITS4):
        return allocate_lowbit(blocks.numel, 8 if case.error == BITS8 else 4, device, blocks.size)
    return torch.empty(blocks.numel, dtype=case.error, device=device)


def _row_step(window: int) -> RowStep:
    empty = partial(torch.empty, device="meta")
    matrices, vectors = ([empty(*(window,) * dims, dtype=FP64) for _ in range(2)] for dims in (2, 1))
    numbers = [empty((), dtype=dtype) for dtype in (*[FP64] * 3, *[torch.int64] * 4)]
    return RowStep(*matrices, *vectors, *numbers)


def _rows(case: Case, numel: int) -> SparseRows:
    blocks = Blocks(numel, case.block_size, case.density)
    shape = (blocks.count, case.window, blocks.kept)
    values = torch.empty(shape, dtype=case.values, device="meta")
    return SparseRows(values, torch.empty(shape, dtype=blocks.index_dtype, device="meta"), blocks)


def _programs(kernel: Compiled) -> int:
    return resident_programs(kernel.target.arch, kernel.num_warps, kernel.registers, kernel.shared)


def _marked(kernel: Compiled) -> set[Line]:
    return {(path.name, line) for path, line in source_lines(kernel) if line in stream_lines(path)}


def _place(line: Line) -> str:
    return f"{line[0]}:{line[1]}"


def _check(rows: Sequence[dict[str, object]], more: Sequence[str]) -> int:
    found = [f"{_name(row)}: {row['problem']}" for row in rows if row["problem"]]
    print(
        "\n".join([*found, *more, f"{sum('kernel' in row for row in rows)} kernels, {len(found) + len(more)} problems"])
    )
    return 1 if found or more else 0


def _name(row: dict[str, object]) -> str:
    name = f" {row['kernel']}({row['configuration']})" if "kernel" in row else ""
    return f"{row['operation']}{name}, {row['target']}, {row['case']}"


def _configuration(kernel: Compiled) -> str:
    """A kernel's compile-time numbers and types; not its layouts, which are long and follow from these."""
    shown = (bool, int, float, tl.dtype)
    return " ".join(f"{key}={value}" for key, value in kernel.constants.items() if isinstance(value, shown))


def _row(result: CompiledCase) -> dict[str, object]:
    kernel = result.kernel
    row: dict[str, object] = {"operation": result.operation, "target": result.target.arch, "case": str(result.case)}
    if kernel is None:
        return row | {"problem": f"does not compile: {result.error}"}
    programs, threads = _programs(kernel), kernel.num_warps * kernel.target.warp_size
    marked = _marked(kernel)
    found = accesses(kernel)
    streaming = [access for access in found if access.streams(marked)]
    code = read_code(kernel, streaming or found)
    elements = code.loop_bytes / _element_bytes(result)
    flying = round(code.in_flight * threads * programs / 1024, 1)
    found_wrong = problems(kernel)
    exempt = kernel.name in EXEMPT or (kernel.name == FILLING and kernel.shared > SHARED_OF_MANY)
    if kernel.target.arch in BUSY and flying < KB_IN_FLIGHT and not exempt:
        found_wrong.append(f"has {flying} KB in flight")
    return row | {
        "kernel": kernel.name,
        "configuration": _configuration(kernel),
        "warps": kernel.num_warps,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "programs": programs,
        "occupancy": f"{programs * kernel.num_warps / ARCHITECTURES[kernel.target.arch].warps:.0%}",
        "KB in flight": flying,
        "loads": _widths(found, "load", marked),
        "stores": _widths(found, "store", marked),
        "main loop": " ".join(_place(line) for line in sorted(code.loop_lines)).replace(".py", ""),
        "an element": f"{code.loop_instructions / elements:.1f}" if elements else "",
        "instructions": code.instructions,
        "barriers": code.barriers,
        "compile s": "" if kernel.seconds is None else round(kernel.seconds, 2),
        "problem": "; ".join(found_wrong),
    }


def _element_bytes(result: CompiledCase) -> int:
    """Bytes that stream for an element: a gradient with its error, or a value of the window with its index."""
    case = result.case
    if result.operation == "compress_":
        streams = case.error is not None and case.error.is_floating_point  # few bits come in narrower accesses
        return case.grad.itemsize + (case.error.itemsize if case.error and streams else 0)
    if result.operation in ("norm_is_finite", "average_", "store_lowbit_", "add_lowbit_"):
        return case.grad.itemsize
    return case.values.itemsize + Blocks(1, case.block_size, 1.0).index_dtype.itemsize


def _widths(found: Iterable[Access], kind: str, marked: set[Line]) -> str:
    lines = ((*(a.lines[0] if a.lines else ("?", 0)), a) for a in found if a.kind == kind)
    count = Counter((file, line, "*" * a.streams(marked), a.bits) for file, line, a in lines)
    files: dict[str, list[str]] = {}
    for (file, line, star, bits), n in sorted(count.items()):
        files.setdefault(file.removesuffix(".py"), []).append(f"{line}{star} {bits}×{n}")
    return "; ".join(f"{file}: {', '.join(texts)}" for file, texts in files.items())
