"""Parameters and gradients of every kind: views, signs that are put off, other sizes, tensors without memory.

What can be stepped gives the bits that plain copies give, and nothing beside it is touched. What cannot be is refused
by name, before anything has changed.
"""

import copy

import pytest
import torch
from torch import distributed
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor

from efcp import estimate_memory, memory_report
from efcp.kernels import use_backend
from tests.contract.optimizers import Regression, assert_same, knows_length, momentum_of

GUARD = 16  # elements of a storage on either side of a view


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    if request.param == "cpu":
        pytest.importorskip("numba")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def thorough(cls, options):
    """Options that use everything that a class has."""
    return options | momentum_of(cls) | {"weight_decay": 0.1} | ({"beta1": 0.5} if "GGT" in cls.__name__ else {})


# ---- views


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Views:
    """Random tensors of random strides, and their storages, which hold sentinels wherever the tensors do not lie."""

    def __init__(self, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.storages = []

    def number(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def choose(self, *some):
        return some[self.number(0, len(some) - 1)]

    def shape(self):
        return [self.number(0 if self.number(0, 5) == 0 else 1, 5) for _ in range(self.number(0, 4))]

    def storage(self, numel, dtype):
        """A guarded buffer of so many random numbers."""
        buffer = torch.full((numel + 2 * GUARD,), torch.nan, dtype=dtype)
        inside = buffer[GUARD : GUARD + numel]
        inside.copy_(torch.randn(numel, generator=self.random))
        self.storages.append(buffer)
        return inside

    def strided(self, shape, dtype):
        """Dimensions in any order in memory, each with gaps before, between and after its elements."""
        order = torch.randperm(len(shape), generator=self.random).tolist()
        gaps = [(self.number(0, 2), self.number(1, 3), self.number(0, 2)) for _ in shape]
        if self.number(0, 2) == 0:
            gaps = [(0, 1, 0)] * len(shape)
        sizes = [before + max(size, 1) * step + after for size, (before, step, after) in zip(shape, gaps, strict=True)]
        base = self.storage(torch.Size(sizes).numel(), dtype).view([sizes[i] for i in order])
        view = base.permute(torch.tensor(order, dtype=torch.int64).argsort().tolist())
        for dim, (size, (before, step, _)) in enumerate(zip(shape, gaps, strict=True)):
            view = view.narrow(dim, before, max(size, 1) * step)
            view = view[(slice(None),) * dim + (slice(None, size * step, step),)]
        return view

    def channels_last(self, dtype):
        shape = [self.number(1, 3) for _ in range(4)]
        return self.storage(torch.Size(shape).numel(), dtype).as_strided(
            shape, torch.empty(shape).to(memory_format=torch.channels_last).stride(), GUARD
        )

    def conjugated(self, shape, dtype):
        """The imaginary parts of conjugated numbers, which have a negative bit and a gap between elements."""
        pairs = self.storage(2 * torch.Size(shape).numel(), dtype).view(*shape, 2)
        return torch.view_as_complex(pairs).conj().imag

    def param(self, dtype):
        kind = self.choose("strided", "strided", "channels last", "negative", "conjugated")
        if kind == "channels last":
            return self.channels_last(dtype)
        if kind == "conjugated" and dtype in (torch.float32, torch.float64):
            return self.conjugated(self.shape(), dtype)
        view = self.strided(self.shape(), dtype)
        return torch._neg_view(view) if kind == "negative" else view

    def grad(self, shape, dtype):
        kind = self.choose("strided", "strided", "expanded", "negative", "conjugated", "scalar")
        if kind == "scalar":
            return self.strided([], dtype).expand(shape)
        if kind == "expanded":
            return self.strided([size if self.number(0, 1) else min(size, 1) for size in shape], dtype).expand(shape)
        if kind == "conjugated" and dtype in (torch.float32, torch.float64):
            return self.conjugated(list(shape), dtype)
        view = self.strided(list(shape), dtype)
        return torch._neg_view(view) if kind == "negative" else view


def plain(tensor):
    """A copy with elements one after the other, and their signs applied."""
    copied = tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)
    assert not copied.is_neg()
    assert copied.is_contiguous()
    return copied


def bits(tensor):
    """Its elements as integers, so that NaN is equal to itself and 0 is not −0."""
    return plain(tensor).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def outside(storage, view):
    """The elements of a storage that a view of it does not show."""
    flags = torch.ones(len(storage), dtype=torch.bool)
    flags.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return bits(storage)[flags]


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 16))])
def test_views_step_as_plain_copies_do_and_nothing_beside_them_changes(cls, thorough, backend, seed):
    views = Views(seed)
    dtypes = [views.choose(*DTYPES) for _ in range(3)]
    params = [views.param(dtype) for dtype in dtypes]
    storages = views.storages
    ours, theirs = [Parameter(p) for p in params], [Parameter(plain(p)) for p in params]
    for own, p in zip(ours, params, strict=True):
        assert own.data_ptr() == p.data_ptr()
        assert own.stride() == p.stride()
        assert own.is_neg() == p.is_neg()
    one, other = cls(ours, **thorough), cls(theirs, **thorough)
    around = [outside(storage, p) for storage, p in zip(storages, params, strict=True)]
    for _ in range(4):
        views.storages = []
        for p, q in zip(ours, theirs, strict=True):
            p.grad = views.grad(p.shape, p.dtype)
            q.grad = plain(p.grad)
        given = [storage.clone() for storage in views.storages]
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(bits(p), bits(q))
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(views.storages, given, strict=True))
    for storage, p, before in zip(storages, params, around, strict=True):
        assert torch.equal(outside(storage, p), before)
    for p, q in zip(ours, theirs, strict=True):
        assert one.state[p].keys() - one.shared.keys() == other.state[q].keys() - other.shared.keys()
        for name in one.state[p].keys() - {"numel", "version", "pending"}:
            value = one.state[p][name]
            assert not torch.is_tensor(value) or torch.equal(value, other.state[q][name]), name


