"""A parameter in one step: its gradient, its options, its state and its window."""

from typing import Any

import torch
from torch import Tensor

from efcp.windows import Compressor


class WindowedParameter:
    """A parameter p, its param group, and its state, which holds the tensors of its window."""

    def __init__(self, param: Tensor, group: dict[str, Any], state: dict[str, Any], compressor: Compressor) -> None:
        self.param, self.group, self.state = param, group, state
        self.window = compressor.bind(state, param.numel())

    def push(self, slot: Tensor, finite: Tensor) -> Tensor:
        """Takes the gradient into row `slot` of the window; without a gradient the row becomes zero.

        Returns:
            The inner products of all rows with the new one, (m,) float64.
        """
        device = self.param.device
        slot, finite = slot.to(device, non_blocking=True), finite.to(device, non_blocking=True)
        grad = self.param.grad
        if grad is None:
            self.window.clear(slot)
            return torch.zeros(self.group["window"], dtype=torch.float64, device=device)
        grad = grad.reshape(-1)
        if self.group["beta1"] > 0:
            average = self.state["average"]
            torch.where(finite, average.lerp(grad, 1 - self.group["beta1"]), average, out=average)
            grad = average
        return self.window.push(grad, slot, finite)

    def update_(self, weights: Tensor, finite: Tensor) -> None:
        """θ ← (1 − lr·wd) θ − lr Σᵢ wᵢ Gᵢ, with heavy ball where there is momentum; all as it was where not finite.

        Args:
            weights: (m,) float64, zero where not finite.
            finite: () bool.
        """
        if self.param.grad is None:
            return
        device, group = self.param.device, self.group
        weights, finite = weights.to(device, non_blocking=True), finite.to(device, non_blocking=True)
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        lr = finite.double() * lr
        scale = 1 - lr * group["weight_decay"]
        step = lr if group["maximize"] else -lr

        flat = self.param.reshape(-1)  # a copy where the parameter is not contiguous
        if group["momentum"] > 0:
            velocity = self.state["momentum"]
            decay = torch.where(finite, lr.new_full((), group["momentum"]), 1.0)
            self.window.apply_(velocity, weights, decay)
            flat.mul_(scale).addcmul_(velocity, step)
        else:
            self.window.apply_(flat, step * weights, scale)
        if not self.param.is_contiguous():
            self.param.copy_(flat.view(self.param.shape))
