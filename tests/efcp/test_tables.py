"""The tables of addresses that launches read: who keeps them, and for how long. No GPU is needed."""

import copy
import gc
import pickle
import weakref
from contextlib import suppress

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from efcp import SparseMFAC, memory_report
from efcp.kernels import Tables, tables, use_backend
from efcp.perf.gpu.gpusim import simulate, why_unavailable

KEPT = 8 * (3 * 2 * 9 + 6)
"""Bytes: for compression, inner products and the update 9 numbers of each of two parameters; and 6 factors."""
CPU = torch.device("cpu")


@pytest.fixture
def capture(monkeypatch):
    """Lets steps take place as if a CUDA graph were captured, or no more."""

    def set_to(capturing):
        monkeypatch.setattr(tables, "is_capturing", lambda device: capturing)

    return set_to


def table(*numbers):
    return tables.on_device(CPU, numbers, lambda: torch.tensor(numbers))


def test_the_next_step_takes_over_tables_of_the_same_numbers():
    owner = Tables()
    with owner:
        first, second = table(1, 2), table(3)
        assert table(1, 2) is first
    with owner:
        assert table(3) is second
        assert table(1, 2) is first
        assert torch.equal(table(1, 4), torch.tensor([1, 4]))


def test_tables_that_a_step_has_not_used_are_given_up():
    owner = Tables()
    with owner:
        unused = weakref.ref(table(1, 2))
        table(3)
    with owner:
        table(3)
    assert unused() is None
    assert owner.bytes == 8


def test_without_an_owner_nothing_is_kept():
    found = weakref.ref(table(1, 2))
    assert found() is None


def test_tables_of_a_graph_stay_as_long_as_their_owner(capture):
    owner = Tables()
    with owner:
        before = weakref.ref(table(1))  # on the device already, when the graph is captured
    capture(True)
    with owner:
        table(1)
        captured = weakref.ref(table(2))
    capture(False)
    for step in range(3):
        with owner:
            table(3 + step)
    assert before() is not None
    assert captured() is not None
    assert owner.bytes == 3 * 8
    del owner
    assert before() is None
    assert captured() is None


def test_tables_that_only_a_replay_fills_are_not_taken_over(capture):
    owner = Tables()
    capture(True)
    with owner:
        captured = table(1)
        assert table(1) is captured
    with owner:
        assert table(1) is not captured
    capture(False)
    with owner:
        assert table(1) is not captured


def test_tables_of_a_graph_without_an_owner_stay(capture, monkeypatch):
    monkeypatch.setattr(tables, "_for_ever", [])
    capture(True)
    found = weakref.ref(table(1, 2))
    assert found() is not None


needs_gpusim = pytest.mark.skipif(bool(why_unavailable()), reason=str(why_unavailable()))


def stepping(steps, **options):
    """(optimizer, a function that sets new gradients, which are elsewhere each time, their memory)."""
    params = [torch.nn.Parameter(torch.randn(numel)) for numel in (200, 30)]
    memory = torch.randn(steps, 230)
    optimizer = SparseMFAC(params, window=4, block_size=64, density=0.1, **options)
    left = iter(memory)

    def new_gradients():
        for p, grad in zip(params, next(left).split([200, 30]), strict=True):
            p.grad = grad

    new_gradients()
    optimizer.allocate_state()
    return optimizer, new_gradients, memory


def allow(simulator, optimizer, memory):
    own = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    simulator.allow(memory, *optimizer.state, *own)


@needs_gpusim
def test_a_graph_reads_no_freed_memory_after_many_steps_with_moving_gradients(capture):
    """A graph keeps what is allocated while it is captured; tensors from before it only reads."""
    optimizer, new_gradients, memory = stepping(140, direction="momentum", momentum=0.9)
    with use_backend("triton"), simulate(90) as simulator:
        allow(simulator, optimizer, memory)
        for _ in range(2):
            new_gradients()
            optimizer.step()
        launch, arguments = simulator.launch, []

        def record(program, metadata, grid, given):
            arguments.extend(value for _, value in given if isinstance(value, torch.Tensor))
            launch(program, metadata, grid, given)

        living = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        older = set()
        for x in living:
            with suppress(RuntimeError, NotImplementedError):  # of those without memory, such as fake tensors
                older.add(x.untyped_storage().data_ptr())
        living.clear()
        simulator.launch = record
        capture(True)
        optimizer.step()
        capture(False)
        simulator.launch = launch
        storages = [x.untyped_storage() for x in arguments]
        read = [StorageWeakRef(storage) for storage in storages if storage.data_ptr() in older]
        graph = [storage for storage in storages if storage.data_ptr() not in older]
        arguments.clear()
        storages.clear()
        for _ in range(135):
            new_gradients()
            optimizer.step()
    assert graph
    assert read
    assert not any(storage.expired() for storage in read)


@needs_gpusim
def test_an_optimizer_keeps_the_tables_of_a_step_and_reports_them():
    optimizer, new_gradients, memory = stepping(5)
    with use_backend("triton"), simulate(90) as simulator:
        allow(simulator, optimizer, memory)
        for _ in range(3):
            new_gradients()
            optimizer.step()
            assert memory_report(optimizer).tensors["tables"] == KEPT
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "tables" not in memory_report(copied).tensors
        assert optimizer.state_dict().keys() == copied.state_dict().keys()
    optimizer.load_state_dict(optimizer.state_dict())
    assert memory_report(optimizer).tensors["tables"] == KEPT  # a captured graph may read them
