"""The choice of a launch configuration: the default, or the one that was fastest on this GPU.

Each combination of operation, block size, density, window, dtypes and GPU has a choice of its own. With
`EFCP_AUTOTUNE=1`, an operation that meets a new combination times its configurations, on tensors of its own, and saves
the fastest in the file `configurations.json`, in the folder `EFCP_CACHE` or else in ~/.cache/efcp. Saved choices are
used with or without the variable.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from efcp.kernels.blocks import Blocks, SparseRows
from efcp.kernels.dispatch import KernelError
from efcp.kernels.gpus import architecture
from efcp.kernels.tables import is_capturing
from efcp.kernels.triton.gpu import target_of

Configuration = dict[str, int]  # constants and options of a launch
NUMEL = 1 << 22  # elements of the parameter that configurations are tried on
IN_FLIGHT = 32 << 10  # bytes that should be on their way to a multiprocessor; with fewer, memory is idle at times
RESERVED = architecture(90).reserved  # bytes of shared memory that a program costs on top of its own


def most_in_flight(candidates: Sequence[tuple[Configuration, int, int]], shared: int) -> list[Configuration]:
    """The configurations that fit into shared memory, sorted by the bytes in flight on a multiprocessor, most first.

    IN_FLIGHT bytes are enough: configurations with more count as equal. Equal ones keep their order.

    Args:
        candidates: configurations, each with the bytes of shared memory that a program takes, and the bytes that it has
            in flight.
        shared: bytes of shared memory that a program may take, which is almost all that a multiprocessor has.
    """
    fit = [
        (min((shared + RESERVED) // (taken + RESERVED) * flying, IN_FLIGHT), configuration)
        for configuration, taken, flying in candidates
        if taken <= shared
    ]
    return [configuration for _, configuration in sorted(fit, key=lambda pair: -pair[0])]


def choose(
    operation: str,
    rows: Sequence[SparseRows],
    dtypes: Sequence[torch.dtype | None],
    candidates: Sequence[Configuration],
    trial: Callable[[SparseRows], Callable[[Configuration], object]],
) -> Configuration:
    """The configuration for a launch.

    Args:
        operation: its name.
        rows: the window of each parameter in the launch. Only what these have in common matters.
        dtypes: those of the other tensors.
        candidates: at least one; the first is the default.
        trial: takes the window of a parameter, and makes all other tensors. Returns a function that launches the
            operation on these, with the configuration that it is given.
    """
    values, _, blocks = rows[0]
    if triton.knobs.runtime.interpret or len(candidates) == 1:
        return candidates[0]
    target = target_of(values.device)
    names = "/".join(str(dtype).removeprefix("torch.") for dtype in (*dtypes, values.dtype))
    layout = f"B={blocks.block_size} density={blocks.density} m={values.shape[1]}"
    key = f"{operation} {target.backend}:{target.arch} {layout} {names}"
    known = _known(_file())
    if known.get(key) not in candidates:
        if not _autotuning(values.device):
            return candidates[0]
        launch = trial(_scratch(blocks, values))
        known[key] = min(candidates, key=lambda candidate: _milliseconds(lambda: launch(candidate)))
        _save(_file(), known)
    return known[key]


def _autotuning(device: torch.device) -> bool:
    if os.environ.get("EFCP_AUTOTUNE", "0") != "1":
        return False
    return not is_capturing(device)


def _milliseconds(launch: Callable[[], object]) -> float:
    try:
        return float(triton.testing.do_bench(launch, return_mode="median"))
    except KernelError:
        return float("inf")


def _scratch(blocks: Blocks, values: Tensor) -> SparseRows:
    """A window of random rows for a parameter of NUMEL elements, with the same layout and dtypes."""
    blocks, window_size, device = Blocks(NUMEL, blocks.block_size, blocks.density), values.shape[1], values.device
    shape, stretch = (blocks.count, window_size, blocks.kept), blocks.size / blocks.kept
    begin = torch.arange(blocks.kept, device=device) * stretch
    indices = (begin + torch.rand(shape, device=device) * (stretch - 1)).to(blocks.index_dtype)  # distinct in a row
    return SparseRows(torch.randn(shape, dtype=values.dtype, device=device), indices, blocks)


def _file() -> Path:
    return _file_in(os.environ.get("EFCP_CACHE"))


@cache
def _file_in(folder: str | None) -> Path:
    return (Path(folder) if folder else Path.home() / ".cache" / "efcp") / "configurations.json"


@cache
def _known(file: Path) -> dict[str, Configuration]:
    """The choices in the file, by key."""
    try:
        known = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{file} cannot be read, and is not used: {error}", stacklevel=2)
        return {}
    return known if isinstance(known, dict) else {}


def _save(file: Path, known: dict[str, Configuration]) -> None:
    """Writes the file at once, so that no other process reads half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(known, temporary, indent=1)
        os.replace(temporary.name, file)
    except OSError as error:
        warnings.warn(f"the choice of a configuration could not be kept: {error}", stacklevel=2)
