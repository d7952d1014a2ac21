"""Safe LoRA with an orthogonal projector: U_k U_kᵀ·B instead of V Vᵀ·B/‖V‖_F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import SafeLoraError
from ._alignment import Projected, onto_basis
from ._rule import Subject
from .safe_lora import SafeLora


@dataclass(frozen=True)
class SafeLoraExact(SafeLora):
    """U_k are the leading left singular vectors of V that hold `energy` of ‖V‖_F², or `rank` of them.

    The paper's Ĉ = V(VᵀV)⁻¹Vᵀ is the case of all of them, which is the identity wherever V has full row rank.
    """

    energy: float = 0.9
    rank: int | None = None

    name: ClassVar[str] = "safe_lora_exact"
    title: ClassVar[str] = "Safe LoRA, exact projector"

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise SafeLoraError(f"energy is {self.energy}, expected more than 0 and at most 1.")
        if self.rank is not None and (self.rank != int(self.rank) or self.rank < 1):
            raise SafeLoraError(f"rank is {self.rank}, expected a whole number from 1 on.")

    def projected(self, subject: Subject) -> list[Projected]:
        return onto_basis(subject, self.energy, self.rank)


RULE = SafeLoraExact
