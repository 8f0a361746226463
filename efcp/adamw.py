"""AdamW for the parameters that the window is not for: embeddings, the head, vectors. It is PyTorch's, in one launch.

State of a parameter of n elements, in param groups with `adamw=True`:

    numel       int          n
    exp_avg     (n,)         of the gradient
    exp_avg_sq  (n,)         of its square
    adam_step   ()  float32  steps taken
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from efcp import kernels
from efcp.parameter_sets import flat, write_back

EPS, BETAS = 1e-8, (0.9, 0.999)
MOMENTS = ("exp_avg", "exp_avg_sq")


def fill_adamw(state: dict[str, Any], param: Tensor) -> None:
    """Allocates what the state of a parameter lacks."""
    if "exp_avg" in state:
        return
    with torch.inference_mode(False):
        new = {name: torch.zeros(param.numel(), dtype=param.dtype, device=param.device) for name in MOMENTS}
        new["adam_step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    state.update({**new, "numel": param.numel()})


class AdamWSet:
    """Parameters with the same options, device and dtype, and a gradient, that are stepped by AdamW."""

    def __init__(self, group: dict[str, Any], params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.group, self.params, self.states, self.device = group, params, states, params[0].device

    @cached_property
    def grads(self) -> list[Tensor]:
        """The gradients, (n,) each and contiguous, in the dtype of the parameters."""
        return [flat(p.grad).to(p.dtype) for p in self.params if p.grad is not None]

    def norm_is_finite(self) -> Tensor:
        """() bool: whether no gradient holds an Inf or NaN."""
        return kernels.norm_is_finite(self.grads)

    def update_(self, finite: Tensor) -> None:
        """A step of AdamW; all stays as it is where not finite, () bool."""
        lr, (beta1, beta2) = self.group["lr"], self.group["betas"]
        targets = [flat(p) for p in self.params]
        adamw(
            targets,
            self.grads,
            [state["exp_avg"] for state in self.states],
            [state["exp_avg_sq"] for state in self.states],
            max_exp_avg_sqs=[],
            state_steps=[state["adam_step"] for state in self.states],
            fused=True,
            found_inf=(~finite.to(self.device, non_blocking=True)).float(),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr.reshape(()).to(self.device) if isinstance(lr, Tensor) else lr,
            weight_decay=self.group["weight_decay"],
            eps=EPS,
            maximize=self.group["maximize"],
        )
        write_back(self.params, targets)
