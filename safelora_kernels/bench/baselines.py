"""What one runs without the package: the authors' formulation, and the best chains of stock torch operations.

Benchmarks time these and tests judge their error, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def authors_project(aligned: Tensor, base: Tensor, lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """The published code: ``P = V Vᵀ / ‖V‖_F`` in fp32, ``P B``, ``P B A`` and the cosine of the flattened products."""
    v = aligned.float() - base.float()
    p = torch.mm(v, v.t()) / torch.norm(v)
    projected = torch.mm(p, lora_B.float())
    return projected, authors_cosine(projected, lora_B.float(), lora_A.float())


def authors_cosine(lora_B_new: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The published selection score: both products in full, flattened."""
    new, old = lora_B_new @ lora_A, lora_B @ lora_A
    return torch.nn.functional.cosine_similarity(new.reshape(1, -1), old.reshape(1, -1))[0]


def torch_project(aligned: Tensor, base: Tensor, lora_B: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """The best chain of stock operations: V once in fp32, two thin products, the cosine by Grams."""
    v = aligned.float() - base.float()
    b = lora_B.float()
    projected = (v @ (v.T @ b)) / v.norm()
    return projected, torch_cosine(projected, b, lora_A)


def torch_cosine(lora_B_new: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The cosine of two updates by r×r Grams in fp64."""
    new, old, a = lora_B_new.double(), lora_B.double(), lora_A.double()
    kernel = a @ a.T
    inner = ((old.T @ new) * kernel).sum()
    return inner / (((old.T @ old) * kernel).sum() * ((new.T @ new) * kernel).sum()).sqrt()


def same_dtype_project(aligned: Tensor, base: Tensor, lora_B: Tensor) -> Tensor:
    """The chain without any upcast: the error to expect of torch in the dtype of the factors."""
    v = aligned.to(lora_B.dtype) - base.to(lora_B.dtype)
    return (v @ (v.T @ lora_B)) / v.norm()


def loop_project_out_(xs: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """``X −= U (Uᵀ X)``, one layer after the other."""
    for x, u in zip(xs, bases, strict=True):
        x -= u @ (u.T @ x)


def addmm_project_out_(xs: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """The loop with the subtraction inside the product."""
    for x, u in zip(xs, bases, strict=True):
        x.addmm_(u, u.T @ x, alpha=-1)


def baddbmm_project_out_(stacked_x: Tensor, stacked_basis: Tensor) -> None:
    """One batched product for layers of one shape that are already stacked, (n, d, m) and (n, d, k)."""
    stacked_x.baddbmm_(stacked_basis, stacked_basis.mT @ stacked_x, alpha=-1)


def torch_gram_apply(x: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    """``Xᵀ (w ∘ (X Z))`` in the dtype of X, whatever that costs in accuracy."""
    return x.T @ (weights.to(x.dtype)[:, None] * (x @ z.to(x.dtype)))


def upcast_gram_apply(x: Tensor, z: Tensor, weights: Tensor) -> Tensor:
    """The chain on an fp32 copy of X: the accuracy of fp32 whatever the dtype of X."""
    return torch_gram_apply(x.float(), z, weights)


def dense_salora(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, complement: Tensor, scaling: float
) -> Tensor:
    """The published forward with the dense ``C = I − U Uᵀ`` (d_out×d_out), applied to every token."""
    return base_output + scaling * ((x @ lora_A.T) @ lora_B.T) @ complement.T


def torch_salora(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float
) -> Tensor:
    """The best stock form: C folded into B, then plain LoRA."""
    projected_B = lora_B - basis @ (basis.T @ lora_B)
    return base_output + scaling * (x @ lora_A.T) @ projected_B.T
