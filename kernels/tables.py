"""Tables of numbers on a device, such as the addresses by which one launch reaches many tensors, and who keeps them.

Whoever repeats launches owns a `Tables`, as an optimizer does, and enters it for each of its steps. A step takes tables
over from the step before where their numbers are the same. Only others travel, through pinned memory that PyTorch keeps
for that. Tables that a step has not used are given up.

A captured CUDA graph reads its tables at each replay, and copies those anew that were made during the capture. So all
of these stay as long as their owner, with the memory that they are copied from; and since nobody else may rely on what
only a replay writes, no other step takes them over.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class _Table(NamedTuple):
    numbers: Tensor  # on the device
    device: torch.device
    known_by: Any
    source: Tensor | None  # what a graph copies the numbers from


class Tables:
    """The tables of an owner. Operations that are called within this context take over those of the last time.

    They also check, and look up the addresses of, a list of tensors only once while the context lasts.
    """

    def __init__(self) -> None:
        self._before: list[_Table] = []
        self._now: list[_Table] = []
        self._of_graphs: dict[int, _Table] = {}  # by the id of the tensor
        self.found: dict[Any, tuple[Any, Any]] = {}  # of `once`
        self._token: Token[Tables | None] | None = None

    def __enter__(self) -> None:
        self._token = _owner.set(self)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _owner.reset(self._token)
        self._before, self._now = [table for table in self._now if table.source is None], []
        self.found = {}

    @property
    def bytes(self) -> int:
        """Bytes of all tables on devices."""
        kept = {id(t.numbers): t.numbers for t in (*self._before, *self._now, *self._of_graphs.values())}
        return sum(numbers.numel() * numbers.element_size() for numbers in kept.values())

    def find(self, device: torch.device, known_by: Any, make: Callable[[], Tensor]) -> Tensor:
        """See `on_device`."""
        capturing = is_capturing(device)
        table = next((t for t in self._now if t.known_by == known_by and t.device == device), None)
        if table is None:
            table = next((t for t in self._before if t.known_by == known_by and t.device == device), None)
            if table is None:
                with torch.device("cpu"):
                    numbers = make()
                if device.type == "cuda":
                    numbers = numbers.pin_memory()  # so that the host does not wait for the copy
                on_device = numbers.to(device, non_blocking=True)
                table = _Table(on_device, device, known_by, numbers if capturing else None)
            self._now.append(table)
        if capturing:
            self._of_graphs[id(table.numbers)] = table
        return table.numbers


_owner: ContextVar[Tables | None] = ContextVar("owner", default=None)
_for_ever: list[Tables] = []  # those of graphs that have no owner


def on_device(device: torch.device, known_by: Any, make: Callable[[], Tensor]) -> Tensor:
    """A table on a device: that of the owner in whose context this is called; without one, a new table.

    Args:
        known_by: what its numbers follow from; equal things give equal numbers. Not changed afterwards.
        make: gives the numbers, a new tensor.
    """
    owner = _owner.get()
    if owner is None:
        owner = Tables()
        if is_capturing(device):
            _for_ever.append(owner)
    return owner.find(device, known_by, make)


T = TypeVar("T")


def once(kind: str, lists: Sequence[Any], make: Callable[[], T]) -> T:
    """Returns what `make` gives for these very lists, called once in a step of an owner, which keeps them all.

    Args:
        kind: what it is; others may be made for the same lists.
    """
    owner = _owner.get()
    if owner is None:
        return make()
    key = (kind, *map(id, lists))
    if key not in owner.found:
        owner.found[key] = lists, make()  # the lists, so that no others get their ids
    result: T = owner.found[key][1]
    return result


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph, and not to the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
