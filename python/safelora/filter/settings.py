"""The options of an input filter, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SafeLoraError
from .moments import Weight
from .solve import Solver, Unseen


@dataclass(frozen=True)
class Settings:
    """The options of one filter; made by :func:`checked`."""

    weight: Weight
    strength: float
    ridge: float
    jitter: float
    clip: float
    gates: tuple[float, ...]
    unseen: Unseen
    solver: Solver | Literal["auto"]
    memory_budget: int
    tolerance: float
    max_iterations: int

    def describe(self) -> dict[str, Any]:
        """The options as the report has them."""
        return {**self.__dict__, "gates": list(self.gates) if self.weight == "grad" else []}


def checked(
    weight: str,
    strength: float,
    ridge: float,
    jitter: float,
    clip: float,
    gates: Sequence[float],
    unseen: str,
    solver: str,
    memory_budget: float,
    tolerance: float,
    max_iterations: int,
) -> Settings:
    """Settings of the options of :func:`safelora.filter_adapter`. Raises SafeLoraError for a value out of range."""
    choices = {
        "weight": (weight, ("grad", "none")),
        "unseen": (unseen, ("keep", "drop")),
        "solver": (solver, ("auto", "cholesky", "dual", "cg")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise SafeLoraError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}.")
    numbers = {
        "strength": (strength, 0.0, True), "ridge": (ridge, 0.0, False), "jitter": (jitter, 0.0, True),
        "clip": (clip, 0.0, False), "memory_budget": (memory_budget, 0.0, False), "tolerance": (tolerance, 0.0, False),
        "max_iterations": (max_iterations, 0.0, False), **{f"gates[{i}]": (g, 0.0, False) for i, g in enumerate(gates)},
    }  # fmt: skip
    for name, (number, least, inclusive) in numbers.items():
        right = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not right or number < least or (number == least and not inclusive):
            bound = "of at least" if inclusive else "above"
            raise SafeLoraError(f"{name} is {number!r}, expected a finite number {bound} {least:g}.")
    if not gates:
        raise SafeLoraError("gates is empty; give at least one strength of the adapter, such as 1.0.")
    return Settings(
        weight,  # type: ignore[arg-type]
        float(strength),
        float(ridge),
        float(jitter),
        float(clip),
        tuple(float(gate) for gate in gates),
        unseen,  # type: ignore[arg-type]
        solver,  # type: ignore[arg-type]
        int(memory_budget * 2**30),
        float(tolerance),
        int(max_iterations),
    )
