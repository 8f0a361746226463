"""Which tensors compiled code may read and write, and that every backend refuses all others before it changes one."""

from itertools import product

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from efcp import kernels
from efcp.kernels import Blocks, RowStep, SparseRows, Update, use_backend
from efcp.kernels.addresses import (
    addresses,
    check_group,
    check_numbers,
    check_weights,
    gradient_addresses,
    group_addresses,
    has_plain_storage,
    is_fake,
)
from efcp.kernels.gpus import architecture

CPU = torch.device("cpu")
GUARD = 64  # elements on either side of a guarded tensor
WINDOW, SIZES = 3, [20, 7]


class Named(torch.Tensor):
    """A subclass that leaves PyTorch's operations, and hence the memory, as they are."""


def neg(numel, dtype=torch.float32):
    """A contiguous tensor with a lazy negative bit, as conjugation leaves them."""
    tensor = torch._neg_view(torch.randn(numel).to(dtype))
    assert tensor.is_neg()
    assert tensor.is_contiguous()
    return tensor


def fake(*shape, dtype=torch.float32):
    with FakeTensorMode():
        return torch.zeros(shape, dtype=dtype)


# ---- the rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_address_is_that_of_the_first_element(dtype):
    base = torch.zeros(9, dtype=dtype)
    assert addresses("x", [base, base[4:]], dtype, CPU, [9, 5]) == [
        base.data_ptr(),
        base.data_ptr() + 4 * dtype.itemsize,
    ]


@pytest.mark.parametrize("cls", [torch.nn.Parameter, Named], ids=lambda cls: cls.__name__)
def test_subclasses_that_keep_their_memory_have_an_address(cls):
    tensor = torch.zeros(4).as_subclass(cls) if cls is Named else cls(torch.zeros(4))
    assert has_plain_storage(type(tensor))
    assert addresses("x", [tensor], torch.float32, CPU, [4]) == [tensor.data_ptr()]


REFUSED = {
    "too few elements": (lambda: torch.zeros(4), ValueError),
    "too many elements": (lambda: torch.zeros(6), ValueError),
    "no elements": (lambda: torch.zeros(0), ValueError),
    "another dtype": (lambda: torch.zeros(5, dtype=torch.float64), ValueError),
    "another dtype of the same size": (lambda: torch.zeros(5, dtype=torch.int32), ValueError),
    "on the meta device": (lambda: torch.zeros(5, device="meta"), ValueError),
    "a step between elements": (lambda: torch.zeros(10)[::2], ValueError),
    "the same element five times": (lambda: torch.zeros(1).expand(5), ValueError),
    "a negative bit": (lambda: neg(5), ValueError),
    "two tensors in one": (lambda: TwoTensor(torch.zeros(5), torch.zeros(5)), TypeError),
    "a fake tensor": (lambda: fake(5), TypeError),
    "None": (lambda: None, TypeError),
    "a list": (lambda: [0.0] * 5, TypeError),
}
refused = pytest.mark.parametrize(("make", "error"), REFUSED.values(), ids=REFUSED)


@refused
def test_what_breaks_a_rule_has_no_address(make, error):
    with pytest.raises(error, match=r"^x must (be|have) "):
        addresses("x", [make()], torch.float32, CPU, [5])
    with pytest.raises(error, match=r"^x\[1\] must (be|have) "):
        addresses("x", [torch.zeros(5), make()], torch.float32, CPU, [5, 5])


def test_refusal_says_what_is_allowed_and_what_was_given():
    message = (
        r"^x must be contiguous, with 5 elements of torch.float32 on cpu and without a negative bit, "
        r"got 4 elements of torch.float64 on cpu, strides \(1,\), with a negative bit$"
    )
    with pytest.raises(ValueError, match=message):
        addresses("x", [neg(4, torch.float64)], torch.float32, CPU, [5])


def test_none_has_address_zero_only_where_it_may_stand_for_a_tensor():
    tensor = torch.zeros(5)
    found = addresses("x", [None, tensor], torch.float32, CPU, [5, 5], may_lack=True)
    assert found == [0, tensor.data_ptr()]
    with pytest.raises(TypeError, match=r"^x\[0\] must be a tensor, got a NoneType$"):
        addresses("x", [None, tensor], torch.float32, CPU, [5, 5])


