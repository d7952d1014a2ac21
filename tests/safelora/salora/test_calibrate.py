"""Calibration: planted subspaces, the exact Gram matrix, masks, seeds, and what has no subspace."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from safelora import SafeLoraError
from safelora.salora import Subspaces, calibrate
from safelora.salora.sketch import Sketch, leading_subspace
from tests.safelora.salora.models import SAFETY, TASK, adapter, model, subspaces, tokens
from tests.safelora.test_peft import gpt2, qwen2

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base() -> Any:
    return model()


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    """‖UUᵀ − VVᵀ‖₂, the sine of the largest angle for equal ranks."""
    left, right = left.double(), right.double()
    return float(torch.linalg.matrix_norm(left @ left.t() - right @ right.t(), 2))


def outputs(net: Any, batches: Any, name: str) -> torch.Tensor:
    """W X_hᵀ as rows, from the layer's own input and weight, in fp64: an independent way to the same matrix."""
    rows = []
    for batch in batches:
        kept: list[torch.Tensor] = []
        hook = net.get_submodule(name).register_forward_hook(
            lambda m, inputs, output, kept=kept: kept.append(inputs[0])
        )
        with torch.no_grad():
            net(**{key: value for key, value in batch.items() if key != "labels"})
        hook.remove()
        mask = (batch["labels"] != -100) & (batch["attention_mask"] != 0)
        layer = net.get_submodule(name)
        weight = layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight
        rows.append(kept[0][mask].double() @ weight.double().t())
    return torch.cat(rows).detach()


@pytest.mark.parametrize("exact", [True, False])
def test_a_planted_subspace_is_recovered(exact):
    torch.manual_seed(0)
    d, k, t = 200, 6, 640
    basis = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64))[0]
    rows = (torch.randn(t, k, dtype=torch.float64) * torch.logspace(0, -1, k, dtype=torch.float64)) @ basis.t()
    rows = rows.float() + 1e-6 * torch.randn(t, d)
    sketch = Sketch("planted", k, k, 1, exact)
    for part in rows.split(37):
        sketch.add(part, None)
    found, numbers = leading_subspace(sketch, 1e-3)
    assert found.shape == (d, k) and found.dtype == torch.float32
    assert distance(found, basis) <= 1e-4
    assert numbers["energy"] == pytest.approx(1, abs=1e-6) and numbers["rows"] == t


def test_the_rank_is_cut_where_the_singular_values_end():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(100, 5))[0]
    sketch = Sketch("short", 8, 8, 1, False)
    sketch.add((torch.randn(300, 5) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-5])) @ basis.t(), None)
    found, numbers = leading_subspace(sketch, 1e-3)
    assert found.shape[1] == numbers["rank"] == 4 and numbers["rank_asked"] == 8
    assert distance(found, basis[:, :4]) <= 1e-4


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (model, "all-linear"),
        (qwen2, ["q_proj", "down_proj"]),  # with a bias
        (gpt2, ["c_attn", "c_fc"]),  # Conv1D
    ],
)
def test_exact_mode_finds_the_svd_of_the_outputs_without_bias(make, config):
    torch.manual_seed(1)
    net = make().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # would dominate U, were it not removed
    found = calibrate(net, config, SAFETY, TASK, safety_rank=3, task_rank=2, exact=True)
    for name, basis in found.bases.items():
        for data, kept, rank in ((SAFETY, basis, 3), (TASK, found.task_bases[name], 2)):
            _, values, right = torch.linalg.svd(outputs(net, data, name), full_matrices=False)
            assert distance(kept, right[:rank].t()) <= 1e-4
        _, values, _ = torch.linalg.svd(outputs(net, SAFETY, name), full_matrices=False)
        energy = float((values[:3] ** 2).sum() / (values**2).sum())
        assert found.details[name]["safety_energy"] == pytest.approx(energy, abs=1e-5)
        assert found.details[name]["safety_rows"] == 6 * 4 * 6


