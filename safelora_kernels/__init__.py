"""Fused low-rank kernels for LoRA safety: Safe LoRA's projection and selection, SaLoRA's orthogonal complement.

Needs torch alone. ``sk.backends()`` says what runs here, ``sk.explain(name, *args)`` which backend a call takes, and
``sk.reference`` holds the same functions in plain torch.
"""

from . import reference
from .backends import BackendStatus, Explanation, backends, explain
from .functional import (
    gram,
    gram_apply,
    gram_apply_layers,
    project_layers,
    project_lowrank,
    project_out,
    project_out_layers,
    project_out_layers_,
    project_selected_layers,
    salora_linear,
    select_layers,
    update_cosine,
)
from .types import LayerFactors, Projection, SelectedProjection

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "Explanation",
    "LayerFactors",
    "Projection",
    "SelectedProjection",
    "backends",
    "explain",
    "gram",
    "gram_apply",
    "gram_apply_layers",
    "project_layers",
    "project_lowrank",
    "project_out",
    "project_out_layers",
    "project_out_layers_",
    "project_selected_layers",
    "reference",
    "salora_linear",
    "select_layers",
    "update_cosine",
]
