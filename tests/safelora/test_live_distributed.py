"""Two gloo ranks under torchrun: DDP, FSDP2 and the callback give the bits of one process; failures reach both ranks.

This file is also the program that the ranks run: each scenario's outcome is saved per rank and judged by the tests.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from safelora import SafeLoraCallback, SafeLoraError, apply_safe_lora
from tests.safelora.test_callback import trainer
from tests.safelora.test_peft import CASES, make

pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: dict[str, Any] = {"num_layers": 6}


def factors(model: Any) -> dict[str, torch.Tensor]:
    """Every factor, gathered, by name."""
    return {
        name.removeprefix("module."): (
            weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        ).detach().clone()
        for name, weight in model.named_parameters()
        if "lora_" in name
    }  # fmt: skip


def outcome(model: Any, report: Any) -> dict[str, Any]:
    return {"factors": factors(model), "modules": report.modules, "warnings": report.warnings}


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def two_ranks(root: Path) -> dict[str, Any]:
    """All scenarios, on one of the ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    aligned = torch.load(root / "aligned.pt", weights_only=False)
    tokens = torch.load(root / "tokens.pt")

    def load() -> PeftModel:
        return PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter", is_trainable=True)

    def sharded() -> Any:
        model = load()
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        return fully_shard(model, mesh=mesh)

    results: dict[str, Any] = {}
    model: Any = DistributedDataParallel(load())
    report = apply_safe_lora(model, root / "base", **OPTIONS)
    results["ddp"] = outcome(model, report)
    report.undo()
    results["ddp undone"] = factors(model)
    results["ddp loss"] = train(model, tokens)

    model = load()
    results["asked for"] = outcome(model, apply_safe_lora(model, root / "base", distributed=True, **OPTIONS))
    model = load()
    seen: list[tuple[int, int]] = []
    apply_safe_lora(model, root / "base", distributed=True, dry_run=True, progress=lambda *p: seen.append(p), **OPTIONS)
    results["bytes"] = seen[-1]
    results["unchanged"] = factors(model)

    model = sharded()

    def loss() -> float:
        with torch.no_grad():  # leaves gathered parameters in place of the sharded ones
            return float(model(input_ids=tokens, labels=tokens).loss)

    before = loss()
    report = apply_safe_lora(model, root / "base", **OPTIONS)
    results["fsdp"] = outcome(model, report)
    results["fsdp local"] = [tuple(w.to_local().shape) for n, w in model.named_parameters() if "lora_B" in n]
    losses = [before, loss()]
    report.undo()
    results["fsdp undone"] = factors(model)
    results["fsdp losses"] = [*losses, loss()]
    apply_safe_lora(model, root / "base", **OPTIONS)
    results["fsdp loss"] = train(model, tokens)
    model = sharded()
    results["fsdp, both read"] = outcome(
        model, apply_safe_lora(model, root / "base", aligned=root / "aligned", **OPTIONS)
    )

    model = load()
    kept = factors(model)
    missing = root / ("base" if rank == 0 else "nowhere")
    results["base missing on rank 1"] = message(lambda: apply_safe_lora(model, missing, distributed=True, **OPTIONS))
    results["other options"] = message(
        lambda: apply_safe_lora(model, root / "base", distributed=True, num_layers=6 - rank)
    )
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight[1, 2] = torch.nan
    results["nan"] = message(lambda: apply_safe_lora(model, root / "base", distributed=True, **OPTIONS))
    results["nan, kept"] = all(torch.equal(kept[name], tensor) for name, tensor in factors(model).items())
    model = sharded()
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if n.endswith("layers.0.mlp.up_proj.base_layer.weight")).fill_(
            torch.nan
        )
    results["nan in a shard"] = message(lambda: apply_safe_lora(model, root / "base", **OPTIONS))
    model = load()
    with torch.no_grad():
        next(w for n, w in model.named_parameters() if "lora_B" in n)[0, 0] += rank
    results["other factors"] = message(lambda: apply_safe_lora(model, root / "base", distributed=True, **OPTIONS))

    callback = SafeLoraCallback(root / "base", safe_checkpoints=True, **{"num_layers": 2})
    run = trainer((root, aligned), root / "run", callback, ddp_backend="gloo")
    run.train()
    run.save_model()
    results["callback"] = outcome(run.model, callback.report)
    dist.destroy_process_group()
    return results


