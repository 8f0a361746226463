"""torch.distributed.checkpoint: on the same mesh, on another number of ranks, and of a single process."""

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor import DTensor

import efcp
from tests.distributed.networks import backward, divided, full, network, sparse

BEFORE, AFTER = 6, 5  # steps

CLASSES = {
    "SparseMFAC": (efcp.SparseMFAC, {}),
    "SparseMFAC8": (efcp.SparseMFAC, {"error_dtype": torch.int8, "momentum": 0.5}),
    "SparseGGT": (efcp.SparseGGT, {"eps": 0.1, "damping": None}),
    "DenseMFAC": (efcp.DenseMFAC, {"density": None, "block_size": None, "value_dtype": None}),
    "MicroAdam": (efcp.MicroAdam, {"damping": None, "error_dtype": torch.float64}),
    "MicroAdam4": (efcp.MicroAdam, {"damping": None}),  # of which other ranks would draw other random numbers
    "LowRankMFAC": (efcp.LowRankMFAC, {"density": None, "block_size": None, "rank": 1}),
    "MFACW": (efcp.MFACW, {"density": None, "block_size": None, "value_dtype": None, "rank": 1}),
    "KroneckerW": (efcp.KroneckerW, {"density": None, "block_size": None, "value_dtype": None, "rank": 1}),
}
RESHARDED = ("SparseMFAC", "SparseMFAC8", "SparseGGT", "DenseMFAC", "MicroAdam")
FLAT = {"nested": False, "flat": True}
FORMS = [(name, form) for name in CLASSES for form in FLAT if form == "nested" or name in ("SparseMFAC", "MFACW")]


def options_of(name):
    own = {"density": 0.3, "block_size": 8, "window": 4, "damping": 0.1, "value_dtype": torch.float32}
    return {key: value for key, value in {**own, **CLASSES[name][1]}.items() if value is not None}


def make(name, model, **more):
    return CLASSES[name][0](model.parameters(), lr=0.05, **options_of(name), **more)


def step(model, optimizer, rank, world, first, count, way="fsdp"):
    for number in range(first, first + count):
        backward(model, way, rank, world, number)
        optimizer.step()


def save(model, optimizer, folder, flat):
    options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
    own = states.get_state_dict(model, optimizer, options=options)
    dcp.save({"model": own[0], "optimizer": own[1]}, checkpoint_id=folder)


def load(model, optimizer, folder, flat):
    options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
    own = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(own, checkpoint_id=folder)
    given = {"model_state_dict": own["model"], "optim_state_dict": own["optimizer"]}
    states.set_state_dict(model, optimizer, **given, options=options)


def parameters(model):
    return [full(p.detach()).clone() for p in model.parameters()]


def tensors(optimizer):
    """All of the state, whole."""
    found = {}
    for number, p in enumerate(q for group in optimizer.param_groups for q in group["params"]):
        for name, value in optimizer.state[p].items():
            found[number, name] = full(value).clone() if isinstance(value, torch.Tensor) else value
    return found


def same(state, other):
    if state.keys() != other.keys():
        return False
    pairs = ((value, other[key]) for key, value in state.items())
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def save_and_resume(rank, world, folder):
    """Saves after some steps, resumes on the same mesh, and goes on."""
    results = {}
    for name, form in FORMS:
        flat = FLAT[form]
        where = folder.parent / f"{name} {form} {world}"
        model = divided("fsdp", world)
        optimizer = make(name, model)
        step(model, optimizer, rank, world, 0, BEFORE)
        save(model, optimizer, where, flat)
        resumed = divided("fsdp", world)
        other = make(name, resumed)
        load(resumed, other, where, flat)
        loaded = same(tensors(optimizer), tensors(other))
        step(model, optimizer, rank, world, BEFORE, AFTER)
        step(resumed, other, rank, world, BEFORE, AFTER)
        results[name, form] = {
            "loaded": loaded,
            "bitwise": same(tensors(optimizer), tensors(other)),
            "parameters": parameters(model),
            "whole": sorted({name for _, name in _whole(optimizer)}),
        }
    return results


