"""What any optimizer must do, done by those that precondition a dense momentum, with AdamW for some parameters."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import efcp
from tests.contract.optimizers import assert_same

OPTIONS = {
    "MFACW": (efcp.MFACW, {"rank": 2, "window": 4}),
    "MFACW, floats": (efcp.MFACW, {"rank": 2, "window": 4, "momentum_dtype": None, "error_dtype": None}),
    "MFACW, 8 bits": (efcp.MFACW, {"rank": 1, "window": 3, "error_dtype": torch.int8, "weight_decay": 0.1}),
    "KroneckerW": (efcp.KroneckerW, {"rank": 2, "window": 4, "refresh_every": 2}),
    "KroneckerW, one side": (efcp.KroneckerW, {"rank": 2, "window": 4, "refresh_every": 1, "sides": 1}),
    "sparse, momentum": (
        efcp.SparseMFAC,
        {"window": 4, "density": 0.3, "direction": "momentum", "momentum": 0.9, "momentum_dtype": torch.int8},
    ),
    "sparse, average": (efcp.SparseMFAC, {"window": 4, "density": 0.3, "direction": "average", "momentum": 0.9}),
    "sparse, error in 8 bits": (
        efcp.SparseMFAC,
        {
            "window": 4,
            "density": 0.3,
            "block_size": 50,
            "error_dtype": torch.int8,
            "direction": "average",
            "momentum": 0.9,
        },
    ),
    "sparse, error in 4 bits": (
        efcp.SparseMFAC,
        {"window": 4, "density": 0.3, "block_size": 51, "error_dtype": torch.int4, "weight_decay": 0.1},
    ),
    "dense GGT": (
        efcp.DenseGGT,
        {"window": 4, "direction": "momentum", "momentum": 0.9, "eps": 0.1, "relative_eps": True},
    ),
}
SCALED = {"update_rms": 0.2, "relative_damping": True}


class Task:
    """A small network, of which the first weight and all vectors may be left to AdamW."""

    def __init__(self, kind, *, split=True, dtype=torch.float32, seed=0, **options):
        cls, own = OPTIONS[kind]
        scaled = SCALED if cls is efcp.SparseMFAC else {"update_rms": 0.2} if cls is efcp.DenseGGT else {}
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 5))
        self.model.to(dtype)
        with torch.no_grad():
            for p in self.params:
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
        self.x = torch.randn(16, 6, generator=generator).to(dtype)
        self.y = torch.randn(16, 5, generator=generator).to(dtype)
        groups = [{"params": [self.params[2], self.params[4]]}]
        if split:
            groups.append({"params": [self.params[i] for i in (0, 1, 3, 5)], "adamw": True, "lr": 3e-3})
        else:
            groups.append({"params": [self.params[i] for i in (0, 1, 3, 5)]})
        self.optimizer = cls(groups, **{"lr": 1e-2, **scaled, **own, **options})

    @property
    def params(self):
        return list(self.model.parameters())

    def loss(self):
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            self.optimizer.step()
        return loss.item()

    def flat(self):
        return torch.cat([p.detach().reshape(-1) for p in self.params])


@pytest.fixture(params=OPTIONS)
def kind(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["split", "not split"])
def split(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_goes_down(kind, split, dtype):
    task = Task(kind, split=split, dtype=dtype)
    first = task.loss().item()
    task.step(60)
    assert task.loss().item() < 0.95 * first
    assert task.flat().isfinite().all()


@pytest.mark.parametrize("steps", [1, 3, 6])
@pytest.mark.parametrize("way", ["file", "copied", "distributed"])
def test_resumes_bit_for_bit(kind, split, way, steps, tmp_path):
    task = Task(kind, split=split)
    task.step(steps)
    other = Task(kind, split=split, seed=1)
    other.model.load_state_dict(task.model.state_dict())
    other.x, other.y = task.x, task.y
    if way == "file":
        torch.save(task.optimizer.state_dict(), tmp_path / "state.pt")
        other.optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    elif way == "copied":
        other = copy.deepcopy(task)
    else:
        set_optimizer_state_dict(other.model, other.optimizer, get_optimizer_state_dict(task.model, task.optimizer))
    task.step(4)
    other.step(4)
    assert_same(task, other)


def tensors_of(optimizer, names):
    return [
        value.clone() for state in optimizer.state.values() for name, value in state.items() if name.startswith(names)
    ]


def errors_of(optimizer):
    """The errors as floating point."""
    return [
        optimizer.compressor.error(state)
        for state in optimizer.state.values()
        if "error" in state or "error_codes" in state
    ]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 2], ids=["of AdamW", "of the window"])
def test_a_gradient_that_is_not_finite_leaves_all_as_it_is(kind, bad, where):
    """Bit for bit: parameters, momenta, errors, and what AdamW keeps; errors of sparse windows nearly."""
    nearly = ("error_codes", "error_scales") if kind.startswith("sparse") else ()
    kept = ("momentum", "exp_avg", "adam_step", *(() if nearly else ("error_codes", "error_scales")))
    task = Task(kind)
    task.step(5)
    before, state, errors = task.flat(), tensors_of(task.optimizer, kept), errors_of(task.optimizer)
    task.optimizer.zero_grad()
    task.loss().backward()
    largest = max(float(t.abs().max()) for t in (*errors, *(p.grad for p in task.params)))
    task.params[where].grad.view(-1)[1] = bad
    task.optimizer.step()
    assert torch.equal(task.flat(), before)
    after = tensors_of(task.optimizer, kept)
    assert state
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))
    for one, other in zip(errors, errors_of(task.optimizer), strict=True):
        assert (one - other).abs().max() <= (2 * 2 / 7 * largest if nearly else 0)
    assert task.optimizer.skipped_steps == 1
    assert task.step(20) < task.loss().item() * 10
    assert task.flat().isfinite().all()


def test_memory_is_estimated_exactly(kind, split):
    task = Task(kind, split=split)
    groups = [dict(group) for group in task.optimizer.param_groups]
    cls, own = OPTIONS[kind]
    task.step(2)
    estimated = efcp.estimate_memory(groups, cls, **own)
    assert estimated.tensors == efcp.memory_report(task.optimizer).tensors


def test_groups_of_adamw_are_stepped_by_adamw(kind):
    """As `torch.optim.AdamW` does it, bit for bit; whatever the other group does."""
    task = Task(kind)
    group = task.optimizer.param_groups[1]
    group["weight_decay"], group["betas"] = 0.1, [0.8, 0.95]
    twins = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    adamw = torch.optim.AdamW(twins, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95), fused=True)
    for _ in range(5):
        task.step()
        for twin, p in zip(twins, group["params"], strict=True):
            twin.grad = p.grad.clone()
        adamw.step()
        assert all(torch.equal(twin, p) for twin, p in zip(twins, group["params"], strict=True))


def test_all_parameters_may_be_left_to_adamw():
    params, twins = ([nn.Parameter(torch.ones(3, 4))] for _ in range(2))
    optimizer = efcp.MFACW([{"params": params, "adamw": True}], lr=0.1)
    adamw = torch.optim.AdamW(twins, lr=0.1, weight_decay=0.0, fused=True)
    for _ in range(3):
        params[0].grad = torch.randn(3, 4)
        twins[0].grad = params[0].grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(params[0], twins[0])
    other = efcp.MFACW([{"params": params, "adamw": True}], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])


def test_a_group_cannot_move_between_window_and_adamw_with_a_state(kind):
    task, other = Task(kind), Task(kind, split=False)
    task.step()
    with pytest.raises(ValueError, match="adamw is True in the state, but False in the optimizer"):
        other.optimizer.load_state_dict(task.optimizer.state_dict())


def test_maximising_is_minimising_the_negative(kind, split):
    if kind in ("MFACW", "KroneckerW", "KroneckerW, one side", "sparse, error in 4 bits"):
        kind = "MFACW, floats"  # random rounding to 4 bits is not symmetric
    task, other = Task(kind, split=split), Task(kind, split=split, maximize=True)
    for _ in range(6):
        task.step()
        other.optimizer.zero_grad()
        (-other.loss()).backward()
        other.optimizer.step()
    torch.testing.assert_close(task.flat(), other.flat(), rtol=1e-4, atol=1e-4)


def test_lr_may_be_a_tensor(kind, split):
    task, other = Task(kind, split=split), Task(kind, split=split)
    for group in other.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    for some in (task, other):
        some.step(5)
    torch.testing.assert_close(task.flat(), other.flat(), rtol=1e-5, atol=1e-6)


def test_parameters_without_gradient_stay(kind):
    task = Task(kind, split=False)
    task.step(3)
    before = [p.detach().clone() for p in task.params]
    task.optimizer.zero_grad()
    task.loss().backward()
    task.params[2].grad = task.params[3].grad = None
    task.optimizer.step()
    moved = [not torch.equal(p, old) for p, old in zip(task.params, before, strict=True)]
    assert moved == [True, True, False, False, True, True]
    task.step(2)


def test_a_group_may_come_later(kind):
    task = Task(kind)
    new = nn.Parameter(torch.randn(7, 9))
    task.step(2)
    task.optimizer.add_param_group({"params": [new]})
    for _ in range(3):
        task.optimizer.zero_grad()
        (task.loss() + new.square().sum()).backward()
        task.optimizer.step()
    assert new.square().sum() < 70
    assert "numel" in task.optimizer.state[new]


def test_diagnostics_know_the_length_of_the_update(kind):
    task = Task(kind, lr=1.0)
    for group in task.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1.0, 0.0
    task.step(3)
    before = [task.params[i].detach().clone() for i in (2, 4)]
    task.step()
    moved = torch.cat([(old - task.params[i]).reshape(-1) for old, i in zip(before, (2, 4), strict=True)])
    found = task.optimizer.diagnostics(quantiles=True)
    assert found["update_norm"] == pytest.approx(moved.norm().item(), rel=1e-3)
    error = sum(1 for state in task.optimizer.state.values() if state.keys() & {"error", "error_codes"})
    assert (found["error_norm"] > 0) == (error > 0)


def test_steps_on_tensors_without_memory_give_the_state_of_real_ones(kind):
    def shapes(mode):
        with mode or torch.no_grad():
            params = [nn.Parameter(torch.randn(shape)) for shape in ((12, 9), (5,), (8, 3))]
            cls, own = OPTIONS[kind]
            scaled = SCALED if cls is efcp.SparseMFAC else {}
            groups = [{"params": params[:1]}, {"params": params[1:], "adamw": cls is efcp.MFACW}]
            optimizer = cls(groups, **{**scaled, **own})
            for _, p in itertools.product(range(3), params):
                p.grad = torch.randn(p.shape)
            optimizer.step()
            states = optimizer.state_dict()["state"].values()
            return [{n: getattr(v, "shape", None) for n, v in state.items()} for state in states]

    assert shapes(FakeTensorMode()) == shapes(None)


DRAWING = {
    "low rank": (efcp.MFACW, {"window": 3, "rank": 1}),
    "sparse": (efcp.SparseGGT, {"window": 3, "density": 0.1, "error_dtype": torch.int4}),
}


@pytest.mark.parametrize(("cls", "options"), DRAWING.values(), ids=DRAWING)
def test_4_bits_draw_other_numbers_in_each_step_and_parameter(cls, options):
    params = [nn.Parameter(torch.zeros(16, 24)) for _ in range(2)]
    optimizer = cls(params, **options)
    gradient, codes = torch.randn(16, 24), []
    for _ in range(2):
        for p in params:
            p.grad = gradient.clone()
        optimizer.step()
        codes.append([optimizer.state[p]["error_codes"].clone() for p in params])
    assert not torch.equal(codes[0][0], codes[0][1])
    assert optimizer.state[params[0]]["error_draws"] != optimizer.state[params[1]]["error_draws"]


# ---- the usual split


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(11, 8)
        self.position_embedding = nn.Parameter(torch.zeros(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11)


def names_of(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_hidden_matrices_are_split_from_all_others():
    window, others = names_of(efcp.param_groups(Transformer(), lr=0.5))
    assert window == [
        *("block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight"),
        *("block.linear1.weight", "block.linear2.weight"),
    ]
    assert {"token_embedding.weight", "position_embedding", "lm_head.weight", "norm.weight"} <= set(others)
    assert efcp.param_groups(Transformer(), lr=0.5)[1]["lr"] == 0.5


def test_the_last_layer_is_the_head_where_none_is_named_so():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3))
    window, others = names_of(efcp.param_groups(model))
    assert window == ["0.weight", "2.weight"]
    assert others == ["0.bias", "2.bias", "4.weight", "4.bias"]
    window, others = names_of(efcp.param_groups(model, head="2"))
    assert window == ["0.weight", "4.weight"]
    with pytest.raises(ValueError, match="head must be the name of a module, got 'top'"):
        efcp.param_groups(model, head="top")


def test_weights_that_are_tied_to_embeddings_go_with_them():
    model = Transformer()
    model.lm_head.weight = model.token_embedding.weight
    window, others = efcp.param_groups(model)
    assert all(p is not model.token_embedding.weight for _, p in window["params"])
    assert sum(p is model.token_embedding.weight for _, p in others["params"]) == 1
    efcp.MFACW([window, others])


def test_frozen_parameters_are_left_out():
    model = Transformer()
    model.block.requires_grad_(False)
    groups = efcp.param_groups(model)
    assert len(groups) == 1
    assert groups[0]["adamw"]
