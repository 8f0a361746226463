"""How many bytes an optimizer's state takes: measured, or estimated before anything is allocated."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from efcp.optimizer import EFCP
from efcp.ready_made import SparseMFAC
from efcp.shards import is_sharded, local, with_local


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of an optimizer's state. `print` shows it as a table.

    Attributes:
        tensors: bytes by the name of a tensor in `optimizer.state[p]`, such as "values" or "error", summed over all
            parameters. A list of tensors counts as one. What a wrapper keeps in `optimizer.state[name]` counts under
            that name. "tables" are the tables of addresses that launches on a GPU read.
        numel: the number of elements of all parameters; of sharded ones, of what this rank has.
    """

    tensors: dict[str, int]
    numel: int

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.tensors.values())

    @property
    def per_parameter(self) -> float:
        """Bytes per parameter element. Adam in float32 takes 8."""
        return self.total / max(1, self.numel)

    def __str__(self) -> str:
        rows = [*sorted(self.tensors.items(), key=lambda item: -item[1]), ("total", self.total)]
        lines = [f"{'state':<16}{'bytes':>16}{'per parameter':>16}"]
        lines += [f"{name:<16}{size:>16,}{size / max(1, self.numel):>16.3f}" for name, size in rows]
        return "\n".join(lines)


def memory_report(optimizer: Optimizer) -> MemoryReport:
    """Measures the state of an optimizer.

    >>> print(memory_report(optimizer))

    Args:
        optimizer: any `torch.optim.Optimizer`, not only ours. State that does not exist yet is not counted: take a step
            first, or ask `estimate_memory`.

    Returns:
        The bytes of every tensor in `optimizer.state`, and of `tables` on GPUs. Of DTensors those of this rank count.
    """
    tensors: dict[str, int] = {}
    for owner, state in optimizer.state.items():
        for name, value in _tensors(state):
            name = name if isinstance(owner, Tensor) else str(owner)
            tensors[name] = tensors.get(name, 0) + value.numel() * value.element_size()
    if isinstance(optimizer, EFCP) and optimizer._tables.bytes:
        tensors["tables"] = optimizer._tables.bytes
    return MemoryReport(tensors, sum(local(p).numel() for group in optimizer.param_groups for p in group["params"]))


def estimate_memory(
    model_or_numel: nn.Module | int | Iterable[Any], optimizer: type[Any] = SparseMFAC, **options: Any
) -> MemoryReport:
    """Says how much memory an optimizer's state will take, before anything is allocated.

    It equals, to the byte, what `memory_report` says once every parameter has had a gradient, but for `tables` of a few
    hundred bytes a parameter tensor on a GPU.

    >>> estimate_memory(model, SparseMFAC, window=64, density=0.01).total
    >>> estimate_memory(25_557_032, window=1024, density=0.01).per_parameter  # ResNet-50 as one float32 vector

    Args:
        model_or_numel: one of three: a model, whose parameters that require gradients count; a number of float32
            elements; or what the optimizer takes for `params`, that is tensors, named tensors or param groups.
        optimizer: the optimizer's class: any of this package, or one derived from it.
        options: what else the optimizer's constructor takes, such as `window` and `density`.

    Returns:
        Bytes by the name of a tensor, their sum, and that sum per parameter.

    Raises:
        ValueError: for values that the optimizer does not allow.
        TypeError: for arguments that it does not have, and for parameters that are not real floating point.
    """
    if isinstance(model_or_numel, int):
        params: Iterable[Any] = [torch.empty(model_or_numel, device="meta")]
    elif isinstance(model_or_numel, nn.Module):
        params = [p for p in model_or_numel.parameters() if p.requires_grad]
    else:
        params = model_or_numel
    instance = optimizer([_on_meta(p) for p in params], **options)
    instance.allocate_state()
    return memory_report(instance)


def _on_meta(param: Any) -> Any:
    """A tensor, a named tensor or a param group, with its tensors on the meta device."""
    if is_sharded(param):
        return with_local(param.detach(), torch.empty_like(local(param), device="meta", requires_grad=False))
    if isinstance(param, Tensor):
        return torch.empty_like(param, device="meta", requires_grad=False)
    if isinstance(param, tuple):
        return param[0], _on_meta(param[1])
    params = param["params"]
    return {**param, "params": _on_meta(params) if isinstance(params, Tensor) else [_on_meta(p) for p in params]}


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        for tensor in value if isinstance(value, list) else [value]:  # L-BFGS keeps its history in lists
            if isinstance(tensor, Tensor):
                yield from ((name, part) for part in _parts(local(tensor)))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a wrapper keeps its numbers in, such as torchao's of 8-bit state; others are their own part."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))
