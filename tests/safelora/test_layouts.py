"""Stored forms that only some versions and tools write: old PEFT expert layouts, fp8, MLX, torchtune, other names."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import safelora.weights
from safelora import (
    Adapter,
    Checkpoint,
    SafeLoraError,
    convert_adapter,
    plan_modules,
    project_adapter,
    project_model,
    push_to_hub,
)
from tests.safelora.zoo import (
    LLAMA_CONFIG,
    factors,
    llama_modules,
    llama_tensors,
    read_output,
    shifted,
    truth,
    write_adapter,
    write_checkpoint,
)  # fmt: skip
from tests.safelora.zoo_models import CASES as ZOO
from tests.safelora.zoo_models import llama, llava, mixtral, pair_of, randomised, save_model, save_pair

PREFIX = "base_model.model."
KERNEL = 1e-5
EXPERTS = "model.layers.0.mlp.experts"
TARGETS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# Expert stacks as older PEFT laid them out. The update of the stored (experts, d1, d2) parameter is written down from
# the source of each release: which of d1 and d2 lora_A's columns run over.
A_ON_SECOND = {
    ("0.17.1", False): False, ("0.17.1", True): False, ("0.18.1", False): False, ("0.18.1", True): False,
    ("0.19.0", False): False, ("0.19.0", True): True, ("0.19.1", False): True, ("0.19.1", True): False,
    ("0.21.2", False): True, ("0.21.2", True): False,
}  # fmt: skip
HIDDEN, EXPERT_COUNT, RANK = 24, 3, 2


def expert_tensors(transposed: bool, ffn: int) -> tuple[dict, dict]:
    shapes = {"gate_up_proj": (2 * ffn, HIDDEN), "down_proj": (HIDDEN, ffn)}
    base = {
        f"{EXPERTS}.{name}": torch.randn(EXPERT_COUNT, *(shape[::-1] if transposed else shape)) * 0.1
        for name, shape in shapes.items()
    }
    return base, {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in base.items()}


@pytest.mark.parametrize("ffn", [20, 24, 12], ids=["rectangular", "square down", "square gate_up"])
@pytest.mark.parametrize(
    ("release", "flagged", "model"),
    [
        (release, flagged, model)
        for release, flagged in A_ON_SECOND
        for model in (["gpt_oss"] if flagged else ["mixtral", "llama4_text"])
    ],
)
@pytest.mark.parametrize("alone", [False, True])
def test_expert_layouts_of_all_releases(tmp_path, release, flagged, model, ffn, alone):
    """For Mixtral (stored out × in), gpt_oss (in × out, flagged) and Llama 4 (in × out, not flagged)."""
    transposed = model != "mixtral"
    base, aligned = expert_tensors(transposed, ffn)
    given, updates = {}, {}
    names = ["down_proj"] if alone else ["gate_up_proj", "down_proj"]
    for depth, name in enumerate(reversed(names)):
        d1, d2 = base[f"{EXPERTS}.{name}"].shape[1:]
        of_a, of_b = (d2, d1) if A_ON_SECOND[release, flagged] else (d1, d2)
        stem = PREFIX + EXPERTS + ".base_layer" * depth
        a, b = torch.randn(EXPERT_COUNT * RANK, of_a), torch.randn(of_b, RANK * EXPERT_COUNT)
        given |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        updates[name] = stem
    config = {"model_type": model, "hidden_size": HIDDEN}
    settings = {**TARGETS, "target_parameters": [f"experts.{name}" for name in names]}
    if release >= "0.18":
        settings["peft_version"] = release
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given, **settings),
        write_checkpoint(tmp_path / "base", base, config=config),
        write_checkpoint(tmp_path / "aligned", aligned, config=config),
        tmp_path / "out", threshold=1,
    )  # fmt: skip
    written = read_output(tmp_path / "out")

    def update(tensors: dict, name: str) -> torch.Tensor:
        a, b = (tensors[f"{updates[name]}.lora_{factor}.weight"].double() for factor in "AB")
        a, b = a.reshape(EXPERT_COUNT, RANK, -1), b.reshape(-1, RANK, EXPERT_COUNT)
        formula = "ore,eri->eoi" if A_ON_SECOND[release, flagged] else "ore,eri->eio"
        return torch.einsum(formula, b, a)

    for name in names:
        delta, got = update(given, name), update(written, name)
        for expert in range(EXPERT_COUNT):
            V = aligned[f"{EXPERTS}.{name}"][expert].double() - base[f"{EXPERTS}.{name}"][expert].double()
            V, change, result = (part.T if transposed else part for part in (V, delta[expert], got[expert]))
            expected = V @ (V.T @ change) / V.norm()
            assert error_of(result, expected) <= KERNEL
            cosine = float((expected * change).sum() / (expected.norm() * change.norm()))
            (module,) = [m for m in report.modules if m.name == f"{EXPERTS}.{expert}.{name}"]
            assert module.cosine == pytest.approx(cosine, abs=1e-6)
            assert (module.kind, module.rank) == ("expert", RANK)


def test_experts_are_decided_one_by_one(tmp_path):
    """Of a stack only the chosen experts' columns change; the others keep their bits."""
    base, aligned = expert_tensors(False, 20)
    given = {
        f"{PREFIX}{EXPERTS}.lora_A.weight": torch.randn(EXPERT_COUNT * RANK, 20),
        f"{PREFIX}{EXPERTS}.lora_B.weight": torch.randn(HIDDEN, RANK * EXPERT_COUNT),
    }
    config = {"model_type": "mixtral", "hidden_size": HIDDEN}
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given, target_parameters=["down_proj"], peft_version="0.21.2"),
        write_checkpoint(tmp_path / "base", base, config=config),
        write_checkpoint(tmp_path / "aligned", aligned, config=config),
        tmp_path / "out", num_layers=1,
    )  # fmt: skip
    (chosen,) = report.projected
    index = int(chosen.name.split(".")[-2])
    key = f"{PREFIX}{EXPERTS}.lora_B.weight"
    columns = (given[key] != read_output(tmp_path / "out")[key]).any(0)
    assert columns.tolist() == [column % EXPERT_COUNT == index for column in range(RANK * EXPERT_COUNT)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (3, 20, 8)}, "fit none of its parameters"),
        ({"config": {"model_type": "unknown", "hidden_size": 7}}, "which dimension"),
        ({"names": {"w1": "gate_up_proj"}}, "wrapped 2 times|no tensor"),
        ({"targets": "experts.gate_up_proj"}, "expected a list"),
    ],
)
def test_refused_experts(tmp_path, change, message):
    base, aligned = expert_tensors(False, 20)
    if "names" in change:
        base, aligned = ({f"{EXPERTS}.odd": side[f"{EXPERTS}.down_proj"]} for side in (base, aligned))
    d_out = change.get("shape", (0, HIDDEN))[1]
    given = {}
    for stem in (EXPERTS, f"{EXPERTS}.base_layer"):
        given[f"{PREFIX}{stem}.lora_A.weight"] = torch.randn(6, 20 if stem == EXPERTS else HIDDEN)
        given[f"{PREFIX}{stem}.lora_B.weight"] = torch.randn(d_out if stem == EXPERTS else 40, 6)
    config = change.get("config", {"model_type": "mixtral", "hidden_size": HIDDEN})
    adapter = write_adapter(
        tmp_path / "adapter", given, target_parameters=change.get("targets", TARGETS["target_parameters"])
    )
    models = [write_checkpoint(tmp_path / name, side, config=config) for name, side in (("b", base), ("a", aligned))]
    with pytest.raises(SafeLoraError, match=message):
        project_adapter(adapter, *models, tmp_path / "out", threshold=1)


