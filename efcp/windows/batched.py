"""Windows of several parameters, where small ones are handled together, and large ones in parts.

A small matrix takes longer to start on than to compute with. So

    low rank   matrices of a shape are stacked: p of them are (p, R, C), their factors (p, m, r, R) and (p, m, r, C)
    dense      rows of any lengths are laid side by side: (m, n₁ + n₂ + …)

In both cases the numbers of one parameter follow those of another, in what is called a buffer here: (N,). A batch has
at most BATCH numbers, so what is large is alone. It goes through the methods of `SingleWindow`, part by part, so that
no temporary is as large as the parameter. These are the definition of all results: those of batches differ from it in
the order of sums.
"""

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from efcp.gram import is_on_cpu
from efcp.kernels import LowBit, Momenta, Update, accumulation_dtype, add_lowbit_, lowbit
from efcp.windows.base import Separate, SingleWindow, floats

BATCH = 1 << 18  # numbers of parameters, or of their windows, in a batch
CPU_PART, PART = 1 << 18, 1 << 24  # elements in a part; on a CPU they should stay in its cache
ALIGNED = 128  # elements; parts begin at multiples of it, so that no scale of numbers in few bits is in two of them


class BatchableWindow(SingleWindow):
    """A window that can do with several others of its kind what `SingleWindow` does with one.

    In the class methods below `windows` are of one kind, and a buffer holds n numbers of the first, then of the next.
    """

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """Windows of an equal kind can be in one batch."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """n."""

    @property
    @abstractmethod
    def row_numel(self) -> int:
        """How many numbers are kept of a row."""

    def parts(self) -> Iterator[tuple[slice, "BatchableWindow"]]:
        """Windows of consecutive elements of the parameter, each with these: about `part_numel` of them, or all."""
        yield slice(0, self.numel), self

    @classmethod
    @abstractmethod
    def push_all(cls, windows: Sequence[Any], grads: Sequence[Tensor], slot: Tensor, finite: Tensor) -> None:
        """`push` for each window."""

    @classmethod
    @abstractmethod
    def dots_all(cls, windows: Sequence[Any], slot: Tensor, vectors: Tensor | None) -> Tensor:
        """The sum of `dots` over the windows, (1, m); with vectors, a buffer of float64, also of `products`, (2, m)."""

    @classmethod
    @abstractmethod
    def add_rows_(cls, windows: Sequence[Any], total: Tensor, weights: Tensor) -> None:
        """total ← total + Σᵢ weightsᵢ · Gᵢ, with the total a buffer of the weights' dtype."""


class Plan(NamedTuple):
    """Which parameters, by number, are handled together, and which alone."""

    batches: list[list[int]]
    alone: list[int]

    def of(self, present: Sequence[object]) -> "Plan":
        """The same for those parameters for which something is present, not None."""
        if all(x is not None for x in present):
            return self
        batches = [[n for n in batch if present[n] is not None] for batch in self.batches]
        return Plan([batch for batch in batches if batch], [n for n in self.alone if present[n] is not None])


@dataclass(frozen=True)
class Batched(Separate):
    """Windows of several parameters on one device, of one dtype and with the same options, in batches."""

    windows: list[BatchableWindow]  # type: ignore[assignment]

    def push(self, grads: Sequence[Tensor | None], slot: Tensor, finite: Tensor) -> None:
        batches, alone = self._by_numel.of(grads)
        for batch in batches:
            windows = self._chosen(batch)
            windows[0].push_all(windows, [g for n in batch if (g := grads[n]) is not None], slot, finite)
        alone = alone + [n for n, grad in enumerate(grads) if grad is None]
        Separate(self._chosen(alone)).push([grads[n] for n in alone], slot, finite)

    def dots(self, slot: Tensor, momenta: Momenta = ()) -> Tensor:
        batches, alone = self._by_rows
        total = torch.zeros(1 + bool(momenta), len(self), dtype=torch.float64, device=slot.device)
        for batch in batches:
            windows = self._chosen(batch)
            own = [momenta[n] for n in batch if momenta]
            vectors = buffer_of(own, numels_of(windows), torch.float64) if own else None
            total += windows[0].dots_all(windows, slot, vectors)
        for n in alone:
            total[0] += self.windows[n].dots(slot)
            for some, part in self.windows[n].parts() if momenta else ():
                total[1] += part.products(floats(view(momenta[n], some)))
        return total if momenta else total[0]

    def apply_(self, targets: Sequence[Tensor | None], momenta: Momenta, update: Update) -> None:
        everyone = self._by_rows if update.square_weights is None else Plan([], list(range(len(targets))))
        batches, alone = everyone.of(targets)
        for batch in batches:
            chosen = [target for n in batch if (target := targets[n]) is not None]
            _apply_(self._chosen(batch), chosen, [momenta[n] for n in batch if momenta], update)
        for n in alone:
            if (target := targets[n]) is not None:
                for some, part in self.windows[n].parts():
                    own = [view(momenta[n], some)] if momenta else []
                    Separate([part]).apply_([target[some]], own, update)

    def _chosen(self, numbers: Sequence[int]) -> list[Any]:
        return [self.windows[n] for n in numbers]

    @cached_property
    def _by_numel(self) -> Plan:
        return _plan([w.kind for w in self.windows], numels_of(self.windows))

    @cached_property
    def _by_rows(self) -> Plan:
        return _plan([w.kind for w in self.windows], self._costs)

    @cached_property
    def by_shape(self) -> Plan:
        """Windows of one kind and size together."""
        return _plan([(w.kind, w.numel) for w in self.windows], self._costs)

    @property
    def _costs(self) -> list[int]:
        return [max(w.numel, w.row_numel * len(w)) for w in self.windows]


