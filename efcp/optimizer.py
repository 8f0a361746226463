"""The optimizer: θ ← (1 − lr·wd) θ − lr · Gᵀ f(S) e_t, with the last m compressed gradients as rows of G, and S = GGᵀ.

Three parts that know nothing of each other meet in `EFCP.step`: a window (`efcp.windows`) compresses gradients and
keeps them, the Gram matrix (`efcp.gram`) keeps their inner products, and a preconditioner (`efcp.preconditioners`)
turns these into weights. State lives on the parameters, in `optimizer.state[p]`:

    of each parameter that has had a gradient: the tensors of its window; momentum (n,) and average (n,) where used
    of the first parameter, in addition: the Gram matrix, and what the preconditioner derives from it
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from efcp.checkpoint import Exact, check_options, check_same, check_structure, check_tensors
from efcp.checks import require, require_integer, require_number
from efcp.diagnostics import norms_and_rotation, scaling_quantiles
from efcp.gram import Gram, allocate_gram, check_gram
from efcp.options import check_keys
from efcp.parameters import Member, ParameterSet
from efcp.partitions import refuse_deepspeed_parameters, refuse_deepspeed_step, refuse_zero_redundancy_optimizer
from efcp.preconditioners import MFAC, Preconditioner
from efcp.windows import Compressor, TopK

OPTIONS = ("lr", "window", "momentum", "beta1", "weight_decay", "max_update_norm", "maximize")


class EFCP(Optimizer):
    """Preconditioning with a compressed gradient window (EFCP, arXiv 2306.06098): any compressor, any preconditioner.

    Options of the compressor, such as `density`, and of the preconditioner, such as `damping`, become options of the
    param groups. Each group may have its own lr, momentum, beta1, weight_decay, maximize and compressor options; on the
    others all groups must agree. `window` and the compressor's options are fixed from the first step on.

    A step leaves `p.grad` as it is. A parameter whose grad is None stays as it is, and contributes a zero row to the
    window. A step with an Inf or NaN in a gradient, or one whose squared norm overflows, leaves parameters, momentum
    and error as they are, contributes a zero row, and counts in `skipped_steps`.

    Args:
        params: parameters, named parameters, or param groups; floating point, on any devices.
        lr: learning rate ≥ 0, a float or a tensor of one element.
        compressor: `TopK(...)`, `LowRank(...)` or `Identity()`.
        preconditioner: `MFAC(...)` or `GGT(...)`.
        window: m, how many gradients are kept, ≥ 1.
        momentum: heavy ball on the update, in [0, 1).
        beta1: decay of an average of the gradients, which is compressed in their place, in [0, 1).
        weight_decay: decoupled, multiplied by lr, ≥ 0.
        max_update_norm: longer updates u are scaled down to this norm, > 0; None for no limit.
        maximize: maximise the objective.

    Raises:
        ValueError: for values that are not allowed, and within ZeRO, which hands over a part of the parameters.
        TypeError: for parameters that are not real floating point.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        compressor: Compressor = TopK(),
        preconditioner: Preconditioner = MFAC(),
        *,
        window: int = 1024,
        momentum: float = 0.0,
        beta1: float = 0.0,
        weight_decay: float = 0.0,
        max_update_norm: float | None = None,
        maximize: bool = False,
    ) -> None:
        refuse_zero_redundancy_optimizer()
        self.compressor, self.preconditioner = compressor, preconditioner
        defaults = {
            "lr": lr,
            "window": window,
            "momentum": momentum,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "max_update_norm": max_update_norm,
            "maximize": maximize,
            **compressor.options,
            **preconditioner.options,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, and within ZeRO of DeepSpeed.
            ValueError: where param groups disagree on an option that they must share.
            In both cases nothing has been changed.
        """
        refuse_deepspeed_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        max_update_norm, preconditioner = self._shared("max_update_norm"), self._shared_preconditioner()
        if all(p.grad is None for p in self._params()):
            return loss

        gram, sets = self._gram(), self._parameter_sets()
        finite = reduce(torch.logical_and, gram.on_its_device(s.gradients_are_finite() for s in sets))
        slot = gram.next_slot(finite)
        dots = reduce(torch.add, gram.on_its_device(s.push(slot, finite) for s in sets))
        gram.replace(slot, dots)
        weights = preconditioner.weights(gram, slot)
        if max_update_norm is not None:
            weights = weights * (max_update_norm / gram.squared_norm(weights).sqrt()).clamp(max=1.0)
        weights = torch.where(finite, weights, 0.0)
        gram.state["weights"].copy_(weights)
        for s in sets:
            s.update_(weights, finite)
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes anew what the preconditioner keeps beside the Gram matrix, which steps do by themselves.

        A step of M-FAC that is replayed from a CUDA graph does not: call this once in `window` replays, or rounding
        errors gather.
        """
        self._shared_preconditioner().refresh(self._gram())

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for an Inf or NaN in a gradient. Reading it waits for the device."""
        return int(self.state.get(next(self._params()), {}).get("skipped_steps", 0))

    def diagnostics(self, quantiles: bool = False) -> dict[str, float | None]:
        """What the last step did, for logs. Waits for the device.

        The update u is as it was applied, before momentum and lr. g is the gradient in `p.grad`, hence not there after
        `zero_grad()`, and scaled where a gradient scaler has scaled it.

        Args:
            quantiles: also those of |u/g|, for which u is computed again, one parameter at a time: about as much work
                as two steps.

        Returns:
            Floats, or None where there is no such number:
                grad_norm: ‖g‖.
                compressed_norm: ‖c‖, c the newest row of the window; 0 after a skipped step.
                error_norm: ‖e‖, the error that the next step adds to its gradient.
                update_norm: ‖u‖; 0 after a skipped step.
                cosine: cos(c, u), by how much preconditioning has turned the gradient.
                scaling_q25, scaling_q50, scaling_q75: quantiles of |u/g| over all entries with g ≠ 0; of N sorted
                    numbers the quantile q is number ⌊q (N − 1)⌋, counted from 0.
        """
        first = next(self._params())
        state = self.state.get(first, {})
        gram = Gram(state if "gram" in state else allocate_gram(self._shared("window"), first.device))
        members = list(self._members())
        result = norms_and_rotation(gram, members)
        return {**result, **scaling_quantiles(gram, members)} if quantiles else result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_keys(param_group)
        super().add_param_group(param_group)
        try:
            self._check_keys(self.param_groups[-1])  # again, with what `defaults` has added
            refuse_deepspeed_parameters(self.param_groups[-1]["params"])
            self._check_params(self.param_groups[-1]["params"])
            self._check_options(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, bit for bit.

        Nothing is cast: between parameters of different dtypes, a state can be loaded where none of its tensors has
        their dtype (TopK without momentum and beta1, the same `error_dtype`), and is refused elsewhere. What wrappers
        keep in the state, under names that are none of ours, is taken over as it is.

        Raises:
            ValueError: for a state of another window, compressor, preconditioner or model, and for a damaged one; it
                says what is wrong, and nothing has been changed.
        """
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: self._checked(loaded))  # after those of users
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compressor": self.compressor, "preconditioner": self.preconditioner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for param, saved in state["state"].items():
            if isinstance(saved, Exact):
                state["state"][param] = saved.on(param.device)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # else it would be an option of groups to come

    def allocate_state(self) -> None:
        """Allocates all state now, instead of when a parameter has its first gradient."""
        self._gram()
        for group in self.param_groups:
            compressor = self._compressor_of(group)
            for p in group["params"]:
                self._fill(self.state[p], p, group, compressor)

    # ---- what a step works on

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _shared(self, name: str, groups: list[dict[str, Any]] | None = None) -> Any:
        """The value of an option on which all param groups must agree."""
        values = [group[name] for group in groups or self.param_groups]
        require(all(v == values[0] for v in values), name, "be the same in all param groups", values)
        return values[0]

    def _shared_preconditioner(self, groups: list[dict[str, Any]] | None = None) -> Preconditioner:
        return type(self.preconditioner)(**{name: self._shared(name, groups) for name in self.preconditioner.options})

    def _compressor_of(self, group: dict[str, Any]) -> Compressor:
        return type(self.compressor)(**{name: group[name] for name in self.compressor.options})

    def _gram(self) -> Gram:
        window, state = self._shared("window"), self.state[next(self._params())]
        if "gram" not in state:
            state.update(self._allocate_shared(next(self._params()).device))
        require(len(state["gram"]) == window, "window", f"stay what it was, {len(state['gram'])}", window)
        return Gram(state)

    def _parameter_sets(self) -> list[ParameterSet]:
        """The parameters that have a window; those with a first gradient get theirs."""
        sets = []
        for group in self.param_groups:
            compressor, alike = self._compressor_of(group), defaultdict[Any, list[Tensor]](list)
            for p in group["params"]:
                if p.grad is not None or compressor.rows_name(p) in self.state.get(p, {}):
                    self._fill(self.state[p], p, group, compressor)
                    alike[p.device, p.dtype, self._dtypes(p)].append(p)
            sets += [ParameterSet(group, compressor, some, [self.state[p] for p in some]) for some in alike.values()]
        return sets

    def _dtypes(self, param: Tensor) -> tuple[torch.dtype, ...]:
        """Of what has an entry for each of the parameter's: it keeps its dtype when the model is cast."""
        state = self.state[param]
        return tuple(state[name].dtype for name in ("error", "momentum", "average") if name in state)

    def _members(self) -> Iterator[Member]:
        """The parameters that have a window by now."""
        for group in self.param_groups:
            compressor = self._compressor_of(group)
            for p in group["params"]:
                state = self.state.get(p, {})
                if compressor.rows_name(p) in state:
                    yield Member(p, state, compressor)

    # ---- state

    def _allocate_shared(self, device: torch.device) -> dict[str, Any]:
        """What the state of the first parameter holds for all."""
        window = self._shared("window")
        return {**allocate_gram(window, device), **self._shared_preconditioner().allocate(window, device)}

    def _state_names(self) -> set[str]:
        """All that the state of a parameter may hold of ours; other names there belong to wrappers."""
        return {*self.compressor.names, "momentum", "average", *self._allocate_shared(torch.device("meta"))}

    @staticmethod
    def _fill(state: dict[str, Any], param: Tensor, group: dict[str, Any], compressor: Compressor) -> None:
        """Adds to the state of a parameter what is missing."""
        if compressor.rows_name(param) not in state:
            state.update(compressor.allocate(param, group["window"]))
        for name, decay in (("momentum", group["momentum"]), ("average", group["beta1"])):
            if decay > 0 and name not in state:
                state[name] = torch.zeros(param.numel(), dtype=param.dtype, device=param.device)

    # ---- checks

    def _check_options(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            lr = group["lr"]
            if isinstance(lr, Tensor):
                require(lr.numel() == 1, "lr", "have one element", lr)
            else:
                require_number("lr", lr, 0)
            require_number("momentum", group["momentum"], 0, 1)
            require_number("beta1", group["beta1"], 0, 1)
            require_number("weight_decay", group["weight_decay"], 0)
            require_integer("window", group["window"], 1)
            require(isinstance(group["maximize"], bool), "maximize", "be True or False", group["maximize"])
            if group["max_update_norm"] is not None:
                require_number("max_update_norm", group["max_update_norm"], 0, open_low=True)
            self._compressor_of(group)
        self._shared("max_update_norm", groups)
        self._shared("window", groups)
        self._shared_preconditioner(groups)

    def _option_names(self) -> tuple[str, ...]:
        return (*OPTIONS, *self.compressor.options, *self.preconditioner.options)

    def _check_keys(self, group: dict[str, Any], where: str = "param group") -> None:
        check_keys(where, type(self).__name__, group.items(), self._option_names())

    @staticmethod
    def _check_params(params: list[Tensor]) -> None:
        if len(set(params)) < len(params):
            raise ValueError("params must not hold a parameter twice; a param group does")
        for p in params:
            if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                allowed = "float16, bfloat16, float32 or float64"
                raise TypeError(f"params must be of dtype {allowed}, got {p.dtype} of shape {tuple(p.shape)}")

    def _check_gradients(self) -> None:
        for p in self._params():
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"gradients must be dense, got {p.grad.layout} for a parameter of shape {tuple(p.shape)}"
                )

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict, if it fits the optimizer, made so that loading does not cast it."""
        check_structure(state_dict)
        groups, own_names = state_dict["param_groups"], self._state_names()
        params = {key for group in groups for key in group["params"]}
        states = {  # without what wrappers keep there
            key: {name: value for name, value in saved.items() if name in own_names}
            for key, saved in state_dict["state"].items()
            if key in params
        }
        check_same("state_dict", "the number of param groups", len(groups), len(self.param_groups))
        first = next(self._params())
        for number, (saved_group, group) in enumerate(zip(groups, self.param_groups, strict=True)):
            where = f"param_groups[{number}]"
            compressor = self._compressor_of(group)
            check_same(where, "the number of parameters", len(saved_group["params"]), len(group["params"]))
            check_options(where, saved_group, self._option_names())
            for name in ("window", *compressor.options, *self.preconditioner.fixed):
                check_same(where, name, saved_group[name], group[name])
            self._check_keys(saved_group, where)
            for position, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=True)):
                saved = states.get(key, {})
                expected: dict[str, Any] = {}
                if p is first and any(states.values()):
                    expected |= self._allocate_shared(torch.device("meta"))
                if compressor.rows_name(p) in saved:
                    used = {"momentum": "momentum" in saved, "beta1": "average" in saved, "window": group["window"]}
                    self._fill(expected, torch.empty_like(p, device="meta"), used, compressor)
                here = f"{where}, parameter {position}"
                check_tensors(here, saved, expected)
                if "gram" in expected:
                    check_gram(here, saved)
                if compressor.rows_name(p) in saved:
                    compressor.check(here, saved, p)
        self._check_options(groups)
        exact = {key: Exact(saved) if key in params else saved for key, saved in state_dict["state"].items()}
        return {**state_dict, "state": exact}