def test_experts_stacked_in_two_dimensions_are_refused(tmp_path):
    """dbrx: which dimension of w2 is the output depends on the model's code."""
    owner = "transformer.blocks.0.ffn.experts.mlp"
    base = {f"{owner}.{name}": torch.randn(60, HIDDEN) for name in ("w1", "v1", "w2")}
    given = {
        f"{PREFIX}{owner}.lora_A.weight": torch.randn(2, HIDDEN),
        f"{PREFIX}{owner}.lora_B.weight": torch.randn(60, 2),
    }
    config = {"model_type": "dbrx", "d_model": HIDDEN}
    with pytest.raises(SafeLoraError, match="stacked experts of dbrx"):
        project_adapter(
            write_adapter(tmp_path / "adapter", given, target_parameters=["mlp.w2"]),
            write_checkpoint(tmp_path / "b", base, config=config),
            write_checkpoint(tmp_path / "a", shifted(base), config=config),
            tmp_path / "out", threshold=1,
        )  # fmt: skip


# Fused modules

PARTS = {"qkv_proj": {"q": (0, 24), "k": (24, 32), "v": (32, 40)}, "gate_up_proj": {"gate": (0, 40), "up": (40, 80)}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("criterion", [{"threshold": 1}, {"num_layers": 4}])
def test_fused_modules_in_parts(tmp_path, criterion):
    """Phi-3 as PEFT saves it: every part has the V, the cosine and the decision of a module of its own."""
    base, aligned = pair_of(ZOO["phi3 fused qkv and gate_up"], tmp_path)
    config = LoraConfig(r=4, target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    tuned = randomised(get_peft_model(copy.deepcopy(aligned), config))
    tuned.save_pretrained(tmp_path / "adapter")
    given = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    models = (tmp_path / "base", tmp_path / "aligned")
    report = project_adapter(tmp_path / "adapter", *models, tmp_path / "out", split_fused=True, **criterion)
    written = read_output(tmp_path / "out")
    modules = {module.name: module for module in report.modules}
    assert len(modules) == 2 * (3 + 2 + 1) and report.options["split_fused"] is True
    for key, lora_B in given.items():
        if "lora_B" not in key:
            assert torch.equal(written[key], lora_B)
            continue
        path = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        lora_A = given[key.replace("lora_B", "lora_A")]
        weights = [model.get_submodule(path).weight.detach() for model in (base, aligned)]
        whole = {"": (0, lora_B.shape[0])}
        for part, (start, stop) in PARTS.get(path.rpartition(".")[2], whole).items():
            module = modules[f"{path}.{part}" if part else path]
            rows = slice(start, stop)
            expected, cosine, _ = truth(*(weight[rows] for weight in weights), lora_B[rows], lora_A)
            assert module.cosine == pytest.approx(cosine, abs=1e-6) and module.shape == (stop - start, lora_A.shape[1])
            if module.decision == "kept":
                assert torch.equal(written[key][rows], lora_B[rows])
            else:
                assert error_of(written[key][rows].double(), expected) <= KERNEL
    assert len(report.projected) == criterion.get("num_layers", len(modules))
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "out")
    assert torch.isfinite(loaded(torch.tensor([[3, 4, 5]])).logits).all()
    assert not push_to_hub(tmp_path / "out", "me/safe").url


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        ("gpt-neox fused qkv", {}, "interleave query, key and value by head"),
        ("gpt2 Conv1D", {}, "store them in columns"),
        ("llama all linear", {"target_modules": ["q_proj"]}, "nothing to split"),
        ("phi3 fused qkv and gate_up", {"heads": 5}, "do not divide into query"),
    ],
)
def test_fused_modules_that_cannot_be_split(tmp_path, case, config, message):
    _, aligned = pair_of(ZOO[case], tmp_path)
    lora = {**ZOO[case].lora, **({} if "heads" in config else config)}
    randomised(get_peft_model(aligned, LoraConfig(**lora))).save_pretrained(tmp_path / "adapter")
    if "heads" in config:
        place = tmp_path / "aligned" / "config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"num_attention_heads": config["heads"]}))
    with pytest.raises(SafeLoraError, match=message):
        project_adapter(
            tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", threshold=1, dry_run=True, split_fused=True
        )


