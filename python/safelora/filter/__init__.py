"""The input filter: damp an adapter's update on inputs like those of safety prompts, and keep it on the task's.

`A' = A K_t (K_t + λ K_s)⁻¹`, where K_t and K_s are second moments of a layer's inputs at task and at safety
calibration tokens. lora_B and the rank stay; the result is a plain PEFT adapter. A method of this package:
docs/filter.md derives it, says how it differs from its relatives, and what it does not do.
"""

from __future__ import annotations

from .examples import example_data, wrapped_prompts
from .report import FilteredModule, FilterReport
from .run import FilterSweep, filter_adapter

__all__ = ["FilterReport", "FilterSweep", "FilteredModule", "example_data", "filter_adapter", "wrapped_prompts"]
