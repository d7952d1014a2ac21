"""The Triton kernels: registered for CUDA and ROCm tensors where no CUDA kernel is, and imported at the first call.

``safelora_triton::`` has the same operators for Triton alone, so that a request for it reaches it under torch.compile
too, and CPU tensors reach Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .. import schemas
from . import reference

INSTALLED = importlib.util.find_spec("triton") is not None
_MODULES = {
    "project_layers": "project",
    "project_selected_layers": "project",
    "update_cosine": "cosine",
    "select_layers": "select",
    "project_out_layers": "complement",
    "project_out_layers_": "complement",
    "gram_apply_layers": "gram",
    "salora_linear": "salora",
    "salora_linear_backward": "salora",
}
_FP64 = ("update_cosine", "select_layers")
_CAPABILITY = (8, 0)
MOST_LAYERS = 1 << 15  # counting takes n² comparisons: a sort is faster from here on


def interpreted() -> bool:
    """Whether Triton simulates its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def status() -> tuple[bool, str]:
    """Asks for devices, without making a CUDA context, on the first call."""
    if not INSTALLED:
        return False, "triton is not installed: pip install triton"
    version = importlib.metadata.version("triton")
    if interpreted():
        return (
            True,
            f"Triton {version} interprets kernels on the CPU (TRITON_INTERPRET), for debugging; bf16 is unreliable",
        )
    if torch.version.cuda is None and torch.version.hip is None:
        return False, "this torch has no GPU support: install one for CUDA or ROCm (pytorch.org/get-started)"
    if torch.cuda.device_count() == 0:
        return False, "no GPU is visible: check nvidia-smi or rocm-smi, and CUDA_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES"
    return True, f"Triton {version} kernels"


def device() -> str:
    return "cpu" if interpreted() else "cuda"


def on_request() -> str:
    return "the interpreter takes a call only when asked for: backend='triton'" if interpreted() else ""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def unsupported(op: str, tensors: Sequence[Tensor], out_dtype: torch.dtype | None) -> str:
    """Why the kernels cannot take a call that this backend could otherwise serve; the reference then does."""
    if op not in _FP64 and (out_dtype == torch.float64 or any(tensor.dtype == torch.float64 for tensor in tensors)):
        return f"its {op} computes in fp32 and the call has fp64 in it, which the reference serves"
    if op == "select_layers" and tensors and len(tensors[0]) > MOST_LAYERS:
        return f"it selects among at most {MOST_LAYERS} cosines, found {len(tensors[0])}"
    if tensors and tensors[0].device.type == "cuda" and torch.version.hip is None and status()[0]:
        found = _capability(tensors[0].device.index or 0)
        if found < _CAPABILITY:
            return f"it needs compute capability 8.0 or newer, found {found[0]}.{found[1]}"
    return ""


def _kernel(op: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        leaves = tree_leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        out_dtype = next((leaf for leaf in leaves if isinstance(leaf, torch.dtype)), None)
        if unsupported(op, tensors, out_dtype):
            return reference.LAUNCHERS[op](*args)
        module = importlib.import_module(f"safelora_kernels.triton.{_MODULES[op]}")
        return getattr(module, op)(*args)

    launch.__name__ = op
    return launch


LAUNCHERS: dict[str, Callable[..., Any]] = {}


def register() -> None:
    """Serves the operators for CUDA and ROCm tensors that have no kernel there yet."""
    if not INSTALLED:
        return
    for op in _MODULES:
        kernel = _kernel(op)
        schemas.define("safelora_triton", op)
        for key in ("CUDA", "CPU"):
            torch.library.impl(f"safelora_triton::{op}", key, kernel)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"safelora::{op}", "CUDA"):
            torch.library.impl(f"safelora::{op}", "CUDA", kernel)
        LAUNCHERS[op] = getattr(torch.ops.safelora_triton, op).default
