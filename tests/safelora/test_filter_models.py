"""The input filter on other kinds of models: quantised, half precision, Conv1D, experts, several adapters, encoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from safelora import SafeLoraError, filter_adapter
from tests.safelora.test_filter import SAFETY, TASK, factors
from tests.safelora.test_peft import IDS, KV, SMALL, bert, gpt2, llama, make

pytestmark = pytest.mark.filterwarnings("ignore")


def quantised(linear: Any) -> Any:
    """A small Llama whose layers hold bitsandbytes weights, in sizes that its kernels on the CPU take."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 29}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **IDS, num_key_value_heads=2, num_hidden_layers=2))
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, module in list(block.named_children()):
                if isinstance(module, torch.nn.Linear):
                    setattr(block, name, linear(module))
    return model


def four_bit(module: torch.nn.Linear) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
    made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def eight_bit(module: torch.nn.Linear) -> Any:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


def with_adapter(model: Any, **options: Any) -> PeftModel:
    tuned = get_peft_model(
        model, LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return tuned.eval()


@pytest.mark.parametrize("weight", ["none", "grad"])
@pytest.mark.parametrize("linear", [four_bit, eight_bit])
def test_quantised_bases_give_the_filter_of_their_values(linear, weight):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    torch.manual_seed(5)
    model = with_adapter(quantised(linear))
    plain = with_adapter(quantised(lambda module: module))
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora" not in name:
            held = model.get_submodule(name)
            if type(held.weight) is not torch.nn.Parameter:
                module.weight.data = dequantize_module_weight(held).float()
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if own[name].shape == parameter.shape and own[name].is_floating_point():
                parameter.copy_(own[name])
    with torch.no_grad():
        model(input_ids=torch.tensor([TASK[0]["input_ids"]]))  # after which bitsandbytes may have repacked the weights
    reports = [filter_adapter(each, SAFETY, TASK, weight=weight, ridge=10.0, strength=1.0) for each in (model, plain)]
    assert len(reports[0].filtered) == 6
    # The kernels round activations, to int8 or bf16.
    for (name, a), truth in zip(factors(model).items(), factors(plain).values(), strict=True):
        assert float((a - truth).norm() / truth.norm()) < 0.05, name


@pytest.mark.parametrize("weight", ["none", "grad"])
def test_half_precision_is_close_to_full(weight):
    # A large ridge, so that the rounding of activations is not magnified.
    torch.manual_seed(3)
    full = with_adapter(llama())
    half = copy.deepcopy(full).to(torch.bfloat16)
    found = []
    for model in (full, half):
        filter_adapter(model, SAFETY, TASK, weight=weight, ridge=10.0, strength=1.0)
        found.append(factors(model))
    for name, a in found[1].items():
        assert a.dtype == torch.bfloat16
        assert float((a.float() - found[0][name]).norm() / found[0][name].norm()) < 0.05


def test_conv1d_and_positions_of_their_own():
    model = with_adapter(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    report = filter_adapter(model, SAFETY, TASK)
    assert len(report.filtered) == len(report.modules) == 8


def test_experts_are_left_out_with_the_reason():
    config = MixtralConfig(**SMALL, **KV, **IDS, num_local_experts=2, num_experts_per_tok=1)
    model = get_peft_model(
        MixtralForCausalLM(config),
        LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    report = filter_adapter(model, SAFETY, TASK)
    skipped = {module.name: module.reason for module in report.modules if module.decision == "skipped"}
    assert skipped and all("experts" in reason for reason in skipped.values())
    assert {module.name.rpartition(".")[2] for module in report.filtered} == {"q_proj"}
    only = get_peft_model(
        MixtralForCausalLM(config), LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    )
    with pytest.raises(SafeLoraError, match="no module .* can be filtered: .*experts"):
        filter_adapter(only, SAFETY, TASK)


def test_one_of_several_adapters_and_the_same_one_alone(tmp_path):
    _, aligned = make(llama, {"target_modules": ["q_proj", "down_proj"]}, tmp_path)
    alone = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "adapter")
    filter_adapter(alone, SAFETY, TASK)
    model = PeftModel.from_pretrained(aligned, tmp_path / "adapter", adapter_name="mine")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.set_adapter("other")
    report = filter_adapter(model, SAFETY, TASK, adapter_name="mine")
    assert model.active_adapter == "other" and len(report.filtered) == 4
    after = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}
    single = {name: p.detach() for name, p in alone.named_parameters() if "lora_A" in name}
    assert all(torch.equal(after[name.replace(".default.", ".mine.")], a) for name, a in single.items())
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if ".mine." in name)


def test_an_encoder_has_inputs_but_no_answers():
    model = with_adapter(bert(), target_modules=["query", "value", "dense"])
    report = filter_adapter(model, SAFETY, TASK, weight="none")
    assert {module.decision for module in report.modules} <= {"filtered", "skipped"} and report.filtered


def test_gradient_checkpointing_and_input_gradients_change_nothing(tmp_path):
    _, aligned = make(llama, {"target_modules": "all-linear"}, tmp_path)
    found = []
    for prepare in (False, True):
        model = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "adapter", is_trainable=prepare)
        if prepare:
            model.train()
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        with torch.set_grad_enabled(prepare):
            filter_adapter(model, SAFETY, TASK)
        found.append(factors(model))
    assert all(torch.equal(found[0][name], a) for name, a in found[1].items())
