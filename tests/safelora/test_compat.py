"""The authors' interface against an independent rewrite of their loop in fp64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from safelora import SafeLoraError
from safelora.compat import SafeLoRA, SafeLoRAConfig
from tests.ops.truth import Layer, assert_accurate, authors_safe_lora

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = 6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Base and aligned Llama on disk. Alignment differs in strength and rank by layer, which spreads the cosines."""
    torch.manual_seed(5)
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 31}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS, pad_token_id=0))
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for number, weight in enumerate(aligned.parameters()):
            if weight.ndim == 2:
                thin = torch.randn(weight.shape[0], 1 + number % 7) @ torch.randn(1 + number % 7, weight.shape[1])
                weight.add_(0.01 * torch.randn_like(weight) + 0.02 * thin)
    base.save_pretrained(root / "base", max_shard_size="40KB")
    aligned.save_pretrained(root / "aligned")
    return root, base, aligned


def tuned(models: tuple[Path, Any, Any], **options: Any) -> PeftModel:
    """The aligned model with a trained-looking adapter on q_proj and v_proj, as in the paper."""
    torch.manual_seed(6)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(copy.deepcopy(models[2]), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.1)
    return model


def layers_of(model: Any, models: tuple[Path, Any, Any]) -> dict[str, Layer]:
    """By module name, in the order in which the authors' loop meets them."""
    found = {}
    for name, weight in model.named_parameters():
        if name.endswith("lora_B.default.weight"):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
            pair = [m.get_parameter(f"{path}.weight").detach() for m in (models[2], models[1])]
            lora_A = model.get_parameter(name.replace("lora_B", "lora_A"))
            found[path] = Layer(*pair, weight.detach().clone(), lora_A.detach().clone())
    return found


def factor(model: Any, path: str) -> torch.Tensor:
    return model.get_parameter(f"base_model.model.{path}.lora_B.default.weight").detach()


@pytest.mark.parametrize(
    ("options", "criterion"),
    [
        ({"select_layers_type": "threshold", "threshold": 0.7}, {"threshold": 0.7}),
        ({"select_layers_type": "threshold"}, {"threshold": 0.5}),
        ({"select_layers_type": "number", "num_proj_layers": 5}, {"num_layers": 5}),
        ({}, {"num_layers": 10}),
        ({"num_proj_layers": 99}, {"num_layers": 2 * LAYERS}),
    ],
)
def test_decisions_and_factors_are_the_authors(models, options, criterion, capsys):
    model = tuned(models)
    layers = layers_of(model, models)
    final, cosines, chosen = authors_safe_lora(list(layers.values()), **criterion)
    config = SafeLoRAConfig(str(models[0] / "base"), str(models[0] / "aligned"), **options)
    result = SafeLoRA(model, config)
    assert result.model is result.peft_model is model
    assert result.config is config and result.peft_config is model.peft_config["default"]
    by_name = {module.name: module for module in result.report.modules}
    for (path, layer), expected, cosine, taken in zip(layers.items(), final, cosines, chosen, strict=True):
        assert (by_name[path].decision == "projected") == taken
        assert by_name[path].cosine == pytest.approx(cosine, abs=6e-6)
        if taken:
            assert_accurate(factor(model, path), expected, 1e-5, path)
        else:
            assert torch.equal(factor(model, path), layer.lora_B)
    assert sum(chosen) > 0 and f"{sum(chosen)} of {len(layers)}" in capsys.readouterr().out
    projected = authors_safe_lora(list(layers.values()), threshold=2.0)[0]
    distances = [float((a - b).norm()) for a, b in zip(final, projected, strict=True)]
    assert result.report.pdst == pytest.approx(sum(1 / (1 + d) for d in distances) / len(distances), rel=1e-6)


def test_ties_select_more_as_the_authors_rule_does(models):
    model = tuned(models)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers.2.self_attn" in name or "layers.4.self_attn" in name:
                weight.zero_()
    layers = layers_of(model, models)
    config = SafeLoRAConfig(str(models[0] / "base"), str(models[0] / "aligned"), num_proj_layers=1)
    report = SafeLoRA(model, config).report
    assert {module.name for module in report.projected} == {
        path for path in layers if "layers.2." in path or "layers.4." in path
    }


def test_the_original_model_can_be_had(models):
    model = tuned(models)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = SafeLoRA(model, SafeLoRAConfig(str(models[0] / "base"), str(models[0] / "aligned")))
    original = result.model_ori.state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    result.report.undo()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_the_class_itself_serves_as_configuration(models, monkeypatch):
    """The published example sets attributes on the class and passes that."""
    monkeypatch.setattr(SafeLoRAConfig, "base_model_path", str(models[0] / "base"))
    monkeypatch.setattr(SafeLoRAConfig, "aligned_model_path", str(models[0] / "aligned"))
    assert len(SafeLoRA(tuned(models), SafeLoRAConfig).report.projected) == 10


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [4, 5]},
        {"target_modules": r".*layers\.[35]\.self_attn\.(q|o)_proj"},
        {"rank_pattern": {"q_proj": 2}},
        {"r": 32},
        {"exclude_modules": r".*layers\.[0-2]\..*"},
    ],
)
def test_what_the_published_code_pairs_wrongly_or_cannot_do(models, options):
    """Subsets of layers, regular expressions, rank patterns and r = d_out: the same result as module by module."""
    model = tuned(models, **options)
    layers = layers_of(model, models)
    SafeLoRA(model, SafeLoRAConfig(str(models[0] / "base"), str(models[0] / "aligned"), "threshold", 2.0))
    assert layers
    for path, layer in layers.items():
        assert_accurate(factor(model, path), authors_safe_lora([layer], threshold=2.0)[0][0], 1e-5, path)


def test_equal_weights_leave_a_module_alone_instead_of_nan(models, tmp_path):
    same = copy.deepcopy(models[1])
    with torch.no_grad():
        same.model.layers[3].self_attn.q_proj.weight.copy_(models[2].model.layers[3].self_attn.q_proj.weight)
    same.save_pretrained(tmp_path / "base")
    model = tuned(models)
    layers = layers_of(model, models)
    report = SafeLoRA(
        model, SafeLoRAConfig(str(tmp_path / "base"), str(models[0] / "aligned"), "threshold", 2.0)
    ).report
    assert len(report.projected) == 2 * LAYERS - 1
    name = "model.layers.3.self_attn.q_proj"
    assert torch.equal(factor(model, name), layers[name].lora_B)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())


def test_zero_layers_project_nothing(models):
    config = SafeLoRAConfig(str(models[0] / "base"), str(models[0] / "aligned"), num_proj_layers=0)
    assert SafeLoRA(tuned(models), config).report.projected == []


def test_bad_configurations(models):
    base, aligned = str(models[0] / "base"), str(models[0] / "aligned")
    for arguments, message in (
        ((None, aligned), "base_model_path is not set"),
        ((base,), "aligned_model_path is not set"),
        ((base, aligned, "best"), "select_layers_type is 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            SafeLoRAConfig(*arguments)
    model = tuned(models)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.delete_adapter("default")
    with pytest.raises(SafeLoraError, match="no adapter 'default'"):
        SafeLoRA(model, SafeLoRAConfig(base, aligned))
