"""The optimizers that are compared: a name, a constructor and its options besides the learning rate."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from efcp import (
    EFCP,
    MFAC,
    MFACW,
    AdamStats,
    AdaRankGrad,
    DenseGGT,
    DenseMFAC,
    GaLoreAdamW,
    KroneckerW,
    LDAdamW,
    LowRankGGT,
    LowRankMFAC,
    MemoryReport,
    MicroAdam,
    SparseGGT,
    SparseMFAC,
    TopK,
    estimate_memory,
    param_groups,
)
from efcp.gram import Gram

ADAM_BYTES = 8.0  # of state per parameter, float32: the line that memory is measured against
_GGT_DENSITY = 0.01
DENSE, SPARSE, LOW_RANK = "dense M-FAC", "sparse M-FAC", "low-rank M-FAC"


def _muon(groups: Any, lr: float) -> Optimizer:
    """Muon for hidden matrices, AdamW at the same rate for all others."""
    from pytorch_optimizer import Muon

    own = [{"params": group["params"], "use_muon": not group.get("adamw", False), "lr": lr} for group in groups]
    return Muon(own, lr=lr, weight_decay=0.0, use_adjusted_lr=True, adamw_lr=lr)


def _soap(params: Any, lr: float) -> Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=lr, weight_decay=0.0)


def _adamw_8bit(params: Any, lr: float) -> Optimizer:
    """AdamW with its state in 8 bits, a scale for 64 entries; weight decay is PyTorch's default."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=torch.tensor(lr), weight_decay=1e-2, block_size=64)


