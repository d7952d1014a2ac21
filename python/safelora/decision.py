"""From measured cosines to decisions, and what a report says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .checkpoint import Checkpoint
from .errors import SafeLoraError
from .mapping import PlannedModule
from .measure import Measured
from .report import COSINE_ERROR, ModuleReport
from .versions import versions

_ROUNDING = 5e-6  # half a unit of the authors' fifth decimal


def check_options(threshold: float | None, num_layers: int | None, rule: str, normalize: str) -> dict[str, Any]:
    """The options of a projection as a report records them. Raises SafeLoraError for what is no criterion or rule."""
    if (threshold is None) == (num_layers is None):
        raise SafeLoraError("give exactly one criterion: threshold or num_layers.")
    if threshold is not None and (
        isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold)
    ):
        raise SafeLoraError(f"threshold is {threshold!r}, expected a finite number (cosines lie in [0, 1]).")
    if num_layers is not None and (isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0):
        raise SafeLoraError(f"num_layers is {num_layers!r}, expected an integer of at least 0.")
    if rule not in ("strict", "authors"):
        raise SafeLoraError(f"rule is {rule!r}, expected 'strict' or 'authors'.")
    if normalize not in ("frobenius", "none"):
        raise SafeLoraError(f"normalize is {normalize!r}, expected 'frobenius' or 'none'.")
    return {"threshold": threshold, "num_layers": num_layers, "rule": rule, "normalize": normalize}


def refuse_equal_models(measured: dict[str, Measured], base: Checkpoint, aligned: Checkpoint) -> None:
    """Raise SafeLoraError where V = 0 in every module."""
    if all(result.v_norm == 0 for result in measured.values()):
        raise SafeLoraError(
            f"base ({base.source}) and aligned ({aligned.source}) hold the same weights in every module that was "
            "changed: V = 0, there is no alignment to project onto. Is one of them the wrong model?"
        )


def decide(
    plan: Sequence[PlannedModule], measured: dict[str, Measured], options: dict[str, Any]
) -> tuple[set[str], dict[str, Any]]:
    """The names of the selected modules, and the fields of a report that follow from them."""
    selected = _select(plan, measured, options)
    return selected, {
        "modules": _module_reports(plan, measured, selected, options),
        "options": options,
        "versions": versions("torch"),
        "pdst": _pdst(measured, selected),
    }


def _select(plan: Sequence[PlannedModule], measured: dict[str, Measured], options: dict[str, Any]) -> set[str]:
    import torch

    import safelora_kernels as sk

    names = [planned.module.name for planned in plan if planned.module.name in measured]
    cosines = [math.nan if measured[name].kept_because(options["rule"]) else measured[name].cosine for name in names]
    chosen = sk.select_layers(
        torch.tensor(cosines, dtype=torch.float64),
        threshold=options["threshold"],
        num_layers=options["num_layers"],
        rule=options["rule"],
    )
    return {name for name, taken in zip(names, chosen.tolist(), strict=True) if taken}


def _module_reports(
    plan: Sequence[PlannedModule], measured: dict[str, Measured], selected: set[str], options: dict[str, Any]
) -> list[ModuleReport]:
    rule = options["rule"]
    cosines = {
        name: result.cosine
        for name, result in measured.items()
        if result.cosine is not None and not result.kept_because(rule)
    }
    highest_taken = max((cosine for name, cosine in cosines.items() if name in selected), default=None)
    lowest_left = min((cosine for name, cosine in cosines.items() if name not in selected), default=None)
    tolerance = COSINE_ERROR * (1 if options["threshold"] is not None else 2)
    tolerance += _ROUNDING if rule == "authors" else 0.0
    reports = []
    for planned in plan:
        module = planned.module
        result = measured.get(module.name)
        boundary = options["threshold"]
        if boundary is None:
            boundary = lowest_left if module.name in selected else highest_taken
        cosine = cosines.get(module.name)
        margin = None if cosine is None or boundary is None else cosine - boundary
        reports.append(
            ModuleReport(
                name=module.name,
                kind=module.kind,
                rank=module.rank,
                shape=(module.d_out, module.d_in),
                base_tensor=planned.base.info.name if planned.base else None,
                aligned_tensor=planned.aligned.info.name if planned.aligned else None,
                matched=planned.aligned.how if planned.aligned else None,
                decision="skipped" if result is None else "projected" if module.name in selected else "kept",
                cosine=result.cosine if result else None,
                margin=margin,
                near_threshold=margin is not None and abs(margin) <= tolerance,
                shrinkage=result.shrinkage if result else None,
                v_norm=result.v_norm if result else None,
                reason=result.kept_because(rule) if result else planned.skipped,
            )
        )
    return reports


def _pdst(measured: dict[str, Measured], selected: set[str]) -> float | None:
    values = [
        1.0 if name in selected else 1 / (1 + result.distance)
        for name, result in measured.items()
        if result.cosine is not None
    ]
    return sum(values) / len(values) if values else None
