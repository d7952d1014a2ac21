"""Safe LoRA as published: C·B with C = V Vᵀ/‖V‖_F, for the modules of the lowest cosines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from ._alignment import Projected, published
from ._rule import Change, Rule, Subject, lowest


@dataclass(frozen=True)
class SafeLora(Rule):
    """Safe LoRA (arXiv 2405.16833), number mode; `about` gives the threshold that selects as many."""

    name: ClassVar[str] = "safe_lora"
    title: ClassVar[str] = "Safe LoRA"
    parameter: ClassVar[str] = "modules"
    needs: ClassVar[frozenset[str]] = frozenset({"base"})

    def projected(self, subject: Subject) -> list[Projected]:
        """Every module projected."""
        return published(subject)

    def selected(self, subject: Subject, value: float) -> list[Projected]:
        """The modules of the lowest cosines."""
        found = self.projected(subject)
        names = {module.name for module in lowest([(one.module, one.cosine) for one in found], value)}
        return [one for one in found if one.module.name in names]

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        for one in self.selected(subject, value):
            yield Change(one.module, one.lora_B)

    def about(self, subject: Subject, value: float) -> dict[str, Any]:
        found = self.selected(subject, value)
        if not found:
            return {}
        return {
            "threshold": max(one.cosine for one in found),
            "median_shrinkage": median(one.shrinkage for one in found),
        }


RULE = SafeLora
