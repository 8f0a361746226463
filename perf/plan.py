"""Plans a sharded training: state of each rank, bytes sent in a step, and the least time of a step, before anything runs.

    python -m efcp.perf.plan --params 7e9 --ranks 64 --window 128 --density 0.01

| column | what |
|---|---|
| params | of the model, which are divided evenly |
| state bytes | of a rank, by `efcp.estimate_memory` |
| a parameter | state bytes for each parameter of the rank's share; AdamW's are 8 |
| sent bytes | that a rank sends in a step for this optimizer: ring all-reduces of 4 and 8 m bytes, 2 (n − 1)/n times each |
| FSDP's | that FSDP sends with bfloat16 parameters: two all-gathers and a reduce-scatter, 6 (n − 1)/n a parameter |
| step ms | **a prediction, not a measurement**: the bytes that a rank has to move (`Case.floors`) at 90% of the datasheet's bandwidth, and the launches (`roofline.py`) |
| AdamW ms | the same for AdamW, fused, in float32 |

Vectors, which are kept whole, and blocks that are smaller than 4,096 because rows are short, are left out: both add
little to large models.
"""  # noqa: E501

if __name__ == "__main__":  # before the imports, since one may fail
    from efcp.perf.command import run

    run("efcp.perf.plan")

import argparse
import json
from typing import Any

import pandas as pd
import torch

from efcp import SparseMFAC, estimate_memory
from efcp.kernels.gpus import PRODUCTS
from efcp.perf.command import ending
from efcp.perf.problems import Case
from efcp.perf.roofline import ADAM_TENSORS, LAUNCH, REACHED, small_launches
from efcp.perf.tables import markdown

__all__ = ["main", "plan"]

BLOCK = 4096
ERRORS = {"float32": "fp32/fp32/bf16", "int8": "fp32/int8/bf16", "int4": "fp32/int4/bf16"}


def plan(params: int, ranks: int, window: int, density: float, error: str, gpu: str) -> dict[str, Any]:
    """One row of the table.

    Args:
        params: the number of parameters of the model, float32.
        ranks: n, the number of processes, each with a GPU.
        window: m.
        density: of a row of the window.
        error: the dtype of the error, one of `ERRORS`.
        gpu: one of `PRODUCTS`.

    Raises:
        ValueError: for other values.
    """
    for name, value in (("params", params), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if error not in ERRORS:
        raise ValueError(f"error must be one of {', '.join(ERRORS)}, got {error!r}")
    if gpu not in PRODUCTS:
        raise ValueError(f"gpu must be one of {', '.join(PRODUCTS)}, got {gpu!r}")
    share = -(-params // ranks)
    case = Case(-(-share // BLOCK) * BLOCK, window, density, BLOCK, ERRORS[error])
    options: dict[str, Any] = {"window": window, "density": density, "error_dtype": getattr(torch, error)}
    state = estimate_memory(share, SparseMFAC, **options).total
    others = (ranks - 1) / ranks
    bandwidth = REACHED * PRODUCTS[gpu].bandwidth
    return {
        "params": params,
        "ranks": ranks,
        "m": window,
        "density": density,
        "error": error,
        "state bytes": state,
        "a parameter": state / share,
        "sent bytes": round(2 * others * (4 + 8 * window)),
        "FSDP's": round(6 * others * params),
        "gpu": gpu,
        "step ms": 1e3 * (case.floors["step"] / bandwidth + small_launches() * LAUNCH),
        "AdamW ms": 1e3 * ADAM_TENSORS * 4 * share / bandwidth,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="efcp.perf.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--params", type=float, nargs="+", required=True, help="parameters of the model, such as 7e9")
    parser.add_argument("--ranks", type=int, default=1, help="processes over which they are divided")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--error", choices=ERRORS, default="float32")
    parser.add_argument("--gpu", choices=PRODUCTS, default="H100 SXM")
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows in place of a table")
    options = parser.parse_args(arguments)
    with ending(parser, "nothing has been planned"):
        own = options.ranks, options.window, options.density, options.error, options.gpu
        rows = [plan(int(params), *own) for params in options.params]
        print(json.dumps(rows, indent=1) if options.json else markdown(pd.DataFrame(rows)))
