"""`FastLanguageModel` with the arguments of Unsloth's; the factors that it returns are as if trained."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name: str = "unsloth/llama-3-8b-bnb-4bit",
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool = True,
    ) -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(model_name), None

    @staticmethod
    def get_peft_model(
        model: Any, r: int = 16, target_modules: Any = ("q_proj",), lora_alpha: int = 16, lora_dropout: float = 0.0
    ) -> Any:
        tuned = get_peft_model(model, LoraConfig(r=r, target_modules=target_modules, lora_alpha=lora_alpha))
        torch.manual_seed(0)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
        return tuned
