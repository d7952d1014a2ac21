"""Gradients, outside the operator boundary.

The operators themselves record nothing: called in grad mode with a tensor that requires grad they raise, instead of
returning a silently detached result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import OPS, launcher
from .reference import (
    autocast_off,
    basis_gradient,
    compute_dtype,
    gram_apply_gradients,
    salora_backward,
    salora_intermediates,
)
from .reference import gram as reference_gram
from .validation import wants_grad


def project_out_layers(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str, backend: str | None) -> list[Tensor]:
    """The operator of that name, recorded where a gradient is wanted."""
    tensors = [*xs, *bases]
    if wants_grad(tensors):
        # A basis may serve many layers, and torch.compile takes no tensor twice.
        slots: dict[Tensor, int] = {}
        places = tuple([slots.setdefault(tensor, len(slots)) for tensor in tensors])
        return list(ProjectOut.apply(side, backend, places, *slots))
    result: list[Tensor] = launcher("project_out_layers", tensors, backend)(list(xs), list(bases), side)
    return result


def gram_apply_layers(
    xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Tensor | None], backend: str | None
) -> list[Tensor]:
    """The operator of that name, recorded where a gradient is wanted; no weights are an empty tensor to it."""
    none = xs[0].new_zeros((0,), dtype=torch.float32)
    filled = [none if weight is None else weight for weight in weights]
    tensors = [*xs, *zs, *filled]
    if wants_grad(tensors):
        slots: dict[Tensor, int] = {}
        places = tuple([slots.setdefault(tensor, len(slots)) for tensor in tensors])
        return list(GramApply.apply(backend, places, *slots))
    result: list[Tensor] = launcher("gram_apply_layers", tensors, backend)(list(xs), list(zs), filled)
    return result


def gram(x: Tensor, weights: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """``Xᵀ diag(w) X``, recorded where a gradient is wanted."""
    dtypes = [x.dtype] if weights is None else [x.dtype, weights.dtype]
    natural = compute_dtype(*dtypes)
    dtype = natural if out_dtype is None else compute_dtype(natural, out_dtype)
    result: Tensor = (
        Gram.apply(x, weights, dtype)
        if wants_grad([x] if weights is None else [x, weights])
        else (reference_gram(x, weights, dtype))
    )
    return result.to(out_dtype or natural)


def salora_linear(
    x: Tensor,
    base_output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    basis: Tensor,
    scaling: float,
    backend: str | None,
) -> Tensor:
    """The first result of the operator of that name, recorded where a gradient is wanted."""
    tensors = (x, base_output, lora_A, lora_B, basis)
    if wants_grad(tensors):
        recorded: Tensor = SaloraLinear.apply(*tensors, scaling, backend)
        return recorded
    y: Tensor = launcher("salora_linear", tensors, backend)(*tensors, scaling)[0]
    return y


class ProjectOut(torch.autograd.Function):
    """``Y = X − U (Uᵀ X)`` for every pair of a batch, differentiable any number of times in X and U.

    The map is its own adjoint: ``dX = dY − U (Uᵀ dY)``, and ``dU = −(dY (Uᵀ X)ᵀ + X (Uᵀ dY)ᵀ)``.
    """

    @staticmethod
    def forward(
        ctx: Any, side: str, backend: str | None, places: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The first half of ``places`` says where in ``tensors`` each x stands, the second half each basis."""
        ctx.side, ctx.backend, ctx.places = side, backend, places
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        xs, bases = _parts([tensors[place] for place in places], 2)
        return tuple(launcher("project_out_layers", tensors, backend)(xs, bases, side))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals = _Totals(len(tensors))
        x_places, basis_places = _parts(ctx.places, 2)
        arrived = [(g, x, u) for g, x, u in zip(grads, x_places, basis_places, strict=True) if g is not None]
        outer = [(g, x, u) for g, x, u in arrived if needed[x]]
        if outer:
            bases = [tensors[u] for _, _, u in outer]
            projected = project_out_layers([g for g, _, _ in outer], bases, ctx.side, ctx.backend)
            for (_, x, _), dx in zip(outer, projected, strict=True):
                totals.add(x, dx)
        for grad, x, u in arrived:
            if needed[u]:
                totals.add(u, _grad_basis(grad, tensors[x], tensors[u], ctx.side))
        return (None, None, None, *totals.values)


def _parts(items: Sequence[Any], count: int) -> list[list[Any]]:
    """``items`` in ``count`` lists of equal length."""
    length = len(items) // count
    return [list(items[i * length : (i + 1) * length]) for i in range(count)]


class _Totals:
    """The gradient of each tensor, where several results may lead to one."""

    def __init__(self, count: int) -> None:
        self.values: list[Tensor | None] = [None] * count

    def add(self, place: int, grad: Tensor | None) -> None:
        total = self.values[place]
        self.values[place] = total if grad is None else grad if total is None else total + grad