# Conversions


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_transformers_4_on_experts(tmp_path):
    """One LoRA per expert and projection, named as the checkpoint is; PEFT fuses them when it loads them."""
    aligned = mixtral()()
    base = save_pair(aligned, tmp_path)
    shapes = {"w1": (40, HIDDEN), "w2": (HIDDEN, 40), "w3": (40, HIDDEN)}
    stem = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    given = factors({
        stem.format(layer, expert, name): shape
        for layer in range(2) for expert in range(3) for name, shape in shapes.items()
    })  # fmt: skip
    settings = {"target_modules": ["w1", "w2", "w3"], "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    adapter = write_adapter(tmp_path / "adapter", given, **settings)
    report = project_adapter(adapter, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert {module.matched for module in report.modules} == {"exact"}
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned).double(), tmp_path / "out").double().merge_and_unload()
    for layer in range(2):
        live = [model.model.layers[layer].mlp.experts for model in (base, aligned, loaded)]
        for expert in range(3):
            for name in shapes:
                matrices = [
                    side.down_proj[expert] if name == "w2" else side.gate_up_proj[expert].chunk(2)[name == "w3"]
                    for side in live
                ]
                W_base, W_aligned, W = (matrix.detach().double() for matrix in matrices)
                key = f"{PREFIX}{stem.format(layer, expert, name)}.lora_"
                b, a = (given[f"{key}{factor}.weight"].double() for factor in "BA")
                V = W_aligned - W_base
                assert error_of(W - W_aligned, 2 * V @ (V.T @ b @ a) / V.norm()) <= 2 * KERNEL