def test_a_column_is_stepped_and_its_neighbour_stays(cls, thorough, backend):
    base = torch.zeros(10, 2)
    p, q = Parameter(base[:, 0]), Parameter(torch.zeros(10))
    one, other = cls([p], **thorough), cls([q], **thorough)
    for _ in range(3):
        p.grad = torch.autograd.grad(p.sum(), p)[0]
        q.grad = torch.ones(10)
        assert p.grad.stride() == (0,)
        one.step()
        other.step()
    assert torch.equal(base[:, 1], torch.zeros(10))
    assert torch.equal(base[:, 0], q)
    assert q.abs().max() > 0


OVERLAPPING = {
    "expanded": lambda: torch.zeros(1).expand(5),
    "one dimension expanded": lambda: torch.zeros(3, 1).expand(3, 4),
    "windows that overlap": lambda: torch.zeros(10).unfold(0, 3, 2),
    "strides that meet": lambda: torch.zeros(20).as_strided((3, 4), (3, 2)),
}


@pytest.mark.parametrize("make", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_parameter_that_overlaps_itself_is_refused_at_construction(cls, options, make):
    message = r"params must have an address for each element, got shape \(.*\) with strides \(.*\) for param_groups"
    with pytest.raises(ValueError, match=message):
        cls([Parameter(make())], **options)


@pytest.mark.parametrize("make", OVERLAPPING.values(), ids=OVERLAPPING)
def test_a_parameter_that_has_come_to_overlap_itself_is_refused_at_the_step(cls, options, make):
    p = Parameter(make().clone(memory_format=torch.contiguous_format))
    q, optimizer = steady(cls, options, p)
    p.data = make()
    refused(optimizer, [p, q], ValueError, r"^params must have an address for each element, .*\[0\], parameter 0$")


def test_strides_that_pass_between_each_other_are_no_overlap(cls, options):
    """Elements at 0, 3, 2, 5, 4, 7: neither dimension strides over the other, and yet none meet."""
    base = torch.randn(12)
    p = Parameter(base.as_strided((3, 2), (2, 3)))
    q, optimizer = Parameter(plain(p)), cls([p], **options)
    other = cls([q], **options)
    p.grad = torch.randn(3, 2)
    q.grad = p.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(p, q)


# ---- what is refused at a step, with nothing changed


def steady(cls, options, *params):
    """Another parameter, and an optimizer of all that has made two steps."""
    q = Parameter(torch.randn(4, 3))
    optimizer = cls([*params, q], **options)
    for _ in range(2):
        for p in (*params, q):
            p.grad = torch.randn(p.shape)
        optimizer.step()
    q.grad = torch.randn(4, 3)
    return q, optimizer


def snapshot(optimizer, params):
    """Copies of all that a step could change."""

    def copied(value):
        return value.clone() if torch.is_tensor(value) else copy.copy(value)

    state = {p: {name: copied(value) for name, value in own.items()} for p, own in optimizer.state.items()}
    shared = {name: copied(value) for name, value in optimizer.shared.items()}
    return [plain(p) for p in params if type(p.data) is torch.Tensor], state, shared


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refused(optimizer, params, error, message, times=2):
    """Every step raises the error and changes nothing."""
    before = snapshot(optimizer, params)
    for _ in range(times):
        with pytest.raises(error, match=message):
            optimizer.step()
        assert same(before, snapshot(optimizer, params))


SIZES = [((200,), (101,)), ((600,), (597,)), ((7,), (8,)), ((8,), (7,)), ((12, 5), (12, 6)), ((5,), ()), ((3,), (0,))]
sizes = pytest.mark.parametrize(("old", "new"), SIZES, ids=[f"{a}-to-{b}" for a, b in SIZES])
feedback = pytest.mark.parametrize("feedback", [True, False], ids=["", "no-error-feedback"])


@feedback
@sizes
def test_data_of_another_size_is_refused(cls, thorough, backend, old, new, feedback):
    p = Parameter(torch.randn(old))
    if "Dense" not in cls.__name__:
        thorough["error_feedback"] = feedback
    q, optimizer = steady(cls, thorough, p)
    p.grad, p.data = None, torch.randn(new)
    a, b = torch.Size(old).numel(), torch.Size(new).numel()
    message = (
        rf"^the state of a parameter must be for its size: param_groups\[0\], parameter 0 has {b} elements, its state "
        rf"is for {a}; delete optimizer.state\[p\] where a parameter is replaced by one of another size$"
    )
    refused(optimizer, [p, q], ValueError, message)  # without a gradient too, as it has a window
    p.grad = torch.randn(new)
    refused(optimizer, [p, q], ValueError, message)
    del optimizer.state[p]
    optimizer.step()


@feedback
@sizes
def test_state_moved_to_a_parameter_of_another_size_is_refused(cls, thorough, backend, old, new, feedback):
    p, pruned = Parameter(torch.randn(old)), Parameter(torch.randn(new))
    if "Dense" not in cls.__name__:
        thorough["error_feedback"] = feedback
    q, optimizer = steady(cls, thorough, p)
    optimizer.state[pruned] = optimizer.state.pop(p)
    optimizer.param_groups[0]["params"][0] = pruned
    pruned.grad = torch.randn(new)
    a, b = torch.Size(old).numel(), torch.Size(new).numel()
    message = rf"param_groups\[0\], parameter 0 has {b} elements, its state is for {a}; delete optimizer.state\[p\]"
    refused(optimizer, [pruned, q], ValueError, message)


@pytest.mark.parametrize("name", ["error", "momentum", "average"])
def test_state_of_which_a_tensor_has_another_size_is_refused(cls, thorough, backend, name):
    p = Parameter(torch.randn(6, 7))
    q, optimizer = steady(cls, thorough, p)
    if name not in optimizer.state[p]:
        pytest.skip(f"{cls.__name__} keeps no {name}")
    optimizer.state[p][name] = torch.zeros(41)
    p.grad = torch.randn(6, 7)
    refused(optimizer, [p, q], ValueError, rf"param_groups\[0\], parameter 0 has 42 elements, its {name} 41; delete")


SHAPES = [((12, 5), (5, 12)), ((12, 5), (60,)), ((60,), (12, 5)), ((12, 5), (6, 10)), ((2, 30), (12, 5))]


@pytest.mark.parametrize(("old", "new"), SHAPES, ids=[f"{a}-to-{b}" for a, b in SHAPES])
def test_another_shape_of_the_same_size_is_refused_where_the_window_depends_on_it(cls, thorough, old, new):
    p = Parameter(torch.randn(old))
    q, optimizer = steady(cls, thorough, p)
    p.grad, p.data = None, torch.randn(new)
    p.grad = torch.randn(new)
    if "LowRank" in cls.__name__:
        message = (
            r"^the state of a parameter must be for its shape: param_groups\[0\], parameter 0 is taken as \d+ × \d+"
        )
        refused(optimizer, [p, q], ValueError, message)
    else:
        optimizer.step()


def test_a_rank_that_keeps_no_factors_is_refused_with_nothing_changed():
    """It would add whole rows to a state that has factors."""
    from efcp import LowRankMFAC

    p = Parameter(torch.randn(12, 5))
    q, optimizer = steady(LowRankMFAC, {"rank": 2, "window": 4}, p)
    optimizer.param_groups[0]["rank"] = 60
    refused(optimizer, [p, q], ValueError, r"^rank must stay what it was, got 60$")
    optimizer.param_groups[0]["rank"] = 2
    optimizer.step()


# ---- tensors without memory of their own


def two(*shape):
    return TwoTensor(torch.randn(shape), torch.randn(shape))


def test_a_parameter_of_a_wrapper_class_is_refused_at_construction(cls, options):
    with pytest.raises(TypeError, match=r"^params must be tensors with memory of their own, got a TwoTensor for"):
        cls([Parameter(torch.randn(3)), Parameter(two(5))], **options)


def test_a_gradient_of_a_wrapper_class_is_refused(cls, thorough, backend):
    p = Parameter(torch.randn(5))
    q, optimizer = steady(cls, thorough, p)
    p.grad = two(5)
    message = (
        r"^gradients must be tensors with memory of their own, got a TwoTensor for param_groups\[0\], parameter 0$"
    )
    refused(optimizer, [p, q], TypeError, message)


def test_a_fake_gradient_of_a_real_parameter_is_refused(cls, thorough, backend):
    p = Parameter(torch.randn(5))
    q, optimizer = steady(cls, thorough, p)
    with FakeTensorMode():
        p.grad = torch.randn(5)
    refused(
        optimizer, [p, q], TypeError, r"^gradients must be fake if and only if their parameter is, got a FakeTensor"
    )


def test_a_parameter_that_has_become_one_of_a_wrapper_class_is_refused_at_the_step(cls, thorough):
    p = Parameter(torch.randn(5))
    _, optimizer = steady(cls, thorough, p)
    p.grad = None
    torch.utils.swap_tensors(p, Parameter(two(5)))
    p.grad = torch.randn(5)
    refused(
        optimizer, [], TypeError, r"^params must be tensors with memory of their own, got a TwoTensor for param_groups"
    )


NOT_DENSE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "MKL-DNN": lambda: torch.eye(3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(2)]),
}


