"""The model on paper counts the bytes that a real job reads, and docs/scaling.md is what it computes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.scaling import BYTES, LLAMA_70B, LLAMA_405B, Model, Rates, estimate, table
from safelora.adapter import Adapter
from safelora.checkpoint import Checkpoint
from safelora.distributed import share
from safelora.mapping import plan_modules
from safelora.measure import pairs_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
SMALL = Model("small", 3, 32, 8, 48)
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list:
    """The weight pairs of a job on a checkpoint of the shapes of SMALL."""
    root = tmp_path_factory.mktemp("scaling")
    weights, factors = {}, {}
    for index, shape in enumerate(SMALL.shapes()):
        name = f"model.layers.{index // 7}.{NAMES[index % 7]}"
        weights[f"{name}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(16, shape[1])
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(shape[0], 16)
    for place in ("base", "aligned", "adapter"):
        (root / place).mkdir()
    for place in ("base", "aligned"):
        save_file(weights, root / place / "model.safetensors")
    save_file(factors, root / "adapter" / "adapter_model.safetensors")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 16}))
    models = [Checkpoint.open(root / place) for place in ("base", "aligned")]
    return pairs_of(plan_modules(Adapter.open(root / "adapter"), *models))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_bytes_are_those_of_a_real_job(pairs: list, size: int) -> None:
    loads = [sum(pair.nbytes for pair in part) for part in share(pairs, size)]
    job = estimate(SMALL, 1, size)
    assert (job.total, job.busiest) == (sum(loads), max(loads))
    factors = sum(module.lora_A.nbytes + module.lora_B.nbytes for pair in pairs for module in pair.modules)
    assert job.adapter == factors
    sent = [sum(module.lora_B.nbytes for pair in part for module in pair.modules) for part in share(pairs, size)[1:]]
    # Which of several equal weights a rank gets depends on the order of the files; by how much, on one of them.
    assert abs(job.sent - sum(sent)) <= max(module.lora_B.nbytes for pair in pairs for module in pair.modules)


@pytest.mark.parametrize("model", [LLAMA_70B, LLAMA_405B], ids=lambda model: model.name)
def test_sixty_four_ranks_scale_almost_linearly(model: Model) -> None:
    alone, job = estimate(model, 1, 1), estimate(model, 8, 8)
    parameters = {"70 B": 70e9, "405 B": 405e9}[model.name]
    assert alone.total == 2 * BYTES * sum(rows * columns for rows, columns in model.shapes())
    assert 0.95 < alone.total / (2 * BYTES) / parameters < 1  # all but embeddings and norms
    assert job.imbalance <= 1.01
    assert job.sent + job.gathered < 0.002 * job.total
    assert alone.seconds / job.seconds > 0.9 * job.ranks


def test_what_cannot_be_shared_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slow network the exchange dominates, with slow storage the node and not the rank."""
    slow = estimate(LLAMA_70B, 8, 8, rates=Rates(network=1e7))
    assert slow.seconds > 2 * estimate(LLAMA_70B, 8, 8).seconds
    bound = dataclasses.replace(Rates(), storage=1e9)
    one, eight = (estimate(LLAMA_70B, 1, n, rates=bound) for n in (1, 8))
    assert eight.seconds > one.seconds / 2 and eight.reading == one.reading
    none = estimate(LLAMA_70B, 8, 8, projected=0)
    assert none.sent == 0 and none.gathered > 0


def test_the_document_shows_what_is_computed() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith(("| 70 B", "| 405 B"))] == table()
