"""Parameters that are stepped together: what each keeps, and what a step does to all of them."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import require
from efcp.shared_state import check_state_names
from efcp.windows import Compressor


def fill(state: dict[str, Any], param: Tensor, group: dict[str, Any], compressor: Compressor, taken: set[str]) -> None:
    """Allocates what the state of a parameter lacks: window, momentum, average.

    Args:
        group: the options window, momentum and beta1.
        taken: names that the compressor must not use.

    Raises:
        ValueError: where it does.
    """
    if compressor.row_names(param)[0] not in state:
        with torch.inference_mode(False):  # else no later step outside inference mode could update it
            rows = compressor.allocate(param, group["window"])
        check_state_names(compressor, rows, taken | {"numel", "momentum", "average"})
        state.update({**rows, "numel": param.numel()})  # all or nothing
    for name, decay in (("momentum", group["momentum"]), ("average", group["beta1"])):
        if decay > 0 and name not in state:
            with torch.inference_mode(False):
                state[name] = torch.zeros(param.numel(), dtype=param.dtype, device=param.device)


def dtypes(param: Tensor, state: dict[str, Any]) -> tuple[torch.dtype | None, ...]:
    """The dtypes of gradient, error, momentum and average. They may differ from the parameter's."""
    own = (state[name].dtype for name in ("error", "momentum", "average") if name in state)
    return (None if param.grad is None else param.grad.dtype), *own


def flat(tensor: Tensor) -> Tensor:
    """The elements as a contiguous (n,) tensor without a negative bit: a view where possible, else a copy."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor if tensor.dim() == 1 else tensor.view(-1)


class ParameterSet:
    """Parameters with the same options, device and dtypes, whose kernels are launched together, in one step."""

    def __init__(
        self, group: dict[str, Any], compressor: Compressor, params: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        self.group, self.params, self.states, self.device = group, params, states, params[0].device
        self.window = compressor.bind(states, params)
        require(len(self.window) == group["window"], "window", f"stay what it was, {len(self.window)}", group["window"])

    @property
    def rounding(self) -> float:
        """The machine epsilon of the arithmetic in which the rows of the window are summed."""
        written = self.states[0]["momentum"] if self.group["momentum"] > 0 else self.params[0]
        return torch.finfo(kernels.accumulation_dtype(written.dtype)).eps

    @cached_property
    def grads(self) -> list[Tensor | None]:
        """The gradients, (n,) each and contiguous."""
        return [None if p.grad is None else flat(p.grad) for p in self.params]

    def norm_is_finite(self) -> Tensor:
        """() bool: whether no gradient holds an Inf or NaN, or is so long that inner products would overflow."""
        grads = [grad for grad in self.grads if grad is not None]
        return kernels.norm_is_finite(grads) if grads else torch.ones((), dtype=torch.bool, device=self.device)

    def push(self, slot: Tensor, finite: Tensor) -> None:
        """Takes the gradients into row `slot` of the window; without a gradient the row becomes zero.

        Args:
            slot: (1,) int64.
            finite: () bool.
        """
        slot, finite = slot.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        self.window.push(self._averaged(finite), slot, finite)

    def dots(self, slot: Tensor) -> Tensor:
        """The inner products of all rows with row `slot`, a (1,) int64: (m,) float64."""
        return self.window.dots(slot.to(self.device, non_blocking=True))

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
        update_factor = taken * (lr if self.group["maximize"] else -lr)
        target_factor = 1 - taken * lr * weight_decay if weight_decay > 0 else torch.ones_like(taken)
        update, momenta = kernels.Update(weights, target_factor, update_factor), []
        if self.group["momentum"] > 0:
            momenta = [state["momentum"] for state in self.states]
            kept = torch.where(finite, torch.full_like(taken, self.group["momentum"]), 1.0)
            update = update._replace(momentum_factor=kept)
        targets = [None if p.grad is None else flat(p) for p in self.params]
        self.window.apply_(targets, momenta, update)
        written = [(p, target) for p, target in zip(self.params, targets, strict=True) if target is not None]
        for p, target in written:
            if p.is_neg() or not p.is_contiguous():
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