def test_one_expert_is_read_at_a_time(tmp_path):
    """An expert of a converted stack needs that expert's stored tensors only."""
    model = mixtral()()
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(**TARGETS))
    tuned.save_pretrained(tmp_path / "adapter")
    save_model(model, tmp_path / "model")
    plan = plan_modules(Adapter.open(tmp_path / "adapter"), Checkpoint.open(tmp_path / "model"), None)
    assert len(plan) == 2 * 2 * 3
    for planned in plan:
        _, _, layer, *_, expert, parameter = planned.module.name.split(".")
        wanted = {"gate_up_proj": ["w1", "w3"], "down_proj": ["w2"]}[parameter]
        stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        assert [part.name for part in planned.base.parts] == [f"{stem}.{name}.weight" for name in wanted]
        assert planned.base.how == "converted"


@pytest.mark.parametrize("text", ["language_model.model", "model.language_model", "model", "language_model"])
@pytest.mark.parametrize("vision", ["vision_tower.vision_model", "model.vision_tower.vision_model", "vision_tower"])
def test_generations_of_names(tmp_path, text, vision):
    """Adapters of a vision-language model as each transformers named its parts; towers never answer for the text."""
    save_model(llava(), tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    shapes = {f"{text}.layers.1.self_attn.v_proj": (8, 24), f"{vision}.encoder.layers.1.self_attn.v_proj": (16, 16)}
    plan = plan_modules(Adapter.open(write_adapter(tmp_path / "adapter", factors(shapes))), checkpoint, None)
    found = {"encoder" in planned.module.name: planned.base.info.name for planned in plan}
    layer = "layers.1.self_attn.v_proj.weight"
    assert found == {False: f"language_model.model.{layer}", True: f"vision_tower.encoder.{layer}"}
    lost = write_adapter(tmp_path / "lost", factors({f"{vision}.encoder.layers.7.self_attn.v_proj": (16, 16)}))
    with pytest.raises(SafeLoraError, match="no tensor for module"):
        plan_modules(Adapter.open(lost), checkpoint, None)


@pytest.mark.filterwarnings("ignore")
def test_without_transformers(tmp_path, monkeypatch):
    """Names alone find what needs no conversion; what does is refused with the remedy."""
    model = mixtral()()
    save_model(model, tmp_path / "base")
    for name, config in (("attention", {"target_modules": ["q_proj"]}), ("experts", TARGETS)):
        get_peft_model(copy.deepcopy(model), LoraConfig(**config)).save_pretrained(tmp_path / name)
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    checkpoint = Checkpoint.open(tmp_path / "base")
    plan = plan_modules(Adapter.open(tmp_path / "attention"), checkpoint, None)
    assert [planned.base.how for planned in plan] == ["exact"] * 2
    with pytest.raises(SafeLoraError, match="transformers 5 or later"):
        plan_modules(Adapter.open(tmp_path / "experts"), checkpoint, None)


@pytest.mark.filterwarnings("ignore")
def test_replicated_layers(tmp_path):
    """layer_replication as PEFT writes it: each layer of the enlarged stack is projected with its source's weights."""
    aligned = llama(num_hidden_layers=3)()
    base = save_pair(aligned, tmp_path)
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3], [0, 1]])
    tuned = randomised(get_peft_model(copy.deepcopy(aligned), config))
    tuned.save_pretrained(tmp_path / "adapter")
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1
    )
    assert len(report.projected) == 5
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "out")
    for layer, source in enumerate((0, 1, 1, 2, 0)):
        V = [model.model.layers[source].self_attn.q_proj.weight.detach().double() for model in (aligned, base)]
        V = V[0] - V[1]
        before, after = (
            model.base_model.model.model.layers[layer].self_attn.q_proj.get_delta_weight("default").detach().double()
            for model in (tuned, loaded)
        )
        # The deltas are products of fp32 factors, formed in fp32.
        assert error_of(after, V @ (V.T @ before) / V.norm()) <= KERNEL + 4 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["velora", "monteclora", "kasa", "bdlora"])
