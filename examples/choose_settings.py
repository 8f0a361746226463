"""Chooses window and density for a memory budget before anything is allocated, then takes one step.

    python examples/choose_settings.py --budget 8

The network is a ResNet-20 of 4.3 million parameters. The estimates use a copy of it on the meta device, where tensors
take no memory. So this also works for networks that do not fit into this machine.
"""

import argparse

import torch
from torch import nn

from efcp import LowRankMFAC, SparseMFAC, estimate_memory, memory_report
from efcp.analysis.models import resnet20

WINDOWS = (16, 32, 64, 128, 256)
DENSITIES = (0.005, 0.01, 0.02, 0.05)
RANKS = (1, 2, 4)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--budget", type=float, default=8.0, help="bytes of state per parameter; Adam takes 8")
arguments = parser.parse_args()

with torch.device("meta"):
    model = resnet20(width=64)


def cell(size: float) -> str:
    """A size, with a star where it is within the budget."""
    return f"{size:8.1f}{'*' if size <= arguments.budget else ' '}"


sparse = {
    (window, density): estimate_memory(model, SparseMFAC, window=window, density=density).per_parameter
    for window in WINDOWS
    for density in DENSITIES
}
low_rank = {
    (window, rank): estimate_memory(model, LowRankMFAC, window=window, rank=rank).per_parameter
    for window in WINDOWS
    for rank in RANKS
}
print(f"Bytes of state per parameter; * is within the budget of {arguments.budget:g}")
print("window  " + "".join(f"{f'{density:.1%}':>8} " for density in DENSITIES), end="")
print("".join(f"{f'rank {rank}':>8} " for rank in RANKS))
for window in WINDOWS:
    cells = [sparse[window, density] for density in DENSITIES] + [low_rank[window, rank] for rank in RANKS]
    print(f"{window:<8}" + "".join(map(cell, cells)))

# At equal bytes short windows of denser rows were better in our experiments, with 32 rows as good as 128.
fitting = [(density, window) for (window, density), size in sparse.items() if size <= arguments.budget and window >= 32]
if not fitting:
    raise SystemExit("nothing fits: the error takes 4 bytes, or 2 with error_dtype=torch.bfloat16")
density, window = max(fitting)
print(f"chosen: window={window}, density={density}: {sparse[window, density]:.3f} bytes per parameter")

model = resnet20(width=64)
optimizer = SparseMFAC(model.parameters(), lr=1.3 / window, window=window, density=density, damping=1e-3)
images, labels = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
nn.functional.cross_entropy(model(images), labels).backward()
optimizer.step()
print(f"measured after a step: {memory_report(optimizer).per_parameter:.3f} bytes per parameter")
