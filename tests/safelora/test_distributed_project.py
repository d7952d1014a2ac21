"""The offline projection over two ranks: the bytes of one process, and nothing half-written when one of them dies.

This file is also the program that the ranks run.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora import SafeLoraError, distributed, measure, offline, stream
from safelora.adapter import LoraModule
from safelora.checkpoint import TensorInfo
from safelora.distributed import PeerError, Ranks, Spilled, assign, launched, share
from safelora.full_model import project_model
from safelora.measure import Pair
from safelora.project import project_adapter
from safelora.weights import Stored, WeightMatch
from tests.safelora.zoo import factors, llama_tensors, shifted, write_adapter, write_checkpoint

LAYERS = 5
SHAPES = {"q_proj": (24, 24), "k_proj": (8, 24), "v_proj": (8, 24), "o_proj": (24, 24)}
RUNS: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.9},
    "number": {"num_layers": 7, "rule": "authors"},
    "everything": {"threshold": 1, "modules_to_save": "project"},
    "nothing": {"threshold": -1},
}
MODEL_RUNS: dict[str, dict[str, Any]] = {
    "model": {"threshold": 0.9},
    "some of the model": {"num_layers": 9, "exclude": "lm_head"},
}


def inputs(root: Path) -> None:
    """A base, an aligned and a fine-tuned model, and an adapter with a whole tensor tuned as well."""
    base = llama_tensors(layers=LAYERS)
    write_checkpoint(root / "base", base, shards=3)
    write_checkpoint(root / "aligned", shifted(base), shards=2)
    write_checkpoint(root / "tuned", shifted(shifted(base), seed=4), shards=2)
    given = factors(
        {f"model.layers.{n}.self_attn.{name}": shape for n in range(LAYERS) for name, shape in SHAPES.items()}
    )
    given["base_model.model.lm_head.weight"] = shifted(base, seed=9)["lm_head.weight"]
    write_adapter(root / "adapter", given)
    broken = dict(base)
    broken["model.layers.4.self_attn.o_proj.weight"] = base["model.layers.4.self_attn.o_proj.weight"] * torch.nan
    write_checkpoint(root / "broken", broken)


def run(root: Path, out: Path | None, ranks: Ranks | None = None, base: str = "base", **options: Any) -> Any:
    return project_adapter(root / "adapter", root / base, root / "aligned", out, ranks=ranks, **options)


def run_model(root: Path, out: Path, ranks: Ranks | None = None, base: str = "base", **options: Any) -> Any:
    return project_model(root / "tuned", root / base, root / "aligned", out, ranks=ranks, **options)


def scenarios(root: Path, ranks: Ranks) -> dict[str, Any]:
    """Every scenario on one of the ranks."""
    read: list[str] = []
    mapped = stream.map_range

    def recorded(info: TensorInfo) -> Any:
        read.append(f"{info.file.parent.name}/{info.name}")
        return mapped(info)

    stream.map_range = recorded
    results: dict[str, Any] = {}
    for name, options in (RUNS | MODEL_RUNS).items():
        read.clear()
        work = run_model if name in MODEL_RUNS else run
        results[name] = work(root, root / "shared" / name, ranks, **options).to_dict()
        results[f"{name} read"] = list(read)
    results["dry run"] = run(root, None, ranks, threshold=0.9, dry_run=True).to_dict()

    failures = {
        "base missing on rank 1": {"base": "base" if ranks.rank == 0 else "nowhere", "threshold": 1},
        "NaN": {"base": "broken", "threshold": 1},
        "other options": {"num_layers": 2 + ranks.rank},
        "taken": {"threshold": 1, "out": root / "shared" / "nothing"},
        "model, NaN": {"base": "broken", "threshold": 1},
    }
    for name, options in failures.items():
        out = options.pop("out", root / "failed")
        try:
            (run_model if "model" in name else run)(root, out, ranks, **options)
            results[name] = "no error"
        except SafeLoraError as error:
            results[name] = f"{type(error).__name__}: {error}"
    collect = distributed.collect
    offline.collect = full_disk
    try:
        run(root, root / "failed", ranks, threshold=1)
    except (OSError, PeerError) as error:
        results["disk full"] = f"{type(error).__name__}: {error}"
    offline.collect = collect
    results["left"] = sorted(path.name for path in root.glob("*failed*")) + sorted(
        path.name for path in root.glob(".*safelora*")
    )
    return results


def full_disk(ranks: Ranks, shares: Any, selected: Any, source: Any, target: Any) -> None:
    """The real exchange, with a disk on rank 0 that has no room for the second tensor it receives."""
    replaced = target.replace
    seen = []

    def replace(name: str, tensor: torch.Tensor) -> None:
        seen.append(name)
        if len(seen) > 1:
            raise OSError(28, "No space left on device")
        replaced(name, tensor)

    target.replace = replace
    distributed.collect(ranks, shares, selected, source, target)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks under torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def two_ranks(*arguments: object) -> list[tuple[int, str]]:
    """Two ranks of this file, started as a launcher would; the exit status and the errors of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, __file__, *map(str, arguments)]
    processes = [
        subprocess.Popen(command, env={**environment(), **address, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    inputs(path)
    return path


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, Any]]:
    """What both ranks found, after everything was also done by one process."""
    for name, options in (RUNS | MODEL_RUNS).items():
        (run_model if name in MODEL_RUNS else run)(root, root / "alone" / name, **options)
    for status, errors in two_ranks("scenarios", root):
        assert status == 0, errors[-3000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def contents(directory: Path) -> dict[str, Any]:
    """The bytes of every file; the report without the place it was written to."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    report = json.loads(files["safelora_report.json"])
    del report["output"]
    return {**files, "safelora_report.json": report}


@pytest.mark.parametrize("name", RUNS | MODEL_RUNS)
def test_two_ranks_write_the_bytes_of_one_process(root, found, name):
    assert contents(root / "shared" / name) == contents(root / "alone" / name)
    assert found[0][name] == found[1][name]


def test_a_dry_run_writes_nothing_and_reports_everywhere(root, found):
    alone = run(root, None, threshold=0.9, dry_run=True).to_dict()
    for results in found:
        assert results["dry run"] == json.loads(json.dumps(alone))


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_reads_only_its_own_weights(found, name):
    weights = [[tensor for tensor in results[f"{name} read"] if "lora" not in tensor] for results in found]
    models = [[tensor for tensor in tensors if not tensor.startswith("adapter/")] for tensors in weights]
    assert not set(models[0]) & set(models[1])
    assert all(len(tensors) == len(set(tensors)) for tensors in models)
    expected = 2 * len(SHAPES) * LAYERS + (2 if name == "everything" else 0)
    assert len(models[0]) + len(models[1]) == expected
    assert min(map(len, models)) >= expected // 3


@pytest.mark.parametrize("name", MODEL_RUNS)
def test_each_rank_reads_only_its_own_weights_of_a_model(found, name):
    """Of base and aligned; what is selected of the fine-tuned model is read again where it is written."""
    read = [[tensor for tensor in results[f"{name} read"] if not tensor.startswith("tuned/")] for results in found]
    assert not set(read[0]) & set(read[1])
    assert all(len(tensors) == len(set(tensors)) for tensors in read)
    expected = 2 * (6 * LAYERS + (name == "model"))
    assert len(read[0]) + len(read[1]) == expected
    assert min(map(len, read)) >= expected // 3


def test_spilled_tensors_come_back(tmp_path):
    source = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}

    class Tensors:
        def read(self, name: str) -> torch.Tensor:
            return source[name]

    with open(tmp_path / "spill", "xb+", buffering=0) as file:
        spilled = Spilled(Tensors(), file)  # type: ignore[arg-type]
        assert torch.equal(spilled.written("b"), source["b"])
        for factor in (2, 3):
            for name in "ab":
                spilled.replace(name, (source[name] + 1) * factor)
        assert all(torch.equal(spilled.written(name), (source[name] + 1) * 3) for name in "ab")
        assert file.seek(0, 2) == 6 * 4 + 4 * 2


def test_failures_are_raised_on_both_ranks_and_leave_nothing(found):
    first, second = found
    assert first["base missing on rank 1"].startswith("PeerError: rank 1 of 2:")
    assert (
        second["base missing on rank 1"].startswith("SafeLoraError:") and "nowhere" in second["base missing on rank 1"]
    )
    for case in ("NaN", "model, NaN"):
        assert {results[case].split(":")[0] for results in found} == {"PeerError", "SafeLoraError"}
        assert all("model.layers.4.self_attn.o_proj.weight holds 576 NaN" in results[case] for results in found)
    assert all("do not agree on the options" in results["other options"] for results in found)
    assert first["taken"].startswith("SafeLoraError:") and second["taken"].startswith("PeerError: rank 0 of 2:")
    assert first["disk full"].startswith("OSError") and second["disk full"].startswith("PeerError")
    assert first["left"] == second["left"] == []


def test_the_command_under_torchrun(root, tmp_path):
    arguments = ["project", root / "adapter", "--base", root / "base", "--aligned", root / "aligned"]
    criterion = ["--threshold", "0.9", "--report", tmp_path / "report.json"]
    done = torchrun("-m", "safelora", *arguments, "--out", tmp_path / "out", *criterion)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Safe LoRA projected") == 1
    run(root, tmp_path / "alone", threshold=0.9)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert json.loads((tmp_path / "report.json").read_text())["output"] == str(tmp_path / "out")


@pytest.mark.parametrize(("command", "rank"), [("project", 0), ("project", 1), ("project-model", 1)])
def test_a_rank_that_dies_fails_the_job_and_nothing_is_half_written(root, tmp_path, command, rank):
    out = tmp_path / "out"
    outcomes = two_ranks("die", root, rank, out, command)
    assert outcomes[rank][0] == -9 and outcomes[1 - rank][0] == 1 and not out.exists()
    assert "another process of the job ended" in outcomes[1 - rank][1]
    left = list(tmp_path.iterdir())
    if rank == 1:
        assert left == []
    else:  # killed while it held the unfinished output: hidden, and removed by the next run
        assert all(path.name.startswith(".out.safelora-") for path in left)
    (run if command == "project" else run_model)(root, out, threshold=1)
    assert list(tmp_path.iterdir()) == [out]


def test_work_is_assigned_longest_first():
    costs = [5, 5, 4, 4, 3, 3, 3]  # Graham's worst case for three ranks: 11 where 9 is possible
    assert assign(costs, 3) == [0, 1, 2, 2, 0, 1, 0]
    assert assign([], 4) == [] and assign([3, 1], 1) == [0, 0]
    draw = torch.Generator().manual_seed(0)
    for size in (2, 5, 64):
        costs = torch.randint(1, 1000, (500,), generator=draw).tolist()
        loads = [0] * size
        for cost, owner in zip(costs, assign(costs, size), strict=True):
            loads[owner] += cost
        assert sum(loads) == sum(costs)
        assert max(loads) - min(loads) <= max(costs)


def test_pairs_that_write_one_tensor_stay_together():
    def info(name: str, size: int = 64) -> TensorInfo:
        return TensorInfo(name, "F32", (4, 4), Path("model"), 0, size)

    def pair(index: int, output: str, size: int = 64) -> Pair:
        match = WeightMatch((Stored(info(f"w{index}", size)),), "exact", False)
        return Pair(match, match, [LoraModule(f"m{index}", "expert", info(f"a{index}"), info(output))])

    pairs = [pair(0, "stack"), pair(1, "x"), pair(2, "stack"), pair(3, "y", 200), pair(4, "stack"), pair(5, "z")]
    pairs[5].modules.append(LoraModule("shared", "linear", info("a"), info("x")))
    shares = share(pairs, 3)
    names = [[one.modules[0].name for one in part] for part in shares]
    assert sorted(names) == [["m0", "m2", "m4"], ["m1", "m5"], ["m3"]]
    assert share(pairs, 1) == [pairs]
    assert [len(part) for part in share(pairs, 8)] == [1, 3, 2, 0, 0, 0, 0, 0]


def test_one_process_needs_no_launcher(monkeypatch):
    for variables in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "4"}):
        for name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with launched() as ranks:
            assert ranks == Ranks()
    assert Ranks().gather(3) == [3]


def die(root: Path, rank: int, out: Path, command: str) -> None:
    """The command, with a rank that is killed after its first batch."""
    from safelora.cli import main

    real = measure.measure

    def deadly(*arguments: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), 9)
        return real(*arguments)

    offline.measure = deadly
    source = root / ("adapter" if command == "project" else "tuned")
    words = [command, source, "--base", root / "base", "--aligned", root / "aligned", "--out", out]
    sys.exit(main([*map(str, words), "--threshold", "1"]))


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if sys.argv[1] == "die":
        die(place, int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
    with launched() as present:
        (place / f"rank{present.rank}.json").write_text(json.dumps(scenarios(place, present)))
