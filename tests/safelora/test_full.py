"""Updates that are no B·A: modules_to_save, biases and trained tokens of adapters, and whole fine-tuned models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import safelora.measure
import safelora.offline
import safelora.weights
from safelora import SafeLoraError, project_adapter, project_model
from tests.safelora.test_stream import Mapped
from tests.safelora.zoo import factors, llama_modules, llama_tensors, shifted, write_adapter, write_checkpoint
from tests.safelora.zoo_models import gpt2, gpt_oss, llama, mixtral, save_model, save_pair

PREFIX = "base_model.model."
KERNEL = 1e-5
COSINE = 1e-6


def dense(base: torch.Tensor, aligned: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(W_aligned + C·ΔW, cosine of ΔW and C·ΔW) in fp64, for d_out × n matrices; V may have other columns than ΔW."""
    V = aligned.double() - base.double()
    return project(V, aligned.double(), tuned.double())


def project(V: torch.Tensor, start: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, float]:
    delta = tuned - start
    after = V @ (V.T @ delta) / V.norm()
    return start + after, float((after * delta).sum() / (after.norm() * delta.norm()))


def close(got: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    """The error relative to the projected update, beyond the rounding of the stored sum."""
    rounding = torch.finfo(got.dtype).eps * float(expected.norm())
    assert float((got.double() - expected).norm()) <= KERNEL * float((expected - start.double()).norm()) + rounding


@pytest.fixture
def extras(tmp_path, pair):
    """An adapter with a head, an embedding, a bias, trained tokens and a new head; the models are llama-like."""
    base, aligned = pair
    for side in (base, aligned):
        side["model.layers.0.self_attn.q_proj.bias"] = torch.randn(24)
    write_checkpoint(tmp_path / "b", base)
    write_checkpoint(tmp_path / "a", aligned)
    given = {
        **factors(llama_modules()),
        f"{PREFIX}lm_head.weight": torch.randn(31, 24),
        f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": torch.randn(24),
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(3, 24),
        f"{PREFIX}score.weight": torch.randn(2, 24),
        f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.bias": torch.randn(8),
    }
    write_adapter(tmp_path / "adapter", given, trainable_token_indices=[4, 30, 7])
    return given, (base, aligned)


@pytest.mark.parametrize("panel", [1 << 24, 24 * 5])
@pytest.mark.parametrize("rank", [512, 7])
def test_tensors_tuned_in_full(tmp_path, extras, monkeypatch, panel, rank):
    """Each is projected as ΔW = W_ft − W_aligned, whatever the panels."""
    monkeypatch.setattr(safelora.weights, "PANEL_ELEMENTS", panel)
    monkeypatch.setattr(safelora.weights, "MAX_RANK", rank)
    given, (base, aligned) = extras
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "b", tmp_path / "a", tmp_path / "out", threshold=1, modules_to_save="project"
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    kinds = {module.name: (module.kind, module.decision) for module in report.modules if module.kind != "linear"}
    assert kinds == {
        "lm_head.weight": ("full", "projected"),
        "model.layers.0.self_attn.q_proj.bias": ("bias", "projected"),
        "model.embed_tokens.weight": ("tokens", "projected"),
        "score.weight": ("full", "skipped"),
        "model.layers.1.self_attn.v_proj.lora_B.bias": ("bias", "skipped"),
    }
    cosines = {module.name: module.cosine for module in report.modules}
    head = f"{PREFIX}lm_head.weight"
    expected, cosine = dense(base["lm_head.weight"], aligned["lm_head.weight"], given[head])
    close(written[head], expected, aligned["lm_head.weight"])
    assert cosines["lm_head.weight"] == pytest.approx(cosine, abs=COSINE)

    bias = f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
    key = "model.layers.0.self_attn.q_proj.bias"
    expected, cosine = dense(base[key][:, None], aligned[key][:, None], given[bias][:, None])
    close(written[bias][:, None], expected, aligned[key][:, None])
    assert cosines[key] == pytest.approx(cosine, abs=COSINE)

    tokens = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    embedding = aligned["model.embed_tokens.weight"].double()
    V = (embedding - base["model.embed_tokens.weight"].double()).T
    expected, cosine = project(V, embedding[[4, 30, 7]].T, given[tokens].double().T)
    close(written[tokens].T, expected, embedding[[4, 30, 7]].T)
    assert cosines["model.embed_tokens.weight"] == pytest.approx(cosine, abs=COSINE)

    left = {f"{PREFIX}score.weight", f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.bias"}
    assert set(report.passed_through) == left
    for name in left:
        assert torch.equal(written[name], given[name])
        assert any(name in warning for warning in report.warnings)
    assert report.options["modules_to_save"] == "project"


def test_by_default_they_are_copied(tmp_path, extras):
    given, _ = extras
    report = project_adapter(tmp_path / "adapter", tmp_path / "b", tmp_path / "a", tmp_path / "out", threshold=1)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    left = [name for name in given if ".lora_A" not in name and ".lora_B.weight" not in name]
    assert sorted(report.passed_through) == sorted(left)
    assert "unprojected" in report.warnings[0]
    for name in left:
        assert torch.equal(written[name], given[name])


def test_unselected_ones_keep_their_bits(tmp_path, extras):
    given, _ = extras
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "b", tmp_path / "a", tmp_path / "out", num_layers=2, modules_to_save="project"
    )
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(report.projected) == 2
    changed = [name for name in given if not torch.equal(written[name], given[name])]
    assert len(changed) == 2


@pytest.mark.filterwarnings("ignore")
def test_as_peft_saves_them(tmp_path):
    """modules_to_save and trainable_token_indices written by PEFT, found without help."""
    aligned = llama()()
    save_pair(aligned, tmp_path)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[3, 9])
    tuned = get_peft_model(copy.deepcopy(aligned), config)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1,
        modules_to_save="project",
    )  # fmt: skip
    kinds = sorted(module.kind for module in report.modules if module.decision == "projected")
    assert kinds == ["full", "linear", "linear", "tokens"]


