"""SaLoRA in stacks without PEFT: the module, its example, and that no PEFT is loaded for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelora.salora import SaLoraLinear

STACKS = Path(__file__).resolve().parents[3] / "examples" / "stacks"


def layer(dtype: torch.dtype = torch.float32, rank: int = 3) -> SaLoraLinear:
    basis = torch.linalg.qr(torch.randn(20, 5))[0]
    return SaLoraLinear(torch.nn.Linear(12, 20).to(dtype), basis, rank=rank, alpha=7.0)


def test_output_and_gradients_are_the_dense_forms():
    net = layer()
    with torch.no_grad():
        net.lora_B.normal_()
    x = torch.randn(4, 6, 12, requires_grad=True)
    C = torch.eye(20, dtype=torch.float64) - net.basis.double() @ net.basis.double().t()
    wide = {name: value.detach().double().requires_grad_() for name, value in net.named_parameters()}
    z = x.detach().double().requires_grad_()
    dense = z @ wide["base.weight"].t() + wide["base.bias"]
    dense = dense + 7.0 / 3 * ((z @ wide["lora_A"].t()) @ wide["lora_B"].t()) @ C.t()
    y = net(x)
    assert torch.allclose(y.double(), dense, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (dense * weight.double()).sum().backward()
    for found, expected in ((x, z), (net.lora_A, wide["lora_A"]), (net.lora_B, wide["lora_B"])):
        assert found.grad is not None and expected.grad is not None
        assert float((found.grad - expected.grad).norm()) <= 1e-5 * float(expected.grad.norm())
    assert net.base.weight.grad is None
    assert float((net.basis.t() @ net.lora_B.grad).norm()) <= 1e-6 * float(net.lora_B.grad.norm())


def test_training_stays_in_the_complement_and_leaves_a_plain_lora():
    net = layer()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    x, target = torch.randn(30, 12), torch.randn(30, 20)
    for _ in range(10):
        loss = torch.nn.functional.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lora_A, lora_B = net.factors()
        change = lora_B.double() @ lora_A.double()
        assert float((net.basis.double().t() @ change).norm()) <= 1e-5 * float(change.norm())
    plain = net.base(x) + net.scaling * (x @ lora_A.t()) @ lora_B.t()
    assert torch.allclose(net(x), plain, atol=1e-5)


def test_the_basis_stays_fp32():
    net = layer().to(torch.bfloat16)
    assert net.basis.dtype == torch.float32 and net.lora_B.dtype == torch.bfloat16
    assert "basis" in net.state_dict() and net(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer(torch.bfloat16).lora_A.dtype == torch.bfloat16


def test_errors():
    base = torch.nn.Linear(12, 20)
    with pytest.raises(TypeError, match="float32"):
        SaLoraLinear(base, torch.zeros(20, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\(20, k\)"):
        SaLoraLinear(base, torch.zeros(12, 3))
    with pytest.raises(ValueError, match="rank"):
        SaLoraLinear(base, torch.zeros(20, 3), rank=0)


def test_the_example_and_its_imports():
    """It trains, its updates stay out of the subspaces, and neither PEFT nor transformers is imported."""
    code = f"exec(open({str(STACKS / 'salora_module.py')!r}).read())\nimport sys\n"
    code += "print('peft' in sys.modules, 'transformers' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
    leaks = [float(found) for found in re.findall(r"= ([\d.e+-]+)$", done.stdout, re.MULTILINE)]
    assert losses[-1] < 0.9 * losses[0] and len(leaks) == 2 and max(leaks) <= 1e-5
    assert done.stdout.splitlines()[-1] == "False False"
