"""The weights and factors of a model in memory, as measuring reads those of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import TensorInfo
from .measure import Pair
from .peft_model import MEMORY, live_weight, oriented, quantisation, tensor_in_memory, whole
from .stream import MappedRange
from .weights import Difference, OpenWeight

if TYPE_CHECKING:
    import torch


class Held:
    """A weight in memory as a d_out × d_in matrix, with the interface of OpenWeight."""

    quantised = False

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    @property
    def shape(self) -> torch.Size:
        return self._matrix.shape

    def columns(self, start: int, stop: int) -> torch.Tensor:
        return self._matrix[:, start:stop]

    def matrix(self) -> torch.Tensor:
        return self._matrix


class Factors:
    """The adapter's tensors, read from the model (gathered where they are sharded)."""

    def __init__(self, parameters: dict[str, Any], label: Path) -> None:
        self._tensors = {name: whole(parameter) for name, parameter in parameters.items()}
        self._label = label

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def file_of(self, info: TensorInfo) -> Path:
        return self._label if info.file == MEMORY else info.file


@dataclass
class LivePair(Pair):
    """A pair whose aligned weight is that of `layer`, or whose base weight is in `table`; else both are read."""

    layer: Any = None
    table: dict[str, Any] = field(default_factory=dict)
    device: Any = "cpu"
    gather: Any = None
    held: Any = None
    base_norm: float | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.aligned.parts if self.layer is None else ()) + (() if self.table else self.base.parts)

    @property
    def quantised(self) -> bool:
        return self.layer is not None and quantisation(self.layer) is not None

    def hold(self) -> None:
        """Get the aligned weight; a collective call where it is sharded."""
        if self.layer is not None:
            self.held = oriented(live_weight(self.layer, self.modules[0], self.gather), self.aligned.transposed)

    def open(self, mapped: Sequence[MappedRange]) -> Difference:
        if self.held is None:
            self.hold()
        count = 0 if self.layer is not None else len(self.aligned.parts)
        aligned: Any = OpenWeight(self.aligned, mapped[:count]) if self.layer is None else Held(self.held)
        base: Any
        if self.table:
            base = Held(oriented(tensor_in_memory(self.table, self.base), self.base.transposed))
        else:
            base = OpenWeight(self.base, mapped[count:])
        self.held = None
        if self.quantised:
            self.base_norm = float(base.matrix().float().norm())
        if str(self.device) != "cpu":
            aligned, base = (Held(weight.matrix().to(self.device)) for weight in (aligned, base))
        return Difference(aligned, base)