def _grad_basis(grad: Tensor, x: Tensor, basis: Tensor, side: str) -> Tensor:
    with autocast_off(x):
        dtype = compute_dtype(x.dtype, basis.dtype)
        grad, x, u = grad.to(dtype), x.to(dtype), basis.to(dtype)
        if side == "right":
            grad, x = grad.mT, x.mT
        return basis_gradient(grad, x, u).to(basis.dtype)


class GramApply(torch.autograd.Function):
    """``Y = Xᵀ diag(w) X Z`` for every triple of a batch, differentiable any number of times in X, Z and w.

    The map is its own adjoint in Z: ``dZ = Xᵀ diag(w) X G``.
    """

    @staticmethod
    def forward(ctx: Any, backend: str | None, places: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The thirds of ``places`` say where in ``tensors`` each x, each z and each weight vector stands."""
        ctx.backend, ctx.places = backend, places
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        lists = _parts([tensors[place] for place in places], 3)
        return tuple(launcher("gram_apply_layers", tensors, backend)(*lists))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        totals = _Totals(len(tensors))
        arrived = [
            (grad, *places) for grad, *places in zip(grads, *_parts(ctx.places, 3), strict=True) if grad is not None
        ]
        applied = [(grad, x, z, w) for grad, x, z, w in arrived if needed[z]]
        if applied:
            weights = [tensors[w] if tensors[w].numel() else None for _, _, _, w in applied]
            results = gram_apply_layers(
                [tensors[x] for _, x, _, _ in applied], [grad for grad, *_ in applied], weights, ctx.backend
            )
            for (_, _, z, _), dz in zip(applied, results, strict=True):
                totals.add(z, dz.to(tensors[z].dtype))
        for grad, x, z, w in arrived:
            if needed[x] or needed[w]:
                weight = tensors[w] if tensors[w].numel() else None
                dx, dw = gram_apply_gradients(grad, tensors[x], tensors[z], weight, (needed[x], needed[w]))
                totals.add(x, dx)
                totals.add(w, dw)
        return (None, None, *totals.values)


class Gram(torch.autograd.Function):
    """``Xᵀ diag(w) X``: ``dX = w ∘ X (G + Gᵀ)`` and ``dw = ½ rowsum(X ∘ X (G + Gᵀ))``, differentiable in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weights)
        return reference_gram(x, weights, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weights = ctx.saved_tensors
        need_x, need_weights, _ = ctx.needs_input_grad
        with autocast_off(x):
            wide = x.to(grad.dtype)
            product = wide @ (grad + grad.mT)
            dw = ((wide * product).sum(1) / 2).to(weights.dtype) if need_weights else None
            dx = (product if weights is None else weights[:, None].to(grad.dtype) * product) if need_x else None
            return None if dx is None else dx.to(x.dtype), dw, None


class SaloraLinear(torch.autograd.Function):
    """``y = base_output + s (x Aᵀ) (B − U (Uᵀ B))ᵀ``, differentiable any number of times in every tensor.

    A backward pass that is itself recorded (create_graph=True) is plain torch; any other takes the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_output: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        basis: Tensor,
        scaling: float,
        backend: str | None,
    ) -> Tensor:
        run = launcher("salora_linear", (x, base_output, lora_A, lora_B, basis), backend)
        y, h, projected_B = run(x, base_output, lora_A, lora_B, basis, scaling)
        ctx.save_for_backward(x, h, lora_A, lora_B, projected_B, basis)
        ctx.scaling, ctx.backend = scaling, backend
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[2], needs[3], needs[4]]
        dx = dA = dB = dU = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x, _, lora_A, lora_B, _, basis = saved
            h, projected_B = salora_intermediates(x, lora_A, lora_B, basis)
            dx, dA, dB, dU = salora_backward(dy, x, h, lora_A, lora_B, projected_B, basis, ctx.scaling, wanted)
        elif any(wanted):
            run = launcher("salora_linear_backward", saved, ctx.backend)
            with torch.no_grad():
                grads = run(dy, *saved, ctx.scaling, wanted)
            dx, dA, dB, dU = (grad if needed else None for grad, needed in zip(grads, wanted, strict=True))
        return dx, dy if needs[1] else None, dA, dB, dU, None, None


def _guard(op: str) -> Callable[..., Any]:
    """The Autograd-key kernel of an operator: refuse what it cannot differentiate, then go on to the backend."""
    overload: Any = OPS[op]
    mutates = overload._schema.is_mutable

    def guarded(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs):
            raise RuntimeError(
                f"torch.ops.safelora.{op} records no gradients and was given a tensor that requires grad: call the "
                "function of the same name in safelora_kernels, detach() the tensors, or use torch.no_grad()"
            )
        if mutates:
            torch.autograd.graph.increment_version(args[0])
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    guarded.__name__ = f"{op}_guard"
    return guarded


_LIBRARY = torch.library.Library("safelora", "IMPL")
for _op in OPS:
    _LIBRARY.impl(_op, _guard(_op), "Autograd", with_keyset=True)
