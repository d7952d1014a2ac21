"""The methods in dense fp64, written from the papers and not from the package: slow, obvious, the judge of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Layer(NamedTuple):
    """Inputs of one projection."""

    aligned: Tensor
    base: Tensor
    lora_B: Tensor
    lora_A: Tensor


def random_layer(
    d_out: int,
    d_in: int,
    rank: int,
    weight: torch.dtype = torch.float32,
    factor: torch.dtype = torch.float32,
    base_weight: torch.dtype | None = None,
) -> Layer:
    """Weights and a difference of the size that fine-tuning makes, rounded to the dtypes asked for."""
    base = 0.02 * torch.randn(d_out, d_in, dtype=torch.float64)
    aligned = base + 0.004 * torch.randn(d_out, d_in, dtype=torch.float64)
    lora_B = 0.01 * torch.randn(d_out, rank, dtype=torch.float64)
    lora_A = 0.1 * torch.randn(rank, d_in, dtype=torch.float64)
    return Layer(aligned.to(weight), base.to(base_weight or weight), lora_B.to(factor), lora_A.to(factor))


def random_basis(d: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """k orthonormal columns."""
    return torch.linalg.qr(torch.randn(d, k, dtype=torch.float64)).Q.to(dtype)


def difference(aligned: Tensor, base: Tensor) -> Tensor:
    return aligned.double() - base.double()


def project(aligned: Tensor, base: Tensor, lora_B: Tensor, normalize: str = "frobenius") -> Tensor:
    """``C B`` with the d_out×d_out matrix ``C = V Vᵀ / ‖V‖_F``."""
    v = difference(aligned, base)
    c = v @ v.T
    if normalize == "frobenius":
        c = c / torch.linalg.matrix_norm(v)
    return c @ lora_B.double()


def cosine(lora_B_new: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """The cosine between the two updates, flattened."""
    new = (lora_B_new.double() @ lora_A.double()).flatten()
    old = (lora_B.double() @ lora_A.double()).flatten()
    return new.dot(old) / (new.norm() * old.norm())


def complement(basis: Tensor) -> Tensor:
    """``C = I − U Uᵀ``, d×d."""
    u = basis.double()
    return torch.eye(len(u), dtype=torch.float64) - u @ u.T


def project_out(x: Tensor, basis: Tensor, side: str = "left") -> Tensor:
    c = complement(basis)
    return c @ x.double() if side == "left" else x.double() @ c


def gram(x: Tensor, weights: Tensor | None) -> Tensor:
    """``Xᵀ diag(w) X``, d×d."""
    wide = x.double()
    return wide.T @ (wide if weights is None else torch.diag(weights.double()) @ wide)


def gram_apply(x: Tensor, z: Tensor, weights: Tensor | None) -> Tensor:
    return gram(x, weights) @ z.double()


def salora(x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """The published forward: the update's output times the dense C."""
    update = (x.double() @ lora_A.double().T) @ lora_B.double().T
    return base_output.double() + scaling * update @ complement(basis).T


def authors_safe_lora(
    layers: Sequence[Layer], threshold: float | None = None, num_layers: int | None = None
) -> tuple[list[Tensor], list[float], list[bool]]:
    """The authors' published loop in exact arithmetic: final factors, rounded cosines, which layers were projected."""
    projected = [project(layer.aligned, layer.base, layer.lora_B) for layer in layers]
    cosines = [
        round(float(cosine(new, layer.lora_B, layer.lora_A)), 5) for new, layer in zip(projected, layers, strict=True)
    ]
    cutoff = threshold if num_layers is None else sorted(cosines)[num_layers - 1]
    assert cutoff is not None
    chosen = [c <= cutoff for c in cosines]
    final = [
        new if taken else layer.lora_B.double() for new, layer, taken in zip(projected, layers, chosen, strict=True)
    ]
    return final, cosines, chosen


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    scale = float(expected.double().norm())
    error = float((actual.double() - expected.double()).norm())
    return error / scale if scale else error


def rounding_floor(expected: Tensor, dtype: torch.dtype) -> float:
    """Largest relative error that one rounding of ``expected`` to ``dtype`` can make, subnormals included."""
    scale = float(expected.double().norm())
    spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    absolute = math.sqrt(expected.numel()) * spacing / 2
    return UNIT_ROUNDOFF[dtype] + (absolute / scale if scale else absolute)


def assert_accurate(actual: Tensor, expected: Tensor, bound: float, what: str = "result") -> None:
    """The error before rounding stays within ``bound``, the rounding to the dtype of ``actual`` comes on top."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert bool(actual.isfinite().all()), f"{what}: not finite"
    error, allowed = relative_error(actual, expected), bound + rounding_floor(expected, actual.dtype)
    assert error <= allowed, f"{what}: relative error {error:.2e} exceeds {allowed:.2e}"


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    rows, columns = tensor.shape
    wide = tensor.new_zeros(2 * rows, 3 * columns)
    wide[::2, 1::3] = tensor
    padded = tensor.new_zeros(rows + 2, columns + 5)
    padded[1:-1, 3:-2] = tensor
    return {
        "contiguous": tensor,
        "transposed": tensor.t().contiguous().t(),
        "strided": wide[::2, 1::3],
        "offset": padded[1:-1, 3:-2],
    }