@pytest.mark.filterwarnings("ignore")  # some of these are announced as experimental
@pytest.mark.parametrize("make", NOT_DENSE.values(), ids=NOT_DENSE)
def test_a_parameter_that_is_not_dense_is_refused_at_construction(cls, options, make):
    if make is NOT_DENSE["MKL-DNN"] and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch is built without MKL-DNN")
    with pytest.raises(TypeError, match=r"^params must be dense, got .* for param_groups\[0\], parameter 0$"):
        cls([make()], **options)


@pytest.mark.parametrize("first", [True, False], ids=["first-step", "later-step"])
def test_steps_of_real_parameters_are_refused_under_fake_tensor_mode(cls, thorough, backend, first):
    """They would leave fake state, or half a step."""
    p = Parameter(torch.randn(5))
    q, optimizer = steady(cls, thorough, p)
    if first:
        optimizer = cls([p, q], **thorough)
    with FakeTensorMode():
        for _ in range(2):
            with pytest.raises(
                TypeError, match=r"^params must be fake tensors in a step under FakeTensorMode, and in no"
            ):
                optimizer.step()
    other = cls([p, q], **thorough)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = plain(p)
    optimizer.step()
    after = plain(p)
    with torch.no_grad():
        p.copy_(before)
    other.step()
    assert torch.equal(p, after)
    assert not torch.equal(before, after)


