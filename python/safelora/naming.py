"""Finding the tensor of a module by name alone: wrappers, tied embeddings, generations of names, layer replication."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .checkpoint import Checkpoint, TensorInfo
from .errors import SafeLoraError

# Leading path components that wrap a text model and carry no meaning of their own. Vision and audio towers are not
# among them, so that a module of a tower never falls through to the text model.
_WRAPPERS = frozenset(
    {"model", "transformer", "base_model", "language_model", "text_model", "gpt_neox", "bert", "roberta", "distilbert",
     "electra", "backbone", "rwkv", "mpt"}
)  # fmt: skip
_TOWER = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video|encoder|vit|clip)", re.IGNORECASE)
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared", "embeddings")
HEADS = ("lm_head", "embed_out", "output", "output_layer")
WEIGHTS = ("weight", "in_proj_weight")
_LAYER = re.compile(r"(^|\.)(layers|layer|h)\.(\d+)(?=\.|$)")


class Names:
    """The parameter names of a model, and the ways in which a module's name may stand for one of them."""

    def __init__(self, names: Iterable[str], tied: bool) -> None:
        self._names = dict.fromkeys(names)
        self._tied = tied
        self._tables: dict[tuple[str, tuple[str, ...]], dict[str, list[str]]] = {}

    def find(self, module: str, parameters: tuple[str, ...] = WEIGHTS) -> tuple[list[str], str]:
        """The candidates for a parameter of `module`, and how they were found; one candidate is an answer.

        Order: the exact name; the other end of tied embeddings; the name with known wrapper prefixes added or removed;
        the only name that ends in the module's name.
        """
        for spelling in dict.fromkeys((module, module.replace(".base_layer", ""))):
            for parameter in parameters:
                if f"{spelling}.{parameter}" in self._names:
                    return [f"{spelling}.{parameter}"], "exact"
        module = module.replace(".base_layer", "")
        leaf = module.rpartition(".")[2]
        core = _core(module)
        cores = self._table("cores", parameters)
        hits = cores.get(core, [])
        if not hits and (leaf in HEADS or leaf in EMBEDDINGS) and self._tied:
            hits = [
                name
                for twin in (EMBEDDINGS if leaf in HEADS else HEADS)
                for name in cores.get(core.removesuffix(leaf) + twin, [])
            ]
            if not hits and leaf in HEADS:
                hits = [name for twin in EMBEDDINGS for name in self._table("leaves", parameters).get(twin, [])]
            if len(hits) == 1:
                return hits, "tied"
        if hits:
            return hits, "prefix"
        if "." in core:
            hits = [
                name
                for name in self._table("leaves", parameters).get(leaf, [])
                if _share_an_end(_core(name.rpartition(".")[0]), core)
                and bool(_TOWER.search(name)) == bool(_TOWER.search(module))
            ]
        return hits, "suffix"

    def _table(self, kind: str, parameters: tuple[str, ...]) -> dict[str, list[str]]:
        """Names by module without wrappers ("cores") or by last module component ("leaves"); built on first use."""
        if (kind, parameters) not in self._tables:
            table: dict[str, list[str]] = {}
            for name in self._names:
                module, _, parameter = name.rpartition(".")
                if parameter in parameters:
                    key = _core(module) if kind == "cores" else module.rpartition(".")[2]
                    table.setdefault(key, []).append(name)
            self._tables[kind, parameters] = table
        return self._tables[kind, parameters]


def stored_names(checkpoint: Checkpoint) -> Names:
    """The names under which the checkpoint stores its tensors."""
    if "names" not in checkpoint.lookups:
        checkpoint.lookups["names"] = Names(checkpoint.tensors, ties_embeddings(checkpoint.config))
    return checkpoint.lookups["names"]


def find_weight(checkpoint: Checkpoint, name: str) -> tuple[TensorInfo, str]:
    """The stored tensor that holds the weight of module `name`, and how it was found, by name alone.

    Raises SafeLoraError when none or several remain.
    """
    hits, how = stored_names(checkpoint).find(name)
    if len(hits) == 1:
        return checkpoint.tensors[hits[0]], how
    raise not_found(checkpoint, name, hits)


def not_found(checkpoint: Checkpoint, module: str, hits: list[str], remedy: str = "") -> SafeLoraError:
    """The error for a module that no tensor, or several, could belong to."""
    if hits:
        return SafeLoraError(
            f"{checkpoint.source}: several tensors could be the weight of module {module}: "
            f"{', '.join(sorted(hits)[:4])}. Name the modules as the checkpoint does."
        )
    return SafeLoraError(
        f"{checkpoint.source}: no tensor for module {module} (looked for {module}.weight and its usual variants among "
        f"{len(checkpoint.tensors)} tensors). {remedy or 'Is this the model the adapter was trained on?'}"
    )


def replicated(name: str, ranges: Any) -> str:
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


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Whether a model's head shares its embedding's weight, which transformers assumes unless told otherwise."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return config.get("tie_word_embeddings", inner) is not False


def _core(name: str) -> str:
    """A name without leading wrappers, and without the vision_model that some releases have inside a tower."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(part for index, part in enumerate(parts) if part != "vision_model" or not index)


def _share_an_end(name: str, core: str) -> bool:
    return name.endswith("." + core) or ("." in name and core.endswith("." + name))
