"""Seeds, the backends of this machine, and allocations that betray an element never written."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Read at the first operator: the native kernels fill their outputs and scratch with NaN before they start.
os.environ.setdefault("SAFELORA_DEBUG", "1")

import safelora_kernels as sk

# SAFELORA_TEST_DEVICE=cuda runs the operators' tests on a GPU.
DEVICE = os.environ.get("SAFELORA_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
_PROBE = torch.zeros(1)
AVAILABLE = [name for name in sk.backends() if sk.explain("select_layers", _PROBE, threshold=0.0, backend=name).backend]
PACKAGES = ("safelora_kernels", "safelora")


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine, by name."""
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test draws its own numbers, the same ones in every run and order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or type(result) is not torch.Tensor or result.is_meta:
            return result
        caller = str(sys._getframe(1).f_globals.get("__name__", ""))
        if caller.split(".")[0] in PACKAGES and result.is_floating_point():
            result.fill_(torch.nan)
        return result

    return poisoned


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the packages allocate without writing it reads as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
