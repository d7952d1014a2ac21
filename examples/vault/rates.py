"""Shares of a small number of trials, with the interval that belongs to them."""

from dataclasses import dataclass


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % for the default ``z``.

    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, found {successes} of {trials}")
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / trials + spread / (4 * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``total`` with a 95 % Wilson interval."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits, self.total)

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.hits + other.hits, self.total + other.total)

    def overlaps(self, other: "Rate") -> bool:
        """True if the two intervals share a point."""
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.0%} [{low:.0%}, {high:.0%}]"


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
