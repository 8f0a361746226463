"""Steps over parameters that are divided in all ways, beside those of one process with the same blocks."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import efcp
from efcp import shards
from efcp.windows.dense import DenseWindow

SHAPES = [(8, 16), (5, 7), (3,), (1,), (2, 12, 3), (33, 8), ()]
STEPS, NAN, LACKS = 8, 4, 6  # the step with a NaN, and that without the gradient of one parameter
SPARSE = {"density": 0.3, "block_size": 8, "value_dtype": torch.float32}


class MomentumMFAC(efcp.SparseMFAC):
    """Along a dense momentum, of a given size."""

    def __init__(self, params, **options):
        super().__init__(params, direction="momentum", momentum=0.9, update_rms=0.2, relative_damping=True, **options)


class AverageMFAC(efcp.SparseMFAC):
    def __init__(self, params, **options):
        super().__init__(params, direction="average", momentum=0.5, **options)


CLASSES = {
    "SparseMFAC": (efcp.SparseMFAC, SPARSE | {"damping": 0.1, "momentum": 0.5}),
    "SparseMFAC8": (efcp.SparseMFAC, SPARSE | {"damping": 0.1, "error_dtype": torch.int8}),
    "MomentumMFAC": (MomentumMFAC, SPARSE | {"damping": 0.1}),
    "AverageMFAC": (AverageMFAC, SPARSE | {"damping": 0.1}),
    "DenseMFAC": (efcp.DenseMFAC, {"damping": 0.1}),
    "SparseGGT": (efcp.SparseGGT, SPARSE | {"eps": 0.1}),
    "DenseGGT": (efcp.DenseGGT, {"eps": 0.1, "momentum": 0.5}),
    "LowRankMFAC": (efcp.LowRankMFAC, {"rank": 1, "damping": 0.1, "value_dtype": torch.float32}),
    "LowRankGGT": (efcp.LowRankGGT, {"rank": 1, "eps": 0.1, "value_dtype": torch.float32}),
    "MicroAdam": (efcp.MicroAdam, SPARSE | {"error_dtype": torch.float64}),
    "MFACW": (efcp.MFACW, {"rank": 1, "error_dtype": torch.float32, "momentum_dtype": torch.float32}),
    "KroneckerW": (efcp.KroneckerW, {"rank": 1, "error_dtype": torch.float32, "momentum_dtype": torch.float32}),
}


@dataclass(frozen=True)
class Kept(efcp.Compressor):
    """A user's, which knows nothing of shards: keeps whole gradients. Its option cannot be hashed."""

    names: tuple[str, ...] = ("kept",)

    def allocate(self, param, window_size):
        return {name: param.new_zeros(window_size, param.numel()) for name in self.names}

    def row_names(self, param):
        return tuple(self.names)

    def bind(self, states, params):
        return efcp.Separate([DenseWindow(state["kept"]) for state in states])


class KeptMFAC(efcp.EFCP):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr, Kept(), efcp.MFAC(0.1), **options)


CLASSES["KeptMFAC"] = (KeptMFAC, {})
LOW_RANK = ("LowRankMFAC", "LowRankGGT", "MFACW", "KroneckerW")  # each shard by itself


def make(name, params, **more):
    cls, options = CLASSES[name]
    return cls(params, lr=0.02, window=5, **options, **more)


