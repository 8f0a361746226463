"""How fast the CPU operations of the sparse window are: `python -m efcp.perf.cpu [--quick] [--csv PATH]`.

Everything is measured in one run, the implementations of an operation in turn, and speeds are told as ratios: to the
bandwidth that this machine copies or reads with, and to what PyTorch offers for the same work.

| operation | bytes that have to be moved | rivals |
|---|---|---|
| `all_finite` | 4 an element: gradient read | the definition |
| `compress_` | 12 an element: gradient read, error read and written | the definition; abs, topk, gather, scatter |
| `window_dots` | the window | the definition; G c with G in CSR format |
| `window_apply_` | the window; 8 an element: parameter read and written | the definition; Gᵀ w with Gᵀ in CSR format |
| a step of SparseMFAC | all of these | fused Adam |

CSR is given its best case: dense newest row and transposed matrix come for nothing. A result is checked against the
definition before it is timed; a wrong one gets no time.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from efcp import SparseMFAC
from efcp.kernels import Blocks, Rows, cpu, reference, use_backend

__all__ = ["Measurement", "main", "measure"]

COMPILED, DEFINITION = "compiled", "definition"
BLOCK_SIZE = 4096
CSR_ENTRIES = 60_000_000  # more take minutes to transpose
MOST_RUNS = 100  # of an implementation in a case


@dataclass(frozen=True)
class Measurement:
    """A row of the CSV."""

    operation: str
    implementation: str
    numel: int
    window: int
    density: float
    threads: int
    median_ms: float  # NaN for a wrong result
    p20_ms: float
    p80_ms: float
    bytes: int  # that have to be moved
    gb_per_s: float
    bandwidth: str  # what the operation is held against
    of_bandwidth: float
    times_compiled: float  # its median, in medians of the compiled operation


@dataclass(frozen=True)
class Problem:
    """One parameter with a full window."""

    blocks: Blocks
    grad: Tensor  # (n,)
    error: Tensor  # (n,)
    target: Tensor  # (n,)
    values: Tensor  # (blocks, m, k)
    indices: Tensor  # (blocks, m, k)
    slot: Tensor
    finite: Tensor
    weights: Tensor  # (m,)
    one: Tensor

    @staticmethod
    def random(numel: int, window: int, density: float) -> "Problem":
        """Normal gradients, error and values; the positions repeat every few blocks, which takes less time to draw."""
        generator = torch.Generator().manual_seed(0)
        blocks = Blocks(numel, BLOCK_SIZE, density)
        shape = (blocks.count, window, blocks.kept)
        drawn = torch.rand(min(4, blocks.count), window, blocks.size, generator=generator)
        positions = drawn.topk(blocks.kept, dim=2, sorted=False).indices.sort(dim=2).values.to(blocks.index_dtype)
        values = torch.randn(len(positions), window, blocks.kept, generator=generator).bfloat16()
        repeats = -(-blocks.count // len(positions))
        return Problem(
            blocks,
            torch.randn(numel, generator=generator),
            torch.randn(numel, generator=generator),
            torch.randn(numel, generator=generator),
            values.repeat(repeats, 1, 1)[: shape[0]],
            positions.repeat(repeats, 1, 1)[: shape[0]],
            torch.tensor([3 % window]),
            torch.tensor(True),
            torch.randn(window, generator=generator, dtype=torch.float64) / window,
            torch.tensor(1.0, dtype=torch.float64),
        )

    @property
    def rows(self) -> list[Rows]:
        return [Rows(self.values, self.indices, self.blocks)]

    def apply(self, window_apply_: Callable[..., None], target: Tensor, weights: Tensor) -> None:
        window_apply_([target], [], self.rows, weights, self.one, self.one, self.one)

    @property
    def entry_bytes(self) -> int:
        return self.values.nbytes + self.indices.nbytes


Operation = Callable[[], object]


def finite_operations(p: Problem) -> dict[str, Operation]:
    return {
        COMPILED: lambda: cpu.all_finite([p.grad]),
        DEFINITION: lambda: reference.all_finite([p.grad]),
    }


def compress_operations(p: Problem) -> dict[str, Operation]:
    def composition() -> None:
        """What the operation amounts to without ties, without rounding fed back, and without a tail."""
        a = p.error.add_(p.grad).view(-1, p.blocks.size)
        index = a.abs().topk(p.blocks.kept, dim=1).indices
        p.values[:, p.slot] = a.gather(1, index).to(p.values.dtype).unsqueeze(1)
        p.indices[:, p.slot] = index.to(p.indices.dtype).unsqueeze(1)
        a.scatter_(1, index, 0.0)

    arguments = ([p.grad], [p.error], p.rows, p.slot, p.finite)
    return {
        COMPILED: lambda: cpu.compress_(*arguments),
        DEFINITION: lambda: reference.compress_(*arguments),
        "torch.topk": composition,
    }


def csr(p: Problem) -> Tensor:
    """The window as an (m, n) matrix in CSR format."""
    count, window, kept = p.values.shape
    start = torch.arange(count, dtype=torch.int32)[:, None] * p.blocks.size  # of a block
    columns = (p.indices.permute(1, 0, 2).int() + start).flatten()
    rows = torch.arange(window + 1, dtype=torch.int32) * (count * kept)
    values = p.values.permute(1, 0, 2).float().flatten()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, (window, p.blocks.numel), check_invariants=False)


def has_csr(p: Problem) -> bool:
    return p.blocks.tail == 0 and p.values.numel() <= CSR_ENTRIES


def dots_operations(p: Problem) -> dict[str, Operation]:
    arguments = (p.rows, p.slot)
    operations: dict[str, Operation] = {
        COMPILED: lambda: cpu.window_dots(*arguments),
        DEFINITION: lambda: reference.window_dots(*arguments),
    }
    if has_csr(p):
        matrix = csr(p)
        unit = torch.zeros(len(p.weights)).index_fill_(0, p.slot, 1.0)
        newest = torch.zeros(p.blocks.numel)
        p.apply(reference.window_apply_, newest, unit)
        operations["torch.sparse"] = lambda: matrix @ newest
    return operations


def apply_operations(p: Problem) -> dict[str, Operation]:
    operations: dict[str, Operation] = {
        COMPILED: lambda: p.apply(cpu.window_apply_, p.target, p.weights),
        DEFINITION: lambda: p.apply(reference.window_apply_, p.target, p.weights),
    }
    if has_csr(p):
        matrix, weights = csr(p).t().to_sparse_csr(), p.weights.float()
        operations["torch.sparse"] = lambda: torch.addmv(p.target, matrix, weights, out=p.target)
    return operations


def finite_is_right(p: Problem) -> bool:
    return bool(cpu.all_finite([p.grad])) == bool(reference.all_finite([p.grad]))


def compress_is_right(p: Problem) -> bool:
    def run(compress_: Callable[..., None]) -> tuple[Tensor, ...]:
        error, row = p.error.clone(), (slice(None), p.slot)
        compress_([p.grad], [error], p.rows, p.slot, p.finite)
        return error, p.values[row].clone(), p.indices[row].clone()

    return all(map(torch.equal, run(cpu.compress_), run(reference.compress_)))


def dots_are_right(p: Problem) -> bool:
    expected = reference.window_dots(p.rows, p.slot)
    return torch.allclose(cpu.window_dots(p.rows, p.slot), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def apply_is_right(p: Problem) -> bool:
    def run(window_apply_: Callable[..., None]) -> Tensor:
        target = p.target.clone()
        p.apply(window_apply_, target, p.weights)
        return target

    return torch.allclose(run(cpu.window_apply_), run(reference.window_apply_), rtol=1e-5, atol=1e-5)


# operation: what it is checked and timed by, bytes for a problem, and the bandwidth that it is held against
OPERATIONS = {
    "all_finite": (finite_is_right, finite_operations, lambda p: 4 * p.blocks.numel, "read"),
    "compress_": (compress_is_right, compress_operations, lambda p: 12 * p.blocks.numel, "copy"),
    "window_dots": (dots_are_right, dots_operations, lambda p: p.entry_bytes, "read"),
    "window_apply_": (apply_is_right, apply_operations, lambda p: p.entry_bytes + 8 * p.blocks.numel, "copy"),
}


def time_in_turn(operations: dict[str, Operation], seconds: float) -> dict[str, np.ndarray]:
    """Milliseconds of the runs of every operation, for about that many seconds each.

    The first run brings compilation, pages and caches, and does not count, unless it takes all the time there is.
    """

    def run(operation: Operation) -> float:
        start = time.perf_counter()
        operation()
        return (time.perf_counter() - start) * 1e3

    warm_up = {name: run(operation) for name, operation in operations.items()}
    times = {name: [first] if first > seconds * 1e3 else [] for name, first in warm_up.items()}
    waiting = [name for name in operations if not times[name]]
    while waiting:
        for name in waiting:
            times[name].append(run(operations[name]))
        waiting = [name for name in waiting if sum(times[name]) < seconds * 1e3 and len(times[name]) < MOST_RUNS]
    return {name: np.array(t) for name, t in times.items()}


class Machine:
    """Bandwidth of copying and of reading memory, in GB/s, measured beside each case: other processes come and go."""

    def __init__(self, elements: int) -> None:
        self.source, self.copied = torch.ones(elements), torch.ones(elements)

    @property
    def operations(self) -> dict[str, Operation]:
        return {"copy": lambda: self.copied.copy_(self.source), "read": self.source.sum}

    def bytes(self, name: str) -> int:
        return self.source.nbytes * (2 if name == "copy" else 1)


def measurements(
    operation: str,
    operations: dict[str, Operation],
    machine: Machine,
    p: Problem,
    moved: int,
    bound: str,
    seconds: float,
) -> Iterator[Measurement]:
    """Measurements of one operation on one problem; of copy and read, too."""
    times = time_in_turn({**operations, **machine.operations}, seconds)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    bandwidth = {name: machine.bytes(name) / medians[name] / 1e6 for name in machine.operations}
    for name, t in times.items():
        own = name in bandwidth
        size = machine.bytes(name) if own else moved
        speed = size / medians[name] / 1e6
        yield Measurement(
            operation=operation,
            implementation=name,
            numel=p.blocks.numel,
            window=len(p.weights),
            density=p.blocks.density,
            threads=torch.get_num_threads(),
            median_ms=medians[name],
            p20_ms=float(np.quantile(t, 0.2)),
            p80_ms=float(np.quantile(t, 0.8)),
            bytes=size,
            gb_per_s=speed,
            bandwidth=name if own else bound,
            of_bandwidth=speed / bandwidth[name if own else bound],
            times_compiled=medians[name] / next(iter(medians.values())),
        )


def wrong(operation: str, p: Problem, moved: int, bound: str) -> Measurement:
    nan = float("nan")
    return Measurement(
        operation=operation,
        implementation=f"{COMPILED} (wrong)",
        numel=p.blocks.numel,
        window=len(p.weights),
        density=p.blocks.density,
        threads=torch.get_num_threads(),
        median_ms=nan,
        p20_ms=nan,
        p80_ms=nan,
        bytes=moved,
        gb_per_s=nan,
        bandwidth=bound,
        of_bandwidth=nan,
        times_compiled=nan,
    )


def step_operations(p: Problem) -> dict[str, Operation]:
    """A step of SparseMFAC with a full window, and one of fused Adam, on the same gradient."""
    numel, window = p.blocks.numel, len(p.weights)
    params = [torch.nn.Parameter(torch.zeros(numel)) for _ in range(2)]
    for param in params:
        param.grad = p.grad
    sparse = SparseMFAC(params[:1], 1e-3, window=window, density=p.blocks.density, block_size=BLOCK_SIZE)
    adam = torch.optim.Adam(params[1:], 1e-3, fused=True)

    def step() -> None:
        with use_backend("cpu"):
            sparse.step()

    step()
    state = sparse.state[params[0]]
    state["values"].copy_(p.values)  # a full window, without as many steps
    state["indices"].copy_(p.indices)
    return {"SparseMFAC": step, "Adam, fused": adam.step}


def measure(numels: list[int], window: int, densities: list[float], seconds: float) -> pd.DataFrame:
    """All measurements, one a row.

    Args:
        numels: numbers of elements of the parameter.
        window: m, rows of the window.
        densities: shares of elements that a row keeps.
        seconds: to spend on each implementation in each case, about.
    """
    rows: list[Measurement] = []
    machine = Machine(max(numels))
    cases = [(numel, density) for numel in numels for density in densities]
    with tqdm(total=len(cases) * (len(OPERATIONS) + 1)) as progress:
        for numel, density in cases:
            p = Problem.random(numel, window, density)
            for operation, (is_right, operations, bytes_of, bound) in OPERATIONS.items():
                progress.set_description(f"{operation} {numel / 1e6:.1f}M {density:.1%}")
                moved = bytes_of(p)
                if is_right(p):
                    rows += measurements(operation, operations(p), machine, p, moved, bound, seconds)
                else:
                    rows.append(wrong(operation, p, moved, bound))
                gc.collect()
                progress.update()
            progress.set_description(f"step {numel / 1e6:.1f}M {density:.1%}")
            moved = sum(bytes_of(p) for _, _, bytes_of, _ in OPERATIONS.values())
            rows += measurements("step", step_operations(p), machine, p, moved, "copy", seconds)
            progress.update()
            del p
            gc.collect()
    return pd.DataFrame([asdict(row) for row in rows])


def table(frame: pd.DataFrame) -> str:
    """A line for every case, with ratios only."""
    lines = []
    for _, group in frame.groupby(["operation", "numel", "density"], sort=False):
        by_name = group.set_index("implementation")
        first = by_name.iloc[0]
        rivals = by_name.iloc[1:].drop(index=["copy", "read"], errors="ignore")["times_compiled"]
        lines.append(
            {
                "operation": first.operation,
                "elements": f"{first.numel / 1e6:.1f}M",
                "density": f"{first.density:.1%}",
                "ms": f"{first.median_ms:.2f} ({first.p20_ms:.2f} to {first.p80_ms:.2f})",
                "GB/s": f"{first.gb_per_s:.1f}",
                "of bandwidth": f"{first.of_bandwidth:.0%} of {first.bandwidth}",
                "time of others": ", ".join(f"{name} {ratio:.3g}x" for name, ratio in rivals.items()),
            }
        )
    return pd.DataFrame(lines).to_string(index=False)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(prog="efcp.perf.cpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, two densities, half a minute")
    parser.add_argument("--csv", type=Path, help="where to write all measurements")
    parser.add_argument("--numel", type=int, nargs="+", help="numbers of elements")
    parser.add_argument("--density", type=float, nargs="+", help="densities")
    parser.add_argument("--window", type=int, default=256, help="rows of the window")
    parser.add_argument("--seconds", type=float, help="for each implementation in each case")
    options = parser.parse_args(arguments)
    numels = options.numel or ([1 << 22] if options.quick else [1 << 22, 1 << 24])
    densities = options.density or ([0.001, 0.01] if options.quick else [0.001, 0.01, 0.05, 0.1])
    seconds = options.seconds if options.seconds is not None else 0.3 if options.quick else 0.5
    frame = measure(numels, options.window, densities, seconds)
    print(table(frame))
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(options.csv, index=False)
    return frame


if __name__ == "__main__":
    main()
