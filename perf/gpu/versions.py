"""Compiles the kernels with several versions of Triton that lie side by side, and makes one table.

    pip install --target build/triton/3.9.0 --no-deps triton==3.9.0
    python -m efcp.perf.gpu.versions build/triton/3.9.0            # results/gpu/versions.csv and .md
    python -m efcp.perf.gpu.versions build/triton/3.9.0 --check    # exit status 1 if something is wrong

Every version runs in a process of its own, with the PyTorch that is installed. It compiles for sm_90 what a user gets,
and then the portable kernels that stand in for those in Gluon; and it runs the operations in gpusim, on one small
problem, and compares them with the definition.

| column of the CSV | what |
|---|---|
| triton, torch | versions; that of PyTorch is one whose CUDA build comes with this Triton |
| operation, case, kernel | as in `report.py`; "portable" in brackets where another kernel is the default |
| warps, registers, spilled, stack, shared | as in `report.py` |
| problem | spilled registers, or why there is no kernel |
| gpusim | whether the operations agree with the definition: "yes", "no" and what is wrong, "not possible" and why |
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.gpu.versions")

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import triton
from torch import Tensor

from efcp.kernels import Blocks, SparseRows, Update, allocate_lowbit, reference
from efcp.kernels import triton as triton_ops
from efcp.perf.command import ending
from efcp.perf.gpu.gpusim import simulate, why_unavailable
from efcp.perf.gpu.offline import GPUTarget
from efcp.perf.gpu.report import OPERATIONS, RESULTS, CompiledCase, compile_cases, quick_cases
from efcp.perf.tables import table, write_csv

__all__ = ["main"]

TORCH = {"3.4": "2.8", "3.6": "2.11", "3.7": "2.13", "3.8": "2.14", "3.9": "2.15"}
TARGET = GPUTarget("cuda", 90, 32)
PORTABLE = ("window_dots", "window_apply_")
SHOWN = {"compress_": "_compress_kernel", "average_": "_average_kernel", "window_dots": None, "window_apply_": None}
"""Operations of the Markdown table, with their kernels; None: whichever a user gets."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="efcp.perf.gpu.versions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="a Triton each; none stands for the installed one")
    parser.add_argument("--csv", type=Path, default=RESULTS / "versions.csv", help="where to write all columns")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "versions.md", help="where to write a short table")
    parser.add_argument("--quick", action="store_true", help="the default configuration and errors in 4 bits only")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is wrong")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # of a process for one version
    options = parser.parse_args(arguments)
    if options.into:
        options.into.write_text(json.dumps(rows_here(options.quick)))
        return 0
    with ending(parser, "nothing is kept"):
        rows = [row for folder in options.folders or [None] for row in _rows_of(folder, options.quick)]
    if options.check:
        found = [f"triton {row['triton']}: gpusim: {row['gpusim']}" for row in rows if row["gpusim"].startswith("no:")]
        found += [f"triton {r['triton']}: {r['operation']}, {r['case']}: {r['problem']}" for r in rows if r["problem"]]
        wrong = dict.fromkeys(found)
        print("\n".join([*wrong, f"{len(rows)} kernels, {len(wrong)} problems"]))
        return 1 if wrong else 0
    frame = pd.DataFrame(rows).convert_dtypes()
    write_csv(frame, options.csv)
    options.markdown.write_text(markdown(rows))
    print(f"{len(frame)} kernels: {options.csv}, {options.markdown}")
    return 0


def _rows_of(folder: Path | None, quick: bool) -> list[dict[str, Any]]:
    """The rows of a version, made in a process of its own."""
    print(f"{folder or f'triton {triton.__version__}'} …", file=sys.stderr)
    path = [str(folder.resolve())] if folder else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch) / "rows.json"
        command = [sys.executable, "-m", "efcp.perf.gpu.versions", "--into", str(into), *["--quick"] * quick]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        rows: list[dict[str, Any]] = json.loads(into.read_text())
    return rows


def rows_here(quick: bool) -> list[dict[str, Any]]:
    """The rows of the Triton in this process."""
    default, many, small, *_, four_bits, _ = quick_cases()
    cases = [default, four_bits] if quick else [default, many, small, four_bits]
    found = [(name, result) for name in OPERATIONS for result in compile_cases(TARGET, name, cases)]
    if triton_ops.HAS_GLUON:
        with mock.patch.object(triton_ops, "HAS_GLUON", False):
            for name in PORTABLE:
                found += [(f"{name} (portable)", result) for result in compile_cases(TARGET, name, cases)]
    version = triton.__version__
    same: dict[str, Any] = {"triton": version, "torch": TORCH.get(version.rpartition(".")[0], "")}
    agrees = agreement()
    return [{**same, "operation": name, **_row(result), "gpusim": agrees} for name, result in found]


