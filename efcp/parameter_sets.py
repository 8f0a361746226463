"""Parameters that are stepped together: what each keeps, and what a step does to all of them.

Of a parameter of n elements, beside its window:

    numel            int      n
    momentum         (n,)     where used: the dense momentum, or that of the update (heavy ball); int8, with
    momentum_scales  (n/64,)  float32, or floating point
    average          (n,)     of gradients, where beta1 > 0
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from efcp import kernels
from efcp.checks import from_plain, require
from efcp.preconditioners import LocalPreconditioner, Preconditioner
from efcp.shards import Share
from efcp.shared_state import check_state_names
from efcp.windows import Compressor, Separate
from efcp.windows.base import floats
from efcp.windows.batched import Batched, Plan, buffer_of

MOMENTUM = ("momentum", "momentum_scales", "average")


def fill(
    state: dict[str, Any],
    param: Tensor,
    group: dict[str, Any],
    compressor: Compressor,
    preconditioner: Preconditioner,
    taken: set[str],
    number: int = 0,
) -> None:
    """Allocates what the state of a parameter lacks: window, momentum, average.

    Args:
        group: the options window, direction, momentum, momentum_dtype and beta1.
        taken: names that the compressor must not use.
        number: of the parameter, by which its random numbers differ from those of others.

    Raises:
        ValueError: where it does.
    """
    if compressor.row_names(param)[0] not in state:
        with torch.inference_mode(False):  # else no later step outside inference mode could update it
            rows = compressor.allocate(param, group["window"])
            own = preconditioner.allocate_local(rows) if isinstance(preconditioner, LocalPreconditioner) else {}
        check_state_names(compressor, rows, taken | own.keys() | {"numel", *MOMENTUM})
        if "error_draws" in rows:
            rows["error_draws"] += number << 32
        state.update({**rows, **own, "numel": param.numel()})  # all or nothing
    lacks_momentum = keeps_momentum(group) and "momentum" not in state
    lacks_average = group["beta1"] > 0 and "average" not in state
    if not (lacks_momentum or lacks_average):
        return
    with torch.inference_mode(False):
        if lacks_momentum:
            dtype = from_plain(group["momentum_dtype"]) or param.dtype
            if dtype == torch.int8:
                numbers = kernels.allocate_lowbit(param.numel(), 8, param.device)
                state.update(momentum=numbers.codes, momentum_scales=numbers.scales)
            else:
                state["momentum"] = torch.zeros(param.numel(), dtype=dtype, device=param.device)
        if lacks_average:
            state["average"] = torch.zeros(param.numel(), dtype=param.dtype, device=param.device)


def rounding(group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> float:
    """The machine epsilon of the arithmetic in which the rows of a parameter's window are summed."""
    heavy_ball = group["direction"] == "row" and group["momentum"] > 0
    written = state["momentum"] if heavy_ball else param
    return torch.finfo(kernels.accumulation_dtype(written.dtype)).eps


def keeps_momentum(group: dict[str, Any]) -> bool:
    """Whether the parameters of a group have a momentum of their own: dense, or heavy ball."""
    return group["direction"] == "momentum" or (group["direction"] == "row" and group["momentum"] > 0)


def dtypes(param: Tensor, state: dict[str, Any]) -> tuple[torch.dtype | None, ...]:
    """The dtypes of gradient, error, momentum and average. They may differ from the parameter's."""
    own = (state[name].dtype for name in ("error", "error_codes", "momentum", "average") if name in state)
    return (None if param.grad is None else param.grad.dtype), *own


