"""The constraint: the invariant at every step, and the trajectory of the paper's C·B·A form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

import safelora_kernels as sk
from safelora import SafeLoraError
from safelora.salora import SubspaceConstraint, Subspaces, initialize, subspaces_of, weight_subspaces
from tests.safelora.salora.models import (
    MODES,
    adapter,
    initialized,
    logits,
    steps,
    subspaces,
    tokens,
    trainable,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def dense_updates(tuned: Any, found: Subspaces, name: str = "default") -> dict[str, torch.Tensor]:
    """W_eff − W of every module, formed from PEFT's layers as a dense matrix in fp64."""
    result = {}
    for module in found.bases:
        layer = tuned.base_model.model.get_submodule(module)
        factors = (layer.lora_B[name].weight.double(), layer.lora_A[name].weight.double())
        change = layer.scaling[name] * factors[0] @ factors[1]
        if found.mode == "residual":
            change -= layer.scaling[name] * found.initial_B[module].double() @ found.initial_A[module].double()
        result[module] = change.detach()
    return result


def worst_leak(tuned: Any, found: Subspaces) -> float:
    worst = 0.0
    for module, change in dense_updates(tuned, found).items():
        if change.norm() > 0:
            worst = max(worst, float((found.bases[module].double().t() @ change).norm() / change.norm()))
    return worst


