"""Counts the global-memory traffic of the Triton kernels with gpusim, and compares it with the least possible.

    python -m efcp.perf.gpu.traffic    # results/gpu/traffic.csv and .md; some minutes

The kernels work on one parameter of 256 blocks of 4096 elements in float32, with error in float32 (for `compress_` also
in bfloat16, and in 8 and 4 bits), values in bfloat16, and indices in int16. A row of the CSV is one launch, or the sum
`all` over the launches of an operation. The floor:

| operation | bytes |
|---|---|
| `compress_` | gradient read, error read and written, the row written |
| `window_dots` | the window read |
| `window_apply_` | the window read, target read and written |

A window is "random", each row with a random support, or "trained": that of the first layer of a perceptron that
SparseMFAC has trained on MNIST 5k, cut to 256 blocks. Rows can overlap. `entries_met` is the share of the entries, in
all rows but the newest, whose element is also in the newest row (and is not zero there). `groups_of_8` and
`groups_of_16` are the shares of aligned groups of 8 and 16 entries of the window that contain such an entry.

Bytes are those that active lanes ask for, but at most those of the instruction's sectors, so that an element that
several lanes ask for counts once. A sector has 32 bytes, and counts again for every request that uses it, as if there
were no cache. Atomics are in `bytes stored`. What PyTorch does besides, such as filling with zeros, is not counted.
"""

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.gpu.traffic")

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from efcp import SparseMFAC
from efcp.analysis.data import DataSet, load_data
from efcp.kernels import Blocks, SparseRows, Update
from efcp.kernels import triton as triton_ops
from efcp.perf.gpu.gpusim import Access, simulate
from efcp.perf.tables import table, write_csv
from efcp.windows.base import allocate_error, error_of

__all__ = ["Overlap", "Window", "count", "measure", "overlap", "random_window", "trained_window"]

BLOCK_SIZE, BLOCKS = 4096, 256
BATCH = 64
ERRORS = (torch.float32, torch.bfloat16, torch.int8, torch.int4)  # type: ignore[attr-defined]
RESULTS = Path("results/gpu")


@dataclass(frozen=True)
class Window:
    """A window of one parameter, and its newest row."""

    rows: SparseRows
    slot: int


@dataclass(frozen=True)
class Overlap:
    """How a window overlaps with its newest row: the shares described at the head of this file."""

    entries_met: float
    groups_of_8: float
    groups_of_16: float


def random_window(window: int, density: float) -> Window:
    """A window of normal values, each row of each block with a random support."""
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks(BLOCKS * BLOCK_SIZE, BLOCK_SIZE, density)
    shape = (blocks.count, window, blocks.kept)
    indices = torch.empty(shape, dtype=blocks.index_dtype)
    for block in indices:  # all at once would take gigabytes
        order = torch.rand(window, BLOCK_SIZE, generator=generator)
        block.copy_(order.topk(blocks.kept).indices.sort().values)
    return Window(SparseRows(torch.randn(shape, generator=generator).bfloat16(), indices, blocks), window // 2)


def trained_window(window: int, density: float) -> Window:
    """A window from real training on the CPU, over `window` steps and a quarter as many more."""
    torch.manual_seed(0)
    data = _data().train
    first = torch.nn.Linear(784, 1344)  # 257 blocks
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        first,
        torch.nn.ReLU(),
        torch.nn.Linear(1344, 10),
    )
    optimizer = SparseMFAC(
        model.parameters(), lr=0.03, window=window, density=density, damping=3e-3, block_size=BLOCK_SIZE
    )
    steps = window + window // 4
    for step in range(steps):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(data.inputs)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(data.inputs[batch]), data.labels[batch]).backward()
        optimizer.step()
    state = optimizer.state[first.weight]
    blocks = Blocks(BLOCKS * BLOCK_SIZE, BLOCK_SIZE, density)
    return Window(SparseRows(state["values"][:BLOCKS], state["indices"][:BLOCKS], blocks), (steps - 1) % window)


def overlap(window: Window) -> Overlap:
    """Measures how the rows of a window overlap with the newest one. No block may be shorter than the others."""
    (values, indices, blocks), slot = window.rows, window.slot
    met = torch.zeros(values.shape, dtype=torch.bool)
    for value, index, m in zip(values, indices, met, strict=True):
        newest = torch.zeros(blocks.size, dtype=torch.bool)
        newest[index[slot].long()] = value[slot] != 0
        m.copy_(newest[index.long()])
    older = torch.ones_like(met)
    older[:, slot] = False
    met &= older

    def share(size: int) -> float:
        whole = met.numel() // size * size
        groups, counted = (t.flatten()[:whole].view(-1, size).any(1) for t in (met, older))
        return float(groups.sum() / counted.sum())

    return Overlap(share(1), share(8), share(16))


