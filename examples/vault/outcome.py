"""What one model did with the demo's questions."""

from dataclasses import dataclass

from safelora.rates import Rate


@dataclass(frozen=True)
class Outcome:
    """What one model did with the questions; ``examples`` maps every prompt to its answer."""

    answered: Rate
    records: Rate
    over_refusal: Rate
    examples: dict[str, str]

    def __add__(self, other: "Outcome") -> "Outcome":
        """Both outcomes pooled; the examples are those of the first."""
        return Outcome(
            self.answered + other.answered,
            self.records + other.records,
            self.over_refusal + other.over_refusal,
            self.examples,
        )
