"""Emulated CUDA code in a process that runs under a sanitizer; see `emulated.sanitized`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from . import emulated


def main(variant: str, path: str, *sources: str) -> None:
    emulated.library = lambda *_: Path(path)  # built by the process that starts this one
    machine = emulated.Emulator(variant, tuple(map(Path, sources)) or None)
    for line in sys.stdin:
        calls = torch.load(line.strip(), weights_only=False)
        answer: tuple[str, Any]
        try:
            answer = "done", [kernel(machine, *call) if sources else operator(machine, *call) for call in calls]
        except RuntimeError as fault:
            answer = "fault", str(fault)
        torch.save(answer, line.strip())
        print("done", flush=True)


def operator(machine: emulated.Emulator, op: str, args: Any, options: Any, device: Any, order: Any) -> Any:
    machine.configure(device, order)
    return getattr(machine.ops, op)(*args, **options)


def kernel(machine: emulated.Emulator, name: str, params: Any, memory: Any, options: Any) -> Any:
    machine.configure(options["device"], options["order"])
    machine.launch(name, params(machine, memory), memory=memory, **options)
    return memory


if __name__ == "__main__":
    main(*sys.argv[1:])