def test_another_number_of_tensors_is_refused():
    with pytest.raises(ValueError, match=r"^x must hold 2 tensors, got 1$"):
        addresses("x", [torch.zeros(5)], torch.float32, CPU, [5, 5])


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3), False),
        (torch.zeros(3, device="meta"), True),
        (fake(3), True),
        (TwoTensor(torch.zeros(3), torch.zeros(3)), False),
    ],
    ids=["tensor", "meta", "fake", "two tensors"],
)
def test_fake_tensors_are_told_from_others(tensor, expected):
    assert is_fake(tensor) is expected


@pytest.mark.parametrize("make", [lambda: torch.zeros(5, device="meta"), lambda: fake(5)], ids=["meta", "fake"])
def test_fake_tensors_obey_the_same_rules_among_themselves(make):
    tensor = make()
    assert addresses("x", [tensor], torch.float32, tensor.device, [5], fake=True) == [0]
    with pytest.raises(ValueError, match=r"^x must be contiguous, with 6 elements"):
        addresses("x", [tensor], torch.float32, tensor.device, [6], fake=True)
    with pytest.raises(TypeError, match=r"^x must be fake, as other tensors are, got a Tensor on cpu"):
        addresses("x", [torch.zeros(5)], torch.float32, tensor.device, [5], fake=True)


def make_rows(block_size=8, window=WINDOW, values=torch.bfloat16, sizes=SIZES):
    found = []
    for numel in sizes:
        blocks = Blocks(numel, block_size, 0.5)
        shape = (blocks.count, window, blocks.kept)
        index = torch.arange(blocks.kept, dtype=blocks.index_dtype).expand(shape).contiguous()
        found.append(SparseRows(torch.randn(shape).to(values), index, blocks))
    return found


def test_a_group_has_an_address_for_each_tensor_and_zero_for_what_is_not_there():
    rows, grads = make_rows(), [None, torch.zeros(7)]
    values, indices, grad, error = group_addresses(rows, CPU, grads=grads, errors=[])
    assert values == [r.values.data_ptr() for r in rows]
    assert indices == [r.indices.data_ptr() for r in rows]
    assert grad == [0, grads[1].data_ptr()]
    assert error == [0, 0]


@pytest.mark.parametrize("name", ["errors", "targets", "momenta"])
def test_in_a_group_only_gradients_may_be_none(name):
    with pytest.raises(TypeError, match=rf"^{name}\[1\] must be a tensor, got a NoneType$"):
        group_addresses(make_rows(), CPU, **{name: [torch.zeros(20), None]})


@pytest.mark.parametrize("name", ["grads", "targets"])
def test_gradients_and_targets_may_not_be_left_out(name):
    with pytest.raises(ValueError, match=rf"^{name} must hold 2 tensors, got 0$"):
        check_group(make_rows(), **{name: []})


@pytest.mark.parametrize("other", [{"block_size": 16}, {"window": WINDOW + 1}], ids=["block size", "window"])
def test_rows_of_a_group_must_belong_together(other):
    rows = [*make_rows(), *make_rows(**other)]
    with pytest.raises(ValueError, match=r"^rows must have the same window, block size and density, got Blocks"):
        check_group(rows)


