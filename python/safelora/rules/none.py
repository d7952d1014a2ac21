"""The adapter as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ._rule import Change, Rule, Subject


@dataclass(frozen=True)
class NoRule(Rule):
    """Nothing is changed: what every other point is compared with."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "adapter unchanged"
    parameter: ClassVar[str] = ""
    values: ClassVar[tuple[float, ...]] = (1.0,)

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        yield from ()


RULE = NoRule
