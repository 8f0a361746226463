"""Parameters that are divided over processes: what of one a rank has, how its state is divided, and sums over ranks.

A rank steps what it has of a parameter, a part, as if that were a parameter of its own. Only three things concern all
ranks: whether the gradients are finite, the inner products of rows, and the length of a momentum. The state of a
parameter is divided as the parameter is, in DTensors, so that `torch.distributed.checkpoint` can save and load it:

    error, momentum, average, moments of AdamW   the parameter's shape, cut as it is
    rows of a dense window                       (m, *shape), cut as the parameter is, one dimension later
    values, indices, codes and scales            (R, blocks of a row, …), cut as the parameter is
    all others                                   (parts, numbers): of each part by itself, as long as the longest

of a parameter (R, …) that is cut along its first dimension. Each of its R rows has blocks of its own, so these are the
same whatever the number of ranks. Where a later dimension s is cut, the leading dimensions are those of the shape up to
s, instead of R alone. Counters, and what all parameters share, are plain tensors, equal on all ranks.

`Layout(mesh=None)` stands for a whole parameter whose state has these shapes: see `TopK.aligned`.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn import Parameter

ELEMENTWISE = ("error", "momentum", "average", "exp_avg", "exp_avg_sq")
BUCKET = 32 << 20  # bytes of parameters that are gathered together


def is_hashable(part: object) -> bool:
    """Whether a compressor or preconditioner can be a key: a user's may hold lists."""
    try:
        hash(part)
    except TypeError:
        return False
    return True


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, be it sharded or replicated."""
    kind = type(tensor)
    if kind is Parameter or kind is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # whoever has a DTensor has imported it
    return module is not None and issubclass(kind, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank; the tensor itself where it is not a DTensor."""
    if not is_sharded(tensor):
        return tensor
    here = tensor._local_tensor  # type: ignore[attr-defined]
    return here.wait() if hasattr(here, "wait") else here


def cut_of(placement: Any) -> int | None:
    """The dimension that a placement cuts; None for one that cuts none."""
    return placement.dim if hasattr(placement, "dim") else None


class Share(NamedTuple):
    """The mesh over which the inner products of a part are summed, and on how many of its ranks the part is."""

    mesh: Any
    replicas: int


