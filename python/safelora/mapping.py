"""Which checkpoint tensor belongs to which adapted module: by name, never by position, shapes always verified."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .adapter import Adapter, LoraModule
from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo
from .errors import SafeLoraError

# Leading path components that wrap a text model and carry no meaning of their own. Vision and audio towers are not
# among them, so that a module of a tower never falls through to the text model.
_WRAPPERS = frozenset(
    {"model", "transformer", "base_model", "language_model", "text_model", "gpt_neox", "bert", "roberta", "distilbert",
     "electra", "backbone", "rwkv", "mpt"}
)  # fmt: skip
_TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video|encoder|vit|clip)", re.IGNORECASE)
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared", "embeddings")
_HEADS = ("lm_head", "embed_out", "output", "output_layer")
_PARAMETERS = ("weight", "in_proj_weight")
_CONV1D_LEAVES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_LAYER = re.compile(r"(^|\.)(layers|layer|h)\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class WeightMatch:
    """A checkpoint tensor found for a module: how ("exact", "tied", "prefix" or "suffix") and its orientation."""

    info: TensorInfo
    how: str
    transposed: bool


@dataclass(frozen=True)
class PlannedModule:
    """A module with the weights it was paired with, or the reason why it is left alone."""

    module: LoraModule
    base: WeightMatch | None
    aligned: WeightMatch | None
    skipped: str | None = None


def plan_modules(adapter: Adapter, base: Checkpoint | None, aligned: Checkpoint | None) -> list[PlannedModule]:
    """Pair every module of `adapter` with a weight of `base` and, separately, one of `aligned` (None: not asked).

    Raises SafeLoraError when a module has no weight, an ambiguous one, one of another shape, or a quantised one. The
    only mismatch that is tolerated, and reported as a skip, is a resized vocabulary: embedding or head rows that one
    of the models does not have cannot be compared.
    """
    for checkpoint in (base, aligned):
        if checkpoint is not None:
            _check_not_quantised(checkpoint)
    planned = []
    for module in adapter.modules:
        matches = [
            _match(adapter, module, checkpoint) if checkpoint is not None else None for checkpoint in (base, aligned)
        ]
        skipped = next((match for match in matches if isinstance(match, str)), None)
        found = [match if isinstance(match, WeightMatch) else None for match in matches]
        planned.append(PlannedModule(module, found[0], found[1], skipped))
    return planned


def find_weight(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, str]:
    """The tensor that holds the weight of module `name`, and how it was found.

    Order: the exact name; the other end of tied embeddings; the name with known wrapper prefixes added or removed;
    the only tensor whose name ends in the module's name. Raises SafeLoraError when none or several remain.
    """
    for candidate in dict.fromkeys((name, name.replace(".base_layer.", "."))):
        for parameter in _PARAMETERS:
            if info := checkpoint.tensors.get(f"{candidate}.{parameter}"):
                return info, "exact"
    name = name.replace(".base_layer.", ".")
    leaf = name.rpartition(".")[2]
    core = _core(name)
    hits = _lookup(checkpoint, "cores").get(core, [])
    if not hits and (leaf in _HEADS or leaf in _EMBEDDINGS) and _ties_embeddings(checkpoint.config):
        hits = [
            info
            for twin in (_EMBEDDINGS if leaf in _HEADS else _HEADS)
            for info in _lookup(checkpoint, "cores").get(core.removesuffix(leaf) + twin, [])
        ]
        if not hits and leaf in _HEADS:
            hits = [info for twin in _EMBEDDINGS for info in _by_leaf(checkpoint, twin)]
        if len(hits) == 1:
            return hits[0], "tied"
    if len(hits) == 1:
        return hits[0], "prefix"
    if not hits and "." in core:
        hits = [info for info in _by_leaf(checkpoint, leaf) if _share_an_end(_core(_module_of(info.name)), core)]
        hits = [info for info in hits if bool(_TOWER.search(info.name)) == bool(_TOWER.search(name))]
        if len(hits) == 1:
            return hits[0], "suffix"
    if hits:
        raise SafeLoraError(
            f"{checkpoint.source}: several tensors could be the weight of module {name}: "
            f"{', '.join(sorted(info.name for info in hits)[:4])}. Name the modules as the checkpoint does."
        )
    raise SafeLoraError(
        f"{checkpoint.source}: no tensor for module {name} (looked for {name}.weight and its usual variants among "
        f"{len(checkpoint.tensors)} tensors). Is this the model the adapter was trained on?"
    )


def _match(adapter: Adapter, module: LoraModule, checkpoint: Checkpoint) -> WeightMatch | str:
    info, how = find_weight(checkpoint, _replicated(module.name, adapter.config.get("layer_replication")))
    if info.dtype not in FLOAT_DTYPES:
        raise SafeLoraError(
            f"{checkpoint.source}: {info.name} ({info.file.name}) has dtype {info.dtype}: a quantised weight. The "
            "difference of two quantised models is mostly rounding; use the original fp32, bf16 or fp16 checkpoints."
        )
    conv1d = module.name.rpartition(".")[2] in _CONV1D_LEAVES
    flag = conv1d if checkpoint.config.get("model_type") in _CONV1D_MODELS else adapter.config.get("fan_in_fan_out")
    transposed = _orientation(module, info.shape, bool(flag))
    if transposed is None:
        expected = [module.d_out, *module.lora_A.shape[1:]]
        if _vocabulary_differs(module, info.shape):
            return (
                f"vocabulary resized: {info.name} of {checkpoint.source} has shape {list(info.shape)}, "
                f"the adapter was trained on {expected if module.kind != 'embedding' else expected[::-1]}"
            )
        raise SafeLoraError(
            f"{checkpoint.source}: {info.name} has shape {list(info.shape)}, but the factors of {module.name} fit a "
            f"weight of shape {expected}. Is this the model the adapter was trained on?"
        )
    return WeightMatch(info, how, transposed)


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
    if module.kind == "embedding":
        return len(shape) == 2 and shape[1] == module.d_out
    return module.name.rpartition(".")[2] in _HEADS and len(shape) == 2 and shape[1] == module.d_in


def _replicated(name: str, ranges: Any) -> str:
    """Undo layer_replication: the index in the enlarged stack becomes the index of the layer it copies."""
    if not ranges:
        return name
    try:
        sources = [layer for start, end in ranges for layer in range(int(start), min(int(end), int(start) + 100_000))]
    except (TypeError, ValueError) as error:
        raise SafeLoraError(f"layer_replication is {ranges!r:.80}, expected a list of [start, end] pairs.") from error
    found = _LAYER.search(name)
    if not found:
        return name
    if int(found[3]) >= len(sources):
        raise SafeLoraError(f"module {name} lies outside layer_replication {ranges!r:.80} ({len(sources)} layers).")
    return f"{name[: found.start(3)]}{sources[int(found[3])]}{name[found.end(3) :]}"


def _core(name: str) -> str:
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _share_an_end(name: str, core: str) -> bool:
    return name.endswith("." + core) or ("." in name and core.endswith("." + name))


def _lookup(checkpoint: Checkpoint, kind: str) -> dict[str, list[TensorInfo]]:
    """Tensors by name without wrappers ("cores") or by last module component ("leaves"); built on first use."""
    if kind not in checkpoint.lookups:
        table: dict[str, list[TensorInfo]] = {}
        for name, info in checkpoint.tensors.items():
            module, _, parameter = name.rpartition(".")
            if parameter in _PARAMETERS:
                key = _core(module) if kind == "cores" else module.rpartition(".")[2]
                table.setdefault(key, []).append(info)
        checkpoint.lookups[kind] = table
    return checkpoint.lookups[kind]


def _by_leaf(checkpoint: Checkpoint, leaf: str) -> list[TensorInfo]:
    return _lookup(checkpoint, "leaves").get(leaf, [])


def _ties_embeddings(config: dict[str, Any]) -> bool:
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner) is not False


def _check_not_quantised(checkpoint: Checkpoint) -> None:
    quantisation = checkpoint.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise SafeLoraError(
            f"{checkpoint.source} is a quantised checkpoint (quantization_config: {str(method)[:40]}). The difference "
            "of two quantised models is mostly rounding; give the original fp32, bf16 or fp16 checkpoints instead."
        )
