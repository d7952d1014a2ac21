"""Seeds, the backends of this machine, and allocations that betray an element never written."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# Read at the first operator: the native kernels fill their outputs and scratch with NaN before they start.
os.environ.setdefault("SAFELORA_DEBUG", "1")

import safelora_kernels as sk

# SAFELORA_TEST_DEVICE=cuda runs the operators' tests on a GPU, and those alone: the others make tensors for the CPU.
DEVICE = os.environ.get("SAFELORA_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    # The first call of a kernel may compile it.
    hypothesis.settings.register_profile("device", deadline=None)
    hypothesis.settings.load_profile("device")
    _here = Path(__file__).parent
    collect_ignore = [str(path) for path in _here.iterdir() if path.is_dir() and path.name not in ("ops", "gpu")]
    collect_ignore += [str(path) for path in (_here / "gpu").glob("test_*.py") if path.name != "test_on_device.py"]
_PROBE = torch.zeros(1)
AVAILABLE = [name for name in sk.backends() if sk.explain("select_layers", _PROBE, threshold=0.0, backend=name).backend]
PACKAGES = ("safelora_kernels", "safelora")
# The files that take longest. They start first, or one worker would be left with one of them when all others are done.
LONGEST = (
    "gpu/test_triton_aot.py",
    "gpu/test_cuda_build.py",
    "gpu/test_cuda_ops.py",
    "gpu/test_cuda_cluster.py",
    "gpu/test_triton_project.py",
    "gpu/test_triton_ptx.py",
    "gpu/test_emulator.py",
    "gpu/test_cuda_project.py",
    "ops/test_code_paths.py",
    "ops/test_boundary.py",
    "packaging/test_cpp_library.py",
    "ops/test_backends.py",
    "safelora/test_live_distributed.py",
    "safelora/test_stacks.py",
)
# These share one build of the library and one wheel, so one worker takes them all.
BUILDS = {f"tests/packaging/{name}.py" for name in ("test_binary", "test_cpp_library", "test_install")}


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs on this machine, by name."""
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # would put the files with most tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places), f"LONGEST names a file that is not there: {LONGEST}"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files to workers, as --dist loadfile does."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "builds" if file in BUILDS else file

    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Triton, asked by name, refuses fp64: nothing to test there."""
    try:
        return (yield)
    except RuntimeError as error:
        if DEVICE != "cpu" and "the call has fp64 in it, which the reference serves" in str(error):
            pytest.skip(str(error))
        raise


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
