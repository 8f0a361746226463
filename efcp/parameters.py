"""Parameters in a step: what they and their gradients must be, and those that are stepped together."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter

from efcp import kernels
from efcp.checks import require
from efcp.windows import Compressor, Window

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_parameter(name: Callable[[], str], param: Tensor) -> None:
    """Raises an error unless an optimizer can step a parameter.

    Args:
        name: gives the name of the parameter, for errors.

    Raises:
        TypeError: for a dtype that is not real floating point, for sparse and nested tensors, and for tensors without
            plain storage, such as DTensor.
        ValueError: for elements that share memory with each other, as those of `Tensor.expand` do.
    """
    if param.layout != torch.strided or param.is_nested:
        kind = "nested" if param.is_nested else param.layout
        raise TypeError(f"params must be dense, got {kind} for {name()}")
    if not _is_plain(param):
        raise TypeError(f"params must be tensors with memory of their own, got a {type(param).__name__} for {name()}")
    if param.dtype not in DTYPES:
        raise TypeError(f"params must be of dtype {_names(DTYPES)}, got {param.dtype} for {name()}")
    if not isinstance(param, UninitializedParameter) and not param.is_contiguous() and _overlaps(param):
        strides, shape = param.stride(), tuple(param.shape)
        raise ValueError(
            f"params must have an address for each element, got shape {shape} with strides {strides} for {name()}"
        )


def new_tensors_are_fake() -> bool:
    """Whether a FakeTensorMode is active. A compiler that traces a step has one of its own."""
    return not torch.compiler.is_compiling() and isinstance(torch.empty(0, device="cpu"), FakeTensor)


def check_gradient(name: Callable[[], str], param: Tensor, fake: bool) -> None:
    """Raises an error unless a parameter can be stepped along its gradient, which is not None.

    Args:
        name: gives the name of the parameter, for errors.
        fake: what `new_tensors_are_fake` says, for a step makes new tensors.

    Raises:
        RuntimeError: for a sparse gradient.
        TypeError: for a gradient that is not real floating point, or has no plain storage; where only some of
            gradient, parameter and new tensors are fake; and for a parameter that has become what `check_parameter`
            refuses.
        ValueError: for a gradient of another shape or device than the parameter, and for a parameter that has come to
            overlap itself or to be an inference tensor.
    """
    check_parameter(name, param)
    if isinstance(param, FakeTensor) != fake and not torch.compiler.is_compiling():
        raise TypeError(
            f"params must be fake tensors in a step under FakeTensorMode, and in no other, got a "
            f"{type(param).__name__} for {name()}"
        )
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(f"gradients must be dense, got {grad.layout} for {name()}")
    if not _is_plain(grad):
        raise TypeError(f"gradients must be tensors with memory of their own, got a {type(grad).__name__} for {name()}")
    if kernels.is_fake(grad) != kernels.is_fake(param):
        raise TypeError(
            f"gradients must be fake if and only if their parameter is, got a {type(grad).__name__} for {name()}, a "
            f"{type(param).__name__}"
        )
    if grad.dtype not in DTYPES:
        raise TypeError(f"gradients must be of dtype {_names(DTYPES)}, got {grad.dtype} for {name()}")
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"gradients must be of the shape and on the device of their parameter: {name()} has shape "
            f"{tuple(param.shape)} on {param.device}, its gradient {tuple(grad.shape)} on {grad.device}; "
            "call zero_grad() after replacing its data"
        )
    if param.is_inference():
        raise ValueError(f"params must not be inference tensors, which cannot be updated, got one for {name()}")


def check_state(name: Callable[[], str], param: Tensor, state: dict[str, Any], compressor: Compressor) -> None:
    """Raises an error unless the state of a parameter that has a window is one for its size, shape and device.

    Raises:
        ValueError: for the state of a parameter of another size or shape, or on another device.
        TypeError: for real state of a fake parameter, and the reverse.
    """
    numel = param.numel()
    if state["numel"] != numel:
        raise ValueError(
            f"the state of a parameter must be for its size: {name()} has {numel} elements, its state is for "
            f"{state['numel']}; delete optimizer.state[p] where a parameter is replaced by one of another size"
        )
    compressor.check_shape(name, state, param)
    device, fake = param.device, kernels.is_fake(param)
    for key in (*compressor.row_names(param), "error", "momentum", "average"):
        if key not in state:
            continue
        own = state[key]
        if key in ("error", "momentum", "average") and own.numel() != numel:
            raise ValueError(
                f"the state of a parameter must be for its size: {name()} has {numel} elements, its {key} "
                f"{own.numel()}; delete optimizer.state[p] where a parameter is replaced by one of another size"
            )
        if own.device != device:
            raise ValueError(
                f"the state of a parameter must be on its device: {name()} is on {device}, its {key} on "
                f"{own.device}; load a state dict after moving a model"
            )
        if kernels.is_fake(own) != fake:
            raise TypeError(
                f"the state of a parameter must be fake if and only if it is: {name()} is a {type(param).__name__}, "
                f"its {key} a {type(own).__name__}; make another optimizer for steps under FakeTensorMode"
            )


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements share an address."""
    reach = 0  # the last address that the dimensions so far lead to
    nested = True  # whether each dimension strides over all that those of smaller strides lead to
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for stride, size in dimensions:
        nested = nested and stride > reach
        reach += stride * (size - 1)
    if nested or tensor.numel() < 2:
        return False
    if tensor.numel() > reach + 1:
        return True
    addresses = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dimensions:
        addresses = (addresses[:, None] + stride * torch.arange(size, device="cpu")).flatten()
    return len(addresses.unique()) < len(addresses)


def _is_plain(tensor: Tensor) -> bool:
    return kernels.has_plain_storage(type(tensor)) or kernels.is_fake(tensor)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


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
