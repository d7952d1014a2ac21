"""The input filter of `safelora.filter_adapter` as a rule of the experiments."""

from typing import TYPE_CHECKING

import rules
import torch
from training import Example

if TYPE_CHECKING:
    from experiments import Bench


def apply(bench: "Bench", weight: str, safety: list[Example], strength: float, key: str) -> rules.Factors:
    """The factors after the filter, computed in fp32; the host keeps nothing of it."""
    from safelora import filter_adapter

    def make() -> rules.Factors:
        host = bench.host
        host.hold(torch.float32)
        try:
            host.put(bench.factors)
            report = filter_adapter(
                host.peft, safety, bench.task(), tokenizer=host.tokenizer, weight=weight, strength=strength
            )
            changed = host.factors()
            report.undo()
            return changed
        finally:
            host.hold(torch.bfloat16)

    return bench.kept(f"filter-{key}-{strength:g}", make)