@dataclass(frozen=True)
class Layout:
    """How a parameter is divided.

    Args:
        shape: of the whole.
        mesh: the ranks, a DeviceMesh; None for one process.
        placements: of each dimension of the mesh, as DTensor has them.
    """

    shape: tuple[int, ...]
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @cached_property
    def cuts(self) -> list[tuple[int, int]]:
        """(dimension of the mesh, dimension of the parameter) of each cut."""
        dims = ((n, cut_of(placement)) for n, placement in enumerate(self.placements))
        return [(n, dim) for n, dim in dims if dim is not None]

    @cached_property
    def parts(self) -> int:
        """How many parts there are."""
        return math.prod(self.mesh.size(n) for n, _ in self.cuts)

    @cached_property
    def share(self) -> Share:
        return Share(self.mesh, self.mesh.size() // self.parts if self.mesh is not None else 1)

    @cached_property
    def last(self) -> int:
        """The last dimension that is cut."""
        return max((dim for _, dim in self.cuts), default=0)

    def sizes(self, dim: int) -> list[int]:
        """The sizes that a dimension has in the parts, none of them zero."""
        sizes = {self.shape[dim]}
        for mesh_dim, cut in self.cuts:
            if cut == dim:
                count = self.mesh.size(mesh_dim)
                chunks = {(size, -(-size // count)) for size in sizes}
                sizes = {part for size, chunk in chunks for part in (chunk, size % chunk if chunk else 0)} - {0}
        return sorted(sizes - {0})

    @cached_property
    def largest(self) -> tuple[int, ...]:
        """The shape of the largest part."""
        return tuple(max(self.sizes(dim), default=0) for dim in range(len(self.shape)))

    @cached_property
    def row(self) -> int:
        """The elements of an entry of the last dimension that is cut."""
        return math.prod(self.shape[self.last + 1 :])

    @cached_property
    def entries(self) -> int:
        """How many such entries a block may have: one; or, of a later dimension than the first, what divides all."""
        return math.gcd(*self.sizes(self.last)) if self.last else 1

    def block_size(self, wanted: int, largest: int) -> int:
        """The elements of a block: in ratio nearest to those wanted, at most `largest`, and none across parts."""
        if self.row * self.entries <= wanted:
            return max(1, self.row * self.entries)
        sizes = [*_divisors(self.row), *(self.row * n for n in _divisors(self.entries))]
        return min((s for s in sizes if 0 < s <= largest), key=lambda size: max(size / wanted, wanted / size))

    def lead(self, unit: int, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The leading dimensions of a tensor that has an entry for `unit` elements; None where these are in two parts.

        Args:
            shape: of the whole, or of a part.
        """
        if not self.shape:
            return None
        last = self.last
        if self.row and self.row % unit == 0:
            return (*shape[: last + 1], self.row // unit)
        entries = unit // self.row if self.row else 0
        if last and entries and unit % self.row == 0 and self.entries % entries == 0:
            return (*shape[:last], shape[last] // entries)
        return None

    def shifted(self, by: int) -> tuple[Any, ...]:
        """The placements of a tensor whose dimension d + by is cut as dimension d of the parameter."""
        return tuple(_shifted(placement, by) for placement in self.placements)

    def stacked(self) -> tuple[Any, ...]:
        """The placements of a tensor that has an entry in its first dimension for each part."""
        if self.mesh is None:
            return ()
        from torch.distributed.tensor import Replicate, Shard

        cut = {n for n, _ in self.cuts}
        return tuple(Shard(0) if n in cut else Replicate() for n in range(self.mesh.ndim))

    def wrapped(self, here: Tensor, form: "Form") -> Tensor:
        """The tensor of a state of which this rank has `here`, of any shape: a DTensor, or itself without a mesh."""
        count = math.prod(form.here)
        if here.numel() < count:  # shorter than that of the largest part
            here = torch.cat([here.reshape(-1), here.new_zeros(count - here.numel())])
        here = here.reshape(form.here)
        if self.mesh is None:
            return here
        from torch.distributed.tensor import DTensor

        shape = torch.Size(form.whole)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(here, self.mesh, form.placements, run_check=False, shape=shape, stride=stride)


class Form(NamedTuple):
    """The shapes of a tensor in the state of a parameter."""

    flat: tuple[int, ...]  # as windows take it, of a part
    here: tuple[int, ...]  # as it is in the state, on this rank
    whole: tuple[int, ...]  # of all ranks
    placements: tuple[Any, ...]


def form_of(
    name: str, flat: Sequence[int], longest: Sequence[int], unit: int | None, layout: Layout, part: Any
) -> Form:
    """How a tensor of a parameter's state is divided.

    Args:
        flat: its shape in the state of a part.
        longest: its shape in the state of the largest part.
        unit: of how many elements of the parameter its leading entries are; None for all of them.
        part: the shape of the part.
    """
    flat, part = tuple(flat), tuple(part)
    if name in ELEMENTWISE and math.prod(longest) == math.prod(layout.largest):
        return Form(flat, part, layout.shape, layout.placements)
    if name == "rows":
        return Form(flat, (flat[0], *part), (flat[0], *layout.shape), layout.shifted(1))
    lead = None if unit is None else layout.lead(unit, layout.shape)
    if unit is not None and lead is not None:
        each = longest[0] * unit // max(1, math.prod(layout.largest))  # entries of a unit
        rest = (*((each,) if each > 1 else ()), *longest[1:])
        return Form(flat, (*(layout.lead(unit, part) or ()), *rest), (*lead, *rest), layout.placements)
    count = math.prod(longest)
    return Form(flat, (1, count), (layout.parts, count), layout.stacked())


def flattened(state: dict[str, Any], forms: dict[str, Form]) -> dict[str, Any]:
    """The state of what of a parameter is on this rank, as windows take it: views. What has no form stays as it is."""
    return {name: _flat(value, forms[name]) if name in forms else value for name, value in state.items()}


def with_local(like: Any, here: Tensor) -> Tensor:
    """A DTensor that is divided as another is, of which this rank has `here`."""
    from torch.distributed.tensor import DTensor

    own = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(here, like.device_mesh, like.placements, run_check=False, **own)


def fits(value: Any, form: Form, layout: Layout) -> bool:
    """Whether a tensor of a state is divided as it should be."""
    if layout.mesh is None:
        return isinstance(value, Tensor) and not is_sharded(value) and tuple(value.shape) == form.whole
    same = is_sharded(value) and tuple(value.shape) == form.whole and value.device_mesh == layout.mesh
    return same and tuple(value.placements) == form.placements and tuple(local(value).shape) == form.here


def _flat(value: Tensor, form: Form) -> Tensor:
    numbers = local(value).view(-1)
    count = math.prod(form.flat)
    return (numbers if numbers.numel() == count else numbers[:count]).view(form.flat)


@lru_cache(maxsize=4096)
def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _shifted(placement: Any, by: int) -> Any:
    if cut_of(placement) is None:
        return placement
    if hasattr(placement, "split_factor"):
        return type(placement)(placement.dim + by, split_factor=placement.split_factor)
    return type(placement)(placement.dim + by)


# ---- parts


def layout_of(param: Tensor, mesh: Any, aligned: bool) -> Layout | None:
    """How a parameter is divided; None for one that is whole, with state as it always was.

    Args:
        mesh: over whose ranks the state of plain parameters is divided; None for none.
        aligned: whether plain parameters have the blocks of sharded ones.
    """
    if is_sharded(param):
        return _layout(tuple(param.shape), param.device_mesh, tuple(param.placements))  # type: ignore[attr-defined]
    if mesh is not None:
        from torch.distributed.tensor import Replicate, Shard

        return _layout(tuple(param.shape), mesh, (Shard(0) if param.dim() else Replicate(),))
    return _layout(tuple(param.shape)) if aligned else None


_layout = lru_cache(maxsize=4096)(Layout)


def part_of(param: Tensor, layout: Layout) -> Tensor:
    """This rank's part of a parameter, as a plain tensor with its gradient.

    Where a gradient is a sum that is yet to be taken, or divided in another way, it is exchanged first.
    """
    part = own_part(param.detach(), layout)
    grad = param.grad
    if grad is not None:
        if is_sharded(grad) and tuple(grad.placements) != layout.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=layout.placements)  # type: ignore[attr-defined]
        part.grad = own_part(grad.detach(), layout)
    return part


def own_part(tensor: Tensor, layout: Layout) -> Tensor:
    """This rank's part of a parameter, or of a tensor that is divided as it is: a view."""
    if is_sharded(tensor):
        return local(tensor).detach()
    if layout.mesh is None or not layout.shape:
        return tensor
    chunk = -(-layout.shape[0] // layout.mesh.size())
    return tensor[chunk * layout.mesh.get_local_rank() :][:chunk]


def gather_(params: Sequence[Tensor], mesh: Any) -> None:
    """Gives every rank of a mesh the parts of parameters that the others have updated, in buckets."""
    buckets: dict[Any, list[list[Tensor]]] = {}
    size: dict[Any, int] = {}
    for p in params:
        if p.dim() and p.numel():
            key, own = (p.dtype, p.device), p.numel() * p.element_size()
            if key not in size or size[key] + own > BUCKET:
                buckets.setdefault(key, []).append([])
                size[key] = 0
            buckets[key][-1].append(p)
            size[key] += own
    for bucket in (bucket for of_key in buckets.values() for bucket in of_key):
        layouts = [_layout(tuple(p.shape), mesh) for p in bucket]
        sizes = [-(-len(p) // mesh.size()) * p[0].numel() for p in bucket]
        mine = torch.zeros(sum(sizes), dtype=bucket[0].dtype, device=bucket[0].device)
        for p, layout, here in zip(bucket, layouts, mine.split(sizes), strict=True):
            part = own_part(p.detach(), layout).reshape(-1)
            here[: len(part)] = part
        everyone = torch.empty(mesh.size() * len(mine), dtype=mine.dtype, device=mine.device)
        # The name of PyTorch 2.13 and later
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(everyone, mine, group=mesh.get_group())
        for p, there in zip(bucket, everyone.view(mesh.size(), -1).split(sizes, dim=1), strict=True):
            p.copy_(there.reshape(-1)[: p.numel()].view(p.shape))


# ---- sums


class Ranks:
    """The ranks over which parameters are divided: the same meshes, in the same order, on all of them.

    A part that is on r ranks counts 1/r on each. So all ranks of a mesh, replicas too, get the same bits. Plain
    parameters beside sharded ones count as on all ranks of the first mesh.
    """

    def __init__(self, layouts: Iterable[Layout | None]) -> None:
        self.meshes: list[Any] = []
        for layout in layouts:
            if layout is not None and layout.mesh is not None and layout.mesh not in self.meshes:
                self.meshes.append(layout.mesh)

    def all(self, flags: Iterable[Tensor], device: torch.device) -> Tensor:
        """Whether all flags, () bool, are set on every rank: () bool."""
        here = list(flags)
        if not self.meshes:
            return reduce(torch.logical_and, here)
        both = reduce(torch.logical_and, here, torch.ones((), dtype=torch.bool, device=device))
        number = both.to(torch.int32)
        for mesh in self.meshes:
            number = _reduced(number, mesh, distributed.ReduceOp.MIN)
        return number.bool()

    def sum(self, parts: Iterable[tuple[Share, Tensor]], like: Tensor) -> Tensor:
        """Sums over parts and ranks.

        Args:
            parts: with what their share is.
            like: of the shape, dtype and device of each; this rank may have none.
        """
        here = list(parts)
        if not self.meshes:
            return reduce(torch.add, (part for _, part in here)) if here else torch.zeros_like(like)
        sums = [torch.zeros_like(like) for _ in self.meshes]
        for share, part in here:
            plain = share.mesh is None
            number, replicas = (0, self.meshes[0].size()) if plain else (self.meshes.index(share.mesh), share.replicas)
            sums[number] += part / replicas
        pairs = zip(sums, self.meshes, strict=True)
        return reduce(torch.add, (_reduced(total, mesh, distributed.ReduceOp.SUM) for total, mesh in pairs))

    def agree(self, error: Exception | None) -> None:
        """Raises an error on every rank where there is one on any: its own, or ValueError where it is another's."""
        flag = torch.tensor(error is None, device="cpu")
        everywhere = bool(self.all([flag], torch.device("cpu")))
        if error is not None:
            raise error
        if not everywhere:
            raise ValueError("state_dict: another rank refuses it, and says why; nothing has been changed on any")


def _reduced(tensor: Tensor, mesh: Any, op: Any) -> Tensor:
    there = tensor.to(mesh.device_type)  # that of the parameters, unless these are offloaded
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1:
            distributed.all_reduce(there, op, group=mesh.get_group(dim))
    return there.to(tensor.device)


def check_mesh(mesh: Any) -> None:
    """Raises TypeError or ValueError unless a mesh is None or a DeviceMesh of one dimension."""
    if mesh is None:
        return
    if not hasattr(mesh, "get_group"):
        raise TypeError(f"mesh must be a DeviceMesh or None, got {mesh!r}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh!r}; take one of a larger mesh by its name")


def check_layout(name: Callable[[], str], layout: Layout) -> None:
    """Raises ValueError for a parameter that is a sum yet to be taken, or divided over ranks without this one."""
    for placement in layout.placements:
        if placement.is_partial():
            raise ValueError(f"params must not be sums that are yet to be taken, got {placement} for {name()}")
    if layout.mesh is not None and layout.mesh.get_coordinate() is None:
        raise ValueError(f"params must be divided over ranks among which this one is, got {layout.mesh} for {name()}")
