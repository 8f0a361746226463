"""The operations as operators of PyTorch, and compilers around models and steps."""

from copy import deepcopy

import pytest
import torch
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

from efcp import MicroAdam, SparseMFAC, kernels
from efcp.kernels import Blocks, SparseRows, operators
from tests.contract.optimizers import Regression, SparseGGT4, SparseMFAC8, assert_same, small
from tests.kernels.row_steps import new_state

OPERATORS = ["compress_", "undo_compress_", "window_dots", "update_inverse_root_", "window_apply_"]  # in order
LAYOUTS = [(1, 4096, 0.01), (63, 16, 0.1), (1000, 256, 0.05), (4097, 4096, 0.01)]


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


def arguments(layout, *, window=3, error_dtype=torch.float32):
    """Two parameters with three random rows each: (grads, errors, rows, slot, finite, keys), of `compress_`."""
    numel, block_size, density = layout
    rows = []
    for blocks in (Blocks(numel, block_size, density), Blocks(20, block_size, density)):
        shape = (blocks.count, window, blocks.kept)
        rows.append(SparseRows(torch.zeros(shape), torch.zeros(shape, dtype=blocks.index_dtype), blocks))
    layouts = [r.blocks for r in rows]
    errors, keys = [], [torch.tensor([n]) for n in range(2) if error_dtype == torch.uint8]
    if error_dtype in (torch.int8, torch.uint8):
        bits = 8 if error_dtype == torch.int8 else 4
        errors = [kernels.allocate_lowbit(b.numel, bits, torch.device("cpu"), b.size) for b in layouts]
    elif error_dtype is not None:
        errors = [torch.zeros(b.numel, dtype=error_dtype) for b in layouts]
    finite = torch.tensor(True)
    for row in range(window):
        grads = [torch.randn(b.numel) for b in layouts]
        kernels.compress_(grads, errors, rows, torch.tensor([row]), keys)
    return [torch.randn(b.numel) for b in layouts], errors, rows, torch.tensor([1]), finite, keys


@pytest.mark.parametrize("all_gradients", [True, False], ids=["all gradients", "a gradient is None"])
@pytest.mark.parametrize("error_dtype", [None, torch.float32, torch.bfloat16, torch.int8, torch.uint8], ids=str)
def test_compress_is_a_lawful_operator(layout, error_dtype, all_gradients):
    grads, errors, rows, slot, finite, keys = arguments(layout, error_dtype=error_dtype)
    if not all_gradients:
        grads[1] = None
    own = operators.unpacked_numbers(errors)
    opcheck(operators.compress_, (grads, *own, *operators.unpacked(rows), slot, keys))
    for flag in (finite, ~finite):
        opcheck(operators.undo_compress_, (grads, *own, *operators.unpacked(rows), slot, flag, keys))


def lowbit(vectors, bits):
    """Vectors in 8 or 4 bits."""
    numbers = [kernels.allocate_lowbit(vector.numel(), bits, vector.device) for vector in vectors]
    keys = [torch.tensor([number]) for number in range(len(vectors))] if bits == 4 else []
    kernels.store_lowbit_(numbers, vectors, torch.tensor(True), keys)
    return numbers


def some_momenta(kind, vectors):
    """(momenta, scales), as operators take them: none, of floating point, or of 8 bits."""
    momenta = {"no momenta": list, "momenta": lambda: [torch.randn_like(x) for x in vectors]}
    return operators.unpacked_numbers(momenta[kind]() if kind in momenta else lowbit(vectors, 8))


KINDS = ["no momenta", "momenta", "8 bits"]


