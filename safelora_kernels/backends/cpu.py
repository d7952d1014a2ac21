"""Loads the native CPU kernels, which register themselves for the CPU dispatch key, or says why they are missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from . import library

LIBRARY = library.PACKAGE / "_C.abi3.so"
_REMEDY = (
    "to get them, install a C++17 compiler and torch>=2.10 and reinstall with SAFELORA_BUILD=native, which shows any "
    "build error in full (in a checkout: make setup)"
)

_log = logging.getLogger("safelora_kernels")


def build_reason() -> str:
    """Why the library is not there, in the words of the build where it left any."""
    return library.build_reason(LIBRARY, "native", "reason")


def _load() -> tuple[bool, str]:
    if library.disabled():
        return False, "SAFELORA_DISABLE_NATIVE is set: unset it to load the native CPU kernels"
    reason = library.load(LIBRARY, f"no native CPU kernels ({build_reason()})", _REMEDY)
    if reason:
        _log.warning("safelora_kernels falls back to plain torch, correct but far slower: %s", reason)
    return not reason, reason or f"native kernels from {LIBRARY.name}"


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
