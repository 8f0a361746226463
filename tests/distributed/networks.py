"""A network that is sharded as users do it (FSDP2, HSDP, tensor parallel), beside one that is whole."""

from functools import cache

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import efcp

BATCH, SEQUENCE, WIDTH, HIDDEN = 4, 8, 8, 16


class Network(nn.Module):
    """Two linear layers behind a norm, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.unused = nn.Linear(WIDTH, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def network():
    """The same on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Network().double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, BATCH, SEQUENCE, WIDTH, generator=generator, dtype=torch.float64)


def mean_square(out, target):
    return (out - target).square().sum() / (BATCH * SEQUENCE * WIDTH)


@cache
def mesh_of(way, world):
    if way == "fsdp":
        return init_device_mesh("cpu", (world,))
    names = {"hsdp": ("replicate", "shard"), "fsdp and tensor parallel": ("data", "tensor")}
    if way in names:
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names[way])
    return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("unused", "tensor"))["tensor"]


def tensor_parallel(model, mesh):
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=True),
    }
    return parallelize_module(model, mesh, plan)


def divided(way, world):
    model, mesh = network(), mesh_of(way, world)
    if "tensor" in way:
        tensor_parallel(model, mesh["tensor"] if mesh.ndim == 2 else mesh)
    if way != "tensor parallel":
        own = mesh["data"] if "data" in (mesh.mesh_dim_names or ()) else mesh
        for layer in (model.up, model.down, model.unused):
            fully_shard(layer, mesh=own)
        fully_shard(model, mesh=own)
    return model


def backward(model, way, rank, world, step):
    """Gradients of the whole batch, however it is divided."""
    model.zero_grad()
    x, y = batch(step)
    if way is None:
        mean_square(model(x), y).backward()
        return
    mesh = mesh_of(way, world)
    parts, number = (1, 0) if way == "tensor parallel" else (world, rank)
    if way == "fsdp and tensor parallel":
        parts, number = mesh.size(0), mesh.get_local_rank("data")
    x, y = x.chunk(parts)[number], y.chunk(parts)[number]
    if "tensor" in way:
        tensor = mesh["tensor"] if mesh.ndim == 2 else mesh
        x, y = (t.chunk(tensor.size(), 1)[tensor.get_local_rank()] for t in (x, y))
        x = DTensor.from_local(x, tensor, [Shard(1)])
    (parts * mean_square(model(x), y)).backward()  # of which fully_shard takes the mean


def sparse(model, cls=efcp.SparseMFAC, **more):
    options = {"density": 0.3, "block_size": 8, "window": 4, "damping": 0.1, "value_dtype": torch.float32}
    return cls(model.parameters(), lr=0.05, **options | more)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def largest_difference(model, other):
    with torch.no_grad():
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        return max(float((full(p) - full(q)).abs().max()) for p, q in pairs)


WAYS = ("fsdp", "hsdp", "tensor parallel", "fsdp and tensor parallel")


def all_ways(rank, world, folder):
    """Of each way, and with clipping, the largest difference to a whole network after some steps."""
    results = {}
    for way in WAYS:
        for clip in (None, 0.05):
            model, whole = divided(way, world), network()
            optimizer, other = sparse(model), sparse(whole, aligned=True)
            partial = False
            for step in range(8):
                for own, steps, of in ((model, optimizer, way), (whole, other, None)):
                    backward(own, of, rank, world, step)
                    if clip is not None:
                        nn.utils.clip_grad_norm_(own.parameters(), clip)
                    grads = [p.grad for p in own.parameters() if isinstance(p.grad, DTensor)]
                    partial |= any(isinstance(x, Partial) for grad in grads for x in grad.placements)
                    steps.step()
            results[way, clip] = {
                "difference": largest_difference(model, whole),
                "gram": optimizer.shared["gram"],
                "partial": partial,
                "has_state": "values" in optimizer.state[model.unused.weight],
            }
    return results


def with_numba(rank, world, folder):
    model, whole = divided("fsdp", world), network()
    optimizer, other = sparse(model), sparse(whole, aligned=True)
    for step in range(6):
        backward(model, "fsdp", rank, world, step)
        backward(whole, None, rank, world, step)
        optimizer.step()
        other.step()
    return largest_difference(model, whole), efcp.kernels.backend_name(torch.device("cpu"))


def with_adamw(rank, world, folder):
    """Some parameters of a sharded network, or all, are stepped by AdamW: the difference to a whole one."""
    results = []
    for window in (True, False):
        models = divided("fsdp", world), network()
        optimizers = []
        for model in models:
            own = [p for name, p in model.named_parameters() if window and "weight" in name and "norm" not in name]
            others = [p for p in model.parameters() if all(p is not q for q in own)]
            groups = [{"params": own}] if own else []
            aligned = {"aligned": True} if model is models[1] else {}
            options = {"density": 0.3, "block_size": 8, "window": 4, "damping": 0.1, "value_dtype": torch.float32}
            optimizers.append(efcp.SparseMFAC([*groups, {"params": others, "adamw": True}], 0.05, **options, **aligned))
        for step in range(8):
            for model, optimizer, way in zip(models, optimizers, ("fsdp", None), strict=True):
                backward(model, way, rank, world, step)
                if step == 4:
                    grad = model.up.bias.grad
                    last = grad.to_local() if isinstance(grad, DTensor) else grad
                    if way is None or rank == world - 1:
                        last[-1] = float("inf")
                optimizer.step()
        optimizers[0].load_state_dict(optimizers[0].state_dict())
        divided_moments = isinstance(optimizers[0].state[models[0].up.bias]["exp_avg"], DTensor)
        results.append((largest_difference(*models), divided_moments))
    return results