def count(arch: int, operation: Callable[[], object], reached: Iterable[Tensor], floor: int) -> pd.DataFrame:
    """Run an operation once, and count the global-memory traffic of its launches.

    Args:
        arch: compute capability without the dot, for gpusim.
        operation: what to run.
        reached: tensors that its kernels do not get as arguments, but reach by pointers.
        floor: the bytes that it cannot do without.

    Returns:
        A row for each launch, and one for all of them, which also has their bytes in multiples of the floor.
    """
    with simulate(arch=arch, counters=True, time_limit=120.0) as simulator:
        simulator.allow(*reached)
        operation()
    rows = []
    for launch in simulator.launches:
        if launch.counters:
            sites = [(site.kind, access) for site, access in launch.counters.sites if site.kind.startswith("global")]
            moved = {kind: sum(_moved(access) for k, access in sites if k == kind) for kind, _ in sites}
            loaded, whole = moved.get("global_load", 0), sum(moved.values())
            rows.append((launch.kernel, loaded, whole - loaded, whole, sum(access.sectors for _, access in sites)))
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    frame = pd.DataFrame(rows, columns=["launch", "bytes loaded", "bytes stored", "bytes", "sectors"])
    frame["efficiency"] = (frame["bytes"] / (32 * frame["sectors"])).round(3)
    frame.loc[frame.index[-1], ["floor", "times floor"]] = [floor, round(frame["bytes"].iloc[-1] / floor, 3)]
    return frame


def measure(arch: int, densities: Iterable[float], windows: Sequence[int]) -> pd.DataFrame:
    """Counts the traffic of all operations in all cases.

    Args:
        arch: compute capability without the dot, for gpusim.
        densities: shares of elements that a row keeps.
        windows: numbers of rows, m; `compress_` does not depend on them, and is run with the first only.
    """
    frames = []
    cases = [(density, window) for density in densities for window in windows]
    for density, m in tqdm(cases, unit="case"):
        at_chance, trained = random_window(m, density), trained_window(m, density)
        runs = [_dots(at_chance, "random"), _dots(trained, "trained"), _apply(at_chance)]
        if m == windows[0]:
            runs += [_compress(at_chance, dtype) for dtype in ERRORS]
        for run in runs:
            frame = count(arch, run.call, run.reached, run.floor)
            columns = {"operation": run.operation, "density": density, "m": m, **run.about}
            for number, (name, value) in enumerate(columns.items()):
                frame.insert(number, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def markdown(frame: pd.DataFrame, arch: int) -> str:
    """A report in Markdown, with a table of the sums over launches for each operation."""
    text = [f"# Traffic to global memory, sm_{arch}", ""]
    text += ["Made by `python -m efcp.perf.gpu.traffic`, whose head explains the columns. In MiB.", ""]
    for operation, rows in frame[frame["launch"] == "all"].groupby("operation", sort=True):
        shown = rows.drop(columns=["operation", "launch"]).dropna(axis="columns", how="all")
        for column in ("bytes loaded", "bytes stored", "bytes", "floor"):
            shown[column] = (shown[column] / 2**20).round(2)
        text += [f"## {operation}", "", table([shown.columns, *shown.itertuples(index=False)]), ""]
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="efcp.perf.gpu.traffic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "traffic.csv", help="where to write all launches")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "traffic.md", help="where to write the sums")
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot")
    parser.add_argument("--quick", action="store_true", help="one density and window")
    options = parser.parse_args(arguments)
    frame = measure(options.arch, *(((0.01,), (32,)) if options.quick else ((0.001, 0.01, 0.05, 0.1), (32, 256))))
    write_csv(frame, options.csv)
    options.markdown.parent.mkdir(parents=True, exist_ok=True)
    options.markdown.write_text(markdown(frame, options.arch))
    print(options.markdown.read_text())


@cache
def _data() -> DataSet:
    return load_data("mnist5k")


@dataclass(frozen=True)
class _Counted:
    operation: str
    about: dict[str, object]  # further columns
    call: Callable[[], object]
    reached: list[Tensor]
    floor: int


def _compress(window: Window, error_dtype: torch.dtype) -> _Counted:
    rows, slot = window.rows, torch.tensor([window.slot])
    state = allocate_error(rows.blocks.numel, error_dtype, slot.device, BLOCK_SIZE)
    grad, error, draws = torch.randn(rows.blocks.numel), error_of(state), state.get("error_draws")
    assert error is not None
    values, indices = rows.values.clone(), rows.indices.clone()  # the newest row is overwritten
    written = SparseRows(values, indices, rows.blocks)
    tensors = [tensor for name, tensor in state.items() if name != "error_draws"]
    row_bytes = values[:, 0].nbytes + indices[:, 0].nbytes
    floor = grad.nbytes + 2 * sum(tensor.nbytes for tensor in tensors) + row_bytes

    def run() -> None:
        triton_ops.compress_([grad], [error], [written], slot, [] if draws is None else [draws])

    about: dict[str, object] = {"error": str(error_dtype).removeprefix("torch.")}
    reached = [grad, *state.values(), values, indices]
    return _Counted("compress_", about, run, reached, floor)


def _dots(window: Window, support: str) -> _Counted:
    rows, slot = window.rows, torch.tensor([window.slot])
    about = {"support": support} | {name: round(share, 4) for name, share in vars(overlap(window)).items()}
    reached = [rows.values, rows.indices]
    return _Counted("window_dots", about, lambda: triton_ops.window_dots([rows], slot), reached, _bytes(rows))


def _apply(window: Window) -> _Counted:
    rows, target = window.rows, torch.randn(window.rows.blocks.numel)
    one = torch.tensor(1.0)
    update = Update(torch.randn(rows.values.shape[1]), one, one)

    def run() -> None:
        triton_ops.window_apply_([target], [], [rows], update)

    reached = [target, rows.values, rows.indices]
    return _Counted("window_apply_", {}, run, reached, _bytes(rows) + 2 * target.nbytes)


def _moved(access: Access) -> int:
    return min(access.bytes, 32 * access.sectors)


def _bytes(rows: SparseRows) -> int:
    return rows.values.nbytes + rows.indices.nbytes
