"""The mathematics in plain torch: the oracle of the tests and the last fallback.

Public functions have the signatures of :mod:`safelora_kernels.functional` without ``backend``, and do not validate.
Products are taken in fp32, or in fp64 as soon as one operand (or ``out_dtype``) is fp64; norms, Grams and cosines
always in fp64. All of it is ordinary autograd code. Nothing of size ``d_out × d_out`` or ``d_out × d_in`` is formed.

Sources: Safe LoRA, arXiv 2405.16833; SaLoRA, arXiv 2501.01765.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .types import LayerFactors, Normalize, Projection, Rule, SelectedProjection, Side

__all__ = [
    "gram_apply",
    "gram_apply_layers",
    "project_layers",
    "project_lowrank",
    "project_out",
    "project_out_layers",
    "project_out_layers_",
    "project_selected_layers",
    "salora_linear",
    "select_layers",
    "update_cosine",
]

STRIP_COLUMNS = 256
BLOCK_ROWS = 256
PANEL_COLUMNS = 512


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """fp64 if any of ``dtypes`` is fp64, else fp32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def autocast_off(tensor: Tensor) -> AbstractContextManager[object]:
    """Keeps autocast from rounding the products inside to half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def difference_apply(
    aligned: Tensor, base: Tensor, lora_B: Tensor, normalize: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``V (Vᵀ B)`` over ``‖V‖_F`` (or over 1) in ``dtype``, and ``‖V‖_F`` in fp64, where ``V = aligned − base``.

    A sum over strips of columns, since ``V Vᵀ B = Σ_s V_s (V_sᵀ B)``. A weight that is not finite makes both NaN.
    """
    lora_B = lora_B.to(dtype)
    projected = torch.zeros_like(lora_B)
    square = torch.zeros((), dtype=torch.float64, device=lora_B.device)
    for start in range(0, aligned.shape[1], STRIP_COLUMNS):
        columns = slice(start, start + STRIP_COLUMNS)
        v = aligned[:, columns].to(dtype) - base[:, columns].to(dtype)
        projected = projected + v @ (v.mT @ lora_B)
        square = square + torch.linalg.vector_norm(v, dtype=torch.float64).square()
    norm = square.sqrt()
    norm = torch.where(norm.isfinite(), norm, torch.nan)
    if normalize == "frobenius":
        # V = 0 projects to zero, not to 0/0.
        scale = torch.where(norm == 0, 0.0, norm.reciprocal())
    else:
        scale = torch.where(norm.isnan(), norm, 1.0)
    return projected * scale.to(dtype), norm


def gram_cosine(lora_B_new: Tensor, lora_B: Tensor, lora_A: Tensor) -> Tensor:
    """``⟨B_new A, B A⟩ / (‖B_new A‖ ‖B A‖)`` by r×r Grams in fp64; 0 where either update is zero."""
    new, old, a = lora_B_new.double(), lora_B.double(), lora_A.double()
    kernel = a @ a.mT

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return ((left.mT @ right) * kernel).sum()

    norms = inner(new, new).clamp(min=0).sqrt() * inner(old, old).clamp(min=0).sqrt()
    return torch.where(norms == 0, norms, inner(new, old) / norms).clamp(-1, 1)


def project_out(x: Tensor, basis: Tensor, *, side: Side = "left") -> Tensor:
    """``X − U (Uᵀ X)`` on the left, ``X − (X U) Uᵀ`` on the right, in the dtype of ``x``."""
    if side == "right":
        return project_out(x.mT, basis).mT
    with autocast_off(x):
        dtype = compute_dtype(x.dtype, basis.dtype)
        wide, u = x.to(dtype), basis.to(dtype)
        return (wide - u @ (u.mT @ wide)).to(x.dtype)


def project_out_layers(xs: Sequence[Tensor], bases: Sequence[Tensor], *, side: Side = "left") -> list[Tensor]:
    """:func:`project_out` of each pair."""
    return [project_out(x, basis, side=side) for x, basis in zip(xs, bases, strict=True)]