def test_variants_of_peft(tmp_path, variant):
    """Variants whose update is s·B·A keep their extra tensors bit for bit; the others are refused with the reason."""
    import peft

    options = {
        "velora": lambda: {"velora_config": peft.VeloraConfig(num_groups=2)},
        "monteclora": lambda: {"monteclora_config": peft.MontecloraConfig()},
        "kasa": lambda: {"kasa_config": peft.KasaConfig()},
        "bdlora": lambda: {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(target_modules_bd_a=["q_proj"])},
    }
    aligned = llama()()
    try:
        config = LoraConfig(r=4, target_modules=["q_proj"], **options[variant]())
    except AttributeError as error:
        pytest.skip(f"this PEFT has no such variant: {error}")
    save_pair(aligned, tmp_path)
    randomised(get_peft_model(aligned, config)).save_pretrained(tmp_path / "adapter")
    arguments = (tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    if variant in ("kasa", "bdlora"):
        with pytest.raises(SafeLoraError, match="KaSA|BD-LoRA"):
            project_adapter(*arguments, threshold=1)
        return
    report = project_adapter(*arguments, threshold=1)
    assert len(report.projected) == 2
    given, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    for name, tensor in given.items():
        assert torch.equal(written[name], tensor) != name.endswith("lora_B.weight")


# fp8


def to_fp8(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> tuple[dict, dict]:
    """(what is stored, what it stands for in fp64) with one scale per block of every projection."""
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"_proj\.|\.w\d\.", name):
            stored[name] = meant[name] = tensor
            continue
        rows, cols = (-(-size // b) for size, b in zip(tensor.shape, block, strict=True))
        scale = torch.rand(rows, cols) + 0.5
        wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: tensor.shape[0], : tensor.shape[1]]
        stored[name] = (tensor / wide * 64).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale / 64
        meant[name] = stored[name].double() * (wide / 64).double()
    return stored, meant


def fp8_config(block: tuple[int, int], **config) -> dict:
    return {**LLAMA_CONFIG, **config, "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}


@pytest.mark.parametrize("block", [(8, 8), (16, 5), (24, 24)])
@pytest.mark.parametrize("panel", [1 << 24, 24 * 7])
def test_fp8_models(tmp_path, monkeypatch, block, panel):
    """Tiles that do not divide the weight, panels that do not divide the tiles, ranks of several calls."""
    monkeypatch.setattr(safelora.weights, "PANEL_ELEMENTS", panel)
    base = llama_tensors()
    sides = [to_fp8(side, block) for side in (base, shifted(base))]
    given = factors(llama_modules(names=("q_proj", "v_proj")), rank=5)
    report = project_adapter(
        write_adapter(tmp_path / "adapter", given),
        *(write_checkpoint(tmp_path / name, stored, config=fp8_config(block))
          for name, (stored, _) in zip("ba", sides, strict=True)),
        tmp_path / "out", threshold=1,
    )  # fmt: skip
    assert any("fp8" in warning for warning in report.warnings)
    for module in report.modules:
        b, a = (given[f"{PREFIX}{module.name}.lora_{factor}.weight"] for factor in "BA")
        weights = [meant[f"{module.name}.weight"].float() for _, meant in sides]
        expected, cosine, v_norm = truth(*weights, b, a)
        assert error_of(read_output(tmp_path / "out")[f"{PREFIX}{module.name}.lora_B.weight"], expected) <= KERNEL
        assert module.cosine == pytest.approx(cosine, abs=1e-6)
        assert module.v_norm == pytest.approx(v_norm, rel=1e-6)


def test_fp8_base_and_aligned_of_a_full_fine_tune(tmp_path, monkeypatch):
    monkeypatch.setattr(safelora.weights, "PANEL_ELEMENTS", 24 * 7)
    base = llama_tensors()
    sides = [to_fp8(side, (8, 8)) for side in (base, shifted(base))]
    tuned = shifted({name: tensor.float() for name, tensor in sides[1][1].items()}, scale=0.05, seed=4)
    report = project_model(
        write_checkpoint(tmp_path / "tuned", tuned),
        *(write_checkpoint(tmp_path / name, stored, config=fp8_config((8, 8)))
          for name, (stored, _) in zip("ba", sides, strict=True)),
        tmp_path / "out", threshold=1, include="_proj",
    )  # fmt: skip
    written = load_file(tmp_path / "out" / "model.safetensors")
    for module in report.modules:
        start = sides[1][1][module.name].double()
        V, delta = start - sides[0][1][module.name].double(), tuned[module.name].double() - start
        expected = V @ (V.T @ delta) / V.norm()
        rounding = torch.finfo(torch.float32).eps * float(written[module.name].norm())
        error = float((written[module.name].double() - start - expected).norm())
        assert error <= KERNEL * float(expected.norm()) + rounding


def test_fp8_experts_are_dequantised_before_they_are_merged(tmp_path):
    """A Mixtral stored in fp8, an expert's w1 and w3 joined to the rows of gate_up_proj."""
    model = mixtral()()
    tuned = randomised(get_peft_model(copy.deepcopy(model), LoraConfig(r=2, **TARGETS)))
    tuned.save_pretrained(tmp_path / "adapter")
    save_model(model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    settings = {key: value for key, value in fp8_config((8, 8)).items() if key == "quantization_config"}
    sides = [to_fp8(side, (8, 8)) for side in (plain, shifted(plain))]
    for name, (stored, _) in zip("ba", sides, strict=True):
        write_checkpoint(tmp_path / name, stored, config={**config, **settings})
    report = project_adapter(tmp_path / "adapter", tmp_path / "b", tmp_path / "a", tmp_path / "out", threshold=1)
    given, written = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), read_output(tmp_path / "out")
    key = f"{PREFIX}model.layers.1.mlp.experts.base_layer.lora_B.weight"
    for expert in range(3):
        stem = f"model.layers.1.block_sparse_moe.experts.{expert}"
        V = [torch.cat([meant[f"{stem}.{name}.weight"] for name in ("w1", "w3")]).double() for _, meant in sides]
        V = V[1] - V[0]
        expected = V @ (V.T @ given[key].reshape(-1, 2, 3)[:, :, expert].double()) / V.norm()
        assert error_of(written[key].reshape(-1, 2, 3)[:, :, expert], expected) <= KERNEL
    assert len(report.projected) == 12


@pytest.mark.parametrize(
    ("block", "side", "message"),
    [((8, 8), "one", "mostly rounding"), ((7, 9), "grid", "does not fit"), ((8, 8), "unscaled", "quantised weight")],
)
def test_refused_fp8(tmp_path, block, side, message):
    base = llama_tensors()
    sides = [to_fp8(part, (8, 8))[0] for part in (base, shifted(base))]
    if side == "unscaled":
        sides = [{name: t for name, t in part.items() if not name.endswith("_inv")} for part in sides]
    configs = [fp8_config(block)] * 2
    if side == "one":
        sides[0], configs[0] = base, LLAMA_CONFIG
    if side == "grid":
        for part in sides:
            part |= {
                name: t[:2, :2].contiguous() for name, t in part.items() if name.endswith("v_proj.weight_scale_inv")
            }
            part |= {name: torch.ones(5, 7) for name in part if name.endswith("q_proj.weight_scale_inv")}
    with pytest.raises(SafeLoraError, match=message):
        project_adapter(
            write_adapter(tmp_path / "adapter", factors(llama_modules())),
            *(write_checkpoint(tmp_path / name, part, config=config)
              for name, part, config in zip("ba", sides, configs, strict=True)),
            tmp_path / "out", threshold=1,
        )  # fmt: skip


# Adapters of other tools


def mlx_adapter(root: Path, given: dict[str, torch.Tensor], **config) -> Path:
    """What MLX-LM writes: transposed factors, names without a prefix, a scale."""
    root.mkdir()
    tensors = {}
    for name, tensor in given.items():
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        tensors[f"{module}.lora_{'a' if 'A' in rest else 'b'}"] = tensor.T.contiguous()
    save_file(tensors, root / "adapters.safetensors", {"format": "mlx"})
    content = {
        "fine_tune_type": "lora", "num_layers": 16, "model": "org/aligned",
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}, **config,
    }  # fmt: skip
    (root / "adapter_config.json").write_text(json.dumps(content))
    return root


def test_mlx(tmp_path, pair):
    given = factors(llama_modules())
    root = mlx_adapter(tmp_path / "mlx", given)
    with pytest.raises(SafeLoraError, match="safelora convert"):
        project_adapter(root, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert convert_adapter(root, tmp_path / "peft") == "mlx"
    converted = read_output(tmp_path / "peft")
    assert set(converted) == set(given)
    assert all(torch.equal(converted[name], tensor) for name, tensor in given.items())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 80.0, "org/aligned")
    report = project_adapter(tmp_path / "peft", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    assert len(report.projected) == 4
    with pytest.raises(SafeLoraError, match="not an empty directory"):
        convert_adapter(root, tmp_path / "peft")


@pytest.mark.filterwarnings("ignore")
def test_mlx_update_as_peft_loads_it(tmp_path):
    """W + scale · (lora_a lora_b)ᵀ is what the converted adapter adds, in exactly the tuned modules."""
    model = llama(num_hidden_layers=3)()
    given = factors({"model.layers.2.self_attn.v_proj": (8, 24), "model.layers.2.mlp.down_proj": (24, 40)})
    convert_adapter(mlx_adapter(tmp_path / "mlx", given), tmp_path / "peft")
    before = {name: weight.clone() for name, weight in model.double().state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path / "peft").double().merge_and_unload().state_dict()
    changed = {name for name, weight in merged.items() if not torch.equal(weight, before[name])}
    assert changed == {"model.layers.2.self_attn.v_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    for name in changed:
        stem = f"{PREFIX}{name.removesuffix('.weight')}.lora_"
        a, b = (given[f"{stem}{factor}.weight"].double().T for factor in "AB")
        torch.testing.assert_close(merged[name] - before[name], 20 * (a @ b).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"fine_tune_type": "dora"}, "dora"),
        ({}, {"fine_tune_type": "full"}, "full"),
        ({}, {"lora_parameters": {"rank": 4}}, "no scale"),
        ({"model.layers.0.self_attn.q_proj.m": torch.ones(24)}, {}, "no factor"),
        ({"model.layers.0.mlp.switch_mlp.up_proj.lora_a": torch.ones(3, 4, 24)}, {}, "stacked experts"),
        ({"model.layers.0.mlp.up_proj.lora_a": torch.ones(24, 3)}, {}, "ranks"),
    ],
)
def test_refused_mlx(tmp_path, changes, config, message):
    root = mlx_adapter(tmp_path / "mlx", factors(llama_modules()), **config)
    save_file({**load_file(root / "adapters.safetensors"), **changes}, root / "adapters.safetensors")
    with pytest.raises(SafeLoraError, match=message):
        convert_adapter(root, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def torchtune_adapter(root: Path, given: dict[str, torch.Tensor], heads: dict[str, int], **extra) -> Path:
    """What torchtune writes: its own names, q and k in rotary pairs (row 2j + k of a head is row k·half + j)."""
    names = {"self_attn": "attn", "o_proj": "output_proj", "up_proj": "w3", "down_proj": "w2", "gate_proj": "w1"}
    tensors = {}
    for name, tensor in given.items():
        module, _, rest = name.removeprefix(f"{PREFIX}model.").partition(".lora_")
        leaf = module.rpartition(".")[2]
        if rest[0] == "B" and leaf in heads:
            size = tensor.shape[0] // heads[leaf]
            half = size // 2
            order = [h * size + k * half + j for h in range(heads[leaf]) for j in range(half) for k in range(2)]
            tensor = tensor[order]
        path = ".".join(names.get(part, part) for part in module.split("."))
        tensors[f"{path}.lora_{rest[0].lower()}.weight"] = tensor.clone()
    root.mkdir()
    torch.save({**tensors, **extra}, root / "adapter_model.pt")
    content = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
    (root / "adapter_config.json").write_text(json.dumps(content))
    return root


def test_torchtune(tmp_path, pair):
    shapes = {**llama_modules(names=("q_proj", "k_proj", "v_proj", "o_proj")), "model.layers.0.mlp.up_proj": (40, 24)}
    given = factors(shapes)
    root = torchtune_adapter(tmp_path / "tune", given, {"q_proj": 3, "k_proj": 1})
    with pytest.raises(SafeLoraError, match="safelora convert"):
        project_adapter(root, tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1)
    with pytest.raises(SafeLoraError, match="give the model"):
        convert_adapter(root, tmp_path / "peft")
    assert convert_adapter(root, tmp_path / "peft", model=tmp_path / "aligned") == "torchtune"
    converted = read_output(tmp_path / "peft")
    assert set(converted) == set(given)
    assert all(torch.equal(converted[name], tensor) for name, tensor in given.items())
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 16)
    report = project_adapter(tmp_path / "peft", tmp_path / "base", out=tmp_path / "out", threshold=1)
    assert len(report.projected) == len(shapes)


def test_refused_torchtune(tmp_path, pair):
    given = factors(llama_modules())
    dora = torchtune_adapter(tmp_path / "dora", given, {}, **{"layers.0.attn.q_proj.magnitude": torch.ones(24)})
    with pytest.raises(SafeLoraError, match="DoRA"):
        convert_adapter(dora, tmp_path / "peft", model=tmp_path / "aligned")
    odd = torchtune_adapter(tmp_path / "odd", given, {}, **{"layers.0.attn.sinks.lora_a": torch.ones(4, 24)})
    with pytest.raises(SafeLoraError, match="not known"):
        convert_adapter(odd, tmp_path / "peft", model=tmp_path / "aligned")
    other = write_checkpoint(tmp_path / "other", pair[0], config={"model_type": "phi3"})
    with pytest.raises(SafeLoraError, match="row order"):
        convert_adapter(odd, tmp_path / "peft", model=other)
    with pytest.raises(SafeLoraError, match="needs no conversion"):
        convert_adapter(write_adapter(tmp_path / "peft adapter", given), tmp_path / "peft")
    with pytest.raises(SafeLoraError, match="is not a directory"):
        convert_adapter(tmp_path / "absent", tmp_path / "peft")
