"""Adam in a subspace of each gradient matrix, with decoupled weight decay: θ ← (1 − lr·wd) θ − lr · scale · P N.

Three parts that know nothing of each other meet in `SubspaceAdam.step`: a projector chooses a basis P
(`efcp.subspace.projectors`), a transport moves the moments when the basis moves (`efcp.subspace.transports`), and an
error keeps what does not fit in (`efcp.subspace.errors`). A step of a matrix, turned so that its shorter side comes
first, with c completed steps:

    a = g + e                                           (n, k): the gradient and the error
    P from a, every T steps;  m̃, ṽ from m, v            as the projector and the transport say
    x = Pᵀa                                             (r, k)
    m ← β₁ m̃ + (1 − β₁) x,  v ← β₂ ṽ + (1 − β₂) x∘x
    N = m̂ / (√v̂ + ε),  m̂ = m / (1 − β₁ᶜ⁺¹),  v̂ likewise
    e from a, Px and what moments have lost              as the error says

Vectors, and matrices whose shorter side is no longer than the rank, are stepped by AdamW: P = I, e = 0, scale = 1.
Tensors of more dimensions are matrices of shape[0] rows. State of each parameter that has had a gradient:

    step           ()      int64    steps taken
    skipped_steps  ()      int64    steps skipped since there is any state
    exp_avg        (r, k)  float32  m; of the parameter's shape where it is stepped by AdamW
    exp_avg_sq     (r, k)  float32  v
    and what the projector and the error keep. Of float64 parameters all float32 tensors are float64.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from efcp.checkpoint import Exact, check_same, check_structure, check_tensors, other_names
from efcp.checks import check_content, plain, require, require_betas, require_number
from efcp.kernels import accumulation_dtype
from efcp.options import check_keys
from efcp.parameters import check_gradient, check_parameter, names, new_tensors_are_fake
from efcp.shards import is_sharded
from efcp.subspace.errors import ErrorFeedback, require_error
from efcp.subspace.projectors import Projector, require_projector
from efcp.subspace.transports import Transport, require_transport

OPTIONS = ("lr", "betas", "eps", "weight_decay", "scale", "maximize", "projector", "transport", "error")
PARTS = ("projector", "transport", "error")  # param groups hold their names
COUNTERS = ("step", "skipped_steps")
MOMENTS = ("exp_avg", "exp_avg_sq")

Forms = dict[str, tuple[tuple[int, ...], torch.dtype]]


class SubspaceAdam(Optimizer):
    """AdamW in a low-rank subspace of each gradient matrix: any projector, any transport of moments, any error.

    >>> SubspaceAdam(params, 1e-3, projector=DCT(rank=64), transport=LDAdamTransport(), error=PlainError())

    Options of the projector, such as `rank`, become options of the param groups, each of which may have its own. `rank`
    is fixed from the first step on.

    A step leaves `p.grad` as it is. A parameter whose grad is None stays as it is. A step with an Inf or NaN in a
    gradient, or one whose squared norm overflows, leaves all parameters and their state as they are, and counts in
    `skipped_steps`; on a GPU nobody waits for this.

    Args:
        params: parameters, named parameters, or param groups; real floating point, on any devices, not divided over
            processes. Arithmetic and state of float16 and bfloat16 parameters are in float32.
        lr: learning rate ≥ 0, a float or a tensor of one element.
        projector: which subspace: `SVD`, `RandomizedSVD`, `PowerIteration`, `DCT`, or any `efcp.subspace.Projector`.
        transport: what becomes of the moments when it moves: `NoTransport`, `LDAdamTransport`, or any
            `efcp.subspace.Transport`.
        error: what of a gradient outside of it is kept for the next: `NoError`, `PlainError`, `LDAdamError`, or any
            `efcp.subspace.ErrorFeedback`.
        betas: β₁ and β₂ of the two moments, each in [0, 1).
        eps: ε, added to the root of the second moment; at least 1.2e-38.
        weight_decay: decoupled, multiplied by lr, ≥ 0; taken before the update.
        scale: a factor ≥ 0 of the updates in subspaces, not of those that AdamW takes.
        maximize: maximise the objective.

    Raises:
        ValueError: for values that are not allowed, and for parts that have no sense together.
        TypeError: for parameters that are not real floating point or are divided, and for other things than parts.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        projector: Projector,
        transport: Transport,
        error: ErrorFeedback,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        scale: float = 1.0,
        maximize: bool = False,
    ) -> None:
        require_projector(projector)
        require_transport(transport)
        require_error(error)
        if clash := sorted({*OPTIONS, "params", "param_names"} & projector.options.keys()):
            raise ValueError(
                f"projector must not have options named {', '.join(clash)}, which param groups have already"
            )
        self.projector, self.transport, self.error = projector, transport, error
        self._schedules: dict[Tensor, tuple[int, int]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale": scale,
            "maximize": maximize,
            **self._names_of_parts(),
            **projector.options,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step. Where it raises an error for what it was given, nothing has been changed.

        Where a basis is chosen by an SVD, this waits for the device, and so it does once when a choice is near.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients.
            TypeError: for gradients without memory of their own, or of a dtype that is not real floating point.
            ValueError: for gradients of another shape or device than their parameter, for options that are not allowed,
                and for state of another rank or of a parameter of another shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_tensors()
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not stepped:
            return loss
        for group, p in stepped:
            self._allocate(group, p)
        finite = norms_are_finite([p.grad for _, p in stepped if p.grad is not None])
        known = is_cheap(finite)
        if not (known and finite):
            self._count_skipped(finite)
        if known and not finite:
            return loss
        for group, p in stepped:
            self._step_parameter(group, p, None if known else finite.to(p.device, non_blocking=True))
        return loss

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for an Inf or NaN in a gradient. Reading it waits for the device."""
        return max((int(s["skipped_steps"]) for s in self.state.values() if "skipped_steps" in s), default=0)

    def allocate_state(self) -> None:
        """Allocates all state now, instead of when a parameter has its first gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                self._allocate(group, p)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_keys("param group", param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("betas", *self.projector.options):
                group[name] = plain(group[name])
            self._check_options("param group", group)
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError("params must not hold a parameter twice; a param group does")
            for p in group["params"]:
                self._check_parameter(p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, bit for bit; nothing is cast.

        Options of the param groups are those of the state, as with every optimizer of PyTorch. Parameters are matched
        by their order; where both sides know names, and these differ, there is a warning. What wrappers keep in the
        state, under names that are none of ours, is taken over as it is.

        Raises:
            ValueError: for a state of other parts, another rank or another model, and for a damaged one; it says what
                is wrong, and nothing has been changed.
        """
        warning = ""

        def check(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            nonlocal warning
            fitting = self._checked(loaded)
            warning = other_names(loaded["param_groups"], self.param_groups)
            return fitting

        handle = self.register_load_state_dict_pre_hook(check)  # after those of users
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if warning:
            warnings.warn(warning, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in PARTS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `load_state_dict` or unpickling has restored."""
        for param, saved in state["state"].items():
            if isinstance(saved, Exact):
                state["state"][param] = saved.on(param.device)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # else it would be an option of groups to come
        self._schedules = {}

    # ---- a step

    def _step_parameter(self, group: dict[str, Any], p: Tensor, finite: Tensor | None) -> None:
        """Steps a parameter.

        Args:
            finite: () bool on its device; where false, all stays as it is. None where it is known to be true.
        """
        state, dtype = self.state[p], accumulation_dtype(p.dtype)
        assert p.grad is not None
        g = p.grad.to(dtype)
        if finite is not None:
            g = torch.where(finite, g, 0.0)
        if group["maximize"]:
            g = -g
        projector = self._projector(group)
        if in_subspace(p, projector.rank):
            new, update = self._subspace_step(group, p, projector, matrix(g))
            update = group["scale"] * (update if turned(p) else update.T).reshape(p.shape)
        else:
            new = moments(group, state["exp_avg"], state["exp_avg_sq"], g)
            update = direction(group, new, state["step"])
        new["step"] = state["step"] + 1
        if finite is not None:
            new = {name: torch.where(finite, value, state[name]) for name, value in new.items()}
        for name, value in new.items():
            state[name].copy_(value)
        lr = group["lr"]
        lr = lr.reshape(()).to(p.device, dtype) if isinstance(lr, Tensor) else lr
        moved = p.to(dtype) * (1 - lr * group["weight_decay"]) - lr * update
        p.copy_(moved if finite is None else torch.where(finite, moved, p.to(dtype)))

    def _subspace_step(
        self, group: dict[str, Any], p: Tensor, projector: Projector, g: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the new state of a matrix, all but `step`, and its update P N, (n, k).

        Args:
            g: (n, k), the gradient, which stays as it is.
        """
        state, (n, _), dtype = self.state[p], g.shape, g.dtype
        kept: dict[str, Tensor] = {name: state[name] for name in projector.forms(n, dtype)}
        a = g + state["error"] if self.error.keeps else g
        old_basis, mean, square = projector.basis(kept, n, dtype), state["exp_avg"], state["exp_avg_sq"]
        basis, moved, new = old_basis, (mean, square), dict[str, Tensor]()
        due, first = self._schedule(p, projector.every)
        if due:
            corrections = correction(group, 0, state["step"], dtype), correction(group, 1, state["step"], dtype)
            new = projector.choose(kept, a, mean / corrections[0], first)
            basis = projector.basis(new, n, dtype)
            moved = self.transport.move(projector.rotation(new, kept, dtype), mean, square, corrections)
        x = basis.T @ a  # (r, k)
        if self.error.keeps:
            beta1 = group["betas"][0]
            new["error"] = self.error.left(a, basis @ x, (old_basis, mean), (basis, moved[0]), beta1)
        new |= moments(group, *moved, x)
        return new, basis @ direction(group, new, state["step"])

    def _schedule(self, p: Tensor, every: int) -> tuple[bool, bool]:
        """Whether a parameter's basis is to be chosen in this step, and whether it is the first.

        Steps are counted on the device, which alone knows whether one is skipped. A step is read only where so many
        have been called since the last look that the basis may be due.
        """
        known, calls = self._schedules.get(p, (every, 0))
        if known == every and calls > 0:
            self._schedules[p] = every, calls - 1
            return False, False
        if known == every == 1 and calls < 0:
            return True, False
        done = int(self.state[p]["step"])
        to_go = -done % every
        self._schedules[p] = every, max(to_go - 1, 0) if every > 1 or done == 0 else -1
        return to_go == 0, done == 0

    def _count_skipped(self, finite: Tensor) -> None:
        """Counts a step as skipped unless finite, in all states: the oldest has counted all."""
        for state in self.state.values():
            if "skipped_steps" in state:
                state["skipped_steps"] += (~finite).to(state["skipped_steps"].device, non_blocking=True)

    # ---- state

    def _projector(self, group: dict[str, Any]) -> Projector:
        options = {name: group[name] for name in self.projector.options}
        return replace(self.projector, **options)  # type: ignore[type-var]

    def _names_of_parts(self) -> dict[str, str]:
        return {name: type(getattr(self, name)).__name__ for name in PARTS}

    def _forms(self, group: dict[str, Any], p: Tensor) -> Forms:
        """The shapes and dtypes of a parameter's state."""
        dtype, projector, shape = accumulation_dtype(p.dtype), self._projector(group), tuple(p.shape)
        own: Forms = {}
        if in_subspace(p, projector.rank):
            n, k = sides(p)
            shape = projector.rank, k
            own = projector.forms(n, dtype)
            own |= {"error": ((n, k), dtype)} if self.error.keeps else {}
        return {
            **dict.fromkeys(COUNTERS, ((), torch.int64)),
            **dict.fromkeys(MOMENTS, (shape, dtype)),
            **own,
        }

    def _allocate(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if "step" in state:
            return
        self._schedules.pop(p, None)
        with torch.inference_mode(False):
            for name, (shape, dtype) in self._forms(group, p).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=p.device)

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict whose tensors are protected from casting. Raises ValueError where it does not fit."""
        check_structure(state_dict)
        saved_groups = state_dict["param_groups"]
        check_same("state_dict", "the number of param groups", len(saved_groups), len(self.param_groups))
        groups, states = [], dict[Any, Any](state_dict["state"])
        for number, (saved, group) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            where = f"param_groups[{number}]"
            check_same(where, "the number of parameters", len(saved["params"]), len(group["params"]))
            self._check_keys(where, saved)
            options = (*OPTIONS, *self.projector.options)
            if missing := [name for name in options if name not in saved]:
                raise ValueError(f"{where}: the state has no {', '.join(missing)}; it is of another kind of optimizer")
            for name in PARTS:
                check_same(where, name, saved[name], group[name])
            check_same(where, "rank", self._projector(saved).rank, self._projector(group).rank)
            loaded = {**group, **saved, **{name: plain(saved[name]) for name in options}}
            loaded |= {"param_names": group["param_names"]} if "param_names" in group else {}
            self._check_options(where, loaded)
            groups.append(loaded)
            for position, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
                if key in states:
                    self._check_saved(f"{where}, parameter {position}", states[key], loaded, p)
                    states[key] = Exact(states[key])
        return {**state_dict, "param_groups": groups, "state": states}

    def _check_saved(self, where: str, saved: dict[str, Any], group: dict[str, Any], p: Tensor) -> None:
        """Checks a parameter's saved state, which may be none of ours where a wrapper alone has written there."""
        if not saved:
            return
        forms = self._forms(group, p)
        check_tensors(where, saved, {name: torch.empty(s, dtype=d, device="meta") for name, (s, d) in forms.items()})
        for name in forms:
            check_content(where, name, saved[name].isfinite().all(), "be finite")
        for name in (*COUNTERS, "exp_avg_sq"):
            check_content(where, name, (saved[name] >= 0).all(), "not be negative")
        projector = self._projector(group)
        if in_subspace(p, projector.rank):
            projector.check(where, saved, sides(p)[0])

    # ---- checks

    def _name(self, param: Tensor) -> str:
        """The name by which errors call a parameter."""
        return next((name for p, name in names(self.param_groups) if p is param), "a parameter of no param group")

    def _check_keys(self, where: str, group: dict[str, Any]) -> None:
        check_keys(where, type(self).__name__, group.items(), (*OPTIONS, *self.projector.options))

    def _check_options(self, where: str, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            require(lr.numel() == 1, "lr", "have one element", lr)
        else:
            require_number("lr", lr, 0)
        require_betas(group["betas"])
        require_number("eps", group["eps"], torch.finfo(torch.float32).smallest_normal)
        for name in ("weight_decay", "scale"):
            require_number(name, group[name], 0)
        require(isinstance(group["maximize"], bool), "maximize", "be True or False", group["maximize"])
        for name, own in self._names_of_parts().items():
            require(group[name] == own, name, f"be {own}, the same in all param groups", group[name])
        check_parts(self._projector(group), self.transport, self.error)

    def _check_parameter(self, p: Tensor) -> None:
        if is_sharded(p):
            raise TypeError(
                f"params must not be divided over processes, got a DTensor for {self._name(p)}: a subspace is that of "
                "a whole matrix"
            )
        check_parameter(partial(self._name, p), p)

    def _check_tensors(self) -> None:
        """Checks all options, gradients and states before a step changes anything."""
        fake = new_tensors_are_fake()
        for number, group in enumerate(self.param_groups):
            self._check_options(f"param_groups[{number}]", group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                check_gradient(partial(self._name, p), p, fake)
                state = self.state.get(p, {})
                if "step" not in state:
                    continue
                for name, (shape, dtype) in self._forms(group, p).items():
                    own = state.get(name)
                    fits = own is not None and (tuple(own.shape), own.dtype, own.device) == (shape, dtype, p.device)
                    if not fits:
                        got = "nothing" if own is None else f"{tuple(own.shape)}, {own.dtype} on {own.device}"
                        raise ValueError(
                            f"the state of a parameter must fit it and the rank: {name} of {self._name(p)} must have "
                            f"shape {shape}, {dtype} on {p.device}, got {got}; rank must stay what it was, and "
                            "optimizer.state[p] be deleted where a parameter is replaced"
                        )


def check_parts(projector: Projector, transport: Transport, error: ErrorFeedback) -> None:
    """Raises ValueError for parts that have no sense together, with the reason."""
    for part in (projector, error):
        kind, allowed = type(part).__name__, "move the moments"
        if part.needs_transport and not transport.moves:
            reason = "the basis moves in every step" if part is projector else "it keeps what moments lose on their way"
            raise ValueError(
                f"transport must {allowed} with {kind}, as LDAdamTransport does: {reason}; got {transport}"
            )
    if error.keeps and projector.every > 1:
        raise ValueError(
            f"every must be 1 with {type(error).__name__}, got {projector.every}: while a basis P stays, the error e "
            "has Pᵀe = 0, so that steps do not see it and it only grows"
        )


def in_subspace(p: Tensor, rank: int) -> bool:
    """Whether a parameter is a matrix whose subspace would be smaller."""
    return p.ndim >= 2 and min(sides(p)) > rank


def sides(p: Tensor) -> tuple[int, int]:
    """The shorter and the longer side of a matrix; tensors of more dimensions have shape[0] rows."""
    rows = p.shape[0]
    columns = p.numel() // max(1, rows)
    return min(rows, columns), max(rows, columns)


def turned(p: Tensor) -> bool:
    """Whether a matrix has its shorter side first as it is."""
    return p.shape[0] == sides(p)[0]


def matrix(g: Tensor) -> Tensor:
    """A gradient as a matrix with its shorter side first, (n, k); a view where it can be."""
    flat = g.reshape(g.shape[0], -1)
    return flat if turned(g) else flat.T


def correction(group: dict[str, Any], which: int, step: Tensor, dtype: torch.dtype) -> Tensor:
    """1 − βᶜ after c steps, () of a dtype; 1 where c = 0."""
    return torch.where(step > 0, 1 - group["betas"][which] ** step.double(), 1.0).to(dtype)


def moments(group: dict[str, Any], mean: Tensor, square: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Adam's moments with x taken in."""
    beta1, beta2 = group["betas"]
    return {
        "exp_avg": beta1 * mean + (1 - beta1) * x,
        "exp_avg_sq": beta2 * square + (1 - beta2) * x.square(),
    }


def direction(group: dict[str, Any], new: dict[str, Tensor], step: Tensor) -> Tensor:
    """N = m̂ / (√v̂ + ε), of the shape of the moments.

    Args:
        new: the moments, with the newest gradient.
        step: c, the steps completed before.
    """
    dtype = new["exp_avg"].dtype
    first, second = correction(group, 0, step + 1, dtype), correction(group, 1, step + 1, dtype)
    return new["exp_avg"] / first / ((new["exp_avg_sq"] / second).sqrt() + group["eps"])


def norms_are_finite(grads: list[Tensor]) -> Tensor:
    """Whether all squared norms are finite, hence all entries: () bool on the device of the first."""
    device = grads[0].device
    norms = [torch.linalg.vector_norm(g, dtype=accumulation_dtype(g.dtype)).square().isfinite() for g in grads]
    return torch.stack([flag.to(device, non_blocking=True) for flag in norms]).all()


def is_cheap(flag: Tensor) -> bool:
    """Whether a flag can be read without waiting for a device."""
    return flag.device.type == "cpu"
