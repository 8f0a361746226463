"""Warns about skipped and imprecise steps. Their counters live on the device, and are read without waiting for it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efcp.gram import is_on_cpu
from efcp.kernels import is_capturing, is_fake

SKIPPED = 10  # steps in a row, from which on there is a warning
NAMED = 5  # parameters in a warning


class Lookout:
    """Looks at an optimizer's counters after each step, and warns once per problem.

    On a CPU the counters are read as they are. On an accelerator a copy to the host is started after one step and read
    after a later one, when it has arrived.
    """

    def __init__(self) -> None:
        self._copy: tuple[Tensor, torch.Event] | None = None
        self._warned_of_skipping = self._warned_of_rounding = False

    def look(self, state: dict[str, Any], non_finite: Callable[[], list[str]]) -> None:
        """Reads the counters, if they have arrived, and warns.

        Args:
            state: with the counters skipped_in_a_row and, where the preconditioner counts them, imprecise_steps.
            non_finite: gives the names of parameters whose gradients are not finite.
        """
        names = ("skipped_in_a_row", "imprecise_steps")
        counts = self._read([state[name] for name in names if name in state])
        if counts is None:
            return
        skipped, imprecise = (*counts, 0)[:2]
        if skipped >= SKIPPED and not self._warned_of_skipping:
            found = non_finite()
            some = "; ".join(found[:NAMED]) + (f" and {len(found) - NAMED} others" if len(found) > NAMED else "")
            why = f"Inf or NaN in the gradients of {some}" if found else "squares of gradients overflow, or did before"
            warnings.warn(f"{skipped} steps in a row were skipped: {why}", stacklevel=6)
        self._warned_of_skipping = skipped >= SKIPPED
        if imprecise and not self._warned_of_rounding:
            warnings.warn(
                "damping is too small for the precision of the parameters: a step along the newest gradient alone was "
                "taken in place of one that rounding would have spoilt. Raise damping to 1e-6 of the squared norm of "
                "the gradients or more, or use float64 parameters. Further steps of this kind are not reported.",
                stacklevel=6,
            )
            self._warned_of_rounding = True

    def _read(self, counters: list[Tensor]) -> list[int] | None:
        """The counters, or earlier values of them; None where there are none yet."""
        device = counters[0].device
        if is_on_cpu(counters[0]):
            return [int(counter) for counter in counters]
        if is_fake(counters[0]) or is_capturing(device):
            return None
        counts = None
        if self._copy is not None:
            if not self._copy[1].query():
                return None
            counts = self._copy[0].tolist()
        together = torch.stack(counters)
        arriving = pinned_like(together)
        arriving.copy_(together, non_blocking=True)
        arrived = torch.Event(device)
        arrived.record()
        self._copy = arriving, arrived
        return counts


def pinned_like(tensor: Tensor) -> Tensor:
    """A tensor on the host that an accelerator can copy to by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
