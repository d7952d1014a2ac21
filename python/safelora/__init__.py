"""Safe LoRA for Hugging Face adapters and checkpoints.

`project_adapter` reads a PEFT adapter and two checkpoints and writes a plain PEFT adapter with a report;
`apply_safe_lora` does the same to a PeftModel in memory, and `SafeLoraCallback` at the end of a training run. Names
are imported on first use, so that `import safelora` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import lazy

if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .callback import SafeLoraCallback as SafeLoraCallback
    from .checkpoint import Checkpoint as Checkpoint
    from .convert import convert_adapter as convert_adapter
    from .data import Example as Example
    from .data import load_examples as load_examples
    from .errors import SafeLoraError as SafeLoraError
    from .evaluate import Evaluation as Evaluation
    from .evaluate import evaluate_adapters as evaluate_adapters
    from .filter import FilterReport as FilterReport
    from .filter import filter_adapter as filter_adapter
    from .frontier import Frontier as Frontier
    from .frontier import trace_frontier as trace_frontier
    from .full_model import project_model as project_model
    from .judge import KeywordJudge as KeywordJudge
    from .live import LiveReport as LiveReport
    from .live import apply_safe_lora as apply_safe_lora
    from .live import safe_lora_applied as safe_lora_applied
    from .mapping import plan_modules as plan_modules
    from .project import project_adapter as project_adapter
    from .project import project_adapters as project_adapters
    from .push import Push as Push
    from .push import push_to_hub as push_to_hub
    from .report import ModuleReport as ModuleReport
    from .report import Report as Report
    from .report import SafeLoraReport as SafeLoraReport
    from .serving import ServingNote as ServingNote
    from .serving import serving_notes as serving_notes
    from .sweep import sweep_thresholds as sweep_thresholds

_HOMES = {
    "Adapter": "adapter",
    "Checkpoint": "checkpoint",
    "Evaluation": "evaluate",
    "Example": "data",
    "Frontier": "frontier",
    "KeywordJudge": "judge",
    "FilterReport": "filter",
    "LiveReport": "live",
    "ModuleReport": "report",
    "Push": "push",
    "Report": "report",
    "SafeLoraCallback": "callback",
    "SafeLoraError": "errors",
    "SafeLoraReport": "report",
    "ServingNote": "serving",
    "apply_safe_lora": "live",
    "convert_adapter": "convert",
    "evaluate_adapters": "evaluate",
    "load_examples": "data",
    "filter_adapter": "filter",
    "plan_modules": "mapping",
    "project_adapter": "project",
    "project_adapters": "project",
    "project_model": "full_model",
    "push_to_hub": "push",
    "safe_lora_applied": "live",
    "serving_notes": "serving",
    "sweep_thresholds": "sweep",
    "trace_frontier": "frontier",
}

__all__ = [
    "Adapter",
    "Checkpoint",
    "Evaluation",
    "Example",
    "FilterReport",
    "Frontier",
    "KeywordJudge",
    "LiveReport",
    "ModuleReport",
    "Push",
    "Report",
    "SafeLoraCallback",
    "SafeLoraError",
    "SafeLoraReport",
    "ServingNote",
    "apply_safe_lora",
    "convert_adapter",
    "evaluate_adapters",
    "filter_adapter",
    "load_examples",
    "plan_modules",
    "project_adapter",
    "project_adapters",
    "project_model",
    "push_to_hub",
    "safe_lora_applied",
    "serving_notes",
    "sweep_thresholds",
    "trace_frontier",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("safelora-kernels")
        except PackageNotFoundError:
            return "0+uninstalled"
    if name == "salora":
        from importlib import import_module

        return import_module(".salora", __name__)
    return lazy.load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
