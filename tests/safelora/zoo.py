"""Tiny checkpoints and adapters written file by file, and the dense fp64 truth they are judged against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LLAMA_CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "vocab_size": 31,
}  # fmt: skip


def llama_tensors(
    layers: int = 2, d: int = 24, kv: int = 8, ffn: int = 40, vocab: int = 31, seed: int = 0, head: bool = True
) -> dict[str, torch.Tensor]:
    """Weights named and shaped like a Llama with grouped queries (no two projections of a layer the same shape)."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens": (vocab, d), "model.norm": (d,)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.up_proj": (ffn, d), "mlp.down_proj": (d, ffn), "input_layernorm": (d,),
        }.items():  # fmt: skip
            shapes[stem + name] = shape
    if head:
        shapes["lm_head"] = (vocab, d)
    return {f"{name}.weight": torch.randn(shape, generator=draw) * 0.1 for name, shape in shapes.items()}


def shifted(tensors: Mapping[str, torch.Tensor], scale: float = 0.02, seed: int = 1) -> dict[str, torch.Tensor]:
    """The aligned model: a different, partly low-rank change of every weight."""
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for name, tensor in tensors.items():
        delta = torch.randn(tensor.shape, generator=draw) * scale
        if tensor.ndim > 1:
            delta[:, : tensor.shape[1] // 2] *= 6
        out[name] = (tensor.float() + delta).to(tensor.dtype)
    return out


def write_checkpoint(
    root: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint directory, with an index when `shards` is more than one."""
    root.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, root / "model.safetensors", {"format": "pt"})
    else:
        names = list(tensors)
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = names[shard::shards]
            save_file({name: tensors[name] for name in part}, root / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(dict(LLAMA_CONFIG if config is None else config)))
    return root


def factors(
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int] = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 2,
) -> dict[str, torch.Tensor]:
    """LoRA factors keyed as PEFT saves them, for modules of shape (d_out, d_in)."""
    draw = torch.Generator().manual_seed(seed)
    out = {}
    for module, (d_out, d_in) in shapes.items():
        r = rank if isinstance(rank, int) else rank[module]
        stem = f"base_model.model.{module}"
        out[f"{stem}.lora_A.weight"] = (torch.randn(r, d_in, generator=draw) * 0.3).to(dtype)
        out[f"{stem}.lora_B.weight"] = (torch.randn(d_out, r, generator=draw) * 0.2).to(dtype)
    return out


def write_adapter(root: Path, tensors: Mapping[str, torch.Tensor], pickled: bool = False, **config: Any) -> Path:
    """An adapter directory as PEFT lays it out."""
    root.mkdir(parents=True)
    if pickled:
        torch.save(dict(tensors), root / "adapter_model.bin")
    else:
        save_file(dict(tensors), root / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": None, "fan_in_fan_out": False}
    (root / "adapter_config.json").write_text(json.dumps({**content, **config}))
    return root


def llama_modules(layers: int = 2, names: tuple[str, ...] = ("q_proj", "v_proj"), d: int = 24, kv: int = 8) -> dict:
    """Shapes of attention modules of `llama_tensors`."""
    shape = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    return {f"model.layers.{layer}.self_attn.{name}": shape[name] for layer in range(layers) for name in names}


def truth(
    base: torch.Tensor, aligned: torch.Tensor, lora_B: torch.Tensor, lora_A: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """(C·B, cosine, ‖V‖_F) by the published formulas, dense, in fp64. Weights are d_out × d_in."""
    V = aligned.double() - base.double()
    C = V @ V.T / V.norm()
    before, after = lora_B.double() @ lora_A.double(), C @ lora_B.double() @ lora_A.double()
    cosine = float((before * after).sum() / (before.norm() * after.norm()))
    return C @ lora_B.double(), cosine, float(V.norm())


def read_output(root: Path) -> dict[str, torch.Tensor]:
    """The tensors of a written adapter."""
    return load_file(root / "adapter_model.safetensors")
