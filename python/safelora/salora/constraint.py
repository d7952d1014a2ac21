"""Holding an adapter in the complement of its subspaces while any torch optimizer trains it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import safelora_kernels as sk

from ..errors import SafeLoraError
from ..peft_model import reshard, whole
from .initialization import AdapterLayers, adapter_layers, attach, attached, outside_warning
from .subspaces import Subspaces

if TYPE_CHECKING:
    from torch import Tensor

_TOLERANCE = 1e-6  # a factor that leaks less than this is inside already, and keeps its bits


@dataclass
class _Factor:
    """A trained factor and its basis; `frozen` is what its columns (lora_B) or rows (lora_A) from `rank` on stay."""

    name: str
    parameter: Any
    side: str
    basis: Tensor | None
    rank: int
    frozen: Tensor | None
    version: int = -1

    @property
    def nothing_left(self) -> bool:
        """Whether the basis spans the whole space, so that the factor is zero."""
        return self.basis is not None and self.basis.shape[0] == self.basis.shape[1]

    def untouched(self) -> bool:
        """Whether no step has written to the parameter since :meth:`SubspaceConstraint.project_weights`.

        Both signs are needed: kernels outside torch write without counting, and a step may drop the gradient.
        """
        return self.parameter.grad is None and self.parameter._version == self.version

    def split(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The trained and the frozen part of the factor or of its gradient, views."""
        if self.side == "left":
            return tensor[:, : self.rank], tensor[:, self.rank :]
        return tensor[: self.rank], tensor[self.rank :]


