"""The versions that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

from . import __version__


def versions(*packages: str) -> dict[str, str]:
    """Those of safelora, of installed packages by the names of their distributions, and of Python."""
    return {"safelora": __version__, **{name: version(name) for name in packages}, "python": platform.python_version()}
