"""Loads the native CUDA kernels, which register themselves for the CUDA dispatch key, or says why they are missing.

CUDA is not initialised: whether a device is there is asked of the driver's own list, so that a process may still fork.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import torch

from . import cpu

LIBRARY = cpu.LIBRARY.with_name("_CUDA.abi3.so")
_REMEDY = (
    "to get them, install nvcc (CUDA 12.8 or later) and a CUDA build of torch>=2.10 and reinstall with "
    "SAFELORA_CUDA=on, which shows any build error in full"
)

_log = logging.getLogger("safelora_kernels")


def _build_reason() -> str:
    """Why the library is not there, in the words of the build where it left any."""
    try:
        info: dict[str, Any] = json.loads(cpu._BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{LIBRARY.name} was not built"
    if info.get("cuda"):
        return f"the build made {LIBRARY.name} but {LIBRARY} is gone"
    return str(info.get("cuda_reason") or info.get("reason") or f"{LIBRARY.name} was not built")


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
    if cpu._disabled():
        return False, "SAFELORA_DISABLE_NATIVE is set: unset it to load the native CUDA kernels"
    if torch.version.hip is not None:
        return False, device_missing()
    if not LIBRARY.exists():
        reason = f"no native CUDA kernels ({_build_reason()}); {_REMEDY}"
    else:
        try:
            torch.ops.load_library(LIBRARY)
        except (OSError, RuntimeError) as error:
            reason = f"{LIBRARY.name} does not load with torch {torch.__version__} ({error}); {_REMEDY}"
        else:
            missing = device_missing()
            return not missing, missing or f"native kernels from {LIBRARY.name}"
    if not device_missing():
        _log.warning("safelora_kernels has no CUDA kernels of its own: %s", reason)
    return False, reason


STATUS: tuple[bool, str] = _load()


def implemented(ops: Iterable[str]) -> list[str]:
    """The operators that the loaded library serves on CUDA tensors."""
    if not STATUS[0]:
        return []
    return [op for op in ops if torch._C._dispatch_has_kernel_for_dispatch_key(f"safelora::{op}", "CUDA")]
