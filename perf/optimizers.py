"""Measures a whole step of every optimizer that a user could choose: its time, its state, and what it allocates.

A row of optimizers.csv is one optimizer on one model:

| column | what |
|---|---|
| optimizer, family, settings | as in `steps.py`; settings that are not named are the defaults |
| d, parameters | elements of all parameters, and the number of parameters |
| status | "ok"; or the reason why there is no measurement: a failure, a package that is missing, too little memory |
| p20_ms, p50_ms, p80_ms, runs | quantiles of the time of a step, and how many times it was measured |
| times AdamW | p50_ms divided by that of fused AdamW, measured in turn with it |
| state bytes, per parameter | by `efcp.memory_report`, and the same divided by d |
| temporary bytes | the most that a step allocates beyond its state; of SOAP, a step without decompositions |
| of parameters | temporary bytes divided by the bytes of the parameters |

All optimizers step the same parameters, float32, with the same gradients: normally distributed, of norm 1 over all
parameters. The time of a run of several steps is divided by their number. `steps.py` has the table of optimizers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import efcp
from efcp.perf.command import reason
from efcp.perf.machine import environment
from efcp.perf.steps import ADAMW, MODELS, OPTIMIZERS, QUICK, Step, ready, refusal, with_gradients
from efcp.perf.tables import write_csv
from efcp.perf.timing import Timer

__all__ = ["COLUMNS", "measure"]

COLUMNS = [
    *("optimizer", "family", "settings", "model", "d", "parameters", "device", "status"),
    *("p20_ms", "p50_ms", "p80_ms", "runs", "times AdamW", "state bytes", "per parameter"),
    *("temporary bytes", "of parameters", "timer", "machine", "threads", "versions", "commit"),
]


def measure(device: torch.device, path: Path, quick: bool) -> pd.DataFrame:
    """Measures all optimizers on all models; optimizers.csv is rewritten after each model.

    Args:
        path: of optimizers.csv.
        quick: take small models, and few runs.
    """
    rows: list[dict[str, Any]] = []
    models, timer = QUICK if quick else MODELS, Timer(device)
    with tqdm(total=len(models) * len(OPTIMIZERS), unit="optimizer") as progress:
        for name, make in models.items():
            rows += _measurements(name, make, timer, 0.1 if quick else 1.0, progress)
            write_csv(pd.DataFrame(rows, columns=COLUMNS), path)
    return pd.DataFrame(rows, columns=COLUMNS)


def _measurements(
    name: str, make: Callable[[], nn.Module], timer: Timer, seconds: float, progress: tqdm
) -> list[dict[str, Any]]:
    model = with_gradients(make, timer.device)
    numel, count = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    known = {"model": name, "d": numel, "parameters": count, "timer": timer.name}
    known |= environment(timer.device, ("torchao", "pytorch_optimizer"))
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for optimizer, entry in OPTIMIZERS.items():
        progress.set_description(f"{optimizer}, {name}")
        row = {"optimizer": optimizer, "family": entry.family, "settings": entry.settings, **known}
        rows[optimizer] = row
        try:
            if reasons := refusal(entry, model, timer.device):
                row["status"] = reasons
            else:
                steps[optimizer] = ready(entry, model, timer)
        except Exception as error:
            row["status"] = reason(error)
        progress.update()

    progress.set_description(f"in turn, {name}")
    times = timer.in_turn(
        {optimizer: step.run for optimizer, step in steps.items()},
        dict.fromkeys(steps, seconds),
        {optimizer: step.first for optimizer, step in steps.items()},
    )
    for optimizer, step in steps.items():
        t = np.array(times[optimizer]) / OPTIMIZERS[optimizer].cycle
        p20, p50, p80 = (float(q) for q in np.quantile(t, (0.2, 0.5, 0.8)))
        state = sum(efcp.memory_report(part).total for part in step.optimizers)
        temporary = timer.temporary_bytes(step.once)
        rows[optimizer] |= {"status": "ok", "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "runs": len(t)}
        rows[optimizer] |= {"state bytes": state, "per parameter": state / numel}
        rows[optimizer] |= {"temporary bytes": temporary, "of parameters": temporary / (4 * numel)}
        if ADAMW in times:
            rows[optimizer]["times AdamW"] = p50 / float(np.median(times[ADAMW]))
    return list(rows.values())
