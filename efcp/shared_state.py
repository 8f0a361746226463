"""The state that all parameters share: allocated, shown in the state of one parameter, found there, its age checked.

`optimizer.shared` holds the Gram matrix (`efcp.gram`), what the preconditioner derives from it, and `version`. No edit
of param groups, parameters or their states changes it. The state of the first parameter that has a window holds the
same tensors, so that whatever saves, copies or moves states takes them along. `Origin` tells whether the windows are
still those that the Gram matrix was computed from.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efcp.gram import allocate_gram
from efcp.preconditioners import Preconditioner

VERSION = 2  # of the states that are written; `efcp.checkpoint` says what each version holds

Windows = Sequence[tuple[Tensor, Sequence[Tensor]]]
"""Parameters, each with the tensors of its window."""


def allocate_shared(window_size: int, preconditioner: Preconditioner, device: torch.device) -> dict[str, Any]:
    """New shared state, of a window of zero rows.

    Raises:
        ValueError: where the preconditioner gives its state names that are taken.
    """
    with torch.inference_mode(False):  # else no later step outside inference mode could update it
        gram, own = allocate_gram(window_size, device), preconditioner.allocate(window_size, device)
    check_state_names(preconditioner, own, {*gram, "version"})
    return {**gram, **own, "version": VERSION}


def check_state_names(part: object, state: dict[str, Any], taken: set[str]) -> None:
    """Raises ValueError if a compressor or preconditioner gives its state names that are used for other things."""
    if clash := sorted(taken & state.keys()):
        raise ValueError(f"the state of {type(part).__name__} must not have names that are taken: {', '.join(clash)}")


def show(shared: dict[str, Any], states: Mapping[Any, dict[str, Any]], home: Tensor) -> None:
    """Puts the shared state into the state of one parameter, and takes it from all others."""
    for param, state in states.items():
        if param is not home and isinstance(param, Tensor) and "gram" in state:
            for name in sorted(shared, key="gram".__eq__):  # by which it is known, last
                state.pop(name, None)
    states[home].update(shared)


class Origin:
    """The windows that a Gram matrix was computed from: which tensors of which parameters, and in which version.

    This notices parameters that leave, and states that are deleted, replaced or written from outside: PyTorch raises a
    tensor's version at each write, the kernels here do not.

    Args:
        windows: of all parameters that have one.
    """

    def __init__(self, windows: Windows = ()) -> None:
        self._seen = {
            id(param): (param, [weakref.ref(tensor) for tensor in tensors], _versions(tensors))
            for param, tensors in windows
        }

    def changed(self, windows: Windows) -> list[Tensor]:
        """The parameters whose windows have come, gone or changed since."""
        changed, gone = [], dict(self._seen)
        for param, tensors in windows:
            _, seen, versions = gone.pop(id(param), (param, [], []))
            same = len(seen) == len(tensors) and versions == _versions(tensors)
            if not (same and all(ref() is tensor for ref, tensor in zip(seen, tensors, strict=True))):
                changed.append(param)
        return changed + [param for param, _, _ in gone.values()]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors have none
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
