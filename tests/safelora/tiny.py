"""A chat model of a few thousand weights with a byte tokenizer, a base that differs from it, and adapters on it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level tokenizer with merges of its own, so that text and newlines join as in real ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("s", "s")]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=template, clean_up_tokenization_spaces=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """Directories of the model before alignment, the aligned one and adapters trained on it, and the aligned model."""

    root: Path
    model: Any
    tokenizer: Any

    @property
    def base(self) -> str:
        return str(self.root / "base")

    @property
    def aligned(self) -> str:
        return str(self.root / "aligned")

    def adapter(self, name: str) -> str:
        return str(self.root / name)

    def fresh(self) -> Any:
        """A copy of the aligned model."""
        return copy.deepcopy(self.model)


def make_tiny(root: Path, adapters: int = 2) -> Tiny:
    """Write base, aligned, and adapters "one", "two", … of rank 4 on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, bos_token_id=0, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in aligned.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    for name, model in (("base", base), ("aligned", aligned)):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in ("one", "two", "three")[:adapters]:
        tuned = get_peft_model(copy.deepcopy(aligned), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        with torch.no_grad():
            for key, weight in tuned.named_parameters():
                if "lora_" in key:
                    weight.copy_(torch.randn_like(weight) * 0.2)
        tuned.peft_config["default"].base_model_name_or_path = str(root / "aligned")
        tuned.save_pretrained(root / name)
    return Tiny(root, aligned, tokenizer)
