"""What goes wrong on one rank, and what is refused."""

import os
import time

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import efcp
from efcp import shards
from efcp.shards import with_local
from tests.distributed.checkpoints import CLASSES, make, options_of, parameters, same, tensors
from tests.distributed.networks import backward, divided, largest_difference, network, sparse
from tests.distributed.steps import Recorder


def message(function):
    """The error that a function raises, as text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def nan_on_one_rank(rank, world, folder):
    """A NaN in the last rank's part of a gradient: whether each rank has left all as it was, and has counted it."""
    model = divided("fsdp", world)
    optimizer = sparse(model)
    for step in range(3):
        backward(model, "fsdp", rank, world, step)
        optimizer.step()
    before, errors = parameters(model), {k: v for k, v in tensors(optimizer).items() if k[1] == "error"}
    backward(model, "fsdp", rank, world, 3)
    if rank == world - 1:
        model.up.weight.grad.to_local()[-1, -1] = float("nan")
    optimizer.step()
    after = tensors(optimizer)
    unchanged = all(torch.allclose(value, after[key], rtol=0, atol=1e-12) for key, value in errors.items())
    return all(map(torch.equal, before, parameters(model))), unchanged, optimizer.skipped_steps


def damaged_part(rank, world, folder):
    """A state whose part on one rank is damaged is refused on all, which stay as they were."""
    model = divided("fsdp", world)
    optimizer = sparse(model)
    backward(model, "fsdp", rank, world, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    damaged = {**saved, "state": {key: dict(value) for key, value in saved["state"].items()}}
    number = next(n for n, (name, _) in enumerate(model.named_parameters()) if name == "up.weight")
    if rank == 1:
        own = damaged["state"][number]["values"]
        local = own.to_local().clone()
        local[0, 0, 0] = float("nan")
        damaged["state"][number]["values"] = with_local(own, local)
    before = tensors(optimizer)
    refusal = message(lambda: optimizer.load_state_dict(damaged))
    unchanged = same(before, tensors(optimizer))
    optimizer.load_state_dict(saved)
    return refusal, unchanged


def wrong_states(rank, world, folder):
    """The errors for states that are whole where they should be divided, and the reverse."""
    model = divided("fsdp", world)
    optimizer = sparse(model)
    backward(model, "fsdp", rank, world, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    whole = {
        key: {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in own.items()}
        for key, own in saved["state"].items()
    }
    to_divided = message(lambda: optimizer.load_state_dict({**saved, "state": whole}))
    alone = sparse(network())
    to_other_blocks = message(lambda: alone.load_state_dict({**saved, "state": whole}))
    aligned = sparse(network(), aligned=True)
    aligned.load_state_dict({**saved, "state": whole})
    return to_divided, to_other_blocks


def swapped_parameters(rank, world, folder):
    """A parameter that is replaced in its param group after the construction, as Accelerate does."""
    mesh = init_device_mesh("cpu", (world,))
    plain = [nn.Parameter(torch.ones(8, 16, dtype=torch.float64)), nn.Parameter(torch.ones(5, dtype=torch.float64))]
    optimizer = efcp.SparseMFAC(plain, density=0.3, window=3, block_size=8)
    new = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
    optimizer.param_groups[0]["params"] = new
    for _ in range(4):
        for p in new:
            p.grad = distribute_tensor(torch.ones(p.shape, dtype=torch.float64), mesh, [Shard(0)])
        optimizer.step()
    return isinstance(optimizer.state[new[0]]["values"], DTensor), float(new[0].detach().full_tensor().max()) < 1


def refused(rank, world, folder):
    """The errors at construction and in a step."""
    mesh = init_device_mesh("cpu", (world,))
    part = torch.zeros(3, 4, dtype=torch.float64)
    even = DTensor.from_local(part, mesh, [Shard(0)])
    pair = DeviceMesh("cpu", [0, 1])
    outside = DTensor.from_local(part, pair, [Shard(0)], shape=torch.Size((6, 4)), stride=(4, 1))
    replaced = nn.Parameter(even.clone())
    optimizer = efcp.SparseMFAC([replaced], density=0.5)
    replaced.grad = even.clone()
    optimizer.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(DTensor.from_local(part[:, :2].clone(), mesh, [Shard(0)]))]
    [other] = optimizer.param_groups[0]["params"]
    optimizer.state[other] = optimizer.state.pop(replaced)
    taken_apart = nn.Parameter(part.clone())
    _set_fsdp_flattened(taken_apart)  # as FullyShardedDataParallel does, which needs a GPU
    narrow = nn.Parameter(even.clone())
    by_adamw = efcp.SparseMFAC([{"params": [narrow], "adamw": True}])  # which needs no blocks
    narrow.grad = even + 1
    by_adamw.step()
    by_adamw.load_state_dict(by_adamw.state_dict())
    return {
        "narrow by AdamW": float(narrow.detach().full_tensor().max()) < 0,
        "partial": message(lambda: efcp.SparseMFAC([nn.Parameter(DTensor.from_local(part, mesh, [Partial()]))])),
        "narrow": message(lambda: efcp.SparseMFAC([nn.Parameter(even.clone())])),
        "mesh": message(lambda: efcp.SparseMFAC([nn.Parameter(part)], mesh="cpu")),
        "grid": message(lambda: efcp.SparseMFAC([nn.Parameter(part)], mesh=init_device_mesh("cpu", (1, world)))),
        "outside": message(lambda: efcp.SparseMFAC([nn.Parameter(outside)], density=0.5)) if rank > 1 else "",
        "replaced": message(optimizer.step),
        "first FSDP": message(lambda: efcp.SparseMFAC([taken_apart])),
    }


def replicated():
    return DistributedDataParallel(network(), find_unused_parameters=True)


def divided_state(rank, world, folder):
    """DistributedDataParallel with a mesh: whether replicas agree, and how it compares with state that is whole."""
    results = {}
    shards.BUCKET = 600  # bytes: more than one is gathered
    mesh = init_device_mesh("cpu", (world,))
    for name in CLASSES:
        more = {"aligned": True} if CLASSES[name][1].get("density", 0) is not None else {}
        models = [replicated() for _ in range(2)]
        optimizers = [make(name, models[0], mesh=mesh), make(name, models[1], **more)]
        for step in range(8):
            for model, optimizer in zip(models, optimizers, strict=True):
                backward(model, "fsdp", rank, world, step)
                if step == 4:
                    model.module.up.weight.grad[-1, -1] = float("nan")
                optimizer.step()
        difference, norms = largest_difference(*models), [o.diagnostics()["grad_norm"] for o in optimizers]
        saved = optimizers[0].state_dict()
        resumed = replicated()
        other = make(name, resumed, mesh=mesh)
        resumed.module.load_state_dict(models[0].module.state_dict())
        other.load_state_dict(saved)
        with Recorder() as recorder:
            for model, optimizer in ((models[0], optimizers[0]), (resumed, other)):
                backward(model, "fsdp", rank, world, 8)
                optimizer.step()
        cls, options = type(optimizers[0]), options_of(name)
        results[name] = {
            "parameters": parameters(models[0]),
            "difference": difference,
            "resumed": all(map(torch.equal, parameters(models[0]), parameters(resumed))),
            "gram": optimizers[0].shared["gram"],
            "skipped": optimizers[0].skipped_steps,
            "bytes": efcp.memory_report(optimizers[0]).total,
            "bytes of whole state": efcp.estimate_memory(models[0], cls, **options).total,
            "estimate": efcp.estimate_memory(models[0], cls, **options, mesh=mesh).total,
            "exchanged": recorder.sizes,
            "norms": norms,
        }
    return results


def one_rank_dies(rank, world, folder):
    """The seconds that the others wait for a rank that is gone."""
    model = divided("fsdp", world)
    optimizer = sparse(model)
    backward(model, "fsdp", rank, world, 0)
    optimizer.step()
    for p in model.parameters():
        p.grad = p.detach() if p.grad is None else p.grad
    if rank == world - 1:
        os._exit(1)
    start = time.monotonic()
    refusal = message(optimizer.step)
    return refusal, time.monotonic() - start