def test_numbers_must_have_one_element_of_their_dtype():
    like = torch.zeros(3)
    check_numbers(like, slot=torch.tensor([1]), finite=torch.tensor(True), scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^slot must be contiguous, with 1 elements of torch.int64 on cpu"):
        check_numbers(like, slot=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^finite must be contiguous, with 1 elements of torch.bool"):
        check_numbers(like, finite=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"^scale must be of dtype float16, .*, float64, got torch.int64$"):
        check_numbers(like, scale=torch.tensor(1))


def test_weights_are_made_contiguous():
    weights, one = torch.arange(10.0)[::2], torch.tensor(1.0)
    update = Update(weights, one, one)
    assert check_weights(weights, update, 5)[1] is None
    for found in check_weights(weights, update._replace(square_weights=weights), 5):
        assert torch.equal(found, weights)
        assert found.is_contiguous()


def test_gradients_must_be_of_one_dtype_and_on_the_device():
    grads = [torch.zeros(3), torch.zeros(0), torch.zeros(8)]
    assert gradient_addresses(grads) == [grad.data_ptr() for grad in grads]
    with pytest.raises(ValueError, match=r"^grads\[1\] must be contiguous, with 8 elements of torch.float32 on cpu"):
        gradient_addresses([torch.zeros(3), torch.zeros(8, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"^grads must be contiguous, with 3 elements of torch.float32 on cuda:0"):
        gradient_addresses([torch.zeros(3)], torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"^grads must hold at least one tensor, got none$"):
        gradient_addresses([])


# ---- the operations: one argument after the other is spoilt


FACTORS = ("target_factor", "update_factor", "momentum_factor", "eps")
OF_UPDATE, COUNTERS = RowStep._fields[4:7], RowStep._fields[7:]


def all_arguments():
    """Arguments of each operation, all as they must be."""
    one = torch.ones((), dtype=torch.float64)

    def vectors():
        return [torch.randn(numel) for numel in SIZES]

    return {
        "norm_is_finite": {"grads": vectors()},
        "compress_": {
            "grads": vectors(), "errors": vectors(), "rows": make_rows(),
            "slot": torch.tensor([1]),
        },
        "undo_compress_": {
            "grads": vectors(), "errors": vectors(), "rows": make_rows(),
            "slot": torch.tensor([1]), "finite": torch.tensor(False),
        },
        "window_dots": {"rows": make_rows(), "slot": torch.tensor([1])},
        "window_apply_": {
            "targets": vectors(), "momenta": vectors(), "rows": make_rows(),
            "weights": torch.randn(WINDOW, dtype=torch.float64),
            "square_weights": torch.rand(WINDOW, dtype=torch.float64),
            **dict.fromkeys(FACTORS, one),
        },
        "update_inverse_root_": {
            "R": torch.eye(WINDOW, dtype=torch.float64), "column": torch.eye(WINDOW, dtype=torch.float64)[1],
            "S": torch.eye(WINDOW, dtype=torch.float64), "slot": torch.tensor([1]), "ridge": 0.5,
        },
        "mfac_row_step_": {
            "S": torch.eye(WINDOW, dtype=torch.float64), "R": torch.eye(WINDOW, dtype=torch.float64),
            "column": torch.eye(WINDOW, dtype=torch.float64)[1], "weights": torch.zeros(WINDOW, dtype=torch.float64),
            **{name: one.clone() for name in OF_UPDATE}, **{name: torch.tensor(2) for name in COUNTERS},
            "dots": torch.eye(WINDOW, dtype=torch.float64)[1], "slot": torch.tensor([1]),
            "finite": torch.tensor(True), "damping": 0.5, "rounding": 1e-7,
        },
    }  # fmt: skip


def resized(tensor, numel):
    return tensor.new_zeros(numel)


SPOILT = {
    "one element more": lambda t: resized(t, t.numel() + 1),
    "one element less": lambda t: resized(t, t.numel() - 1),
    "another dtype": lambda t: t.to(torch.int16 if t.dtype != torch.int16 else torch.int32),
    "complex": lambda t: t.to(torch.complex64),
    "on the meta device": lambda t: t.to("meta"),
    "a step": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "a negative bit": lambda t: torch._neg_view(t.clone()),
    "two tensors": lambda t: TwoTensor(t.clone(), t.clone()),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
}
SPOILABLE = {
    "norm_is_finite": ["grads"],
    "compress_": ["grads", "errors", "values", "indices", "slot"],
    "undo_compress_": ["grads", "errors", "values", "indices", "slot", "finite"],
    "window_dots": ["values", "indices", "slot"],
    "window_apply_": ["targets", "momenta", "values", "indices", "weights", "square_weights", *FACTORS],
    "update_inverse_root_": ["R", "column", "S", "slot"],
    "mfac_row_step_": ["S", "R", "column", "weights", *OF_UPDATE, *COUNTERS, "dots", "slot", "finite"],
}
# Of these, tensors with steps are as good.
NUMBERS = ("slot", "finite", "weights", "square_weights", *FACTORS, *OF_UPDATE, *COUNTERS)


def spoilt_arguments():
    """(operation, argument, way to spoil it), where that is not allowed."""
    for (operation, names), spoilt in product(SPOILABLE.items(), SPOILT):
        for name in names:
            any_size = operation == "norm_is_finite" and spoilt.startswith("one element")
            has_no_sign = name in ("indices", "slot", "finite", *COUNTERS) and spoilt == "a negative bit"
            if not (any_size or has_no_sign or (name in NUMBERS and spoilt in ("a step", "expanded"))):
                yield pytest.param(operation, name, spoilt, id=f"{operation}-{name}-{spoilt}")


def spoil(arguments, name, how):
    """Replaces the last tensor of an argument."""
    if name in ("values", "indices"):
        rows = arguments["rows"]
        rows[-1] = rows[-1]._replace(**{name: how(getattr(rows[-1], name))})
    elif isinstance(arguments[name], list):
        arguments[name][-1] = how(arguments[name][-1])
    else:
        arguments[name] = how(arguments[name])


def tensors_in(value):
    """Every tensor with memory in a nest of lists and tuples."""
    if isinstance(value, torch.Tensor):
        return [value] if type(value) is torch.Tensor and not value.is_meta else []
    if isinstance(value, (list, tuple, dict)):
        return [t for v in (value.values() if isinstance(value, dict) else value) for t in tensors_in(v)]
    return []


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu":
        pytest.importorskip("numba")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=["reference", "cpu", "triton", "triton without Gluon"])
def refusing_backend(request, monkeypatch):
    """Any backend: to refuse arguments Triton needs no GPU, as long as it does not ask what that has."""
    name = request.param.split()[0]
    if name != "reference":
        pytest.importorskip({"cpu": "numba"}.get(name, name))
    if name == "triton":
        from efcp.kernels import triton as triton_ops

        if triton_ops.HAS_GLUON:
            monkeypatch.setattr(triton_ops, "HAS_GLUON", request.param == "triton")
            monkeypatch.setattr(triton_ops, "_shared_memory", lambda *_: architecture(120).program_shared)
            for module in (triton_ops.apply, triton_ops.dots):
                monkeypatch.setattr(module, "at_most_registers", lambda *_: {})
        elif request.param == "triton":
            pytest.skip("this version of Triton has no Gluon")
    with use_backend(name):
        yield request.param


def call(operation, arguments):
    """Calls an operation, the weights and factors of `window_apply_` in one, and the state of `mfac_row_step_`."""
    own = dict(arguments)
    if operation == "mfac_row_step_":
        own = {"state": RowStep(*(own.pop(name) for name in SPOILABLE[operation][: len(RowStep._fields)])), **own}
    if operation == "window_apply_":
        own["update"] = Update(**{name: own.pop(name) for name in ("weights", "square_weights", *FACTORS)})
    return getattr(kernels, operation)(*own.values())


def check_refused(operation, arguments, error, message):
    """An operation raises an error, and leaves all of its arguments as they were."""
    before = [t.clone() for t in tensors_in(arguments)]
    with pytest.raises(error, match=message):
        call(operation, arguments)
    for tensor, old in zip(tensors_in(arguments), before, strict=True):
        assert torch.equal(tensor, old)


@pytest.mark.parametrize(("operation", "name", "spoilt"), [*spoilt_arguments()])
def test_operation_refuses_an_argument_by_name_and_changes_nothing(operation, name, spoilt, refusing_backend):
    arguments = all_arguments()[operation]
    spoil(arguments, name, SPOILT[spoilt])
    odd_one = name
    if spoilt in ("on the meta device", "fake"):  # one is, and another is not
        odd_one = {"R": "(R|column)", "dots": "weights"}.get(name, name)
    check_refused(operation, arguments, (TypeError, ValueError), rf"^{odd_one}(\[\d\])? must ")


@pytest.mark.parametrize(
    ("operation", "name"), [("compress_", "errors"), ("window_apply_", "targets"), ("window_apply_", "momenta")]
)
def test_operation_takes_none_for_gradients_alone(operation, name, refusing_backend):
    arguments = all_arguments()[operation]
    spoil(arguments, name, lambda _: None)
    check_refused(operation, arguments, TypeError, rf"^{name}\[1\] must be a tensor, got a NoneType$")


@pytest.mark.parametrize(
    ("operation", "name", "left"),
    [
        ("compress_", "grads", 0),
        ("compress_", "grads", 1),
        ("compress_", "errors", 1),
        ("window_apply_", "targets", 0),
        ("window_apply_", "targets", 1),
        ("window_apply_", "momenta", 1),
    ],
)
def test_operation_refuses_too_few_tensors(operation, name, left, refusing_backend):
    arguments = all_arguments()[operation]
    del arguments[name][left:]
    check_refused(operation, arguments, ValueError, rf"^{name} must hold 2 tensors, got {left}$")


def test_every_argument_with_tensors_is_spoilt():
    for operation, arguments in all_arguments().items():
        rows = {"values", "indices"} if "rows" in arguments else set()
        assert {*SPOILABLE[operation]} == rows | arguments.keys() - {"rows", "ridge", "damping", "rounding"}


# ---- momenta, and numbers of few bits


def operations_on_numbers():
    """Arguments of operations, all as they must be; numbers of few bits as [codes, scales]."""

    def vectors():
        return [torch.randn(numel) for numel in SIZES]

    def lowbit(bits):
        return [list(kernels.allocate_lowbit(numel, bits, torch.device("cpu"))) for numel in SIZES]

    def errors(bits):
        return [list(kernels.allocate_lowbit(r.blocks.numel, bits, CPU, r.blocks.size)) for r in make_rows()]

    finite, slot = torch.tensor(True), torch.tensor([1])
    keys = [torch.tensor([number]) for number in range(len(SIZES))]
    return {
        "average_": [vectors(), vectors(), 0.9, finite],
        "average_ in 8 bits": [lowbit(8), vectors(), 0.9, finite],
        "add_lowbit_ of 8 bits": [vectors(), lowbit(8)],
        "add_lowbit_ of 4 bits": [vectors(), lowbit(4)],
        "store_lowbit_ of 8 bits": [lowbit(8), vectors(), finite, []],
        "store_lowbit_ of 4 bits": [lowbit(4), vectors(), finite, keys],
        "window_dots": [make_rows(), slot, vectors()],
        "window_dots in 8 bits": [make_rows(), slot, lowbit(8)],
        "compress_ with errors in 8 bits": [vectors(), errors(8), make_rows(), slot],
        "compress_ with errors in 4 bits": [vectors(), errors(4), make_rows(), slot, keys],
    }


def places(value, path=()):
    """The paths to all tensors in a nest of lists."""
    if isinstance(value, torch.Tensor):
        yield path
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from places(item, (*path, number))


def called(operation, arguments):
    """Calls an operation, with pairs of codes and scales as `LowBit`."""

    def numbers(value):
        pairs = isinstance(value, list) and value and isinstance(value[0], list)
        return [kernels.LowBit(*pair) for pair in value] if pairs else value

    return getattr(kernels, operation.split()[0])(*map(numbers, arguments))


@pytest.mark.parametrize("operation", operations_on_numbers())
def test_operation_on_numbers_takes_what_is_right(operation, backend):
    called(operation, operations_on_numbers()[operation])


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("operation", operations_on_numbers())
def test_operation_on_numbers_refuses_any_tensor_that_is_spoilt(operation, spoilt, refusing_backend):
    for place in places(operations_on_numbers()[operation]):
        arguments = operations_on_numbers()[operation]
        *way, last = place
        where = arguments
        for step in way:
            where = where[step]
        tensor = where[last]
        single = tensor.numel() == 1 and spoilt in ("a step", "expanded")
        if single or (tensor.dtype == torch.bool and spoilt == "a negative bit"):
            continue  # as good as before, or not possible
        if spoilt == "a negative bit" and not tensor.is_floating_point():
            continue
        if "4 bits" in operation and spoilt.startswith("one element") and tensor.numel() in SIZES:
            continue  # one more or less may have as many codes
        where[last] = SPOILT[spoilt](tensor)
        before = [t.clone() for t in tensors_in(arguments)]
        with pytest.raises((TypeError, ValueError), match="must"):
            called(operation, arguments)
        assert all(torch.equal(t, old) for t, old in zip(tensors_in(arguments), before, strict=True))


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        ("average_", lambda a: a[0].clear(), "momenta must hold at least one tensor, got none"),
        ("average_", lambda a: a[1].pop(), "grads must hold 2 tensors, got 1"),
        ("store_lowbit_ of 4 bits", lambda a: a[3].pop(), "keys must hold 2 tensors, got 1"),
        ("store_lowbit_ of 4 bits", lambda a: a[1].pop(), "keys must hold 1 tensors, got 2"),
        ("add_lowbit_ of 8 bits", lambda a: a[1].pop(), "numbers must hold 2 tensors, got 1"),
        ("window_dots", lambda a: a[2].pop(), "momenta must hold 2 tensors, got 1"),
        ("compress_ with errors in 8 bits", lambda a: a[1].pop(), "errors must hold 2 tensors, got 1"),
        ("compress_ with errors in 4 bits", lambda a: a[4].clear(), "keys must hold 2 tensors, got 0"),
    ],
    ids=[
        *("no momenta", "too few gradients", "too few keys", "too few values", "too few numbers", "too few momenta"),
        *("too few errors", "no keys"),
    ],
)
def test_operation_on_numbers_refuses_another_number_of_them(operation, change, message, refusing_backend):
    arguments = operations_on_numbers()[operation]
    change(arguments)
    with pytest.raises(ValueError, match=message):
        called(operation, arguments)


def test_errors_are_all_of_one_kind(refusing_backend):
    grads, (few, _), rows, slot = operations_on_numbers()["compress_ with errors in 8 bits"]
    mixed = [kernels.LowBit(*few), torch.zeros(SIZES[1])]
    with pytest.raises(TypeError, match=r"^errors\[1\] must be a LowBit, as others are, got a Tensor$"):
        kernels.compress_(grads, mixed, rows, slot)
    with pytest.raises(TypeError, match=r"^errors\[1\] must be a tensor, got a LowBit$"):
        kernels.compress_(grads[::-1], mixed[::-1], rows[::-1], slot)


@pytest.mark.parametrize("name", ["square_weights", "eps"])
def test_square_weights_and_eps_go_together(name, refusing_backend):
    arguments = all_arguments()["window_apply_"]
    arguments[name] = None
    check_refused("window_apply_", arguments, ValueError, "eps must be (None without|a tensor with) square_weights")


def test_momenta_in_8_bits_are_not_written(refusing_backend):
    arguments = all_arguments()["window_apply_"]
    arguments["momenta"] = [kernels.allocate_lowbit(numel, 8, torch.device("cpu")) for numel in SIZES]
    update = Update(**{name: arguments[name] for name in ("weights", *FACTORS[:3])}, writes_momenta=True)
    with pytest.raises(ValueError, match="momenta must be floating point where they are written, got 8 bits"):
        kernels.window_apply_(arguments["targets"], arguments["momenta"], arguments["rows"], update)


# ---- no operation touches what lies beside its tensors


def guarded(tensor, sentinel):
    """A copy of a tensor within a larger buffer of sentinels, and that buffer."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), sentinel, dtype=tensor.dtype)
    inside = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside, buffer


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [8, 300], ids=lambda size: f"block-{size}")
@pytest.mark.parametrize("sizes", [[1, 63], [0, 257], [1000, 8, 5]], ids=str)
def test_operations_touch_nothing_beside_their_tensors(sizes, block_size, grad, backend):
    """Beside them lies NaN, which would spoil all that is computed from it; results are those without neighbours."""
    results, buffers = [], []
    for with_guards in (False, True):
        torch.manual_seed(0)

        def place(tensor, sentinel=torch.nan, with_guards=with_guards):
            if not with_guards:
                return tensor
            inside, buffer = guarded(tensor, sentinel)
            buffers.append((buffer, tensor.numel(), sentinel))
            return inside

        rows = [
            SparseRows(place(r.values), place(r.indices, 77), r.blocks)
            for r in make_rows(block_size=block_size, sizes=sizes)
        ]
        grads, errors, targets, momenta = ([place(torch.randn(n).to(grad)) for n in sizes] for _ in range(4))
        slot, weights = place(torch.tensor([1]), 99), place(torch.randn(WINDOW))
        numbers = [place(torch.tensor(x)) for x in (0.9, -0.1, 0.5)]
        assert kernels.norm_is_finite(grads)
        few = [[kernels.allocate_lowbit(r.blocks.numel, bits, CPU, r.blocks.size) for r in rows] for bits in (8, 4)]
        few = [[kernels.LowBit(place(x.codes, 77), place(x.scales)) for x in some] for some in few]
        for some in (*few, errors):
            keys = [place(torch.tensor([5]), 99) for _ in sizes]
            kernels.compress_(grads, some, rows, slot, keys)
            if some is not errors:  # the row is there once more
                kernels.undo_compress_(grads, some, rows, slot, torch.tensor(False), keys)
        dots = kernels.window_dots(rows, slot)
        kernels.window_apply_(targets, momenta, rows, Update(weights, *numbers))
        lowbit = [tensor for some in few for numbers in some for tensor in numbers]
        results.append([*lowbit, *errors, *targets, *momenta, dots, *(t for r in rows for t in r[:2])])
    for buffer, numel, sentinel in buffers:
        outside = torch.cat([buffer[:GUARD], buffer[GUARD + numel :]])
        assert outside.isnan().all() if sentinel != sentinel else (outside == sentinel).all()
    for alone, guarded_result in zip(*results, strict=True):
        assert torch.equal(alone, guarded_result)


@pytest.mark.usefixtures("refusing_backend")
def test_float64_values_are_refused():
    """Kernels read values of 16 and 32 bits: of 64 they would read other numbers."""
    blocks = Blocks(8, 8, 0.5)
    rows = [
        SparseRows(torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 4, dtype=blocks.index_dtype), blocks)
    ]
    with pytest.raises(TypeError, match=r"^values must be of dtype float16, bfloat16, float32, got torch\.float64$"):
        kernels.window_dots(rows, torch.tensor([0]))