def test_sketches_agree_with_the_gram_matrix_where_the_spectrum_falls(base):
    exact = subspaces(base, "all-linear")
    wide = subspaces(base, "all-linear", exact=False, oversample=14)
    twice = subspaces(base, "all-linear", exact=False, oversample=14, passes=2)
    once = {name: distance(wide.bases[name], exact.bases[name]) for name in exact.bases}
    refined = {name: distance(twice.bases[name], exact.bases[name]) for name in exact.bases}
    # A random model's spectra are nearly flat, the worst case; a second pass has to help all the same.
    assert sum(refined.values()) < 0.5 * sum(once.values()) and max(refined.values()) < 0.2
    for name in exact.bases:
        lost = exact.details[name]["safety_energy"] - wide.details[name]["safety_energy"]
        assert -1e-5 <= lost < 0.05


def test_batching_order_and_padding_change_nothing(base):
    plain = subspaces(base)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for batch in SAFETY for i in range(4)]
    for variant in (
        rows,
        rows[::-1],
        [padded(batch) for batch in SAFETY],
        (batch for batch in SAFETY),
        torch.utils.data.DataLoader(SAFETY, batch_size=None),
    ):
        other = calibrate(base, "all-linear", variant, TASK, safety_rank=4, task_rank=5, exact=True)
        assert max(distance(other.bases[name], plain.bases[name]) for name in plain.bases) <= 1e-4


