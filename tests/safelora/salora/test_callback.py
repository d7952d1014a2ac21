"""The callback in Trainer and TRL runs: one line trains in the complement, and a resumed run gives the same bits."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from safelora import SafeLoraError
from safelora.salora import SaLoraCallback, Subspaces, export_checkpoint, initialize, subspaces_of
from tests.safelora.salora.models import MODES, SAFETY, TASK, logits, subspaces
from tests.safelora.test_callback import Tokens

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"


def trainer(base: Any, out: Path, callback: Any, **options: Any) -> Trainer:
    torch.manual_seed(7)
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_dropout=0.1, target_modules="all-linear"))
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 2e-2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    arguments = TrainingArguments(out, report_to=[], disable_tqdm=True, use_cpu=True, seed=1, **{**settings, **options})
    return Trainer(tuned, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[callback])


def leak(tensors: dict[str, torch.Tensor], found: Subspaces) -> float:
    """The largest of the adapter on disk, as stock PEFT would apply it."""
    worst = 0.0
    for name, U in found.bases.items():
        b, a = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "BA")
        if (b @ a).any():
            worst = max(worst, float((U.double().t() @ b @ a).norm() / (b @ a).norm()))
    return worst


@pytest.mark.parametrize("mode", MODES)
def test_a_run_and_its_resumption(base, found, mode, tmp_path):
    run = trainer(base, tmp_path / "run", callback := SaLoraCallback(found, mode=mode))
    assert float((logits(run.model) - logits(base)).abs().max()) <= 1e-6
    run.train()
    live = logits(run.model)
    run.save_model()
    resumed = trainer(base, tmp_path / "run", SaLoraCallback(found, mode=mode))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    resumed.save_model(tmp_path / "resumed")
    first, second = (load_file(tmp_path / place / WEIGHTS) for place in ("run", "resumed"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert leak(first, found) <= 1e-5 and callback.report.leak <= 1e-5
    # What the trainer saves is a plain adapter of the original model, in every mode.
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run")
    assert float((logits(again) - live).abs().max()) <= 1e-5
    content = json.loads((tmp_path / "run" / "salora_report.json").read_text())
    assert len(content["modules"]) == 14 and content["mode"] == ("packed" if mode == "residual" else mode)
    export_checkpoint(tmp_path / "run" / "checkpoint-6", tmp_path / "exported")
    exported = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "exported")
    assert float((logits(exported) - live).abs().max()) <= 1e-5


def test_one_line_calibrates_too(base, tmp_path):
    callback = SaLoraCallback(safety_data=SAFETY, task_data=TASK, safety_rank=4, task_rank=5, exact=True)
    run = trainer(base, tmp_path, callback, max_steps=3, gradient_checkpointing=True)
    assert callback.subspaces is not None and callback.subspaces.mode == "packed"
    run.train()
    run.save_model()
    assert leak(load_file(tmp_path / WEIGHTS), callback.subspaces) <= 1e-5
    saved = Subspaces.load(tmp_path / "checkpoint-3")
    assert saved.fingerprint() == callback.subspaces.fingerprint()
    assert subspaces_of(run.model).fingerprint() == saved.fingerprint()
    again = trainer(base, tmp_path / "again", SaLoraCallback(tmp_path / "checkpoint-3"), max_steps=3)
    again.train()
    assert all(
        torch.equal(parameter, dict(run.model.named_parameters())[name])
        for name, parameter in trainer(
            base, tmp_path / "x", SaLoraCallback(saved), max_steps=3
        ).model.named_parameters()
        if "base_layer" in name
    )


def test_the_best_model_is_inside_too(base, found, tmp_path):
    callback = SaLoraCallback(found)
    run = trainer(
        base, tmp_path, callback, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    run.train()
    run.save_model()
    assert leak(load_file(tmp_path / WEIGHTS), found) <= 1e-5


def test_an_adapter_initialised_by_hand_is_taken_as_it_is(base, found, tmp_path):
    """Also by a callback that is added later and holds data, which has nothing to calibrate any more."""
    run = trainer(base, tmp_path, TrainerCallback(), max_steps=2)
    given = initialize(run.model, found, "plain")
    run.add_callback(callback := SaLoraCallback(safety_data=SAFETY))
    run.train()
    assert callback.subspaces is given and callback.report.leak <= 1e-5


def test_resuming_with_other_subspaces_is_refused(base, found, tmp_path):
    trainer(base, tmp_path, SaLoraCallback(found), max_steps=3).train()
    other = subspaces(base, safety_rank=3)
    run = trainer(base, tmp_path, SaLoraCallback(other))
    with pytest.raises(SafeLoraError, match="other subspaces"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("entry", ["peft_config", "PeftModel"])
def test_trl(base, found, entry, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.safelora.salora.test_calibrate import words_tokenizer

    config = LoraConfig(r=3, target_modules="all-linear")
    net = copy.deepcopy(base)
    callback = SaLoraCallback(found)
    run = trl.SFTTrainer(
        model=net if entry == "peft_config" else get_peft_model(net, config),
        args=trl.SFTConfig(
            str(tmp_path / "out"), max_steps=3, save_steps=3, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, bf16=False, learning_rate=5e-2, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list([{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(20)]),
        processing_class=words_tokenizer(),
        callbacks=[callback],
        **({"peft_config": config} if entry == "peft_config" else {}),
    )  # fmt: skip
    run.train()
    run.save_model()
    assert leak(load_file(tmp_path / "out" / WEIGHTS), found) <= 1e-5
    assert callback.report.leak <= 1e-5


def test_the_example(base, tmp_path, monkeypatch):
    """examples/stacks/trl_sft.py, as it is called."""
    pytest.importorskip("trl")
    from tests.safelora.salora.test_calibrate import words_tokenizer

    base.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f"w{n + 2} w{n + 3}"} for n in range(20)]
    for name in ("safety", "data"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = [str(tmp_path / name) for name in ("model", "data.jsonl", "out")]
    monkeypatch.setattr("sys.argv", ["trl_sft.py", *places, "--safety", str(tmp_path / "safety.jsonl")])
    runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples" / "stacks" / "trl_sft.py"))
    found = Subspaces.load(tmp_path / "out" / "checkpoint-10")
    spanned = [name for name, basis in found.bases.items() if len(basis) == basis.shape[1]]
    assert len(spanned) < 14
    assert len(found.bases) == 14 and leak(load_file(tmp_path / "out" / WEIGHTS), found) <= 1e-5


def test_errors(base, found, tmp_path):
    with pytest.raises(SafeLoraError, match="either subspaces, or safety_data"):
        SaLoraCallback()
    with pytest.raises(SafeLoraError, match="task_data: the subspaces are there"):
        SaLoraCallback(found, task_data=TASK)
    late = trainer(base, tmp_path, TrainerCallback())
    late.add_callback(SaLoraCallback(found, mode="packed"))
    with pytest.raises(SafeLoraError, match="when the Trainer is made"):
        late.train()
    plain = trainer(base, tmp_path, TrainerCallback(), max_steps=2, save_strategy="no")
    plain.add_callback(callback := SaLoraCallback(found))
    plain.train()
    assert callback.report.leak <= 1e-5 and callback.report.mode == "plain"
