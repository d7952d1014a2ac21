"""Safe LoRA without its shrinking: C·B rescaled so that ‖C·B·A‖ = ‖B·A‖."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ._rule import Change, Subject
from .safe_lora import SafeLora


@dataclass(frozen=True)
class UnitNorm(SafeLora):
    """The direction of the projection with the length of the update: tells turning from shrinking."""

    name: ClassVar[str] = "unit"
    title: ClassVar[str] = "Safe LoRA, unit norm"

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        for one in self.selected(subject, value):
            yield Change(one.module, one.lora_B.double() / one.shrinkage if one.shrinkage else one.lora_B)


RULE = UnitNorm
