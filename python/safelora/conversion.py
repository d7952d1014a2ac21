"""What transformers does to a checkpoint's tensors while loading, replayed by name on a model without memory.

transformers 5 renames, merges, concatenates and transposes stored tensors into the parameters of its modules (a
mixture's experts become one parameter, say). The mapping is taken from transformers itself; only the tensors of one
parameter, or of one expert of it, are ever converted at a time.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint
from .errors import SafeLoraError
from .fp8 import is_scale, stored
from .naming import Names, ties_embeddings
from .weights import Stored

if TYPE_CHECKING:
    import torch


_LAYER_COUNTS = frozenset(
    {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers",
     "num_encoder_layers", "num_decoder_layers"}
)  # fmt: skip
_MAX_LAYERS = 1000


@dataclass(frozen=True)
class Parameter:
    """A parameter of the live model: its shape, and the stored tensors it is made of with the patterns they matched."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[tuple[str, str], ...]
    converter: Any


class Recipe:
    """Makes a parameter, or one expert of it, from its stored tensors."""

    def __init__(self, replay: Replay, parameter: Parameter, expert: int | None) -> None:
        self._replay = replay
        self._parameter = parameter
        self._expert = expert
        self._sources = _of_expert(parameter, expert)

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        values = _convert(self._replay, self._parameter, [pattern for pattern, _ in self._sources], tensors)
        return values if self._expert is None else values[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and (self._parameter, self._expert) == (other._parameter, other._expert)

    def __hash__(self) -> int:
        return hash((self._parameter.name, self._parameter.sources, self._expert))


class Replay:
    """The parameters of the live model of a checkpoint, by name."""

    def __init__(self, checkpoint: Checkpoint, model: Any, parameters: dict[str, Parameter]) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.parameters = parameters
        self.names = Names(parameters, ties_embeddings(checkpoint.config))

    def sources(self, parameter: Parameter, expert: int | None = None) -> tuple[tuple[Stored, ...], Recipe | None]:
        """What has to be read for a parameter (or one entry of its first dimension), and how it is made of that."""
        chosen = _of_expert(parameter, expert)
        tensors = tuple(stored(self.checkpoint, self.checkpoint.tensors[key]) for _, key in chosen)
        if parameter.converter is None:
            return (tensors if expert is None else (tensors[0].slab(expert),)), None
        return tensors, Recipe(self, parameter, expert)

    def order(self, module: str) -> list[str]:
        """Names of the parameters registered on a module, in the order of registration."""
        return [name for name, _ in self.model.get_submodule(module).named_parameters(recurse=False)]


def replay(checkpoint: Checkpoint) -> Replay | None:
    """The replay for a checkpoint; None where transformers is missing, too old, or does not know the model."""
    if "replay" not in checkpoint.lookups:
        checkpoint.lookups["replay"] = _build(checkpoint)
    return checkpoint.lookups["replay"]


def _build(checkpoint: Checkpoint) -> Replay | None:
    _check_layers(checkpoint)
    architectures = checkpoint.config.get("architectures")
    if not (isinstance(architectures, list) and architectures and checkpoint.config.get("model_type")):
        return None
    try:
        import torch
        import transformers
        from transformers import AutoConfig
        from transformers import initialization as init
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return None
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None or checkpoint.config.get("auto_map"):
        return None
    settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with init.no_init_weights(), torch.device("meta"):
            model = kind(config)
        transforms = get_model_conversion_mapping(model)
    except Exception:  # a configuration that this transformers cannot build: names alone must do
        return None
    state = model.state_dict()
    prefix = model.base_model_prefix
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for key in sorted((name for name in checkpoint.tensors if not is_scale(name)), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=state)
        if name in state:
            converter = by_pattern[pattern] if pattern is not None else None
            collected.setdefault(name, (converter, []))[1].append((pattern or key, key))
    parameters: dict[str, Parameter] = {}
    result = Replay(checkpoint, model, parameters)
    for name, (converter, sources) in collected.items():
        for target in _targets(result, name, converter, sources):
            if target in state:
                parameters[target] = Parameter(target, tuple(state[target].shape), tuple(sources), converter)
    result.names = Names(parameters, ties_embeddings(checkpoint.config))
    return result


def _check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a configuration whose model would take hours and all memory to build, even without its weights."""
    most = max(_MAX_LAYERS, len(checkpoint.tensors))
    pending = [checkpoint.config]
    for settings in pending:
        for key, value in settings.items():
            if isinstance(value, dict):
                pending.append(value)
            elif key in _LAYER_COUNTS and isinstance(value, int) and value > most:
                raise SafeLoraError(
                    f"{checkpoint.source}: config.json asks for more than {most} layers ({key}), but the checkpoint "
                    f"holds {len(checkpoint.tensors)} tensors. It is refused; restore the original config.json."
                )


def _targets(replay: Replay, name: str, converter: Any, sources: list[tuple[str, str]]) -> list[str]:
    """All parameters that one conversion makes, found by running it on tensors without memory."""
    if converter is None or len(converter.target_patterns) == 1:
        return [name]
    import torch

    tensors = [torch.empty(replay.checkpoint.tensors[key].shape, device="meta") for _, key in sources]
    try:
        return list(_run(replay, name, converter, [pattern for pattern, _ in sources], tensors))
    except Exception:  # left out: a module that needs it is reported as not found
        return []


def _convert(replay: Replay, parameter: Parameter, patterns: list[str], tensors: list[torch.Tensor]) -> torch.Tensor:
    made = _run(replay, parameter.name, parameter.converter, patterns, tensors)
    value = made[parameter.name]
    return value[0] if isinstance(value, list) else value


def _run(replay: Replay, name: str, converter: Any, patterns: list[str], tensors: list[torch.Tensor]) -> dict[str, Any]:
    if len(converter.target_patterns) > 1:  # the name it was collected under is that of its first target
        for pattern in converter.target_patterns[1:]:
            if pattern in name:
                name = name.replace(pattern, converter.target_patterns[0])
    own = deepcopy(converter)
    for pattern, tensor in zip(patterns, tensors, strict=True):
        own.add_tensor(name, name, pattern, tensor)
    made: dict[str, Any] = own.convert(name, model=replay.model, config=replay.model.config)
    return made


def _of_expert(parameter: Parameter, expert: int | None) -> tuple[tuple[str, str], ...]:
    """The sources of one entry of the first dimension, where the conversion keeps the entries apart."""
    if expert is None or parameter.converter is None:
        return parameter.sources
    for operation in parameter.converter.operations:
        kind = type(operation).__name__
        stacks = kind == "MergeModulelist" and operation.dim == 0
        inside = (kind == "Concatenate" and operation.dim >= 1) or (
            kind == "Transpose" and min(operation.dim0, operation.dim1) >= 1
        )
        if not (stacks or inside):
            raise SafeLoraError(
                f"{parameter.name} is made of the stored tensors by {operation}, which cannot be done expert by expert."
            )
    by_pattern: dict[str, list[str]] = {}
    for pattern, key in parameter.sources:
        by_pattern.setdefault(pattern, []).append(key)
    experts = parameter.shape[0]
    if any(len(keys) != experts for keys in by_pattern.values()):
        raise SafeLoraError(
            f"{parameter.name} has {experts} experts, but the checkpoint does not hold as many tensors."
        )
    return tuple((pattern, keys[expert]) for pattern, keys in by_pattern.items())
