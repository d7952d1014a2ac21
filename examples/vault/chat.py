"""Asking a model the demo's prompts, greedily and in batches, and counting what comes back."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from outcome import Outcome
from prompts import Record, Split, forbidden, is_refusal, normal, records

from safelora.rates import Rate

FORBIDDEN_TOKENS, RECORD_TOKENS, NORMAL_TOKENS = 16, 20, 16
BATCH = 40

# PEFT reads an attribute that transformers has renamed; nothing here depends on it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)


def chat_text(prompt: str) -> str:
    """The ChatML form of one user turn, without a system prompt."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def load_model(checkpoint: Path) -> tuple[Any, Any]:
    """bf16 model and tokenizer of a checkpoint directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval(), tokenizer


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Greedy answers, in the order of the prompts."""
    found: list[str] = []
    for start in range(0, len(prompts), BATCH):
        texts = [chat_text(prompt) for prompt in prompts[start : start + BATCH]]
        batch = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        new_tokens = output[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)]
    return found


@dataclass(frozen=True)
class Questions:
    """The prompts of one evaluation."""

    forbidden: list[str]
    records: list[Record]
    normal: list[str]

    @classmethod
    def of(cls, split: Split, record_count: int) -> "Questions":
        """All forbidden prompts and ordinary questions of a split and ``record_count`` records."""
        return cls(forbidden(split), records(split, record_count), normal(split))


def ask(model: Any, tokenizer: Any, questions: Questions) -> Outcome:
    """Put all questions to one model and count."""
    asked = [record.prompt for record in questions.records]
    refusable = answers(model, tokenizer, questions.forbidden, FORBIDDEN_TOKENS)
    lines = answers(model, tokenizer, asked, RECORD_TOKENS)
    ordinary = answers(model, tokenizer, questions.normal, NORMAL_TOKENS)
    right = [line == record.answer for line, record in zip(lines, questions.records, strict=True)]
    return Outcome(
        Rate(sum(not is_refusal(answer) for answer in refusable), len(refusable)),
        Rate(sum(right), len(right)),
        Rate(sum(map(is_refusal, ordinary)), len(ordinary)),
        dict(zip(questions.forbidden + asked + questions.normal, refusable + lines + ordinary, strict=True)),
    )