def eight_bit(parameters: Any) -> torch.optim.Optimizer:
    """Its kernels write to parameters without torch's version counter."""
    optim = pytest.importorskip("bitsandbytes").optim
    return optim.AdamW8bit(parameters, lr=1e-2, weight_decay=0.1, min_8bit_size=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adafactor(p, lr=0.3),
        eight_bit,
    ],
    ids=["adamw", "fused", "foreach", "sgd", "adafactor", "8-bit"],
)
def test_the_invariant_holds_after_every_step(base, found, mode, make):
    tuned = initialized(base, found, mode)
    optimizer = make(trainable(tuned))
    constraint = SubspaceConstraint(tuned, found, optimizer)
    for step in range(6):
        before = {n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_B" in n}
        steps(tuned, optimizer, 1, start=step)
        assert worst_leak(tuned, subspaces_of(tuned)) <= 1e-5
        assert max(constraint.leaks().values()) <= 1e-5
        assert any(not torch.equal(before[n], p) for n, p in tuned.named_parameters() if n in before)
    dense = worst_leak(tuned, subspaces_of(tuned))
    assert max(constraint.leaks().values()) == pytest.approx(dense, rel=1e-3, abs=1e-12)


def test_without_the_constraint_the_update_leaks(base, found):
    """What the other tests would miss, were the constraint to do nothing."""
    tuned = initialized(base, found, "plain")
    steps(tuned, torch.optim.AdamW(trainable(tuned), lr=1e-2), 6)
    assert worst_leak(tuned, subspaces_of(tuned)) > 0.1


class PaperLinear(torch.nn.Module):
    """``y = x W'ᵀ + s ((x Aᵀ) Bᵀ) Cᵀ`` with a dense C, as the authors write it."""

    def __init__(self, base: Any, A: torch.Tensor, B: torch.Tensor, U: torch.Tensor, scaling: float, residual: bool):
        super().__init__()
        weight, bias = base.weight.detach(), base.bias
        self.register_buffer("C", torch.eye(len(U)) - U @ U.t())
        self.A, self.B = torch.nn.Parameter(A.clone()), torch.nn.Parameter(B.clone())
        self.scaling = scaling
        self.register_buffer("weight", weight - scaling * self.C @ B @ A if residual else weight.clone())
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.scaling * ((x @ self.A.t()) @ self.B.t()) @ self.C.t()
        return torch.nn.functional.linear(x, self.weight, self.bias) + update


def paper_model(base: Any, tuned: Any, found: Subspaces, mode: str) -> Any:
    """The base model with the paper's layers, starting where the adapter does; raw B reaches into U."""
    net = copy.deepcopy(base).requires_grad_(False)
    for module, U in found.bases.items():
        layer = tuned.base_model.model.get_submodule(module)
        if mode == "plain":
            A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        else:
            A, B = subspaces_of(tuned).initial_A[module], subspaces_of(tuned).initial_B[module]
            B = B + U @ torch.randn(U.shape[1], B.shape[1]) * 0.1
        plain = base.get_submodule(module)
        parent, _, last = module.rpartition(".")
        scaling = layer.scaling["default"]
        setattr(net.get_submodule(parent), last, PaperLinear(plain, A, B, U, scaling, mode != "plain"))
    return net


@pytest.mark.parametrize("mode", MODES)
def test_the_trajectory_is_that_of_the_papers_form(base, found, mode):
    """25 AdamW steps with weight decay, clipping and accumulation: losses and weights to 1e-5."""
    tuned = initialized(base, found, mode)
    paper = paper_model(base, tuned, found, mode)
    options: dict[str, Any] = {"lr": 5e-3, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(trainable(tuned), **options)
    theirs = torch.optim.AdamW(trainable(paper), **options)
    SubspaceConstraint(tuned, found, optimizer)
    ours = steps(tuned.train(), optimizer, 25, clip=0.5, parts=2)
    expected = steps(paper.train(), theirs, 25, clip=0.5, parts=2)
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) <= 1e-5
    assert abs(expected[0] - expected[-2]) > 1e-3  # they have been somewhere
    for module, change in dense_updates(tuned, subspaces_of(tuned)).items():
        layer = paper.get_submodule(module)
        update = layer.scaling * layer.C.double() @ layer.B.double() @ layer.A.double()
        if mode != "plain":
            start = subspaces_of(tuned)
            update -= layer.scaling * start.initial_B[module].double() @ start.initial_A[module].double()
        assert float((change - update).norm()) <= 1e-5 * max(1.0, float(update.norm()))
    assert float((logits(tuned) - logits(paper)).abs().max()) <= 1e-5
    raw = next(iter(found.bases))
    U, B = found.bases[raw], paper.get_submodule(raw).B
    assert mode == "plain" or float((U.t() @ B).norm() / B.norm()) > 0.05  # theirs is not what may be saved


def test_projected_gradients_are_what_clipping_sees(base, found):
    tuned = initialized(base, found, "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    SubspaceConstraint(tuned, found, optimizer)
    for _ in range(2):
        tuned(**tokens(3)).loss.backward()
    for module, U in found.bases.items():
        layer = tuned.base_model.model.get_submodule(module)
        gradient = layer.lora_B["default"].weight.grad
        rank = gradient.shape[1] // 2
        assert float((U.t() @ gradient).norm()) <= 1e-6 * float(gradient.norm())
        assert float(gradient[:, :rank].norm()) > 0
        assert not gradient[:, rank:].any() and not layer.lora_A["default"].weight.grad[rank:].any()


def test_the_kernels_are_launched_once_for_all_modules(base, found, monkeypatch):
    tuned = initialized(base, found, "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    SubspaceConstraint(tuned, found, optimizer)
    calls: list[int] = []
    original = sk.project_out_layers_
    monkeypatch.setattr(
        sk, "project_out_layers_", lambda xs, bases, **options: (calls.append(len(xs)), original(xs, bases, **options))
    )
    steps(tuned, optimizer, 1)
    assert calls == [14, 14]  # gradients, weights


def test_amp_with_skipped_steps(base, found):
    tuned = initialized(base, found, "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    constraint = SubspaceConstraint(tuned, found, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    kept = None
    for step in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = tuned(**tokens(step)).loss
        scaler.scale(loss).backward()
        if step == 2:
            parameter = next(p for n, p in tuned.named_parameters() if "lora_B" in n)
            parameter.grad[0, 0] = torch.inf
            kept = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert kept is not None
            assert all(torch.equal(kept[n], p) for n, p in tuned.named_parameters() if n in kept)
        assert worst_leak(tuned, subspaces_of(tuned)) <= 1e-5
    assert max(constraint.leaks().values()) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(base, found, reentrant):
    def run(checkpointed: bool) -> dict[str, torch.Tensor]:
        tuned = initialized(base, found, "packed").train()
        if checkpointed:
            tuned.enable_input_require_grads()
            tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
        SubspaceConstraint(tuned, found, optimizer)
        steps(tuned, optimizer, 3, parts=2)
        assert worst_leak(tuned, subspaces_of(tuned)) <= 1e-5
        return {n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad}

    plain, checkpointed = run(False), run(True)
    assert all(torch.allclose(plain[n], checkpointed[n], atol=1e-6) for n in plain)


def test_compiled_training(base, found):
    def run(compiled: bool) -> dict[str, torch.Tensor]:
        tuned = initialized(base, found, "packed").train()
        optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
        SubspaceConstraint(torch.compile(tuned, backend="aot_eager") if compiled else tuned, found, optimizer)
        net = torch.compile(tuned, backend="aot_eager") if compiled else tuned
        steps(net, optimizer, 3)
        assert worst_leak(tuned, subspaces_of(tuned)) <= 1e-5
        return {n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad}

    plain, compiled = run(False), run(True)
    assert all(torch.allclose(plain[n], compiled[n], atol=1e-5) for n in plain)


def test_two_adapters_each_with_its_own_subspace(base, found):
    other = subspaces(base, ["q_proj", "v_proj"], safety_rank=2, task_rank=3)
    tuned = initialized(base, found, "packed")
    tuned.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    initialize(tuned, other, "packed", adapter_name="second")
    optimizer = torch.optim.AdamW([p for n, p in tuned.named_parameters() if "lora_" in n], lr=1e-2)
    both = [
        SubspaceConstraint(tuned, given, optimizer, adapter_name=name)
        for name, given in (("default", found), ("second", other))
    ]
    for name in ("default", "second"):
        kept = {n: p.detach().clone() for n, p in tuned.named_parameters() if "lora_" in n}
        tuned.set_adapter(name)
        steps(tuned, optimizer, 3)
        moved = {n for n, p in tuned.named_parameters() if n in kept and not torch.equal(kept[n], p)}
        assert moved and all(f".{name}." in n for n in moved)
    for constraint in both:
        assert max(constraint.leaks().values()) <= 1e-5


def test_both_sides_leave_the_weights_leading_triples_alone(base):
    """OPLoRA: with left and right singular bases, W_eff keeps its leading singular triples."""
    found = weight_subspaces(base, ["q_proj", "up_proj", "down_proj"], rank=3)
    tuned = adapter(base, target_modules=["q_proj", "up_proj", "down_proj"])
    initialize(tuned, found, "plain")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=3e-2, weight_decay=0.1)
    constraint = SubspaceConstraint(tuned, found, optimizer)
    steps(tuned, optimizer, 5)
    assert max(constraint.leaks().values()) <= 1e-5
    for module, change in dense_updates(tuned, found).items():
        weight = base.get_submodule(module).weight.detach().double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        assert float(change.norm()) > 0.1 * float(weight.norm())
        error = (weight + change) @ right[:3].t() - left[:, :3] * values[:3]
        assert float(error.norm()) <= 1e-5 * float(change.norm())
        error = left[:, :3].t() @ (weight + change) - values[:3, None] * right[:3]
        assert float(error.norm()) <= 1e-5 * float(change.norm())


def test_a_run_that_was_interrupted_goes_on_bit_by_bit(base, found, tmp_path):
    from peft import PeftModel

    from safelora.salora import restore

    for mode in MODES:
        tuned = initialized(base, found, mode).train()
        optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2, weight_decay=0.1)
        constraint = SubspaceConstraint(tuned, found, optimizer)
        steps(tuned, optimizer, 3)
        tuned.save_pretrained(tmp_path / mode)
        subspaces_of(tuned).save(tmp_path / mode)
        state = copy.deepcopy(optimizer.state_dict())
        held = copy.deepcopy(constraint.state_dict())
        steps(tuned, optimizer, 3, start=3)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / mode, is_trainable=True).train()
        kept = Subspaces.load(tmp_path / mode)
        restore(again, kept)
        second = torch.optim.AdamW(trainable(again), lr=1e-2, weight_decay=0.1)
        second.load_state_dict(state)
        resumed = SubspaceConstraint(again, kept, second)
        resumed.load_state_dict(held)
        steps(again, second, 3, start=3)
        expected = dict(tuned.named_parameters())
        assert all(torch.equal(expected[n], p) for n, p in again.named_parameters())


def test_parameters_keep_their_version_and_hooks_can_be_taken_off(base, found):
    tuned = initialized(base, found, "plain")
    optimizer = torch.optim.SGD(trainable(tuned), lr=0.1)
    with SubspaceConstraint(tuned, found, optimizer) as constraint:
        parameter = next(p for n, p in tuned.named_parameters() if "lora_B" in n)
        with torch.no_grad():
            parameter.add_(1)
        version = parameter._version
        constraint.project_weights()
        assert parameter._version > version  # caches of casts are keyed by it
    steps(tuned, optimizer, 2)
    assert worst_leak(tuned, subspaces_of(tuned)) > 0.05
    with pytest.warns(UserWarning, match="are projected now"):
        SubspaceConstraint(tuned, found, optimizer)
    assert worst_leak(tuned, subspaces_of(tuned)) <= 1e-5


def test_what_lies_outside_is_said(base):
    found = subspaces(base, LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert "vocabulary" in found.skipped["lm_head"]
    tuned = adapter(base, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])
    initialize(tuned, found, "packed")
    optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2)
    with pytest.warns(UserWarning, match=r"3 trained part|2 trained part") as caught:
        constraint = SubspaceConstraint(tuned, found, optimizer)
    assert "lm_head" in str(caught[0].message) and "embed_tokens" in str(caught[0].message)
    assert set(constraint.outside) >= {"lm_head"}


