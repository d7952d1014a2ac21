"""Weights stored as fp8 with a scale per block (the native format of DeepSeek-V3 and its like)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from .errors import SafeLoraError
from .weights import Stored

if TYPE_CHECKING:
    import torch

_FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = (*FLOAT_DTYPES, "F8_E8M0", "U8")
_SUFFIX = "_scale_inv"
_DEFAULT_BLOCK = (128, 128)


def is_fp8(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint says that it is natively fp8. Raises SafeLoraError for any other quantisation."""
    settings = checkpoint.config.get("quantization_config")
    if not settings:
        return False
    method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
    if method != "fp8":
        raise SafeLoraError(
            f"{checkpoint.source} is a quantised checkpoint (quantization_config: {str(method)[:40]}). The difference "
            "of two quantised models is mostly rounding; give the original fp32, bf16 or fp16 checkpoints instead."
        )
    return True


def check_pair(base: Checkpoint, aligned: Checkpoint) -> str | None:
    """A warning where both models are natively fp8. Raises SafeLoraError where only one of them is."""
    found = [is_fp8(checkpoint) for checkpoint in (base, aligned)]
    if found[0] != found[1]:
        quantised, other = (base, aligned) if found[0] else (aligned, base)
        raise SafeLoraError(
            f"{quantised.source} is fp8 and {other.source} is not: their difference would be mostly rounding. Give "
            "both in the format they were released in, or both in bf16."
        )
    if all(found):
        return (
            "Both models are fp8: V holds their rounding, about 2.6 % of every weight, beside what alignment changed."
        )
    return None


def stored(checkpoint: Checkpoint, info: TensorInfo) -> Stored:
    """`info` with its block scales if it is fp8. Raises SafeLoraError for a dtype that is no weight."""
    if info.dtype in FLOAT_DTYPES:
        return Stored(info)
    scale = checkpoint.tensors.get(info.name + _SUFFIX)
    if info.dtype not in _FP8_DTYPES or scale is None or not is_fp8(checkpoint):
        raise SafeLoraError(
            f"{checkpoint.source}: {info.name} ({info.file.name}) has dtype {info.dtype}: a quantised weight. The "
            "difference of two quantised models is mostly rounding; use the original fp32, bf16 or fp16 checkpoints."
        )
    return Stored(info, scale, _block(checkpoint, info, scale))


def is_scale(name: str) -> bool:
    """Whether a tensor holds block scales."""
    return name.endswith(_SUFFIX)


def dequantize(
    values: torch.Tensor,
    scale: torch.Tensor,
    block: tuple[int, int],
    rows: slice = slice(None),
    cols: slice = slice(None),
) -> torch.Tensor:
    """values[..., i, j] · scale[..., i // block[0], j // block[1]] in fp32, of a window of the last two dimensions.

    A uint8 scale is an exponent: 2^(scale − 127).
    """
    import torch

    row = torch.arange(values.shape[-2])[rows] // block[0]
    col = torch.arange(values.shape[-1])[cols] // block[1]
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    return values[..., rows, cols].float().mul_(factor[..., row, :][..., col])


def _block(checkpoint: Checkpoint, info: TensorInfo, scale: TensorInfo) -> tuple[int, int]:
    settings: Any = checkpoint.config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    declared = tuple(size) if isinstance(size, list) and len(size) == 2 else _DEFAULT_BLOCK
    whole = info.shape[-2:]
    grid = scale.shape[-2:]
    if scale.dtype in _SCALE_DTYPES and len(scale.shape) == len(info.shape) >= 2 and 0 not in grid:
        if all(isinstance(b, int) and b > 0 and -(-w // b) == g for w, b, g in zip(whole, declared, grid, strict=True)):
            return declared[0], declared[1]
        if all(w % g == 0 for w, g in zip(whole, grid, strict=True)):
            return whole[0] // grid[0], whole[1] // grid[1]
    raise SafeLoraError(
        f"{checkpoint.source}: {scale.name} ({scale.dtype}, shape {list(scale.shape)}) does not fit {info.name} of "
        f"shape {list(info.shape)} in blocks of {list(declared)}."
    )