class SubspaceConstraint:
    """Keeps ``Uᵀ(W_eff − W) = 0``, up to the rounding of B, for an adapter that an optimizer trains as a plain LoRA.

    The gradient of B is projected, ``G ← G − U(UᵀG)``, before the optimizer sees it, and B after each step: one
    grouped kernel launch for all modules each time. That is exactly the trajectory of the paper's C·B·A form under
    AdamW, weight decay, clipping and accumulation included, for ``C C = C``; the forward pass is LoRA's own, fused
    ones included. Where the subspaces have `input_bases`, A is held likewise from its right side (OPLoRA).

    Gradients are projected when a backward pass has ended, before they are clipped; with several processes each one as
    it arrives. Sharded parameters (fully_shard) have no such moment: theirs are projected at the start of
    ``optimizer.step()``, so that a clip norm taken before it still counts the removed part, unless
    :meth:`project_gradients` is called before clipping. SGD needs no projected gradient; optimizers whose step depends
    on ‖B‖ (Adafactor, LAMB) follow a trajectory of their own, inside the complement too.

    Steps that a GradScaler skips are no steps here either. Factors are written to under no_grad by in-place ops.

    Args:
        peft_model: a PeftModel, also under DistributedDataParallel, fully_shard or torch.compile.
        subspaces: from :func:`calibrate` or :func:`initialize`.
        optimizer: the torch.optim.Optimizer (or accelerate's wrapper) that trains the adapter.
        adapter_name: the adapter; by default the active one. Each adapter takes a constraint of its own.

    Raises:
        SafeLoraError: for an adapter whose update is not s·B·A, subspaces that do not fit, parameters that the
            optimizer does not train, an optimizer that is not torch's.
        A factor that lies outside the complement already is projected, with a warning.
    """

    def __init__(
        self, peft_model: Any, subspaces: Subspaces, optimizer: Any, *, adapter_name: str | None = None
    ) -> None:
        self.optimizer = _torch_optimizer(optimizer)
        found = adapter_layers(peft_model, subspaces, adapter_name)
        self.model, self.adapter = found.model, found.adapter
        known = attached(self.model, self.adapter)
        if subspaces.mode is None and known is not None:
            _check_same(subspaces, known)
            subspaces = known
        elif known is None:
            attach(self.model, self.adapter, subspaces)
        self.subspaces = subspaces
        self._factors = list(_factors(found, subspaces))
        self._sharded = any(_is_sharded(factor.parameter) for factor in self._factors)
        _check_trained(self._factors, self.optimizer)
        if found.outside:
            warnings.warn(outside_warning(found.outside), stacklevel=2)
        self.outside = found.outside
        self._pending = False
        self._handles: list[Any] = []
        self._begin()
        self._attach_hooks()

    def project_gradients(self) -> None:
        """Project every gradient there is, in place; nothing happens a second time.

        Called by the hooks. With sharded parameters it may be called before gradients are clipped; it is a collective
        call then.
        """
        with torch.no_grad():
            held = [(factor, factor.parameter.grad) for factor in self._factors if factor.parameter.grad is not None]
            _apply(held, gradients=True)
            rest = [
                factor.split(grad)[1] for factor, grad in held if factor.frozen is not None and not _is_sharded(grad)
            ]
            if rest:
                torch._foreach_zero_(rest)

    def project_weights(self) -> None:
        """Project every factor in place and restore the frozen parts. Called after each optimizer step.

        Adapters that have no gradient and were not written to keep their bits.
        """
        with torch.no_grad():
            moved = [factor for factor in self._factors if not factor.untouched()]
            _apply([(factor, factor.parameter.detach()) for factor in moved])
            kept = [
                (factor.split(factor.parameter.detach())[1], factor.frozen)
                for factor in moved
                if factor.frozen is not None and not _is_sharded(factor.parameter)
            ]
            if kept:
                torch._foreach_copy_([part for part, _ in kept], [value for _, value in kept])
        for factor in moved:
            factor.version = factor.parameter._version

    def leaks(self) -> dict[str, float]:
        """``‖Uᵀ(W_eff − W)‖/‖W_eff − W‖`` per module (the larger of both sides' with input bases), in fp64.

        From r×r Gram matrices; 0 where the update is 0. A collective call where the model is sharded.
        """
        return leaks(self.model, self.subspaces, self.adapter)

    def state_dict(self) -> dict[str, Any]:
        """The subspaces and initial factors: what a run needs to go on as if it had not stopped."""
        return {"adapter": self.adapter, "subspaces": self.subspaces}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the subspaces of an interrupted run. Raises SafeLoraError where they do not fit this adapter.

        The parameters are not touched: they are those of the checkpoint.
        """
        subspaces = state["subspaces"]
        if not isinstance(subspaces, Subspaces):
            raise SafeLoraError("the state holds no Subspaces; it was not made by SubspaceConstraint.state_dict.")
        if subspaces.mode != self.subspaces.mode:
            raise SafeLoraError(
                f"the state was made with mode {subspaces.mode!r}, this run with {self.subspaces.mode!r}."
            )
        found = adapter_layers(self.model, subspaces, self.adapter)
        self._factors = list(_factors(found, subspaces))
        self.subspaces = subspaces
        attach(self.model, self.adapter, subspaces)
        self.remove()
        self._attach_hooks()

    def remove(self) -> None:
        """Take all hooks off; the factors stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> SubspaceConstraint:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _begin(self) -> None:
        """Bring a factor that lies outside into the complement; those inside keep their bits."""
        reshard(self.model)
        with torch.no_grad():
            outside = []
            for factor in self._factors:
                full = whole(factor.parameter)
                trained = factor.split(full)[0].double()
                basis = factor.basis
                if basis is not None and float(_along(trained, basis, factor.side)) > _TOLERANCE * float(
                    trained.norm()
                ):
                    outside.append((factor, factor.parameter.detach()))
                if factor.frozen is not None and not torch.equal(factor.split(full)[1], factor.frozen):
                    raise SafeLoraError(
                        f"the frozen half of {factor.name} is not what it was initialised with; the adapter and the "
                        f"subspaces belong to different runs."
                    )
            if outside:
                warnings.warn(
                    f"{len(outside)} factors of adapter {self.adapter!r} reach into the protected subspace "
                    f"({outside[0][0].name}); they are projected now.",
                    stacklevel=3,
                )
                _apply(outside)
        for factor in self._factors:
            factor.version = factor.parameter._version

    def _attach_hooks(self) -> None:
        if self._sharded:
            self._handles.append(self.optimizer.register_step_pre_hook(partial(_call, self.project_gradients)))
        else:
            several = _several_processes()
            for factor in self._factors:
                parameter = factor.parameter
                asleep = not parameter.requires_grad  # an adapter that is not active now; its hooks wait for it
                parameter.requires_grad_(True)
                # Under DistributedDataParallel a gradient is on its way to other ranks when backward ends.
                self._handles.append(
                    parameter.register_hook(partial(_projected, factor))
                    if several
                    else parameter.register_post_accumulate_grad_hook(self._after_accumulation)
                )
                parameter.requires_grad_(not asleep)
        self._handles.append(self.optimizer.register_step_post_hook(partial(_call, self.project_weights)))

    def _after_accumulation(self, _: Tensor) -> None:
        if not self._pending:
            self._pending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._pending = False
        self.project_gradients()


