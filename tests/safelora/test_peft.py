"""Adapters made by PEFT on tiny transformers models: the output, loaded by unpatched PEFT, computes the dense truth."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip
from transformers.pytorch_utils import Conv1D

from safelora import SafeLoraError, project_adapter
from tests.safelora.zoo import truth

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29}
KV = {"num_key_value_heads": 1}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **KV, **IDS, **options))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **KV, **IDS))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=3, vocab_size=29, n_positions=16, **IDS))


def opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29}
    return OPTForCausalLM(OPTConfig(**sizes, max_position_embeddings=16, word_embed_proj_dim=24, **IDS))


def bert() -> BertModel:
    return BertModel(BertConfig(**SMALL, max_position_embeddings=16, pad_token_id=0))


CASES = {
    "llama q, v": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "llama all linear": (llama, {"target_modules": "all-linear", "r": 3}),
    "llama layers_to_transform": (llama, {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "llama regex": (llama, {"target_modules": r".*layers\.1\.(self_attn\.[qk]|mlp\.down)_proj"}),
    "llama rank and alpha pattern": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "llama rslora": (llama, {"target_modules": ["o_proj"], "use_rslora": True}),
    "llama r = d_out": (llama, {"target_modules": ["k_proj", "v_proj"], "r": 8}),
    "llama embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "llama tied head": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["lm_head", "v_proj"]}),
    "llama modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "qwen2 lora_bias": (qwen2, {"target_modules": ["q_proj"], "lora_bias": True}),
    "qwen2 biases": (qwen2, {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "gpt2 Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2 mixed with a linear head": (gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "opt": (opt, {"target_modules": ["q_proj", "fc1", "fc2"]}),
    "bert": (bert, {"target_modules": ["query", "value", "dense"]}),
    "pickled": (llama, {"target_modules": ["q_proj", "v_proj"]}),
}


def make(build: Any, lora: dict[str, Any], root: Path, pickled: bool = False) -> tuple[Any, Any]:
    """Save base, aligned and a trained-looking adapter; returns the two models."""
    base = build().eval()
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in aligned.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    base.save_pretrained(root / "base", max_shard_size="20KB")
    aligned.save_pretrained(root / "aligned")
    tuned = get_peft_model(copy.deepcopy(aligned), LoraConfig(**{"r": 4, **lora}))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.3)
    tuned.save_pretrained(root / "adapter", safe_serialization=not pickled)
    return base, aligned


def dense(base: Any, aligned: Any, adapter: Path) -> tuple[Any, dict[str, float]]:
    """The aligned model in fp64 with every projected update merged by hand, and the cosines."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file) if file.exists() else torch.load(adapter / "adapter_model.bin", weights_only=True)
    merged = copy.deepcopy(aligned).double()
    cosines = {}
    for name, lora_B in tensors.items():
        if not re.search(r"lora_(embedding_)?B(\.weight)?$", name):
            continue
        path = name.removeprefix("base_model.model.").split(".lora_")[0]
        lora_A = tensors[name.replace("lora_B", "lora_A").replace("embedding_B", "embedding_A")]
        turned = "embedding" in name or isinstance(aligned.get_submodule(path), Conv1D)
        weights = [model.get_submodule(path).weight.T if turned else model.get_submodule(path).weight
                   for model in (base, aligned)]  # fmt: skip
        projected, cosines[path], _ = truth(*(weight.detach() for weight in weights), lora_B, lora_A)
        rank = lora_A.shape[0]
        leaf = path.rpartition(".")[2]
        alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
        update = projected @ lora_A.double() * alpha / (rank**0.5 if config["use_rslora"] else rank)
        module = merged.get_submodule(path)
        # A tied weight belongs to two modules; the update is that of one of them.
        module.weight = torch.nn.Parameter(module.weight.detach() + (update.T if turned else update))
        if f"base_model.model.{path}.lora_B.bias" in tensors:
            bias = tensors[f"base_model.model.{path}.lora_B.bias"].double() * alpha / rank
            module.bias = torch.nn.Parameter(module.bias.detach() + bias)
    return merged, cosines


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_reloaded_by_peft(tmp_path, case):
    build, lora = CASES[case]
    base, aligned = make(build, lora, tmp_path, pickled=case == "pickled")
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1
    )
    merged, cosines = dense(base, aligned, tmp_path / "adapter")
    assert {module.name: pytest.approx(module.cosine, abs=1e-6) for module in report.modules} == cosines
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned).double(), tmp_path / "out").double().eval()
    tokens = torch.randint(3, 29, (2, 7))
    with torch.no_grad():
        got, expected = loaded(tokens)[0], merged(tokens)[0]
        plain = aligned.double()(tokens)[0]
    scale = float((expected - plain).norm())
    assert scale > 1e-3
    # 1e-5 from the kernels, times the conditioning of the network; one wrong module shows as 1e-1 or more.
    assert float((got - expected).norm()) < 1e-4 * scale


@pytest.mark.filterwarnings("ignore")
def test_dora_and_adalora_as_peft_writes_them_are_refused(tmp_path):
    from peft import AdaLoraConfig

    for number, config in enumerate(
        (LoraConfig(target_modules=["q_proj"], use_dora=True), AdaLoraConfig(target_modules=["q_proj"], total_step=9))
    ):
        adapter = tmp_path / str(number)
        get_peft_model(llama(), config).save_pretrained(adapter)
        with pytest.raises(SafeLoraError, match="DoRA|only LORA"):
            project_adapter(adapter, "base", "aligned", threshold=1, dry_run=True)


@pytest.mark.filterwarnings("ignore")
def test_pissa_is_refused_and_its_conversion_accepted(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "aligned")
    with torch.no_grad():
        base = copy.deepcopy(model)
        for weight in base.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    tuned.save_pretrained(tmp_path / "raw")
    sources = (tmp_path / "base", tmp_path / "aligned")
    with pytest.raises(SafeLoraError, match="path_initial_model_for_weight_conversion"):
        project_adapter(tmp_path / "raw", *sources, threshold=1, dry_run=True)
    tuned.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    report = project_adapter(tmp_path / "plain", *sources, tmp_path / "out", threshold=1)
    assert [module.rank for module in report.modules] == [16, 16]
