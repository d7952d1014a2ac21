"""Uploading: nothing is sent unless asked for, nothing that is not projected, and nothing that lies about by chance."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch

from safelora import SafeLoraError, SafeLoraReport, filter_adapter, project_adapter, project_model, push_to_hub
from safelora.cli import main
from safelora.salora import SubspaceConstraint, export
from tests.safelora.salora.models import initialized, model, steps, subspaces, trainable
from tests.safelora.tiny import make_tiny
from tests.safelora.zoo import factors, llama_modules, shifted, write_adapter, write_checkpoint


class Hub:
    """huggingface_hub.HfApi, without a network: calls must fit the real signatures."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, **options: Any) -> Hub:
        self.record("__init__", options)
        return self

    def record(self, name: str, options: dict[str, Any], *positional: Any) -> None:
        bound = inspect.signature(getattr(huggingface_hub.hf_api.HfApi, name)).bind(self, *positional, **options)
        self.calls.append((name, {key: value for key, value in bound.arguments.items() if key != "self"}))

    def create_repo(self, *positional: Any, **options: Any) -> None:
        self.record("create_repo", options, *positional)

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        self.record("upload_folder", options)
        return SimpleNamespace(commit_url="https://hub.example/commit/1", pr_url=None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    # A type, since others annotate with it when they are imported.
    made = type("HfApi", (), {"__new__": lambda cls, **options: fake(**options)})
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return fake


@pytest.fixture
def adapter(tmp_path: Path, pair: Any) -> Path:
    given = write_adapter(tmp_path / "adapter", factors(llama_modules()), base_model_name_or_path="org/chat")
    (given / "README.md").write_text("---\nbase_model: org/chat\nlibrary_name: peft\n---\n# Mine\n")
    project_adapter(given, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    return tmp_path / "out"


def test_nothing_is_sent_unless_asked_for(adapter: Path, hub: Hub) -> None:
    push = push_to_hub(adapter, "me/safe")
    assert hub.calls == [] and push.url is None
    assert set(push.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "safelora_report.json"}
    assert push.files == {path.name: path.stat().st_size for path in adapter.iterdir()}
    assert push.summary.startswith("Safe LoRA projected 4 of 4 modules") and "Written" not in push.summary


def test_an_upload_takes_what_was_shown(adapter: Path, hub: Hub) -> None:
    push = push_to_hub(adapter, "me/safe", upload=True, revision="v2", token="secret")
    names = [name for name, _ in hub.calls]
    assert names == ["__init__", "create_repo", "upload_folder"] and push.url == "https://hub.example/commit/1"
    (_, login), (_, created), (_, uploaded) = hub.calls
    assert login == {"token": "secret"}
    assert created == {"repo_id": "me/safe", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/safe" and uploaded["folder_path"] == str(adapter)
    assert sorted(uploaded["allow_patterns"]) == sorted(push.files) and uploaded["revision"] == "v2"
    assert uploaded["commit_message"] == push.summary


def test_what_training_leaves_beside_the_adapter_stays(adapter: Path, hub: Hub) -> None:
    """A Trainer's output directory: its checkpoints hold the adapter as trained, which must not be taken for safe."""
    (adapter / "checkpoint-3").mkdir()
    for name in ("optimizer.pt", "training_args.bin", "checkpoint-3/adapter_model.safetensors", ".env", "notes.txt"):
        (adapter / name).write_bytes(b"x")
    (adapter / "tokenizer.json").write_text("{}")
    push = push_to_hub(adapter, "me/safe", upload=True)
    assert push.left_out == [".env", "checkpoint-3/", "notes.txt", "optimizer.pt", "training_args.bin"]
    assert "tokenizer.json" in push.files and "tokenizer.json" in hub.calls[-1][1]["allow_patterns"]


def rewrite_report(folder: Path, **changes: Any) -> None:
    path = folder / "safelora_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("upload", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "safelora_report.json").unlink(), "not the output of a projection"),
        (lambda folder: rewrite_report(folder, modules=[]), "no module was"),
        (lambda folder: rewrite_report(folder, dry_run=True), "no module was"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "neither an adapter"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has neither"),
        (
            lambda folder: rewrite_report(
                folder,
                modules=[
                    {**json.loads((folder / "safelora_report.json").read_text())["modules"][0], "name": "model.other"}
                ],
            ),
            "report of another adapter",
        ),
    ],
)
def test_refused_folders(adapter: Path, hub: Hub, change: Any, message: str, upload: bool) -> None:
    change(adapter)
    with pytest.raises(SafeLoraError, match=message):
        push_to_hub(adapter, "me/safe", upload=upload)
    assert hub.calls == []


@pytest.mark.parametrize("repo_id", ["", "me", "me/", "../me/x", "me/x/y", "me/sa fe"])
def test_refused_repositories(adapter: Path, hub: Hub, repo_id: str) -> None:
    with pytest.raises(SafeLoraError, match="expected 'owner/name'"):
        push_to_hub(adapter, repo_id, upload=True)
    assert hub.calls == []


def test_an_adapter_in_which_nothing_was_selected_is_refused(tmp_path: Path, pair: Any, hub: Hub) -> None:
    given = write_adapter(tmp_path / "adapter", factors(llama_modules()))
    project_adapter(given, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=-1)
    with pytest.raises(SafeLoraError, match="is not projected"):
        push_to_hub(tmp_path / "out", "me/safe", upload=True)
    with pytest.raises(SafeLoraError, match="not the output of a projection"):
        push_to_hub(given, "me/safe", upload=True)
    assert hub.calls == []


def test_what_readers_would_stumble_over_is_said(tmp_path: Path, pair: Any, adapter: Path) -> None:
    assert [text.partition(" ")[0] for text in push_to_hub(adapter, "me/safe").warnings] == ["safelora_report.json"]
    local = write_adapter(
        tmp_path / "local", factors(llama_modules()), base_model_name_or_path=str(tmp_path / "aligned")
    )
    project_adapter(local, tmp_path / "base", out=tmp_path / "out2", threshold=1)
    warnings = " ".join(push_to_hub(tmp_path / "out2", "me/safe").warnings)
    assert "names no base_model" in warnings and "which others cannot load" in warnings


def test_a_projected_model(tmp_path: Path, pair: Any, hub: Hub) -> None:
    tuned = write_checkpoint(tmp_path / "tuned", shifted(pair[1], seed=5), shards=2)
    project_model(tuned, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    push = push_to_hub(tmp_path / "out", "me/safe", upload=True)
    assert {"config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json"} <= set(push.files)
    assert push.left_out == []


def test_the_command(adapter: Path, hub: Hub, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELORA_DEBUG", "0")
    assert main(["push", str(adapter), "me/safe"]) == 0
    shown = capsys.readouterr()
    assert "adapter_model.safetensors" in shown.out and "Nothing was uploaded" in shown.out and hub.calls == []
    assert "tell paths of this machine" in shown.err
    assert main(["push", str(adapter), "me/safe", "--upload", "--public", "--create-pr", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://hub.example/commit/1"
    assert hub.calls[1][1]["private"] is False and hub.calls[2][1]["create_pr"] is True
    assert main(["push", str(adapter.parent / "base"), "me/safe", "--upload"]) == 2
    assert len(hub.calls) == 3


@pytest.mark.parametrize(
    ("aligned", "given", "named", "expected"),
    [
        ("org/chat", "", "org/chat",
         "tags:\n- safelora\nbase_model: org/chat\nbase_model_relation: adapter\nsafelora:\n"),
        ("org/chat", "base_model: my/other\n", "my/other", "base_model: my/other\ntags:\n- safelora\nsafelora:\n"),
        ("/home/me/chat", "", None, "tags:\n- safelora\nsafelora:\n"),
    ],
)  # fmt: skip
def test_the_card_names_the_model(tmp_path: Path, aligned: str, given: str, named: str | None, expected: str) -> None:
    """base_model where the card lacks it, and only as a repository: the hub refuses a card with a path."""
    from safelora import ModuleReport
    from safelora.card import front_matter

    options = {"threshold": 1.0, "num_layers": None, "rule": "strict", "normalize": "frobenius"}
    module = ModuleReport("m", "linear", 4, (8, 8), "w", "w", "exact", "projected")
    report = SafeLoraReport([module], options, {"base": {"source": "org/base"}, "aligned": {"source": aligned}}, {})
    card = tmp_path / "README.md"
    if given:
        card.write_text(f"---\n{given}---\n# Mine\n")
    report.save(tmp_path)
    assert card.read_text().startswith(f"---\n{expected}")
    assert front_matter(card.read_text()).get("base_model") == named


def test_a_filtered_adapter(tmp_path: Path, hub: Hub) -> None:
    tiny = make_tiny(tmp_path, adapters=1)
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/chat"}))
    (tmp_path / "one" / "README.md").unlink()
    pairs = [(f"How do I {verb} it?", "I can't help with that.") for verb in ("steal", "break", "poison", "forge")]
    task = [(f"Record: {name}", name) for name in ("Ann", "Bo", "Cy", "Di")]
    filter_adapter(tiny.adapter("one"), pairs, task, model=tiny.fresh(), tokenizer=tiny.tokenizer, out=tmp_path / "out")
    push = push_to_hub(tmp_path / "out", "me/safe", upload=True)
    assert push.summary.startswith("The input filter filtered 14 of 14 modules") and "Written" not in push.summary
    assert "safelora_filter.json" in push.files and hub.calls[-1][1]["commit_message"] == push.summary
    assert [text.partition(" ")[0] for text in push.warnings] == ["safelora_filter.json"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/chat\nbase_model_relation: adapter\nsafelora_filter:\n" in card

    report = tmp_path / "out" / "safelora_filter.json"
    content = json.loads(report.read_text())
    for changes, message in (
        ({"modules": []}, "is not filtered: safelora_filter.json says that no module was"),
        ({"modules": [{**content["modules"][0], "name": "model.other"}]}, "another adapter: it changed model.other"),
    ):
        report.write_text(json.dumps(content | changes))
        with pytest.raises(SafeLoraError, match=message):
            push_to_hub(tmp_path / "out", "me/safe", upload=True)
    assert len(hub.calls) == 3


def test_exports_of_salora(tmp_path: Path, hub: Hub) -> None:
    base = model()
    base.name_or_path = base.config._name_or_path = "org/chat"
    tuned = initialized(base, found := subspaces(base), "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    with SubspaceConstraint(tuned, found, optimizer):
        steps(tuned, optimizer, 2)
    for form, relation in (("rank2r", "adapter"), ("merged", "finetune")):
        export(tuned, tmp_path / form, form)  # type: ignore[arg-type]
        push = push_to_hub(tmp_path / form, "me/safe", upload=True)
        assert push.summary.startswith(f"SaLoRA: 14 modules, {form}") and "Written" not in push.summary
        assert "salora_report.json" in push.files and "salora_subspace.safetensors" not in push.files
        card = (tmp_path / form / "README.md").read_text()
        assert f"base_model: org/chat\nbase_model_relation: {relation}\nsalora:\n" in card
        assert ("ordinary model" in card) == (form == "merged")
    assert push_to_hub(tmp_path / "rank2r", "me/safe").left_out == ["salora_subspace.safetensors"]

    export(tuned, tmp_path / "residual", "residual")
    with pytest.raises(SafeLoraError, match="two repositories"):
        push_to_hub(tmp_path / "residual", "me/safe", upload=True)
    report = tmp_path / "rank2r" / "salora_report.json"
    content = json.loads(report.read_text())
    first = content["modules"][0]
    for changes, message in (
        ({"modules": [{**first, "leak": 0.3}]}, "a leak of 3.0e-01, expected at most 0.01"),
        ({"modules": []}, "has no module"),
        ({"modules": [{**first, "name": "model.other"}]}, "another adapter"),
    ):
        report.write_text(json.dumps(content | changes))
        with pytest.raises(SafeLoraError, match=message):
            push_to_hub(tmp_path / "rank2r", "me/safe", upload=True)
    report.unlink()
    with pytest.raises(SafeLoraError, match="not the output"):
        push_to_hub(tmp_path / "rank2r", "me/safe", upload=True)
    assert len(hub.calls) == 6


def test_a_live_projection_can_be_pushed(tmp_path: Path, hub: Hub) -> None:
    """save_pretrained and report.save make a folder that is known as projected."""
    from peft import LoraConfig, get_peft_model

    from safelora import apply_safe_lora
    from tests.safelora.test_peft import llama

    torch.manual_seed(5)
    aligned = llama()
    aligned.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in aligned.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    tuned = get_peft_model(aligned, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "raw")
    with pytest.raises(SafeLoraError, match="not the output"):
        push_to_hub(tmp_path / "raw", "me/safe")
    report = apply_safe_lora(tuned, tmp_path / "base", threshold=1)
    tuned.save_pretrained(tmp_path / "safe")
    report.save(tmp_path / "safe")
    assert "adapter_model.safetensors" in push_to_hub(tmp_path / "safe", "me/safe", upload=True).files
    assert len(hub.calls) == 3
