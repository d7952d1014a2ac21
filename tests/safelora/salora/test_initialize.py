"""Initialisation: the authors' formulas, and an output that does not move, for any scaling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safelora import SafeLoraError
from safelora.salora import Subspaces, calibrate, initialize, subspaces_of
from tests.safelora.salora.models import SAFETY, TASK, adapter, initialized, logits, subspaces
from tests.safelora.test_peft import gpt2

pytestmark = pytest.mark.filterwarnings("ignore")


SCALINGS = {
    "alpha = r": {"lora_alpha": 3},
    "alpha": {"lora_alpha": 40},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 5}, "alpha_pattern": {"v_proj": 11, "up_proj": 2}},
    "patterns, rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 11}, "use_rslora": True},
}


@pytest.mark.parametrize("mode", ["packed", "residual", "plain"])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_the_output_is_the_bases(base, found, mode, scaling):
    tuned = adapter(base, **scaling)
    scales = {n: m.scaling["default"] for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    state = torch.random.get_rng_state()
    initialize(tuned, found, mode)
    assert torch.equal(state, torch.random.get_rng_state())
    assert float((logits(tuned) - logits(base)).abs().max()) <= 1e-6
    assert scales == {n: m.scaling["default"] for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    if mode != "plain":
        assert all(p.any() for n, p in tuned.named_parameters() if "lora_" in n)
    else:
        assert not any(p.any() for n, p in tuned.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_a_packed_adapter_is_one_that_peft_makes_from_its_configuration(base, found, scaling):
    tuned = initialized(base, found, "packed", **scaling)
    made = get_peft_model(copy.deepcopy(base), copy.deepcopy(tuned.peft_config["default"]))
    ours, theirs = ({n: p.shape for n, p in net.named_parameters()} for net in (tuned, made))
    assert ours == theirs
    for name, layer in made.named_modules():
        if hasattr(layer, "lora_A"):
            other = tuned.get_submodule(name)
            assert layer.r == other.r and layer.scaling["default"] == pytest.approx(other.scaling["default"])
            assert layer.lora_alpha["default"] == pytest.approx(other.lora_alpha["default"])


def test_the_factors_are_the_authors(base, found):
    """B₀ = U_t U_tᵀ Ū √S̄ and A₀ = √S̄ V̄ᵀ with a full SVD; signs belong to the SVD."""
    initialized_model = initialized(base, found, "residual")
    start = subspaces_of(initialized_model)
    for name, U in found.bases.items():
        weight = base.get_submodule(name).weight.detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        task = found.task_bases[name].double()
        complement = torch.eye(len(U), dtype=torch.float64) - U.double() @ U.double().t()
        B = task @ task.t() @ left[:, :3] * values[:3].sqrt()
        A = values[:3].sqrt()[:, None] * right[:3]
        signs = (A * start.initial_A[name]).sum(1).sign()
        # The randomised SVD of a nearly flat spectrum; exact where the dimensions are few.
        assert float((start.initial_A[name] - signs[:, None] * A).norm()) <= 2e-3 * float(A.norm())
        assert float((start.initial_B[name] - complement @ B * signs).norm()) <= 2e-3 * float(B.norm())
        layer = initialized_model.base_model.model.get_submodule(name)
        residual = weight - layer.scaling["default"] * (start.initial_B[name].double() @ start.initial_A[name].double())
        assert (
            torch.equal(layer.base_layer.weight, residual.float())
            or float((layer.base_layer.weight - residual).abs().max()) <= 1e-7
        )
        assert float((U.t() @ start.initial_B[name]).norm()) <= 1e-6 * float(start.initial_B[name].norm())


def test_without_safety_and_with_all_of_the_task_it_is_pissa(base):
    names = list(subspaces(base, ["q_proj"]).bases)
    whole = Subspaces({name: torch.zeros(24, 0) for name in names}, task_bases={name: torch.eye(24) for name in names})
    tuned = initialized(base, whole, "residual", target_modules=["q_proj"], lora_alpha=3)
    pissa = adapter(base, target_modules=["q_proj"], lora_alpha=3, init_lora_weights="pissa")
    for name in names:
        ours, theirs = (net.base_model.model.get_submodule(name) for net in (tuned, pissa))
        products = [layer.lora_B["default"].weight @ layer.lora_A["default"].weight for layer in (ours, theirs)]
        assert float((products[0] - products[1]).norm()) <= 2e-3 * float(products[1].norm())


def test_conv1d_and_a_bf16_adapter(found):
    torch.manual_seed(2)
    net = gpt2().eval()
    kept = calibrate(net, ["c_attn", "c_fc"], SAFETY, TASK, safety_rank=3, task_rank=4, exact=True)
    for mode in ("packed", "residual"):
        tuned = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=["c_attn", "c_fc"]))
        initialize(tuned, kept, mode)
        assert float((logits(tuned) - logits(net)).abs().max()) <= 1e-6
    half = adapter(copy.deepcopy(net).bfloat16(), target_modules=["c_attn", "c_fc"])
    half.to(torch.bfloat16)
    initialize(half, kept, "packed")
    expected = logits(copy.deepcopy(net).bfloat16())
    assert float((logits(half) - expected).abs().max()) <= 2 * 2.0**-8 * float(expected.abs().max())


def test_the_seed_and_nothing_else(base, found):
    first = subspaces_of(initialized(base, found, "packed")).fingerprint()
    assert first == subspaces_of(initialized(base, found, "packed")).fingerprint()
    other = adapter(base)
    initialize(other, found, "packed", seed=3)
    assert subspaces_of(other).fingerprint() != first


def test_plain_projects_what_is_there(base, found):
    tuned = adapter(base, init_lora_weights=False)
    initialize(tuned, found, "plain")
    for name, U in found.bases.items():
        B = tuned.base_model.model.get_submodule(name).lora_B["default"].weight
        assert B.any() and float((U.t() @ B).norm()) <= 1e-6 * float(B.norm())


def test_errors_leave_the_model_as_it_was(base, found):
    def refuse(tuned: Any, given: Subspaces, mode: Any, message: str, **options: Any) -> None:
        kept = {n: p.detach().clone() for n, p in tuned.named_parameters()}
        config = copy.deepcopy({n: c.to_dict() for n, c in tuned.peft_config.items()})
        with pytest.raises(SafeLoraError, match=message):
            initialize(tuned, given, mode, **options)
        assert kept.keys() == dict(tuned.named_parameters()).keys()
        assert all(torch.equal(kept[n], p) for n, p in tuned.named_parameters())
        assert config == {n: c.to_dict() for n, c in tuned.peft_config.items()}

    refuse(adapter(base), found, "other", "mode must be")
    refuse(initialized(base, found, "packed"), found, "packed", "initialised already")
    refuse(adapter(base, init_lora_weights=False), found, "packed", "is not zero")
    refuse(adapter(base, use_dora=True), found, "packed", "DoRA")
    refuse(adapter(base, init_lora_weights="pissa"), found, "packed", "pissa")
    refuse(adapter(base), calibrate(base, "all-linear", SAFETY, safety_rank=2), "packed", "needs a task subspace")
    refuse(adapter(base), subspaces(base, ["q_proj"]), "plain", "have no subspace")
    merged = adapter(base)
    merged.merge_adapter()
    refuse(merged, found, "plain", "merged")
    two = adapter(base)
    two.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refuse(two, found, "residual", "several use 'packed'", adapter_name="default")
    with pytest.raises(SafeLoraError, match=r"peft\.PeftModel"):
        initialize(base, found)
    with pytest.raises(SafeLoraError, match="no subspaces"):
        subspaces_of(adapter(base))
