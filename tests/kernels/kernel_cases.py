"""What the tests of the kernels share: inputs, comparison with the definition, and the one table of tolerances.

A window is poisoned before an operation sees it: whatever is not part of a row that it may read holds NaN and an index
that lies outside every block, and whatever it may not write is compared bit for bit afterwards.

A check calls the operation once, for a group of parameters. Where tensors have to be registered before an operation may
reach them, `allow` is called with each of those that the group consists of.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

import torch
from torch import Tensor

from efcp.kernels import Blocks, LowBit, SparseRows, Update, allocate_lowbit, reference
from efcp.kernels.lowbit import encoded

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BITS8, BITS4 = torch.int8, torch.uint8  # of errors: the dtypes of codes

# Of the dtype that an operation rounds to once at its end. Sums are taken in the accumulation dtype, in any order.
TOLERANCE = {
    FLOAT64: {"rtol": 1e-12, "atol": 1e-12},
    FLOAT32: {"rtol": 1e-5, "atol": 1e-5},
    BFLOAT16: {"rtol": 2**-7, "atol": 1e-3},
    FLOAT16: {"rtol": 2**-10, "atol": 1e-3},
}

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Allow = Callable[[Tensor], None] | None
SHORT = {FLOAT32: "fp32", FLOAT64: "fp64", BFLOAT16: "bf16", FLOAT16: "fp16", BITS8: "8", BITS4: "4", None: "none"}


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that −0 differs from 0 and NaN equals itself."""
    return tensor.view(BITS[tensor.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, what
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0, msg=lambda m: f"{what}: {m}")


def make(kind: str, numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A gradient or an error: (numel,)."""
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "random":
            x = torch.randn(numel, generator=generator, dtype=FLOAT64)
        case "ties":  # two or three magnitudes, of both signs
            x = torch.randint(-2, 3, (numel,), generator=generator).double()
        case "equal":
            x = torch.full((numel,), 1.5, dtype=FLOAT64)
        case "zero":
            x = torch.zeros(numel, dtype=FLOAT64)
        case "signed zero":
            x = torch.where(torch.rand(numel, generator=generator) < 0.5, -0.0, 0.0).double()
        case "denormal":
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            x = torch.randint(-9, 10, (numel,), generator=generator).double() * smallest
        case "wide":  # many orders of magnitude
            x = torch.randn(numel, generator=generator, dtype=FLOAT64)
            x = x * 10.0 ** torch.randint(-30, 17, (numel,), generator=generator)
    return x.to(dtype)


@dataclass(frozen=True)
class Case:
    """One call of each operation, with the parameter described here and some others."""

    numel: int
    block_size: int
    density: float
    kind: str = "random"
    grad: torch.dtype = FLOAT32
    error: torch.dtype | None = FLOAT32
    values: torch.dtype = BFLOAT16
    window: int = 3
    slot: int = 1
    finite: bool = True
    arch: int = 90

    @property
    def blocks(self) -> Blocks:
        return Blocks(self.numel, self.block_size, self.density)

    def __str__(self) -> str:
        dtypes = "-".join(SHORT[dtype] for dtype in (self.grad, self.error, self.values))
        where = f"n{self.numel}-B{self.block_size}-{self.density:g}-m{self.window}.{self.slot}"
        return f"{where}-{self.kind.replace(' ', '-')}-{dtypes}-sm{self.arch}{'' if self.finite else '-nonfinite'}"

    @property
    def group(self) -> list["Case"]:
        """The parameters of a call: this one among some of other sizes, the last of them with a tail."""
        numels = (1, self.numel, max(1, self.block_size // 3), self.block_size + self.block_size // 2 + 1)
        return [replace(self, numel=numel) for numel in numels]

    def gradient(self) -> Tensor:
        grad = make(self.kind, self.numel, self.grad, seed=4 * self.numel + 1)
        if not self.finite and self.numel > 0:
            grad[self.numel // 2] = float("nan")
            grad[0] = float("inf")
        return representable(grad, self) if self.few_bits else grad

    @property
    def few_bits(self) -> bool:
        """Whether the error is in 8 or 4 bits."""
        return self.error in (BITS8, BITS4)

    def error_before(self) -> Tensor | LowBit | None:
        # The error of a "zero" gradient is zero, too, so that the sum is.
        seed = 4 * self.numel + 2
        if not self.few_bits:
            return None if self.error is None else make(self.kind, self.numel, self.error, seed)
        values, size = make(self.kind, self.numel, FLOAT32, seed), self.blocks.size
        pieces = [encoded(piece, self.error, key=torch.tensor([seed])) for piece in values.split(size) if len(piece)]
        empty = allocate_lowbit(0, 8 if self.error == BITS8 else 4, values.device)
        return LowBit(*(torch.cat(parts) for parts in zip(empty, *pieces, strict=True)))

    @property
    def keys(self) -> list[Tensor]:
        """Of the random numbers that round the errors of the group."""
        return [torch.tensor([(1 << 40) + 7 * i - 3]) for i in range(len(self.group))] if self.error == BITS4 else []

    def target(self) -> Tensor:
        """A parameter, or a momentum, of the dtype of the gradient."""
        return make("random", self.numel, self.grad, seed=4 * self.numel + 4)

    def poisoned_window(self) -> SparseRows:
        """Values of NaN, and the largest of indices."""
        blocks = self.blocks
        shape = (blocks.count, self.window, blocks.kept)
        poison = torch.iinfo(blocks.index_dtype).max
        return SparseRows(
            torch.full(shape, float("nan"), dtype=self.values),
            torch.full(shape, poison, dtype=blocks.index_dtype),
            blocks,
        )

    def random_window(self) -> SparseRows:
        """Random rows; the padding of the tail is poisoned."""
        generator = torch.Generator().manual_seed(4 * self.numel + 3)
        values, indices, blocks = self.poisoned_window()
        for part in blocks.parts(1 << 18):
            count = part.blocks.stop - part.blocks.start
            order = torch.rand(count, self.window, part.length, generator=generator).argsort(-1)[..., : part.kept]
            indices[part.blocks, :, : part.kept] = order.sort(-1).values.to(indices.dtype)
            values[part.blocks, :, : part.kept] = torch.randn(order.shape, generator=generator).to(values.dtype)
        return SparseRows(values, indices, blocks)


WITHOUT_GRADIENT = 2  # of a group, in `compress_`: a parameter without a tail


def tensors_of(rows: Iterable[SparseRows]) -> Iterable[Tensor]:
    return chain.from_iterable((values, indices) for values, indices, _ in rows)


def assert_all_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str) -> None:
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(one, other, f"{what} of parameter {number}")


def register(allow: Allow, tensors: Iterable[Tensor]) -> None:
    if allow is not None:
        for tensor in tensors:
            allow(tensor)


LARGEST, HALF = 3.4e38, 6e4  # of float32 and float16, about
INF, NAN = float("inf"), float("nan")
FINITE = [  # (name, dtype, gradients, whether they are finite)
    ("zero", FLOAT32, [[0.0]], True),
    ("no elements", FLOAT32, [[]], True),
    ("inf", FLOAT32, [[1.0, INF]], False),
    ("minus inf", BFLOAT16, [[-INF, 1.0]], False),
    ("nan", FLOAT16, [[NAN, 1.0]], False),
    ("inf and nan", FLOAT64, [[INF, NAN]], False),
    ("inf in the second", FLOAT32, [[1.0], [2.0, INF, 0.0], [3.0]], False),
    ("nan in the last", FLOAT32, [[1.0], [], [NAN]], False),
    ("a square overflows", FLOAT32, [[2e19]], False),
    ("no square overflows", FLOAT32, [[1.5e19]], True),
    ("a sum of squares overflows", FLOAT32, [[1.5e19, 1.5e19]], False),
    ("a sum over gradients overflows", FLOAT32, [[1.5e19], [1.0], [1.5e19]], False),
    ("largest", FLOAT32, [[LARGEST]], False),
    ("largest bfloat16", BFLOAT16, [[LARGEST]], False),
    ("squares overflow float16", FLOAT16, [[HALF, HALF], [HALF]], True),
    ("squares fit bfloat16", BFLOAT16, [[1e19], [1e19]], True),
    ("squares overflow float32", FLOAT64, [[1e30], [1e150]], True),
    ("squares overflow float64", FLOAT64, [[1.0], [2e154]], False),
]


def check_norm_is_finite(operation, case: Case, allow: Allow = None) -> None:
    """An implementation of `norm_is_finite` agrees with the definition, also for an Inf or NaN at the end of one."""
    for poison in (None, float("nan"), float("-inf")):
        grads = [member.gradient() for member in case.group]
        if poison is not None:
            grads[-1][-1] = poison
        before = [grad.clone() for grad in grads]
        register(allow, grads)
        actual = operation(grads)
        assert_all_same_bits(grads, before, "grad")
        assert actual.shape == ()
        assert actual.dtype == torch.bool
        assert bool(actual) == bool(reference.norm_is_finite(grads))
        assert poison is None or not actual


def check_compress(operation, case: Case, allow: Allow = None) -> None:
    """An implementation of `compress_` gives the bits that the definition gives, and changes nothing else."""
    group, results = case.group, []
    for compress_ in (reference.compress_, operation):
        grads = [None if i == WITHOUT_GRADIENT else member.gradient() for i, member in enumerate(group)]
        errors = [] if case.error is None else [member.error_before() for member in group]
        rows, keys = [member.poisoned_window() for member in group], case.keys
        given = [grad for grad in grads if grad is not None]
        register(allow, (*given, *parts_of(errors), *tensors_of(rows), *keys))
        finite = compress_(grads, errors, rows, torch.tensor([case.slot]), *[keys][: len(keys)])
        assert (finite.shape, finite.dtype) == ((), torch.bool)
        assert bool(finite) == bool(reference.norm_is_finite(given))
        unchanged = (member.gradient() for i, member in enumerate(group) if i != WITHOUT_GRADIENT)
        assert_all_same_bits(given, unchanged, "grad")
        assert_all_same_bits(keys, case.keys, "key")
        results.append((parts_of(errors), rows))
    (expected_errors, expected), (errors, actual) = results
    assert_all_same_bits((r.indices for r in actual), (r.indices for r in expected), "indices")
    assert_all_same_bits((r.values for r in actual), (r.values for r in expected), "values")
    assert_all_same_bits(errors, expected_errors, "error")


def check_compress_without_gradients(operation, case: Case, allow: Allow = None) -> None:
    """Where no parameter of a call has one, the row becomes zero all the same."""
    results = []
    for compress_ in (reference.compress_, operation):
        rows, keys = [member.poisoned_window() for member in case.group], case.keys
        errors = [] if case.error is None else [member.error_before() for member in case.group]
        register(allow, (*parts_of(errors), *tensors_of(rows), *keys))
        assert compress_([None] * len(rows), errors, rows, torch.tensor([case.slot]), *[keys][: len(keys)])
        results.append([*tensors_of(rows), *parts_of(errors)])
    assert_all_same_bits(results[1], results[0], "tensor")


def check_undo(operation, case: Case, allow: Allow = None) -> None:
    """An implementation of `undo_compress_` gives the bits of the definition, and nothing changes if finite."""
    for finite in (False, True):
        results = []
        for undo_compress_ in (reference.undo_compress_, operation):
            group, keys = case.group, case.keys
            grads = [None if i == WITHOUT_GRADIENT else member.gradient() for i, member in enumerate(group)]
            errors = [] if case.error is None else [member.error_before() for member in group]
            rows, slot = [member.poisoned_window() for member in group], torch.tensor([case.slot])
            reference.compress_(grads, errors, rows, slot, keys)
            compressed = [tensor.clone() for tensor in (*tensors_of(rows), *parts_of(errors))]
            given = [grad for grad in grads if grad is not None]
            register(allow, (*given, *parts_of(errors), *tensors_of(rows), *keys))
            undo_compress_(grads, errors, rows, slot, torch.tensor(finite), *[keys][: len(keys)])
            unchanged = (member.gradient() for i, member in enumerate(group) if i != WITHOUT_GRADIENT)
            assert_all_same_bits(given, unchanged, "grad")
            results.append([*tensors_of(rows), *parts_of(errors)])
            if finite:
                assert_all_same_bits(results[-1], compressed, "tensor")
        assert_all_same_bits(results[1], results[0], "tensor")


MOMENTA = (None, "float", "8 bits")
BETA = 0.9


def momenta_of(case: Case, kind: str | None) -> list[Tensor | LowBit]:
    """Random ones, of a kind of MOMENTA: floating point ones have the dtype of the gradient."""
    momenta = [member.target().neg() for member in case.group] if kind else []
    return [encoded(momentum.float(), torch.int8) for momentum in momenta] if kind == "8 bits" else momenta


def representable(x: Tensor, case: Case) -> Tensor:
    """The vector without Inf and NaN, which numbers of few bits cannot hold; unless nothing is written."""
    return x.nan_to_num(0.0, 1.0, -1.0) if case.finite else x


def parts_of(numbers: Iterable[Tensor | LowBit]) -> list[Tensor]:
    """Tensors, and codes and scales in place of others."""
    return [tensor for x in numbers for tensor in ([x] if isinstance(x, Tensor) else x)]


def check_dots(operation, case: Case, allow: Allow = None, kinds: Sequence[str | None] = MOMENTA) -> None:
    """An implementation of `window_dots` agrees with the definition, with momenta of these kinds."""
    rows = [member.random_window() for member in case.group]
    slot = torch.tensor([case.slot])
    register(allow, tensors_of(rows))
    for kind in kinds:
        momenta = momenta_of(case, kind)
        register(allow, parts_of(momenta))
        before = [tensor.clone() for tensor in (*tensors_of(rows), *parts_of(momenta))]
        actual = operation(rows, slot, momenta) if momenta else operation(rows, slot)
        assert_all_same_bits((*tensors_of(rows), *parts_of(momenta)), before, "window or momentum")
        assert actual.shape == ((2, case.window) if momenta else (case.window,))
        torch.testing.assert_close(actual, reference.window_dots(rows, slot, momenta), **TOLERANCE[FLOAT64])


KindOfUpdate = tuple[str | None, bool, bool]
"""Of `window_apply_`: the kind of momenta, whether they are written, and whether there are square_weights."""
KINDS_OF_UPDATE: tuple[KindOfUpdate, ...] = (
    (None, False, False),
    ("float", False, False),
    ("float", True, False),
    ("8 bits", False, False),
    (None, False, True),
    ("float", True, True),
)


def applied(
    operation,
    case: Case,
    kind: str | None,
    weights: Tensor,
    writes: bool = False,
    squares: bool = False,
    allow: Allow = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """(targets, tensors of momenta) as `window_apply_` leaves them, in the dtype of the gradients.

    Args:
        kind: of momenta, one of MOMENTA.
        writes: whether momenta are written.
        squares: whether there are square_weights.
    """
    rows = [member.random_window() for member in case.group]
    targets = [member.target() for member in case.group]
    momenta = momenta_of(case, kind)
    register(allow, (*targets, *parts_of(momenta), *tensors_of(rows)))
    unchanged = [*tensors_of(rows), *(() if writes else parts_of(momenta))]
    before = [tensor.clone() for tensor in unchanged]
    update = Update(weights, torch.tensor(0.75), torch.tensor(-0.3, dtype=FLOAT64), writes_momenta=writes)
    if momenta:
        update = update._replace(momentum_factor=torch.tensor(0.9, dtype=FLOAT64))
    if squares:
        square_weights = torch.linspace(0.5, 0.1, case.window, dtype=FLOAT64)
        update = update._replace(square_weights=square_weights, eps=torch.tensor(1e-3))
    operation(targets, momenta, rows, update)
    assert_all_same_bits(unchanged, before, "window or momentum")
    return targets, parts_of(momenta)


def check_apply(operation, case: Case, allow: Allow = None, kinds: Sequence[KindOfUpdate] = KINDS_OF_UPDATE) -> None:
    """An implementation of `window_apply_` agrees with the definition, for updates of these kinds."""
    weights = torch.linspace(-1.5, 2.0, case.window, dtype=FLOAT64)
    for kind, writes, squares in kinds:
        actual = applied(operation, case, kind, weights, writes, squares, allow)
        expected = applied(reference.window_apply_, case, kind, weights, writes, squares)
        torch.testing.assert_close(actual, expected, **TOLERANCE[case.grad])


def check_average(operation, case: Case, allow: Allow = None) -> None:
    """An implementation of `average_` agrees with the definition: bits of momenta, and the sum in any order."""
    for kind, with_gradients in product(MOMENTA[1:], (True, False)):
        lack = (WITHOUT_GRADIENT,) if with_gradients else range(len(case.group))
        results = []
        for average_ in (reference.average_, operation):
            grads = [
                None if i in lack else representable(member.gradient(), case) for i, member in enumerate(case.group)
            ]
            momenta = momenta_of(case, kind)
            given = [grad for grad in grads if grad is not None]
            before = [grad.clone() for grad in given]
            register(allow, (*given, *parts_of(momenta)))
            total = average_(momenta, grads, BETA, torch.tensor(case.finite))
            assert_all_same_bits(given, before, "grad")
            assert (total.shape, total.dtype) == ((), FLOAT64)
            results.append((total, parts_of(momenta)))
        (expected_total, expected), (total, actual) = results
        assert_all_same_bits(actual, expected, f"momentum, {kind},")
        torch.testing.assert_close(total, expected_total, **TOLERANCE[FLOAT64])


def check_lowbit(operations, case: Case, allow: Allow = None) -> None:
    """Implementations of `store_lowbit_` and `add_lowbit_` give the bits that the definition gives.

    Args:
        operations: the two, in this order.
    """
    group = case.group
    for number_bits in (8, 4):
        results = []
        for store_, add_ in ((reference.store_lowbit_, reference.add_lowbit_), operations):
            values = [
                representable(make(case.kind, member.numel, case.grad, seed=member.numel), case) for member in group
            ]
            targets = [member.target() for member in group]
            numbers = [allocate_lowbit(member.numel, number_bits, torch.device("cpu")) for member in group]
            for codes, scales in numbers:  # as what was stored before
                codes.fill_(0x5A)
                scales.fill_(0.5)
            keys = [torch.tensor([(1 << 40) + 7 * i - 3]) for i in range(len(group))] if number_bits == 4 else []
            register(allow, (*values, *targets, *keys, *parts_of(numbers)))
            before = [tensor.clone() for tensor in values]
            store_(numbers, values, torch.tensor(case.finite), keys)
            assert_all_same_bits(values, before, "values")
            before = [tensor.clone() for tensor in parts_of(numbers)]
            add_(targets, numbers)
            assert_all_same_bits(parts_of(numbers), before, "number")
            results.append((parts_of(numbers), targets))
        (expected, expected_targets), (actual, targets) = results
        assert_all_same_bits(actual, expected, f"{number_bits} bits")
        assert_all_same_bits(targets, expected_targets, f"target of {number_bits} bits")
