"""Loads the native CPU kernels, which register themselves for the CPU dispatch key, or says why they are missing."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = _PACKAGE / "_C.abi3.so"
_BUILD_INFO = _PACKAGE / "_build_info.json"
_REMEDY = (
    "to get them, install a C++17 compiler and torch>=2.10 and reinstall with SAFELORA_BUILD=native, which shows any "
    "build error in full (in a checkout: make setup)"
)

_log = logging.getLogger("safelora_kernels")


def _build_reason() -> str:
    """Why the library is not there, in the words of the build where it left any."""
    try:
        info = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{LIBRARY.name} was not built"
    if info.get("native"):
        return f"the build made {LIBRARY.name} but {LIBRARY} is gone"
    return str(info.get("reason", f"{LIBRARY.name} was not built"))


def _disabled() -> bool:
    return os.environ.get("SAFELORA_DISABLE_NATIVE", "").strip().lower() in ("1", "true", "yes", "on")


def _load() -> tuple[bool, str]:
    if _disabled():
        return False, "SAFELORA_DISABLE_NATIVE is set: unset it to load the native CPU kernels"
    if not LIBRARY.exists():
        reason = f"no native CPU kernels ({_build_reason()}); {_REMEDY}"
    else:
        try:
            torch.ops.load_library(LIBRARY)
        except (OSError, RuntimeError) as error:
            reason = f"{LIBRARY.name} does not load with torch {torch.__version__} ({error}); {_REMEDY}"
        else:
            return True, f"native kernels from {LIBRARY.name}"
    _log.warning("safelora_kernels falls back to plain torch, correct but far slower: %s", reason)
    return False, reason


STATUS = _load()
PATHS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of Isa, csrc/include/safelora/kernels.h


def code_path() -> str:
    """The code path that the loaded kernels take on this CPU, or why there is none."""
    if not STATUS[0]:
        return "none: no native CPU kernels"
    try:
        return PATHS[torch.ops.safelora._cpu_path()]
    except RuntimeError as error:  # SAFELORA_CPU_ISA asks for what cannot be
        return f"none: {str(error).splitlines()[0]}"


def implemented(ops: Iterable[str]) -> list[str]:
    """The operators that the loaded library serves."""
    if not STATUS[0]:
        return []
    return [op for op in ops if torch._C._dispatch_has_kernel_for_dispatch_key(f"safelora::{op}", "CPU")]