def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Three more columns that a mask alone excludes: their labels would count them."""
    more = {"input_ids": 5, "attention_mask": 0, "labels": 7}
    return {key: torch.cat([value, torch.full((4, 3), more[key])], dim=1) for key, value in batch.items()}


def test_the_seed_decides_and_nothing_else(base):
    options: dict[str, Any] = {"exact": False, "oversample": 2}
    first = subspaces(base, **options)
    torch.manual_seed(77)
    again = subspaces(base, **options)
    fewer = subspaces(base, ["v_proj"], **options)
    other = subspaces(base, seed=1, **options)
    state = torch.random.get_rng_state()
    subspaces(base, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert all(torch.equal(fewer.bases[name], first.bases[name]) for name in fewer.bases)
    assert first.provenance == again.provenance
    assert first.provenance["data"]["safety"]["response_tokens"] == 6 * 4 * 6


def test_one_forward_pass_over_each_data_set(base):
    calls: list[int] = []
    hook = base.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        subspaces(base, exact=False)
        assert len(calls) == len(SAFETY) + len(TASK)
        subspaces(base, exact=False, passes=2)
        assert len(calls) == 3 * (len(SAFETY) + len(TASK))
    finally:
        hook.remove()


def test_adapters_are_switched_off_and_the_model_is_left_as_it_was(base):
    plain = subspaces(base)
    tuned = adapter(base).train()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    kept = {name: parameter.detach().clone() for name, parameter in tuned.named_parameters()}
    found = calibrate(tuned, None, SAFETY, TASK, safety_rank=4, task_rank=5, exact=True)
    assert max(distance(found.bases[name], plain.bases[name]) for name in plain.bases) <= 1e-4
    assert tuned.training and all(torch.equal(kept[name], parameter) for name, parameter in tuned.named_parameters())
    assert not any(module._forward_hooks for module in tuned.modules())


def test_targets_are_matched_as_peft_matches_them(base):
    for options in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {},
    ):
        config = LoraConfig(**options)
        tuned = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
        adapted = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            for name, _ in tuned.named_modules()
            if name.endswith(".lora_A.default")
        }
        found = calibrate(base, config, SAFETY, safety_rank=2)
        assert set(found.bases) == adapted and not found.task_bases


def test_what_has_no_subspace_is_skipped_with_the_reason(base):
    net = copy.deepcopy(base)
    net.model.layers[0].unused = torch.nn.Linear(4, 4)
    net.model.layers[0].folded = torch.nn.Conv1d(24, 24, 1)
    found = calibrate(net, ["q_proj", "lm_head", "embed_tokens", "unused", "folded"], SAFETY, safety_rank=2)
    assert set(found.bases) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    reasons = {name.rpartition(".")[2]: reason for name, reason in found.skipped.items()}
    assert "vocabulary" in reasons["lm_head"] and "embedding" in reasons["embed_tokens"]
    assert "never called" in reasons["unused"] and "convolution" in reasons["folded"]


def test_experts_are_skipped_and_their_neighbours_are_not():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    net = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=29, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
        )
    ).eval()  # fmt: skip
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    found = calibrate(net, config, SAFETY, safety_rank=2)
    assert list(found.bases) == ["model.layers.0.self_attn.q_proj"]
    assert ["experts" in reason for reason in found.skipped.values()] == [True]
    tuned = get_peft_model(net, config)
    again = calibrate(tuned, None, SAFETY, safety_rank=2)
    assert list(again.bases) == list(found.bases) and "experts" in str(again.skipped)


def words_tokenizer() -> Any:
    """Whitespace words w0 … w25."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as token_models
    from transformers import PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(26))])}
    plain = Tokenizer(token_models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def test_files_and_data_sets_of_text(base, tmp_path):
    import datasets

    tokenizer = words_tokenizer()
    rows = [{"prompt": f"w{n} w{n + 2}", "response": f"w{n + 1} w{n + 3} w{n + 4}"} for n in range(20)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"safety_rank": 3, "tokenizer": tokenizer, "batch_size": 6}
    found = calibrate(base, ["q_proj"], path, **options)
    listed = calibrate(base, ["q_proj"], datasets.Dataset.from_list(rows), **options)
    assert found.fingerprint() == listed.fingerprint()
    assert found.provenance["data"]["safety"]["batches"] == 4
    few = calibrate(base, ["q_proj"], str(path), limit=5, **options)
    assert few.provenance["data"]["safety"]["batches"] == 1
    with pytest.raises(SafeLoraError, match="tokenizer"):
        calibrate(base, ["q_proj"], path, safety_rank=3)


def test_subspaces_survive_their_file(base, tmp_path):
    found = subspaces(base)
    assert len({found.save(tmp_path).read_bytes() for _ in range(8)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["salora_subspace.safetensors"]
    read = Subspaces.load(tmp_path)
    assert read.fingerprint() == found.fingerprint()
    for part in ("details", "skipped", "provenance", "mode"):
        assert getattr(read, part) == getattr(found, part)
    rows = read.table().row_count
    assert rows == len(found.bases) == 14


def test_bad_input(base, tmp_path):
    for arguments, options, message in (
        ((base, ["nothing"], SAFETY), {}, "match no module"),
        ((base, None, SAFETY), {}, "config is missing"),
        ((base, ["q_proj"]), {}, "safety_data is missing"),
        ((base, ["q_proj"], [{"input_ids": tokens()["input_ids"]}]), {}, "no labels"),
        ((base, ["q_proj"], [tokens(prompt=9)]), {}, "every label is −100"),
        ((base, ["q_proj"], SAFETY), {"safety_rank": 0}, "safety_rank"),
        ((base, ["q_proj"], SAFETY), {"passes": 3}, "passes"),
        ((base, ["q_proj"], SAFETY), {"rcond": 2}, "rcond"),
        ((base, ["lm_head"], SAFETY), {}, "vocabulary"),
        ((object(), ["q_proj"], SAFETY), {}, "torch.nn.Module"),
    ):
        with pytest.raises(SafeLoraError, match=message):
            calibrate(*arguments, **options)
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(SafeLoraError, match=r"layers\.1\.mlp\.up_proj hold NaN"):
        calibrate(broken, ["up_proj"], SAFETY, safety_rank=2)
    merged = adapter(base)
    merged.merge_adapter()
    with pytest.raises(SafeLoraError, match="merged"):
        calibrate(merged, None, SAFETY)
    with pytest.raises(SafeLoraError, match="no subspaces at"):
        Subspaces.load(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(SafeLoraError, match="not a safetensors file"):
        Subspaces.load(tmp_path / "x.safetensors")
    with pytest.raises(SafeLoraError, match="float32"):
        Subspaces({"a": torch.eye(4, dtype=torch.bfloat16)})
    skewed = Subspaces({"a": torch.ones(4, 2)})
    skewed.save(tmp_path)
    with pytest.raises(SafeLoraError, match="not orthonormal"):
        Subspaces.load(tmp_path)
    assert isinstance(merged, PeftModel)
