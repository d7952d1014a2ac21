"""Safe LoRA for Hugging Face adapters and checkpoints.

`project_adapter` reads a PEFT adapter and two checkpoints and writes a plain PEFT adapter with a report. Names are
imported on first use, so that `import safelora` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .checkpoint import Checkpoint as Checkpoint
    from .errors import SafeLoraError as SafeLoraError
    from .mapping import plan_modules as plan_modules
    from .project import project_adapter as project_adapter
    from .report import ModuleReport as ModuleReport
    from .report import SafeLoraReport as SafeLoraReport

_HOMES = {
    "Adapter": "adapter",
    "Checkpoint": "checkpoint",
    "ModuleReport": "report",
    "SafeLoraError": "errors",
    "SafeLoraReport": "report",
    "plan_modules": "mapping",
    "project_adapter": "project",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "ModuleReport",
    "SafeLoraError",
    "SafeLoraReport",
    "plan_modules",
    "project_adapter",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("safelora-kernels")
        except PackageNotFoundError:
            return "0+uninstalled"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
