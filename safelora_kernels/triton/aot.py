"""Every kernel compiled ahead of time, without a driver or a GPU, and what it then takes of a chip.

``MANIFEST`` lists each kernel in the variants that matter, with arguments to run it on. From the command line,
``python -m safelora_kernels.triton.aot [--json] [entry …]`` compiles them and prints one line per entry and target.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Example(NamedTuple):
    """Arguments of one launch on the CPU, for an interpreter or an emulator.

    ``args`` stand in signature order without the constexprs: tensors, ints, floats, tuples of ints, which a compiled
    kernel takes one by one. ``reachable`` are the tensors that the kernel reaches through pointer tables alone.
    ``check`` compares the outputs with fp64 truth once the launch is over and raises AssertionError.
    """

    args: list[Any]
    grid: tuple[int, ...]
    reachable: list[Tensor]
    check: Callable[[], None]


@dataclass(frozen=True)
class Entry:
    """One variant of a kernel. ``signature`` leaves the constexprs out.

    ``opcodes`` are parts of mnemonics, by target name. ``targets`` narrows the targets for a variant made for some.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    examples: tuple[Callable[[], Example], ...]
    opcodes: dict[str, tuple[str, ...]]
    wide_loads: bool
    targets: tuple[str, ...] = ()


class Limits(NamedTuple):
    """Shared memory that a block may have in bytes, and the register file it shares out, in 32-bit registers."""

    shared: int
    registers: int
    registers_per_thread: int


TARGETS = {
    "sm_80": Limits(163 * 1024, 65536, 255),
    "sm_86": Limits(99 * 1024, 65536, 255),
    "sm_89": Limits(99 * 1024, 65536, 255),
    "sm_90": Limits(227 * 1024, 65536, 255),
    "sm_100": Limits(227 * 1024, 65536, 255),
    "sm_120": Limits(99 * 1024, 65536, 255),
    "gfx942": Limits(64 * 1024, 131072, 512),
}


CUDA_TARGETS = tuple(target for target in TARGETS if target.startswith("sm_"))


def close(actual: Tensor, truth: Tensor, bound: float) -> None:
    """Raises AssertionError unless ``actual`` is ``truth`` within ``bound``, relative in the Frobenius norm, and the
    rounding to its dtype."""
    error, scale = float((actual.double() - truth).norm()), float(truth.norm())
    allowed = (bound + torch.finfo(actual.dtype).eps / 2) * scale
    if not error <= allowed:
        raise AssertionError(f"error {error:.2e} exceeds {allowed:.2e}")


class Resources(NamedTuple):
    """What a compiled kernel takes: bytes of shared memory, registers and spilled bytes or registers of a thread, how
    often each opcode occurs, and the bits of the widest load from global memory."""

    shared: int
    registers: int
    spills: int
    threads: int
    opcodes: dict[str, int]
    widest_load: int

    def faults(self, entry: Entry, target: str) -> list[str]:
        """Everything that keeps this kernel from being what its entry promises on ``target``."""
        limits = TARGETS[target]
        faults = []
        if self.shared > limits.shared:
            faults.append(f"{self.shared} bytes of shared memory, {target} has {limits.shared}")
        if self.spills:
            faults.append(f"{self.spills} registers or bytes spilled")
        if self.registers > limits.registers_per_thread or self.registers * self.threads > limits.registers:
            faults.append(f"{self.registers} registers in each of {self.threads} threads, {target} has {limits}")
        for opcode in entry.opcodes.get(target, ()):
            if not any(opcode in name for name in self.opcodes):
                faults.append(f"no {opcode} among its opcodes")
        if entry.wide_loads and self.widest_load < 128:
            faults.append(f"the widest load has {self.widest_load} bits, expected 128")
        return faults


_MODULES = ("project", "cosine", "select", "examples")


def _manifest() -> list[Entry]:
    modules = [importlib.import_module(f"{__package__}.{module}") for module in _MODULES]
    return [entry for module in modules for entry in module.ENTRIES]


def __getattr__(name: str) -> Any:
    # The kernel modules import Entry from here, so the list can only be made once they are there.
    if name != "MANIFEST":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _manifest()
    return globals()[name]


def targets_of(entry: Entry) -> tuple[str, ...]:
    return entry.targets or tuple(TARGETS)


def _gpu_target(target: str) -> GPUTarget:
    if target not in TARGETS:
        raise ValueError(f"no target is called {target!r}: use one of {', '.join(TARGETS)}")
    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _attributes(entry: Entry, args: Sequence[Any]) -> dict[tuple[int], list[list[Any]]]:
    """The arguments that a launch would find to be multiples of 16."""
    found: dict[tuple[int], list[list[Any]]] = {}
    for name, value in zip(entry.signature, args, strict=True):
        place = entry.kernel.arg_names.index(name)
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(number, int) and number % 16 == 0 and not entry.kernel.params[place].do_not_specialize:
            found[(place,)] = [["tt.divisibility", 16]]
    return found


