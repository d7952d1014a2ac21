"""Exports: every form computes what the live model does, in stock PEFT and transformers, and none is unprojected."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from safelora import SafeLoraError, project_adapter
from safelora.adapter import Adapter
from safelora.salora import (
    SubspaceConstraint,
    Subspaces,
    calibrate,
    export,
    export_checkpoint,
    initialize,
    restore,
    subspaces_of,
)
from tests.safelora.salora.models import (
    MODES,
    SAFETY,
    TASK,
    adapter,
    initialized,
    logits,
    steps,
    subspaces,
    trainable,
)
from tests.safelora.test_peft import gpt2

pytestmark = pytest.mark.filterwarnings("ignore")
SCALINGS = {"alpha": {"lora_alpha": 7}, "rslora": {"lora_alpha": 7, "use_rslora": True}}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 11}}


@pytest.fixture(scope="module")
def folder(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model on disk."""
    place = tmp_path_factory.mktemp("base")
    base.save_pretrained(place)
    return place


def trained(base: Any, found: Subspaces, mode: Any, **options: Any) -> Any:
    tuned = initialized(base, found, mode, **options)
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2, weight_decay=0.1)
    with SubspaceConstraint(tuned, found, optimizer):
        steps(tuned, optimizer, 4)
    return tuned


def reload(form: str, place: Path, base: Any) -> Any:
    """By stock PEFT and transformers alone."""
    if form == "rank2r":
        return PeftModel.from_pretrained(copy.deepcopy(base), place)
    if form == "residual":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), place / "adapter")
    return AutoModelForCausalLM.from_pretrained(place)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scaling", [*SCALINGS.values(), PATTERNS], ids=[*SCALINGS, "patterns"])
def test_all_forms_agree_with_the_live_forward(base, found, mode, scaling, tmp_path):
    tuned = trained(base, found, mode, **scaling)
    live = logits(tuned)
    assert float((live - logits(base)).abs().max()) > 1e-3
    kept = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    for form in ("rank2r", "residual", "merged"):
        if form == "residual" and mode == "plain":
            with pytest.raises(SafeLoraError, match="no residual base"):
                export(tuned, tmp_path / form, form)
            continue
        report = export(tuned, tmp_path / form, form)
        again = reload(form, tmp_path / form, base)
        assert float((logits(again) - live).abs().max()) <= 1e-5
        assert report.leak <= 1e-6 and len(report.modules) == 14
        content = json.loads((tmp_path / form / "salora_report.json").read_text())
        assert content["modules"][0]["leak"] == report.modules[0].leak and content["form"] == form
        assert "salora:" in (tmp_path / form / "README.md").read_text()
    config = json.loads((tmp_path / "rank2r" / "adapter_config.json").read_text())
    factor = 1 if mode == "plain" else 2
    assert config["r"] == 3 * factor and config["peft_type"] == "LORA"
    alpha = math.sqrt(factor) if config["use_rslora"] else factor
    assert config["lora_alpha"] == pytest.approx(alpha * scaling.get("lora_alpha", 7))
    assert all(torch.equal(kept[name], parameter) for name, parameter in tuned.named_parameters())
    tensors = load_file(tmp_path / "rank2r" / "adapter_model.safetensors")
    assert {key.rsplit(".", 2)[1] for key in tensors} == {"lora_A", "lora_B"}