def project_out_layers_(xs: Sequence[Tensor], bases: Sequence[Tensor], *, side: Side = "left") -> None:
    """:func:`project_out` of each pair, written into ``xs``."""
    for x, basis in zip(xs, bases, strict=True):
        x.copy_(project_out(x, basis, side=side))


def project_layers(
    layers: Sequence[LayerFactors],
    *,
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> list[Projection]:
    """``B' = V (Vᵀ B) / ‖V‖_F`` and the cosine between ``B' A`` and ``B A``, layer by layer."""
    return [project_lowrank(*LayerFactors(*layer), normalize=normalize, out_dtype=out_dtype) for layer in layers]


def project_selected_layers(
    layers: Sequence[LayerFactors],
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Rule = "strict",
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> SelectedProjection:
    """:func:`project_layers`, :func:`select_layers` over all adapters, and the factor given wherever not selected."""
    results = project_layers(layers, normalize=normalize, out_dtype=out_dtype)
    projected: list[Tensor] = []
    originals: list[Tensor] = []
    cosines: list[Tensor] = []
    for layer, result in zip(layers, results, strict=True):
        single = isinstance(result.lora_B, Tensor)
        for new, old, value in zip(
            [result.lora_B] if single else result.lora_B,
            [layer[2]] if single else layer[2],
            [result.cosine] if single else result.cosine,  # type: ignore[arg-type]
            strict=True,
        ):
            projected.append(new)
            originals.append(old)
            cosines.append(torch.full_like(result.v_norm, torch.nan) if value is None else value)
    cosine = torch.stack(cosines) if cosines else torch.zeros(0, dtype=torch.float64)
    selected = select_layers(cosine, threshold=threshold, num_layers=num_layers, rule=rule)
    final = iter(keep_unselected(projected, originals, selected))
    nested = [next(final) if isinstance(r.lora_B, Tensor) else [next(final) for _ in r.lora_B] for r in results]
    norms = torch.stack([r.v_norm for r in results]) if results else torch.zeros(0, dtype=torch.float64)
    return SelectedProjection(nested, norms, cosine, selected)


def keep_unselected(projected: Sequence[Tensor], lora_B: Sequence[Tensor], selected: Tensor) -> list[Tensor]:
    """``projected`` where selected, else ``lora_B`` in the same dtype."""
    return [
        torch.where(chosen, new, old.to(new.dtype))
        for new, old, chosen in zip(projected, lora_B, selected.unbind(), strict=True)
    ]


def project_lowrank(
    aligned: Tensor,
    base: Tensor,
    lora_B: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor | None] | None = None,
    *,
    normalize: Normalize = "frobenius",
    out_dtype: torch.dtype | None = None,
) -> Projection:
    """:func:`project_layers` of one layer."""
    if isinstance(lora_B, Tensor):
        factors_A = [lora_A if isinstance(lora_A, Tensor) else None]
        projected, norm, cosines = project_factors(aligned, base, [lora_B], factors_A, normalize, out_dtype)
        return Projection(projected[0], norm, cosines[0])
    adapters_A = [None] * len(lora_B) if lora_A is None else list(lora_A)
    return Projection(*project_factors(aligned, base, lora_B, adapters_A, normalize, out_dtype))


def project_factors(
    aligned: Tensor,
    base: Tensor,
    lora_B: Sequence[Tensor],
    lora_A: Sequence[Tensor | None],
    normalize: str,
    out_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Projects every adapter over one weight pair; adapters concatenate along the rank."""
    with autocast_off(aligned):
        kinds = [aligned.dtype, base.dtype, *(b.dtype for b in lora_B)]
        dtype = compute_dtype(*kinds, *([] if out_dtype is None else [out_dtype]))
        together, norm = difference_apply(
            aligned, base, torch.cat([b.to(dtype) for b in lora_B], dim=1), normalize, dtype
        )
        projected = together.split([b.shape[1] for b in lora_B], dim=1)
        cosines = [
            None if a is None else torch.where(norm == 0, torch.nan, gram_cosine(new, old, a))
            for new, old, a in zip(projected, lora_B, lora_A, strict=True)
        ]
        return [p.to(out_dtype or b.dtype) for p, b in zip(projected, lora_B, strict=True)], norm, cosines


def update_cosine(
    lora_B_new: Tensor | Sequence[Tensor], lora_B: Tensor | Sequence[Tensor], lora_A: Tensor | Sequence[Tensor]
) -> Tensor:
    """The cosine between ``B_new A`` and ``B A``, fp64: 0-dim for tensors, ``(n,)`` for lists of n."""
    if isinstance(lora_B_new, Tensor):
        with autocast_off(lora_B_new):
            return gram_cosine(lora_B_new, lora_B, lora_A)  # type: ignore[arg-type]
    cosines = [update_cosine(*factors) for factors in zip(lora_B_new, lora_B, lora_A, strict=True)]
    return torch.stack(cosines) if cosines else torch.zeros(0, dtype=torch.float64)


def select_layers(
    cosines: Tensor, *, threshold: float | None = None, num_layers: int | None = None, rule: Rule = "strict"
) -> Tensor:
    """The layers to project, as a bool tensor; NaN is never selected. Data stay on the device."""
    valid = ~cosines.isnan()
    if rule == "authors":
        cosines = torch.round(cosines.double(), decimals=5)
    if threshold is not None:
        return valid & (cosines.double() <= threshold)
    if num_layers is None:
        raise ValueError("select_layers needs threshold or num_layers")
    if num_layers == 0 or cosines.numel() == 0:
        return torch.zeros_like(valid)
    # NaN sorts last, and the stable sort gives ties to the lower index.
    ordered, order = torch.sort(cosines, stable=True)
    if rule == "authors":
        cutoff = ordered[min(num_layers, len(ordered)) - 1]
        return valid & (cutoff.isnan() | (cosines <= cutoff))
    chosen = torch.zeros_like(valid).index_fill(0, order[:num_layers], True)
    return valid & chosen


def _row_blocks(x: Tensor) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, x.shape[0], BLOCK_ROWS))


def _weighted(rows: Tensor, weights: Tensor | None, block: slice) -> Tensor:
    return rows if weights is None else weights[block, None].to(rows.dtype) * rows


def gram_apply(x: Tensor, z: Tensor, weights: Tensor | None = None) -> Tensor:
    """``Xᵀ diag(w) X Z`` in fp32, or in fp64 if one operand is fp64.

    A sum over blocks of rows, ``Σ_b X_bᵀ (w_b ∘ (X_b Z))``: nothing of the size of X or of Xᵀ X is formed.
    """
    with autocast_off(x):
        dtype = compute_dtype(x.dtype, z.dtype, *([] if weights is None else [weights.dtype]))
        z = z.to(dtype)
        total = torch.zeros_like(z, memory_format=torch.contiguous_format)
        for block in _row_blocks(x):
            rows = x[block].to(dtype)
            total = total + rows.mT @ _weighted(rows @ z, weights, block)
        return total


def gram_apply_layers(
    xs: Sequence[Tensor], zs: Sequence[Tensor], weights: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """:func:`gram_apply` of each pair."""
    found = [None] * len(xs) if weights is None else weights
    return [gram_apply(x, z, weight) for x, z, weight in zip(xs, zs, found, strict=True)]


def gram_apply_gradients(
    grad: Tensor, x: Tensor, z: Tensor, weights: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``⟨G, Xᵀ diag(w) X Z⟩`` for x and weights; None where not needed.

    ``dX = w ∘ (X Z Gᵀ + X G Zᵀ)`` and ``dw = rowsum((X Z) ∘ (X G))``, block by block of rows.
    """
    need_x, need_weights = needs
    with autocast_off(x):
        dtype = grad.dtype
        z = z.to(dtype)
        dx, dw = [], []
        for block in _row_blocks(x):
            rows = x[block].to(dtype)
            y, h = rows @ z, rows @ grad
            if need_x:
                dx.append(_weighted(y @ grad.mT + h @ z.mT, weights, block).to(x.dtype))
            if need_weights:
                dw.append((y * h).sum(1))
        return (
            torch.cat(dx) if dx else None,
            torch.cat(dw).to(weights.dtype) if dw and weights is not None else None,
        )


def gram(x: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``Xᵀ diag(w) X`` in ``dtype``, exactly symmetric: the products on and below the diagonal, mirrored.

    Blocks of rows are widened one at a time and multiplied panel by panel of columns, from the diagonal down.
    """
    with autocast_off(x):
        d = x.shape[1]
        total = x.new_zeros((d, d), dtype=dtype)
        panels = [slice(start, min(start + PANEL_COLUMNS, d)) for start in range(0, d, PANEL_COLUMNS)]
        for block in _row_blocks(x):
            rows = x[block].to(dtype)
            scaled = _weighted(rows, weights, block)
            for panel in panels:
                total[panel.start :, panel].addmm_(rows[:, panel.start :].mT, scaled[:, panel])
        for panel in panels:
            corner = total[panel, panel].tril()
            total[panel, panel] = corner + corner.tril(-1).mT
            total[panel, panel.stop :] = total[panel.stop :, panel].mT
        return total


def salora_linear(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float
) -> Tensor:
    """``base_output + s (x Aᵀ) (B − U (Uᵀ B))ᵀ`` in the dtype of ``base_output``."""
    return salora_forward(x, base_output, lora_A, lora_B, basis, scaling)[0]


def salora_forward(
    x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of :func:`salora_linear` with its two intermediates."""
    with autocast_off(x):
        h, projected_B = salora_intermediates(x, lora_A, lora_B, basis)
        return (base_output.to(h.dtype) + scaling * (h @ projected_B.mT)).to(base_output.dtype), h, projected_B


def salora_intermediates(x: Tensor, lora_A: Tensor, lora_B: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``h = x Aᵀ`` and ``B̃ = B − U (Uᵀ B)`` in the precision of the sums."""
    with autocast_off(x):
        dtype = compute_dtype(x.dtype)
        return x.to(dtype) @ lora_A.to(dtype).mT, project_out(lora_B.to(dtype), basis)


def salora_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    projected_B: Tensor,
    basis: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`salora_linear` for x, lora_A, lora_B and basis; None where not needed.

    With ``t = dy B̃`` and ``G = s dyᵀ h``: ``dx = s t A``, ``dA = s tᵀ x``, ``dB = G − U (Uᵀ G)`` and
    ``dU = −(G (Uᵀ B)ᵀ + B (Uᵀ G)ᵀ)``.
    """
    with autocast_off(x):
        dtype = h.dtype
        dy, wide_x, a, b, u = (t.to(dtype) for t in (dy, x, lora_A, lora_B, basis))
        need_x, need_A, need_B, need_U = needs
        dx = dA = dB = dU = None
        if need_x or need_A:
            t = scaling * (dy @ projected_B)
            dx = (t @ a).to(x.dtype) if need_x else None
            dA = (t.mT @ wide_x).to(lora_A.dtype) if need_A else None
        if need_B or need_U:
            g = scaling * (dy.mT @ h)
            dB = project_out(g, u).to(lora_B.dtype) if need_B else None
            dU = basis_gradient(g, b, u).to(basis.dtype) if need_U else None
        return dx, dA, dB, dU


def basis_gradient(grad: Tensor, x: Tensor, basis: Tensor) -> Tensor:
    """The gradient of ``⟨G, X − U (Uᵀ X)⟩`` in U: ``−(G (Uᵀ X)ᵀ + X (Uᵀ G)ᵀ)``."""
    return -(grad @ (x.mT @ basis) + x @ (grad.mT @ basis))