def leaks(model: Any, subspaces: Subspaces, adapter: str) -> dict[str, float]:
    """``‖Uᵀ ΔW‖/‖ΔW‖`` per constrained module of a live adapter, by Grams in fp64."""
    found = adapter_layers(model, subspaces, adapter)
    result = {}
    with torch.no_grad():
        for entry in found.layers:
            b, a = update_factors(entry.name, whole(entry.lora_A), whole(entry.lora_B), subspaces)
            result[entry.name] = leak(b, a, subspaces.bases.get(entry.name), subspaces.input_bases.get(entry.name))
    return result


def update_factors(name: str, lora_A: Tensor, lora_B: Tensor, subspaces: Subspaces) -> tuple[Tensor, Tensor]:
    """(B₂, A₂) in fp64 with ``W_eff − W = s·B₂A₂``: the factors less C B₀ A₀ where a residual base holds that."""
    a, b = lora_A.double(), lora_B.double()
    if subspaces.mode == "residual" and name in subspaces.initial_A:
        a = torch.cat([a, subspaces.initial_A[name].to(a)])
        b = torch.cat([b, -subspaces.initial_B[name].to(b)], dim=1)
    return b, a


def leak(lora_B: Tensor, lora_A: Tensor, basis: Tensor | None, input_basis: Tensor | None) -> float:
    """``max(‖Uᵀ B A‖, ‖B A V‖)/‖B A‖`` for factors in fp64; 0 for B A = 0.

    The thin QR of both factors leaves r×r products, so that nearly equal halves cancel without loss.
    """
    q_left, r_left = torch.linalg.qr(lora_B)
    q_right, r_right = torch.linalg.qr(lora_A.t())
    core = r_left @ r_right.t()
    norm = float(core.norm())
    if norm == 0:
        return 0.0
    sides = [0.0]
    if basis is not None:
        sides.append(float((basis.to(q_left).t() @ q_left @ core).norm()))
    if input_basis is not None:
        sides.append(float((core @ q_right.t() @ input_basis.to(q_right)).norm()))
    return max(sides) / norm


def _factors(found: AdapterLayers, subspaces: Subspaces) -> Iterator[_Factor]:
    packed = subspaces.mode == "packed"
    for entry in found.layers:
        b, a, name = entry.lora_B, entry.lora_A, entry.name
        rank = b.shape[1]
        frozen_a = frozen_b = None
        if packed:
            frozen_a, frozen_b = subspaces.initial_A[name].to(a.device), -subspaces.initial_B[name].to(b.device)
            if rank != 2 * frozen_b.shape[1]:
                raise SafeLoraError(
                    f"{name} has rank {rank}, but was packed with initial factors of rank {frozen_b.shape[1]}: the "
                    "adapter in the model is not the one that initialize made. Call initialize before this."
                )
            rank //= 2
        basis, input_basis = subspaces.bases.get(name), subspaces.input_bases.get(name)
        if basis is not None or packed:
            yield _Factor(f"lora_B of {name}", b, "left", _wide(basis, b), rank, frozen_b)
        if input_basis is not None or packed:
            yield _Factor(f"lora_A of {name}", a, "right", _wide(input_basis, a), rank, frozen_a)