def _row(result: CompiledCase) -> dict[str, Any]:
    kernel = result.kernel
    if kernel is None:
        return {"case": str(result.case), "problem": f"does not compile: {result.error}"}
    return {
        "case": str(result.case),
        "kernel": kernel.name,
        "warps": kernel.num_warps,
        "registers": kernel.registers,
        "spilled": kernel.spilled,
        "stack": kernel.stack,
        "shared": kernel.shared,
        "problem": "spills registers" if kernel.spilled or kernel.stack else "",
    }


def agreement() -> str:
    """Whether the compiled operations, run in gpusim, agree with the definition; see the column `gpusim`."""
    if reason := why_unavailable():
        return f"not possible: {reason}"
    name = ""
    try:
        with simulate(TARGET.arch, check_races=True) as simulator:
            actual = _results(triton_ops, simulator.allow)
            for operation, expected in _results(reference, lambda _: None):
                name = operation
                for ours, theirs in zip(next(actual)[1], expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    except Exception as error:  # of any kind
        return f"no: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "yes"


def _results(operations: Any, allow: Callable[[Tensor], None]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields each operation with what it has computed, on two rows of a parameter with a shorter last block."""
    generator = torch.Generator().manual_seed(0)
    blocks, window = Blocks(5000, 4096, 0.01), 5
    grad, error, target, momentum = (torch.randn(blocks.numel, generator=generator) for _ in range(4))
    shape = (blocks.count, window, blocks.kept)
    rows = [SparseRows(torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=blocks.index_dtype), blocks)]
    eight, four = (allocate_lowbit(blocks.numel, bits, grad.device) for bits in (8, 4))
    slot, finite, key, one = torch.tensor([0]), torch.tensor(True), torch.tensor([7]), torch.tensor(0.9)
    for tensor in (grad, error, target, momentum, *rows[0][:2], *eight, *four, key):
        allow(tensor)
    yield "norm_is_finite", [operations.norm_is_finite([grad])]
    for number in range(window):
        slot.fill_(number)
        operations.compress_([grad], [error], rows, slot)
    yield "compress_", [error, *rows[0][:2]]
    operations.undo_compress_([grad], [error], rows, slot, ~finite)
    yield "undo_compress_", [error, *rows[0][:2]]
    yield "average_", [operations.average_([momentum], [grad], 0.9, finite), momentum]
    operations.store_lowbit_([eight], [grad], finite)
    operations.store_lowbit_([four], [grad], finite, [key])
    yield "store_lowbit_", [*eight, *four]
    operations.add_lowbit_([target], [four])
    yield "add_lowbit_", [target]
    slot.fill_(1)
    yield "window_dots", [operations.window_dots(rows, slot)]
    yield "window_dots with momenta", [operations.window_dots(rows, slot, [eight])]
    update = Update(torch.linspace(-1.5, 2.0, window), one, one, one, writes_momenta=True)
    operations.window_apply_([target], [momentum], rows, update)
    yield "window_apply_", [target, momentum]


HEAD = """# Kernels with each version of Triton

Made by `make check-kernels-all`: kernels that users get on an NVIDIA GPU of compute capability 9.0, and registers of a
thread; bytes of registers that are spilled, and of stack; and whether gpusim's results are those of the definition.
"""


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each version: kernels and registers of the default configuration, and the most that any one spills."""
    head = ["triton", "with torch", *(f"`{name}`" for name in SHOWN), "spilled", "stack", "gpusim agrees"]
    lines = [head]
    for version in dict.fromkeys(row["triton"] for row in rows):
        own = [row for row in rows if row["triton"] == version]
        cells = []
        for name, kernel in SHOWN.items():
            found = [r for r in own if r["operation"] == name and r.get("kernel", kernel) != "_spread_kernel"]
            first = found[0]
            cells.append(f"`{first['kernel']}`, {first['registers']}" if "kernel" in first else "the definition")
        spilled, stack = (max(row.get(column, 0) for row in own) for column in ("spilled", "stack"))
        lines.append([version, own[0]["torch"], *cells, spilled, stack, own[0]["gpusim"].partition(":")[0]])
    return f"{HEAD}\n{table(lines)}\n"
