"""Linear modules of one decoder layer of real models, (d_out, d_in) by name, and how many layers there are."""

from __future__ import annotations

from typing import NamedTuple

Shape = tuple[int, int]


class Model(NamedTuple):
    """``attention`` and ``mlp`` are the modules of one layer; ``experts`` says how often the mlp is there."""

    layers: int
    attention: dict[str, Shape]
    mlp: dict[str, Shape]
    experts: int = 1


def _model(layers: int, hidden: int, q: int, kv: int, ffn: int, experts: int = 1) -> Model:
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return Model(layers, attention, mlp, experts)


MODELS = {
    "SmolLM2-135M": _model(30, 576, 576, 192, 1536),
    "Llama-2-7B": _model(32, 4096, 4096, 4096, 11008),
    "Llama-3-8B": _model(32, 4096, 4096, 1024, 14336),
    "Llama-3-70B": _model(80, 8192, 8192, 1024, 28672),
    "Qwen3-30B-A3B": _model(48, 2048, 4096, 512, 768, experts=128),
}
