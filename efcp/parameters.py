"""Parameters of one param group, device and dtype in a step: their gradients into windows, windows into updates."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from efcp.kernels import accumulation_dtype
from efcp.windows import Window


class Member(NamedTuple):
    """A parameter, its state and its window."""

    param: Tensor
    state: dict[str, Any]
    window: Window


class ParameterSet:
    """Parameters with the same options, device and dtype; what depends on these alone is computed once for all."""

    def __init__(self, group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        self.group, self.device, self.dtype = group, device, dtype
        self.members: list[Member] = []

    def gradients_are_finite(self) -> Tensor:
        """() bool: whether no gradient holds an Inf or NaN, or is so long that inner products would overflow."""
        grads = [m.param.grad for m in self.members if m.param.grad is not None]
        if not grads:
            return torch.ones((), dtype=torch.bool, device=self.device)
        norms = torch._foreach_norm(grads, 2, accumulation_dtype(self.dtype))
        return torch.stack(norms).square().isfinite().all()

    def push(self, slot: Tensor, finite: Tensor) -> Tensor:
        """Takes the gradients into row `slot` of the windows; without a gradient the row becomes zero.

        Args:
            slot: (1,) int64.
            finite: () bool.

        Returns:
            The inner products of all rows with the new one, summed over the parameters: (m,) float64.
        """
        slot, finite = slot.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        dots = [torch.zeros(self.group["window"], dtype=torch.float64, device=self.device)]
        for param, state, window in self.members:
            if param.grad is None:
                window.clear(slot)
            else:
                dots.append(window.push(self._averaged(param.grad.reshape(-1), state, finite), slot, finite))
        return torch.stack(dots).sum(0)

    def update_(self, weights: Tensor, finite: Tensor) -> None:
        """θ ← (1 − lr·wd) θ − lr Σᵢ wᵢ Gᵢ, with heavy ball where there is momentum; all as it was where not finite.

        Args:
            weights: (m,) float64, zero where not finite.
            finite: () bool.
        """
        weights, finite = weights.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        lr = self.group["lr"].reshape(()) if isinstance(self.group["lr"], Tensor) else self.group["lr"]
        lr = finite.double() * lr
        scale = 1 - lr * self.group["weight_decay"]
        step = lr if self.group["maximize"] else -lr
        momentum = self.group["momentum"]
        if momentum > 0:
            decay = torch.where(finite, torch.full_like(lr, momentum), 1.0)
        else:
            weights = step * weights
        for param, state, window in self.members:
            if param.grad is None:
                continue
            flat = param.reshape(-1)  # a copy where the parameter is not contiguous
            if momentum > 0:
                window.apply_(state["momentum"], weights, decay)
                flat.mul_(scale).addcmul_(state["momentum"], step)
            else:
                window.apply_(flat, weights, scale)
            if not param.is_contiguous():
                param.copy_(flat.view(param.shape))
            torch.autograd.graph.increment_version(param)  # kernels write behind autograd's back

    def _averaged(self, grad: Tensor, state: dict[str, Any], finite: Tensor) -> Tensor:
        """The average of gradients that beta1 asks for, (n,); without beta1 the gradient itself."""
        if self.group["beta1"] == 0:
            return grad
        average = state["average"]
        return torch.where(finite, average.lerp(grad.to(average.dtype), 1 - self.group["beta1"]), average, out=average)
