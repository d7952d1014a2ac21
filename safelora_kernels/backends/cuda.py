"""Loads the native CUDA kernels, which register themselves for the CUDA dispatch key, or says why they are missing.

CUDA is not initialised: whether a device is there is asked of the driver's own list, so that a process may still fork.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from . import library

LIBRARY = library.PACKAGE / "_CUDA.abi3.so"
_REMEDY = (
    "to get them, install nvcc (CUDA 12.8 or later) and a CUDA build of torch>=2.10 and reinstall with "
    "SAFELORA_CUDA=on, which shows any build error in full"
)

_log = logging.getLogger("safelora_kernels")


def build_reason() -> str:
    """Why the library is not there, in the words of the build where it left any."""
    return library.build_reason(LIBRARY, "cuda", "cuda_reason", "reason")


def device_missing() -> str:
    """Why no CUDA device can be used, empty if one can."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, whose devices the CUDA kernels do not run on"
    if torch.version.cuda is None:
        return "this torch is a CPU build: install a CUDA build of torch"
    if torch.cuda.device_count() == 0:
        return "no CUDA device is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    return ""


def _load() -> tuple[bool, str]:
    if library.disabled():
        return False, "SAFELORA_DISABLE_NATIVE is set: unset it to load the native CUDA kernels"
    missing = device_missing()
    if torch.version.hip is not None:
        return False, missing
    reason = library.load(LIBRARY, f"no native CUDA kernels ({build_reason()})", _REMEDY)
    if reason and not missing:
        _log.warning("safelora_kernels has no CUDA kernels of its own: %s", reason)
    reason = reason or missing
    return not reason, reason or f"native kernels from {LIBRARY.name}"


STATUS: tuple[bool, str] = _load()


def implemented(ops: Iterable[str]) -> list[str]:
    """The operators that the loaded library serves on CUDA tensors."""
    if not STATUS[0]:
        return []
    return [op for op in ops if torch._C._dispatch_has_kernel_for_dispatch_key(f"safelora::{op}", "CUDA")]
