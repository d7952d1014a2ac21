"""A weight of a checkpoint as a d_out × d_in matrix, whatever it is stored as, and V = W_aligned − W_base from two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .checkpoint import TensorInfo

if TYPE_CHECKING:
    import torch

    from .stream import MappedRange

Normalize = Literal["frobenius", "none"]
MAX_RANK = 512
PANEL_ELEMENTS = 1 << 24


class Stored(NamedTuple):
    """A stored tensor, with the table of block scales that it is multiplied by where it is fp8."""

    info: TensorInfo
    scale: TensorInfo | None = None
    block: tuple[int, int] = (1, 1)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.info,) if self.scale is None else (self.info, self.scale)

    def slab(self, index: int) -> Stored:
        """Entry `index` of the first dimension, as a tensor of its own."""
        return Stored(_slab(self.info, index), self.scale and _slab(self.scale, index), self.block)


@dataclass(frozen=True)
class WeightMatch:
    """The tensors found for a weight: how ("exact", "tied", "prefix", "suffix" or "converted") and its orientation.

    `transposed` says that d_in × d_out is stored. `convert` makes the weight of several tensors, or of one that is
    stored in another form.
    """

    sources: tuple[Stored, ...]
    how: str
    transposed: bool
    convert: Callable[[list[torch.Tensor]], torch.Tensor] | None = None

    @property
    def info(self) -> TensorInfo:
        return self.sources[0].info

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return tuple(part for source in self.sources for part in source.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def dense(self) -> bool:
        """Whether the stored bytes are the weight, so that it can be used where it lies."""
        return self.convert is None and self.sources[0].scale is None


class OpenWeight:
    """A weight whose tensors are mapped."""

    def __init__(self, match: WeightMatch, mapped: Sequence[MappedRange]) -> None:
        from .stream import to_tensor

        self.match = match
        tensors = [to_tensor(memory, part) for memory, part in zip(mapped, match.parts, strict=True)]
        self._quantised: list[torch.Tensor] | None = None
        if match.convert is not None:
            from .fp8 import dequantize

            whole, pending = [], list(tensors)
            for source in match.sources:
                tensor = pending.pop(0)
                whole.append(tensor if source.scale is None else dequantize(tensor, pending.pop(0), source.block))
            self._matrix = self._oriented(match.convert(whole))
        elif len(tensors) == 2:
            self._quantised = tensors
            self._matrix = self._oriented(tensors[0])
        else:
            self._matrix = self._oriented(tensors[0])

    @property
    def shape(self) -> torch.Size:
        return self._matrix.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its columns."""
        import torch

        return torch.float32 if self.quantised else self._matrix.dtype

    @property
    def quantised(self) -> bool:
        return self._quantised is not None

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns [start, stop) of the d_out × d_in matrix: a view where the weight is dense, else dequantised."""
        if self._quantised is None:
            return self._matrix[:, start:stop]
        from .fp8 import dequantize

        values, scale = self._quantised
        window = (slice(start, stop), slice(None)) if self.match.transposed else (slice(None), slice(start, stop))
        return self._oriented(dequantize(values, scale, self.match.sources[0].block, *window))

    def matrix(self) -> torch.Tensor:
        """The whole matrix."""
        return self.columns(0, self.shape[1])

    def _oriented(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.unsqueeze(1) if weight.ndim < 2 else weight.flatten(1)
        return weight.t() if self.match.transposed else weight


class Difference:
    """V = W_aligned − W_base, applied in column panels: V Vᵀ B = Σ_p V_p (V_pᵀ B)."""

    def __init__(self, aligned: OpenWeight, base: OpenWeight) -> None:
        self.aligned = aligned
        self.base = base

    def apply(
        self, lora_B: torch.Tensor, lora_A: torch.Tensor | None, normalize: Normalize
    ) -> tuple[torch.Tensor, float, float]:
        """(V Vᵀ B/‖V‖_F, ‖V‖_F, cosine of B·A and its projection; without A, of B and B'). B is d_out × r, r ≤ 512.

        B' is fp32, or fp64 for an fp64 B.
        """
        import torch

        import safelora_kernels as sk

        dtype = torch.float64 if lora_B.dtype == torch.float64 else torch.float32
        d_out, d_in = self.aligned.shape
        if not (self.aligned.quantised or self.base.quantised):
            result = sk.project_lowrank(
                self.aligned.matrix(), self.base.matrix(), lora_B, lora_A, normalize=normalize, out_dtype=dtype
            )
            projected: Any = result.lora_B
            v_norm = float(result.v_norm)
        else:
            total = torch.zeros(lora_B.shape, dtype=torch.float64)
            square = 0.0
            width = max(1, PANEL_ELEMENTS // d_out)
            for start in range(0, d_in, width):
                stop = min(start + width, d_in)
                part: Any = sk.project_lowrank(
                    self.aligned.columns(start, stop), self.base.columns(start, stop), lora_B,
                    normalize="none", out_dtype=dtype,
                )  # fmt: skip
                total += part.lora_B
                square += float(part.v_norm) ** 2
            v_norm = square**0.5
            if normalize == "frobenius" and v_norm:
                total /= v_norm
            projected = total.to(dtype)
        if not v_norm:
            return projected, v_norm, float("nan")
        if lora_A is None:
            return projected, v_norm, float("nan")
        return projected, v_norm, float(sk.update_cosine(projected, lora_B, lora_A))


class DeltaResult(NamedTuple):
    """Numbers of a projected full delta; the cosine is that of ΔW and its projection."""

    v_norm: float
    cosine: float
    norm: float
    norm_after: float
    distance: float


def project_delta(
    difference: Difference,
    tuned: torch.Tensor,
    start_from: Callable[[int, int], torch.Tensor],
    normalize: Normalize,
    out: torch.Tensor,
) -> DeltaResult:
    """Safe LoRA's rule for a full update ΔW = W_ft − W_aligned: out = W_aligned + V(VᵀΔW)/‖V‖_F, in column panels.

    Args:
        difference: V, d_out × d_in.
        tuned: W_ft, d_out × n (n = d_in, or the number of trained tokens).
        start_from: columns [start, stop) of what was tuned: W_aligned, or its rows for the trained tokens.
        normalize: "frobenius" or "none".
        out: d_out × n, written in its own dtype.

    At most PANEL_ELEMENTS of ΔW are held at a time. Where n > d_out, C = V Vᵀ/‖V‖_F (d_out × d_out) is formed once from
    panels of the identity instead, which costs less than n passes over V.
    """
    import torch

    d_out, n = tuned.shape
    width = max(1, min(MAX_RANK, PANEL_ELEMENTS // d_out))
    wide = torch.float64 in (tuned.dtype, difference.aligned.dtype, difference.base.dtype)
    dtype = torch.float64 if wide else torch.float32
    C = None
    v_norm = 0.0
    if n > d_out:
        C = torch.empty((d_out, d_out), dtype=dtype)
        for start in range(0, d_out, width):
            stop = min(start + width, d_out)
            unit = torch.zeros((d_out, stop - start), dtype=dtype)
            unit[start:stop].fill_diagonal_(1)
            C[:, start:stop], v_norm, _ = difference.apply(unit, None, normalize)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, n, width):
        stop = min(start + width, n)
        origin = start_from(start, stop).to(dtype)
        delta = tuned[:, start:stop].to(dtype) - origin
        if C is None:
            projected, v_norm, _ = difference.apply(delta, None, normalize)
        else:
            projected = C @ delta
        before, after = delta.double(), projected.double()
        sums += torch.stack(
            [(x * y).sum() for x, y in ((before, before), (after, after), (before, after))]
            + [(before - after).square().sum()]
        )
        out[:, start:stop] = origin + projected
    square, square_after, dot, distance = sums.tolist()
    if not v_norm:
        return DeltaResult(0.0, float("nan"), square**0.5, 0.0, 0.0)
    norms = (square * square_after) ** 0.5 if square * square_after else 0.0
    cosine = dot / norms if norms else 0.0 if square == square else float("nan")
    return DeltaResult(v_norm, cosine, square**0.5, square_after**0.5, distance**0.5)


def _slab(info: TensorInfo, index: int) -> TensorInfo:
    size = info.nbytes // info.shape[0]
    begin = info.begin + index * size
    return TensorInfo(info.name, info.dtype, info.shape[1:], info.file, begin, begin + size)