def flat(tensor: Tensor) -> Tensor:
    """The elements as a contiguous (n,) tensor without a negative bit: a view where possible, else a copy."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor if tensor.dim() == 1 else tensor.view(-1)


@torch.compiler.disable  # it would take the targets, views, for inputs with gradients
def write_back(params: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
    """Makes parameters what has become of the tensors that `flat` has given of them; None has not changed."""
    written = [(p, target) for p, target in zip(params, targets, strict=True) if target is not None]
    for p, target in written:
        if p.is_neg() or not p.is_contiguous():
            p.copy_(target.view(p.shape))
    torch.autograd.graph.increment_version([p for p, _ in written])  # kernels write behind autograd's back


class ParameterSet:
    """Parameters with the same options, device and dtypes, whose kernels are launched together, in one step."""

    def __init__(
        self,
        group: dict[str, Any],
        compressor: Compressor,
        params: list[Tensor],
        states: list[dict[str, Any]],
        share: Share,
    ) -> None:
        self.group, self.params, self.states, self.device = group, params, states, params[0].device
        self.compressor, self.share = compressor, share
        self._norm_is_finite: Tensor | None = None  # where the window has found out itself
        self.window = compressor.bind(states, params)
        require(len(self.window) == group["window"], "window", f"stay what it was, {len(self.window)}", group["window"])

    @property
    def rounding(self) -> float:
        """The machine epsilon of the arithmetic in which the rows of the window are summed."""
        return rounding(self.group, self.params[0], self.states[0])

    @cached_property
    def momenta(self) -> list[Tensor | kernels.LowBit]:
        """The momenta of the parameters; none where they have none."""
        if not keeps_momentum(self.group):
            return []
        lowbit = "momentum_scales" in self.states[0]
        names = ("momentum", "momentum_scales")
        return [kernels.LowBit(*(s[n] for n in names)) if lowbit else s["momentum"] for s in self.states]

    def average_momenta(self, finite: Tensor) -> Tensor:
        """a ← βa + (1 − β)g of the dense momenta. Returns the sum of their squares, () float64.

        Args:
            finite: () bool; where false, they stay as they are.
        """
        finite = finite.to(self.device, non_blocking=True)
        return kernels.average_(self.momenta, self.grads, self.group["momentum"], finite)

    @cached_property
    def grads(self) -> list[Tensor | None]:
        """The gradients, (n,) each and contiguous."""
        return [None if p.grad is None else flat(p.grad) for p in self.params]

    def look_at_gradients(self, slot: Tensor) -> Tensor:
        """Begins a push into row `slot`, (1,) int64, which `push` ends.

        Returns:
            () bool: whether no gradient holds an Inf or NaN, or is so long that inner products would overflow.
        """
        if not self.group["beta1"]:
            self._norm_is_finite = self.window.push_unchecked(self.grads, slot.to(self.device, non_blocking=True))
        if self._norm_is_finite is not None:
            return self._norm_is_finite
        grads = [grad for grad in self.grads if grad is not None]
        return kernels.norm_is_finite(grads) if grads else torch.ones((), dtype=torch.bool, device=self.device)

    def push(self, slot: Tensor, finite: Tensor) -> None:
        """Takes the gradients into row `slot` of the window; without a gradient the row becomes zero.

        Args:
            slot: (1,) int64, as in `look_at_gradients` before.
            finite: () bool: whether the gradients of all parameters are. Where false, the row becomes zero, too.
        """
        slot, finite = slot.to(self.device, non_blocking=True), finite.to(self.device, non_blocking=True)
        if self._norm_is_finite is None:
            self.window.push(self._averaged(finite), slot, finite)
        else:
            self.window.settle(self.grads, slot, finite)

    def dots(self, slot: Tensor, with_momenta: bool = False) -> Tensor:
        """The inner products of all rows with row `slot`, (1,) int64: (m,) float64; or (2, m), with momenta second."""
        return self.window.dots(slot.to(self.device, non_blocking=True), self.momenta if with_momenta else [])

    def update_(
        self, weights: Tensor, factor: Tensor, finite: Tensor, squares: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """θ ← (1 − lr·wd) θ − lr (Σᵢ wᵢ Gᵢ + factor · a); all as it was where not finite.

        With the direction "row" and momentum the step goes along that of the update: heavy ball.

        Args:
            weights: (m,) float64, zero where not finite.
            factor: () float64, of dense momenta a.
            finite: () bool.
            squares: of second moments, by which the sum of the rows is divided: see `Preconditioner.square_weights`.
        """
        weights, factor, finite = (x.to(self.device, non_blocking=True) for x in (weights, factor, finite))
        update_factor, target_factor, kept = self._factors(finite)
        update, momenta = kernels.Update(weights, target_factor, update_factor), self.momenta
        if squares is not None:
            square_weights, eps = (x.to(self.device, non_blocking=True) for x in squares)
            update = update._replace(square_weights=square_weights, eps=eps)
        if self.group["direction"] == "momentum":
            update = update._replace(momentum_factor=factor)
        elif momenta:
            update = update._replace(momentum_factor=kept, writes_momenta=True)
        targets = [None if p.grad is None else flat(p) for p in self.params]
        self.window.apply_(targets, momenta, update)
        write_back(self.params, targets)

    def update_locally_(self, preconditioner: LocalPreconditioner, slot: Tensor, finite: Tensor) -> None:
        """θ ← (1 − lr·wd) θ − lr u, with the update u of each parameter of root mean square `update_rms`.

        The update is that of a metric which each parameter has by itself, up to a factor.

        Args:
            slot: (1,) int64, the newest row.
            finite: () bool; where false, all stays as it is.
        """
        assert isinstance(self.window, Separate)
        windows, finite = self.window.windows, finite.to(self.device, non_blocking=True)
        metrics = preconditioner.metrics(windows, self.states, slot.to(self.device, non_blocking=True))
        update_factor, target_factor, _ = self._factors(finite)
        everyone = self.window.by_shape if isinstance(self.window, Batched) else Plan([], list(range(len(windows))))
        batches, alone = everyone.of(self.grads)
        momenta = self.momenta
        for batch, together in [*((b, True) for b in batches), *(([n], False) for n in alone)]:
            params, own = [self.params[n] for n in batch], [windows[n] for n in batch]
            numels = [p.numel() for p in params]
            dtype, numbers = kernels.accumulation_dtype(params[0].dtype), [momenta[n] for n in batch]
            if together:
                vectors = buffer_of(numbers, numels, dtype).view(len(batch), numels[0])  # (p, n)
                u = preconditioner.update_all(own, [metrics[n] for n in batch], vectors)
            else:
                u = preconditioner.update(own[0], metrics[batch[0]], floats(numbers[0], dtype=dtype))[None]
            norm, length = torch.linalg.vector_norm(u, dim=1), self.group["update_rms"] * numels[0] ** 0.5
            scale = torch.where(finite & (norm > 0), update_factor * length / norm, 0.0)
            step = u.masked_fill_(~finite, 0.0).mul_(scale[:, None])
            targets = [flat(p) for p in params]
            torch._foreach_mul_(targets, target_factor)
            torch._foreach_add_(targets, step.unbind())
            write_back(params, targets)

    def _factors(self, finite: Tensor) -> tuple[Tensor, ...]:
        """Factors of the update, of the target and, for heavy ball, of the momentum: () float64 each."""
        lr, weight_decay, momentum = (self.group[name] for name in ("lr", "weight_decay", "momentum"))
        eager = not torch.compiler.is_compiling()
        if eager and kernels.is_fused(finite) and not isinstance(lr, Tensor):  # in one launch
            numbers = (lr if self.group["maximize"] else -lr, 1 - lr * weight_decay, momentum), (0.0, 1.0, 1.0)
            if kernels.backend_name(finite.device) == "cpu":
                return torch.tensor(numbers[not finite], dtype=torch.float64, device=finite.device).unbind()
            table = kernels.on_device(self.device, numbers, lambda: torch.tensor(numbers, dtype=torch.float64))
            taken, skipped = table.unbind()
            if weight_decay == 0 and not (self.group["direction"] == "row" and momentum > 0):  # u is zero where skipped
                return taken.unbind()
            return torch.where(finite, taken, skipped).unbind()
        lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
        taken = finite.double()
        update_factor = taken * (lr if self.group["maximize"] else -lr)
        target_factor = 1 - taken * lr * weight_decay if weight_decay > 0 else torch.ones_like(taken)
        return update_factor, target_factor, torch.where(finite, torch.full_like(taken, momentum), 1.0)

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