def _plan(kinds: Sequence[Hashable], costs: Sequence[int]) -> Plan:
    """Those of a kind in batches, in order. Only the size decides what is alone, so that results depend on no others.

    Args:
        costs: of how many numbers of a batch each takes the place.
    """
    batches: dict[Hashable, list[list[int]]] = {}
    space: dict[Hashable, int] = {}
    alone: list[int] = []
    for number, (kind, cost) in enumerate(zip(kinds, costs, strict=True)):
        if cost > BATCH:
            alone.append(number)
            continue
        if cost > space.get(kind, -1):
            batches.setdefault(kind, []).append([])
            space[kind] = BATCH
        batches[kind][-1].append(number)
        space[kind] -= cost
    return Plan([batch for of_kind in batches.values() for batch in of_kind], alone)


def part_numel(device: torch.device) -> int:
    """About how many elements of a large parameter are worked on at a time."""
    return CPU_PART if device.type == "cpu" else PART


def view(numbers: Tensor | LowBit, some: slice) -> Tensor | LowBit:
    """A view of some elements, which begin at a multiple of ALIGNED."""
    return numbers[some] if isinstance(numbers, Tensor) else lowbit.view(numbers, some)


def numels_of(windows: Sequence[BatchableWindow]) -> list[int]:
    return [window.numel for window in windows]


def buffer_of(numbers: Momenta, numels: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Vectors of n numbers each, one behind the other: a new tensor, (N,)."""
    floating = [x for x in numbers if isinstance(x, Tensor)]
    if floating:
        return torch.cat(floating).to(dtype)
    codes = [x for x in numbers if not isinstance(x, Tensor)]
    buffer = torch.zeros(sum(numels), dtype=dtype, device=codes[0].codes.device)
    add_numbers_(buffer, codes, numels)
    return buffer


def add_numbers_(buffer: Tensor, numbers: Sequence[LowBit], numels: Sequence[int]) -> None:
    """Adds vectors of n numbers each in few bits to those of a buffer."""
    block = lowbit.BLOCK[numbers[0].codes.dtype]
    if any(numel % block for numel in numels[:-1]):
        add_lowbit_(buffer.split(list(numels)), numbers)
    else:  # they are one vector
        joined = LowBit(torch.cat([x.codes for x in numbers]), torch.cat([x.scales for x in numbers]))
        add_lowbit_([buffer], [joined])


def _apply_(windows: Sequence[Any], targets: Sequence[Tensor], momenta: Momenta, update: Update) -> None:
    numels = numels_of(windows)
    written = [x for x in momenta if isinstance(x, Tensor)] if update.writes_momenta else []
    dtype = accumulation_dtype((written or targets)[0].dtype)
    if update.momentum_factor is None:
        total = buffer_of(targets, numels, dtype).mul_(update.target_factor)
        windows[0].add_rows_(windows, total, (update.update_factor * update.weights).to(dtype))
        torch._foreach_copy_(list(targets), total.split(numels))
        return
    total = buffer_of(momenta, numels, dtype).mul_(update.momentum_factor)
    windows[0].add_rows_(windows, total, update.weights.to(dtype))
    if written:
        torch._foreach_copy_(written, total.split(numels))
        total = total.to(written[0].dtype)  # as they are stored
    step = total.to(accumulation_dtype(targets[0].dtype)).mul_(update.update_factor)
    torch._foreach_mul_(list(targets), update.target_factor)
    torch._foreach_add_(list(targets), step.split(numels))


def replace_rows(tensors: Sequence[Tensor], slot: Tensor, rows: Sequence[Tensor]) -> None:
    """Writes row `slot` of each tensor (m, …): of each a row (…), of any dtype."""
    if is_on_cpu(slot):
        number = int(slot)
        torch._foreach_copy_([tensor[number] for tensor in tensors], list(rows))
        return
    for tensor, row in zip(tensors, rows, strict=True):
        tensor.index_copy_(0, slot, row.to(tensor.dtype).unsqueeze(0))
