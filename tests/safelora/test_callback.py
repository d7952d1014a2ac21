"""The callback in a real Trainer run: the final save is safe, checkpoints are raw, and faults show before training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from safelora import SafeLoraCallback, SafeLoraError, project_adapter
from tests.safelora.test_peft import llama

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Base and aligned model on disk; the aligned one in memory."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("models")
    model = llama()
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(root / "aligned")
    return root, model


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, 29, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trainer(models: tuple[Path, Any], out: Path, callback: Any, **options: Any) -> Trainer:
    torch.manual_seed(7)
    model = get_peft_model(copy.deepcopy(models[1]), LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 5e-2, **options}
    arguments = TrainingArguments(
        out, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True, seed=1, **settings
    )
    return Trainer(
        model, arguments, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[callback] if callback else None
    )


def test_the_final_save_is_safe_and_checkpoints_are_raw(models, tmp_path):
    raw = trainer(models, tmp_path / "raw", None)
    raw.train()
    raw.save_model()
    callback = SafeLoraCallback(
        models[0] / "base", num_layers=2, safe_checkpoints=True, report_files=(tmp_path / "report.html",)
    )
    safe = trainer(models, tmp_path / "safe", callback)
    safe.train()
    safe.save_model()
    pair = (models[0] / "base", models[0] / "aligned")
    for step in ("checkpoint-3", "checkpoint-6"):
        plain, kept = (load_file(tmp_path / name / step / WEIGHTS) for name in ("raw", "safe"))
        assert all(torch.equal(plain[name], kept[name]) for name in plain)
        report = project_adapter(tmp_path / "raw" / step, *pair, tmp_path / f"offline-{step}", num_layers=2)
        expected = load_file(tmp_path / f"offline-{step}" / WEIGHTS)
        copied = load_file(tmp_path / "safe" / step / "safelora" / WEIGHTS)
        assert all(torch.equal(expected[name], copied[name]) for name in expected)
    final = load_file(tmp_path / "safe" / WEIGHTS)
    assert all(torch.equal(expected[name], final[name]) for name in expected)
    assert callback.report is not None
    assert [m.cosine for m in callback.report.modules] == [m.cosine for m in report.modules]
    assert json.loads((tmp_path / "safe" / "safelora_report.json").read_text())["num_projected"] == 2
    assert (tmp_path / "report.html").stat().st_size > 1000
    for place in (tmp_path / "safe", tmp_path / "safe" / "checkpoint-3" / "safelora"):
        with pytest.raises(SafeLoraError, match="projected already"):
            project_adapter(place, *pair, threshold=1, dry_run=True)
    callback.report.undo()
    unprojected = load_file(tmp_path / "raw" / WEIGHTS)
    assert all(
        torch.equal(safe.model.get_parameter(name.replace(".weight", ".default.weight")), tensor)
        for name, tensor in unprojected.items()
    )


def test_the_best_model_is_the_one_that_is_projected(models, tmp_path):
    callback = SafeLoraCallback(models[0] / "base", threshold=1)
    run = trainer(
        models, tmp_path / "out", callback, load_best_model_at_end=True, eval_strategy="steps", eval_steps=3,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert not (best / "safelora").exists()
    project_adapter(best, models[0] / "base", models[0] / "aligned", tmp_path / "offline", threshold=1)
    run.save_model()
    expected, final = (load_file(place / WEIGHTS) for place in (tmp_path / "offline", tmp_path / "out"))
    assert all(torch.equal(expected[name], final[name]) for name in expected)


def test_faults_show_before_training(models, tmp_path):
    shallow = llama()
    del shallow.model.layers[1]
    cases = [
        (SafeLoraCallback(tmp_path / "nowhere", threshold=1), "does not exist"),
        (SafeLoraCallback(models[0] / "base"), "exactly one criterion"),
        (SafeLoraCallback(shallow, threshold=1), r"model\.layers\.1\.self_attn"),
    ]
    for callback, message in cases:
        run = trainer(models, tmp_path / "out", callback)
        with pytest.raises(SafeLoraError, match=message):
            run.train()
        assert run.state.global_step == 0


def test_a_failure_at_the_end_keeps_what_was_trained(models, tmp_path):
    """The base vanishes during training: nothing unsafe takes the final place, nothing trained is lost."""
    import shutil

    shutil.copytree(models[0] / "base", tmp_path / "base")
    run = trainer(models, tmp_path / "out", SafeLoraCallback(tmp_path / "base", threshold=1), save_strategy="no")
    begin = run.callback_handler.on_step_end

    def vanish(*arguments: Any) -> Any:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        return begin(*arguments)

    run.callback_handler.on_step_end = vanish
    with pytest.raises(SafeLoraError, match="NOT projected, was saved to .*unprojected"):
        run.train()
    saved = load_file(tmp_path / "out" / "unprojected" / WEIGHTS)
    assert all(
        torch.equal(run.model.get_parameter(name.replace(".weight", ".default.weight")), tensor)
        for name, tensor in saved.items()
    )
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_trl(models, tmp_path):
    """SFTTrainer makes the PeftModel itself, after the callback has been given to it."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="trl needs datasets")
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(26))])}
    plain = Tokenizer(token_models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"w{n} w{n + 1} w{n + 2}"}) + "\n" for n in range(20)))
    callback = SafeLoraCallback(models[0] / "base", threshold=1)
    run = trl.SFTTrainer(
        model=copy.deepcopy(models[1]),
        args=trl.SFTConfig(
            str(tmp_path / "out"), max_steps=3, save_steps=3, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, bf16=False, learning_rate=5e-2, gradient_checkpointing=False,
        ),
        train_dataset=datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=tmp_path / "cache"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
        callbacks=[callback],
    )  # fmt: skip
    run.train()
    run.save_model()
    assert len(callback.report.projected) == 4
    pair = (models[0] / "base", models[0] / "aligned")
    project_adapter(tmp_path / "out" / "checkpoint-3", *pair, tmp_path / "offline", threshold=1)
    expected, final = (load_file(place / WEIGHTS) for place in (tmp_path / "offline", tmp_path / "out"))
    assert all(torch.equal(expected[name], final[name]) for name in expected)