def compile_entry(entry: Entry, target: str, example: Example | None = None) -> Any:
    """Triton's ``CompiledKernel`` of an entry for a target such as ``"sm_90"``; needs neither driver nor GPU.

    The compiler is told what a launch with the arguments of the example, by default the first, would tell it.
    """
    example = example or entry.examples[0]()
    names = {**entry.signature, **dict.fromkeys(entry.constexprs, "constexpr")}
    source = ASTSource(
        entry.kernel,
        {name: names[name] for name in entry.kernel.arg_names},
        constexprs=entry.constexprs,
        attrs=_attributes(entry, example.args),
    )
    return triton.compile(source, target=_gpu_target(target), options=dict(entry.options))


def resources(compiled: Any, target: str) -> Resources:
    """Reads what a compiled kernel takes from its machine code; kept beside Triton's own cache of the binary."""
    kept = triton.runtime.cache.get_cache_manager(compiled.hash)
    name = f"{compiled.metadata.name}.resources.json"
    path = kept.get_file(name)
    if path is not None:
        return Resources(**json.loads(Path(path).read_text(encoding="utf-8")))
    read = _read_cuda if target.startswith("sm_") else _read_hip
    result = read(compiled)
    kept.put(json.dumps(result._asdict()), name, binary=False)
    return result


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True, timeout=120).stdout


def _read_cuda(compiled: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name)))
        sass = _tool("nvdisasm", "-c", file.name)
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    opcodes = Counter(mnemonic.split(".")[0] for mnemonic in mnemonics)
    loads = [m for m in mnemonics if m.startswith(("LDG", "UTMALDG"))]
    spills = int(usage["STACK"]) + int(usage["LOCAL"]) + opcodes["STL"] + opcodes["LDL"]
    return Resources(
        compiled.metadata.shared,
        int(usage["REG"]),
        spills,
        compiled.metadata.num_warps * 32,
        dict(opcodes),
        max((128 if "128" in m or m.startswith("UTMALDG") else 64 if "64" in m else 32 for m in loads), default=0),
    )


def _read_hip(compiled: Any) -> Resources:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    opcodes = Counter(re.findall(r"^\s+([a-z]\w+)", assembly, re.MULTILINE))
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    loads = [name.rsplit("_", 1)[1] for name in opcodes if re.match(r"(global|buffer)_load_", name)]
    return Resources(
        field("group_segment_fixed_size"),
        field("vgpr_count"),
        field("vgpr_spill_count") + field("private_segment_fixed_size"),
        compiled.metadata.num_warps * 64,
        dict(opcodes),
        max((widths.get(width, 16) for width in loads), default=0),
    )


def compile_all(names: Sequence[str] = ()) -> Iterator[tuple[Entry, str, Resources]]:
    """Entry, target and resources of everything in the manifest, or of the entries named."""
    entries: list[Entry] = __getattr__("MANIFEST")
    unknown = set(names) - {entry.name for entry in entries}
    if unknown:
        raise ValueError(f"no entry is called {', '.join(sorted(unknown))}: there are {[e.name for e in entries]}")
    for entry in entries:
        if names and entry.name not in names:
            continue
        example = entry.examples[0]()
        for target in targets_of(entry):
            yield entry, target, resources(compile_entry(entry, target, example), target)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m safelora_kernels.triton.aot", description=__doc__)
    parser.add_argument("entries", nargs="*", help="names of entries, all of them by default")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, with every opcode")
    options = parser.parse_args(arguments)
    failed = False
    if not options.json:
        print(f"{'entry':40} {'target':8} {'shared':>7} {'regs':>5} {'spills':>6} {'load':>5}  matrix opcodes")
    for entry, target, found in compile_all(options.entries):
        faults = found.faults(entry, target)
        failed |= bool(faults)
        if options.json:
            line = {"entry": entry.name, "target": target, "faults": faults, **found._asdict()}
            print(json.dumps(line), flush=True)
            continue
        matrix = ", ".join(f"{n} {op}" for op, n in found.opcodes.items() if re.search("MMA|mfma", op))
        columns = f"{found.shared:7} {found.registers:5} {found.spills:6} {found.widest_load:5}"
        print(f"{entry.name:40} {target:8} {columns}  {matrix}", flush=True)
        for fault in faults:
            print(f"  {fault}", flush=True)
    return int(failed)


if __name__ == "__main__":
    # Run as a script this module exists twice; the entries belong to the imported one.
    from safelora_kernels.triton import aot

    sys.exit(aot.main())
