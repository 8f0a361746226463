"""torch.distributed.checkpoint saves and loads optimizers as it does those of PyTorch: bit for bit, in one process.

Its `get_optimizer_state_dict` names parameters by the model's names, and may flatten the state to one dict.
"""

import io

import pytest
import torch
from torch import distributed

from efcp import SparseGGT, SparseMFAC
from tests.contract.optimizers import CLASSES, Regression, assert_same, momentum_of, small

checkpoint = pytest.importorskip("torch.distributed.checkpoint")
state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed"),
    pytest.mark.filterwarnings("ignore"),  # its own, of a single process
]

WAYS = {
    "plain": {},
    "full-on-cpu": {"full_state_dict": True, "cpu_offload": True},
    "flattened": {"flatten_optimizer_state_dict": True},  # which AdamW manages too, but not together with the above
}


@pytest.fixture(scope="module", params=["no group", "gloo"])
def group(request, tmp_path_factory):
    if request.param == "gloo":
        meeting = tmp_path_factory.mktemp("meeting") / "file"
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    if request.param == "gloo":
        distributed.destroy_process_group()


def through_a_file(saved, other, options, folder):
    """The state as torch.save and torch.load leave it."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_a_folder(saved, other, options, folder):
    """The state as dcp.save and dcp.load leave it, which write into the state of the optimizer that is to load it."""
    no_dist = not distributed.is_initialized()
    checkpoint.save(saved, checkpoint_id=folder, no_dist=no_dist)
    loaded = state_dict.get_optimizer_state_dict(other.model, other.optimizer, options=options)
    checkpoint.load(loaded, checkpoint_id=folder, no_dist=no_dist)
    return loaded


def check_resumes(cls, way, through, folder, *, frozen=False, lr=0.02):
    options = state_dict.StateDictOptions(**WAYS[way])
    problem, other = (Regression(cls, small(cls) | momentum_of(cls) | {"lr": lr}, seed=seed) for seed in (0, 1))
    other.x, other.y = problem.x, problem.y
    if frozen:
        for each in (problem, other):
            each.params[0].requires_grad_(False)
    problem.step(6)
    saved = state_dict.get_optimizer_state_dict(problem.model, problem.optimizer, options=options)
    loaded = through(saved, other, options, folder)
    other.model.load_state_dict(problem.model.state_dict())
    state_dict.set_optimizer_state_dict(other.model, other.optimizer, loaded, options=options)
    assert_same(problem, other)
    assert other.optimizer.shared["step"] == 6
    problem.step(5)
    other.step(5)
    assert_same(problem, other)


@pytest.mark.parametrize("through", [through_a_file, through_a_folder], ids=["a file", "a folder"])
@pytest.mark.parametrize("way", WAYS)
def test_resumes_bit_for_bit(group, cls, way, through, tmp_path):
    check_resumes(cls, way, through, tmp_path)


@pytest.mark.parametrize("through", [through_a_file, through_a_folder], ids=["a file", "a folder"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [SparseMFAC, SparseGGT])
def test_resumes_where_the_first_parameter_is_frozen(cls, way, through, tmp_path):
    """The Gram matrix is in the state of another one, then."""
    check_resumes(cls, way, through, tmp_path, frozen=True)


@pytest.mark.parametrize("way", WAYS)
def test_resumes_with_an_lr_that_is_a_tensor(way, tmp_path):
    check_resumes(SparseMFAC, way, through_a_folder, tmp_path, lr=torch.tensor(0.02))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_param_groups_hold_plain_values(cls, options):
    """No dtype, as writers of JSON and of checkpoints would have it, whether dtypes are given or their names."""
    names = {"value_dtype": "float32", "error_dtype": "float64"}
    given = {name: value for name, value in names.items() if name in cls([torch.zeros(1)]).param_groups[0]}
    for dtypes in ({}, given, {name: getattr(torch, value) for name, value in given.items()}):
        problem = Regression(cls, options | dtypes)
        problem.step()
        added = {name: value for name, value in {**options, **dtypes}.items() if name != "lr"}
        problem.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], **added})
        for group in (*problem.optimizer.param_groups, *problem.optimizer.state_dict()["param_groups"]):
            values = {name: value for name, value in group.items() if name != "params"}
            single = [x for value in values.values() for x in (value if isinstance(value, list) else [value])]
            assert all(isinstance(value, (bool, int, float, str, type(None))) for value in single)
            assert not dtypes or values | given == values
