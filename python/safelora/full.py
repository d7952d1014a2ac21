"""Tensors of an adapter that were tuned in full (modules_to_save, biases, trainable tokens), as updates ΔW."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from .adapter import Adapter, module_name
from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from .errors import SafeLoraError
from .mapping import PlannedModule, conv1d, locate
from .naming import EMBEDDINGS, replicated
from .weights import WeightMatch

if TYPE_CHECKING:
    import torch

_TOKENS = ".token_adapter.trainable_tokens_delta"


class FullTensor(NamedTuple):
    """A tensor with ΔW = W_ft − W_aligned. kind: "full", "bias", "tokens" (rows `tokens` of an embedding) or "expert"
    (entry `expert` of the first dimension).

    `transposed` says that d_in × d_out is stored (embeddings, Conv1D).
    """

    name: str
    kind: str
    output: TensorInfo
    transposed: bool
    tokens: tuple[int, ...] = ()
    expert: int | None = None

    @property
    def rank(self) -> int:
        return min(self.d_out, self.d_in)

    @property
    def d_out(self) -> int:
        return self._sides[self.transposed]

    @property
    def d_in(self) -> int:
        return self._sides[not self.transposed]

    @property
    def _sides(self) -> tuple[int, int]:
        shape = self.output.shape if self.expert is None else self.output.shape[1:]
        return shape[0], math.prod(shape[1:])

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The d_out × d_in matrix in the stored tensor, a view."""
        tensor = tensor if self.expert is None else tensor[self.expert]
        matrix = tensor.unsqueeze(1) if tensor.ndim < 2 else tensor.flatten(1)
        return matrix.t() if self.transposed else matrix


def plan_full(adapter: Adapter, base: Checkpoint, aligned: Checkpoint) -> list[PlannedModule]:
    """Pair every tensor of `adapter` that is no LoRA factor with its weights; a reason where that cannot be done."""
    return [_plan(adapter, adapter.header.tensors[name], base, aligned) for name in adapter.passed_through]


def _plan(adapter: Adapter, info: TensorInfo, base: Checkpoint, aligned: Checkpoint) -> PlannedModule:
    tokens: tuple[int, ...] = ()
    path = module_name(info.name)
    if path.endswith(_TOKENS):
        module, parameter, kind = path.removesuffix(_TOKENS), "weight", "tokens"
        tokens = _token_indices(adapter.config.get("trainable_token_indices"), module)
    else:
        module, _, parameter = path.rpartition(".")
        kind = "bias" if len(info.shape) == 1 else "full"
    module = module.replace(".base_layer", "")
    leaf = module.rpartition(".")[2]
    across = leaf in EMBEDDINGS or bool(conv1d(aligned, module))
    full = FullTensor(f"{module}.{parameter}", kind, info, across and kind != "bias", tokens)
    if info.dtype not in FLOAT_DTYPES:
        return PlannedModule(full, None, None, f"it holds {info.dtype} values, not a weight")
    if ".lora_" in info.name:
        return PlannedModule(full, None, None, "it is part of the LoRA update (a bias or a buffer), not a full weight")
    if len(info.shape) == 3 or 0 in info.shape:
        return PlannedModule(full, None, None, f"tensors of shape {list(info.shape)} are not projected in full")
    if kind == "tokens" and (not full.transposed or len(tokens) != info.shape[0]):
        return PlannedModule(full, None, None, "trainable_token_indices does not say which rows these are")
    matches: list[WeightMatch] = []
    for checkpoint in (base, aligned):
        try:
            located = locate(checkpoint, replicated(module, adapter.config.get("layer_replication")), (parameter,))
        except SafeLoraError as error:
            return PlannedModule(full, None, None, str(error))
        if located is None:
            return PlannedModule(full, None, None, f"{checkpoint.source} has no such weight to compare it with")
        match, shape = located
        fits = (
            len(shape) == 2 and shape[1] == info.shape[1] and max(tokens) < shape[0]
            if kind == "tokens"
            else shape == info.shape
        )
        if not fits:
            reason = f"{match.info.name} of {checkpoint.source} has shape {list(shape)}, here it is {list(info.shape)}"
            return PlannedModule(full, None, None, reason)
        matches.append(WeightMatch(match.sources, match.how, full.transposed, match.convert))
    return PlannedModule(full, matches[0], matches[1])


def _token_indices(setting: Any, module: str) -> tuple[int, ...]:
    """The rows that `trainable_token_indices` names for a module: a list for the input embedding, or a dict by name."""
    if isinstance(setting, dict):
        for name, indices in setting.items():
            if f".{module}".endswith(f".{name}"):
                setting = indices
                break
        else:
            return ()
    if isinstance(setting, list) and setting and all(isinstance(index, int) and index >= 0 for index in setting):
        return tuple(setting)
    return ()
