"""Gradients, outside the operator boundary.

The operators themselves record nothing: called in grad mode with a tensor that requires grad they raise, instead of
returning a silently detached result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import OPS, launcher
from .reference import autocast_off, basis_gradient, compute_dtype
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
        xs, bases = _halves([tensors[place] for place in places])
        return tuple(launcher("project_out_layers", tensors, backend)(xs, bases, side))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals: list[Tensor | None] = [None] * len(tensors)

        def add(place: int, grad: Tensor) -> None:
            total = totals[place]
            totals[place] = grad if total is None else total + grad

        x_places, basis_places = _halves(ctx.places)
        arrived = [(g, x, u) for g, x, u in zip(grads, x_places, basis_places, strict=True) if g is not None]
        outer = [(g, x, u) for g, x, u in arrived if needed[x]]
        if outer:
            bases = [tensors[u] for _, _, u in outer]
            projected = project_out_layers([g for g, _, _ in outer], bases, ctx.side, ctx.backend)
            for (_, x, _), dx in zip(outer, projected, strict=True):
                add(x, dx)
        for grad, x, u in arrived:
            if needed[u]:
                add(u, _grad_basis(grad, tensors[x], tensors[u], ctx.side))
        return (None, None, None, *totals)


def _halves(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    middle = len(items) // 2
    return list(items[:middle]), list(items[middle:])


def _grad_basis(grad: Tensor, x: Tensor, basis: Tensor, side: str) -> Tensor:
    with autocast_off(x):
        dtype = compute_dtype(x.dtype, basis.dtype)
        grad, x, u = grad.to(dtype), x.to(dtype), basis.to(dtype)
        if side == "right":
            grad, x = grad.mT, x.mT
        return basis_gradient(grad, x, u).to(basis.dtype)


class SaloraLinear(torch.autograd.Function):
    """``y = base_output + s (x Aᵀ) (B − U (Uᵀ B))ᵀ``, differentiable once in every tensor."""

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
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        wanted = [needs[0], needs[2], needs[3], needs[4]]
        dx = dA = dB = dU = None
        if any(wanted):
            run = launcher("salora_linear_backward", saved, ctx.backend)
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