def train(model: Any, tokens: torch.Tensor) -> list[float]:
    """A few steps; the losses."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[dict[str, Any]]]:
    """The directory, the aligned model, and what both ranks found."""
    torch.manual_seed(11)
    root = tmp_path_factory.mktemp("ranks")
    _, aligned = make(*CASES["llama all linear"], root)
    torch.save(aligned, root / "aligned.pt")
    torch.save(torch.randint(3, 29, (4, 9)), root / "tokens.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-3000:]
    return root, aligned, [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(runs: tuple[Path, Any, list[dict[str, Any]]]) -> dict[str, Any]:
    """The same in one process."""
    root, aligned, _ = runs
    model = PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter", is_trainable=True)
    before = factors(model)
    return {"before": before, **outcome(model, apply_safe_lora(model, root / "base", **OPTIONS))}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("scenario", ["ddp", "asked for", "fsdp"])
def test_two_ranks_give_the_bits_of_one(runs, alone, scenario):
    assert sum(module.decision == "projected" for module in alone["modules"]) == 6
    for found in runs[2]:
        assert equal(found[scenario]["factors"], alone["factors"])
        assert found[scenario]["modules"] == alone["modules"] and found[scenario]["warnings"] == alone["warnings"]


def test_sharded_models_with_both_checkpoints_read(runs, alone):
    for found in runs[2]:
        assert equal(found["fsdp, both read"]["factors"], alone["factors"])


def test_the_work_is_shared_and_undone_on_both(runs, alone):
    done, total = zip(*(found["bytes"] for found in runs[2]), strict=True)
    assert done == total and max(done) < 0.6 * sum(done)
    for found in runs[2]:
        before, projected, undone = found["fsdp losses"]
        assert before != projected and undone == before
        for scenario in ("ddp undone", "fsdp undone", "unchanged"):
            assert equal(found[scenario], alone["before"])
        halves = {(shape[0] * 2, shape[1]) for shape in found["fsdp local"]}
        assert halves == {tuple(w.shape) for n, w in alone["before"].items() if "lora_B" in n}


def test_training_goes_on(runs):
    first, second = runs[2]
    for scenario in ("ddp loss", "fsdp loss"):
        assert first[scenario] == second[scenario]
        assert first[scenario][-1] < first[scenario][0]


def test_a_fault_of_one_rank_is_raised_on_both_and_changes_nothing(runs):
    first, second = runs[2]
    assert first["base missing on rank 1"].startswith("PeerError: rank 1 of 2:")
    assert (
        second["base missing on rank 1"].startswith("SafeLoraError:") and "nowhere" in second["base missing on rank 1"]
    )
    for scenario in ("other options", "other factors"):
        assert "do not agree" in first[scenario] and "do not agree" in second[scenario]
    for scenario, name in (("nan", "layers.1.mlp.up_proj"), ("nan in a shard", "layers.0.mlp.up_proj")):
        assert {m[scenario].split(":")[0] for m in runs[2]} == {"PeerError", "SafeLoraError"}
        assert name in first[scenario] and name in second[scenario]
    assert first["nan, kept"] and second["nan, kept"]


def test_the_callback_in_a_distributed_run(runs):
    root, aligned, (first, second) = runs
    assert equal(first["callback"]["factors"], second["callback"]["factors"])
    assert first["callback"]["modules"] == second["callback"]["modules"]
    tuned = PeftModel.from_pretrained(copy.deepcopy(aligned), root / "run" / "checkpoint-6")
    report = apply_safe_lora(tuned, root / "base", num_layers=2)
    assert report.modules == first["callback"]["modules"]
    assert equal(factors(tuned), first["callback"]["factors"])
    saved, copied = (
        PeftModel.from_pretrained(copy.deepcopy(aligned), place)
        for place in (root / "run", root / "run" / "checkpoint-6" / "safelora")
    )
    assert equal(factors(saved), factors(tuned)) and equal(factors(copied), factors(tuned))


def test_a_process_group_has_to_exist(runs):
    root, aligned, _ = runs
    model = PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter")
    with pytest.raises(SafeLoraError, match="no process group"):
        apply_safe_lora(model, root / "base", distributed=True, **OPTIONS)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.save(two_ranks(place), place / f"rank{os.environ['RANK']}.pt")
