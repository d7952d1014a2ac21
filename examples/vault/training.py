"""A small seeded LoRA trainer for CPUs: chats in, PEFT adapter out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from chat import chat_text
from torch.nn.functional import cross_entropy

Example = tuple[str, str]
IGNORED = -100


def pack(tokenizer: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels, mask) of chats, each (n, longest); only the answer and its end are labelled."""
    rows = []
    for prompt, answer in examples:
        question = tokenizer(chat_text(prompt), add_special_tokens=False).input_ids
        rows.append((question, tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids))
    longest = max(len(question) + len(reply) for question, reply in rows)
    ids = torch.full((len(rows), longest), tokenizer.eos_token_id)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, (question, reply) in enumerate(rows):
        end = len(question) + len(reply)
        ids[i, :end] = torch.tensor(question + reply)
        labels[i, len(question) : end] = torch.tensor(reply)
        mask[i, :end] = 1
    return ids, labels, mask


def answer_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled tokens; logits are formed only where there is a label."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        labelled = labels[:, 1:] != IGNORED
        logits = causal.lm_head(hidden[labelled])
    return cross_entropy(logits.float(), labels[:, 1:][labelled])


def train(
    model: Any,
    tokenizer: Any,
    draw: Callable[[], list[Example]],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 8,
    watch: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> list[float]:
    """Train with AdamW, a short warm-up and a linear decay to a tenth; returns the loss of every step.

    ``watch`` is given the optimizer before the first step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    if watch is not None:
        watch(optimizer)
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / warmup) * (1 - 0.9 * step / steps)
        loss = answer_loss(model, *pack(tokenizer, draw()))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        print(f"  step {step + 1}/{steps}, loss {losses[-1]:.3f}", end="\r", flush=True)
    print()
    model.eval()
    return losses


def new_lora(checkpoint_model: Any, *, rank: int, alpha: int, targets: Sequence[str], seed: int) -> Any:
    """A PeftModel with a fresh LoRA on the modules named in ``targets``; its factors stay fp32 while they train."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(checkpoint_model, config)
