"""Every Triton kernel compiled for every target, without a GPU: resources, spills, matrix opcodes, width of loads."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("triton")

from .interpreted import HERE

if HERE:
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 rules out", allow_module_level=True)

from safelora_kernels.triton import aot

from .emulated import ROOT

LIMIT_S = 900  # for all of them from scratch on a busy machine: a kernel that takes minutes to compile is a fault
PAIRS = [(entry, target) for entry in aot.MANIFEST for target in aot.targets_of(entry)]


@pytest.fixture(scope="module")
def lines() -> dict[tuple[str, str], dict[str, Any]]:
    """What ``python -m safelora_kernels.triton.aot`` finds, by entry and target; binaries are kept between runs."""
    command = [sys.executable, "-m", "safelora_kernels.triton.aot", "--json"]
    env = {**os.environ, "TRITON_CACHE_DIR": str(ROOT / "build" / "triton")}
    jobs = min(os.cpu_count() or 1, 8)
    shares = [[entry.name for entry in aot.MANIFEST[job::jobs]] for job in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        outputs = list(pool.map(lambda names: _run([*command, *names], env), filter(None, shares)))
    found = {(line["entry"], line["target"]): line for out, _ in outputs for line in map(json.loads, out.splitlines())}
    found["", ""] = {"errors": "\n".join(errors[-3000:] for _, errors in outputs)}
    return found


def _run(command: list[str], env: dict[str, str]) -> tuple[str, str]:
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        return process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        return output, f"{errors}\nkilled after {LIMIT_S} s"


@pytest.mark.parametrize(("entry", "target"), PAIRS, ids=lambda value: getattr(value, "name", value))
def test_resources(lines: dict[tuple[str, str], dict[str, Any]], entry: aot.Entry, target: str) -> None:
    line = lines.get((entry.name, target))
    assert line is not None, f"not compiled: {lines['', '']['errors']}"
    assert line["faults"] == []


def test_names_are_unique() -> None:
    names = [entry.name for entry in aot.MANIFEST]
    assert len(set(names)) == len(names)


def _broken() -> Iterator[tuple[str, aot.Resources, str]]:
    good = aot.Resources(1024, 64, 0, 128, {"HMMA": 8}, 128)
    yield "shared", good._replace(shared=100 * 1024), "shared memory"
    yield "spills", good._replace(spills=1), "spilled"
    yield "registers", good._replace(registers=255, threads=512), "registers"
    yield "opcode", good._replace(opcodes={"FFMA": 8}), "no HMMA"
    yield "load", good._replace(widest_load=64), "widest load"


@pytest.mark.parametrize(("found", "fault"), [case[1:] for case in _broken()], ids=[case[0] for case in _broken()])
def test_every_fault_is_seen(found: aot.Resources, fault: str) -> None:
    entry = dataclasses.replace(aot.MANIFEST[0], opcodes={"sm_86": ("HMMA",)}, wide_loads=True)
    assert [fault in text for text in found.faults(entry, "sm_86")] == [True]
