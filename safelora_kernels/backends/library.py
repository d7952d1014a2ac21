"""The native libraries beside the package: whether the build made them, and whether they load."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent
BUILD_INFO = PACKAGE / "_build_info.json"


def disabled() -> bool:
    return os.environ.get("SAFELORA_DISABLE_NATIVE", "").strip().lower() in ("1", "true", "yes", "on")


def build_reason(library: Path, made: str, *reasons: str) -> str:
    """Why the library is not there, in the words of the build where it left any.

    ``made`` and ``reasons`` name what the build wrote down: whether it made the library, and why not.
    """
    try:
        info: dict[str, Any] = json.loads(BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = {}
    if info.get(made):
        return f"the build made {library.name} but {library} is gone"
    return next((str(info[name]) for name in reasons if info.get(name)), f"{library.name} was not built")


def load(library: Path, missing: str, remedy: str) -> str:
    """Load the library, which registers its operators; returns why that is impossible, empty if it is done."""
    if not library.exists():
        return f"{missing}; {remedy}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load with torch {torch.__version__} ({error}); {remedy}"
    return ""
