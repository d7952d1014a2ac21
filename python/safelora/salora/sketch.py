"""The leading subspace of a matrix Z whose rows come in batches and are not kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safelora_kernels as sk

from ..errors import SafeLoraError

if TYPE_CHECKING:
    import torch

    from ..distributed import Ranks

# Eigenvalues of ΩᵀY below this share of the largest are rounding of the fp32 products.
_NOISE = 2.0**-22


class Sketch:
    """``Y = Zᵀ(Z Ω)`` and ``‖Z‖²``, summed in fp64 over batches of rows of Z; or all of ZᵀZ.

    Ω (d × q, q = rank + oversample) is orthonormal. It is drawn when d is known, from a generator of its own, so that
    neither other modules nor the global state of torch matter.
    """

    def __init__(self, name: str, rank: int, oversample: int, seed: int, exact: bool) -> None:
        import torch

        self.name = name
        self.rank = rank
        self.columns = rank + oversample
        self.seed = seed
        self.exact = exact
        self.omega: torch.Tensor | None = None
        self.product: torch.Tensor | None = None
        self.energy = torch.zeros((), dtype=torch.float64)
        self.rows = 0

    @property
    def called(self) -> bool:
        return self.product is not None

    def add(self, rows: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Rows of Z, t × d, in any dtype, with `bias` still in them."""
        import torch

        product = self._begin(rows.shape[-1], rows.device)
        if not len(rows):
            return
        z = rows
        if bias is not None:
            wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
            z = rows.to(wide) - bias.to(wide)
        if self.omega is None:
            product += sk.gram(z, out_dtype=torch.float64)
        else:
            product += sk.gram_apply(z, self.omega.to(torch.promote_types(z.dtype, torch.float32)))
        self.energy += z.double().square().sum()
        self.rows += len(rows)

    def refine(self) -> None:
        """Start again with the directions found so far for Ω."""
        import torch

        if self.product is None or self.omega is None:
            self._restart()
            return
        left = _nystrom(self.product, self.omega)[0].to(self.omega.device)
        # The noise that Nyström's inverse left out is replaced by random directions, so that q columns remain.
        filled = torch.cat([left, self.omega], dim=1)[:, : self.omega.shape[1]]
        self.omega = torch.linalg.qr(filled)[0]
        self._restart()

    def reduce(self, ranks: Ranks) -> None:
        """Add up the sketches of all ranks; a collective call."""
        import torch

        if ranks.size == 1:
            return
        widths = [width for width in ranks.gather(None if self.product is None else self.product.shape[0]) if width]
        if not widths:
            return
        product = self._begin(widths[0], "cpu")
        parts = ranks.gather((product.cpu(), self.energy.cpu(), self.rows))
        self.product = torch.stack([part[0] for part in parts]).sum(0).to(product.device)
        self.energy = torch.stack([part[1] for part in parts]).sum().to(self.energy.device)
        self.rows = sum(part[2] for part in parts)

    def _begin(self, width: int, device: Any) -> torch.Tensor:
        """The sum so far of Y (or ZᵀZ), zero on the first call, which draws Ω."""
        import torch

        if self.product is not None:
            if self.product.shape[0] != width:
                raise SafeLoraError(f"{self.name} gives {width} outputs, and gave {self.product.shape[0]} before.")
            return self.product
        q = min(self.columns, width)
        if self.omega is None and not self.exact and q < width:
            generator = torch.Generator().manual_seed(self.seed)
            gaussian = torch.randn(width, q, generator=generator, dtype=torch.float64)
            self.omega = torch.linalg.qr(gaussian)[0].to(device)
        self.product = torch.zeros(width, width if self.omega is None else q, dtype=torch.float64, device=device)
        self.energy = self.energy.to(device)
        return self.product

    def _restart(self) -> None:
        if self.product is not None:
            self.product.zero_()
        self.energy.zero_()
        self.rows = 0


def leading_subspace(sketch: Sketch, rcond: float) -> tuple[torch.Tensor, dict[str, Any]]:
    """The orthonormal fp32 d × k basis of a sketch's leading directions, and what it captures.

    k is the rank asked for, less where σ falls below rcond·σ₁. Raises SafeLoraError for NaN, Z = 0 or no Z at all.
    """
    import torch

    if sketch.product is None:
        raise SafeLoraError(f"{sketch.name} is never called in a forward pass: there is no subspace.")
    energy = float(sketch.energy)
    if not torch.isfinite(sketch.product).all() or energy != energy:
        raise SafeLoraError(f"the activations of {sketch.name} hold NaN or Inf; the model or its dtype is at fault.")
    if energy == 0:
        raise SafeLoraError(f"the outputs of {sketch.name} are zero for every response token: there is no subspace.")
    if sketch.omega is None:
        product = sketch.product.cpu()
        values, vectors = torch.linalg.eigh((product + product.t()) / 2)
        left, values = vectors.flip(1), values.flip(0).clamp(min=0)
    else:
        left, values = _nystrom(sketch.product, sketch.omega)
    kept = int((values[: sketch.rank].sqrt() >= max(rcond, 1e-12) * values[0].sqrt()).sum())
    basis = torch.linalg.qr(left[:, :kept])[0]
    # QR keeps the directions but not their signs; the largest element of each is made positive.
    signs = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    numbers = {
        "rank": kept,
        "rank_asked": sketch.rank,
        "energy": min(float(values[:kept].sum()) / energy, 1.0),
        "rows": sketch.rows,
        "sigma_first": float(values[0].sqrt()),
        "sigma_last": float(values[kept - 1].sqrt()),
    }
    return (basis * signs).float(), numbers


def _nystrom(product: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors and eigenvalues of ``Y (ΩᵀY)⁻¹ Yᵀ``, largest first, in fp64 on the CPU.

    Tropp, Yurtsever, Udell, Cevher, Fixed-rank approximation of a positive-semidefinite matrix from streaming data,
    2017; the inverse leaves out the eigenvalues that are rounding.
    """
    import torch

    y, core = product.cpu(), (omega.t() @ product).cpu()
    weights, directions = torch.linalg.eigh((core + core.t()) / 2)
    keep = weights > _NOISE * weights[-1]
    if not keep.any():
        raise SafeLoraError("a sketch is zero: its activations are too small for fp32 products.")
    left, values, _ = torch.linalg.svd(y @ (directions[:, keep] / weights[keep].sqrt()), full_matrices=False)
    return left, values**2