def test_fake_parameters_are_refused_outside_their_mode(cls, thorough):
    """The state that a step would allocate for them would be real."""
    with FakeTensorMode():
        p = Parameter(torch.randn(5))
        p.grad = torch.randn(5)
        optimizer = cls([p], **thorough)
    with pytest.raises(
        TypeError, match=r"^params must be fake tensors in a step under FakeTensorMode, and in no other"
    ):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")
def test_a_distributed_gradient_of_a_plain_parameter_is_refused(cls, thorough, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = Parameter(torch.randn(5))
        q, optimizer = steady(cls, thorough, p)
        p.grad = DTensor.from_local(torch.randn(5), mesh, [Replicate()])
        refused(optimizer, [p, q], TypeError, r"^gradients must be tensors with memory of their own, got a DTensor for")
    finally:
        distributed.destroy_process_group()


# ---- fake tensors: shapes and dtypes without memory


def shapes_of(optimizer):
    return [
        {name: (value.shape, value.dtype) if torch.is_tensor(value) else value for name, value in state.items()}
        for state in optimizer.state_dict()["state"].values()
    ]


FAKES = [(12, 5), (7,), (), (0,)]


def train(cls, options, make, steps=6):
    params = [Parameter(make(shape)) for shape in FAKES]
    optimizer = cls(params, **options)
    for _ in range(steps):
        for p, shape in zip(params, FAKES, strict=True):
            p.grad = make(shape)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("extra", [{}, {"max_update_norm": 1.0}, {"refresh_every": 2}], ids=str)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_steps_on_tensors_without_memory_give_the_state_of_real_ones(cls, thorough, kind, extra):
    if "refresh_every" in extra and "GGT" not in cls.__name__:
        pytest.skip("M-FAC has no refresh_every")
    if "max_update_norm" in extra and not knows_length(cls):
        pytest.skip("it does not know the length of updates")
    options = thorough | extra
    _, real = train(cls, options, torch.randn)
    if kind == "fake":
        with FakeTensorMode():
            params, optimizer = train(cls, options, torch.randn)
    else:
        params, optimizer = train(cls, options, lambda shape: torch.randn(shape, device="meta"))
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert all(isinstance(t, FakeTensor) if kind == "fake" else t.is_meta for t in [*params, *tensors])
    assert shapes_of(optimizer) == shapes_of(real)
    assert memory_report(optimizer) == memory_report(real) == estimate_memory(params, cls, **options)


# ---- parameters that are not there yet, or cannot be updated


def test_lazy_parameters_are_taken_as_by_other_optimizers(cls, options):
    """AdamW takes them too: they are there by the time they have gradients."""
    torch.manual_seed(1)
    lazy = torch.nn.LazyLinear(3)
    torch.optim.AdamW(lazy.parameters())
    optimizer = cls(lazy.parameters(), **options)
    optimizer.step()
    x = torch.randn(8, 5)
    plain_model = torch.nn.Linear(5, 3)
    lazy(x)
    plain_model.load_state_dict(lazy.state_dict())
    other = cls(plain_model.parameters(), **options)
    for _ in range(3):
        for model, its in ((lazy, optimizer), (plain_model, other)):
            its.zero_grad()
            (model(x) - 1).square().mean().backward()
            its.step()
    assert torch.equal(lazy.weight, plain_model.weight)
    assert torch.equal(lazy.bias, plain_model.bias)


def test_parameters_made_in_inference_mode_are_refused_at_the_step(cls, thorough, backend):
    with torch.inference_mode():
        p = Parameter(torch.randn(5))
    optimizer = cls([p, Parameter(torch.randn(3))], **thorough)
    p.grad = torch.randn(5)
    message = (
        r"^params must not be inference tensors, which cannot be updated, got one for param_groups\[0\], parameter 0$"
    )
    refused(optimizer, [p], ValueError, message)
    assert not optimizer.state


def test_steps_in_and_out_of_inference_mode_are_the_same(cls, thorough, backend):
    problem, other = Regression(cls, thorough), Regression(cls, thorough)
    for number in range(5):
        problem.step()
        other.backward()
        with torch.inference_mode(number % 2 == 0):
            other.optimizer.step()
    assert_same(problem, other)


# ---- dtypes of gradients


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the dtype of their parameter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_another_dtype_step_as_their_values_do(cls, thorough, backend, dtype):
    """Also beside parameters whose gradients have the common dtype; float64 ones that hold float32 numbers."""
    shapes = [(12, 5), (7,), (12, 5), (3,)]
    ours, theirs = ([Parameter(torch.full(shape, 0.5)) for shape in shapes] for _ in range(2))
    for p in ours[:2]:
        p.grad_dtype = dtype
    one, other = cls(ours, **thorough), cls(theirs, **thorough)
    for _ in range(6):
        for number, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = torch.randn(q.shape).to(dtype).float()
            p.grad = q.grad.to(dtype) if number < 2 else q.grad.clone()
            assert torch.equal(p.grad.float(), q.grad)
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        if dtype != torch.float64:
            assert torch.equal(p, q)
    assert not torch.equal(ours[0], torch.full((12, 5), 0.5))


# ---- defaults of the process


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", None), ("cpu", None), (None, torch.float64), (None, torch.bfloat16)], ids=str
)
def test_default_device_and_dtype_change_nothing(cls, thorough, device, dtype, backend):
    def work(inside):
        """Steps, diagnostics, saving and loading, of parameters that are made outside."""
        problem, other = Regression(cls, thorough), Regression(cls, thorough, seed=1)
        for p in (*problem.params, *other.params):
            p.grad = torch.randn(p.shape)
        torch.set_default_device(device if inside else None)
        torch.set_default_dtype((dtype if inside else None) or torch.float32)
        try:
            for some in (problem, other):
                some.optimizer = cls(some.params, **thorough, **({"max_update_norm": 1.0} if knows_length(cls) else {}))
            for _ in range(5):
                problem.optimizer.step()
            other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
            other.optimizer.step()
            other.optimizer.refresh()
            other.optimizer.step()
            report = memory_report(other.optimizer), estimate_memory(other.params, cls, **thorough)
            found = [some.optimizer.diagnostics(quantiles=True) for some in (problem, other)]
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        return problem, other, found, report

    torch.manual_seed(0)
    usual = work(inside=False)
    torch.manual_seed(0)
    unusual = work(inside=True)
    for a, b in zip(usual[:2], unusual[:2], strict=True):
        assert_same(a, b)
    assert usual[2:] == unusual[2:]
