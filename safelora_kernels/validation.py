"""Argument checks of the public functions: everything is checked before any work starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_float_dtype(name: str, dtype: object) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}")


def check_matrix(name: str, tensor: Any, device: torch.device | None = None, index: int | None = None) -> None:
    """A 2-D floating tensor, on ``device`` if one is given; ``index`` is its place in the list called ``name``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{_at(name, index)} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        check_float_dtype(f"{_at(name, index)}.dtype", tensor.dtype)
    if tensor.layout != torch.strided:
        raise TypeError(f"{_at(name, index)} must be a dense tensor, got layout {tensor.layout}: call to_dense()")
    if tensor.dim() != 2:
        raise ValueError(f"{_at(name, index)} must be 2-D, got shape {tuple(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(
            f"{_at(name, index)} is on {tensor.device}, the tensors before it on {device}: move them to one device"
        )


def _at(name: str, index: int | None) -> str:
    return name if index is None else f"{name}[{index}]"


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name} must have shape {expected} ({why}), got {tuple(tensor.shape)}")


def check_sequence(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of tensors, got {type(value).__name__}")


def check_same_length(**named: Sequence[object]) -> None:
    if len({len(values) for values in named.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in named.items())
        raise ValueError(f"one entry per layer is needed in each list, got {counts}")


def check_rank(name: str, rank: int) -> None:
    if rank == 0:
        raise ValueError(f"{name} has rank 0: a LoRA factor needs at least one column")


def check_scaling(scaling: Any) -> None:
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a float (alpha / r), got {type(scaling).__name__}")


def check_num_layers(num_layers: Any) -> None:
    if isinstance(num_layers, bool) or not isinstance(num_layers, int):
        raise TypeError(f"num_layers must be an int, got {type(num_layers).__name__}")
    if num_layers < 0:
        raise ValueError(f"num_layers must be 0 or more, got {num_layers}")


def check_threshold(threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a float, got {type(threshold).__name__}")
    if math.isnan(threshold):
        raise ValueError("threshold is NaN: give a cosine between 0 and 1")


def wants_grad(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd would have to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_grad(function: str, tensors: Iterable[Tensor]) -> None:
    if wants_grad(tensors):
        raise RuntimeError(
            f"{function} records no gradients and was given a tensor that requires grad: "
            "call it under torch.no_grad(), or detach() the tensors"
        )


def check_writable(xs: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    """Refuses to write into tensors that hold one element twice, overlap each other, or overlap a basis."""
    for i, x in enumerate(xs):
        if not x.is_contiguous() and torch._debug_has_internal_overlap(x) == 1:
            raise ValueError(f"xs[{i}] is expanded: several of its elements share memory; pass xs[{i}].clone()")
    spans = [(*_span(x), "xs", i) for i, x in enumerate(xs) if x.numel()]
    spans += [(*_span(basis), "bases", i) for i, basis in enumerate(bases) if basis.numel()]
    spans.sort()
    written = read = 0
    for start, end, kind, _ in spans:
        if start < written or (kind == "xs" and start < read):
            _check_each_pair(xs, bases, spans)
            return
        if kind == "xs":
            written = max(written, end)
        else:
            read = max(read, end)


def _span(matrix: Tensor) -> tuple[int, int]:
    """The half-open range of bytes that a non-empty matrix can touch."""
    start = matrix.data_ptr()
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    return start, start + ((rows - 1) * row_stride + (columns - 1) * column_stride + 1) * matrix.element_size()


def _check_each_pair(xs: Sequence[Tensor], bases: Sequence[Tensor], spans: Sequence[tuple[int, int, str, int]]) -> None:
    """Ranges that meet need not share an element: compares those pairs one by one. ``spans`` are sorted."""
    tensors = {"xs": xs, "bases": bases}
    reach: list[tuple[int, int, str, int]] = []
    for span in spans:
        start, _, kind, i = span
        reach = [other for other in reach if other[1] > start]
        for _, _, other_kind, k in reach:
            if "xs" in (kind, other_kind) and _share_elements(tensors[kind][i], tensors[other_kind][k]):
                raise ValueError(
                    f"{other_kind}[{k}] and {kind}[{i}] overlap in memory: written in place, the result would depend "
                    "on the order; clone one of them"
                )
        reach.append(span)


def _share_elements(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors whose byte ranges meet touch a common byte: column slices of one matrix do not."""
    start = min(_span(left)[0], _span(right)[0])
    touched = torch.zeros(max(_span(left)[1], _span(right)[1]) - start, dtype=torch.bool)

    def cells(tensor: Tensor) -> Tensor:
        width = tensor.element_size()
        strides = [stride * width for stride in tensor.stride()]
        return touched.as_strided((*tensor.shape, width), (*strides, 1), tensor.data_ptr() - start)

    cells(left).fill_(True)
    return bool(cells(right).any())
