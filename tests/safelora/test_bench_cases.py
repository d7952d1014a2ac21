"""The benchmarks of files, PEFT and SaLoRA run, and do not time what is wrong."""

from __future__ import annotations

import pytest
import torch

from safelora import bench, bench_salora
from safelora_kernels import functional
from safelora_kernels.bench import Options, run_cases
from safelora_kernels.bench.case import OURS

QUICK = Options(seconds=0.01, memory=4 << 30)
CASES = [
    bench.project_files(1, 128, 192, 4),
    bench.lora_layer(32, 64, 4, 4, torch.float32),
    bench.lora_layer(32, 64, 4, 4, torch.bfloat16),
    bench_salora.calibration(1, 1, rows=1, tokens=64),
    bench_salora.training_step(1, rows=1, tokens=16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_cases_run_beside_their_baselines(case):
    run = run_cases([case], QUICK, {})
    assert not run.failed and not run.skipped
    variants = {row.variant: row for row in run.rows}
    assert len(variants) >= 3 and variants[OURS].error <= variants[OURS].bound


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.key)
def test_a_wrong_kernel_is_not_timed(case, monkeypatch):
    project, linear = functional.project_layers, functional.salora_linear

    def wrong(*arguments, **options):
        results = project(*arguments, **options)
        return [r._replace(lora_B=[b * 1.02 for b in r.lora_B]) for r in results]

    monkeypatch.setattr(functional, "salora_linear", lambda *a: linear(*a) * 1.02)
    monkeypatch.setattr("safelora_kernels.project_layers", wrong)
    run = run_cases([case], QUICK, {})
    assert not run.rows and any(key.endswith(OURS) for key in run.failed)


def test_a_leaking_constraint_is_not_timed(monkeypatch):
    from safelora.salora import SubspaceConstraint

    for name in ("project_weights", "project_gradients"):
        monkeypatch.setattr(SubspaceConstraint, name, lambda self: None)
    run = run_cases(CASES[-1:], QUICK, {})
    assert not run.rows and any(key.endswith(OURS) for key in run.failed)
