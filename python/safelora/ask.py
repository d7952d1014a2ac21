"""What a model answers, greedily, and how likely it finds given answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .data import Example, encode, padding_id, shorten, text_tokenizer
from .errors import SafeLoraError

Pair = tuple[list[int], list[int]]
Told = Callable[[int], None]


@dataclass(frozen=True)
class Likelihood:
    """Of one answer: the sum of its tokens' log-probabilities (nats), how many there are, and whether the model would
    have given exactly these when decoding greedily."""

    log_probability: float
    tokens: int
    greedy: bool


def answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 1024,
    told: Told | None = None,
) -> list[str]:
    """Greedy answers in the order of the examples, stripped of white space and special tokens.

    Prompts are padded on the left and cut on the left to max_length tokens. `told` hears how many are done.
    """
    import torch

    tokenizer = text_tokenizer(tokenizer)
    prompts = [shorten(encode(replace(e, response=None), tokenizer)[0], [], max_length)[0] for e in examples]
    pad = padding_id(tokenizer)
    ends = {tokenizer.eos_token_id}
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    found: dict[int, str] = {}
    with _Evaluating(model), torch.no_grad():
        for chosen in _by_length([len(prompt) for prompt in prompts], batch_size):
            ids, mask = _left_padded([prompts[i] for i in chosen], pad, model)
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0, pad_token_id=pad,
                eos_token_id=sorted(end for end in ends if end is not None) or None,
            )  # fmt: skip
            texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            found.update(zip(chosen, map(str.strip, texts), strict=True))
            if told is not None:
                told(len(chosen))
    return [found[i] for i in range(len(prompts))]


def likelihoods(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    told: Told | None = None,
) -> list[Likelihood]:
    """log p(answer | prompt) of (prompt ids, answer ids), one forward pass a batch; log-softmax in fp32.

    Rows are padded on the left, so that logits are formed for as many last positions as the longest answer has.

    Raises SafeLoraError where one is not finite.
    """
    import torch

    pairs = [shorten(*pair, max_length) for pair in pairs]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    accepted = inspect.signature(inner.forward).parameters
    pad = padding_id(text_tokenizer(tokenizer))
    found: dict[int, Likelihood] = {}
    with _Evaluating(model), torch.no_grad():
        for chosen in _by_length([len(prompt) + len(answer) for prompt, answer in pairs], batch_size):
            ids, mask = _left_padded([pairs[i][0] + pairs[i][1][:-1] for i in chosen], pad, model)
            longest = max(len(pairs[i][1]) for i in chosen)
            options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
            if "position_ids" in accepted:
                options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
            if "logits_to_keep" in accepted:
                options["logits_to_keep"] = longest
            logits = model(input_ids=ids, attention_mask=mask, **options).logits[:, -longest:]
            for row, i in zip(logits, chosen, strict=True):
                target = torch.tensor(pairs[i][1], device=row.device)
                scores = row[-len(target) :].float()
                picked = scores.log_softmax(-1).gather(1, target[:, None])
                total = float(picked.double().sum())
                if not math.isfinite(total):
                    raise SafeLoraError(
                        f"the model's log-probability of an answer is {total}: its weights or {row.dtype} arithmetic "
                        "overflow. Load it in bfloat16 or float32."
                    )
                found[i] = Likelihood(total, len(target), bool((scores.argmax(-1) == target).all()))
            if told is not None:
                told(len(chosen))
    return [found[i] for i in range(len(pairs))]


def opening(example: Example, text: str, tokenizer: Any) -> Pair:
    """Tokens of the prompt, and of an answer that begins with `text`, without what could follow it."""
    prompt, answer = encode(replace(example, response=text), tokenizer)
    _, longer = encode(replace(example, response=text + ", and so on"), tokenizer)
    shared = 0
    while shared < min(len(answer), len(longer)) and answer[shared] == longer[shared]:
        shared += 1
    return prompt, answer[:shared]


class _Evaluating:
    """The model without dropout inside the context, and as it was afterwards."""

    def __init__(self, model: Any) -> None:
        self._training = [module for module in model.modules() if module.training]
        self._model = model
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        weight = getattr(head, "weight", None)
        # The last positions are a strided view; torch multiplies such a batch by one copy of a frozen weight per row,
        # but folds it into one product where the weight could want a gradient. Nothing is recorded either way.
        self._thawed = (
            weight if weight is not None and weight.is_floating_point() and not weight.requires_grad else None
        )

    def __enter__(self) -> None:
        self._model.eval()
        if self._thawed is not None:
            self._thawed.requires_grad_(True)

    def __exit__(self, *_: Any) -> None:
        for module in self._training:
            module.training = True
        if self._thawed is not None:
            self._thawed.requires_grad_(False)


def _by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar lengths, the longest first: whoever runs out of memory does so at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def _left_padded(rows: Sequence[list[int]], pad: int, model: Any) -> tuple[Any, Any]:
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device)
