"""Which checkpoint tensors belong to which adapted module: by name, never by position, shapes always verified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .adapter import Adapter, LoraModule
from .checkpoint import Checkpoint
from .conversion import replay
from .errors import SafeLoraError
from .experts import StackedModule, experts_of, stacked_modules
from .fp8 import check_pair, is_fp8, stored
from .naming import HEADS, WEIGHTS, find_weight, not_found, replicated, stored_names
from .weights import WeightMatch

if TYPE_CHECKING:
    from .full import FullTensor

__all__ = ["PlannedModule", "WeightMatch", "conv1d", "find_weight", "locate", "plan_modules"]

_CONV1D_LEAVES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_NEEDS_TRANSFORMERS = (
    "Its modules may be named otherwise, or be made of several stored tensors: transformers 5 or later, where it is "
    "installed, is asked how. Else: is this the model the adapter was trained on?"
)


@dataclass(frozen=True)
class PlannedModule:
    """A module with the weights it was paired with, or the reason why it is left alone."""

    module: LoraModule | FullTensor
    base: WeightMatch | None
    aligned: WeightMatch | None
    skipped: str | None = None


def plan_modules(adapter: Adapter, base: Checkpoint | None, aligned: Checkpoint | None) -> list[PlannedModule]:
    """Pair every module of `adapter` with a weight of `base` and, separately, one of `aligned` (None: not asked).

    Each expert of a mixture-of-experts parameter is a module of its own.

    Raises SafeLoraError when a module has no weight, an ambiguous one, one of another shape, or a quantised one that
    is not natively fp8. The only mismatch that is tolerated, and reported as a skip, is a resized vocabulary: embedding
    or head rows that one of the models does not have cannot be compared.
    """
    checkpoints = [base, aligned]
    for checkpoint in checkpoints:
        if checkpoint is not None:
            is_fp8(checkpoint)
    if base is not None and aligned is not None:
        check_pair(base, aligned)
    stacked = stacked_modules(adapter, checkpoints)
    experts = experts_of(adapter, stacked)
    planned = []
    for module in adapter.modules:
        if module.name in stacked:
            planned += _plan_experts(stacked[module.name], experts[module.name], checkpoints)
            continue
        matches = [
            _match(adapter, module, checkpoint) if checkpoint is not None else None for checkpoint in checkpoints
        ]
        skipped = next((match for match in matches if isinstance(match, str)), None)
        found = [match if isinstance(match, WeightMatch) else None for match in matches]
        planned.append(PlannedModule(module, found[0], found[1], skipped))
    return planned


def locate(
    checkpoint: Checkpoint, module: str, parameters: tuple[str, ...] = WEIGHTS
) -> tuple[WeightMatch, tuple[int, ...]] | None:
    """A parameter of `module` as it is stored (not yet oriented) and its shape; None where there is none.

    By name alone first; where that gives no single answer, as transformers would load it. Raises SafeLoraError when
    several tensors could be it.
    """
    hits, how = stored_names(checkpoint).find(module, parameters)
    if len(hits) == 1:
        info = checkpoint.tensors[hits[0]]
        return WeightMatch((stored(checkpoint, info),), how, False), info.shape
    made = replay(checkpoint)
    converted, _ = made.names.find(module, parameters) if made is not None else ([], "")
    if made is not None and len(converted) == 1:
        parameter = made.parameters[converted[0]]
        sources, convert = made.sources(parameter)
        return WeightMatch(sources, "converted", False, convert), parameter.shape
    if hits or converted:
        raise not_found(checkpoint, module, hits or converted)
    return None


def conv1d(checkpoint: Checkpoint, module: str) -> bool | None:
    """Whether the module is a Conv1D (weights stored d_in × d_out); None where the model type does not tell."""
    if checkpoint.config.get("model_type") in _CONV1D_MODELS:
        return module.rpartition(".")[2] in _CONV1D_LEAVES
    return None


def _plan_experts(
    entry: StackedModule, modules: list[LoraModule], checkpoints: list[Checkpoint | None]
) -> list[PlannedModule]:
    for checkpoint, stack in zip(checkpoints, entry.stacks, strict=True):
        if checkpoint is not None and stack is None:
            raise not_found(checkpoint, f"{entry.owner}.{entry.parameter}", [], _NEEDS_TRANSFORMERS)
        if stack is not None and (stack.d_out, stack.d_in, stack.shape[0]) != (
            modules[0].d_out, modules[0].d_in, len(modules),
        ):  # fmt: skip
            raise SafeLoraError(
                f"{checkpoint and checkpoint.source}: {stack.name} has shape {list(stack.shape)}, but the factors of "
                f"{entry.owner} fit {len(modules)} experts of {modules[0].d_out} × {modules[0].d_in}."
            )
    planned = []
    for index, module in enumerate(modules):
        base, aligned = (stack.expert(index) if stack is not None else None for stack in entry.stacks)
        planned.append(PlannedModule(module, base, aligned))
    return planned


def _match(adapter: Adapter, module: LoraModule, checkpoint: Checkpoint) -> WeightMatch | str:
    name = replicated(module.name, adapter.config.get("layer_replication"))
    located = locate(checkpoint, name)
    if located is None:
        raise not_found(checkpoint, name, [], _NEEDS_TRANSFORMERS)
    match, shape = located
    flag = conv1d(checkpoint, module.name)
    transposed = _orientation(module, shape, bool(adapter.config.get("fan_in_fan_out") if flag is None else flag))
    if transposed is None:
        expected = [module.d_out, *module.lora_A.shape[1:]]
        if _vocabulary_differs(module, shape):
            return (
                f"vocabulary resized: {match.info.name} of {checkpoint.source} has shape {list(shape)}, "
                f"the adapter was trained on {expected if module.kind != 'embedding' else expected[::-1]}"
            )
        raise SafeLoraError(
            f"{checkpoint.source}: {match.info.name} has shape {list(shape)}, but the factors of {module.name} fit a "
            f"weight of shape {expected}. Is this the model the adapter was trained on?"
        )
    return WeightMatch(match.sources, match.how, transposed, match.convert)


def _orientation(module: LoraModule, shape: tuple[int, ...], flag: bool) -> bool | None:
    """Whether the stored weight is d_in × d_out; None when it fits neither way. `flag` decides square ones."""
    if module.kind == "conv":
        return False if shape == (module.d_out, *module.lora_A.shape[1:]) else None
    direct, across = shape == (module.d_out, module.d_in), shape == (module.d_in, module.d_out)
    if module.kind == "embedding":
        return True if across else None
    if direct and across:
        return flag
    return across if direct or across else None


def _vocabulary_differs(module: LoraModule, shape: tuple[int, ...]) -> bool:
    leaf = module.name.rpartition(".")[2]
    if module.kind == "embedding":
        return len(shape) == 2 and shape[1] == module.d_out
    return leaf in HEADS and len(shape) == 2 and shape[1] == module.d_in
