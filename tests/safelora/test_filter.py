"""The input filter on PeftModels and adapter directories: dense truth, invariants, live = offline, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from safelora import FilterReport, SafeLoraError, filter_adapter
from tests.safelora.test_peft import llama, make

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(count: int, low: int, high: int, seed: int, masked: int = 3) -> list[dict[str, list[int]]]:
    """Tokenised examples of different lengths with token ids in [low, high); the first `masked` are the prompt."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = 6 + int(torch.randint(0, 6, (1,), generator=draw))
        ids = [1, *torch.randint(low, high, (size,), generator=draw).tolist()]
        found.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return found


SAFETY, TASK = rows(10, 3, 15, seed=1), rows(8, 13, 29, seed=2)


@pytest.fixture
def built(tmp_path: Path) -> tuple[Any, Path]:
    """An aligned model in fp64, and a directory with an adapter on all its linear layers."""
    _, aligned = make(llama, {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}, tmp_path)
    return aligned.double(), tmp_path


def live(aligned: Any, root: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(aligned), root / "adapter").double()


def factors(model: Any, side: str = "lora_A") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model.").split(f".{side}")[0]: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if side in name
    }


def dense_moments(
    model: Any, examples: list[dict[str, Any]], weight: str, gates: tuple[float, ...], enabled: bool, drop: int
) -> dict[str, torch.Tensor]:
    """F of every module by dense autograd, one example at a time: the full gradient of the layer's output, times B."""
    found: dict[str, torch.Tensor] = {}
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and len(layer.lora_A)
    }
    scaling = {name: layer.scaling["default"] for name, layer in layers.items()}
    for gate in gates if weight == "grad" else (1.0,):
        for name, layer in layers.items():
            layer.scaling["default"] = scaling[name] * gate if enabled else 0.0
        for example in examples:
            ids = torch.tensor([example["input_ids"]])
            inputs: dict[str, torch.Tensor] = {}
            outputs: dict[str, torch.Tensor] = {}
            hooks = []
            for name, layer in layers.items():

                def keep(_: Any, args: Any, out: Any, name: str = name, x: Any = inputs, y: Any = outputs) -> None:
                    x[name], y[name] = args[0], out

                hooks.append(layer.register_forward_hook(keep))
            with torch.enable_grad():
                logits = model(input_ids=ids).logits
                labels = torch.tensor([example["labels"]])
                loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
                deltas = torch.autograd.grad(loss, list(outputs.values())) if weight == "grad" else ()
            for hook in hooks:
                hook.remove()
            for index, name in enumerate(outputs):
                x = inputs[name][0, drop:].detach()
                norms = x.norm(dim=1)
                clip = (3 * norms.median() / norms).clamp(max=1.0) ** 2
                w = clip
                if weight == "grad":
                    b = layers[name].lora_B["default"].weight.detach()
                    w = clip * scaling[name] ** 2 * (deltas[index][0, drop:] @ b).square().sum(1)
                found[name] = found.get(name, 0) + x.T @ (w[:, None] * x)
    for name, layer in layers.items():
        layer.scaling["default"] = scaling[name]
    total = len(examples) if weight == "grad" else sum(len(e["input_ids"]) - drop for e in examples)
    return {name: moment / total for name, moment in found.items()}


@pytest.mark.parametrize("unseen", ["keep", "drop"])
@pytest.mark.parametrize("weight", ["none", "grad"])
def test_closed_form_with_moments_by_dense_autograd(built, weight, unseen):
    aligned, root = built
    model = live(aligned, root).requires_grad_(True)
    before = factors(model)
    # The first token is the same in all examples, and is no safety token.
    safety = dense_moments(model, SAFETY, weight, (0.5, 1.0), weight == "grad", drop=1)
    task = dense_moments(model, TASK, weight, (0.5, 1.0), True, drop=0)
    report = filter_adapter(model, SAFETY, TASK, weight=weight, unseen=unseen, strength=30.0, batch_size=4)
    after = factors(model)
    assert len(report.filtered) == len(before) == 14
    for name, a in before.items():
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        raised = task[name] + 0.1 * task[name].diagonal().mean() * eye
        danger = safety[name] + 1e-4 * safety[name].diagonal().mean() * eye
        left = raised if unseen == "keep" else task[name]
        truth = a @ left @ torch.linalg.inv(raised + 30 * danger)
        assert float((after[name] - truth).norm() / a.norm()) < 1e-6, name


