"""SaLoRA for stacks without PEFT: one module around a frozen linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import safelora_kernels as sk

if TYPE_CHECKING:
    from typing_extensions import Self


class SaLoraLinear(torch.nn.Module):
    """``y = base(x) + s·(x Aᵀ)(B − U(UᵀB))ᵀ`` around a frozen linear layer, by :func:`sk.salora_linear`.

    lora_A (r × d_in) starts as LoRA's, lora_B (d_out × r) at zero. Gradients of B lie in the complement of U by
    themselves, so any optimizer will do, and nothing has to be called between steps; B itself may reach into U, the
    update does not. The basis is a buffer that stays fp32 whatever the module is cast to.

    Args:
        base: the frozen layer, any module with in_features and out_features; its parameters stop requiring grad.
        basis: U, fp32, d_out × k, orthonormal.
        rank: r. alpha: s = alpha / r.

    Raises:
        ValueError, TypeError: for a basis of another shape or dtype, a rank that is not positive.
    """

    basis: Tensor

    def __init__(self, base: torch.nn.Module, basis: Tensor, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        d_in, d_out = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        if basis.dtype != torch.float32:
            raise TypeError(f"basis must be float32 (a bf16 U leaks 1e-2 into the subspace), got {basis.dtype}")
        if basis.ndim != 2 or basis.shape[0] != d_out:
            raise ValueError(f"basis must have shape ({d_out}, k), got {tuple(basis.shape)}")
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        parameter = next(base.parameters())
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        self.lora_A = torch.nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=parameter.device))
        self.lora_B = torch.nn.Parameter(torch.zeros(d_out, rank, dtype=dtype, device=parameter.device))
        torch.nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.register_buffer("basis", basis.to(parameter.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) → (..., d_out), in the dtype of the base layer's output."""
        return sk.salora_linear(x, self.base(x), self.lora_A, self.lora_B, self.basis, self.scaling)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """(lora_A, B − U(UᵀB)): the factors of a plain LoRA with the same output."""
        return self.lora_A.detach().clone(), sk.project_out(self.lora_B.detach(), self.basis)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = self.basis
        module: Any = super()._apply(fn, recurse)
        if module.basis.dtype != torch.float32:
            module.basis = kept.to(module.basis.device)
        return module