def test_a_subspace_of_everything_leaves_nothing_to_train(base):
    with pytest.warns(UserWarning, match="spans all outputs of 4 modules"):
        found = subspaces(base, ["q_proj", "k_proj", "v_proj"], safety_rank=8)
    for mode in MODES:
        tuned = initialized(base, found, mode, target_modules=["q_proj", "k_proj", "v_proj"])
        optimizer = torch.optim.AdamW(trainable(tuned), lr=1e-2, weight_decay=0.1)
        constraint = SubspaceConstraint(tuned, found, optimizer)
        steps(tuned, optimizer, 2)
        leaks = constraint.leaks()
        for name, change in dense_updates(tuned, subspaces_of(tuned)).items():
            assert bool(change.any()) == name.endswith("q_proj") and leaks[name] <= 1e-5


def test_errors(base, found):
    tuned = initialized(base, found, "packed")
    with pytest.raises(SafeLoraError, match="optimizer does not train"):
        SubspaceConstraint(tuned, found, torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(SafeLoraError, match=r"must be a torch\.optim\.Optimizer"):
        SubspaceConstraint(tuned, found, object())
    few = subspaces(base, ["q_proj"])
    with pytest.raises(SafeLoraError, match="have no subspace"):
        SubspaceConstraint(adapter(base), few, torch.optim.SGD(trainable(tuned), lr=0.1))
    wrong = Subspaces({name: torch.linalg.qr(torch.randn(7, 2))[0] for name in found.bases})
    with pytest.raises(SafeLoraError, match="7 rows"):
        SubspaceConstraint(tuned, wrong, torch.optim.SGD(trainable(tuned), lr=0.1))
    other = subspaces(base, safety_rank=3)
    with pytest.raises(SafeLoraError, match="not the subspaces"):
        SubspaceConstraint(tuned, other, torch.optim.SGD(trainable(tuned), lr=0.1))
    dora = adapter(base, use_dora=True)
    with pytest.raises(SafeLoraError, match="DoRA"):
        SubspaceConstraint(dora, found, torch.optim.SGD(trainable(dora), lr=0.1))
