"""Checks what parameters, their gradients and their states must be in a step; and names them for errors."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter

from efcp import kernels
from efcp.shards import Form, Layout, fits, is_sharded
from efcp.windows import Compressor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZED = ("error", "momentum", "average", "exp_avg", "exp_avg_sq")  # of a parameter's state, with its number of elements
FSDP1_MARK = "_fsdp_flattened"  # which PyTorch's first FSDP puts on parameters that it takes apart
OTHERS = ("error_codes", "error_scales", "momentum_scales")


def names(param_groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, str]]:
    """Lists each parameter with the name by which errors call it."""
    for number, group in enumerate(param_groups):
        known = dict(enumerate(group.get("param_names", ())))  # fewer where users have added to params
        for position, p in enumerate(group["params"]):
            name = f" ({known[position]})" if position in known else ""
            yield p, f"param_groups[{number}], parameter {position}{name}"


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
    if hasattr(param, FSDP1_MARK):
        raise ValueError(f"params must not be of FullyShardedDataParallel, use fully_shard (FSDP2), got {name()}")
    if not _is_plain(param):
        raise TypeError(f"params must be tensors with memory of their own, got a {type(param).__name__} for {name()}")
    if param.dtype not in DTYPES:
        raise TypeError(f"params must be of dtype {_names(DTYPES)}, got {param.dtype} for {name()}")
    if not isinstance(param, UninitializedParameter) and not param.is_contiguous() and _overlaps(param):
        strides, shape = param.stride(), tuple(param.shape)
        raise ValueError(
            f"params must have an address for each element, got shape {shape} with strides {strides} for {name()}"
        )


def check_part(name: Callable[[], str], param: Tensor) -> None:
    """Raises an error unless the gradient of a divided parameter, or its lack, can be divided as the parameter is.

    Raises:
        TypeError: for a gradient that is a DTensor where the parameter is not, and the reverse.
        ValueError: for one of another shape, or on another mesh.
    """
    grad = param.grad
    if grad is None:
        return
    if is_sharded(grad) != is_sharded(param):
        raise TypeError(
            f"gradients must be DTensors if and only if their parameter is, got a {type(grad).__name__} for {name()}, "
            f"a {type(param).__name__}"
        )
    if grad.shape != param.shape or getattr(grad, "device_mesh", None) != getattr(param, "device_mesh", None):
        raise ValueError(
            f"gradients must be of the shape and on the mesh of their parameter: {name()} has shape "
            f"{tuple(param.shape)}, its gradient {tuple(grad.shape)}; call zero_grad() after replacing a parameter"
        )


def check_divided_state(name: Callable[[], str], state: dict[str, Any], forms: dict[str, Form], layout: Layout) -> None:
    """Raises ValueError unless the state of a divided parameter is divided as it is."""
    for key, form in forms.items():
        if key in state and not fits(state[key], form, layout):
            got = f"{tuple(state[key].shape)} {getattr(state[key], 'placements', '')}".rstrip()
            raise ValueError(
                f"the state of a parameter must be divided as it is: {name()}, {key} must have shape {form.whole} and "
                f"placements {form.placements}, got {got}; load checkpoints with torch.distributed.checkpoint, and "
                "delete optimizer.state[p] where a parameter is replaced"
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
    if "exp_avg" not in state:
        compressor.check_shape(name, state, param)
    device, fake = param.device, kernels.is_fake(param)
    rows = () if "exp_avg" in state else compressor.row_names(param)
    for key, own in state.items():
        if key not in SIZED and key not in OTHERS and key not in rows:
            continue
        if key in SIZED and own.numel() != numel:
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
