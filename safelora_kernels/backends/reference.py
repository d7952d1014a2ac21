"""The reference with the operators' schemas, registered for every device that has no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference


def _fresh(tensor: Tensor) -> Tensor:
    """Contiguous, as the schema's fake promises."""
    return tensor.contiguous()


def project_layers(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
    normalize: str = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    projected, cosines = list(lora_B), list(lora_B)
    norms: list[Tensor] = []
    for layer, (weight_aligned, weight_base) in enumerate(zip(aligned, base, strict=True)):
        factors = [f for f, owner in enumerate(layer_of) if owner == layer]
        new, norm, cosine = reference.project_factors(
            weight_aligned,
            weight_base,
            [lora_B[f] for f in factors],
            [lora_A[f] if lora_A[f].shape[0] else None for f in factors],
            normalize,
            out_dtype,
        )
        norms.append(norm)
        for f, b, c in zip(factors, new, cosine, strict=True):
            projected[f] = _fresh(b)
            cosines[f] = torch.full_like(norm, torch.nan) if c is None else c
    return projected, _stack(norms), _stack(cosines)


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)) if values else torch.zeros(0, dtype=torch.float64)


def _project_selected(project: Callable[..., Any], select: Callable[..., Any]) -> Callable[..., Any]:
    """The operator made of two others."""

    def project_selected_layers(
        aligned: Sequence[Tensor],
        base: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        layer_of: Sequence[int],
        threshold: float | None = None,
        num_layers: int | None = None,
        rule: str = "strict",
        normalize: str = "frobenius",
        out_dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        projected, norms, cosines = project(aligned, base, lora_B, lora_A, layer_of, normalize, out_dtype)
        selected = select(cosines, threshold, num_layers, rule)
        final = reference.keep_unselected(projected, lora_B, selected)
        return [_fresh(b) for b in final], norms, cosines, selected

    return project_selected_layers


def update_cosine(lora_B_new: Sequence[Tensor], lora_B: Sequence[Tensor], lora_A: Sequence[Tensor]) -> Tensor:
    return reference.update_cosine(lora_B_new, lora_B, lora_A)


def select_layers(
    cosines: Tensor, threshold: float | None = None, num_layers: int | None = None, rule: str = "strict"
) -> Tensor:
    return _fresh(reference.select_layers(cosines, threshold=threshold, num_layers=num_layers, rule=rule))  # type: ignore[arg-type]


def project_out_layers(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> list[Tensor]:
    return [_fresh(y) for y in reference.project_out_layers(xs, bases, side=side)]  # type: ignore[arg-type]


def project_out_layers_(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> None:
    reference.project_out_layers_(xs, bases, side=side)  # type: ignore[arg-type]


def gram_apply_layers(xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    given = [weight if weight.numel() else None for weight in weights]
    return [
        _fresh(y.to(reference.compute_dtype(y.dtype, weight.dtype)))
        for y, weight in zip(reference.gram_apply_layers(xs, zs, given), weights, strict=True)
    ]


def salora_linear(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(_fresh(result) for result in reference.salora_forward(*inputs))


def salora_linear_backward(*inputs: Any) -> tuple[Tensor, ...]:
    _, x, _, lora_A, lora_B, _, basis, _, _ = inputs
    return tuple(
        owner.new_empty((0,)) if grad is None else _fresh(grad)
        for grad, owner in zip(reference.salora_backward(*inputs), (x, lora_A, lora_B, basis), strict=True)
    )


LAUNCHERS: dict[str, Callable[..., Any]] = {
    "project_layers": project_layers,
    "project_selected_layers": _project_selected(project_layers, select_layers),
    "update_cosine": update_cosine,
    "select_layers": select_layers,
    "project_out_layers": project_out_layers,
    "project_out_layers_": project_out_layers_,
    "gram_apply_layers": gram_apply_layers,
    "salora_linear": salora_linear,
    "salora_linear_backward": salora_linear_backward,
}

# Made of two operators, each with the kernel of the device, where the device has none for the whole.
COMPOSED: dict[str, Callable[..., Any]] = {
    "project_selected_layers": _project_selected(
        torch.ops.safelora.project_layers.default, torch.ops.safelora.select_layers.default
    ),
}

for _op, _launcher in {**LAUNCHERS, **COMPOSED}.items():
    torch.library.impl(f"safelora::{_op}", "CompositeExplicitAutograd", _launcher)
