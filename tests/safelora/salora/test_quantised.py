"""Bases quantised by bitsandbytes, on the CPU: calibrated from outputs, trained packed, exported as plain adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from safelora import SafeLoraError
from safelora.salora import SubspaceConstraint, calibrate, export, initialize, subspaces_of
from tests.safelora.salora.models import SAFETY, TASK, logits, steps, trainable

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")


def quantised(bits: int) -> Any:
    """A tiny model whose linears are bitsandbytes', as transformers would load it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    net = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=29,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    for name, module in list(net.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        sizes = (module.in_features, module.out_features)
        if bits == 4:
            layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.weight = weight.to("cpu")
        else:
            layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            layer.weight = weight.to("cpu")  # quantises
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, layer)
    net.is_loaded_in_4bit = bits == 4
    net.is_loaded_in_8bit = bits == 8
    return net.train()


@pytest.mark.parametrize("bits", [4, 8])
def test_calibrated_trained_and_exported(bits, tmp_path):
    net = quantised(bits)
    kept = copy.deepcopy(net)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj", "down_proj"])
    found = calibrate(net, config, SAFETY, TASK, safety_rank=4, task_rank=4)
    assert len(found.bases) == 6 and all(module.training for module in net.modules())
    tuned = get_peft_model(net, config)
    with pytest.raises(SafeLoraError, match="mode='packed'"):
        initialize(tuned, found, "residual")
    initialize(tuned, found, "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    constraint = SubspaceConstraint(tuned, found, optimizer)
    losses = steps(tuned, optimizer, 4)
    assert max(constraint.leaks().values()) <= 1e-5 and losses[0] != losses[-1]
    for name, U in found.bases.items():
        layer = tuned.base_model.model.get_submodule(name)
        change = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert float((U.double().t() @ change).norm()) <= 1e-5 * float(change.norm())
    assert subspaces_of(tuned).mode == "packed"
    for form in ("residual", "merged"):
        with pytest.raises(SafeLoraError, match="is quantised"):
            export(tuned, tmp_path / form, form)
    export(tuned, tmp_path / "out")
    again = PeftModel.from_pretrained(kept, tmp_path / "out")
    again.train()
    tuned.train()
    assert float((logits_as_they_are(again) - logits_as_they_are(tuned)).abs().max()) <= 1e-5


def logits_as_they_are(net: Any) -> torch.Tensor:
    """Without evaluation mode, which repacks weights of 4 bits on a CPU."""
    with torch.no_grad():
        return net(input_ids=SAFETY[0]["input_ids"]).logits


def test_the_output_at_the_start_is_the_bases():
    net = quantised(8)
    found = calibrate(net, ["q_proj", "v_proj"], SAFETY, TASK, safety_rank=4, task_rank=4)
    before = logits(net)
    tuned = get_peft_model(net, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"]))
    initialize(tuned, found, "packed")
    assert float((logits(tuned) - before).abs().max()) <= 1e-5
