"""Changes to the factors of an adapter in memory, which can be taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapter import PROJECTED, Mark
from .errors import SafeLoraError
from .peft_model import reshard

if TYPE_CHECKING:
    import torch


@dataclass
class Change:
    """A parameter with its new and former bits, and its version counter since."""

    name: str
    parameter: Any
    new: Any
    original: Any
    version: int = 0


class Changes:
    """The changes to one adapter of a model, prepared one by one, made together, and taken back together."""

    def __init__(self, model: Any, adapter: str, mark: Mark = PROJECTED) -> None:
        self.made: list[Change] = []
        self._model = model
        self._config = model.peft_config[adapter]
        self._mark = mark
        self._marked_before = hasattr(self._config, mark.attribute)

    def make(self, name: str, parameter: Any, tensor: torch.Tensor) -> None:
        """Prepare a change; a sharded parameter gets its part of the tensor."""
        new = tensor.to(parameter.device)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            new = distribute_tensor(new, parameter.device_mesh, parameter.placements, src_data_rank=None)
        self.made.append(Change(name, parameter, new, parameter.detach().clone()))

    def apply(self) -> None:
        """Overwrite the parameters and mark the adapter."""
        for change in self.made:
            change.parameter.copy_(change.new)
            change.version = change.parameter._version
            change.new = None
        setattr(self._config, self._mark.attribute, True)

    def undo(self, force: bool) -> None:
        """Give every parameter its former bits again.

        Raises SafeLoraError when one has changed since, unless `force`. Where the model is sharded, all ranks call it.
        """
        import torch

        moved = [change.name for change in self.made if change.parameter._version != change.version]
        if moved and not force:
            raise SafeLoraError(
                f"{len(moved)} factor(s) have changed since ({moved[0]}): undoing would lose that. "
                "Use undo(force=True) to go back all the same."
            )
        reshard(self._model)
        with torch.no_grad():
            for change in self.made:
                change.parameter.copy_(change.original)
        if self.made and not self._marked_before:
            delattr(self._config, self._mark.attribute)
        self.made.clear()
