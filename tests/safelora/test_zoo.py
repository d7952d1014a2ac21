"""Every kind of adapter PEFT writes, projected on disk and reloaded by unpatched PEFT, against dense fp64 truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from safelora import project_adapter
from tests.safelora.zoo_models import CASES, changes, pair_of, project_dense, randomised

pytestmark = pytest.mark.filterwarnings("ignore")
KERNEL = 1e-5  # the relative (Frobenius) error the kernels promise with fp32 arithmetic
COSINE = 1e-6


# What PEFT makes of the names that Mixtral's experts had before they were one parameter.
RENAMED = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}


def listed(targets: Any) -> list[str]:
    """Names that are given one by one, not by a pattern."""
    return [RENAMED.get(target, target) for target in targets] if isinstance(targets, list) else []


@pytest.mark.parametrize("name", CASES)
def test_matrix(tmp_path, name):
    case = CASES[name]
    base, aligned = pair_of(case, tmp_path)
    tuned = randomised(get_peft_model(copy.deepcopy(aligned), LoraConfig(**{"r": 4, **case.lora})))
    tuned.save_pretrained(tmp_path / "adapter")
    del tuned
    report = project_adapter(
        tmp_path / "adapter", tmp_path / "base", tmp_path / "aligned", tmp_path / "out", threshold=1
    )
    given, got = changes(aligned, tmp_path / "adapter"), changes(aligned, tmp_path / "out")
    weights = [dict(model.named_parameters(remove_duplicate=False)) for model in (base, aligned)]
    assert set(got) == set(given)
    aimed = [target for kind in ("target_modules", "target_parameters") for target in listed(case.lora.get(kind))]
    assert [name for name in aimed if not any(f".{name}." in f".{changed}." for changed in given)] == []
    cosines = []
    for parameter, change in given.items():
        if parameter == "model.embed_tokens.weight" and "tied" in name:
            continue
        expected, found = project_dense(case, parameter, *(model[parameter] for model in weights), change)
        cosines += found
        assert float((got[parameter] - expected).norm() / expected.norm()) <= 2 * KERNEL, parameter
    assert len(report.projected) == len(report.modules)
    assert sorted(module.cosine for module in report.modules) == pytest.approx(sorted(cosines), abs=COSINE)
    if case.matched:
        assert case.matched in {module.matched for module in report.modules}
