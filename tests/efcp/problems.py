"""Small problems with every compressor and preconditioner, and ways to look into an optimizer's state."""

import torch

from efcp import EFCP, GGT, MFAC, Identity, LowRank, TopK

COMPRESSORS = {
    "dense": Identity(),
    "sparse": TopK(density=0.1, block_size=16, value_dtype=torch.float32),
    "sparse-bf16": TopK(density=0.3, block_size=8, error_dtype=torch.bfloat16),
    "sparse-8-bits": TopK(density=0.3, block_size=8, error_dtype=torch.int8),
    "sparse-4-bits": TopK(density=0.1, block_size=15, error_dtype=torch.int4),
    "sparse-no-feedback": TopK(density=0.3, block_size=8, error_feedback=False),
    "low-rank": LowRank(rank=2, value_dtype=torch.float32),
    "low-rank-bf16": LowRank(rank=1, power_iterations=2, error_dtype=torch.bfloat16),
    "low-rank-no-feedback": LowRank(rank=1, error_feedback=False),
}
PRECONDITIONERS = {
    "mfac": MFAC(damping=1e-2),
    "ggt": GGT(eps=1e-3),
    "ggt-decay": GGT(eps=1e-3, beta2=0.8),
    "ggt-refresh": GGT(eps=1e-3, beta2=0.9, refresh_every=2),
}


class Problem:
    """Parameters of odd shapes, gradients that are the same for the same seed, and an optimizer."""

    SHAPES = ((3, 7), (1,), (), (40,))

    def __init__(self, *, dtype=torch.float64, shapes=SHAPES, optimizer=EFCP, window=5, **options):
        generator = torch.Generator().manual_seed(1)
        draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.params = [torch.nn.Parameter(value.to(dtype)) for value in draw]
        self.generator = torch.Generator().manual_seed(2)
        self.optimizer = optimizer(self.params, window=window, **options)

    def set_gradients(self):
        for p in self.params:
            p.grad = torch.randn(p.shape, generator=self.generator, dtype=torch.float64).to(p.dtype)

    def step(self, times=1):
        for _ in range(times):
            self.set_gradients()
            self.optimizer.step()

    def values(self):
        return [p.detach().clone() for p in self.params]

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def window_rows(optimizer, param):
    """The window of a parameter as a matrix (m, n) in float64, decompressed from its state."""
    state = optimizer.state[param]
    if "rows" in state:
        return state["rows"].double()
    if "left" in state:
        return (state["left"].double().transpose(1, 2) @ state["right"].double()).flatten(1)
    group = next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))
    values, indices = state["values"].double(), state["indices"].long()
    blocks, window, _ = values.shape
    size = max(1, min(group["block_size"], param.numel()))
    rows = torch.zeros(window, blocks, size, dtype=torch.float64)
    rows.scatter_add_(2, indices.transpose(0, 1), values.transpose(0, 1))  # padding adds zeros
    return rows.flatten(1)[:, : param.numel()]


def newest_slot(optimizer):
    return (int(optimizer.shared["step"]) - 1) % len(optimizer.shared["gram"])