def test_the_update_on_disk_stays_out_of_the_subspace(base, found, tmp_path):
    export(trained(base, found, "packed"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, U in found.bases.items():
        b, a = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "BA")
        change = b @ a
        assert float((U.double().t() @ change).norm()) <= 1e-6 * float(change.norm())


def test_an_adapter_trained_without_the_constraint_is_never_written_as_it_is(base, found, tmp_path):
    tuned = initialized(base, found, "plain")
    steps(tuned, torch.optim.AdamW(trainable(tuned), lr=1e-2), 5)
    report = export(tuned, tmp_path / "out")
    assert max(module.leak_before for module in report.modules) > 0.1 and report.leak <= 1e-6
    assert "without the constraint" in " ".join(report.warnings)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, U in found.bases.items():
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert float((U.t() @ B).norm()) <= 1e-6 * float(B.norm())


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_on_disk_exports_as_the_live_model_does(base, folder, found, mode, tmp_path):
    tuned = trained(base, found, mode)
    tuned.peft_config["default"].base_model_name_or_path = str(folder)
    tuned.save_pretrained(tmp_path / "checkpoint")
    subspaces_of(tuned).save(tmp_path / "checkpoint")
    live = logits(tuned)
    for form in ("rank2r", "merged", "residual")[: 2 if mode == "plain" else 3]:
        report = export_checkpoint(tmp_path / "checkpoint", tmp_path / form, form)
        assert float((logits(reload(form, tmp_path / form, base)) - live).abs().max()) <= 1e-5
        assert report.leak <= 1e-6
    export(tuned, tmp_path / "from the live model")
    ours, theirs = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("rank2r", "from the live model")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    configs = [
        json.loads((tmp_path / place / "adapter_config.json").read_text())
        for place in ("rank2r", "from the live model")
    ]
    assert all(configs[0][key] == configs[1][key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"))


@pytest.mark.parametrize("mode", ["packed", "residual"])
def test_an_export_is_an_ordinary_adapter_for_everyone(base, found, mode, tmp_path):
    """Safe LoRA projects it, training goes on from it, adapters are merged, swapped and combined."""
    tuned = trained(base, found, mode)
    live = logits(tuned)
    export(tuned, tmp_path / "first")
    assert [module.rank for module in Adapter.open(tmp_path / "first").modules] == [6] * 14
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", is_trainable=True)
    restore(again, Subspaces.load(tmp_path / "first"))
    optimizer = torch.optim.AdamW(trainable(again), lr=1e-2)
    constraint = SubspaceConstraint(again, subspaces_of(again), optimizer)
    steps(again, optimizer, 2)
    assert max(constraint.leaks().values()) <= 1e-5
    export(again, tmp_path / "second")
    swapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    hotswap_adapter(swapped, tmp_path / "second", adapter_name="default")
    assert float((logits(swapped) - logits(again)).abs().max()) <= 1e-5
    merged = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    merged.merge_adapter()
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    merged.unmerge_adapter()
    assert float((logits(merged) - live).abs().max()) <= 1e-5
    both = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", adapter_name="a")
    both.load_adapter(tmp_path / "second", adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mix", combination_type="cat")
    both.set_adapter("mix")
    for name, U in found.bases.items():
        layer = both.base_model.model.get_submodule(name)
        change = (layer.lora_B["mix"].weight @ layer.lora_A["mix"].weight).double()
        assert float((U.double().t() @ change).norm()) <= 1e-5 * float(change.norm())
    shifted = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in shifted.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    shifted.save_pretrained(tmp_path / "unaligned")
    base.save_pretrained(tmp_path / "aligned")
    report = project_adapter(
        tmp_path / "first", tmp_path / "unaligned", tmp_path / "aligned", threshold=1, dry_run=True
    )
    assert len(report.projected) == 14


def test_mixed_adapters_keep_what_lies_outside(base, tmp_path):
    found = subspaces(base, LoraConfig(target_modules=["q_proj", "lm_head"]))
    for mode in ("packed", "residual"):
        tuned = trained(base, found, mode, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
        report = export(tuned, tmp_path / mode)
        assert {"lm_head"} < set(report.outside) and "guarantee" in report.warnings[0]
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / mode)
        assert float((logits(again) - logits(tuned)).abs().max()) <= 1e-5
        with pytest.raises(SafeLoraError, match="only form='rank2r'"):
            export(tuned, tmp_path / "merged", "merged")


def test_conv1d(tmp_path):
    torch.manual_seed(2)
    net = gpt2().eval()
    found = calibrate(net, ["c_attn", "c_fc"], SAFETY, TASK, safety_rank=3, task_rank=4)
    for mode in ("packed", "residual"):
        tuned = trained(net, found, mode, target_modules=["c_attn", "c_fc"])
        for form in ("rank2r", "residual", "merged"):
            export(tuned, tmp_path / mode / form, form)
            again = reload(form, tmp_path / mode / form, net)
            assert float((logits(again) - logits(tuned)).abs().max()) <= 1e-5


def test_the_output_is_whole_or_not_there(base, found, tmp_path, monkeypatch):
    tuned = trained(base, found, "plain")
    monkeypatch.setattr(
        "safelora.salora.exporting.write_mention", lambda *_: (_ for _ in ()).throw(OSError(28, "no space"))
    )
    with pytest.raises(OSError, match="no space"):
        export(tuned, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export(tuned, tmp_path / "out")
    with pytest.raises(SafeLoraError, match="not empty"):
        export(tuned, tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    export(tuned, tmp_path / "out", overwrite=True, sidecar=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / "salora_subspace.safetensors").exists()
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_errors(base, found, tmp_path):
    tuned = trained(base, found, "plain")
    with pytest.raises(SafeLoraError, match="form must be"):
        export(tuned, tmp_path / "out", "other")
    with pytest.raises(SafeLoraError, match="no subspaces attached"):
        export(adapter(base), tmp_path / "out")
    with torch.no_grad():
        next(p for n, p in tuned.named_parameters() if "lora_B" in n)[0, 0] = torch.nan
    with pytest.raises(SafeLoraError, match="NaN"):
        export(tuned, tmp_path / "out")
    found.save(tmp_path)
    adapter(base).save_pretrained(tmp_path)
    with pytest.raises(SafeLoraError, match="how the adapter was initialised"):
        export_checkpoint(tmp_path, tmp_path / "out")
    dora = adapter(base, use_dora=True)
    with pytest.raises(SafeLoraError, match="DoRA"):
        initialize(dora, found)
    assert not (tmp_path / "out").exists()