def test_undo_and_state(built):
    aligned, root = built
    model = live(aligned, root).train()
    model.base_model.model.model.layers[0].mlp.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    report = filter_adapter(model, SAFETY, TASK)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 14 and all("lora_A" in name for name in changed)
    assert trainable == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(SafeLoraError, match="has been filtered already"):
        filter_adapter(model, SAFETY, TASK)
    report.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    filter_adapter(model, SAFETY, TASK, dry_run=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weight", ["none", "grad"])
def test_live_equals_offline(tmp_path, weight):
    _, aligned = make(llama, {"target_modules": "all-linear", "r": 3}, tmp_path)
    source = {name: tensor.clone() for name, tensor in aligned.state_dict().items()}
    aligned.train()
    aligned.model.norm.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in aligned.named_parameters()}
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    model = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / "adapter")
    report = filter_adapter(model, SAFETY, TASK, weight=weight)
    places = {"from memory": aligned, "from disk": tmp_path / "aligned"}
    for name, place in places.items():
        offline = filter_adapter(
            tmp_path / "adapter", SAFETY, TASK, weight=weight, model=place, out=tmp_path / name, device="cpu"
        )
        assert [m.name for m in offline.filtered] == [m.name for m in report.filtered]
        loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path / name)
        ids = torch.randint(3, 29, (2, 7))
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert FilterReport.load(tmp_path / name).to_json() == offline.to_json()
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    # The model that was lent has no adapter, and its weights and names, again.
    assert source.keys() == aligned.state_dict().keys() and not hasattr(aligned, "peft_config")
    assert all(torch.equal(source[name], tensor) for name, tensor in aligned.state_dict().items())
    assert trainable == {name: parameter.requires_grad for name, parameter in aligned.named_parameters()}
    assert all(module.training for module in aligned.modules())
    before, after = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "from disk" / "adapter_model.safetensors"),
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        n for n in before if "lora_A" in n
    }
    with pytest.raises(SafeLoraError, match="has been filtered already"):
        filter_adapter(tmp_path / "from disk", SAFETY, TASK, model=aligned, out=tmp_path / "twice")
    filter_adapter(tmp_path / "from disk", SAFETY, TASK, model=aligned, out=tmp_path / "twice", allow_filtered=True)


