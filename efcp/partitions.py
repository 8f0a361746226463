"""Refuses ZeRO, which gives each process a part of the parameters to optimise.

The window must see whole gradients: S = GGᵀ sums over all parameters. An optimizer of a part would precondition with
the Gram matrix of that part alone, and nothing would tell that every process, or partition, has another one. Parameters
that PyTorch's and DeepSpeed's first stages hand over carry no mark, so the call stack is searched, and only where the
library in question is loaded.
"""

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor

WHY = (
    "it gives each process a part of the parameters, but the Gram matrix is of whole gradients; use fully_shard "
    "(FSDP2), or mesh= with DistributedDataParallel"
)


def refuse_zero_redundancy_optimizer() -> None:
    """Raises ValueError where `ZeroRedundancyOptimizer` constructs the optimizer of a part of the parameters."""
    zero = _caller("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer")
    if zero is not None and zero.world_size > 1:
        raise ValueError(
            f"torch.distributed.optim.ZeroRedundancyOptimizer must have one process, got {zero.world_size}: {WHY}"
        )


def refuse_deepspeed_parameters(params: Iterable[Tensor]) -> None:
    """Raises ValueError for parameters that ZeRO-3 of DeepSpeed has partitioned: it marks them with an id."""
    for p in params:
        if hasattr(p, "ds_id"):
            raise ValueError(f"params must not be partitioned by ZeRO-3 of DeepSpeed, got ds_id {p.ds_id!r}: {WHY}")


def refuse_deepspeed_step() -> None:
    """Raises RuntimeError where an optimizer of DeepSpeed's ZeRO takes a step: it has replaced the parameters.

    It takes a step for each of its partitions, with one process too, hence is refused there as well.
    """
    zero = _caller("deepspeed.runtime.base_optimizer", "ZeROOptimizer")
    if zero is not None:
        raise RuntimeError(f"{type(zero).__name__} of DeepSpeed must not step this optimizer: {WHY}")


def _caller(module: str, name: str) -> Any:
    """The instance of a class whose method is among the callers; None where there is none, or no such module."""
    cls = getattr(sys.modules.get(module), name, None)
    if cls is None:
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if issubclass(type(owner), cls):  # isinstance would ask a proxy for its class
            return owner
        frame = frame.f_back
    return None
