"""What the tests of the kernels share: inputs, comparison with the definition, and the one table of tolerances.

A window is poisoned before an operation sees it: whatever is not part of a row that it may read holds NaN and an index
that lies outside every block, and whatever it may not write is compared bit for bit afterwards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from efcp.kernels import Blocks, reference

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# Of the dtype that an operation rounds to once at its end. Sums are taken in the accumulation dtype, in any order.
TOLERANCE = {
    FLOAT64: {"rtol": 1e-12, "atol": 1e-12},
    FLOAT32: {"rtol": 1e-5, "atol": 1e-5},
    BFLOAT16: {"rtol": 2**-7, "atol": 1e-3},
    FLOAT16: {"rtol": 2**-10, "atol": 1e-3},
}

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHORT = {FLOAT32: "fp32", FLOAT64: "fp64", BFLOAT16: "bf16", FLOAT16: "fp16", None: "none"}


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
            x = x * 10.0 ** torch.randint(-30, 30, (numel,), generator=generator)
    return x.to(dtype)


@dataclass(frozen=True)
class Case:
    """One call of each operation."""

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

    def gradient(self) -> Tensor:
        grad = make(self.kind, self.numel, self.grad, seed=1)
        if not self.finite and self.numel > 0:
            grad[self.numel // 2] = float("nan")
            grad[0] = float("inf")
        return grad

    def error_before(self) -> Tensor | None:
        # The error of a "zero" gradient is zero, too, so that the sum is.
        return None if self.error is None else make(self.kind, self.numel, self.error, seed=2)

    def poisoned_window(self) -> tuple[Tensor, Tensor]:
        """(values, indices) of NaN, and of the largest index."""
        blocks = self.blocks
        shape = (blocks.count, self.window, blocks.kept)
        poison = torch.iinfo(blocks.index_dtype).max
        return torch.full(shape, float("nan"), dtype=self.values), torch.full(shape, poison, dtype=blocks.index_dtype)

    def random_window(self) -> tuple[Tensor, Tensor]:
        """(values, indices) with random rows; the padding of the tail is poisoned."""
        generator = torch.Generator().manual_seed(3)
        values, indices = self.poisoned_window()
        for part in self.blocks.parts(1 << 18):
            count = part.blocks.stop - part.blocks.start
            order = torch.rand(count, self.window, part.length, generator=generator).argsort(-1)[..., : part.kept]
            indices[part.blocks, :, : part.kept] = order.sort(-1).values.to(indices.dtype)
            values[part.blocks, :, : part.kept] = torch.randn(order.shape, generator=generator).to(values.dtype)
        return values, indices


def check_compress(operation, case: Case) -> None:
    """An implementation of `compress_` gives the bits that the definition gives, and changes nothing else."""
    results = []
    for compress_ in (reference.compress_, operation):
        grad, error = case.gradient(), case.error_before()
        values, indices = case.poisoned_window()
        compress_(grad, error, values, indices, torch.tensor([case.slot]), torch.tensor(case.finite), case.blocks)
        assert_same_bits(grad, case.gradient(), "grad")
        results.append((values, indices, error))
    expected, actual = results
    assert_same_bits(actual[1], expected[1], "indices")
    assert_same_bits(actual[0], expected[0], "values")
    if case.error is not None:
        assert_same_bits(actual[2], expected[2], "error")


def check_dots(operation, case: Case) -> None:
    """An implementation of `window_dots` agrees with the definition."""
    values, indices = case.random_window()
    before = values.clone(), indices.clone()
    slot = torch.tensor([case.slot])
    actual = operation(values, indices, slot, case.blocks)
    assert_same_bits(values, before[0], "values")
    assert_same_bits(indices, before[1], "indices")
    expected = reference.window_dots(values, indices, slot, case.blocks)
    torch.testing.assert_close(actual, expected, **TOLERANCE[FLOAT64])


def check_apply(operation, case: Case) -> None:
    """An implementation of `window_apply_` agrees with the definition, with the target in the dtype of the gradient."""
    values, indices = case.random_window()
    before = values.clone(), indices.clone()
    weights = torch.linspace(-1.5, 2.0, case.window, dtype=FLOAT64)
    scale = torch.tensor(0.75)
    targets = [make("random", case.numel, case.grad, seed=4) for _ in range(2)]
    operation(targets[0], values, indices, weights, scale, case.blocks)
    assert_same_bits(values, before[0], "values")
    assert_same_bits(indices, before[1], "indices")
    reference.window_apply_(targets[1], values, indices, weights, scale, case.blocks)
    torch.testing.assert_close(*targets, **TOLERANCE[case.grad])
