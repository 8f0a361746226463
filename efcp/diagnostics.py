"""Describes what a step did: how long its vectors are, how far it turned the gradient, and how it scaled the entries.

The length of the newest row c is in the Gram matrix. `efcp.directions` says how those of the update u and ⟨c, u⟩ come
from it, so only the norms of g and e cost more than m² operations. Preconditioners that do without the Gram matrix, or
divide by second moments, and the quantiles of |u/g| (EFCP, arXiv 2306.06098, section 6.3) need c and u themselves. They
are recomputed from the windows, one parameter at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from efcp.gram import Gram
from efcp.kernels import Update, accumulation_dtype
from efcp.parameter_sets import ParameterSet
from efcp.preconditioners import LocalPreconditioner, Preconditioner
from efcp.shards import Ranks, Share

QUANTILES = {"scaling_q25": 0.25, "scaling_q50": 0.5, "scaling_q75": 0.75}


def norms_and_rotation(
    gram: Gram, sets: Sequence[ParameterSet], preconditioner: Preconditioner, ranks: Ranks
) -> dict[str, float | None]:
    """The norms of g, c, e and u, and cos(c, u). `EFCP.diagnostics` says what each key means.

    Args:
        gram: the Gram matrix, with the weights of the newest update.
        sets: each parameter that has a window by itself.
        preconditioner: that of the newest update.
        ranks: over which parameters are divided; all of them must call this.
    """
    local = isinstance(preconditioner, LocalPreconditioner)  # its updates are not sums of rows
    state, slot = gram.state, _newest(gram)
    known = [gram.matrix.diagonal()[slot].squeeze(0).sqrt(), state["update_norm"], state["inner_product"]]
    if not preconditioner.gives_length:
        known = _recomputed(gram, sets, preconditioner, ranks)
    if local:
        known[1] = state["update_norm"]
    compressed, update, inner = torch.stack(known).tolist()
    lengths = compressed * update
    return {
        "grad_norm": _norm(((s.share, p.grad) for s in sets for p in s.params if p.grad is not None), ranks),
        "compressed_norm": compressed,
        "error_norm": _norm(_errors(sets), ranks) or 0.0,
        "update_norm": update,
        "cosine": max(-1.0, min(1.0, inner / lengths)) if lengths > 0 and not local else None,
    }


def scaling_quantiles(
    gram: Gram, sets: Sequence[ParameterSet], preconditioner: Preconditioner, ranks: Ranks
) -> dict[str, float | None]:
    """Quantiles of |u/g| over the entries with g ≠ 0. `EFCP.diagnostics` says what each key means.

    They are exact, and only the ratios of one parameter are in memory at a time. Non-negative float32 numbers have the
    order of their bits taken as integers. A first pass counts the upper 16 bits, and so finds the bin of each quantile.
    A second pass counts the lower 16 bits within that bin, and so finds the quantile.

    Args:
        gram: the Gram matrix, with the weights of the newest update.
        sets: each parameter that has a window by itself. Those without a gradient are left out.
        preconditioner: that of the newest update.
        ranks: over which parameters are divided; all of them must call this.
    """
    sets = [s for s in sets if s.params[0].grad is not None]
    (upper,) = _counts(sets, gram, preconditioner, ranks, [lambda keys: keys >> 16])
    total = int(upper.sum())
    if total == 0:
        return dict.fromkeys(QUANTILES)
    ends = upper.cumsum(0)
    wanted = torch.tensor([math.floor(q * (total - 1)) for q in QUANTILES.values()], device="cpu")
    bins = torch.searchsorted(ends, wanted, right=True)
    wanted -= ends[bins] - upper[bins]  # ranks within the bins
    within = [lambda keys, chosen=chosen: keys[keys >> 16 == chosen] & 0xFFFF for chosen in bins.tolist()]
    lower = _counts(sets, gram, preconditioner, ranks, within)
    low = torch.stack([torch.searchsorted(c.cumsum(0), w, right=True) for c, w in zip(lower, wanted, strict=True)])
    return dict(zip(QUANTILES, (bins << 16 | low).int().view(torch.float32).tolist(), strict=True))


def _errors(sets: Sequence[ParameterSet]) -> Iterator[tuple[Share, Tensor]]:
    """All errors as floating point, one at a time where they are in few bits."""
    for s in sets:
        for state in s.states:
            error = s.compressor.error(state)
            if error is not None:
                yield s.share, error


def _norm(tensors: Iterable[tuple[Share, Tensor]], ranks: Ranks) -> float | None:
    """The norm of some tensors taken as one vector, on all ranks; None without any."""
    norms = [(share, torch.linalg.vector_norm(t, dtype=accumulation_dtype(t.dtype)).double()) for share, t in tensors]
    if ranks.meshes:
        squares = [(share, torch.stack([torch.ones_like(norm), norm * norm]).cpu()) for share, norm in norms]
        count, total = ranks.sum(squares, torch.zeros(2, dtype=torch.float64, device="cpu")).tolist()
        return math.sqrt(total) if count else None
    if not norms:
        return None
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0][1].device) for _, n in norms])).item()


def _newest(gram: Gram) -> Tensor:
    """The slot of the newest row: (1,) int64."""
    return ((gram.state["step"] - 1) % len(gram.matrix)).view(1)


def _recomputed(gram: Gram, sets: Sequence[ParameterSet], preconditioner: Preconditioner, ranks: Ranks) -> list[Tensor]:
    """‖c‖, ‖u‖ and ⟨c, u⟩, () float64 each, on the device of the Gram matrix."""
    squares = preconditioner.square_weights(gram, _newest(gram))
    first = torch.zeros_like(gram.state["weights"]).index_fill_(0, _newest(gram), 1.0)
    parts = []
    for single in sets:
        c = _sum_of_rows(single, first).double()
        u = _sum_of_rows(single, gram.state["weights"], squares).double()
        own = torch.stack([torch.dot(c, c), torch.dot(u, u), torch.dot(c, u)])
        parts.append((single.share, own.to(first.device)))
    products = ranks.sum(parts, first.new_zeros(3))
    return [products[0].sqrt(), products[1].sqrt(), products[2]]


def _sum_of_rows(
    single: ParameterSet, weights: Tensor, squares: tuple[Tensor, Tensor] | None = None, factor: Tensor | None = None
) -> Tensor:
    """The weighted sum of a parameter's rows, divided by its second moments where there are `squares`: (n,).

    Args:
        factor: of the dense momentum, which is added; None for none.
    """
    (param,) = single.params
    one = torch.ones((), dtype=torch.float64, device=param.device)
    own = [None if x is None else x.to(param.device) for x in (weights, factor, *(squares or (None, None)))]
    total = torch.zeros(param.numel(), dtype=accumulation_dtype(param.dtype), device=param.device)
    update = Update(own[0], one, one, own[1], False, *own[2:])  # type: ignore[arg-type]
    single.window.apply_([total], [] if factor is None else single.momenta, update)
    return total


def _ratio_bits(sets: Sequence[ParameterSet], gram: Gram, preconditioner: Preconditioner) -> Iterator[Tensor]:
    """The bits of |u/g| as float32, parameter by parameter: (entries with g ≠ 0,) int32."""
    squares = preconditioner.square_weights(gram, _newest(gram))
    for single in sets:
        (param,) = single.params
        assert param.grad is not None
        grad = param.grad.reshape(-1).to(accumulation_dtype(param.dtype))
        factor = gram.state["factor"] if single.group["direction"] == "momentum" else None
        update = _sum_of_rows(single, gram.state["weights"], squares, factor)
        yield (update / grad)[grad != 0].abs().float().view(torch.int32)


def _counts(
    sets: Sequence[ParameterSet],
    gram: Gram,
    preconditioner: Preconditioner,
    ranks: Ranks,
    choices: Sequence[Callable[[Tensor], Tensor]],
) -> list[Tensor]:
    """How often each number below 2¹⁶ occurs in what is chosen of the ratios' bits: (65536,) int64 each, on the CPU."""
    counts: dict[Share, Tensor] = {}
    for single, keys in zip(sets, _ratio_bits(sets, gram, preconditioner), strict=True):
        own = torch.stack([torch.bincount(chosen(keys), minlength=1 << 16) for chosen in choices]).cpu().double()
        counts[single.share] = counts[single.share] + own if single.share in counts else own
    like = torch.zeros(len(choices), 1 << 16, dtype=torch.float64, device="cpu")
    return list(ranks.sum(counts.items(), like).round().long())
