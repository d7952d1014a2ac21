"""Benchmarks of SaLoRA on a model: the calibration, and a step of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safelora_kernels.bench import Case, Prepared, Variant
from safelora_kernels.bench.case import OURS, Draw

HIDDEN, FFN, HEADS, KV, VOCABULARY = 576, 1536, 9, 3, 1024
TARGETS = ["q_proj", "v_proj"]
SAFETY_RANK, RANK = 16, 16


def _model(layers: int) -> Any:
    """The shape of SmolLM2-135M with fewer layers and words, drawn at random; activations with a decaying spectrum."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV, vocab_size=VOCABULARY, max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        strengths = 0.8 ** torch.arange(64)
        model.model.embed_tokens.weight.copy_((torch.randn(VOCABULARY, 64) * strengths) @ torch.randn(64, HIDDEN))
    return model


def _config() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")


def _data(count: int, rows: int, tokens: int) -> list[dict[str, Tensor]]:
    """Batches whose second half is the response."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (rows, tokens), generator=generator)
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def _modules(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if n.split(".")[-1] in TARGETS}


@torch.no_grad()
def _outputs(model: Any, batches: list[dict[str, Tensor]], name: str) -> Tensor:
    """One sweep over the data, keeping one module's outputs at the response tokens: (tokens, d_out)."""
    kept: list[Tensor] = []
    mask = [batch["labels"] != -100 for batch in batches]
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, y: kept.append(y.detach()))
    try:
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    finally:
        handle.remove()
    return torch.cat([y[m] for y, m in zip(kept, mask, strict=True)])


def _lost(outputs: Tensor, basis: Tensor) -> float:
    """How much less of the outputs' energy a basis holds than the best one of its size: 0 is optimal (Eckart–Young)."""
    y = outputs.double()
    best = torch.linalg.svdvals(y)[: basis.shape[1]].square().sum()
    return float(1 - (y @ basis.double()).square().sum() / best)


def calibration(layers: int, count: int, rows: int = 4, tokens: int = 128, default: bool = False) -> Case:
    """The safety subspaces of every module: one pass over the data, against a pass for each module.

    The error is the share of the energy lost beside the best subspace of that rank, since directions of nearly equal
    strength are interchangeable.
    """

    def prepare(draw: Draw) -> Prepared:
        from .salora import calibrate

        model, batches = _model(layers), _data(count, rows, tokens)
        names = list(_modules(model))
        name = names[-1]
        outputs = _outputs(model, batches, name)
        ours = partial(calibrate, model, _config(), batches, safety_rank=SAFETY_RANK)

        def published() -> Tensor:
            y = _outputs(model, batches, name)
            return torch.svd_lowrank(y.T, q=SAFETY_RANK)[0]

        def forward() -> None:
            with torch.no_grad():
                for batch in batches:
                    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        variants = [
            Variant(OURS, ours, lambda: _lost(outputs, ours().bases[name]), 1e-2),
            Variant("published form, a pass for each module", published, lambda: _lost(outputs, published()),
                    share=1 / len(names)),
            Variant("one forward pass over the data", forward),
        ]  # fmt: skip
        return Prepared(variants)

    weights = layers * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV // HEADS + 3 * HIDDEN * FFN)
    parameters = {
        "layers": layers,
        "sequences": rows * count,
        "tokens": tokens,
        "rank": SAFETY_RANK,
        "modules": 2 * layers,
    }
    return Case(
        "safelora.salora.calibrate", f"{layers} layers of {HIDDEN}, q and v, {rows * count} × {tokens} tokens",
        4 * weights, 2.0 * weights * rows * count * tokens, 12 * weights + (256 << 20), prepare, torch.float32,
        parameters, default,
    )  # fmt: skip


def training_step(layers: int, rows: int = 4, tokens: int = 128, default: bool = False) -> Case:
    """A step of AdamW on a LoRA: plain, inside the complement, and with the published dense C behind every lora_B.

    The error of ours is the largest share of an update that lies inside its protected subspace.
    """

    def prepare(draw: Draw) -> Prepared:
        from peft import get_peft_model

        from .salora import SubspaceConstraint, calibrate, initialize

        batches = _data(1, rows, tokens)
        subspaces = calibrate(_model(layers), _config(), batches, safety_rank=SAFETY_RANK)

        def trainer(change: Callable[[Any, Any], Any] | None = None) -> tuple[Callable[[], object], Any]:
            peft_model = get_peft_model(_model(layers), _config())
            optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-4)
            made = change(peft_model, optimizer) if change is not None else None

            def step() -> None:
                peft_model(**batches[0]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            return step, made

        def constrained(peft_model: Any, optimizer: Any) -> Any:
            return SubspaceConstraint(peft_model, initialize(peft_model, subspaces, "plain"), optimizer)

        def dense(peft_model: Any, _: Any) -> None:
            bases = {name: basis for name, basis in subspaces.bases.items()}
            for name, basis in bases.items():
                complement = torch.eye(len(basis)) - basis @ basis.T
                layer = peft_model.base_model.model.get_submodule(name).lora_B["default"]
                layer.register_forward_hook(lambda _, __, y, c=complement: y @ c.T)

        plain, _ = trainer()
        ours, constraint = trainer(constrained)
        published, _ = trainer(dense)

        def leak() -> float:
            for _ in range(3):
                ours()
            return max(constraint.leaks().values())

        return Prepared(
            [
                Variant(OURS, ours, leak, 1e-5),
                Variant("PEFT, plain LoRA", plain),
                Variant("PEFT with the published dense C", published),
            ]
        )

    weights = layers * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV // HEADS + 3 * HIDDEN * FFN)
    parameters = {"layers": layers, "tokens": rows * tokens, "rank": RANK, "k": SAFETY_RANK, "modules": 2 * layers}
    return Case(
        "step of training", f"{layers} layers of {HIDDEN}, q and v, r={RANK}, {rows}×{tokens} tokens", 4 * weights,
        4.0 * weights * rows * tokens, 20 * weights + (768 << 20), prepare, torch.float32, parameters, default,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    yield calibration(4, 2, default=True)
    yield calibration(30, 8)
    yield training_step(4, default=True)
    yield training_step(30)
