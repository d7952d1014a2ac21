"""Triton's CPU interpreter with what it gets wrong put right; import it before a kernel is launched.

As of Triton 3.9 the interpreter keeps bf16 as uint16 and computes on the bit patterns, truncates where hardware rounds,
ignores ``input_precision`` and reads and writes any address. Here casts go through torch, bf16 is computed in fp32 and
rounded once, tf32 dots round their operands, and an access outside the tensors of a launch raises. Tensors that a
kernel reaches through a table of addresses alone are made known with :func:`reach`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_TORCH = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16, tl.float32: torch.float32, tl.float64: torch.float64}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)

Handle = interpreter.TensorHandle


def _tensor(handle: Any) -> Tensor:
    data = np.ascontiguousarray(handle.data)
    if handle.dtype.scalar == tl.bfloat16:
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _handle(tensor: Tensor, dtype: Any, shape: tuple[int, ...]) -> Any:
    if dtype == tl.bfloat16:
        return Handle(tensor.view(torch.int16).numpy().view(np.uint16).reshape(shape), dtype)
    return Handle(tensor.numpy().reshape(shape), dtype)


def _cast(handle: Any, dtype: Any) -> Any:
    """Round to nearest even, as the hardware does; fp64 goes to bf16 by way of fp32, as Triton's casts do."""
    tensor = _tensor(handle)
    if tensor.dtype == torch.float64 and dtype == tl.bfloat16:
        tensor = tensor.float()
    return _handle(tensor.to(_TORCH[dtype]), dtype, np.shape(handle.data))


def _widened(handle: Any) -> Any:
    return _cast(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle


class _Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in _TORCH and target in _TORCH:
            return _cast(src, target)
        if target == tl.bfloat16:
            return _cast(super().cast_impl(src, tl.float32), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        known = src.dtype.scalar in _TORCH and dst_type.scalar in _TORCH
        if known and rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            return _cast(src, dst_type.scalar)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or op in _BITWISE:
            return super().binary_op(lhs, rhs, op)
        wide = super().binary_op(_widened(lhs), _widened(rhs), op)
        return wide if wide.data.dtype == np.bool_ else _cast(wide, tl.bfloat16)

    def unary_op(self, arg: Any, op: Any) -> Any:
        if arg.dtype.scalar != tl.bfloat16:
            return super().unary_op(arg, op)
        return _cast(super().unary_op(_widened(arg), op), tl.bfloat16)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar != tl.bfloat16:
            return super().create_fma(x, y, z)
        return _cast(super().create_fma(_widened(x), _widened(y), _widened(z)), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: int) -> Any:
        if not a.dtype.is_floating():
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        left, right = (_widened(operand).data for operand in (a, b))
        if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            left, right = interpreter._round_f32_to_tf32(left), interpreter._round_f32_to_tf32(right)
        total = np.matmul(left.astype(np.float64), right.astype(np.float64)) + d.data.astype(np.float64)
        return Handle(total.astype(d.data.dtype), d.dtype.scalar)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, cache_policy: Any, is_volatile: Any) -> Any:
        _check(ptrs, mask, "load")
        return super().create_masked_load(ptrs, mask, other, cache_policy, is_volatile)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        _check(ptrs, mask, "store")
        return super().create_masked_store(ptrs, value, mask, cache_policy)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        _check(ptr, None, "atomic")
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        _check(ptr, mask, "atomic")
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)


def _refuse_bf16(apply: Any) -> Any:
    def checked(self: Any, values: Any) -> Any:
        for value in values if isinstance(values, tuple) else (values,):
            if value.dtype.scalar == tl.bfloat16:
                raise NotImplementedError("the interpreter reduces bf16 as integers: cast to fp32 first")
        return apply(self, values)

    return checked


# What the launch in progress may touch: merged byte ranges, by start.
_starts = _ends = np.zeros(0, np.uint64)
_reachable: list[Tensor] = []


def reach(*tensors: Tensor) -> None:
    """Makes tensors known that later launches reach through tables; :func:`forget` drops them."""
    _reachable.extend(tensors)


def forget() -> None:
    _reachable.clear()


def span(tensor: Tensor) -> tuple[int, int]:
    """The half-open range of bytes between the first and the last element."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _allow(tensors: Iterable[Tensor]) -> None:
    global _starts, _ends
    merged: list[list[int]] = []
    for start, end in sorted(span(tensor) for tensor in tensors):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif end > start:
            merged.append([start, end])
    _starts, _ends = (np.array([row[side] for row in merged], np.uint64) for side in (0, 1))


def _check(pointers: Any, mask: Any, what: str) -> None:
    size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    addresses = np.asarray(pointers.data, np.uint64)
    if mask is not None:
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
    addresses = addresses.ravel()
    if not addresses.size:
        return
    if _starts.size:
        at = np.searchsorted(_starts, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > _ends[np.maximum(at, 0)])
    else:
        outside = np.ones(addresses.shape, bool)
    if outside.any():
        first = int(addresses[outside][0])
        raise IndexError(f"out-of-bounds {what} of {int(outside.sum())} element(s), the first at {first:#x}")


_patch_lang = interpreter._patch_lang
_patched: set[int] = set()  # what the functions called in this launch have for globals


def _patch_once(function: Any) -> Any:
    """The interpreter looks for builtins to replace at each call of a function, a quarter of its time: once will do."""
    place = id(function.__globals__)
    if place in _patched:
        return interpreter._LangPatchScope()
    _patched.add(place)
    return _patch_lang(function)


class _Executor(interpreter.GridExecutor):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        _patched.clear()  # the launch before this one has put the language back
        _allow([value for value in (*args, *kwargs.values(), *_reachable) if isinstance(value, Tensor)])
        super().__call__(*args, **kwargs)


interpreter.interpreter_builder.__class__ = _Builder
interpreter.GridExecutor = _Executor
interpreter._patch_lang = _patch_once
interpreter.ReduceScanOpInterface.apply = _refuse_bf16(interpreter.ReduceScanOpInterface.apply)
