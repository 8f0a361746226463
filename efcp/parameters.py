"""Parameters of one param group, device and dtype in a step: their gradients into a window, the window into updates."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efcp import kernels
from efcp.windows import Compressor, Window


class Member(NamedTuple):
    """A parameter, its state, and the compressor that has made its window."""

    param: Tensor
    state: dict[str, Any]
    compressor: Compressor

    @property
    def window(self) -> Window:
        """The window of this parameter alone."""
        return self.compressor.bind([self.state], [self.param])


def flat(tensor: Tensor) -> Tensor:
    """The tensor as (n,), contiguous: itself where it is that, which saves time with many of them, or a view, or where
    it is not contiguous a copy."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.reshape(-1)


class ParameterSet:
    """Parameters with the same options, device and dtype, which are stepped together, in one step."""

    def __init__(
        self, group: dict[str, Any], compressor: Compressor, params: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        self.group, self.params, self.states, self.device = group, params, states, params[0].device
        self.window = compressor.bind(states, params)

    @cached_property
    def grads(self) -> list[Tensor | None]:
        """The gradients, (n,) each and contiguous."""
        return [None if p.grad is None else flat(p.grad) for p in self.params]

    def gradients_are_finite(self) -> Tensor:
        """() bool: whether no gradient holds an Inf or NaN, or is so long that inner products would overflow."""
        grads = [grad for grad in self.grads if grad is not None]
        return kernels.all_finite(grads) if grads else torch.ones((), dtype=torch.bool, device=self.device)

    def push(self, slot: Tensor, finite: Tensor) -> Tensor:
        """Takes the gradients into row `slot` of the window; without a gradient the row becomes zero.

        Args:
            slot: (1,) int64.
            finite: () bool.

        Returns:
            The inner products of all rows with the new one: (m,) float64.
        """
        slot, finite = slot.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        return self.window.push(self._averaged(finite), slot, finite)

    def update_(self, weights: Tensor, finite: Tensor) -> None:
        """θ ← (1 − lr·wd) θ − lr Σᵢ wᵢ Gᵢ, with heavy ball where there is momentum; all as it was where not finite.

        Args:
            weights: (m,) float64, zero where not finite.
            finite: () bool.
        """
        weights, finite = weights.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        lr, weight_decay = self.group["lr"], self.group["weight_decay"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        taken = finite.double()
        step = taken * (lr if self.group["maximize"] else -lr)
        scale = 1 - taken * lr * weight_decay if weight_decay > 0 else torch.ones_like(taken)
        momenta, decay = [], scale  # without momenta it is not used
        if self.group["momentum"] > 0:
            momenta = [state["momentum"] for state in self.states]
            decay = torch.where(finite, torch.full_like(taken, self.group["momentum"]), 1.0)
        targets = [None if p.grad is None else flat(p) for p in self.params]
        self.window.apply_(targets, momenta, weights, scale, step, decay)
        written = [(p, target) for p, target in zip(self.params, targets, strict=True) if target is not None]
        for p, target in written:
            if not p.is_contiguous():
                p.copy_(target.view(p.shape))
        torch.autograd.graph.increment_version([p for p, _ in written])  # kernels write behind autograd's back

    def _averaged(self, finite: Tensor) -> list[Tensor | None]:
        """The averages of gradients that beta1 asks for; without beta1 the gradients themselves."""
        beta1 = self.group["beta1"]
        if beta1 == 0:
            return self.grads
        averages: list[Tensor | None] = []
        for grad, state in zip(self.grads, self.states, strict=True):
            if grad is not None:
                average = state["average"]
                torch.where(finite, average.lerp(grad.to(average.dtype), 1 - beta1), average, out=average)
            averages.append(None if grad is None else state["average"])
        return averages
