"""`safelora calibrate` and `safelora export`, from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safelora.cli import main
from safelora.salora import SubspaceConstraint, Subspaces, initialize, subspaces_of
from tests.safelora.salora.models import logits, model, steps, trainable
from tests.safelora.salora.test_calibrate import words_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors as a user sees them."""
    monkeypatch.setenv("SAFELORA_DEBUG", "0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    model().save_pretrained(root / "model")
    words_tokenizer().save_pretrained(root / "model")
    for name, shift in (("safety", 0), ("task", 5)):
        rows = [{"prompt": f"w{n} w{n + 2}", "response": f"w{n + shift} w{n + 3} w{n + 4}"} for n in range(18)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_from_a_model_to_an_adapter(world, tmp_path, capsys):
    files = ["--safety", str(world / "safety.jsonl"), "--task", str(world / "task.jsonl")]
    command = ["calibrate", str(world / "model"), *files, "--safety-rank", "3", "--task-rank", "4"]
    assert main([*command, "--out", str(tmp_path), "--target-modules", "q_proj,v_proj,up_proj"]) == 0
    assert "6 modules with a subspace" in capsys.readouterr().out
    found = Subspaces.load(tmp_path)
    assert len(found.bases) == len(found.task_bases) == 6
    assert (
        main(
            [
                *command,
                "--out",
                str(tmp_path / "again.safetensors"),
                "--json",
                "--target-modules",
                "q_proj,v_proj,up_proj",
            ]
        )
        == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert content["modules"] == found.details and content["provenance"] == found.provenance
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "salora_subspace.safetensors").read_bytes()

    base = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"]))
    initialize(tuned, found, "residual")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    with SubspaceConstraint(tuned, found, optimizer):
        steps(tuned, optimizer, 3)
    tuned.save_pretrained(tmp_path / "run")
    subspaces_of(tuned).save(tmp_path / "run")
    live = logits(tuned)

    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert "rank2r" in capsys.readouterr().out
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "model"), tmp_path / "out")
    assert float((logits(again) - live).abs().max()) <= 1e-5
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "merged"), "--form", "merged", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["form"] == "merged" and max(module["leak"] for module in report["modules"]) <= 1e-6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--quiet"]) == 2
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--quiet", "--overwrite", "--no-sidecar"]) == 0
    assert not (tmp_path / "out" / "salora_subspace.safetensors").exists()
    assert all(value.isfinite().all() for value in load_file(tmp_path / "out" / "adapter_model.safetensors").values())


def test_configurations_and_errors(world, tmp_path, capsys):
    LoraConfig(target_modules=["k_proj"]).save_pretrained(tmp_path / "adapter")
    arguments = ["calibrate", str(world / "model"), "--safety", str(world / "safety.jsonl"), "--quiet"]
    out = ["--out", str(tmp_path)]
    assert main([*arguments, *out, "--config", str(tmp_path / "adapter"), "--limit", "5", "--safety-rank", "2"]) == 0
    found = Subspaces.load(tmp_path)
    assert set(found.bases) == {f"model.layers.{i}.self_attn.k_proj" for i in range(2)} and not found.task_bases
    cases: list[tuple[list[str], str]] = [
        ([*arguments, "--out", str(tmp_path / "no" / "file.safetensors")], "directory that exists"),
        ([*arguments, *out, "--task", "nowhere.jsonl"], "no such file"),
        ([*arguments, *out, "--config", str(tmp_path / "nothing")], "--config"),
        (["calibrate", str(tmp_path / "none"), "--safety", str(world / "safety.jsonl"), *out], "cannot be loaded"),
        (["export", str(tmp_path / "adapter"), str(tmp_path / "out")], "neither"),
    ]
    for command, message in cases:
        capsys.readouterr()
        assert main(command) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, *out, "--dtype", "int8"])
    assert "--dtype" in capsys.readouterr().err and not (tmp_path / "out").exists()
