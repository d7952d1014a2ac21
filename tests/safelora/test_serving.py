"""The keys of projected adapters against what vLLM and llama.cpp's converter accept, over every form of the zoo.

Neither can be installed beside the tests. Their rules are written down here a second time, from what the programs do
with a key (vLLM 0.26: lora_model.py, utils.py, peft_helper.py; llama.cpp of August 2026: convert_lora_to_gguf.py), and
llama.cpp's table of tensor names is asked itself: it comes with the package gguf. `serving_notes` has to say the same.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from safelora import project_adapter
from safelora.adapter import Adapter
from safelora.cli import main
from safelora.serving import LLAMA_CPP, VLLM, serving_notes
from tests.safelora.zoo import factors, llama_modules, write_adapter
from tests.safelora.zoo_models import CASES, pair_of, randomised

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERT = re.compile(r"experts\.\d+\.(w[123]|gate_proj|up_proj|down_proj)")
# The architectures of the zoo that llama.cpp converts, by the model type in config.json.
ARCHITECTURES = {
    "llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gpt2": "GPT2", "gpt_neox": "GPTNEOX", "phi3": "PHI3",
    "falcon": "FALCON", "bloom": "BLOOM", "bert": "BERT", "t5": "T5", "mamba2": "MAMBA2", "mixtral": "LLAMA",
    "qwen2_moe": "QWEN2MOE", "qwen3_moe": "QWEN3MOE", "olmoe": "OLMOE", "gpt_oss": "GPT_OSS",
    "llama4_text": "LLAMA4", "phimoe": "PHIMOE", "granitemoe": "GRANITE_MOE", "glm4_moe": "GLM4_MOE",
    "deepseek_v3": "DEEPSEEK2", "jamba": "JAMBA", "gemma3_text": "GEMMA3",
}  # fmt: skip


class RefusedError(Exception):
    """The consumer ends with an error."""


def keys_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def vllm(config: dict[str, Any], keys: dict[str, tuple[int, ...]], leaves: set[str]) -> None:
    """What vLLM checks before it loads an adapter for a model whose adaptable modules end in `leaves`."""
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise RefusedError("configuration")
    if config["r"] > 16:
        raise RefusedError("rank above --max-lora-rank")
    seen: dict[str, set[str]] = {}
    for key in keys:
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue  # PEFT saves an adapted embedding itself beside its factors
        parts = key.removeprefix("base_model.model.").split(".")
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, factor = ".".join(parts[:-2]), parts[-2][-1]
        elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
            module, factor = ".".join(parts[:-1]), parts[-1][-1]
        else:
            raise RefusedError(f"{key} is unsupported LoRA weight")
        seen.setdefault(module, set()).add(factor)
        if "base_layer" in module:
            continue  # looked at only by models whose experts are one parameter
        tail = module[module.find(".experts") + 1 :] if ".experts" in module else module.rpartition(".")[2]
        if tail not in leaves and not EXPERT.fullmatch(tail):
            raise RefusedError(f"{module} is no target module")
    assert all(factor == {"A", "B"} for factor in seen.values())


def llama_cpp(model: dict[str, Any], keys: dict[str, tuple[int, ...]]) -> None:
    """What convert_lora_to_gguf.py does with each key, up to the name that the tensor gets in the GGUF file."""
    layers = model.get("num_hidden_layers") or model.get("n_layer") or model.get("num_layers")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[model["model_type"]]], layers)
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in keys.items():
        if ".base_layer.weight" in key:
            continue
        base = re.sub(r"\.lora_(embedding_[AB]|[AB]\.weight)$", ".weight", key.replace("base_model.model.", ""))
        factor = re.search(r"\.lora_(?:embedding_)?([AB])(\.weight)?$", key)
        if factor is None:
            raise RefusedError(f"unexpected name {key}")
        pairs.setdefault(base, {})[factor[1]] = shape
    for base, pair in pairs.items():
        if len(pair["A"]) != len(pair["B"]) or pair["A"][-2] != pair["B"][-1]:
            raise RefusedError(f"{base} is no matrix product")
        if EXPERT.search(base):
            continue  # stacked with those of its layer
        if (model["model_type"], base) == ("bert", "pooler.dense.weight"):
            continue  # the converter leaves it out
        found = names.get_name(base, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RefusedError(f"can not map tensor {base}")
        if base == "lm_head.weight" and model.get("tie_word_embeddings"):
            raise RefusedError("the base model has no such tensor")
        if base.endswith("kv_b_proj.weight"):
            raise RefusedError(f"{base} is split by rows and transposed")
        if model["model_type"] == "gpt2":
            raise RefusedError(f"{base} is turned, and no longer has the shape of the model's")


def refuses(check: Any, *arguments: Any) -> bool:
    try:
        check(*arguments)
    except RefusedError:
        return True
    return False


@pytest.mark.parametrize("name", CASES)
def test_every_form_is_accepted_or_noted(tmp_path, name):
    """Both consumers, by their own rules, refuse exactly those adapters of which a note says so."""
    case = CASES[name]
    _, aligned = pair_of(case, tmp_path)
    tuned = randomised(get_peft_model(copy.deepcopy(aligned), LoraConfig(**{"r": 4, **case.lora})))
    tuned.save_pretrained(tmp_path / "adapter")
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1
    )
    keys = keys_of(tmp_path / "out")
    assert keys == keys_of(tmp_path / "adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    place = tmp_path / "aligned" / "config.json"
    model = json.loads(place.read_text()) if place.exists() else {}
    notes = serving_notes(Adapter.open(tmp_path / "out", allow_projected=True), model)
    assert report.serving == [str(note) for note in notes]
    refused = {note.consumer for note in notes if note.refused}
    leaves = {path.rpartition(".")[2] for path, part in aligned.named_modules() if is_matrix(part)}
    assert refuses(vllm, config, keys, leaves) == (VLLM in refused)
    if model.get("model_type") in ARCHITECTURES:
        assert refuses(llama_cpp, model, keys) == (LLAMA_CPP in refused)


def is_matrix(part: Any) -> bool:
    """A module that a server adapts: linear, Conv1D or an embedding; not a convolution or an attention."""
    weight = getattr(part, "weight", None)
    return weight is not None and weight.ndim == 2


@pytest.mark.parametrize(
    ("config", "extra", "consumer", "refused", "text"),
    [
        ({"modules_to_save": ["lm_head"]}, {}, VLLM, True, "modules_to_save"),
        ({"bias": "lora_only"}, {}, VLLM, True, "biases"),
        ({"layer_replication": [[0, 2], [0, 2]]}, {}, VLLM, True, "layer_replication"),
        ({"layer_replication": [[0, 2], [0, 2]]}, {}, LLAMA_CPP, True, "layer_replication"),
        ({"r": 17}, {}, VLLM, True, "--max-lora-rank 32"),
        ({"r": 600}, {}, VLLM, True, "512 is the largest"),
        ({"rank_pattern": {"q_proj": 2}}, {}, VLLM, False, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, {}, LLAMA_CPP, False, "alpha_pattern"),
        ({"use_rslora": True}, {}, LLAMA_CPP, False, "lora_alpha/√r"),
        ({"alora_invocation_tokens": [1, 2]}, {}, VLLM, False, "every token"),
        ({}, {"base_model.model.lm_head.weight": (31, 24)}, VLLM, True, "lm_head.weight is not named"),
        ({}, {"base_model.model.lm_head.weight": (31, 24)}, LLAMA_CPP, True, "neither a LoRA factor"),
        ({}, {"base_model.model.model.layers.0.q_proj.lora_B.bias": (24,)}, LLAMA_CPP, True, "lora_B.bias"),
    ],
)
def test_what_a_configuration_rules_out(tmp_path, config, extra, consumer, refused, text):
    import torch

    given = factors(llama_modules()) | {name: torch.zeros(shape) for name, shape in extra.items()}
    notes = serving_notes(Adapter.open(write_adapter(tmp_path / "adapter", given, **config)))
    assert any((note.consumer, note.refused) == (consumer, refused) and text in note.reason for note in notes)
    assert serving_notes(Adapter.open(write_adapter(tmp_path / "plain", factors(llama_modules())))) == []


def test_what_llama_cpp_leaves_out_is_said(tmp_path):
    shapes = {
        **llama_modules(),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj": (16, 16),
        "model.layers.0.self_attn.kv_b_proj": (16, 8),
    }
    notes = serving_notes(Adapter.open(write_adapter(tmp_path / "adapter", factors(shapes))))
    assert [(note.consumer, note.refused) for note in notes] == [(LLAMA_CPP, True), (LLAMA_CPP, False)]
    assert "vision_tower" in notes[1].reason


def test_norms_that_an_extraction_adds_pass_llama_cpp(tmp_path):
    import torch

    given = factors(llama_modules()) | {"base_model.model.model.layers.0.input_layernorm.weight": torch.zeros(24)}
    notes = serving_notes(Adapter.open(write_adapter(tmp_path / "adapter", given)))
    assert {note.consumer for note in notes} == {VLLM}


def test_a_rank_above_the_configured_one_counts(tmp_path):
    given = factors(llama_modules(), rank=20)
    (note,) = serving_notes(Adapter.open(write_adapter(tmp_path / "adapter", given, r=4)))
    assert "--max-lora-rank 32" in str(note) and str(note).startswith("vLLM refuses it: ")


def test_inspect_and_the_page_tell_them(tmp_path, pair, capsys):
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules()), use_rslora=True)
    assert main(["inspect", str(adapter)]) == 0
    assert "lora_alpha/√r" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(adapter), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["serving"]
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert report.serving == [told]
    report.save(tmp_path / "page.html")
    assert told in (tmp_path / "page.html").read_text()
