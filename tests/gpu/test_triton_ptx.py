"""The PTX of every Triton kernel, interpreted: every example in several orders, free of races, the same bits."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from .interpreted import HERE

if HERE:
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 rules out", allow_module_level=True)

import triton

from safelora_kernels.triton import aot

from .emulated import ROOT, ptxsim

TARGETS = ("sm_80", "sm_90")
RESIDENT = 4  # blocks that run at the same time, where the order is not the simplest
SCHEDULES: list[dict[str, Any]] = [
    {"order": "fwd", "async_mode": "lazy"},
    {"order": "rev", "async_mode": "eager", "resident": RESIDENT},
    *({"order": "random", "seed": seed, "resident": RESIDENT} for seed in range(3)),
]
# Two warps of these hold the same rows of a tile (its layout has a warp bit that moves nothing), and both write them to
# shared memory when the layout changes: equal values, which the detector takes for a race.
REPLICATED = {
    "salora_output_gradient_odd_nvidia",
    *(f"gram_apply_{name}_nvidia" for name in ("fp32", "odd", "ranks_bf16", "ranks_fp32")),
}
CASES = [
    pytest.param(entry, target, number, id=f"{entry.name}-{target}-{number}")
    for entry in aot.MANIFEST
    for target in TARGETS
    if target in aot.targets_of(entry)
    for number in range(len(entry.examples))
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if ptxsim() is None:
        pytest.skip("no PTX interpreter: set PTXSIM to the folder that holds its package")
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(ROOT / "build" / "triton")
        yield


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    """Lets go of the interpreter's modules before it is unloaded."""
    yield
    _module.cache_clear()


@functools.cache
def _module(text: str) -> Any:
    tool = ptxsim()
    assert tool is not None
    return tool.Module(text)


def launch(compiled: Any, text: str, example: aot.Example, race: bool = True, **schedule: Any) -> None:
    module, metadata = _module(text), compiled.metadata
    assert not metadata.global_scratch_size
    args = [part for value in example.args for part in (value if isinstance(value, tuple) else (value,))]
    scratch = [None] * (len(module._k[metadata.name]["params"]) - len(args))
    grid = (*example.grid, 1, 1)[:3]
    threads = metadata.num_warps * 32
    module.launch(
        metadata.name,
        grid,
        threads,
        [*args, *scratch],
        shared_bytes=metadata.shared,
        extra=example.reachable,
        race=race,
        max_instrs=10**8,
        **schedule,
    )


def outcome(compiled: Any, text: str, make: Callable[[], aot.Example], **schedule: Any) -> list[torch.Tensor]:
    """The floating tensors of a launch after it, checked."""
    example = make()
    launch(compiled, text, example, **schedule)
    example.check()
    tensors = [value for value in (*example.args, *example.reachable) if isinstance(value, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


def every_outcome(compiled: Any, text: str, make: Callable[[], aot.Example], race: bool = True) -> None:
    first = None
    for schedule in SCHEDULES:
        results = outcome(compiled, text, make, race=race, **schedule)
        first = first or results
        assert all(same_bits(a, b) for a, b in zip(first, results, strict=True)), schedule


@pytest.mark.parametrize(("entry", "target", "number"), CASES)
def test_every_order_gives_the_same_bits(entry: aot.Entry, target: str, number: int) -> None:
    make = entry.examples[number]
    compiled = aot.compile_entry(entry, target, make())
    every_outcome(compiled, compiled.asm["ptx"], make, race=entry.name not in REPLICATED)


# Bugs planted in the PTX: what they remove, and a pattern for the lines that go (or what stays of them).
PLANTED = {
    "no barrier": (r"^\s*bar\.sync\s+0;$", ""),
    "no wait for copies": (r"^\s*cp\.async\.wait_group\s+\d+;$", ""),
    "stores without their mask": (r"^(\s*)@%p\d+ (st\.global)", r"\1\2"),
    "loads without their mask": (r"^(\s*)@%p\d+ (cp\.async|ld\.global)", r"\1\2"),
}


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("name", ["project_out_odd_nvidia", "salora_output_gradient_bf16_nvidia"])
def test_planted_bugs_are_caught(name: str, bug: str) -> None:
    tool = ptxsim()
    assert tool is not None
    (entry,) = (entry for entry in aot.MANIFEST if entry.name == name)
    make = entry.examples[0]
    compiled = aot.compile_entry(entry, "sm_80", make())
    pattern, left = PLANTED[bug]
    text, count = re.subn(pattern, left, compiled.asm["ptx"], flags=re.MULTILINE)
    assert count
    with pytest.raises((tool.PtxError, AssertionError)):
        every_outcome(compiled, text, make)
