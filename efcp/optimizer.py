"""The optimizer: θ ← (1 − lr·wd) θ − lr · Gᵀ f(S) e_t, with the last m compressed gradients as rows of G, and S = GGᵀ.

Three parts that know nothing of each other meet in `EFCP.step`: a window (`efcp.windows`) compresses gradients and
keeps them, the Gram matrix (`efcp.gram`) keeps their inner products, and a preconditioner (`efcp.preconditioners`)
turns these into weights, for what a direction (`efcp.directions`) says. State:

    optimizer.state[p]   of each parameter that has had a gradient: numel, the number of its elements; the tensors of
                         its window; momentum (n,) and average (n,) where used; of parameters that are divided over
                         processes as `efcp.shards` says
    optimizer.shared     of all together: the Gram matrix, what the preconditioner derives from it, and version

Editing param groups, parameters or their states does not change `shared`. The state of the first parameter that has a
window holds the same tensors, so whatever saves, copies or moves states takes them along, wrappers included.
"""

import inspect
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import Optimizer, ParamsT

from efcp import kernels
from efcp.adamw import BETAS, AdamWSet
from efcp.checkpoint import Exact, check_tensors, checked, other_names
from efcp.checks import plain, require
from efcp.diagnostics import QUANTILES, norms_and_rotation, scaling_quantiles
from efcp.directions import average_update, local_update, momentum_update, row_update
from efcp.gram import Gram, allocate_gram, check_gram
from efcp.lookout import Lookout
from efcp.members import Member, fill_state, forms_of, member_of
from efcp.options import (
    OPTIONS,
    agreed,
    agreed_preconditioner,
    check_keys,
    check_options,
    check_parts,
    made_from,
)
from efcp.parameter_sets import ParameterSet, dtypes, rounding
from efcp.parameters import (
    check_divided_state,
    check_gradient,
    check_parameter,
    check_part,
    check_state,
    names,
    new_tensors_are_fake,
)
from efcp.partitions import refuse_deepspeed_parameters, refuse_deepspeed_step, refuse_zero_redundancy_optimizer
from efcp.preconditioners import MFAC, LocalPreconditioner, Preconditioner
from efcp.shards import (
    Layout,
    Ranks,
    Share,
    check_layout,
    check_mesh,
    gather_,
    is_hashable,
    is_sharded,
    layout_of,
    local,
    part_of,
)
from efcp.shared_state import Origin, allocate_shared, show
from efcp.windows import Compressor, TopK

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class EFCP(Optimizer):
    """Preconditioning with a compressed gradient window (EFCP, arXiv 2306.06098): any compressor, any preconditioner.

    Options of the compressor, such as `density`, and of the preconditioner, such as `damping`, become options of the
    param groups. Each group may have its own lr, momentum, beta1, weight_decay, maximize and compressor options; all
    other options must be the same in every group. `window` and the compressor's options are fixed from the first step
    on.

    A step leaves `p.grad` as it is. A parameter whose grad is None stays as it is, and contributes a zero row to the
    window. A step with an Inf or NaN in a gradient, or one whose squared norm overflows, leaves parameters, momentum
    and error as they are (errors of sparse windows up to one rounding), contributes a zero row, and counts in
    `skipped_steps`.

    Args:
        params: parameters, named parameters, or param groups; floating point, on any devices.
        lr: learning rate ≥ 0, a float or a tensor of one element.
        compressor: how gradients are kept: `TopK`, `LowRank`, `Identity`, or any `Compressor`.
        preconditioner: how the window becomes an update: `MFAC`, `GGT`, `AdamStats`, or any `Preconditioner`.
        window: m, how many gradients are kept, ≥ 1.
        direction: what is preconditioned: "row", the newest row, as in the papers; "average", an average of the rows
            held; "momentum", a dense momentum (`efcp.directions`). Fixed from the first step on.
        momentum: β in [0, 1) of the average or the dense momentum; with direction "row", heavy ball on the update.
        beta1: in [0, 1): the average a ← beta1 · a + (1 − beta1) · g is compressed in place of g.
        weight_decay: decoupled, multiplied by lr, ≥ 0.
        update_rms: the root mean square of the update's entries, > 0: u is scaled to ‖u‖ = update_rms · √d, with d the
            number of elements that have a gradient. 0.2 is the size of Adam's updates. None leaves u as it is.
        max_update_norm: longer updates u are scaled down to this norm, > 0; None for no limit.
        momentum_dtype: of the momentum: floating point; torch.int8, with a scale for 64 elements, for the direction
            "momentum"; None for the parameter's. Fixed from the first step on.
        maximize: maximise the objective.
        adamw: of a param group: step its parameters by AdamW, with the group's lr, weight_decay and betas, instead.
        mesh: a DeviceMesh of one dimension whose ranks hold the same plain parameters and gradients, as with
            `DistributedDataParallel`: each keeps its share of the state, steps its share of every parameter, and gets
            the rest from the others. Parameters that are DTensors need no mesh.

    Raises:
        ValueError: for values that are not allowed, and within ZeRO, which hands over a part of the parameters.
        TypeError: for parameters that are not real floating point, and for other things than a compressor and a
            preconditioner.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        compressor: Compressor = TopK(),
        preconditioner: Preconditioner = MFAC(),
        *,
        window: int = 64,
        direction: str = "row",
        momentum: float = 0.0,
        beta1: float = 0.0,
        weight_decay: float = 0.0,
        update_rms: float | None = None,
        max_update_norm: float | None = None,
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        adamw: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        refuse_zero_redundancy_optimizer()
        check_parts(compressor, preconditioner)
        check_mesh(mesh)
        self.mesh, self._parts = mesh, dict[Tensor, Tensor]()
        self.compressor, self.preconditioner = compressor, preconditioner
        self.shared: dict[str, Any] = {}
        self._origin, self._lookout, self._tables = Origin(), Lookout(), kernels.Tables()
        defaults = {
            "lr": lr,
            "window": window,
            "direction": direction,
            "momentum": momentum,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "update_rms": update_rms,
            "max_update_norm": max_update_norm,
            "momentum_dtype": momentum_dtype,
            "maximize": maximize,
            "adamw": adamw,
            **compressor.options,
            **preconditioner.options,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step. Where it raises an error, nothing has been changed.

        Where parameters are divided over processes, all of these must call it: it exchanges a flag and m numbers.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for sparse gradients, and within ZeRO of DeepSpeed.
            TypeError: for gradients without memory of their own, or of a dtype that is not real floating point.
            ValueError: where param groups disagree on an option that they must share, for gradients of another shape
                or device than their parameter, and for state of a parameter of another size or shape.
        """
        refuse_deepspeed_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.param_groups:
            with self._tables:
                self._take_step()
            self._parts = {}  # they hold gradients
        return loss

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes what the preconditioner keeps beside the Gram matrix. Ordinary steps do this when needed.

        A step of M-FAC that is replayed from a CUDA graph does not: call this once in `window` replays, or rounding
        errors gather.
        """
        agreed_preconditioner(self.param_groups, self.preconditioner).refresh(self._gram())

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for an Inf or NaN in a gradient. Reading it waits for the device.

        After ten skipped steps in a row there is a warning that names the parameters, by itself and without waiting.
        """
        return int(self.shared.get("skipped_steps", 0))

    def diagnostics(self, quantiles: bool = False) -> dict[str, float | None]:
        """Describes what the last step did, for logs. Waits for the device.

        u is the update before momentum and lr. Where its length does not follow from the Gram matrix, as with
        `AdamStats`, c and u are computed again, one parameter at a time. g is read from `p.grad`: call this before
        `zero_grad()`, and after the `unscale_` of a gradient scaler. Where parameters are divided over processes, all
        must call it, and get the same numbers.

        Args:
            quantiles: also those of |u/g|, for which u is computed again, one parameter at a time: about as much work
                as two steps.

        Returns:
            A dict of floats, with None where a number does not exist. Its keys:
                grad_norm: ‖g‖.
                compressed_norm: ‖c‖, c the newest row of the window; 0 after a skipped step.
                error_norm: ‖e‖, the error that the next step adds to its gradient.
                update_norm: ‖u‖; 0 after a skipped step.
                cosine: cos(c, u): 1 where preconditioning has not turned the gradient.
                scaling_q25, scaling_q50, scaling_q75: quantiles of |u/g| over all entries with g ≠ 0; of N sorted
                    numbers the quantile q is number ⌊q (N − 1)⌋, counted from 0.
        """
        own = self.shared or allocate_gram(agreed(self.param_groups, "window"), torch.device("cpu"))
        self._parts = {}
        gram, sets, ranks = Gram(own), self._sets(alone=True), self._ranks()
        self._parts = {}
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        result = norms_and_rotation(gram, sets, preconditioner, ranks)
        if not quantiles:
            return result
        if isinstance(preconditioner, LocalPreconditioner):
            return {**result, **dict.fromkeys(QUANTILES)}
        return {**result, **scaling_quantiles(gram, sets, preconditioner, ranks)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            self._check_keys(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_keys(group)  # again, with what `defaults` has added
            for name in (*self.compressor.options, *self.preconditioner.options, "momentum_dtype"):
                group[name] = plain(group[name])
            if group["adamw"]:  # not an option of all, or schedulers that turn `momentum` would turn these
                betas = group.setdefault("betas", list(BETAS))
                group["betas"] = list(betas) if isinstance(betas, tuple) else betas  # as checkpoints give them back
            refuse_deepspeed_parameters(group["params"])
            check_options([self.param_groups[0], group], self.compressor, self.preconditioner)
            self._check_params(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, bit for bit.

        Nothing is cast. A state can move between parameters of different dtypes only if none of its tensors has the
        parameters' dtype: that of TopK without momentum and beta1, with the same `error_dtype`. States of
        earlier versions are loaded; options that they lack have their defaults. Parameters are matched by their order;
        where both sides know names, and these differ, there is a warning. What wrappers keep in the state, under names
        that are none of ours, is taken over as it is.

        Where parameters are divided over processes, all of these must call it. Their states must be divided in the
        same way, as `torch.distributed.checkpoint` gives them.

        Raises:
            ValueError: for a state of another window, compressor, preconditioner or model, and for a damaged one; it
                says what is wrong, and nothing has been changed, on any process.
        """
        warning = ""

        def check(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            nonlocal warning
            preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
            own = self.param_groups, self.compressor, preconditioner, _defaults()
            fitting: dict[str, Any] = {}
            error: Exception | None = None
            try:
                fitting = checked(loaded, *own, type(self).__name__, self._layout)
                warning = other_names(loaded["param_groups"], self.param_groups)
            except Exception as raised:
                error = raised
            self._ranks().agree(error)
            return fitting

        handle = self.register_load_state_dict_pre_hook(check)  # after those of users
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if warning:
            warnings.warn(warning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, with `shared` in the state of the first parameter that has a window.

        States of parameters that are in no param group any more are left out.
        """
        self._mark_changes()
        own = self.state
        gone = {p for p in own if isinstance(p, Tensor)} - set(self._params())
        self.state = defaultdict(dict, {p: state for p, state in own.items() if p not in gone})
        try:
            return super().state_dict()
        finally:
            self.state = own

    def __getstate__(self) -> dict[str, Any]:
        self._mark_changes()
        own = ("compressor", "preconditioner", "shared", "mesh")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over what `load_state_dict` or unpickling has restored."""
        for param, saved in state["state"].items():
            if isinstance(saved, Exact):
                state["state"][param] = saved.on(param.device)
        super().__setstate__(state)
        if "shared" not in state:  # of load_state_dict
            homes = (own for param, own in self.state.items() if isinstance(param, Tensor) and "gram" in own)
            home = next(homes, None)
            self.shared = {name: home[name] for name in self._new_shared(torch.device("meta"))} if home else {}
        self.defaults.pop("differentiable", None)  # else it would be an option of groups to come
        self._parts = {}
        self.__dict__.setdefault("mesh", None)  # of optimizers that earlier versions have pickled
        self._origin, self._lookout = Origin(self._windows()), Lookout()
        self.__dict__.setdefault("_tables", kernels.Tables())  # graphs that have been captured go on reading theirs

    def allocate_state(self) -> None:
        """Allocates all state now, instead of when a parameter has its first gradient."""
        if any(True for _ in self._windowed()):
            self._gram()
        self._parts = {}
        self._fill(all_parameters=True)
        self._parts = {}
        windows = self._windows()
        self._origin = Origin(windows)
        self._show_shared(windows)

    # ---- a step

    def _take_step(self) -> None:
        self._parts = {}
        self._check_tensors()
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        if all(p.grad is None for p in self._params()):
            return

        ranks = self._ranks()
        by_adamw = self._adamw_sets(all_parameters=bool(ranks.meshes))
        windows = self._windows()
        if not windows and all(p.grad is None for p in self._windowed()):
            device = next(self._params()).device
            finite = ranks.all((s.norm_is_finite().to(device) for s in by_adamw), device)
            for other in by_adamw:
                other.update_(finite)
            self._gather()
            return
        changed = self._origin.changed(windows)
        self._check_windows(changed)
        adopted = self._adopt_shared(windows, changed)
        shared = self._gram().state  # before windows that belong to it
        self._fill(all_parameters=False)
        sets = self._sets()
        gram = Gram(shared, self._rounding(ranks, sets))
        if changed or gram.state["pending"]:
            self._mend(gram, sets, ranks, adopted)

        gram.state["pending"] = True
        slot = gram.following_slot
        flags = [*(s.look_at_gradients(slot) for s in sets), *(other.norm_is_finite() for other in by_adamw)]
        finite = ranks.all(gram.on_its_device(flags), gram.matrix.device)
        for s in sets:
            s.push(slot, finite)
        self._count_draws()
        self._take_in(preconditioner, gram, sets, ranks, slot, finite)
        squares = preconditioner.square_weights(gram, slot)
        gram.state["pending"] = False
        if ranks.meshes or sum(len(s.params) for s in sets) > len(windows):  # some are new, maybe without elements here
            windows = self._windows()
        self._origin = Origin(windows)
        self._show_shared(windows)
        for s in sets:
            if isinstance(preconditioner, LocalPreconditioner):
                s.update_locally_(preconditioner, slot, finite)
            else:
                s.update_(gram.state["weights"], gram.state["factor"], finite, squares)
        for other in by_adamw:
            other.update_(finite)
        self._gather()
        self._lookout.look(gram.state, self._non_finite)

    # ---- what a step works on

    def _params(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _windowed(self) -> Iterator[Tensor]:
        """The parameters that are for the window, not for AdamW."""
        return chain.from_iterable(group["params"] for group in self.param_groups if not group["adamw"])

    def _adamw_sets(self, all_parameters: bool) -> list[AdamWSet]:
        """The parameters with a gradient that AdamW steps, those together that can be launched together.

        Args:
            all_parameters: allocate the state of those without a gradient, too.
        """
        alike: dict[Any, list[Member]] = {}
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        for group in self.param_groups:
            compressor = made_from(self.compressor, group)
            for p in group["params"] if group["adamw"] else ():
                if p.grad is None and not (all_parameters and p.requires_grad):
                    continue
                if "exp_avg" not in self.state[p]:
                    self._member(group, compressor, p, preconditioner).fill(self.state[p], preconditioner, set(), 0)
                member = self._member(group, compressor, p, preconditioner)
                if (grad := member.param.grad) is not None and (member.layout is None or grad.numel()):
                    alike.setdefault((id(group), p.device, p.dtype, grad.dtype), []).append(member)
        return [AdamWSet(some[0].group, [m.param for m in some], [m.state for m in some]) for some in alike.values()]

    def _with_windows(self) -> Iterator[Member]:
        """The parameters that have a window by now."""
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        for group in self.param_groups:
            compressor, divided = made_from(self.compressor, group), self._divides(group)
            for p in () if group["adamw"] else group["params"]:
                own = self._layout(group, compressor, p)[1] if divided else compressor
                state = self.state.get(p, {})
                if own.row_names(p)[0] not in state:
                    continue
                if divided:
                    yield self._member(group, compressor, p, preconditioner)
                else:
                    yield Member(p, group, p, compressor, state, None)

    def _sets(self, alone: bool = False) -> list[ParameterSet]:
        """The parameters that have a window, those together whose kernels can be launched together; or each alone.

        Of divided parameters those of which this rank has no elements are missing.
        """
        alike: dict[Any, list[Member]] = {}
        for member in self._with_windows():
            _, group, p, compressor, state, layout = member
            if layout is not None and p.numel() == 0:
                continue
            divided = None
            if layout is not None:
                divided = layout.share, compressor if is_hashable(compressor) else repr(compressor)
            key = p if alone else (id(group), p.device, p.dtype, dtypes(p, state), divided)
            alike.setdefault(key, []).append(member)
        return [
            ParameterSet(
                some[0].group,
                some[0].compressor,
                [m.param for m in some],
                [m.state for m in some],
                Share(None, 1) if some[0].layout is None else some[0].layout.share,
            )
            for some in alike.values()
        ]

    def _windows(self) -> list[tuple[Tensor, list[Tensor]]]:
        """The parameters that have a window by now, each with the tensors of it, as this rank holds them."""
        found = []
        for group in self.param_groups:
            compressor, divided = made_from(self.compressor, group), self._divides(group)
            for p in () if group["adamw"] else group["params"]:
                own = self._layout(group, compressor, p)[1] if divided else compressor
                state, rows = self.state.get(p, {}), own.row_names(p)
                if rows[0] in state:
                    found.append((p, [local(state[name]) if divided else state[name] for name in rows]))
        return found

    # ---- parameters that are divided over processes

    def _divides(self, group: dict[str, Any]) -> bool:
        """Whether parameters of a group are divided, or have the state of such."""
        return self.mesh is not None or group.get("aligned") is True or any(map(is_sharded, group["params"]))

    def _layout(self, group: dict[str, Any], compressor: Compressor, param: Tensor) -> tuple[Layout | None, Compressor]:
        """How a parameter is divided, None for one that is whole, and the compressor of it or its parts.

        Args:
            group: of the parameter. What AdamW steps needs no blocks.
            compressor: of the group.
        """
        layout = layout_of(param, self.mesh, aligned=getattr(compressor, "aligned", None) is True)
        if layout is None or group["adamw"]:
            return layout, compressor
        return layout, _of_parts(compressor, layout) if is_hashable(compressor) else compressor.of_parts(layout)

    def _member(
        self, group: dict[str, Any], compressor: Compressor, param: Tensor, preconditioner: Preconditioner
    ) -> Member:
        layout, compressor = self._layout(group, compressor, param)
        state = self.state.get(param, {})
        if layout is None:
            return Member(param, group, param, compressor, state, None)
        return member_of(param, group, self._part(param, layout), compressor, state, layout, preconditioner)

    def _part(self, param: Tensor, layout: Layout) -> Tensor:
        """Returns this rank's part of a divided parameter, with its gradient: the same tensor throughout a step."""
        part = self._parts.get(param)
        if part is None:
            part = self._parts[param] = part_of(param, layout)
        return part

    def _ranks(self) -> Ranks:
        divided = (p for group in self.param_groups if self._divides(group) for p in group["params"])
        return Ranks(layout_of(p, self.mesh, aligned=False) for p in divided)

    def _gather(self) -> None:
        """Tells autograd of updated parts; with a mesh, brings the plain parameters of all ranks up to date."""
        changed = [p for p in self._parts if p.grad is not None]
        torch.autograd.graph.increment_version(changed)
        if self.mesh is not None:
            gather_([p for p in changed if not is_sharded(p)], self.mesh)

    def _count_draws(self) -> None:
        """Advances the counters of random numbers of parameters of which this rank has no elements, as others do."""
        for p, part in self._parts.items():
            if part.numel() == 0 and part.grad is not None and "error_draws" in self.state[p]:
                self.state[p]["error_draws"] += 1

    def _rounding(self, ranks: Ranks, sets: list[ParameterSet]) -> float:
        """The machine epsilon of the arithmetic in which rows are summed: the same on all ranks."""
        if not ranks.meshes:
            return max(s.rounding for s in sets)
        windows = {p for p, _ in self._windows()}
        own = (rounding(g, p, self.state[p]) for g in self.param_groups for p in g["params"] if p in windows)
        return max(own)

    def _gram(self) -> Gram:
        """The Gram matrix, on the device of the first parameter."""
        window_size, device = agreed(self.param_groups, "window"), next(self._windowed()).device
        if not self.shared:
            self.shared.update(self._new_shared(device))
        for name, value in self.shared.items():
            if isinstance(value, Tensor) and value.device != device:
                self.shared[name] = value.to(device)
        own = len(self.shared["gram"])
        require(own == window_size, "window", f"stay what it was, {own}", window_size)
        return Gram(self.shared)

    def _take_in(
        self,
        preconditioner: Preconditioner,
        gram: Gram,
        sets: list[ParameterSet],
        ranks: Ranks,
        slot: Tensor,
        finite: Tensor,
    ) -> None:
        """Takes the newest row into the Gram matrix, and records the update that follows; none where not finite."""
        direction, update_rms, longest = (
            agreed(self.param_groups, name) for name in ("direction", "update_rms", "max_update_norm")
        )
        stepped = sum(p.numel() for p in self._windowed() if p.grad is not None)
        length = None if update_rms is None else math.sqrt(stepped) * update_rms
        if direction == "row" and preconditioner.uses_gram:
            dots = _dots(gram, sets, ranks, slot)
            if preconditioner.step_along_row(gram, slot, finite, dots, longest, length):
                return
        gram.count_step(finite)
        if direction == "momentum":
            squares = [s.average_momenta(finite) for s in sets]
            if isinstance(preconditioner, LocalPreconditioner):
                gram.record(*local_update(gram, length or 0.0).where(finite))
                return
            dots, products, square = _dots_with_momenta(gram, sets, ranks, slot, squares)
            gram.replace(slot, dots)
            combination = momentum_update(preconditioner, gram, slot, products, square)
        elif direction == "average":
            if preconditioner.uses_gram:
                gram.replace(slot, _dots(gram, sets, ranks, slot))
            beta = agreed(self.param_groups, "momentum")
            combination = average_update(preconditioner, gram, slot, beta)
        else:
            if preconditioner.uses_gram:
                gram.replace(slot, dots)
            combination = row_update(preconditioner, gram, slot)
        norm = combination.squared_norm.sqrt()
        if longest is not None:
            combination = combination.scaled((longest / norm).clamp(max=1.0))
        if length is not None:
            combination = combination.scaled(torch.where(norm > 0, length / norm, 0.0))
        gram.record(*combination.where(finite))

    # ---- state

    def _new_shared(self, device: torch.device) -> dict[str, Any]:
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        return allocate_shared(agreed(self.param_groups, "window"), preconditioner, device)

    def _fill(self, all_parameters: bool) -> None:
        """Allocates what states lack, of parameters that have a gradient or a window; or of all."""
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        taken, number = set(self.shared), 0
        expected = bool(self._ranks().meshes)  # checkpoints of divided parameters ask for the state of all
        for group in self.param_groups:
            compressor, divided = made_from(self.compressor, group), self._divides(group)
            for p in group["params"]:
                number += 1
                wanted = all_parameters
                if not (wanted or group["adamw"]):
                    own = self._layout(group, compressor, p)[1] if divided else compressor
                    has_window = own.row_names(p)[0] in self.state.get(p, {})
                    wanted = p.grad is not None or has_window or (expected and p.requires_grad)
                if wanted and divided:
                    member = self._member(group, compressor, p, preconditioner)
                    member.fill(self.state[p], preconditioner, taken, number)
                elif wanted:
                    fill_state(self.state[p], p, group, compressor, preconditioner, taken, number)

    def _check_windows(self, changed: list[Tensor]) -> None:
        """Checks windows that something else than a step has written, the way loaded states are checked."""
        if not changed:
            return
        written, called = set(changed), dict(names(self.param_groups))
        for member in self._with_windows():
            if member.owner in written:
                names_of_rows = member.compressor.row_names(member.param)
                errors = ("error", "error_codes", "error_scales")
                own = {name: member.state[name] for name in (*names_of_rows, *errors) if name in member.state}
                member.compressor.check(called[member.owner], own, member.param)

    def _adopt_shared(self, windows: list[tuple[Tensor, list[Tensor]]], changed: list[Tensor]) -> bool:
        """Adopts the shared state found in a parameter's state if all states were replaced; returns whether it did.

        `ZeroRedundancyOptimizer` loads a state in this way, and Lightning moves it to a device.
        """
        if not windows or len(changed) < len(windows):
            return False
        shown = [self.state[p] for p, _ in windows if "gram" in self.state[p]]
        if len(shown) != 1 or shown[0]["gram"] is self.shared.get("gram"):
            return False
        expected = self._new_shared(torch.device("meta"))
        check_tensors("optimizer.state", shown[0], expected)
        check_gram("optimizer.state", {name: shown[0][name] for name in expected})
        self.shared = {name: shown[0][name] for name in expected}
        return True

    def _mend(self, gram: Gram, sets: list[ParameterSet], ranks: Ranks, adopted: bool) -> None:
        """Recomputes the Gram matrix, and what is derived from it, from the current windows.

        Where a matrix has been adopted with these windows it stays, bit for bit, unless it is of other windows.
        """
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        if not preconditioner.uses_gram:
            return
        shown = gram.matrix.clone() if adopted and not gram.state["pending"] else None
        gram.state["pending"] = True
        gram.recompute(lambda slot: _dots(gram, sets, ranks, slot))
        if shown is not None and gram.agrees_with(shown):
            gram.matrix.copy_(shown)
        else:
            preconditioner.refresh(gram)

    def _show_shared(self, windows: list[tuple[Tensor, list[Tensor]]]) -> None:
        home = windows[0][0] if windows else next(self._windowed(), None)
        if home is not None:
            show(self.shared, self.state, home)

    def _mark_changes(self) -> None:
        """Records in `pending` whether windows have changed since S was computed. Called before a state is saved."""
        if self.shared:
            windows = self._windows()
            self.shared["pending"] |= bool(self._origin.changed(windows))
            self._show_shared(windows)

    # ---- checks

    def _name(self, param: Tensor) -> str:
        """The name by which errors call a parameter."""
        return next((name for p, name in names(self.param_groups) if p is param), "a parameter of no param group")

    def _non_finite(self) -> list[str]:
        """The names of parameters with an Inf or NaN in the gradient. Waits for the device."""
        known = names(self.param_groups)
        return [name for p, name in known if p.grad is not None and not local(p.grad).isfinite().all()]

    def _check_keys(self, group: dict[str, Any]) -> None:
        own = (*OPTIONS, *self.compressor.options, *self.preconditioner.options)
        check_keys("param group", type(self).__name__, group.items(), own)

    def _check_params(self, group: dict[str, Any]) -> None:
        params, compressor = group["params"], made_from(self.compressor, group)
        if len(set(params)) < len(params):
            raise ValueError("params must not hold a parameter twice; a param group does")
        for p in params:
            name = partial(self._name, p)
            check_parameter(name, local(p))
            if not isinstance(p, UninitializedParameter):
                self._checked_layout(name, group, compressor, p)

    def _checked_layout(
        self, name: Callable[[], str], group: dict[str, Any], compressor: Compressor, param: Tensor
    ) -> tuple[Layout | None, Compressor]:
        """As `_layout`, but raises a ValueError that names a parameter that cannot be divided or cut into blocks."""
        divided = layout_of(param, self.mesh, aligned=False)
        if divided is not None:
            check_layout(name, divided)
        try:
            return self._layout(group, compressor, param)
        except ValueError as error:
            raise ValueError(f"{error}, of {name()}") from None

    def _check_tensors(self) -> None:
        """Checks all gradients and states before a step changes anything."""
        fake = new_tensors_are_fake()
        preconditioner = agreed_preconditioner(self.param_groups, self.preconditioner)
        for group in self.param_groups:
            compressor, divided = made_from(self.compressor, group), self._divides(group)
            for p in group["params"]:
                name, state = partial(self._name, p), self.state.get(p, {})
                if divided:
                    self._check_divided(name, group, compressor, p, preconditioner, fake)
                    continue
                if p.grad is not None:
                    check_gradient(name, p, fake)
                if "numel" in state:
                    check_state(name, p, state, compressor)

    def _check_divided(
        self,
        name: Callable[[], str],
        group: dict[str, Any],
        compressor: Compressor,
        param: Tensor,
        preconditioner: Preconditioner,
        fake: bool,
    ) -> None:
        """The same for a parameter that may be divided."""
        layout, own = self._checked_layout(name, group, compressor, param)
        part, state = param, self.state.get(param, {})
        if layout is not None:
            check_part(name, param)
            part = self._part(param, layout)
        if part.grad is not None:
            check_gradient(name, part, fake)
        if "numel" in state:
            if layout is not None:
                check_divided_state(name, state, forms_of(layout, part, group, own, preconditioner), layout)
                state = self._member(group, compressor, param, preconditioner).state
            check_state(name, part, state, own)


def _dots(gram: Gram, sets: list[ParameterSet], ranks: Ranks, slot: Tensor) -> Tensor:
    """The inner products of all rows with row `slot`, summed over all parameters: (m,)."""
    return ranks.sum(_shares(gram, sets, (s.dots(slot) for s in sets)), gram.matrix[0])


def _dots_with_momenta(
    gram: Gram, sets: list[ParameterSet], ranks: Ranks, slot: Tensor, squares: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The inner products of all rows with row `slot`, (m,), and with the momentum, (m,), and its square, ()."""
    products = [s.dots(slot, with_momenta=True) for s in sets]
    if not ranks.meshes:
        both = ranks.sum(_shares(gram, sets, products), gram.matrix[:2])
        return both[0], both[1], ranks.sum(_shares(gram, sets, squares), gram.matrix[0, 0])
    size = len(gram.matrix)
    together = [torch.cat([both.flatten(), square.view(1)]) for both, square in zip(products, squares, strict=True)]
    total = ranks.sum(_shares(gram, sets, together), gram.matrix.new_zeros(2 * size + 1))  # in one exchange
    return total[:size], total[size:-1], total[-1]


def _shares(gram: Gram, sets: list[ParameterSet], tensors: Iterable[Tensor]) -> Iterator[tuple[Share, Tensor]]:
    """Pairs a tensor of each set, moved to the device of the Gram matrix, with the share of the set."""
    return zip((s.share for s in sets), gram.on_its_device(tensors), strict=True)


@lru_cache(maxsize=4096)
def _of_parts(compressor: Compressor, layout: Layout) -> Compressor:
    return compressor.of_parts(layout)


def _defaults() -> dict[str, Any]:
    """The defaults of the options of every optimizer."""
    arguments = inspect.signature(EFCP).parameters
    return {name: arguments[name].default for name in OPTIONS}
