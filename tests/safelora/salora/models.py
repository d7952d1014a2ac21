"""Tiny models, token batches and subspaces for the tests of SaLoRA."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from safelora.salora import Subspaces, calibrate, initialize
from tests.safelora.test_peft import llama

MODES = ("packed", "residual", "plain")


def tokens(seed: int = 0, rows: int = 4, length: int = 9, prompt: int = 3) -> dict[str, torch.Tensor]:
    """A batch whose responses begin after `prompt` tokens."""
    ids = torch.randint(3, 29, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


SAFETY = [tokens(seed) for seed in range(6)]
TASK = [tokens(seed) for seed in range(20, 24)]


def model(seed: int = 5, **options: Any) -> Any:
    torch.manual_seed(seed)
    return llama(**options).eval()


def subspaces(base: Any, config: Any = "all-linear", **options: Any) -> Subspaces:
    return calibrate(base, config, SAFETY, TASK, **{"safety_rank": 4, "task_rank": 5, "exact": True, **options})


def adapter(base: Any, **options: Any) -> Any:
    """A fresh adapter on a copy of the model."""
    torch.manual_seed(8)
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", **options}
    return get_peft_model(copy.deepcopy(base), LoraConfig(**settings))


def initialized(base: Any, found: Subspaces, mode: Any = "packed", **options: Any) -> Any:
    tuned = adapter(base, **options)
    initialize(tuned, found, mode)
    return tuned


def trainable(tuned: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in tuned.parameters() if parameter.requires_grad]


def logits(net: Any, seed: int = 99) -> torch.Tensor:
    """Of an unseen batch, in evaluation mode."""
    mode = net.training
    net.eval()
    with torch.no_grad():
        inputs = {key: value for key, value in tokens(seed).items() if key != "labels"}
        result = net(**inputs).logits
    net.train(mode)
    return result


def steps(
    tuned: Any, optimizer: Any, count: int, start: int = 0, clip: float | None = None, parts: int = 1
) -> list[float]:
    """Optimizer steps of `parts` accumulated batches each; the losses."""
    losses = []
    for number in range(start, start + count):
        optimizer.zero_grad()
        for part in range(parts):
            loss = tuned(**tokens(1000 + number * parts + part)).loss / parts
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable(tuned), clip)
        optimizer.step()
    return losses
