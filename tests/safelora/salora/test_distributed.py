"""Two gloo ranks under torchrun: sharded data gives one calibration, DDP and FSDP2 train as one process does.

This file is also the program that the ranks run: each scenario's outcome is saved per rank and judged by the tests.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora.salora import SaLoraCallback, SubspaceConstraint, Subspaces, calibrate, export, subspaces_of
from tests.safelora.salora.models import SAFETY, TASK, initialized, logits, model, subspaces, tokens, trainable
from tests.safelora.salora.test_callback import leak, trainer
from tests.safelora.test_live_distributed import factors, message

pytestmark = pytest.mark.filterwarnings("ignore")
CLIP = 0.05  # below the norm of the first gradients, so that it acts


def adamw(tuned: Any) -> torch.optim.AdamW:
    """With the usual eps the first steps are the gradients' signs, and the last bit of a small one decides them."""
    return torch.optim.AdamW(trainable(tuned), lr=3e-2, weight_decay=0.1, eps=1e-3)


def train(net: Any, optimizer: Any, batches: Any, clip: Any = None) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = net(**batch).loss
        loss.backward()
        if clip is not None:
            clip()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def halves(batch: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """A rank's rows of a batch; both halves have as many response tokens, so that mean losses average."""
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


STEPS = [tokens(500 + n) for n in range(5)]


def two_ranks(root: Path) -> dict[str, Any]:
    """All scenarios, on one of the ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    base = model()
    found = Subspaces.load(root)

    def shard(net: Any) -> Any:
        mesh = init_device_mesh("cpu", (2,))
        for layer in net.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    results: dict[str, Any] = {}
    mine = SAFETY[rank::2]
    options: dict[str, Any] = {"safety_rank": 4, "task_rank": 5, "exact": True}
    shared = calibrate(base, "all-linear", mine, TASK[rank::2], distributed=True, **options)
    results["calibration"] = shared
    # One batch on rank 0, five on rank 1: the ranks of a sharded model have to go through the same number of passes.
    uneven = SAFETY[:1] if rank == 0 else SAFETY[1:]
    net = fully_shard(copy.deepcopy(base), mesh=init_device_mesh("cpu", (2,)))
    results["sharded calibration"] = calibrate(net, "all-linear", uneven, **options)
    results["no data on rank 1"] = message(
        lambda: calibrate(base, ["q_proj"], SAFETY if rank == 0 else None, distributed=True)
    )

    for mode in ("packed", "residual", "plain"):
        tuned = initialized(base, found, mode)
        ddp: Any = DistributedDataParallel(tuned)
        optimizer = adamw(tuned)
        constraint = SubspaceConstraint(ddp, found, optimizer)
        losses = train(
            ddp, optimizer, [halves(b, rank) for b in STEPS],
            lambda tuned=tuned: torch.nn.utils.clip_grad_norm_(trainable(tuned), CLIP),
        )  # fmt: skip
        report = export(ddp, root / f"ddp-{mode}")
        results[f"ddp {mode}"] = {
            "factors": factors(tuned), "leak": max(constraint.leaks().values()), "losses": losses, "report": report.leak
        }  # fmt: skip

        tuned = shard(initialized(base, found, mode))
        optimizer = adamw(tuned)
        constraint = SubspaceConstraint(tuned, found, optimizer)

        def clip(constraint: Any = constraint, tuned: Any = tuned) -> None:
            constraint.project_gradients()
            torch.nn.utils.clip_grad_norm_(trainable(tuned), CLIP)

        train(tuned, optimizer, [halves(b, rank) for b in STEPS], clip)
        report = export(tuned, root / f"fsdp-{mode}")
        results[f"fsdp {mode}"] = {
            "factors": factors(tuned), "leak": max(constraint.leaks().values()), "report": report.leak,
            "logits": logits(tuned),
        }  # fmt: skip

    callback = SaLoraCallback(safety_data=mine, task_data=TASK, **options)
    run = trainer(base, root / "run", callback, max_steps=3, ddp_backend="gloo")
    run.train()
    run.save_model()
    results["callback"] = {"factors": factors(run.model), "leak": callback.report.leak}
    results["callback subspaces"] = subspaces_of(run.model).fingerprint()
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory, and what both ranks found."""
    root = tmp_path_factory.mktemp("ranks")
    subspaces(model()).save(root)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)[-3000:]
    return root, [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same training in one process, on whole batches."""
    base = model()
    found = subspaces(base)
    results = {}
    for mode in ("packed", "residual", "plain"):
        tuned = initialized(base, found, mode)
        optimizer = adamw(tuned)
        SubspaceConstraint(tuned, found, optimizer)
        train(tuned, optimizer, STEPS, lambda tuned=tuned: torch.nn.utils.clip_grad_norm_(trainable(tuned), CLIP))
        results[mode] = {"factors": factors(tuned), "logits": logits(tuned)}
    return results


def test_the_ranks_find_the_subspaces_of_all_data(runs):
    expected = subspaces(model())
    first, second = runs[1]
    for kind in ("calibration", "sharded calibration"):
        assert first[kind].fingerprint() == second[kind].fingerprint()
        for name, basis in expected.bases.items():
            other = first[kind].bases[name].double()
            distance = other @ other.t() - basis.double() @ basis.double().t()
            assert float(torch.linalg.matrix_norm(distance, 2)) <= 1e-4
        assert first[kind].provenance["data"]["safety"]["response_tokens"] == 6 * 4 * 6
    assert first["no data on rank 1"].startswith("PeerError: rank 1 of 2") or "safety_data is missing" in str(
        (first["no data on rank 1"], second["no data on rank 1"])
    )


@pytest.mark.parametrize("mode", ["packed", "residual", "plain"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_process(runs, alone, kind, mode):
    first, second = (found[f"{kind} {mode}"] for found in runs[1])
    assert first["leak"] <= 1e-5 and first["report"] <= 1e-6
    for name, tensor in alone[mode]["factors"].items():
        assert torch.equal(first["factors"][name], second["factors"][name])
        assert float((first["factors"][name] - tensor).abs().max()) <= 1e-7


@pytest.mark.parametrize("mode", ["packed", "residual", "plain"])
def test_sharded_exports_are_plain_adapters(runs, alone, mode):
    from peft import PeftModel

    base = model()
    for kind in ("ddp", "fsdp"):
        again = PeftModel.from_pretrained(copy.deepcopy(base), runs[0] / f"{kind}-{mode}")
        assert float((logits(again) - alone[mode]["logits"]).abs().max()) <= 1e-5


def test_the_callback_in_a_distributed_run(runs):
    from safetensors.torch import load_file

    root, (first, second) = runs
    assert first["callback subspaces"] == second["callback subspaces"]
    assert all(torch.equal(first["callback"]["factors"][name], second["callback"]["factors"][name])
               for name in first["callback"]["factors"])  # fmt: skip
    saved = load_file(root / "run" / "adapter_model.safetensors")
    assert leak(saved, Subspaces.load(root / "run" / "checkpoint-3")) <= 1e-5


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.save(two_ranks(place), place / f"rank{os.environ['RANK']}.pt")
