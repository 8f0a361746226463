"""Loading state: refused if it does not fit the optimizer, else taken over bit for bit.

`torch.optim.Optimizer.load_state_dict` casts floating-point and integer state to the dtype of the parameter. In
bfloat16, indices above 256 are lost, and so is the precision of float64 matrices.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Exact:
    """A parameter's state on its way through `Optimizer.load_state_dict`, which casts tensors but leaves this alone."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def on(self, device: torch.device) -> dict[str, Any]:
        """A copy of the state on a device."""
        return {k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in self.state.items()}


def check_same(where: str, name: str, saved: Any, own: Any) -> None:
    """Raises ValueError unless a thing is the same in the state and in the optimizer."""
    if saved != own:
        raise ValueError(f"{where}: {name} is {saved!r} in the state, but {own!r} in the optimizer")


def check_options(where: str, saved: dict[str, Any], own: dict[str, Any], fixed: Iterable[str]) -> None:
    """Checks that a saved param group has the options of one of the optimizer's, and the values of the fixed ones."""
    if missing := [name for name in own if name not in saved and name != "param_names"]:
        raise ValueError(f"{where}: the state has no {', '.join(missing)}; it was saved by another kind of optimizer")
    for name in fixed:
        check_same(where, name, saved[name], own[name])


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
        else:
            check_same(where, f"the type of {name}", type(value).__name__, type(own).__name__)
