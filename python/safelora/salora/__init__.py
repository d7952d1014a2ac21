"""SaLoRA (arXiv 2501.01765): LoRA trained inside the complement of the subspace that carries a model's refusals.

``calibrate`` finds the subspace U of every adapted module, ``initialize`` sets the factors, ``SubspaceConstraint``
keeps ``Uᵀ(W_eff − W) = 0`` through training, and ``export`` writes a plain PEFT adapter. ``SaLoraCallback`` does all
but the last in one line of a Trainer. Nothing d_out × d_out is formed, PEFT is not patched, and the forward pass is
that of LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:
    from .calibration import calibrate as calibrate
    from .calibration import weight_subspaces as weight_subspaces
    from .callback import SaLoraCallback as SaLoraCallback
    from .constraint import SubspaceConstraint as SubspaceConstraint
    from .exporting import ExportReport as ExportReport
    from .exporting import export as export
    from .exporting import export_checkpoint as export_checkpoint
    from .initialization import initialize as initialize
    from .initialization import restore as restore
    from .initialization import subspaces_of as subspaces_of
    from .module import SaLoraLinear as SaLoraLinear
    from .subspaces import Subspaces as Subspaces

_HOMES = {
    "ExportReport": "exporting",
    "SaLoraCallback": "callback",
    "SaLoraLinear": "module",
    "SubspaceConstraint": "constraint",
    "Subspaces": "subspaces",
    "calibrate": "calibration",
    "export": "exporting",
    "export_checkpoint": "exporting",
    "initialize": "initialization",
    "restore": "initialization",
    "subspaces_of": "initialization",
    "weight_subspaces": "calibration",
}

__all__ = [
    "ExportReport",
    "SaLoraCallback",
    "SaLoraLinear",
    "SubspaceConstraint",
    "Subspaces",
    "calibrate",
    "export",
    "export_checkpoint",
    "initialize",
    "restore",
    "subspaces_of",
    "weight_subspaces",
]


def __getattr__(name: str) -> Any:
    return lazy.load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return list(__all__)
