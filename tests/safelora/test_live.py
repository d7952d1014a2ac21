"""Safe LoRA on PeftModels in memory: the bits of the offline projection, the dense truth, and nothing else changed."""

from __future__ import annotations

import copy
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from safelora import LiveReport, SafeLoraError, apply_safe_lora, project_adapter, safe_lora_applied
from tests.safelora.test_peft import CASES, IDS, KV, SMALL, dense, llama, make
from tests.safelora.zoo import truth

pytestmark = pytest.mark.filterwarnings("ignore")
KERNEL = 1e-5


def live_model(aligned: Any, adapter: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(copy.deepcopy(aligned), adapter, **options)


def bits(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of the model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def numbers(report: Any) -> list[tuple[Any, ...]]:
    return [
        (module.name, module.cosine, module.margin, module.v_norm, module.shrinkage, module.decision, module.reason)
        for module in report.modules
    ]


def check_against_offline(aligned: Any, base: Any, root: Path) -> LiveReport:
    """Live from the directory and from a model equal the offline projection; undo gives the bits back."""
    offline = project_adapter(root / "adapter", root / "base", root / "aligned", root / "out", num_layers=2)
    written = load_file(root / "out" / "adapter_model.safetensors")
    report = None
    for source in (root / "base", base):
        model = live_model(aligned, root / "adapter")
        before = bits(model)
        report = apply_safe_lora(model, source, num_layers=2)
        assert numbers(report) == numbers(offline)
        # Whether the head is tied is in the model's configuration, which a model in memory is not asked for.
        told = [text for text in offline.serving if "shares with its embedding" not in text]
        assert [text.partition(":")[0] for text in told] == [text.partition(":")[0] for text in report.serving]
        factors = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert all(torch.equal(written[name], tensor) for name, tensor in factors.items())
        assert {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
        report.undo()
        assert same_bits(bits(model), before)
    assert report is not None
    return report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Directory, base and aligned model of a tiny Llama with an adapter on all linear modules."""
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("llama")
    return path, *make(*CASES["llama all linear"], path)


@pytest.fixture
def model(root: tuple[Path, Any, Any]) -> PeftModel:
    return live_model(root[2], root[0] / "adapter", is_trainable=True)


@pytest.mark.parametrize(
    "case",
    ["llama all linear", "llama rank and alpha pattern", "llama embeddings", "llama tied head", "llama modules_to_save",
     "gpt2 Conv1D", "gpt2 mixed with a linear head", "bert", "qwen2 biases"],
)  # fmt: skip
def test_live_gives_the_bits_of_the_offline_projection(tmp_path, case):
    base, aligned = make(*CASES[case], tmp_path)
    report = check_against_offline(aligned, base, tmp_path)
    _, cosines = dense(base, aligned, tmp_path / "adapter")
    assert {module.name: pytest.approx(module.cosine, abs=1e-6) for module in report.modules} == cosines


def test_experts_of_one_parameter(tmp_path):
    config = MixtralConfig(**SMALL, **KV, **IDS, num_local_experts=3, num_experts_per_tok=2)
    targets = {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "lora_dropout": 0.0,
    }
    base, aligned = make(lambda: MixtralForCausalLM(config), targets, tmp_path)
    model = live_model(aligned, tmp_path / "adapter")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "parameter_name")}
    before = {name: layer.get_delta_weight("default").detach().double() for name, layer in layers.items()}
    report = apply_safe_lora(model, tmp_path / "base", threshold=1)
    assert sum(module.kind == "expert" for module in report.modules) == 2 * 2 * 3
    for name, layer in layers.items():
        path = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weights = [m.get_parameter(f"{path}.{layer.parameter_name}").detach().double() for m in (base, aligned)]
        V = weights[1] - weights[0]
        for expert, delta in enumerate(before[name]):
            # Mixtral computes x Wᵀ: dimension 1 of the stack is the output.
            expected = V[expert] @ (V[expert].T @ delta) / V[expert].norm()
            got = layer.get_delta_weight("default")[expert].detach().double()
            assert float((got - expected).norm() / expected.norm()) < 2 * KERNEL
    report.undo()
    check_against_offline(aligned, base, tmp_path)


class Mixed(torch.nn.Module):
    """A convolution, an attention whose projections are one parameter, and square layers of both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.attention = torch.nn.MultiheadAttention(6, 2)
        self.head = torch.nn.Linear(6, 6, bias=False)
        self.turned = Conv1D(6, 6)


def test_convolutions_and_attention_of_a_plain_torch_model():
    base = Mixed()
    aligned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in aligned.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    model = get_peft_model(aligned, LoraConfig(r=2, target_modules=["conv", "attention", "head", "turned"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight))
    before = bits(model)
    report = apply_safe_lora(model, base, threshold=1)
    assert {module.name for module in report.projected} == {
        "conv", "attention", "attention.base_layer.out_proj", "head", "turned",
    }  # fmt: skip
    after = bits(model)
    for module in report.modules:
        stem = f"base_model.model.{module.name}"
        factors = [before[f"{stem}.lora_{factor}.default.weight"].flatten(1) for factor in "BA"]
        owner = module.name.replace(".base_layer", "")
        kind = "in_proj_weight" if module.name == "attention" else "weight"
        weight = base.get_parameter(f"{owner}.{kind}").detach().flatten(1)
        held = next(before[name] for name in (f"{stem}.base_layer.{kind}", f"{stem}.{kind}") if name in before).flatten(
            1
        )
        if module.name == "turned":
            weight, held = weight.T, held.T
        expected, cosine, v_norm = truth(weight, held, *factors)
        got = after[f"{stem}.lora_B.default.weight"].flatten(1).double()
        assert float((got - expected).norm() / expected.norm()) < KERNEL
        assert module.cosine == pytest.approx(cosine, abs=1e-6) and module.v_norm == pytest.approx(v_norm, rel=1e-6)


def test_only_the_chosen_adapter_changes(root, model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".other." in name:
                weight.normal_()
    before = bits(model)
    report = apply_safe_lora(model, root[0] / "base", threshold=1, adapter_name="other")
    changed = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert len(report.projected) == 2
    assert changed == {f"base_model.model.{m.name}.lora_B.other.weight" for m in report.projected}
    # The active one is still "default", and it has not been projected.
    assert len(apply_safe_lora(model, root[0] / "base", threshold=1).projected) == 14
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SafeLoraError, match="2 adapters are active"):
        apply_safe_lora(model, root[0] / "base", threshold=1)
    with pytest.raises(SafeLoraError, match="no adapter 'third'"):
        apply_safe_lora(model, root[0] / "base", threshold=1, adapter_name="third")


def test_a_disabled_adapter_is_projected_all_the_same(root, model):
    reference = numbers(apply_safe_lora(live_model(root[2], root[0] / "adapter"), root[0] / "base", num_layers=3))
    model.base_model.disable_adapter_layers()
    assert numbers(apply_safe_lora(model, root[0] / "base", num_layers=3)) == reference


def test_training_goes_on(root, model):
    """The version counters tell autograd of the change, and the optimizer keeps its state."""
    tokens = torch.randint(3, 29, (4, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    step()
    stale = model(input_ids=tokens, labels=tokens).loss
    moments = {id(p): s["exp_avg"].clone() for p, s in optimizer.state.items()}
    report = apply_safe_lora(model, root[0] / "base", threshold=1)
    assert all(torch.equal(state["exp_avg"], moments[id(p)]) for p, state in optimizer.state.items())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    factor = model.get_parameter(f"base_model.model.{report.projected[0].name}.lora_B.default.weight")
    assert factor.is_leaf and factor.requires_grad
    losses = [step() for _ in range(12)]
    assert losses[-1] < losses[0]
    with pytest.raises(SafeLoraError, match="have changed since"):
        report.undo()
    report.undo(force=True)
    adapter = load_file(root[0] / "adapter" / "adapter_model.safetensors")
    assert float((factor - adapter[f"base_model.model.{report.projected[0].name}.lora_B.weight"]).abs().max()) < 0.1


def test_undo_then_again_gives_the_same_bits(root, model):
    before = bits(model)
    report = apply_safe_lora(model, root[0] / "base", num_layers=5)
    after = bits(model)
    with pytest.raises(SafeLoraError, match="projected already"):
        apply_safe_lora(model, root[0] / "base", num_layers=5)
    versions = {name: weight._version for name, weight in model.named_parameters()}
    report.undo()
    report.undo()
    assert same_bits(bits(model), before)
    stepped = {name for name, weight in model.named_parameters() if weight._version != versions[name]}
    assert stepped == {f"base_model.model.{module.name}.lora_B.default.weight" for module in report.projected}
    apply_safe_lora(model, root[0] / "base", num_layers=5)
    assert same_bits(bits(model), after)
    again = apply_safe_lora(model, root[0] / "base", num_layers=5, allow_projected=True)
    assert any("second time" in warning for warning in again.warnings)


def test_context_restores_even_after_an_error(root, model):
    before = bits(model)

    def fail_inside() -> None:
        with safe_lora_applied(model, root[0] / "base", threshold=1) as report:
            assert len(report.projected) == 14
            assert not same_bits(bits(model), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert same_bits(bits(model), before)
    apply_safe_lora(model, root[0] / "base", threshold=1)


def test_dry_run_and_nothing_selected_change_nothing(root, model):
    before = bits(model)
    report = apply_safe_lora(model, root[0] / "base", threshold=1, dry_run=True)
    assert len(report.projected) == 14 and report.dry_run
    assert apply_safe_lora(model, root[0] / "base", threshold=-1).projected == []
    report.undo()
    assert same_bits(bits(model), before)


def test_report_files_and_the_mark_of_a_saved_adapter(root, model, tmp_path):
    report = apply_safe_lora(model, root[0] / "base", num_layers=4)
    model.save_pretrained(tmp_path / "saved")
    report.save(tmp_path / "saved")
    report.save(tmp_path / "report.html")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(report.to_json())["num_projected"] == 4
    assert "Safe LoRA" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(SafeLoraError, match="projected already"):
        project_adapter(tmp_path / "saved", root[0] / "base", root[0] / "aligned", threshold=1, dry_run=True)
    tokens = torch.randint(3, 29, (2, 7))
    reloaded = live_model(root[2], tmp_path / "saved").eval()
    assert torch.equal(reloaded(tokens).logits, model.eval()(tokens).logits)


def test_bf16_models_and_rounded_ones(root, tmp_path):
    base, aligned = (copy.deepcopy(model).bfloat16() for model in root[1:])
    base.save_pretrained(tmp_path / "base")
    aligned.save_pretrained(tmp_path / "aligned")
    offline = project_adapter(root[0] / "adapter", tmp_path / "base", tmp_path / "aligned", threshold=1, dry_run=True)
    model = live_model(aligned, root[0] / "adapter", autocast_adapter_dtype=True)
    report = apply_safe_lora(model, tmp_path / "base", threshold=1, dry_run=True)
    assert numbers(report) == numbers(offline) and not report.warnings
    rounded = apply_safe_lora(model, root[0] / "base", threshold=1, dry_run=True)
    assert any("fewer bits" in warning for warning in rounded.warnings)
    exact = apply_safe_lora(model, root[0] / "base", aligned=root[0] / "aligned", threshold=1, dry_run=True)
    assert not exact.warnings
    assert numbers(exact) == numbers(
        project_adapter(root[0] / "adapter", root[0] / "base", root[0] / "aligned", threshold=1, dry_run=True)
    )


class Coarse(torch.nn.Parameter):
    """A weight that PEFT takes for one of torchao's: values rounded to multiples of 1/64."""

    def dequantize(self) -> torch.Tensor:
        return (self.detach() * 64).round() / 64


Coarse.__module__ = "torchao.testing"


def test_quantised_weights_are_dequantised_with_a_warning(root, model):
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith("q_proj.base_layer"):
                layer.weight = Coarse(layer.weight.detach(), requires_grad=False)
    before = bits(model)
    report = apply_safe_lora(model, root[0] / "base", threshold=1)
    warning = next(warning for warning in report.warnings if "quantised in memory" in warning)
    assert warning.startswith("2 adapted weights") and "Give `aligned`" in warning
    for module in report.modules:
        stem = f"base_model.model.{module.name}"
        held = before[f"{stem}.base_layer.weight"]
        held = (held * 64).round() / 64 if module.name.endswith("q_proj") else held
        factors = [before[f"{stem}.lora_{factor}.default.weight"] for factor in "BA"]
        weight = root[1].get_parameter(f"{module.name}.weight").detach()
        assert module.cosine == pytest.approx(truth(weight, held, *factors)[1], abs=1e-6)
    sound = apply_safe_lora(model, root[0] / "base", aligned=root[0] / "aligned", threshold=1, allow_projected=True)
    assert not any("quantised" in warning for warning in sound.warnings)


class Halved(torch.nn.Module):
    """A layer in the form of HQQ's: no weight, only a packed one and a way to unpack it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.W_q = torch.nn.Parameter(weight.half(), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        return self.W_q.float()


def test_layers_without_a_weight_are_dequantised_or_refused(root, model):
    held = {}
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            held[name.removeprefix("base_model.model.")] = layer.base_layer.weight.detach().half().float()
            layer.base_layer = Halved(layer.base_layer.weight.detach())
    before = bits(model)
    report = apply_safe_lora(model, root[0] / "base", threshold=1)
    assert any(warning.startswith("14 adapted weights are quantised") for warning in report.warnings)
    for module in report.modules:
        factors = [before[f"base_model.model.{module.name}.lora_{factor}.default.weight"] for factor in "BA"]
        weight = root[1].get_parameter(f"{module.name}.weight").detach()
        assert module.cosine == pytest.approx(truth(weight, held[module.name], *factors)[1], abs=1e-6)
    report.undo()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer = torch.nn.Module()
    layer.base_layer.qweight = torch.nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(SafeLoraError, match=r"layers\.0\.self_attn\.q_proj: its weight is quantised in a form"):
        apply_safe_lora(model, root[0] / "base", threshold=1)
    assert len(apply_safe_lora(model, root[0] / "base", threshold=1, aligned=root[0] / "aligned").projected) == 14


@pytest.mark.parametrize(
    "options", [{"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}, {"init_lora_weights": "mica"}]
)
def test_variants_that_are_still_ba(root, options):
    model = get_peft_model(copy.deepcopy(root[2]), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    before = bits(model)
    for module in apply_safe_lora(model, root[0] / "base", threshold=1).projected:
        stem = f"base_model.model.{module.name}"
        factors = [before[f"{stem}.lora_{factor}.default.weight"] for factor in "BA"]
        weights = [m.get_parameter(f"{module.name}.weight").detach() for m in root[1:]]
        expected, cosine, _ = truth(*weights, *factors)
        got = bits(model)[f"{stem}.lora_B.default.weight"].double()
        assert float((got - expected).norm() / expected.norm()) < KERNEL
        assert module.cosine == pytest.approx(cosine, abs=1e-6)


def test_inference_mode_and_training_after_it(root, model):
    with torch.inference_mode():
        report = apply_safe_lora(model, root[0] / "base", threshold=1)
    tokens = torch.randint(3, 29, (2, 7))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert len(report.projected) == 14
    report.undo()


def test_bitsandbytes_models_state_how_much_of_v_is_rounding(root, model):
    bnb = pytest.importorskip("bitsandbytes")
    base = copy.deepcopy(root[2])
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(torch.randn_like(weight) * 0.003)
    shares = []
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            exact = layer.base_layer.weight.detach()
            coarse = bnb.nn.Linear4bit(*reversed(exact.shape), bias=False, quant_type="nf4")
            coarse.weight = bnb.nn.Params4bit(exact, requires_grad=False, quant_type="nf4").to("cpu")
            held = bnb.functional.dequantize_4bit(coarse.weight.data, coarse.weight.quant_state)
            layer.base_layer = coarse
            V = held - base.get_parameter(f"{name.removeprefix('base_model.model.')}.weight").detach()
            shares.append(float(((held - exact).norm() / V.norm()) ** 2))
    report = apply_safe_lora(model, base, threshold=1)
    warning = next(warning for warning in report.warnings if "Params4bit" in warning)
    stated = int(warning.split("about ")[1].split("%")[0]) / 100
    assert stated == pytest.approx(statistics.median(shares), abs=0.1) and stated > 0.2


REFUSED = {
    "DoRA": (LoraConfig(target_modules=["q_proj"], use_dora=True), "DoRA"),
    "PiSSA": (LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"), "pissa"),
    "not LoRA": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "only LORA"),
    "tied factors": (
        LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True), "share their memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_updates_that_are_not_ba_are_refused(root, kind):
    config, message = REFUSED[kind]
    model = get_peft_model(llama(tie_word_embeddings=kind == "tied factors"), config)
    before = bits(model)
    with pytest.raises(SafeLoraError, match=message):
        apply_safe_lora(model, root[0] / "base", threshold=1)
    assert same_bits(bits(model), before)


def test_weights_changed_by_another_adapter_are_refused(root, model):
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(SafeLoraError, match="'second' was initialised with 'pissa'"):
        apply_safe_lora(model, root[0] / "base", threshold=1, adapter_name="default")


def test_merged_adapters_are_refused_until_unmerged(root, model):
    model.merge_adapter()
    before = bits(model)
    with pytest.raises(SafeLoraError, match="unmerge_adapter"):
        apply_safe_lora(model, root[0] / "base", threshold=1)
    assert same_bits(bits(model), before)
    model.unmerge_adapter()
    apply_safe_lora(model, root[0] / "base", threshold=1)


def test_what_is_no_peft_model_is_refused(root):
    with pytest.raises(SafeLoraError, match=r"expected a peft\.PeftModel, got LlamaForCausalLM"):
        apply_safe_lora(llama(), root[0] / "base", threshold=1)


def test_compiled_and_wrapped_models_are_unwrapped(root, model):
    compiled = torch.compile(model)
    inner = model.base_model.model.model
    inner.layers[1] = torch.compile(inner.layers[1])
    report = apply_safe_lora(compiled, root[0] / "base", num_layers=14)
    assert len(report.projected) == 14
    assert not any("_orig_mod" in module.name for module in report.modules)


def test_offloaded_models(root, model):
    for name, layer in model.named_modules():
        if name.endswith("base_layer"):
            cpu_offload(layer)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.device.type == "meta"
    reference = apply_safe_lora(live_model(root[2], root[0] / "adapter"), root[0] / "base", num_layers=3)
    assert numbers(apply_safe_lora(model, root[0] / "base", num_layers=3)) == numbers(reference)
    assert layer.weight.device.type == "meta"
    whole = live_model(root[2], root[0] / "adapter")
    cpu_offload(whole)
    with pytest.raises(SafeLoraError, match="is offloaded"):
        apply_safe_lora(whole, root[0] / "base", num_layers=3)


def test_replicated_layers_share_their_weights(root, tmp_path):
    model = get_peft_model(
        copy.deepcopy(root[2]), LoraConfig(r=3, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_()
    model.save_pretrained(tmp_path / "adapter")
    offline = project_adapter(tmp_path / "adapter", root[0] / "base", root[0] / "aligned", threshold=1, dry_run=True)
    report = apply_safe_lora(model, root[0] / "base", threshold=1)
    assert numbers(report) == numbers(offline) and len(report.modules) == 3


def test_unusable_bases_leave_the_model_as_it_is(root, model, tmp_path):
    before = bits(model)
    broken = copy.deepcopy(root[1])
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    resized = copy.deepcopy(root[1])
    resized.model.layers[0].mlp.up_proj = torch.nn.Linear(24, 41, bias=False)
    hollow = llama().to("meta")
    with_adapters = get_peft_model(copy.deepcopy(root[1]), LoraConfig(target_modules=["q_proj"]))
    cases = [
        (copy.deepcopy(root[2]), "V = 0, there is no alignment"),
        (root[0] / "aligned", "V = 0, there is no alignment"),
        (broken, r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"),
        (resized, r"has shape \[41, 24\]"),
        (with_adapters, "a model with adapters"),
        (hollow, "sharded or offloaded"),
        (tmp_path / "nowhere", "does not exist"),
        (torch.zeros(2), "expected a path"),
    ]
    for base, message in cases:
        with pytest.raises(SafeLoraError, match=message):
            apply_safe_lora(model, base, threshold=1)
        assert same_bits(bits(model), before)
    for options in ({}, {"threshold": 0.5, "num_layers": 2}, {"num_layers": -1}, {"threshold": 1, "rule": "other"}):
        with pytest.raises(SafeLoraError):
            apply_safe_lora(model, root[0] / "base", **options)
    apply_safe_lora(model, root[0] / "base", threshold=1)


def test_nan_in_the_model_or_the_adapter_is_named(root, model):
    for part in ("lora_A.default", "base_layer"):
        name = f"base_model.model.model.layers.0.self_attn.v_proj.{part}.weight"
        value = model.get_parameter(name)
        kept = value.detach().clone()
        with torch.no_grad():
            value[0, 1] = float("inf")
        before = bits(model)
        with pytest.raises(SafeLoraError, match=r"v_proj.* holds 1 NaN or infinite"):
            apply_safe_lora(model, root[0] / "base", threshold=1)
        assert same_bits(bits(model), before)
        with torch.no_grad():
            value.copy_(kept)


def test_zero_matched_modules_raise(root):
    model = live_model(root[2], root[0] / "adapter")
    model.peft_config["empty"] = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(SafeLoraError, match="holds no LoRA factors"):
        apply_safe_lora(model, root[0] / "base", threshold=1, adapter_name="empty")
