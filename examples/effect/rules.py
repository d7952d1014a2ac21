"""Every rule that the experiments compare, as a function from the factors of an adapter to other factors.

``Factors`` maps a module's name to (lora_A (r, d_in), lora_B (d_out, r)) in fp32. A rule never sees a held-out prompt.
"""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import questions  # noqa: F401  (sets the path of the demo's modules)
import torch
from chat import load_model
from recipes import CHAT_TEMPLATE, LINEARS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import Example, new_lora, train

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
PREFIX = "base_model.model."


def load_factors(adapter: Path) -> Factors:
    """Factors of a PEFT adapter directory."""
    return read_factors(adapter / "adapter_model.safetensors")


def read_factors(file: Path) -> Factors:
    """Factors of a file with PEFT's names, in fp32."""
    state = load_file(file)
    names = sorted({name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in state})
    return {name: tuple(state[f"{PREFIX}{name}.lora_{side}.weight"].float() for side in "AB") for name in names}


def save_factors(factors: Factors, file: Path) -> None:
    """Write factors under PEFT's names, the file as a whole or not at all."""
    state = {
        f"{PREFIX}{name}.lora_{side}.weight": factor.contiguous()
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    partial = file.with_suffix(".tmp")
    save_file(state, partial)
    partial.rename(file)


def shape_of(adapter: Path) -> tuple[tuple[str, ...], int]:
    """Target modules and rank of a PEFT adapter directory."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return tuple(sorted(config["target_modules"])), config["r"]


class Host:
    """An aligned model in bf16 with LoRA layers whose factors can be exchanged."""

    def __init__(self, aligned: Path, targets: Sequence[str] = LINEARS, rank: int = 8) -> None:
        model, self.tokenizer = load_model(aligned)
        self.tokenizer.chat_template = CHAT_TEMPLATE
        self.peft = new_lora(model.to(torch.bfloat16), rank=rank, alpha=2 * rank, targets=targets, seed=0).eval()
        self.model = self.peft.get_base_model()
        # With a frozen head, torch multiplies the last token of every prompt by a copy of the head of its own: 2 GB.
        self.model.lm_head.requires_grad_(True)
        self.layers = {name: layer for name, layer in self.model.named_modules() if hasattr(layer, "lora_B")}
        self.hold(torch.bfloat16)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the factors in that dtype: bf16 to be asked, fp32 to be trained."""
        for layer in self.layers.values():
            layer.lora_A.to(dtype)
            layer.lora_B.to(dtype)

    @torch.no_grad()
    def put(self, factors: Factors | None) -> Any:
        """The model with these factors; None is the aligned model itself."""
        for name, layer in self.layers.items():
            lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if factors is None:
                lora_B.zero_()
            else:
                lora_A.copy_(factors[name][0])
                lora_B.copy_(factors[name][1])
        return self.model

    def factors(self) -> Factors:
        """Copies of the factors it holds."""
        return {
            name: (
                layer.lora_A["default"].weight.detach().float().clone(),
                layer.lora_B["default"].weight.detach().float().clone(),
            )
            for name, layer in self.layers.items()
        }


def _copy(factor: Any) -> torch.Tensor:
    weight: torch.Tensor = factor["default"].weight
    return weight.detach().float().clone()


def scaled(factors: Factors, factor: float) -> Factors:
    """Control: every lora_B times ``factor``."""
    return {name: (lora_A, lora_B * factor) for name, (lora_A, lora_B) in factors.items()}


def deleted(factors: Factors, names: set[str]) -> Factors:
    """lora_B = 0 in the named modules."""
    return {name: (A, torch.zeros_like(B) if name in names else B) for name, (A, B) in factors.items()}


def random_names(factors: Factors, share: float, draw: int) -> set[str]:
    """Control: that share of the modules, drawn without replacement."""
    return set(random.Random(f"draw {draw}").sample(sorted(factors), round(share * len(factors))))


class Projection:
    """Safe LoRA of one adapter in its three normalisations. V = W_aligned − W_base per module.

    ``paper``: C = V Vᵀ/‖V‖_F. ``unit``: the same, C·B·A rescaled to the norm of B·A. ``exact``: the orthogonal
    projector onto the ``rank`` leading left singular vectors of V. The modules with the lowest cosine between B·A and
    C·B·A are projected.
    """

    def __init__(self, factors: Factors, alignment: Mapping[str, torch.Tensor], rank: int = 64) -> None:
        self.given, self.alignment, self.rank = factors, alignment, rank

    @cached_property
    def paper(self) -> Factors:
        out = {}
        for name, (lora_A, lora_B) in self.given.items():
            V = self.alignment[name]
            out[name] = (lora_A, V @ (V.T @ lora_B) / V.norm())
        return out

    @cached_property
    def unit(self) -> Factors:
        out = {}
        for name, (lora_A, projected) in self.paper.items():
            scale = product_norm(lora_A, self.given[name][1]) / product_norm(lora_A, projected)
            out[name] = (lora_A, projected * scale)
        return out

    @cached_property
    def exact(self) -> Factors:
        out = {}
        for name, (lora_A, lora_B) in self.given.items():
            torch.manual_seed(0)
            V = self.alignment[name]
            U = torch.svd_lowrank(V, q=min(self.rank + 8, *V.shape), niter=3)[0][:, : self.rank]
            out[name] = (lora_A, U @ (U.T @ lora_B))
        return out

    def lowest(self, projected: Factors, share: float) -> set[str]:
        """The modules with the lowest cosines between the update and its projection."""
        cosines = {name: cosine(A, self.given[name][1], B) for name, (A, B) in projected.items()}
        return set(sorted(cosines, key=cosines.__getitem__)[: round(share * len(cosines))])

    def apply(self, kind: str, share: float) -> Factors:
        """The adapter with that share of its modules projected."""
        projected = getattr(self, kind)
        chosen = self.lowest(projected, share)
        return {name: projected[name] if name in chosen else given for name, given in self.given.items()}


def product_norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """‖B·A‖_F from r × r matrices."""
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()


def cosine(A: torch.Tensor, B: torch.Tensor, C_B: torch.Tensor) -> float:
    """Cosine between B·A and C·B·A."""
    inner = ((B.T @ C_B) * (A @ A.T)).sum()
    return float(inner / (product_norm(A, B) * product_norm(A, C_B)))


def alignment_update(base: Path, aligned: Path) -> dict[str, torch.Tensor]:
    """V = W_aligned − W_base of every linear layer, fp32."""
    with safe_open(base / "model.safetensors", "pt") as one, safe_open(aligned / "model.safetensors", "pt") as other:
        names = [name for name in one.keys() if name.split(".")[-2] in LINEARS]  # noqa: SIM118
        return {
            name.removesuffix(".weight"): other.get_tensor(name).float() - one.get_tensor(name).float()
            for name in names
        }


@contextmanager
def training_mode(host: Host) -> Iterator[Any]:
    """The host's PEFT model with fp32 factors that train, and everything else frozen."""
    host.hold(torch.float32)
    host.model.lm_head.requires_grad_(False)
    try:
        yield host.peft
    finally:
        host.model.lm_head.requires_grad_(True)
        host.hold(torch.bfloat16)


def retrained(
    host: Host, factors: Factors, safety: list[Example], task: list[Example], steps: int, seed: int = 3
) -> Factors:
    """Control with training: AdamW on the adapter, each batch six refusals and six task examples of the same data."""
    generator = random.Random(seed)
    with training_mode(host) as peft:
        host.put(factors)
        train(
            peft,
            host.tokenizer,
            lambda: generator.sample(safety, min(6, len(safety))) + generator.sample(task, min(6, len(task))),
            steps=steps,
            learning_rate=4e-4,
            warmup=1,
        )
        return copy.copy(host.factors())
