"""The optimizers that are compared: a name, a constructor and its options besides the learning rate."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from efcp import EFCP, DenseMFAC, LowRankMFAC, MemoryReport, SparseGGT, SparseMFAC, estimate_memory

ADAM_BYTES = 8.0  # of state per parameter, float32: the line that memory is measured against
_GGT_DENSITY = 0.01
LOW_RANK = "low-rank M-FAC"


@dataclass(frozen=True)
class Method:
    """An optimizer with all its options but the learning rate."""

    name: str
    constructor: Callable[..., Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Unique among the methods of an experiment."""
        return method_label(self.name, *(self.options.get(option) for option in LABELLED))

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        return self.constructor(model.parameters(), lr=lr, **self.options)

    def estimate(self, model: nn.Module) -> MemoryReport | None:
        """What `efcp.estimate_memory` expects of a windowed method; None for any other."""
        if isinstance(self.constructor, type) and issubclass(self.constructor, EFCP):
            return estimate_memory(model, self.constructor, **self.options)
        return None


LABELLED = ("density", "error_feedback", "rank", "power_iterations")  # options that tell methods of a name apart


def method_label(
    name: str, density: float | None, error_feedback: bool | None, rank: int | None, power_iterations: int | None
) -> str:
    """E.g. "sparse M-FAC 1%, no error feedback"; None where a method has no such option."""
    share = "" if density is None else f" {100 * density:g}%"
    factors = "" if rank is None else f" rank {rank:g}, {power_iterations_label(power_iterations)}"
    return f"{name}{share}{factors}{', no error feedback' if error_feedback is False else ''}"


def power_iterations_label(number: float | None) -> str:
    return f"{number:g} power iteration{'' if number == 1 else 's'}"


def compared_methods(
    window: int,
    damping: float,
    densities: Sequence[float],
    ranks: Sequence[int] = (),
    power_iterations: Sequence[int] = (1,),
) -> list[Method]:
    """First-order methods, dense M-FAC, sparse M-FAC at each density with and without error feedback, sparse GGT.

    With ranks also low-rank M-FAC, at each rank with each number of power iterations.
    """
    low_rank = [{"rank": rank, "power_iterations": number} for number in power_iterations for rank in ranks]
    return [
        Method("SGD (momentum 0.9)", torch.optim.SGD, {"momentum": 0.9}),
        Method("Adam", torch.optim.Adam),
        Method("dense M-FAC", DenseMFAC, {"window": window, "damping": damping}),
        *_sparse_mfac(window, damping, densities),
        *(Method(LOW_RANK, LowRankMFAC, {"window": window, "damping": damping, **options}) for options in low_rank),
        Method("sparse GGT", SparseGGT, {"window": window, "density": _GGT_DENSITY, "error_feedback": True}),
    ]


def _sparse_mfac(window: int, damping: float, densities: Sequence[float]) -> Iterable[Method]:
    for error_feedback in (True, False):
        for density in densities:
            options = {"window": window, "damping": damping, "density": density, "error_feedback": error_feedback}
            yield Method("sparse M-FAC", SparseMFAC, options)