def _whole(optimizer):
    """The names of tensors in the states of parameters that are not divided."""
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and name not in optimizer.shared:
                yield p, name


def resume_on_another_number(rank, world, folder):
    """Loads what another number of ranks has saved, and goes on; saves it again."""
    results = {}
    saved = {2: 4, 4: 2}[world]
    for name, form in FORMS:
        if name in RESHARDED:
            flat = FLAT[form]
            model = divided("fsdp", world)
            optimizer = make(name, model)
            load(model, optimizer, folder.parent / f"{name} {form} {saved}", flat)
            if world == 2:
                save(model, optimizer, folder.parent / f"{name} {form} {world}", flat)
            step(model, optimizer, rank, world, BEFORE, AFTER)
            results[name, form] = parameters(model)
    return results


def resume_on_other_meshes(rank, world, folder):
    """Loads what a mesh of one dimension has saved on one of two, and with columns cut; goes on, saves and resumes."""
    results = {}
    for name in ("SparseMFAC", "DenseMFAC"):
        for way in ("hsdp", "fsdp and tensor parallel"):
            where = folder.parent / f"{name} {way}"
            model, resumed = divided(way, world), divided(way, world)
            optimizer, other = make(name, model), make(name, resumed)
            load(model, optimizer, folder.parent / f"{name} nested {world}", False)
            save(model, optimizer, where, False)
            load(resumed, other, where, False)
            step(model, optimizer, rank, world, BEFORE, AFTER, way)
            step(resumed, other, rank, world, BEFORE, AFTER, way)
            results[name, way] = parameters(model), same(tensors(optimizer), tensors(other))
    return results


def before_the_first_step(rank, world, folder):
    """Saves and loads an optimizer that has not stepped; then it goes on as a new one."""
    where = folder.parent / "new"
    model, resumed = divided("fsdp", world), divided("fsdp", world)
    optimizer, other = make("SparseMFAC", model), make("SparseMFAC", resumed)
    save(model, optimizer, where, False)
    load(resumed, other, where, False)
    counted = int(other.shared["step"]) - int(optimizer.shared["step"])
    step(model, optimizer, rank, world, 0, BEFORE)
    step(resumed, other, rank, world, 0, BEFORE)
    return counted, all(map(torch.equal, parameters(model), parameters(resumed)))


