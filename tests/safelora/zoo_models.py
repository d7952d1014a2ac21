"""Tiny transformers and torch models, adapters that PEFT saves for them, and the true effect of an adapter.

The truth never asks PEFT which factor is which: it is the change that a loaded adapter makes to the parameters of the
live model, projected by the dense formula on the side that the model's own code multiplies as output (Case.columns,
written down by hand).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel
from torch import nn

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, **IDS,
}  # fmt: skip
MOE = {"num_experts": 3, "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
ATTENTION = ["q_proj", "v_proj"]
EXPERTS = {
    "target_modules": [],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "lora_dropout": 0.0,
}


@dataclass(frozen=True)
class Case:
    """A model, an adapter for it, and which of the changed parameters have their output in the last dimension."""

    model: Callable[[], Any]
    lora: dict[str, Any]
    columns: str = r"$^"
    matched: str | None = None
    change: Callable[[Any], Any] = field(default=lambda model: model)


def model(name: str, config: str, **options: Any) -> Callable[[], Any]:
    """A model of class `name` with a tiny configuration of class `config`."""

    def build() -> Any:
        return getattr(tf, name)(getattr(tf, config)(**options))

    return build


def llama(**options: Any) -> Callable[[], Any]:
    return model("LlamaForCausalLM", "LlamaConfig", **{**SIZES, **options})


def gpt2() -> Callable[[], Any]:
    return model("GPT2LMHeadModel", "GPT2Config", n_embd=24, n_layer=2, n_head=3, vocab_size=29, n_positions=16, **IDS)


def mixtral(**options: Any) -> Callable[[], Any]:
    return model("MixtralForCausalLM", "MixtralConfig", **{**SIZES, "num_local_experts": 3, **options})


def gpt_oss(**options: Any) -> Callable[[], Any]:
    sizes = {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8, **options}
    return model("GptOssForCausalLM", "GptOssConfig", **sizes)


def llama4(**options: Any) -> Callable[[], Any]:
    sizes = {
        **SIZES, "num_local_experts": 3, "intermediate_size": 20, "intermediate_size_mlp": 32, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, **options,
    }  # fmt: skip
    return model("Llama4ForCausalLM", "Llama4TextConfig", **sizes)


def gemma3() -> Callable[[], Any]:
    def build() -> Any:
        text = {**SIZES, "num_hidden_layers": 2, "sliding_window": 8}
        vision = {
            "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        }  # fmt: skip
        config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return tf.Gemma3ForConditionalGeneration(config)

    return build


def llava() -> Any:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = {**SIZES, "model_type": "llama"}
    return tf.LlavaForConditionalGeneration(tf.LlavaConfig(text_config=text, vision_config=vision))


def qwen2_5_vl() -> Any:
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision))


class Torch(nn.Module):
    """A model of torch alone, saved as a plain state dict: attention, convolutions, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(19, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        x = x + self.attn(x, x, x)[0]
        picture = x[:, :4, :].unsqueeze(2)
        return self.head(x).sum() + self.conv(picture).sum() + self.line(x[:, :4, :]).sum()


SPLIT = r"(experts\.(gate_up_proj|down_proj))"
CONV1D = r"(c_attn|c_proj|c_fc)\.weight"
EMBEDDING = r"(embed_tokens|tokens|wte)\.weight"

CASES = {
    "llama, 12 layers, sharded": Case(llama(num_hidden_layers=12), {"target_modules": ATTENTION}, matched="exact"),
    "llama all linear": Case(llama(), {"target_modules": "all-linear", "r": 3}),
    "llama layers_to_transform": Case(llama(), {"target_modules": ATTENTION, "layers_to_transform": [1]}),
    "llama exclude_modules": Case(llama(), {"target_modules": ATTENTION, "exclude_modules": r".*layers\.0\..*"}),
    "llama regex": Case(llama(), {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.down)_proj"}),
    "llama rank_pattern, alpha_pattern": Case(
        llama(), {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    ),
    "llama rslora": Case(llama(), {"target_modules": ["o_proj"], "use_rslora": True}),
    "llama r = d_out": Case(llama(), {"target_modules": ["k_proj", "v_proj"], "r": 8}),
    "llama embeddings and head": Case(
        llama(tie_word_embeddings=False), {"target_modules": ["embed_tokens", "lm_head"]}, EMBEDDING
    ),
    "llama tied head": Case(llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "v_proj"]}),
    "llama sequence classification": Case(
        model("LlamaForSequenceClassification", "LlamaConfig", **SIZES), {"target_modules": ATTENTION}
    ),
    "llama without a head": Case(
        llama(), {"target_modules": ATTENTION}, matched="prefix", change=lambda model: model.model
    ),
    "qwen2, biases": Case(
        model("Qwen2ForCausalLM", "Qwen2Config", **SIZES), {"target_modules": ATTENTION, "bias": "none"}
    ),
    "qwen3": Case(model("Qwen3ForCausalLM", "Qwen3Config", **SIZES), {"target_modules": [*ATTENTION, "gate_proj"]}),
    "gpt2 Conv1D": Case(gpt2(), {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"]}, CONV1D),
    "gpt2 square Conv1D": Case(gpt2(), {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, CONV1D),
    "gpt-neox fused qkv": Case(
        model("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES), {"target_modules": ["query_key_value", "dense"]}
    ),
    "phi3 fused qkv and gate_up": Case(
        model("Phi3ForCausalLM", "Phi3Config", **SIZES), {"target_modules": ["qkv_proj", "gate_up_proj"]}
    ),
    "falcon fused qkv": Case(
        model("FalconForCausalLM", "FalconConfig", **{k: v for k, v in SIZES.items() if k != "head_dim"}),
        {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    ),
    "bloom fused qkv": Case(
        model("BloomForCausalLM", "BloomConfig", hidden_size=24, n_layer=2, n_head=3, vocab_size=29, **IDS),
        {"target_modules": ["query_key_value"]},
    ),
    "opt": Case(
        model("OPTForCausalLM", "OPTConfig", hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=3,
              vocab_size=29, max_position_embeddings=16, word_embed_proj_dim=24, **IDS),
        {"target_modules": ["q_proj", "fc1", "fc2"]},
    ),
    "bert": Case(model("BertModel", "BertConfig", **SIZES), {"target_modules": ["query", "value", "dense"]}),
    "t5": Case(
        model("T5ForConditionalGeneration", "T5Config", d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
              vocab_size=29, **IDS),
        {"target_modules": ["q", "v", "wo"]},
    ),
    "whisper": Case(
        model("WhisperForConditionalGeneration", "WhisperConfig", d_model=24, encoder_layers=1, decoder_layers=1,
              encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=40, decoder_ffn_dim=40,
              vocab_size=60, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
              decoder_start_token_id=3, **IDS),
        {"target_modules": ATTENTION},
    ),
    "mamba2": Case(
        model("Mamba2ForCausalLM", "Mamba2Config", hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1,
              expand=2, num_hidden_layers=2, vocab_size=29, **IDS),
        {"target_modules": ["in_proj"]},
    ),
    "resnet Conv2d": Case(
        model("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
              num_labels=3),
        {"target_modules": ["convolution"], "r": 2},
    ),
    "mixtral experts": Case(mixtral(), EXPERTS, matched="converted"),
    "mixtral down_proj alone": Case(mixtral(), {**EXPERTS, "target_parameters": ["experts.down_proj"]}),
    "mixtral square gate_up": Case(mixtral(intermediate_size=12), EXPERTS),
    "mixtral square down": Case(mixtral(intermediate_size=24), EXPERTS),
    "mixtral per expert": Case(
        mixtral(), {"target_modules": ["w1", "w2", "w3", "q_proj"]}, matched="converted"
    ),
    "qwen2_moe": Case(
        model("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **SIZES, **MOE, shared_expert_intermediate_size=16),
        {**EXPERTS, "target_modules": ["shared_expert.up_proj"]},
    ),
    "qwen3_moe with its router": Case(
        model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **SIZES, **MOE),
        {**EXPERTS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]},
    ),
    "olmoe": Case(model("OlmoeForCausalLM", "OlmoeConfig", **SIZES, **MOE), EXPERTS),
    "gpt_oss": Case(gpt_oss(), EXPERTS, SPLIT),
    "gpt_oss square down": Case(gpt_oss(intermediate_size=24), EXPERTS, SPLIT),
    "llama4": Case(llama4(), EXPERTS, SPLIT),
    "llama4 square down": Case(llama4(intermediate_size=24), EXPERTS, SPLIT),
    "llama4 square gate_up alone": Case(
        llama4(intermediate_size=12), {**EXPERTS, "target_parameters": ["experts.gate_up_proj"]}, SPLIT
    ),
    "phimoe": Case(model("PhimoeForCausalLM", "PhimoeConfig", **SIZES, num_local_experts=3), EXPERTS),
    "granitemoe": Case(
        model("GraniteMoeForCausalLM", "GraniteMoeConfig", **SIZES, **MOE),
        {**EXPERTS, "target_modules": ["q_proj"]},
    ),
    "glm4_moe": Case(
        model("Glm4MoeForCausalLM", "Glm4MoeConfig", **SIZES, **MOE, n_routed_experts=3, first_k_dense_replace=1),
        EXPERTS,
    ),
    "deepseek_v3": Case(
        model("DeepseekV3ForCausalLM", "DeepseekV3Config",
              **{**SIZES, **MOE, "num_key_value_heads": 3, "n_routed_experts": 3, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
                 "qk_nope_head_dim": 8, "v_head_dim": 8}),
        {**EXPERTS, "target_modules": ["q_a_proj", "kv_b_proj"]},
    ),
    "jamba": Case(
        model("JambaForCausalLM", "JambaConfig", **{**SIZES, "num_experts": 3, "num_experts_per_tok": 2,
              "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_period": 2,
              "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}),
        {**EXPERTS, "target_modules": ["in_proj", "q_proj"]},
    ),
    "gemma3 text": Case(
        model("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, sliding_window=8), {"target_modules": ATTENTION}
    ),
    "gemma3 both towers": Case(gemma3(), {"target_modules": ATTENTION}),
    "llava": Case(lambda: llava(), {"target_modules": [*ATTENTION, "linear_1"]}),
    "qwen2.5-vl": Case(lambda: qwen2_5_vl(), {"target_modules": ["q_proj", "qkv", "up_proj"]}),
    "torch attention": Case(Torch, {"target_modules": ["attn", "head"]}),
    "torch Conv2d, Conv1d, Embedding": Case(Torch, {"target_modules": ["conv", "line", "tokens"], "r": 2}, EMBEDDING),
    "aLoRA": Case(llama(), {"target_modules": ATTENTION, "alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}),
    "MiCA": Case(llama(), {"target_modules": ATTENTION, "init_lora_weights": "mica"}),
    "orthogonal": Case(llama(), {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"}),
}  # fmt: skip


def randomised(tuned: Any, scale: float = 0.3) -> Any:
    """The same PEFT model with every trainable factor drawn anew."""
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * scale)
    return tuned


def save_model(built: Any, root: Path, **options: Any) -> Path:
    """As transformers saves it; a plain torch model as a state dict."""
    if hasattr(built, "save_pretrained"):
        built.save_pretrained(root, **options)
    else:
        from safetensors.torch import save_file

        root.mkdir()
        save_file(built.state_dict(), root / "model.safetensors")
    return root


def drifted(model: Any) -> Any:
    """A copy of the model with weights a little off."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return other


def save_pair(aligned: Any, root: Path) -> Any:
    """Save the model as root/aligned, and as root/base one that differs from it, which is returned."""
    base = drifted(aligned)
    save_model(base, root / "base")
    save_model(aligned, root / "aligned")
    return base


def pair_of(case: Case, root: Path) -> tuple[Any, Any]:
    """A base and an aligned model, in memory and at root/base and root/aligned."""
    base = case.model().eval()
    aligned = drifted(base)
    save_model(base, root / "base", **({"max_shard_size": "20KB"} if hasattr(base, "config") else {}))
    save_model(aligned, root / "aligned")
    return case.change(base), case.change(aligned)


def merged(aligned: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """Parameters of the live model with the adapter, as unpatched PEFT loads and merges it in fp64."""
    config = LoraConfig.from_pretrained(adapter)
    config.alora_invocation_tokens = None  # a gate on tokens, which PEFT therefore does not merge; B·A is the same
    if config.init_lora_weights == "mica":  # nor does it initialise in fp64, before the factors are loaded
        config.init_lora_weights = True
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned).double(), adapter, config=config).double()
    return dict(loaded.merge_and_unload().named_parameters(remove_duplicate=False))


def changes(aligned: Any, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each parameter that it changes."""
    before = dict(aligned.named_parameters(remove_duplicate=False))
    after = {
        name: weight.detach() - before[name].detach().double() for name, weight in merged(aligned, adapter).items()
    }
    return {name: change for name, change in after.items() if bool(change.any())}


def project_dense(case: Case, name: str, base: torch.Tensor, aligned: torch.Tensor, change: torch.Tensor) -> Any:
    """C·ΔW on the output side, in the layout of the parameter, for one matrix or a stack of them; and the cosines."""
    V, delta = aligned.double() - base.double(), change
    turned = bool(re.search(case.columns, name))
    if delta.ndim != 3 or not re.search(r"experts|_linear", name):
        V, delta = V.flatten(1)[None], delta.flatten(1)[None]
    if turned:
        V, delta = V.mT, delta.mT
    after = V @ (V.mT @ delta) / V.flatten(1).norm(dim=1)[:, None, None]
    products = (after * delta).flatten(1).sum(1)
    cosines = products / (after.flatten(1).norm(dim=1) * delta.flatten(1).norm(dim=1))
    return (after.mT if turned else after).reshape(change.shape), cosines.tolist()
