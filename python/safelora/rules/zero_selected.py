"""The modules that Safe LoRA selects, deleted instead of projected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ._rule import Change, Subject
from .safe_lora import SafeLora


@dataclass(frozen=True)
class ZeroSelected(SafeLora):
    """lora_B = 0 where Safe LoRA projects: tells the projection from the selection."""

    name: ClassVar[str] = "zero_selected"
    title: ClassVar[str] = "control: same modules deleted"
    control: ClassVar[bool] = True

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        for one in self.selected(subject, value):
            yield Change(one.module, one.lora_B.new_zeros(one.lora_B.shape))


RULE = ZeroSelected
