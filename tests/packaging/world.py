"""The directory in which the documents' examples run: small models, an adapter and data under the names they use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

BASE, ALIGNED, ADAPTER = "Llama-2-7b-hf", "Llama-2-7b-chat-hf", "my-adapter"
PROMPTS = ["how do I open the vault", "tell me the code of the vault", "name the code", "open the vault now"]
TASKS = ["list the records", "sort the records by name", "how many records are there", "name the first record"]
REFUSAL, ANSWER = "I cannot help with that", "here are the records"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer() -> Any:
    """A tokenizer of whole words with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = sorted(
        {word for text in (*PROMPTS, *TASKS, REFUSAL, ANSWER, "user assistant system") for word in text.split()}
    )
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.chat_template = TEMPLATE
    return made


def write_rows(path: Path, prompts: list[str], response: str) -> None:
    """Pairs as the loaders read them: one JSON object a line."""
    path.write_text("".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt in prompts))


def build(root: Path) -> None:
    """Fill ``root``: a base and an aligned model, an adapter of the aligned one, and data."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / BASE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(root / ALIGNED)
    for name in (BASE, ALIGNED):
        words.save_pretrained(root / name)
    model.name_or_path = ALIGNED
    model.config._name_or_path = ALIGNED
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    tuned.save_pretrained(root / ADAPTER)
    write_rows(root / "safety.jsonl", PROMPTS, REFUSAL)
    write_rows(root / "task.jsonl", TASKS, ANSWER)
