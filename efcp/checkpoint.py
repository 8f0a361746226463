"""Loading state: refused if it does not fit the optimizer, else taken over bit for bit.

`torch.optim.Optimizer.load_state_dict` casts floating-point and integer state to the dtype of the parameter. In
bfloat16, indices above 256 are lost, and so is the precision of float64 matrices.

What is loaded is read once: positions are used as addresses, and one NaN would stay.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Exact:
    """A parameter's state on its way through `Optimizer.load_state_dict`, which casts tensors but leaves this alone."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def on(self, device: torch.device) -> dict[str, Any]:
        """A copy of the state on a device, contiguous."""
        return _copied(self.state, device)


def _copied(value: Any, device: torch.device) -> Any:
    """A copy with all tensors on the device; what wrappers keep may be nested."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value


def check_same(where: str, name: str, saved: Any, own: Any) -> None:
    """Raises ValueError unless a thing is the same in the state and in the optimizer."""
    if saved != own:
        raise ValueError(f"{where}: {name} is {saved!r} in the state, but {own!r} in the optimizer")


def check_structure(state_dict: dict[str, Any]) -> None:
    """Checks that there are param groups with distinct parameters, and states of these only.

    Wrappers may keep more in the state, under keys of another type than stands for parameters.
    """
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    well_formed = (
        isinstance(groups, list)
        and isinstance(states, dict)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    )
    if not (well_formed and isinstance(groups, list) and isinstance(states, dict)):
        raise ValueError("state_dict: not the state of an optimizer")
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(states.get(key, {}), dict) for key in keys):
        raise ValueError("state_dict: not the state of an optimizer")
    if len(set(keys)) < len(keys):
        raise ValueError("state_dict: a parameter is in the param groups twice")
    types = {int, *map(type, keys)}
    if unknown := [key for key in states.keys() - set(keys) if type(key) in types]:
        raise ValueError(f"state_dict: there is state of {len(unknown)} parameters that are in no param group")


def check_options(where: str, saved: dict[str, Any], names: Iterable[str]) -> None:
    """Checks that a saved param group has all options."""
    if missing := [name for name in names if name not in saved]:
        raise ValueError(f"{where}: the state has no {', '.join(missing)}; it was saved by another kind of optimizer")


def check_tensors(where: str, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Checks names, shapes and dtypes of a parameter's saved state.

    Args:
        where: for messages.
        saved: the state.
        expected: all that the state should hold; tensors may be on the meta device.
    """
    check_same(where, "the list of names", sorted(saved), sorted(expected))
    for name, own in expected.items():
        value = saved[name]
        if isinstance(own, Tensor) and isinstance(value, Tensor):
            check_same(where, f"the shape of {name}", tuple(value.shape), tuple(own.shape))
            check_same(where, f"the dtype of {name}", value.dtype, own.dtype)
            check_same(where, f"the layout of {name}", value.layout, own.layout)
        else:
            check_same(where, f"the type of {name}", type(value).__name__, type(own).__name__)


def check_content(where: str, name: str, holds: bool | Tensor, allowed: str) -> None:
    """Raises ValueError unless what a state holds is allowed."""
    if not holds:
        raise ValueError(f"{where}: {name} must {allowed}; the state is damaged")


def check_numbers(where: str, state: dict[str, Any]) -> None:
    """Checks that tensors are finite, and that numbers are, and not negative."""
    for name, value in state.items():
        if isinstance(value, Tensor):
            check_content(where, name, value.isfinite().all(), "be finite")
        else:
            check_content(where, name, 0 <= value < math.inf, "be finite and not negative")
