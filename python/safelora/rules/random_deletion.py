"""As many modules deleted, drawn at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ._rule import Change, Rule, Subject


@dataclass(frozen=True)
class RandomDeletion(Rule):
    """lora_B = 0 for modules drawn without replacement: tells the selection from its size."""

    name: ClassVar[str] = "random_deletion"
    title: ClassVar[str] = "control: random modules deleted"
    parameter: ClassVar[str] = "modules"
    control: ClassVar[bool] = True
    draws: ClassVar[int] = 3

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        count = min(round(value), len(subject.modules))
        drawn = random.Random(f"{subject.seed} {count} {draw}").sample(range(len(subject.modules)), count)
        for module in (subject.modules[i] for i in sorted(drawn)):
            lora_B, _ = subject.factors(module)
            yield Change(module, lora_B.new_zeros(lora_B.shape))


RULE = RandomDeletion