def test_without_strength_nothing_changes(built):
    aligned, root = built
    model = live(aligned, root)
    before = factors(model)
    report = filter_adapter(model, SAFETY, TASK, strength=0.0)
    assert all(torch.equal(before[name], a) for name, a in factors(model).items())
    assert {module.decision for module in report.modules} == {"kept"} and not report.filtered
    report = filter_adapter(
        root / "adapter", SAFETY, TASK, strength=0.0, model=aligned.float(), out=root / "out", batch_size=4
    )
    old, new = (load_file(root / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    assert all(torch.equal(old[name], new[name]) for name in old)
    # Nothing was filtered, so nothing says so, and it may be filtered later.
    assert json.loads((root / "out" / "safelora_filter.json").read_text())["num_filtered"] == 0
    filter_adapter(root / "out", SAFETY, TASK, model=aligned, dry_run=True)


def test_order_batching_and_padding_do_not_matter(built):
    aligned, root = built
    model = live(aligned, root)
    results = []
    padded = [
        {
            "input_ids": torch.tensor([[0] * side + e["input_ids"] + [0] * (4 - side)]),
            "attention_mask": torch.tensor([[0] * side + [1] * len(e["input_ids"]) + [0] * (4 - side)]),
            "labels": torch.tensor([[-100] * side + e["labels"] + [-100] * (4 - side)]),
        }
        for e, side in zip(SAFETY, [0, 4] * 5, strict=True)
    ]
    for safety, task, size in ((SAFETY, TASK, 3), (SAFETY[::-1], TASK[::-1], 5), (padded, TASK, 8)):
        report = filter_adapter(model, safety, task, batch_size=size)
        results.append((factors(model), report))
        report.undo()
    for found, report in results[1:]:
        assert report.inputs == results[0][1].inputs
        for name, a in found.items():
            torch.testing.assert_close(a, results[0][0][name], rtol=1e-6, atol=1e-6)
        for key, value in report.separability.items():
            assert value == pytest.approx(results[0][1].separability[key], rel=1e-5)


@pytest.mark.parametrize("weight", ["none", "grad"])
@pytest.mark.parametrize("solver", ["dual", "cg"])
def test_solvers_and_memory_budgets_agree(built, weight, solver):
    aligned, root = built
    model = live(aligned, root)
    found = []
    for options in ({"solver": "cholesky"}, {"solver": solver, "tolerance": 1e-8}, {"memory_budget": 1e-5}):
        report = filter_adapter(model, SAFETY, TASK, weight=weight, **options)
        found.append((factors(model), report))
        report.undo()
    assert {module.solver for module in found[1][1].modules} == {solver}
    assert all(module.residual < 1e-8 for module in found[1][1].modules)
    for other, _ in found[1:]:
        for name, a in other.items():
            assert float((a - found[0][0][name]).norm() / found[0][0][name].norm()) < 1e-6


def test_skips_what_has_no_plain_input(tmp_path):
    _, aligned = make(llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, tmp_path)
    model = PeftModel.from_pretrained(aligned, tmp_path / "adapter")
    report = filter_adapter(model, SAFETY, TASK)
    reasons = {module.name: module.reason for module in report.modules if module.decision == "skipped"}
    assert list(reasons) == ["model.embed_tokens"] and "token, not a vector" in reasons["model.embed_tokens"]
    assert {module.name.rpartition(".")[2] for module in report.filtered} == {"q_proj", "lm_head"}


def test_says_when_the_sets_cannot_be_told_apart(tmp_path):
    _, aligned = make(llama, {"target_modules": "all-linear", "r": 3}, tmp_path)
    model = PeftModel.from_pretrained(aligned, tmp_path / "adapter")
    same = filter_adapter(model, rows(40, 3, 29, seed=3), rows(40, 3, 29, seed=4))
    assert same.separability["selectivity"] > 0.6
    assert any("hardly separable" in warning for warning in same.warnings)
    same.undo()
    other = filter_adapter(model, rows(40, 3, 12, seed=3), rows(40, 15, 29, seed=4))
    assert other.separability["selectivity"] < 0.6 and not other.warnings


@pytest.mark.parametrize(
    ("safety", "task", "options", "message"),
    [
        ([], TASK, {}, "safety_data is empty"),
        (SAFETY, [], {}, "task_data is empty"),
        (SAFETY, SAFETY[::-1], {}, "are the same"),
        (["a prompt"], TASK, {}, "safety_data: .*no answer"),
        (SAFETY, [{"input_ids": [1, 4], "labels": [-100, -100]}], {}, "no response token"),
        ([{"input_ids": TASK[0]["input_ids"][:4], "labels": TASK[0]["labels"][:4]}], TASK, {}, "no token to calibrate"),
        (SAFETY, TASK, {"weight": "fisher"}, "weight is 'fisher'"),
        (SAFETY, TASK, {"strength": -1.0}, "strength is -1.0"),
        (SAFETY, TASK, {"strength": float("nan")}, "strength is nan"),
        (SAFETY, TASK, {"ridge": 0.0}, "ridge is 0.0"),
        (SAFETY, TASK, {"gates": ()}, "gates is empty"),
        (SAFETY, TASK, {"out": "x"}, "changed in place"),
        (SAFETY, TASK, {"adapter_name": "other"}, "no adapter 'other'"),
    ],
)
def test_refuses_bad_data_and_options(built, safety, task, options, message):
    aligned, root = built
    model = live(aligned, root)
    before = factors(model)
    with pytest.raises(SafeLoraError, match=message):
        filter_adapter(model, safety, task, **options)
    assert all(torch.equal(before[name], a) for name, a in factors(model).items())


def test_refuses_adapters_whose_update_is_not_ba(tmp_path):
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(SafeLoraError, match="DoRA"):
        filter_adapter(model, SAFETY, TASK)
    _, aligned = make(llama, {"target_modules": ["q_proj"]}, tmp_path)
    model = PeftModel.from_pretrained(aligned, tmp_path / "adapter")
    model.merge_adapter()
    with pytest.raises(SafeLoraError, match="merged"):
        filter_adapter(model, SAFETY, TASK)
    with pytest.raises(SafeLoraError, match="output directory"):
        filter_adapter(tmp_path / "adapter", SAFETY, TASK, model=tmp_path / "aligned")
    with pytest.raises(SafeLoraError, match="expected a peft.PeftModel"):
        filter_adapter(llama(), SAFETY, TASK)