def _wide(basis: Tensor | None, parameter: Any) -> Tensor | None:
    """The basis in fp64, in which the kernels then add: sums in fp32 put back into U seven times B's own rounding."""
    return None if basis is None else basis.to(parameter.device, torch.float64)


def _apply(held: list[tuple[_Factor, Any]], gradients: bool = False) -> None:
    """Project the trained parts of parameters or gradients in place, all of a side and device in one launch."""
    groups: dict[tuple[str, Any], tuple[list[Tensor], list[Tensor]]] = {}
    sharded: list[tuple[_Factor, Any, Tensor]] = []
    for factor, tensor in held:
        full = tensor
        if _is_sharded(tensor):
            full = tensor.full_tensor()
            sharded.append((factor, tensor, full))
        if factor.nothing_left:
            factor.split(full)[0].zero_()
        elif factor.basis is not None:
            tensors, bases = groups.setdefault((factor.side, full.device), ([], []))
            tensors.append(factor.split(full)[0])
            bases.append(factor.basis)
    for (side, _), (tensors, bases) in groups.items():
        sk.project_out_layers_(tensors, bases, side=side)  # type: ignore[arg-type]
    for factor, tensor, full in sharded:
        _put(factor, tensor, full, gradients)


def _put(factor: _Factor, tensor: Any, full: Tensor, gradient: bool) -> None:
    """A gathered tensor back into its shards, the frozen part as it has to be (zero in a gradient)."""
    from torch.distributed.tensor import distribute_tensor

    if factor.frozen is not None:
        rest = factor.split(full)[1]
        rest.zero_() if gradient else rest.copy_(factor.frozen)
    tensor.copy_(distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None))


def _projected(factor: _Factor, gradient: Tensor) -> Tensor:
    """A gradient on its way to its parameter, projected."""
    with torch.no_grad():
        result = gradient.clone()
        trained, rest = factor.split(result)
        if factor.nothing_left:
            trained.zero_()
        elif factor.basis is not None:
            sk.project_out_layers_([trained], [factor.basis], side=factor.side)  # type: ignore[arg-type]
        if factor.frozen is not None:
            rest.zero_()
    return result


def _call(action: Callable[[], None], *_: Any) -> None:
    action()


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "device_mesh")


def _along(matrix: Tensor, basis: Tensor, side: str) -> Tensor:
    wide = basis.to(matrix)
    return (wide.t() @ matrix if side == "left" else matrix @ wide).norm()


def _several_processes() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    seen = type(optimizer).__name__
    while not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer":
        if not hasattr(optimizer, "optimizer"):
            raise SafeLoraError(
                f"optimizer must be a torch.optim.Optimizer, got {seen}. DeepSpeed's own have no step hooks: train "
                "without it, or call project_weights after each step and export, which projects."
            )
        optimizer = optimizer.optimizer
    return optimizer


def _check_trained(factors: list[_Factor], optimizer: torch.optim.Optimizer) -> None:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [factor.name for factor in factors if factor.side == "left" and id(factor.parameter) not in trained]
    if missing:
        raise SafeLoraError(
            f"the optimizer does not train {missing[0]} (and {len(missing) - 1} more). Make it after initialize (which "
            "replaces the parameters in mode 'packed') and after fully_shard, from the model's parameters."
        )


def _check_same(given: Subspaces, known: Subspaces) -> None:
    for part in ("bases", "input_bases"):
        mine, other = getattr(given, part), getattr(known, part)
        if mine.keys() != other.keys() or any(
            not torch.equal(mine[name], other[name].to(mine[name].device)) for name in mine
        ):
            raise SafeLoraError("these are not the subspaces that the adapter was initialised with.")
