"""Schema and fake of every operator in the ``safelora`` namespace; kernels register elsewhere.

Fakes allocate with ``new_empty(shape)``, as the kernels do: results are contiguous whatever the strides of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    "project_layers": (
        "(Tensor[] aligned, Tensor[] base, Tensor[] lora_B, Tensor[] lora_A, int[] layer_of, "
        'str normalize="frobenius", ScalarType? out_dtype=None) -> (Tensor[], Tensor, Tensor)'
    ),
    "project_selected_layers": (
        "(Tensor[] aligned, Tensor[] base, Tensor[] lora_B, Tensor[] lora_A, int[] layer_of, float? threshold=None, "
        'int? num_layers=None, str rule="strict", str normalize="frobenius", ScalarType? out_dtype=None) '
        "-> (Tensor[], Tensor, Tensor, Tensor)"
    ),
    "update_cosine": "(Tensor[] lora_B_new, Tensor[] lora_B, Tensor[] lora_A) -> Tensor",
    "select_layers": '(Tensor cosines, float? threshold=None, int? num_layers=None, str rule="strict") -> Tensor',
    "project_out_layers": '(Tensor[] xs, Tensor[] bases, str side="left") -> Tensor[]',
    "project_out_layers_": '(Tensor(a!)[] xs, Tensor[] bases, str side="left") -> ()',
    "gram_apply_layers": "(Tensor[] xs, Tensor[] zs, Tensor[] weights) -> Tensor[]",
    "salora_linear": (
        "(Tensor x, Tensor base_output, Tensor lora_A, Tensor lora_B, Tensor basis, float scaling) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "salora_linear_backward": (
        "(Tensor dy, Tensor x, Tensor h, Tensor lora_A, Tensor lora_B, Tensor projected_B, Tensor basis, "
        "float scaling, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def _new_fp64(tensors: Sequence[Tensor], size: int) -> Tensor:
    if tensors:
        return tensors[0].new_empty((size,), dtype=torch.float64)
    return torch.empty((size,), dtype=torch.float64)


def project_layers_fake(
    aligned: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    layer_of: Sequence[int],
    normalize: str = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    torch._check(len(aligned) == len(base), lambda: f"got {len(aligned)} aligned and {len(base)} base weights")
    torch._check(
        len(lora_B) == len(lora_A) == len(layer_of),
        lambda: f"got {len(lora_B)} lora_B, {len(lora_A)} lora_A and {len(layer_of)} layer indices",
    )
    projected = [b.new_empty(b.shape, dtype=out_dtype or b.dtype) for b in lora_B]
    return projected, _new_fp64(aligned, len(aligned)), _new_fp64(aligned, len(lora_B))


def project_selected_layers_fake(
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
    final, norms, cosines = project_layers_fake(aligned, base, lora_B, lora_A, layer_of, normalize, out_dtype)
    return final, norms, cosines, select_layers_fake(cosines, threshold, num_layers, rule)


def update_cosine_fake(lora_B_new: Sequence[Tensor], lora_B: Sequence[Tensor], lora_A: Sequence[Tensor]) -> Tensor:
    torch._check(
        len(lora_B_new) == len(lora_B) == len(lora_A),
        lambda: f"got {len(lora_B_new)} lora_B_new, {len(lora_B)} lora_B and {len(lora_A)} lora_A",
    )
    return _new_fp64(lora_B_new, len(lora_B_new))


def select_layers_fake(
    cosines: Tensor, threshold: float | None = None, num_layers: int | None = None, rule: str = "strict"
) -> Tensor:
    return cosines.new_empty(cosines.shape, dtype=torch.bool)


def project_out_layers_fake(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> list[Tensor]:
    torch._check(len(xs) == len(bases), lambda: f"got {len(xs)} xs and {len(bases)} bases")
    return [x.new_empty(x.shape) for x in xs]


def project_out_layers_inplace_fake(xs: Sequence[Tensor], bases: Sequence[Tensor], side: str = "left") -> None:
    torch._check(len(xs) == len(bases), lambda: f"got {len(xs)} xs and {len(bases)} bases")


def gram_apply_layers_fake(xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    torch._check(
        len(xs) == len(zs) == len(weights), lambda: f"got {len(xs)} xs, {len(zs)} zs and {len(weights)} weights"
    )
    results = []
    for x, z, weight in zip(xs, zs, weights, strict=True):
        wide = torch.float64 in (x.dtype, z.dtype, weight.dtype)
        results.append(z.new_empty(z.shape, dtype=torch.float64 if wide else torch.float32))
    return results


def salora_linear_fake(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    h = x.new_empty((x.shape[0], lora_A.shape[0]), dtype=dtype)
    return base_output.new_empty(base_output.shape), h, lora_B.new_empty(lora_B.shape, dtype=dtype)


def salora_linear_backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    _, x, _, lora_A, lora_B, _, basis, _, needs = inputs
    owners = (x, lora_A, lora_B, basis)
    return tuple(t.new_empty(t.shape if needed else (0,)) for t, needed in zip(owners, needs, strict=True))


_FAKES: dict[str, Callable[..., Any]] = {
    "project_layers": project_layers_fake,
    "project_selected_layers": project_selected_layers_fake,
    "update_cosine": update_cosine_fake,
    "select_layers": select_layers_fake,
    "project_out_layers": project_out_layers_fake,
    "project_out_layers_": project_out_layers_inplace_fake,
    "gram_apply_layers": gram_apply_layers_fake,
    "salora_linear": salora_linear_fake,
    "salora_linear_backward": salora_linear_backward_fake,
}


def define(namespace: str, op: str) -> None:
    """Declares the operator ``op`` with its fake in a namespace."""
    torch.library.define(f"{namespace}::{op}", SCHEMAS[op], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{namespace}::{op}", _FAKES[op])


for _name in SCHEMAS:
    define("safelora", _name)