@pytest.mark.parametrize("kind", KINDS)
def test_window_dots_is_a_lawful_operator(layout, kind):
    grads, _, rows, slot, *_ = arguments(layout)
    opcheck(operators.window_dots, (*operators.unpacked(rows), slot, *some_momenta(kind, grads)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_apply_is_a_lawful_operator(layout, dtype, kind):
    grads, _, rows, *_ = arguments(layout)
    targets = [grad.to(dtype) for grad in grads]
    weights, scalars = torch.randn(3, dtype=torch.float64), torch.tensor([0.9, -0.1, 0.5], dtype=torch.float64)
    update = (weights, *scalars[:2].unbind(), None if kind == "no momenta" else scalars[2], kind == "momenta")
    update += (weights.square(), scalars[0]) if kind == "no momenta" else (None, None)
    opcheck(operators.window_apply_, (targets, *some_momenta(kind, targets), *operators.unpacked(rows), *update))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_average_is_a_lawful_operator(layout, kind):
    grads, _, _, _, finite, _ = arguments(layout)
    momenta, scales = some_momenta(kind, grads)
    opcheck(operators.average_, (momenta, scales, [grads[0], None], 0.9, finite))


@pytest.mark.parametrize("bits", [8, 4])
def test_operators_on_few_bits_are_lawful(layout, bits):
    vectors, *_, finite, _ = arguments(layout)
    codes, scales = operators.unpacked_numbers(lowbit(vectors, bits))
    opcheck(operators.add_lowbit_, ([torch.randn_like(x) for x in vectors], codes, scales))
    keys = [torch.tensor([3]), torch.tensor([5])] if bits == 4 else []
    opcheck(operators.store_lowbit_, (codes, scales, vectors, finite, keys))


@pytest.mark.parametrize("window", [1, 40])
def test_update_inverse_root_is_a_lawful_operator(window):
    root, gram = torch.eye(window, dtype=torch.float64), torch.eye(window, dtype=torch.float64)
    slot = torch.tensor([window // 2])
    opcheck(operators.update_inverse_root_, (root, root[window // 2].clone(), gram, slot, 0.5))


@pytest.mark.parametrize("limits", [(None, None), (0.5, 3.0)], ids=["no limits", "limits"])
def test_mfac_row_step_is_a_lawful_operator(limits):
    dots, slot = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([1])
    opcheck(operators.mfac_row_step_, (*new_state(3), dots, slot, torch.tensor(True), 0.01, 1e-7, *limits))


def operations(grads, errors, rows, slot, finite, keys):
    kernels.undo_compress_(grads, errors, rows, slot, kernels.compress_(grads, errors, rows, slot, keys), keys)
    dots = kernels.window_dots(rows, slot)
    step = torch.tensor(0.5)
    gram = torch.outer(dots, dots)
    root = torch.eye(len(dots), dtype=torch.float64)
    weights, _ = kernels.update_inverse_root_(root, root.index_select(0, slot).squeeze(0), gram, slot, 0.5)
    kernels.window_apply_(grads, errors, rows, kernels.Update(weights, step, step, step, True))
    return dots


def assert_same_tensors(given, copies):
    for one, other in zip(tree_leaves(given), tree_leaves(copies), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_graph_holds_each_operation_as_one_node(layout):
    torch._dynamo.reset()
    nodes = []

    def backend(graph, inputs):
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    given = arguments(layout)
    copies = deepcopy(given)
    expected = operations(*given)
    actual = torch.compile(operations, fullgraph=True, backend=backend)(*copies)
    assert torch.equal(expected, actual)
    assert_same_tensors(given, copies)
    ours = [str(node).rsplit("efcp.", 1)[1] for node in nodes if "efcp." in str(node)]
    assert [name.split(".")[0] for name in ours] == OPERATORS, nodes


def test_functional_graph_gives_the_same_bits(layout):
    """Ahead-of-time autograd makes changes in place functional, and back."""
    torch._dynamo.reset()
    given = arguments(layout)
    copies = deepcopy(given)
    expected = operations(*given)
    actual = torch.compile(operations, fullgraph=True, backend="aot_eager")(*copies)
    assert torch.equal(expected, actual)
    assert_same_tensors(given, copies)


def test_an_eager_step_calls_no_operator(monkeypatch):
    for name in OPERATORS:
        monkeypatch.delattr(operators, name)
    operations(*arguments(LAYOUTS[1]))


def test_compiled_model(cls, options):
    torch._dynamo.reset()
    problem, compiled = Regression(cls, options), Regression(cls, options)
    model = torch.compile(compiled.model, backend="aot_eager")
    for _ in range(5):
        problem.step()
        compiled.optimizer.zero_grad()
        compiled.loss(model).backward()
        compiled.optimizer.step()
    torch.testing.assert_close(problem.flat(), compiled.flat())


def check_compiled_step(cls, options, steps):
    torch._dynamo.reset()
    problem, compiled = Regression(cls, options), Regression(cls, options)
    step = torch.compile(compiled.optimizer.step, backend="eager")
    for _ in range(steps):
        problem.step()
        compiled.backward()
        step()
    assert_same(problem, compiled)


@pytest.mark.parametrize(
    "cls",
    [SparseMFAC8, *(pytest.param(cls, marks=pytest.mark.slow) for cls in (SparseMFAC, SparseGGT4, MicroAdam))],
    ids=lambda cls: cls.__name__,
)
def test_compiled_step(cls):
    """Graphs break where state is made and blocks are looked up; results are those of the eager step, bit for bit."""
    check_compiled_step(cls, small(cls), 4)


@pytest.mark.slow
def test_compiled_step_of_all(cls, options):
    more = {"weight_decay": 0.1} | ({} if cls is MicroAdam else {"momentum": 0.5})  # MicroAdam has its own
    check_compiled_step(cls, options | more, 6)