# Whole models


def tuned_from(tensors: dict[str, torch.Tensor], seed: int = 5) -> dict[str, torch.Tensor]:
    return shifted(tensors, scale=0.05, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("panel", [1 << 24, 24 * 5])
def test_a_fine_tuned_llama(tmp_path, monkeypatch, dtype, panel):
    """Every linear weight, wide (down_proj) or tall (up_proj, lm_head), in panels of any width; the rest as it was."""
    monkeypatch.setattr(safelora.weights, "PANEL_ELEMENTS", panel)
    base = {name: tensor.to(dtype) for name, tensor in llama_tensors().items()}
    aligned = shifted(base)
    tuned = tuned_from(aligned)
    write_checkpoint(tmp_path / "tuned", tuned, shards=3)
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    report = project_model(
        tmp_path / "tuned", write_checkpoint(tmp_path / "base", base, shards=2),
        write_checkpoint(tmp_path / "aligned", aligned), tmp_path / "out", threshold=1,
    )  # fmt: skip
    assert len(report.projected) == len(report.modules) == 13
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_text() == (tmp_path / "tuned" / index).read_text()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    written = {}
    for shard in sorted((tmp_path / "tuned").glob("*.safetensors")):
        written |= load_file(tmp_path / "out" / shard.name)
    assert set(written) == set(tuned)
    cosines = {module.name: module.cosine for module in report.modules}
    for name, tensor in written.items():
        assert tensor.dtype == dtype
        if name in cosines:
            expected, cosine = dense(base[name], aligned[name], tuned[name])
            close(tensor, expected, aligned[name])
            assert cosines[name] == pytest.approx(cosine, abs=COSINE)
        else:
            assert torch.equal(tensor, tuned[name])
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(report.passed_through)
    assert "The weight of 13 of 13 modules was projected" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SafeLoraError, match="projected already"):
        project_model(tmp_path / "out", tmp_path / "base", tmp_path / "aligned", threshold=1, dry_run=True)


@pytest.mark.parametrize("build", [gpt2(), gpt_oss(), mixtral()], ids=["gpt2", "gpt_oss", "mixtral"])
def test_fine_tuned_models_of_other_layouts(tmp_path, build):
    """Conv1D stores d_in × d_out, gpt_oss (experts, d_in, d_out), Mixtral one tensor per expert."""
    models = [build()]
    for _ in range(2):
        models.append(copy.deepcopy(models[-1]))
        with torch.no_grad():
            for weight in models[-1].parameters():
                weight.add_(torch.randn_like(weight) * 0.03)
    for name, model in zip(("base", "aligned", "tuned"), models, strict=True):
        save_model(model, tmp_path / name)
    report = project_model(tmp_path / "tuned", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "aligned", "tuned", "out")]
    changed = 0
    for name, tensor in stored[3].items():
        if torch.equal(tensor, stored[2][name]):
            assert name in report.passed_through
            continue
        turned = "transformer.h" in name or (".experts." in name and tensor.ndim == 3)
        views = [side[name] if tensor.ndim == 3 else side[name][None] for side in stored]
        for base, aligned, tuned, got in zip(*views, strict=True):
            sides = [side.T if turned else side for side in (base, aligned, tuned, got)]
            expected, cosine = dense(*sides[:3])
            close(sides[3], expected, sides[1])
            assert any(abs(module.cosine - cosine) < COSINE for module in report.modules)
            changed += 1
    assert changed == len(report.projected)
    type(models[0]).from_pretrained(tmp_path / "out")