def values(number, shape, step):
    """The values of a parameter at first, or its gradient in a step: the same on all ranks."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sharded(tensor, mesh, placements):
    return distribute_tensor(tensor.clone(), mesh, placements, src_data_rank=None)


@cache
def line(world):
    return init_device_mesh("cpu", (world,))


@cache
def grid(world):
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "other"))


@cache
def data(world):
    return grid(world)["data"]


def shard(number, shape, world):
    return line(world), [Shard(0) if shape else Replicate()]


def replicate(number, shape, world):
    return line(world), [Replicate()]


def mixed(number, shape, world):
    return None if number % 2 else shard(number, shape, world)


def hsdp(number, shape, world):
    return grid(world), [Replicate(), Shard(0) if shape else Replicate()]


def meshes(number, shape, world):
    """Columns of some, rows of others, on meshes of one and two dimensions; blocks are as without them."""
    if len(shape) < 2:
        return data(world), [Shard(0) if shape else Replicate()]
    columns = {(8, 16): [Shard(0), Shard(1)], (2, 12, 3): [Replicate(), Shard(1)]}
    return grid(world), columns.get(shape, [Shard(0), Replicate()])


WAYS = {function.__name__: function for function in (shard, replicate, mixed, hsdp, meshes)}
"""The mesh and placements of a parameter, or None for a plain one."""


def parameters(way, world):
    params = []
    for number, shape in enumerate(SHAPES):
        where = WAYS[way](number, shape, world)
        value = values(number, shape, 0)
        params.append(nn.Parameter(value.clone() if where is None else sharded(value, *where)))
    return params


def train(name, params, world, way, **more):
    """Some steps, of plain parameters where way is None; returns the optimizer."""
    optimizer = make(name, params, **more)
    for step in range(1, STEPS + 1):
        for number, (p, shape) in enumerate(zip(params, SHAPES, strict=True)):
            grad = values(number, shape, step)
            if step == NAN and number == 0:
                grad.view(-1)[-1] = float("nan")  # which the last rank has, where it is sharded
            where = None if way is None else WAYS[way](number, shape, world)
            p.grad = grad if where is None else sharded(grad, *where)
            if step == LACKS and number == 5:
                p.grad = None
        optimizer.step()
    return optimizer


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_difference(params, others):
    pairs = zip(params, others, strict=True)
    return max(float((full(p.detach()) - q.detach()).abs().max()) for p, q in pairs if p.numel())


class Recorder:
    """The bytes of each all-reduce that a step does."""

    def __enter__(self):
        self.sizes, self.original = [], distributed.all_reduce

        def all_reduce(tensor, *arguments, **more):
            self.sizes.append(tensor.numel() * tensor.element_size())
            return self.original(tensor, *arguments, **more)

        shards.distributed.all_reduce = all_reduce
        return self

    def __exit__(self, *_):
        shards.distributed.all_reduce = self.original


def all_ways(rank, world, folder):
    """Of each class and way: how far from a single process, the Gram matrix, exchanged bytes, diagnostics."""
    results = {}
    for name in CLASSES:
        aligned = {"aligned": True} if "density" in CLASSES[name][1] else {}
        plain = [nn.Parameter(values(number, shape, 0)) for number, shape in enumerate(SHAPES)]
        alone = train(name, plain, world, None, **aligned)
        for way in WAYS:
            params = parameters(way, world)
            optimizer = train(name, params, world, way, **(aligned if way == "mixed" else {}))
            for number, (p, shape) in enumerate(zip(params, SHAPES, strict=True)):
                where = WAYS[way](number, shape, world)
                p.grad = (
                    values(number, shape, STEPS) if where is None else sharded(values(number, shape, STEPS), *where)
                )
            local = "Kronecker" in name
            with_quantiles = {"quantiles": not local}
            result = {
                "difference": largest_difference(params, plain),
                "gram": optimizer.shared["gram"],
                "weights": optimizer.shared["weights"],
                "skipped": optimizer.skipped_steps,
                "diagnostics": optimizer.diagnostics(**with_quantiles),
                "alone": {},
            }
            if way == "replicate" or name not in LOW_RANK:
                for number, (p, shape) in enumerate(zip(plain, SHAPES, strict=True)):
                    p.grad = values(number, shape, STEPS)
                result["alone"] = alone.diagnostics(**with_quantiles)
            with Recorder() as recorder:
                optimizer.step()
            result["bytes"] = recorder.sizes
            results[name, way] = result
    return results


def no_elements(rank, world, folder):
    """Of each class, with parameters of which most ranks have nothing: the difference to a single process."""
    results = {}
    shapes = [(1, 16), (1,)]
    for name in CLASSES:
        aligned = {"aligned": True} if "density" in CLASSES[name][1] else {}
        params = [nn.Parameter(sharded(values(n, shape, 0), line(world), [Shard(0)])) for n, shape in enumerate(shapes)]
        plain = [nn.Parameter(values(n, shape, 0)) for n, shape in enumerate(shapes)]
        optimizer, other = make(name, params), make(name, plain, **aligned)
        for step in range(1, STEPS + 1):
            for n, (p, q) in enumerate(zip(params, plain, strict=True)):
                q.grad = values(n, q.shape, step)
                p.grad = sharded(q.grad, line(world), [Shard(0)])
            optimizer.step()
            other.step()
        optimizer.load_state_dict(optimizer.state_dict())
        results[name] = largest_difference(params, plain), optimizer.diagnostics()["error_norm"]
    return results


def shards_as_parameters(rank, world, folder):
    """Low rank treats each shard as a matrix of its own: the difference to a single process that has these."""
    results = {}
    mesh = init_device_mesh("cpu", (world,))
    shapes = [(8, 16), (33, 8), (2 * world, 12, 3)]
    for name in LOW_RANK:
        whole = [nn.Parameter(sharded(values(n, shape, 0), mesh, [Shard(0)])) for n, shape in enumerate(shapes)]
        parts = [[nn.Parameter(c.clone()) for c in values(n, shape, 0).chunk(world)] for n, shape in enumerate(shapes)]
        optimizer, other = make(name, whole), make(name, [p for own in parts for p in own])
        for step in range(1, STEPS + 1):
            for n, (p, own) in enumerate(zip(whole, parts, strict=True)):
                grad = values(n, p.shape, step)
                p.grad = sharded(grad, mesh, [Shard(0)])
                for q, g in zip(own, grad.chunk(world), strict=True):
                    q.grad = g.clone()
            optimizer.step()
            other.step()
        results[name] = max(
            float((p.detach().full_tensor() - torch.cat([q.detach() for q in own])).abs().max())
            for p, own in zip(whole, parts, strict=True)
        )
    return results