def through_a_single_process(rank, world, folder):
    """A whole state goes to one process, which takes steps; and its state back to all."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    model = divided("fsdp", world)
    optimizer = sparse(model)
    step(model, optimizer, rank, world, 0, BEFORE)
    own = states.get_state_dict(model, optimizer, options=options)
    alone = network()
    single = sparse(alone, aligned=True)
    differences = []
    if rank == 0:
        alone_options = states.StateDictOptions(full_state_dict=True)
        step(alone, single, 0, 1, 100, 1, way=None)  # it has a state of its own before
        states.set_model_state_dict(alone, own[0], options=alone_options)
        single.load_state_dict(_by_number(own[1], alone))
        step(alone, single, 0, 1, BEFORE, AFTER, way=None)
    step(model, optimizer, rank, world, BEFORE, AFTER)
    whole = parameters(model)
    if rank == 0:
        differences = [float((p - q.detach()).abs().max()) for p, q in zip(whole, alone.parameters(), strict=True)]
    # back: what the single process has now, on all ranks
    given = _by_name(single.state_dict(), alone) if rank == 0 else {}
    resumed = divided("fsdp", world)
    other = sparse(resumed)
    back = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(resumed, alone.state_dict() if rank == 0 else {}, options=back)
    states.set_optimizer_state_dict(resumed, other, given, options=back)
    loaded = {key: value for key, value in tensors(other).items() if key[1] in ("values", "error", "gram", "momentum")}
    kept = {key: value for key, value in tensors(optimizer).items() if key in loaded}
    most = max(float((value - kept[key]).abs().max()) for key, value in loaded.items() if value.numel())
    step(model, optimizer, rank, world, BEFORE + AFTER, AFTER)
    step(resumed, other, rank, world, BEFORE + AFTER, AFTER)
    again = max(float((p - q).abs().max()) for p, q in zip(parameters(model), parameters(resumed), strict=True))
    return max(differences, default=0.0), most, again


def dense_in_a_single_process(rank, world, folder):
    """A whole state with dense rows and a momentum goes to one process, whose tensors are flat."""
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = divided("fsdp", world)
    own = {"window": 4, "damping": 0.1, "momentum": 0.5}
    optimizer = efcp.DenseMFAC(model.parameters(), lr=0.05, **own)
    step(model, optimizer, rank, world, 0, BEFORE)
    saved = states.get_state_dict(model, optimizer, options=options)
    difference = 0.0
    alone = network()
    single = efcp.DenseMFAC(alone.parameters(), lr=0.05, **own)
    if rank == 0:
        states.set_model_state_dict(alone, saved[0], options=states.StateDictOptions(full_state_dict=True))
        single.load_state_dict(_by_number(saved[1], alone))
        step(alone, single, 0, 1, BEFORE, AFTER, way=None)
    step(model, optimizer, rank, world, BEFORE, AFTER)
    whole = parameters(model)
    if rank == 0:
        pairs = zip(whole, alone.parameters(), strict=True)
        difference = max(float((p - q.detach()).abs().max()) for p, q in pairs)
    flat = not single.state or all(state["rows"].dim() == 2 for state in single.state.values())
    return difference, flat


def _by_number(state, model):
    """A state whose parameters are named, as an optimizer's own: numbered."""
    numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {numbers[name]: own for name, own in state["state"].items()}, "param_groups": groups}


def _by_name(state, model):
    names = [name for name, _ in model.named_parameters()]
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[number]: own for number, own in state["state"].items()}, "param_groups": groups}


def several_optimizers(rank, world, folder):
    """Each part of a model has an optimizer with named parameters and a window of its own, as torchtitan does it."""
    options = states.StateDictOptions(flatten_optimizer_state_dict=True)
    where = folder.parent / "several"

    def made():
        model = divided("fsdp", world)
        named = dict(model.named_parameters())
        first = [(name, p) for name, p in named.items() if name.startswith("up")]
        others = [(name, p) for name, p in named.items() if not name.startswith("up")]
        options = options_of("SparseMFAC")
        groups = ([{"params": some, "fused": False, "foreach": None}] for some in (first, others))
        return model, [efcp.SparseMFAC(group, lr=0.05, **options) for group in groups]

    def go(model, optimizers, first, count):
        for number in range(first, first + count):
            backward(model, "fsdp", rank, world, number)
            for optimizer in optimizers:
                optimizer.step()

    model, optimizers = made()
    go(model, optimizers, 0, BEFORE)
    own = states.get_state_dict(model, optimizers, options=options)
    dcp.save({"model": own[0], "optimizer": own[1]}, checkpoint_id=where)
    resumed, others = made()
    own = dict(zip(("model", "optimizer"), states.get_state_dict(resumed, others, options=options), strict=True))
    dcp.load(own, checkpoint_id=where)
    given = {"model_state_dict": own["model"], "optim_state_dict": own["optimizer"]}
    states.set_state_dict(resumed, others, **given, options=options)
    go(model, optimizers, BEFORE, AFTER)
    go(resumed, others, BEFORE, AFTER)
    windows = len({id(optimizer.shared["gram"]) for optimizer in others})
    return windows, all(same(tensors(a), tensors(b)) for a, b in zip(optimizers, others, strict=True))
