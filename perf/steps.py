"""The optimizers that a user could choose, and models whose parameters they step. Needs nothing but PyTorch.

All step the same parameters, float32, with the same gradients. Before it is measured, an optimizer fills its window.
Where a step is longer every `cycle` steps, a run is `cycle` steps.

Another optimizer is one more line in `OPTIMIZERS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import efcp
from efcp.perf.machine import available_bytes
from efcp.perf.timing import Call, Timer

__all__ = ["ADAMW", "MODELS", "OPTIMIZERS", "QUICK", "Entry", "Step", "ready", "refusal", "with_gradients"]

LR = 1e-3
NEEDED = 200  # bytes a parameter that no optimizer of the table exceeds, state and temporaries together
ADAMW = "AdamW, fused"

Groups = Any
"""What an optimizer takes for `params`."""


def whole(model: nn.Module) -> Groups:
    return list(model.parameters())


@dataclass(frozen=True)
class Entry:
    """An optimizer with its settings.

    Args:
        family: of the plot: those with the same colour and marker.
        settings: what the optimizer is given, for people.
        build: makes the optimizers that together step all parameters.
        params: what `build` takes, of a model: all parameters, or a split of them.
        fill: steps before it is measured, ≥ 1: those that fill the window.
        cycle: steps from one that takes longer to the next.
        matrices: whether it is for models with matrices only.
    """

    family: str
    settings: str
    build: Callable[[Groups], list[Optimizer]]
    params: Callable[[nn.Module], Groups] = whole
    fill: int = 2
    cycle: int = 1
    matrices: bool = False


def _torch(name: str, **options: Any) -> Callable[[Groups], list[Optimizer]]:
    return lambda params: [getattr(torch.optim, name)(params, lr=LR, **options)]


def _muon(groups: Groups) -> list[Optimizer]:
    hidden, others = ([p for _, p in group["params"]] for group in groups)
    return [torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(others, lr=LR, fused=True)]


def _adamw_8bit(params: Groups) -> list[Optimizer]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit(params, lr=torch.tensor(LR), block_size=64)]


def _soap(params: Groups) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(params, lr=LR)]


def _ours(optimizer: type[Optimizer], **options: Any) -> Callable[[Groups], list[Optimizer]]:
    return lambda params: [optimizer(params, lr=LR, **options)]  # type: ignore[call-arg]


SPLIT: dict[str, Any] = {"params": efcp.param_groups, "matrices": True}
PYTORCH, TOP_K, LOW_RANK, SUBSPACE = "PyTorch", "efcp, Top-k", "efcp, low rank", "efcp, low-rank Adam"
EVERY = 20  # steps from one subspace to the next; the papers' 200 would take minutes to measure
SPARSE, INT4 = "m = 32, density 1%", torch.int4  # type: ignore[attr-defined]

OPTIMIZERS: dict[str, Entry] = {
    ADAMW: Entry(PYTORCH, "", _torch("AdamW", fused=True)),
    "AdamW, foreach": Entry(PYTORCH, "", _torch("AdamW", foreach=True)),
    "SGD": Entry(PYTORCH, "momentum 0.9, fused", _torch("SGD", momentum=0.9, fused=True)),
    "Muon": Entry(PYTORCH, "split, AdamW fused", _muon, **SPLIT),
    "AdamW, 8 bits": Entry("torchao", "block 64", _adamw_8bit),
    "SOAP": Entry("pytorch_optimizer", "decompositions every 10 steps", _soap, fill=1, cycle=10),
    "SparseMFAC": Entry(TOP_K, f"{SPARSE}, error float32", _ours(efcp.SparseMFAC, window=32), fill=32),
    "SparseMFAC, int8": Entry(
        TOP_K, f"{SPARSE}, error int8", _ours(efcp.SparseMFAC, window=32, error_dtype=torch.int8), fill=32
    ),
    "SparseMFAC, int4": Entry(
        TOP_K, f"{SPARSE}, error int4", _ours(efcp.SparseMFAC, window=32, error_dtype=INT4), fill=32
    ),
    "MicroAdam": Entry(TOP_K, "m = 10, density 1%, error int4", _ours(efcp.MicroAdam), fill=10),
    "SparseGGT": Entry(TOP_K, "m = 100, density 1%, error float32", _ours(efcp.SparseGGT), fill=100),
    "LowRankMFAC": Entry(
        LOW_RANK, "m = 32, rank 4, error float32", _ours(efcp.LowRankMFAC, window=32), fill=32, matrices=True
    ),
    "MFACW": Entry(LOW_RANK, "m = 32, rank 4", _ours(efcp.MFACW), fill=32, matrices=True),
    "MFACW, split": Entry(LOW_RANK, "m = 32, rank 4, split", _ours(efcp.MFACW), fill=32, **SPLIT),
    "KroneckerW": Entry(LOW_RANK, "m = 32, rank 4", _ours(efcp.KroneckerW), fill=32, matrices=True),
    "KroneckerW, split": Entry(LOW_RANK, "m = 32, rank 4, split", _ours(efcp.KroneckerW), fill=32, **SPLIT),
    "GaLoreAdamW": Entry(
        SUBSPACE,
        f"rank 16, every {EVERY} steps",
        _ours(efcp.GaLoreAdamW, rank=16, every=EVERY),
        cycle=EVERY,
        matrices=True,
    ),
    "LDAdamW": Entry(SUBSPACE, "rank 16", _ours(efcp.LDAdamW), matrices=True),
    "AdaRankGrad": Entry(
        SUBSPACE,
        f"rank 16, every {EVERY} steps",
        _ours(efcp.AdaRankGrad, rank=16, every=EVERY),
        cycle=EVERY,
        matrices=True,
    ),
}
"""All optimizers, by name. A split leaves embeddings, head and vectors to AdamW (`efcp.param_groups`)."""


def gpt(layers: int, width: int, vocabulary: int, positions: int) -> nn.Module:
    """The parameters of a transformer like GPT-2, whose output layer is its embedding. It has no `forward`."""

    def block() -> nn.ModuleDict:
        return nn.ModuleDict(
            {
                "norm": nn.LayerNorm(width),
                "attention": nn.Linear(width, 3 * width),
                "projection": nn.Linear(width, width),
                "second_norm": nn.LayerNorm(width),
                "inner": nn.Linear(width, 4 * width),
                "outer": nn.Linear(4 * width, width),
            }
        )

    tokens, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    head.weight = tokens.weight
    blocks = nn.ModuleList(block() for _ in range(layers))
    embeddings = {"tokens": tokens, "positions": nn.Embedding(positions, width)}
    return nn.ModuleDict({**embeddings, "blocks": blocks, "norm": nn.LayerNorm(width), "lm_head": head})


def flat(numel: int) -> nn.Module:
    return nn.ParameterList([torch.zeros(numel)])


def layers(count: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


Models = Mapping[str, Callable[[], nn.Module]]
MODELS: Models = {
    "small GPT, 18.9M": partial(gpt, 4, 512, 12000, 256),
    "one vector, 4.2M": partial(flat, 1 << 22),
    "one vector, 16.8M": partial(flat, 1 << 24),
    "150 layers of 64 × 64, 624k": partial(layers, 150, 64),
}
QUICK: Models = {
    "smallest GPT, 118k": partial(gpt, 1, 64, 1000, 64),
    "one vector, 262k": partial(flat, 1 << 18),
    "20 layers of 16 × 16, 5k": partial(layers, 20, 16),
}


@dataclass
class Step:
    """An optimizer of a model, ready to be timed.

    Args:
        optimizers: that step all parameters together.
        once: takes a step.
        run: takes a cycle of steps.
        first: milliseconds of the first run.
    """

    optimizers: list[Optimizer]
    once: Call
    run: Call
    first: float


def with_gradients(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """A model whose gradients are normally distributed, of norm 1 over all parameters."""
    torch.manual_seed(0)
    model = make().to(device)
    length = sum(p.numel() for p in model.parameters()) ** 0.5
    for p in model.parameters():
        p.grad = torch.randn_like(p) / length
    return model


def refusal(entry: Entry, model: nn.Module, device: torch.device) -> str | None:
    """Why an optimizer is not measured on a model; None if it is."""
    if entry.matrices and all(p.dim() < 2 for p in model.parameters()):
        return "for matrices only"
    needed, available = NEEDED * sum(p.numel() for p in model.parameters()), available_bytes(device)
    if needed > available:
        return f"may need {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
    return None


def ready(entry: Entry, model: nn.Module, timer: Timer) -> Step:
    """An optimizer with a full window.

    Raises:
        FloatingPointError: where a parameter has not moved, or is not finite.
    """
    params = [p.detach().zero_() for p in model.parameters()]
    optimizers = entry.build(entry.params(model))

    def once() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def run() -> None:
        for _ in range(entry.cycle):
            once()

    for _ in range(entry.fill):
        once()
    first = timer.milliseconds(run)
    moved = torch.stack(torch._foreach_norm(params))
    if not ((moved > 0) & moved.isfinite()).all():
        raise FloatingPointError("a parameter has not moved, or is not finite")
    return Step(optimizers, once, run, first)
