"""The input filter: A' = A K_t (K_t + λ K_s)⁻¹ for every module with plain inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ._rule import Change, Rule, Subject

REFUSAL = "I'm sorry, but I can't help with that request."


@dataclass(frozen=True)
class InputFilter(Rule):
    """:func:`safelora.filter_adapter` on the calibration examples, swept over its strength.

    Safety examples without an answer are given one that refuses. Moments are collected once for all strengths.
    """

    name: ClassVar[str] = "input_filter"
    title: ClassVar[str] = "input filter"
    parameter: ClassVar[str] = "strength"
    values: ClassVar[tuple[float, ...]] = (1.0, 10.0, 100.0, 1000.0)
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})

    weight: str = "grad"
    ridge: float = 0.1
    unseen: str = "keep"

    def solved(self, subject: Subject, value: float) -> dict[str, Any]:
        """The new lora_A by module name."""
        from ..filter import FilterSweep

        sweep: Any = subject.once(
            ("input_filter", self.weight),
            lambda: FilterSweep(
                subject.model,
                subject.safety_data,
                subject.task_data,
                weight=self.weight,  # type: ignore[arg-type]
                adapter_name=subject.adapter_name,
                tokenizer=subject.tokenizer,
                refusal=REFUSAL,
            ),
        )
        key = ("input_filter", self.weight, self.ridge, self.unseen, value)
        return dict(subject.once(key, lambda: sweep.solve(value, self.ridge, unseen=self.unseen)))

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        new = self.solved(subject, value)
        for module in subject.modules:
            if module.name in new:
                yield Change(module, lora_A=module.of_a(new[module.name]))

    def about(self, subject: Subject, value: float) -> dict[str, Any]:
        return {"filtered": len(self.solved(subject, value))}


RULE = InputFilter
