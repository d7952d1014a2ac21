"""Rules against dense arithmetic in fp64, the bits of the model around them, and how rules are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from safelora import SafeLoraError, apply_safe_lora
from safelora.rules import Change, Rule, Subject, make_rule, rule_names
from safelora.rules._alignment import leading_basis
from tests.safelora.tiny import Tiny, make_tiny

pytestmark = pytest.mark.filterwarnings("ignore")
SELECTING = ("safe_lora", "safe_lora_exact", "unit", "zero_selected")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), adapters=1)


@pytest.fixture(scope="module")
def subject(tiny) -> Subject:
    return Subject(PeftModel.from_pretrained(tiny.fresh(), tiny.adapter("one")), tiny.tokenizer, tiny.base)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(model: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def differences(tiny: Tiny) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny.base).state_dict()
    return {n: w.double() - base[n].double() for n, w in tiny.model.state_dict().items()}


@pytest.mark.parametrize("name", [*SELECTING, "none", "random_deletion", "uniform_scaling"])
def test_the_model_has_its_bits_back(subject, name):
    rule = make_rule(name)
    before = bits(subject.model)
    with subject.changed(rule.change(subject, 3 if rule.parameter == "modules" else 0.5)):
        changed = differing(subject.model, before)
        modules = {key.split(".lora_")[0] for key in changed}
        expected = {"none": 0, "uniform_scaling": len(subject.modules)}.get(name, 3)
        assert len(modules) == expected
        assert all("lora_B" in key for key in changed)
    assert not differing(subject.model, before)


def test_bits_are_back_after_an_error(subject):
    before = bits(subject.model)
    with pytest.raises(RuntimeError), subject.changed(make_rule("uniform_scaling").change(subject, 0.5)):
        raise RuntimeError
    assert not differing(subject.model, before)
    module = subject.modules[0]
    B, A = subject.factors(module)
    for change, said in (
        (Change(module, B[:-1]), r"lora_B of shape .*expected"),
        (Change(module, None, A.T), r"lora_A of shape .*expected"),
        (Change(module, B / 0), "not finite"),
    ):
        with pytest.raises(SafeLoraError, match=said), subject.changed([change]):
            pytest.fail("accepted")
        assert not differing(subject.model, before)


def test_a_rule_may_change_either_factor(subject):
    first, module = subject.modules[0], subject.modules[2]
    B, A = subject.factors(module)
    _, other_A = subject.factors(first)
    before = bits(subject.model)
    with subject.changed([Change(module, B * 2, A / 4), Change(first, None, torch.ones_like(other_A))]):
        assert torch.equal(subject.parameters[module.lora_B.name], B * 2)
        assert torch.equal(subject.parameters[module.lora_A.name], A / 4)
        assert (subject.parameters[first.lora_A.name] == 1).all()
        assert len(differing(subject.model, before)) == 3


@pytest.mark.parametrize("count", [1, 4, 14])
def test_safe_lora_is_the_projection_of_the_package(tiny, subject, count):
    other = PeftModel.from_pretrained(tiny.fresh(), tiny.adapter("one"))
    report = apply_safe_lora(other, tiny.base, num_layers=count)
    rule = make_rule("safe_lora")
    with subject.changed(rule.change(subject, count)):
        assert not differing(subject.model, bits(other))
    about = rule.about(subject, count)
    assert about["threshold"] == max(module.cosine for module in report.projected)
    assert about["median_shrinkage"] < 1
    zeroed = {change.module.name for change in make_rule("zero_selected").change(subject, count)}
    assert zeroed == {module.name for module in report.projected}


def test_unit_norm_turns_and_does_not_shrink(tiny, subject):
    V = differences(tiny)
    for change in make_rule("unit").change(subject, 5):
        B, A = (factor.double() for factor in subject.factors(change.module))
        v = V[f"{change.module.name}.weight"]
        expected = v @ (v.T @ B)
        expected *= (B @ A).norm() / (expected @ A).norm()
        assert float((change.lora_B - expected).norm() / expected.norm()) < 1e-5
        assert float((change.lora_B.double() @ A).norm()) == pytest.approx(float((B @ A).norm()), rel=1e-6)


@pytest.mark.parametrize("spec", ["safe_lora_exact", "safe_lora_exact:energy=0.5", "safe_lora_exact:rank=3"])
def test_the_exact_projector_is_orthogonal(tiny, subject, spec):
    V = differences(tiny)
    rule = make_rule(spec)
    changes = list(rule.change(subject, len(subject.modules)))
    assert len(changes) == len(subject.modules)
    for change in changes:
        B, A = (factor.double() for factor in subject.factors(change.module))
        left, sigma, _ = torch.linalg.svd(V[f"{change.module.name}.weight"])
        share = torch.cumsum(sigma**2, 0) / (sigma**2).sum()
        k = rule.rank or int((share < rule.energy).sum()) + 1
        P = left[:, :k] @ left[:, :k].T
        assert float((change.lora_B - P @ B).norm() / B.norm()) < 1e-6
        twice = P @ change.lora_B.double()
        assert float((twice - change.lora_B).norm() / B.norm()) < 1e-6
    # Cosines of an orthogonal projector are ‖P·B·A‖/‖B·A‖; the lowest go first.
    cosine = {}
    for change in changes:
        B, A = (factor.double() for factor in subject.factors(change.module))
        cosine[change.module.name] = float((change.lora_B.double() @ A).norm() / (B @ A).norm())
    first = {change.module.name for change in rule.change(subject, 4)}
    assert first == set(sorted(cosine, key=lambda name: cosine[name])[:4])


def test_all_of_a_full_rank_V_is_the_identity(subject):
    for change in make_rule("safe_lora_exact:energy=1.0").change(subject, len(subject.modules)):
        B, _ = subject.factors(change.module)
        d_out, d_in = change.module.d_out, change.module.d_in
        if d_out <= d_in:
            assert float((change.lora_B - B).norm() / B.norm()) < 1e-6


@settings(max_examples=25, deadline=None)
@given(d_out=st.integers(2, 40), d_in=st.integers(2, 40), k=st.integers(1, 12), seed=st.integers(0, 99))
def test_drawn_and_direct_bases_agree(d_out, d_in, k, seed):
    """The randomised iteration finds the subspace that the eigenvectors span, and holds the energy asked for."""
    generator = torch.Generator().manual_seed(seed)
    size = min(d_out, d_in, k)
    left, right = (torch.linalg.qr(torch.randn(d, size, generator=generator))[0] for d in (d_out, d_in))
    V = left @ torch.diag(3.0 * 0.4 ** torch.arange(size)) @ right.T
    with pytest.MonkeyPatch.context() as patch:
        direct = leading_basis(V, rank=max(1, size - 1))
        direct_energy = leading_basis(V, energy=0.8)
        patch.setattr("safelora.rules._alignment._DIRECT", 0)
        drawn = leading_basis(V, rank=max(1, size - 1), seed=1)
        drawn_energy = leading_basis(V, energy=0.8, seed=1)
        assert torch.equal(drawn, leading_basis(V, rank=max(1, size - 1), seed=1))
    for one, other in ((direct, drawn), (direct_energy, drawn_energy)):
        assert one.shape == other.shape
        one, other = one.double(), other.double()
        assert float((one.T @ one - torch.eye(one.shape[1])).abs().max()) < 1e-5
        assert float((one @ one.T - other @ other.T).norm()) < 1e-4
    held = float((drawn_energy.double().T @ V.double()).square().sum() / V.double().square().sum())
    assert held >= 0.8 - 1e-6


def test_random_deletions_are_draws(subject):
    rule = make_rule("random_deletion")

    def names(value: float, draw: int) -> frozenset[str]:
        return frozenset(change.module.name for change in rule.change(subject, value, draw))

    assert len({names(5, draw) for draw in range(6)}) > 1
    assert names(5, 1) == names(5, 1)
    assert len(names(14, 0)) == len(subject.modules) == 14
    other = Subject(subject.model, seed=1)
    assert {frozenset(c.module.name for c in rule.change(other, 5, d)) for d in range(3)} != {
        names(5, d) for d in range(3)
    }


def test_names_of_rules():
    assert {*SELECTING, "none", "random_deletion", "uniform_scaling"} <= set(rule_names())
    for name in rule_names():
        rule = make_rule(name)
        assert rule.name == rule.spec == name
        assert rule.title and rule.label.startswith(rule.title)
        assert rule.parameter == "modules" or rule.values
        with pytest.raises(NotImplementedError):
            Rule.change(rule, None, 1.0)  # type: ignore[arg-type]
    exact = make_rule("safe_lora_exact:energy=0.5,rank=8")
    assert (exact.energy, exact.rank) == (0.5, 8)
    assert make_rule(exact.spec) == exact and "energy=0.5" in exact.label
    assert make_rule("tests.safelora.test_rules:Doubled").values == (1.0, 2.0)
    assert make_rule("tests.safelora.test_rules:Doubled:times=3").times == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "unknown rule 'nothing'.*random_deletion, safe_lora"),
        ("absent.module:Rule", "unknown rule.*No module named"),
        ("tests.safelora.test_rules:Tiny", "unknown rule"),
        ("_rule", "unknown rule"),
        ("unit:speed=3", "unknown option 'speed'; it has none"),
        ("safe_lora_exact:energy", "unknown option 'energy'; it has energy, rank"),
        ("safe_lora_exact:energy=2", "energy is 2"),
        ("safe_lora_exact:rank=0", "rank is 0"),
    ],
)
def test_unknown_rules(spec, said):
    with pytest.raises(SafeLoraError, match=f"(?s){said}"):
        make_rule(spec)


@dataclass(frozen=True)
class Doubled(Rule):
    """A rule of another package."""

    times: int = 2

    name: ClassVar[str] = "tests.safelora.test_rules:Doubled"
    title: ClassVar[str] = "doubled"
    parameter: ClassVar[str] = "times"
    values: ClassVar[tuple[float, ...]] = (1.0, 2.0)

    def change(self, subject: Subject, value: float, draw: int = 0) -> Iterator[Change]:
        for module in subject.modules:
            yield Change(module, subject.factors(module)[0] * (1 + self.times * value))
