"""Every path of the native kernels that this CPU can run, and the reference operators, held to the same tests."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import safelora_kernels as sk

from . import truth
from .test_backends import NATIVE, ROOT, USE, python

NUMERICS = [
    "test_project.py",
    "test_project_large.py",
    "test_project_out.py",
    "test_gram.py",
    "test_salora.py",
    "test_select.py",
    "test_determinism.py",
    "test_properties.py",
]
NEEDED = {
    "scalar": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni", "avx512bw", "avx512vl"},
    "amx": {"amx_tile", "amx_bf16", "avx512f", "avx512bw"},
}


RUNNABLE = [isa for isa, needed in NEEDED.items() if needed <= truth.cpu_flags()]
LACKING = [isa for isa in NEEDED if isa not in RUNNABLE]
native = pytest.mark.skipif(not NATIVE, reason=f"no native kernels: {sk.backends()['cpu'].reason}")


def run_tests(files: list[str], *options: str, **env: str) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SAFELORA_", "PYTEST_"))}
    tests = [f"tests/ops/{name}" for name in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, *tests]
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, **env}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@native
@pytest.mark.slow
@pytest.mark.parametrize("isa", RUNNABLE[:-1])
def test_forced_path(isa: str) -> None:
    """All but the best, which is what these files run on without being asked; the last test here holds it to that."""
    run_tests(NUMERICS, "-k", "not reference", SAFELORA_CPU_ISA=isa)


@native
@pytest.mark.slow
def test_operators_without_native_kernels() -> None:
    run_tests([*NUMERICS, "test_boundary.py"], "-k", "not compiled", SAFELORA_DISABLE_NATIVE="1")


@native
@pytest.mark.parametrize("isa", [*LACKING, "avx1024"])
def test_a_path_that_the_cpu_lacks_raises_at_the_first_call(isa: str) -> None:
    done = python(USE, SAFELORA_CPU_ISA=isa)
    assert done.returncode != 0
    assert f"SAFELORA_CPU_ISA={isa}" in done.stderr.splitlines()[-1] or isa in done.stderr
    assert "RuntimeError" in done.stderr


@native
def test_paths_are_really_different() -> None:
    """The bits of a forced path differ from those of another, or forcing does nothing."""
    code = """
import torch, safelora_kernels as sk
torch.manual_seed(0)
w, v, b = torch.randn(300, 700).bfloat16(), torch.randn(300, 700).bfloat16(), torch.randn(300, 16)
print(sk.project_lowrank(w, v, b, backend="cpu").lora_B.double().sum().item().hex())
"""
    printed = {isa: python(code, SAFELORA_CPU_ISA=isa).stdout for isa in RUNNABLE}
    assert all(printed.values())
    assert len(set(printed.values())) >= min(2, len(RUNNABLE))
    best = RUNNABLE[-1]
    assert python(code).stdout == printed[best]
