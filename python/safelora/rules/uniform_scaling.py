"""The whole adapter scaled down."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ._rule import Change, Rule, Subject


@dataclass(frozen=True)
class UniformScaling(Rule):
    """Every lora_B times one factor: tells any rule from mere shrinking."""

    name: ClassVar[str] = "uniform_scaling"
    title: ClassVar[str] = "control: all scaled"
    parameter: ClassVar[str] = "factor"
    values: ClassVar[tuple[float, ...]] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)
    control: ClassVar[bool] = True

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        for module in subject.modules:
            yield Change(module, subject.factors(module)[0] * value)


RULE = UniformScaling
