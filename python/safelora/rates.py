"""Shares and means of a small number of trials, with the interval that belongs to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959964


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
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
    """``hits`` of ``total`` with a 95 % Wilson interval.

    draws: how often the same trials were repeated; repeating them does not make more of them.
    """

    hits: int
    total: int
    draws: int = 1

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        """The share of true outcomes."""
        return cls(sum(map(bool, outcomes)), len(outcomes))

    @property
    def value(self) -> float:
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.hits / self.draws, self.total / self.draws)

    def __add__(self, other: Rate) -> Rate:
        return Rate(self.hits + other.hits, self.total + other.total)

    def overlaps(self, other: Rate) -> bool:
        """True if the two intervals share a point."""
        return self.interval[0] <= other.interval[1] and other.interval[0] <= self.interval[1]

    def to_dict(self) -> dict[str, Any]:
        """Value, interval and counts as plain JSON types."""
        return {"value": self.value, "interval": list(self.interval), "hits": self.hits, "total": self.total}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.0%} [{low:.0%}, {high:.0%}]"


@dataclass(frozen=True)
class Mean:
    """The mean of ``total`` real outcomes with its standard error (0 for one outcome) and mean ± 1.96 of them."""

    value: float
    error: float
    total: int

    @classmethod
    def of(cls, outcomes: Sequence[float]) -> Mean:
        """Mean and standard error of the mean. Raises ValueError for no outcome."""
        count = len(outcomes)
        if not count:
            raise ValueError("the mean of no outcome")
        mean = sum(outcomes) / count
        variance = sum((outcome - mean) ** 2 for outcome in outcomes) / max(count - 1, 1)
        return cls(mean, (variance / count) ** 0.5, count)

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - Z95 * self.error, self.value + Z95 * self.error

    def to_dict(self) -> dict[str, Any]:
        """Value, interval and count as plain JSON types."""
        return {"value": self.value, "interval": list(self.interval), "total": self.total}

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"
