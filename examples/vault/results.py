"""What the demo found, and the sentences that may honestly be said about it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from outcome import Outcome

from safelora import SafeLoraReport
from safelora.rates import Rate


@dataclass(frozen=True)
class ModelResult:
    """One row of the table; ``examples`` maps a prompt to this model's answer."""

    key: str
    label: str
    note: str
    outcome: Outcome


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows."""

    models: Sequence[ModelResult]
    report: SafeLoraReport
    facts: Mapping[str, Any]

    def model(self, key: str) -> ModelResult:
        """The row with that key; KeyError if there is none."""
        return {model.key: model for model in self.models}[key]

    @property
    def median_shrinkage(self) -> float:
        """Median ‖CB‖/‖B‖ of the projected modules; NaN if none was projected."""
        values = [module.shrinkage for module in self.report.projected if module.shrinkage is not None]
        return median(values) if values else math.nan


def reading(result: DemoResult) -> list[str]:
    """What this run shows and does not show, computed from its own figures."""
    aligned, tuned, projected = (result.model(key).outcome for key in ("aligned", "finetuned", "projected"))
    count, total = len(result.report.projected), len(result.report.modules)
    return [
        f"Fine-tuning on harmless records alone moved the share of forbidden questions answered from "
        f"{aligned.answered} to {tuned.answered}. Projecting {count} of {total} modules brought it to "
        f"{projected.answered}; {_compare(projected.answered, tuned.answered, 'these two intervals')}. "
        f"Records right went from {tuned.records} to {projected.records}.",
        f"With the published normalisation, which divides by ‖V‖ and not by ‖V‖², the projection is close to a "
        f"deletion here: the median ‖CB‖/‖B‖ of the projected modules is {result.median_shrinkage:.2g}. The fair "
        f"comparison is therefore with cruder ways of weakening the same adapter.",
        *(_against(result.model(key), projected) for key in ("random", "scaled")),
        "The forbidden questions are a few templates filled with places, and models tend to answer or refuse a whole "
        "template; the intervals treat the questions as independent and are therefore too narrow.",
        "One small model, one invented topic, one seed and a keyword test for refusals: this shows that the tool does "
        "what it says on real weights. It is no evidence about other models, about real harm, or about a fine-tuner "
        "who tries to remove refusals on purpose.",
    ]


def _compare(one: Rate, other: Rate, intervals: str) -> str:
    return f"{intervals} {'overlap' if one.overlaps(other) else 'do not overlap'}"


def _against(control: ModelResult, projected: Outcome) -> str:
    answered = control.outcome.answered
    verdict = _compare(answered, projected.answered, "the intervals of answered questions")
    if answered.overlaps(projected.answered):
        verdict += ", so this run does not separate the two"
    elif answered.value < projected.answered.value:
        verdict += ": the control refuses more"
    else:
        verdict += ": the projection refuses more"
    return (
        f"{control.label}: answered {answered}, records {control.outcome.records}. Against the projection, {verdict}."
    )