class LineSearchLBFGS(torch.optim.LBFGS):
    """L-BFGS with strong Wolfe conditions. A step is 20 iterations; each evaluates once or more."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(
            params, lr, 20, tolerance_grad=0, tolerance_change=0, history_size=100, line_search_fn="strong_wolfe"
        )
        self.param_groups[0]["keeps_lr"] = True  # the length that the first line search tries


class AdamThenLBFGS(Optimizer):
    """Adam for some steps, then L-BFGS.

    Args:
        lr: Adam's.
        adam_steps: the number of steps by Adam.
    """

    def __init__(self, params: Any, lr: float, adam_steps: int) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.adam, self.then = torch.optim.Adam(params, lr), LineSearchLBFGS(params, 1.0)
        self.left = adam_steps

    def step(self, closure: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            self.state = self.then.state
            return self.then.step(closure)
        self.state = self.adam.state
        self.adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        return self.adam.step(closure)


@dataclass(frozen=True)
class MFACOverAdam(MFAC):
    """M-FAC's sum of rows, divided entry by entry by the root of Adam's second moment of the rows."""

    def square_weights(self, gram: Gram, slot: Tensor) -> tuple[Tensor, Tensor]:
        return AdamStats().square_weights(gram, slot)


def _mfac_over_adam(params: Any, lr: float, window: int, density: float, damping: float) -> Optimizer:
    return EFCP(params, lr, TopK(density), MFACOverAdam(damping, relative=True), window=window)


FLOATS = {"momentum_dtype": None, "error_dtype": None}
MOMENTUM = {"direction": "momentum", "relative_damping": True, "update_rms": 0.2, "momentum": 0.9}
SUBSPACE = {"every": 50, "scale": 1.0}  # on Adam's scale; short runs would see one subspace in 200 steps
SPLIT = {"split": True}
"""The option of a method that leaves embeddings, head and vectors to AdamW, as `efcp.param_groups` splits a model."""

CONSTRUCTORS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "SGD (momentum 0.9)": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, 8 bits": (_adamw_8bit, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "L-BFGS": (torch.optim.LBFGS, {"max_iter": 1}),  # one evaluation a step, as for all other methods
    "L-BFGS, line search": (LineSearchLBFGS, {}),
    "Adam, then L-BFGS": (AdamThenLBFGS, {"adam_steps": 1}),
    DENSE: (DenseMFAC, {}),
    SPARSE: (SparseMFAC, {}),
    LOW_RANK: (LowRankMFAC, {}),
    "dense M-FAC, momentum": (DenseMFAC, MOMENTUM),
    "sparse M-FAC, momentum": (SparseMFAC, MOMENTUM),
    "low-rank M-FAC, momentum": (LowRankMFAC, MOMENTUM),
    "dense GGT": (DenseGGT, {}),
    "sparse GGT": (SparseGGT, {}),
    "low-rank GGT": (LowRankGGT, {}),
    "MicroAdam": (MicroAdam, {}),
    "M-FAC over Adam": (_mfac_over_adam, {}),
    "MFACW": (MFACW, {}),
    "MFACW, split": (MFACW, SPLIT),
    "MFACW, float state": (MFACW, FLOATS),
    "MFACW, split, float state": (MFACW, {**FLOATS, **SPLIT}),
    "KroneckerW": (KroneckerW, {}),
    "KroneckerW, split": (KroneckerW, SPLIT),
    "KroneckerW, split, momentum in 16 bits": (KroneckerW, {"momentum_dtype": torch.bfloat16, **SPLIT}),
    "normalised momentum": (MFACW, {"damping": 1e6, "rank": 1, "window": 1, **FLOATS}),
    "normalised momentum, split": (MFACW, {"damping": 1e6, "rank": 1, "window": 1, **FLOATS, **SPLIT}),
    "GaLoreAdamW": (GaLoreAdamW, SUBSPACE),
    "LDAdamW": (LDAdamW, {}),
    "AdaRankGrad": (AdaRankGrad, SUBSPACE),
    "Muon": (_muon, SPLIT),
    "SOAP": (_soap, {}),
}
"""The constructor of a method, and what it is always given."""

VARIANT = (
    "density",
    "error_feedback",
    "rank",
    "power_iterations",
    "window",
    "block_size",
    "value_dtype",
    "error_dtype",
)
"""Options that tell methods with the same name apart. All others are tuned."""
TUNED = ("damping", "eps", "weight_decay")
"""Options that are tuned together with the learning rate."""


@dataclass(frozen=True)
class Method:
    """An optimizer with all its options but the learning rate."""

    name: str
    constructor: Callable[..., Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> dict[str, Any]:
        """The options of `VARIANT` and `TUNED` with defaults of windowed methods filled in, for a record."""
        known: dict[str, Any] = {}
        if self._windowed:
            parameters = inspect.signature(self.constructor).parameters.values()
            known = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
            known.pop("weight_decay")  # blank where it is 0, as for other methods
        known |= self.options
        return {name: _plain(known.get(name)) for name in (*VARIANT, *TUNED)}

    @property
    def label(self) -> str:
        """A text that is unique among methods with the same window, block size and dtypes."""
        columns = self.columns
        return method_label(self.name, *(columns[option] for option in LABELLED))

    def build(self, model: nn.Module, lr: float) -> Optimizer:
        return self.constructor(self._params(model), lr=lr, **self._own)

    def estimate(self, model: nn.Module) -> MemoryReport | None:
        """Estimates the state of a windowed method, with `efcp.estimate_memory`; None for any other."""
        if self._windowed:
            return estimate_memory(self._params(model), self.constructor, **self._own)  # type: ignore[arg-type]
        return None

    @property
    def _own(self) -> dict[str, Any]:
        """The options of the constructor."""
        return {name: value for name, value in self.options.items() if name != "split"}

    def _params(self, model: nn.Module) -> Any:
        if self.options.get("split"):
            return param_groups(model)
        return [p for p in model.parameters() if p.requires_grad]

    @property
    def _windowed(self) -> bool:
        return isinstance(self.constructor, type) and issubclass(self.constructor, EFCP)


LABELLED = ("density", "error_feedback", "rank", "power_iterations")  # options that every label shows


def named_method(name: str, options: dict[str, Any]) -> Method:
    """Makes a method of `CONSTRUCTORS` from options, in which dtypes stand by name.

    Raises:
        ValueError: for another name, or options that the constructor refuses.
    """
    if name not in CONSTRUCTORS:
        raise ValueError(f"a method's name must be one of {', '.join(CONSTRUCTORS)}, got {name!r}")
    constructor, always = CONSTRUCTORS[name]
    chosen = {
        key: getattr(torch, str(value), value) if key.endswith("dtype") else value for key, value in options.items()
    }
    method = Method(name, constructor, always | chosen)
    try:
        method.build(nn.Linear(1, 1), 1e-3)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    return method


def method_label(
    name: str, density: float | None, error_feedback: bool | None, rank: int | None, power_iterations: int | None
) -> str:
    """A label such as "sparse M-FAC 1%, no error feedback"; an option is None where a method has no such option."""
    share = "" if density is None else f" {100 * density:g}%"
    iterations = "" if power_iterations is None else f", {power_iterations_label(power_iterations)}"
    factors = "" if rank is None else f" rank {rank:g}{iterations}"
    return f"{name}{share}{factors}{', no error feedback' if error_feedback is False else ''}"


def power_iterations_label(number: float | None) -> str:
    return f"{number:g} power iteration{'' if number == 1 else 's'}"


def compared_methods(
    window: int,
    damping: float,
    densities: Sequence[float],
    ranks: Sequence[int] = (),
    power_iterations: Sequence[int] = (1,),
) -> list[Method]:
    """First-order methods, dense M-FAC, sparse M-FAC at each density with and without error feedback, sparse GGT.

    With ranks also low-rank M-FAC, at each rank with each number of power iterations.
    """
    m_fac = {"window": window, "damping": damping}
    low_rank = [{"rank": rank, "power_iterations": number} for number in power_iterations for rank in ranks]
    return [
        named_method("SGD (momentum 0.9)", {}),
        named_method("Adam", {}),
        named_method(DENSE, m_fac),
        *_sparse_mfac(m_fac, densities),
        *(named_method(LOW_RANK, m_fac | options) for options in low_rank),
        named_method("sparse GGT", {"window": window, "density": _GGT_DENSITY, "error_feedback": True}),
    ]


def _sparse_mfac(m_fac: dict[str, Any], densities: Sequence[float]) -> Iterable[Method]:
    for error_feedback in (True, False):
        for density in densities:
            yield named_method(SPARSE, {**m_fac, "density": density, "error_feedback": error_feedback})


def _plain(value: Any) -> Any:
    """A value for a CSV file: a dtype becomes its name."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
