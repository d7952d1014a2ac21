"""What vLLM and llama.cpp do not take from a PEFT adapter, or take otherwise than PEFT means it.

Told from tensor names, shapes and configurations; a projection changes none of them, so that what is said of the input
holds for the output. The rules are those of vLLM 0.26 (vllm/lora/peft_helper.py, lora_model.py, utils.py,
vllm/config/lora.py) and of llama.cpp's convert_lora_to_gguf.py, both as of August 2026.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .adapter import Adapter, LoraModule
    from .checkpoint import TensorInfo

VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank accepts
VLLM_DEFAULT_RANK = 16
_FACTOR = re.compile(r".+\.(lora_[AB]\.weight|lora_embedding_[AB])")
_VLLM_IGNORES = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_LLAMA_CPP_TAKES = re.compile(r"\.base_layer\.weight|_layernorm|\.norm")
_PICTURE_TOWERS = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.")
_CONV1D_TURNED = re.compile(r"\.(c_attn|c_proj|c_fc)$")  # transposed by the converter's class for GPT-2


class ServingNote(NamedTuple):
    """One limitation. `refused`: the adapter is not loaded at all; else it is, and does something else."""

    consumer: str
    refused: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.consumer} {'refuses it' if self.refused else 'loads it, but'}: {self.reason}."


def serving_notes(adapter: Adapter, model: Mapping[str, Any] | None = None) -> list[ServingNote]:
    """What vLLM and llama.cpp would do with `adapter`, where that is not what PEFT does. Empty: nothing is known.

    Args:
        adapter: an adapter on disk.
        model: the configuration (config.json) of the model that it is for, if it is at hand.
    """
    return _vllm(adapter) + _llama_cpp(adapter, model or {})


def _vllm(adapter: Adapter) -> list[ServingNote]:
    config, found = adapter.config, _Notes(VLLM)
    if config.get("modules_to_save"):
        found.refusal("it has modules_to_save")
    if config.get("bias", "none") != "none":
        found.refusal("it trains biases")
    if config.get("layer_replication"):
        found.refusal("the layers that layer_replication adds do not exist in the served model")
    rank = max([int(config.get("r") or 0), *(module.rank for module in _plain(adapter))])
    if rank > VLLM_RANKS[-1]:
        found.refusal(f"its rank is {rank}, and {VLLM_RANKS[-1]} is the largest that --max-lora-rank accepts")
    elif rank > VLLM_DEFAULT_RANK:
        needed = min(size for size in VLLM_RANKS if size >= rank)
        found.refusal(f"its rank is {rank}, unless the server is started with --max-lora-rank {needed}")
    odd = [name for name in _others(adapter) if not name.endswith(_VLLM_IGNORES)]
    if odd:
        found.refusal(f"{odd[0]} is not named lora_A, lora_B, lora_embedding_A or lora_embedding_B")
    _shapes(adapter, found)
    stacks = _stacks(adapter)
    if stacks:
        found.refusal(
            f"{stacks[0].name} adapts all experts as one 3-D parameter, unless its class for the model does that too"
        )
    patterned = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if patterned:
        found.change(f"every module gets the scale of r and lora_alpha, whatever {' and '.join(patterned)} say")
    if config.get("alora_invocation_tokens"):
        found.change("alora_invocation_tokens is not read: the update acts on every token")
    return found.notes


def _llama_cpp(adapter: Adapter, model: Mapping[str, Any]) -> list[ServingNote]:
    config, found = adapter.config, _Notes(LLAMA_CPP)
    odd = [name for name in _others(adapter) if not _LLAMA_CPP_TAKES.search(name)]
    if odd:
        found.refusal(f"{odd[0]} is neither a LoRA factor nor a norm")
    if config.get("layer_replication"):
        found.refusal("the layers that layer_replication adds do not exist in the served model")
    _shapes(adapter, found)
    stacks = _stacks(adapter)
    if stacks:
        found.refusal(f"{stacks[0].name} adapts all experts as one 3-D parameter, whose name is not in its keys")
    text = model.get("text_config")
    tied = {**(text if isinstance(text, dict) else {}), **model}.get("tie_word_embeddings")
    if tied and any(module.name.rpartition(".")[2] == "lm_head" for module in adapter.modules):
        found.refusal("it adapts lm_head, which the model shares with its embedding")
    turned = [module.name for module in adapter.modules if _CONV1D_TURNED.search(module.name)]
    if turned and model.get("model_type", "gpt2") == "gpt2":
        found.refusal(
            f"the update of {turned[0]} is transposed as the stored weight of a Conv1D is (where it is square, without "
            "an error)"
        )
    split = [module.name for module in adapter.modules if module.name.endswith(".kv_b_proj")]
    if split:
        found.refusal(f"{split[0]} is two weights there, one of them transposed")
    towers = [module.name for module in adapter.modules if _PICTURE_TOWERS.search(module.name)]
    if towers:
        found.change(f"what is no part of the text model is left out ({towers[0]}), without an error")
    if config.get("use_rslora"):
        found.change("use_rslora is not read: the update is scaled by lora_alpha/r instead of lora_alpha/√r")
    if config.get("alpha_pattern"):
        found.change("every module gets lora_alpha, whatever alpha_pattern says")
    return found.notes


class _Notes:
    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self.notes: list[ServingNote] = []

    def refusal(self, reason: str) -> None:
        self.notes.append(ServingNote(self.consumer, True, reason))

    def change(self, reason: str) -> None:
        self.notes.append(ServingNote(self.consumer, False, reason))


def _others(adapter: Adapter) -> list[str]:
    """The tensors that are not factors."""
    tensors: Mapping[str, TensorInfo] = adapter.header.tensors
    return [name for name in tensors if not _FACTOR.fullmatch(name)]


def _plain(adapter: Adapter) -> list[LoraModule]:
    """The modules whose lora_A has as many rows as the rank, not times the number of experts."""
    stacked = {module.name for module in _stacks(adapter)}
    return [module for module in adapter.modules if module.name not in stacked]


def _stacks(adapter: Adapter) -> list[LoraModule]:
    """The modules that adapt a parameter of all experts, by PEFT's target_parameters."""
    targets = adapter.config.get("target_parameters") or ()
    owners = {str(target).rpartition(".")[0] for target in targets}
    return [
        module
        for module in adapter.modules
        if any(f".{module.name.replace('.base_layer', '')}".endswith(f".{owner}") for owner in owners)
    ]


def _shapes(adapter: Adapter, found: _Notes) -> None:
    convolution = next((module.name for module in adapter.modules if module.kind == "conv"), None)
    if convolution is not None:
        found.refusal(f"{convolution} is a convolution")
    stacked = {module.name for module in _stacks(adapter)}
    inner = [m.name for m in adapter.modules if ".base_layer" in m.name and m.name not in stacked]
    if inner:
        found.refusal(f"{inner[0]} lies inside another adapted module, by a name that no served model has")
