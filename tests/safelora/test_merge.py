"""A projected adapter merged into its model: the weights are those of the dense formula, plain and quantised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from safelora import apply_safe_lora, project_adapter
from tests.safelora.test_peft import CASES, make
from tests.safelora.zoo import truth

pytestmark = pytest.mark.filterwarnings("ignore")
KERNEL = 1e-5
PROJECTED = 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Directory, base and aligned model of a tiny Llama with an adapter on all linear modules."""
    torch.manual_seed(17)
    root = tmp_path_factory.mktemp("merge")
    return root, *make(*CASES["llama all linear"], root)


def expected(root: Path, base: Any, aligned: Any, chosen: set[str]) -> dict[str, torch.Tensor]:
    """W_aligned + s·C·B·A in fp64 where a module was projected, W_aligned + s·B·A where it was not, by name."""
    tuned = PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter")
    weights = {}
    for name, layer in tuned.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        path = name.removeprefix("base_model.model.")
        W = [model.get_submodule(path).weight.detach().double() for model in (base, aligned)]
        lora_A, lora_B = (getattr(layer, factor)["default"].weight.detach().double() for factor in ("lora_A", "lora_B"))
        if path in chosen:
            lora_B = truth(*W, lora_B, lora_A)[0]
        weights[f"{path}.weight"] = W[1] + layer.scaling["default"] * lora_B @ lora_A
    return weights


def check(merged: Any, aligned: Any, wanted: dict[str, torch.Tensor], bound: float) -> None:
    """Adapted weights within `bound` of the update's norm; all others the aligned model's, to the bit."""
    before = aligned.state_dict()
    assert not any("lora" in name for name in merged.state_dict())
    for name, weight in merged.state_dict().items():
        if name in wanted:
            update = wanted[name] - before[name].double()
            assert float((weight.double() - wanted[name]).norm() / update.norm()) <= bound, name
        else:
            assert torch.equal(weight.to(before[name].dtype), before[name]), name


def test_offline(models: tuple[Path, Any, Any], tmp_path: Path) -> None:
    root, base, aligned = models
    report = project_adapter(root / "adapter", root / "base", root / "aligned", tmp_path / "out", num_layers=PROJECTED)
    chosen = {module.name for module in report.projected}
    assert len(chosen) == PROJECTED < len(report.modules)
    wanted = expected(root, base, aligned, chosen)
    merged = PeftModel.from_pretrained(copy.deepcopy(aligned).double(), tmp_path / "out").double().merge_and_unload()
    check(merged, aligned, wanted, 2 * KERNEL)
    assert len(wanted) == len(report.modules)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_live(models: tuple[Path, Any, Any], safe_merge: bool) -> None:
    """In fp32, where the merge itself rounds W + s·B'·A: to half a unit of W, measured against the update."""
    root, base, aligned = models
    model = PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter")
    report = apply_safe_lora(model, root / "base", num_layers=PROJECTED)
    wanted = expected(root, base, aligned, {module.name for module in report.projected})
    tokens = torch.randint(3, 29, (2, 7))
    with torch.no_grad():
        before = model(tokens)[0]
        merged = model.merge_and_unload(safe_merge=safe_merge)
        after = merged(tokens)[0]
    rounding = max(
        float(torch.finfo(torch.float32).eps * weight.norm() / (weight - aligned.state_dict()[name]).norm())
        for name, weight in wanted.items()
    )
    check(merged, aligned, wanted, 2 * KERNEL + 2 * rounding)
    assert float((after - before).norm() / before.norm()) <= 1e-5


QUANTISED = {
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_live_on_a_quantised_model(models: tuple[Path, Any, Any], kind: str) -> None:
    """PEFT dequantises, adds the update and quantises again: what results is as near to the dense truth as the format
    allows, that is as the truth itself after a round trip through the format."""
    import bitsandbytes as bnb
    from peft.utils.integrations import dequantize_module_weight

    root, base, aligned = models
    held = AutoModelForCausalLM.from_pretrained(root / "aligned", quantization_config=QUANTISED[kind], device_map="cpu")
    layer_type = bnb.nn.Linear8bitLt if kind == "8 bit" else bnb.nn.Linear4bit
    start = {
        name: dequantize_module_weight(layer).detach().double()
        for name, layer in held.named_modules()
        if isinstance(layer, layer_type)
    }
    model = PeftModel.from_pretrained(held, root / "adapter")
    report = apply_safe_lora(model, root / "base", aligned=root / "aligned", num_layers=PROJECTED)
    assert len(report.projected) == PROJECTED and len(start) >= len(report.modules)
    assert not any("quantised in memory" in warning for warning in report.warnings)
    wanted = expected(root, base, aligned, {module.name for module in report.projected})
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_modules())
    for name, weight in wanted.items():
        path = name.removesuffix(".weight")
        update = weight - aligned.get_parameter(name).detach().double()
        target = start[path] + update
        layer = merged.get_submodule(path)
        assert isinstance(layer, layer_type)
        found = dequantize_module_weight(layer).detach().double()
        floor = float((round_trip(target, kind) - target).norm())
        assert float((found - target).norm()) <= 1.02 * floor, name
        assert floor < float(update.norm()) and float((found - start[path]).norm()) > 0.5 * float(update.norm())
    kept = [path for path in start if f"{path}.weight" not in wanted]
    for path in kept:
        assert torch.equal(dequantize_module_weight(merged.get_submodule(path)).double(), start[path])


def round_trip(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight after it was stored in the format."""
    import bitsandbytes.functional as F

    exact = weight.float().contiguous()
    if kind == "nf4":
        return F.dequantize_4bit(*F.quantize_4bit(exact, quant_type="nf4")).double()
    scale = exact.abs().amax(1, keepdim=True)
    return ((exact * 127 / scale).round() * scale / 127).double()
