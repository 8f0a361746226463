"""Checks tensors and returns their addresses: the only place where compiled code learns where to read and write.

Compiled code checks nothing. It would silently read or write foreign memory, or wrong numbers, if a tensor had another
size, dtype or device than expected, gaps between its elements, a negation that PyTorch has put off (`Tensor.is_neg`),
or no memory of its own. So every tensor is checked before its address is returned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from efcp.kernels.blocks import SparseRows
from efcp.kernels.lowbit import BLOCK, LowBit, lengths_in_pieces
from efcp.kernels.row_step import RowStep
from efcp.kernels.tables import once
from efcp.kernels.update import Update

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAY_LACK = ("grads",)  # arguments that may hold None
MAY_BE_EMPTY = ("errors",)  # arguments that may hold nothing, for parameters that have no such tensors


def has_plain_storage(kind: type[Tensor]) -> bool:
    """Whether tensors of this class keep their elements in memory of their own, as `Tensor` and `Parameter` do.

    Classes that override PyTorch's operations, such as DTensor, may hold other tensors instead, or nothing.
    """
    return kind is Parameter or kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a dtype but no elements: on the meta device, or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def addresses(
    name: str,
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
    numels: Sequence[int],
    *,
    may_lack: bool = False,
    fake: bool = False,
) -> list[int]:
    """The addresses of the first elements of tensors, for compiled code to read and write. None has the address 0.

    Args:
        name: the name of the argument that holds the tensors, for error messages.
        tensors: each contiguous, with plain storage and without a negative bit.
        dtype, device: what all tensors must have.
        numels: how many elements each tensor must have.
        may_lack: whether None may stand in place of a tensor.
        fake: whether tensors must be fake instead of having plain storage; their addresses are 0.

    Raises:
        TypeError: for tensors without plain storage, and for objects that are not tensors.
        ValueError: for tensors that break another rule, and where `tensors` and `numels` differ in length.
    """
    if len(tensors) != len(numels):
        raise ValueError(f"{name} must hold {len(numels)} tensors, got {len(tensors)}")
    on_cpu, found = device.type == "cpu", []
    for number, (tensor, numel) in enumerate(zip(tensors, numels, strict=True)):
        if tensor is None and may_lack:
            found.append(0)
        elif (
            isinstance(tensor, Tensor)
            and tensor.dtype is dtype
            and tensor.numel() == numel
            and tensor.is_contiguous()
            and (tensor.is_cpu if on_cpu else tensor.device == device)
            and not tensor.is_neg()
            and (is_fake(tensor) if fake else has_plain_storage(type(tensor)))
        ):
            found.append(0 if fake else tensor.data_ptr())
        else:
            raise _refusal(f"{name}[{number}]" if len(numels) > 1 else name, tensor, dtype, device, numel, fake)
    return found


def group_addresses(
    rows: Sequence[SparseRows], device: torch.device, fake: bool = False, /, **others: Sequence[Tensor | None]
) -> tuple[list[int], ...]:
    """The addresses of all tensors of a group of parameters: values, indices, and others such as gradients and errors.

    Args:
        rows: the window of each parameter. All have the same window size, block size, density and dtype.
        device: the device that all tensors must be on.
        fake: as in `addresses`.
        others: by argument name, a tensor (n,) for each parameter, all of one dtype. Arguments in MAY_LACK may hold
            None in place of a tensor. Arguments in MAY_BE_EMPTY may be empty, and then give zeros.

    Returns:
        A list of addresses, one a parameter, for the values, for the indices, and for each of the others.

    Raises:
        TypeError, ValueError: as in `addresses`, and for rows that do not belong together.
    """
    found, numels = once("window", [rows], lambda: _window_addresses(rows, device, fake))
    found = list(found)
    for name, tensors in others.items():
        if len(tensors) or name not in MAY_BE_EMPTY:
            dtype = next((floating(name, tensor) for tensor in tensors if tensor is not None), torch.float32)
            found.append(addresses(name, tensors, dtype, device, numels, may_lack=name in MAY_LACK, fake=fake))
        else:
            found.append([0] * len(rows))
    return tuple(found)


def _window_addresses(
    rows: Sequence[SparseRows], device: torch.device, fake: bool
) -> tuple[list[list[int]], list[int]]:
    """The addresses of values and of indices, and the number of elements of each parameter."""
    if not rows:
        raise ValueError("rows must hold those of at least one parameter, got none")
    values, _, layout = rows[0]
    for r in rows:
        if r.values.dim() != 3:
            raise ValueError(f"values must be of shape (blocks, window, kept), got {tuple(r.values.shape)}")
    window_size = values.shape[1]
    for r in rows:
        same = r.blocks.block_size == layout.block_size and r.blocks.density == layout.density
        if not same or r.values.shape[1] != window_size:
            raise ValueError(f"rows must have the same window, block size and density, got {layout} and {r.blocks}")
    sizes = [r.blocks.count * window_size * r.blocks.kept for r in rows]
    numels = [r.blocks.numel for r in rows]
    values_dtype = floating("values", values)
    if values_dtype is torch.float64:
        raise TypeError("values must be of dtype float16, bfloat16, float32, got torch.float64")
    found = [
        addresses("values", [r.values for r in rows], values_dtype, device, sizes, fake=fake),
        addresses("indices", [r.indices for r in rows], layout.index_dtype, device, sizes, fake=fake),
    ]
    return found, numels


def check_group(rows: Sequence[SparseRows], **others: Sequence[Tensor | None]) -> None:
    """Checks a group as `group_addresses` does, for code that needs no addresses. The tensors may all be fake."""
    device, fake = (rows[0].values.device, is_fake(rows[0].values)) if rows else (torch.device("cpu"), False)
    group_addresses(rows, device, fake, **others)


Momenta = Sequence[Tensor | LowBit]
"""The momenta of parameters: all floating point, or all of 8 bits."""


Errors = Sequence[Tensor | LowBit]
"""The errors of parameters: all floating point, or all of 8 or all of 4 bits; or none."""


def momentum_addresses(
    momenta: Momenta, device: torch.device, numels: Sequence[int], fake: bool = False
) -> tuple[list[int], list[int]]:
    """Addresses of momenta and of their scales, 0 where they are floating point, and for all where there are none.

    Args:
        momenta: of each parameter (n,), contiguous: floating point, or in 8 bits; all of one dtype. Or empty.
        device: what all must be on.
        numels: n of each parameter.
        fake: as in `addresses`.

    Raises:
        TypeError, ValueError: as `addresses`.
    """
    none = [0] * len(numels)
    if not momenta:
        return none, none
    if isinstance(momenta[0], LowBit):
        return lowbit_addresses("momenta", momenta, torch.int8, device, numels, fake=fake)
    dtype = floating("momenta", momenta[0])
    return addresses("momenta", momenta, dtype, device, numels, fake=fake), none  # type: ignore[arg-type]


def lowbit_addresses(
    name: str,
    numbers: Momenta,
    dtype: torch.dtype,
    device: torch.device,
    numels: Sequence[int],
    *,
    fake: bool = False,
    sizes: Sequence[int] | None = None,
) -> tuple[list[int], list[int]]:
    """Addresses of codes and of scales; otherwise as `addresses`.

    Args:
        dtype: of the codes: torch.int8 for 8 bits, torch.uint8 for 4.
        sizes: of each vector, numbers of the pieces that are stored each by itself; None for vectors of one piece.
    """
    own = []
    for number, x in enumerate(numbers):
        if not isinstance(x, LowBit):
            raise TypeError(f"{name}[{number}] must be a LowBit, as others are, got a {type(x).__name__}")
        own.append(x)
    pairs = zip(numels, sizes or [max(1, numel) for numel in numels], strict=True)
    counts = [lengths_in_pieces(numel, size, dtype) for numel, size in pairs]
    codes, scales = [count[0] for count in counts], [count[1] for count in counts]
    return (
        addresses(name, [x.codes for x in own], dtype, device, codes, fake=fake),
        addresses(f"scales of {name}", [x.scales for x in own], torch.float32, device, scales, fake=fake),
    )


def _key_addresses(
    keys: Sequence[Tensor], dtype: torch.dtype, device: torch.device, count: int, fake: bool
) -> list[int]:
    """Addresses of the keys of random numbers, one for each vector where codes are of the dtype for 4 bits; else 0."""
    if dtype is not torch.uint8:
        return [0] * count
    if len(keys) != count:
        raise ValueError(f"keys must hold {count} tensors, got {len(keys)}")
    return [addresses("keys", [key], torch.int64, device, [1], fake=fake)[0] for key in keys]


def error_addresses(
    errors: Errors, keys: Sequence[Tensor], rows: Sequence[SparseRows], device: torch.device, fake: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """Addresses of errors, of their scales, and of keys; 0 for what is not there.

    Args:
        errors: of each parameter (n,), contiguous, floating point; or in few bits, each block of the window by itself.
        keys: of each parameter (1,) int64, where errors are in 4 bits.
        rows: the window of each parameter.
        device, fake: as in `addresses`.

    Raises:
        TypeError, ValueError: as `addresses`.
    """
    numels, none = [r.blocks.numel for r in rows], [0] * len(rows)
    if len(errors) == 0:
        return none, none, none
    first = errors[0]
    if not isinstance(first, LowBit):
        dtype = floating("errors", first)
        return addresses("errors", errors, dtype, device, numels, fake=fake), none, none  # type: ignore[arg-type]
    dtype = _code_dtype(first)
    sizes = [r.blocks.size for r in rows]
    return (
        *lowbit_addresses("errors", errors, dtype, device, numels, fake=fake, sizes=sizes),
        _key_addresses(keys, dtype, device, len(rows), fake),
    )


def _code_dtype(numbers: LowBit) -> torch.dtype:
    dtype = numbers.codes.dtype
    if dtype not in BLOCK:
        raise TypeError(f"codes must be of dtype int8 or uint8, got {dtype}")
    return dtype


def check_compress(
    grads: Sequence[Tensor | None],
    errors: Errors,
    rows: Sequence[SparseRows],
    keys: Sequence[Tensor],
    **numbers: Tensor,
) -> None:
    """Raises what `group_addresses`, `error_addresses` and `check_numbers` raise of the arguments of `compress_`."""
    check_group(rows, grads=grads)
    values = rows[0].values
    error_addresses(errors, keys, rows, values.device, is_fake(values))
    check_numbers(values, **numbers)


def average_addresses(momenta: Momenta, grads: Sequence[Tensor | None], finite: Tensor) -> tuple[list[int], ...]:
    """Addresses of momenta, of scales and of gradients. Raises unless these are what `average_` takes."""
    if not momenta:
        raise ValueError("momenta must hold at least one tensor, got none")
    own = [momentum.codes if isinstance(momentum, LowBit) else momentum for momentum in momenta]
    numels = [momentum.numel() if isinstance(momentum, Tensor) else 0 for momentum in own]
    device, fake = finite.device, is_fake(finite)
    check_numbers(finite, finite=finite)
    dtype = next((floating("grads", grad) for grad in grads if grad is not None), torch.float32)
    return (
        *momentum_addresses(momenta, device, numels, fake),
        addresses("grads", grads, dtype, device, numels, may_lack=True, fake=fake),
    )


def check_average(momenta: Momenta, grads: Sequence[Tensor | None], finite: Tensor) -> None:
    """Raises what `average_addresses` raises."""
    average_addresses(momenta, grads, finite)


def check_momenta(rows: Sequence[SparseRows], momenta: Momenta, update: Update) -> None:
    """Raises what `momentum_addresses` raises; and ValueError where momenta of 8 bits would be written."""
    momentum_addresses(momenta, rows[0].values.device, [r.blocks.numel for r in rows], is_fake(rows[0].values))
    if update.writes_momenta and momenta and isinstance(momenta[0], LowBit):
        raise ValueError("momenta must be floating point where they are written, got 8 bits")


def check_lowbit(
    values: Sequence[Tensor], numbers: Sequence[LowBit], finite: Tensor | None = None, keys: Sequence[Tensor] = ()
) -> tuple[list[int], ...]:
    """Addresses of values, codes, scales and keys. Raises unless these are what the operations on them take."""
    if not numbers:
        raise ValueError("numbers must hold at least one vector, got none")
    dtype, device, fake = _code_dtype(numbers[0]), values[0].device, is_fake(values[0])
    if finite is not None:
        check_numbers(values[0], finite=finite)
    numels = [value.numel() if isinstance(value, Tensor) else 0 for value in values]
    found_keys = [0] * len(numels)
    if finite is not None:
        found_keys = _key_addresses(keys, dtype, device, len(numels), fake)
    return (
        addresses("values", values, floating("values", values[0]), device, numels, fake=fake),
        *lowbit_addresses("numbers", numbers, dtype, device, numels, fake=fake),
        found_keys,
    )


def check_numbers(like: Tensor, **tensors: Tensor) -> None:
    """Checks that each tensor has one element and is on the device of `like`, and fake where `like` is.

    Args:
        like: a tensor on the device of the operation.
        tensors: by argument name: `slot` is int64, `finite` is bool, all others are floating point.

    Raises:
        TypeError, ValueError: as in `addresses`.
    """
    for name, tensor in tensors.items():
        dtype = {"slot": torch.int64, "finite": torch.bool}.get(name) or floating(name, tensor)
        addresses(name, [tensor], dtype, like.device, [1], fake=is_fake(like))


def check_weights(like: Tensor, update: Update, window_size: int) -> tuple[Tensor, Tensor | None]:
    """The weights and the square_weights, made contiguous.

    Checks, as `addresses` does, that they are (m,) and on the device of `like`.
    """
    found = []
    for name in ("weights", "square_weights"):
        weights: Tensor | None = getattr(update, name)
        if weights is not None:
            weights = weights.contiguous()
            addresses(name, [weights], floating(name, weights), like.device, [window_size], fake=is_fake(like))
        found.append(weights)
    assert found[0] is not None
    return found[0], found[1]


def gradient_addresses(grads: Sequence[Tensor], device: torch.device | None = None) -> list[int]:
    """The addresses of gradients of any sizes, of one floating point dtype and on one device; 0 where they are fake.

    Args:
        grads: at least one.
        device: where they must be. None means the device of the first.

    Raises:
        TypeError, ValueError: as in `addresses`.
    """
    if not grads:
        raise ValueError("grads must hold at least one tensor, got none")
    dtype, device = floating("grads", grads[0]), device or grads[0].device
    numels = [grad.numel() if isinstance(grad, Tensor) else 0 for grad in grads]
    return addresses("grads", grads, dtype, device, numels, fake=is_fake(grads[0]))


def dense_addresses(rows: Tensor, vector: Tensor) -> tuple[int, int]:
    """The addresses of a dense window and of a vector; 0 where they are fake.

    Raises:
        TypeError, ValueError: as `addresses`, unless these are what `dense_dots` takes.
    """
    if not (isinstance(rows, Tensor) and rows.dim() == 2):
        raise ValueError(f"rows must be a matrix, got {_shape(rows)}")
    dtype, fake, device = floating("rows", rows), is_fake(rows), rows.device
    (own,) = addresses("rows", [rows], dtype, device, [rows.numel()], fake=fake)
    (other,) = addresses("vector", [vector], floating("vector", vector), device, [rows.shape[1]], fake=fake)
    return own, other


def check_inverse_root(R: Tensor, column: Tensor, S: Tensor, slot: Tensor) -> None:
    """Checks the arguments of `update_inverse_root_`, and raises errors as `addresses` does."""
    if not (isinstance(R, Tensor) and R.dim() == 2):
        raise ValueError(f"R must be a matrix, got {_shape(R)}")
    window_size, fake = len(R), is_fake(R)
    for name, tensor, numel in (("R", R, window_size**2), ("column", column, window_size), ("S", S, window_size**2)):
        addresses(name, [tensor], torch.float64, R.device, [numel], fake=fake)
    check_numbers(R, slot=slot)


def check_row_step(state: RowStep, dots: Tensor, slot: Tensor, finite: Tensor) -> None:
    """Checks the arguments of `mfac_row_step_`, and raises errors as `addresses` does."""
    check_inverse_root(state.inverse_root, state.inverse_column, state.gram, slot)
    window_size, device, fake = len(state.inverse_root), dots.device, is_fake(dots)
    for name, tensor in (("weights", state.weights), ("dots", dots)):
        addresses(name, [tensor], torch.float64, device, [window_size], fake=fake)
    for name, tensor in state._asdict().items():
        if name not in ("gram", "inverse_root", "inverse_column", "weights"):
            floats = ("factor", "update_norm", "inner_product")
            addresses(name, [tensor], torch.float64 if name in floats else torch.int64, device, [1], fake=fake)
    check_numbers(dots, finite=finite)


def floating(name: str, tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor. Raises TypeError unless it is one of `FLOATING`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name} must be of dtype {names}, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    return tensor.dtype


def _shape(tensor: object) -> object:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"


def _refusal(name: str, tensor: object, dtype: torch.dtype, device: torch.device, numel: int, fake: bool) -> Exception:
    """The error that says why `addresses` refuses a tensor."""
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name} must be a tensor, got a {type(tensor).__name__}")
    if fake and not is_fake(tensor):
        return TypeError(f"{name} must be fake, as other tensors are, got a {type(tensor).__name__} on {tensor.device}")
    if not fake and not has_plain_storage(type(tensor)):
        return TypeError(f"{name} must have memory of its own, got a {type(tensor).__name__}")
    own = f"{tensor.numel()} elements of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
    if tensor.is_neg():
        own += ", with a negative bit"
    allowed = f"be contiguous, with {numel} elements of {dtype} on {device} and without a negative bit"
    return ValueError(f"{name} must {allowed}, got {own}")