def write_three(tmp_path: Path) -> list[Path]:
    base = llama_tensors()
    aligned = shifted(base)
    tensors = {"tuned": tuned_from(aligned), "base": base, "aligned": aligned}
    return [write_checkpoint(tmp_path / name, part) for name, part in tensors.items()]


def test_some_weights_of_a_model(tmp_path):
    """num_layers, include and exclude; what is not selected keeps its bits."""
    paths = write_three(tmp_path)
    report = project_model(*paths, tmp_path / "out", num_layers=2, include=r"layers\.\d", exclude="norm|layers.0.mlp")
    assert len(report.modules) == 10
    assert len(report.projected) == 2
    before, after = (load_file(root / "model.safetensors") for root in (paths[0], tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {module.name for module in report.projected}
    lowest = sorted(report.modules, key=lambda module: module.cosine)[:2]
    assert {module.name for module in lowest} == changed


def test_a_dry_run_of_a_model_writes_nothing(tmp_path):
    paths = write_three(tmp_path)
    report = project_model(*paths, threshold=0.5, dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aligned", "base", "tuned"]
    assert 0 < len(report.projected) <= len(report.modules)
    full = project_model(*paths, tmp_path / "out", threshold=0.5)
    assert full.modules == report.modules
    assert json.loads((tmp_path / "out" / "safelora_report.json").read_text())["inputs"]["model"]["source"]


def test_what_is_read_of_a_model_at_once_does_not_grow_with_its_layers(tmp_path, monkeypatch):
    """Weights are mapped batch by batch, and of the fine-tuned model one at a time."""
    size = 4 * 24 * 40
    monkeypatch.setattr(safelora.measure, "BATCH_BYTES", 2 * size)
    monkeypatch.setattr(safelora.offline, "READ_AHEAD_BYTES", 4 * size)
    for layers in (3, 12):
        base = llama_tensors(layers=layers)
        aligned = shifted(base)
        paths = [
            write_checkpoint(tmp_path / f"{name}{layers}", tensors)
            for name, tensors in (("tuned", tuned_from(aligned)), ("base", base), ("aligned", aligned))
        ]
        mapped = Mapped(monkeypatch)
        project_model(*paths, tmp_path / f"out{layers}", threshold=1)
        assert mapped.peak <= 4 * size + 2 * size
        assert mapped.now == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: paths.__setitem__(0, paths[2]), "the fine-tuned model and aligned are the same"),
        (lambda paths: paths.__setitem__(1, paths[2]), "base and aligned are the same"),
    ],
)
def test_models_that_are_one(tmp_path, change, message):
    paths = write_three(tmp_path)
    change(paths)
    with pytest.raises(SafeLoraError, match=message):
        project_model(*paths, tmp_path / "out", threshold=1)


def test_models_that_cannot_be_projected(tmp_path):
    paths = write_three(tmp_path)
    with pytest.raises(SafeLoraError, match="none is chosen"):
        project_model(*paths, tmp_path / "out", threshold=1, include="no such")
    with pytest.raises(SafeLoraError, match="regular expressions"):
        project_model(*paths, tmp_path / "out", threshold=1, include="(")
    with pytest.raises(SafeLoraError, match="inputs are never changed"):
        project_model(*paths, paths[0], threshold=1, overwrite=True)
    tensors = tuned_from(shifted(llama_tensors()))
    tensors["model.layers.1.self_attn.v_proj.weight"][1, 1] = torch.nan
    bad = write_checkpoint(tmp_path / "bad", tensors)
    with pytest.raises(SafeLoraError, match=r"v_proj.weight holds 1 NaN"):
        project_model(bad, *paths[1:], tmp_path / "out", threshold=1)
    assert not (tmp_path / "out").exists()
