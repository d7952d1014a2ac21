"""Unusable input: one clear error that names the culprit, before any work, and no output of any kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import safelora.output
import safelora.stream
from safelora import SafeLoraError, project_adapter
from tests.safelora.zoo import (
    factors,
    llama_modules,
    llama_tensors,
    read_output,
    shifted,
    write_adapter,
    write_checkpoint,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
Q0 = "model.layers.0.self_attn.q_proj"
V1 = "model.layers.1.self_attn.v_proj"


@pytest.fixture
def inputs(tmp_path: Path) -> SimpleNamespace:
    """A sound adapter with two sharded models, to be damaged by the test."""
    base = llama_tensors()
    return SimpleNamespace(
        adapter=write_adapter(tmp_path / "adapter", factors(llama_modules())),
        base=write_checkpoint(tmp_path / "base", base, shards=2),
        aligned=write_checkpoint(tmp_path / "aligned", shifted(base), shards=2),
        out=tmp_path / "out",
    )


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when a weight or factor is read."""

    def refuse(info: Any) -> None:
        raise AssertionError(f"{info.name} was read")

    monkeypatch.setattr(safelora.stream, "map_range", refuse)


def refused(inputs: SimpleNamespace, message: str, *names: str, **options: Any) -> None:
    """Projecting raises SafeLoraError with `message` and `names` in it, and leaves everything as it was."""
    place = inputs.out.parent
    before = snapshot(place)
    with pytest.raises(SafeLoraError, match=message) as caught:
        project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, **{"threshold": 1, **options})
    for name in names:
        assert name in str(caught.value)
    assert snapshot(place) == before


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(root.rglob("*"))}


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


SHARD = "model-00001-of-00002.safetensors"
OTHER_SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


# Checkpoints


@pytest.mark.usefixtures("no_reading")
def test_absent_shard(inputs):
    (inputs.base / SHARD).unlink()
    refused(inputs, "is not there", SHARD, INDEX)


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_shard(inputs, keep):
    path = inputs.aligned / OTHER_SHARD
    path.write_bytes(path.read_bytes()[:keep])
    refused(inputs, "truncated|not a safetensors file|not valid JSON", OTHER_SHARD)


@pytest.mark.usefixtures("no_reading")
def test_surplus_bytes(inputs):
    with open(inputs.base / SHARD, "ab") as file:
        file.write(b"\0\0")
    refused(inputs, "longer than its header says", SHARD)


@pytest.mark.usefixtures("no_reading")
def test_mislabelled_shard(inputs):
    """Two shards under each other's names: the index points at tensors that are not there."""
    first, second = inputs.base / SHARD, inputs.base / OTHER_SHARD
    first.rename(inputs.base / "x")
    second.rename(first)
    (inputs.base / "x").rename(second)
    refused(inputs, "mislabelled", INDEX)


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "a\0b.safetensors", "", 7],
)
def test_path_traversal_in_an_index(inputs, name):
    shutil.copy(inputs.base / SHARD, inputs.base.parent / "outside.safetensors")
    edit_json(inputs.base / INDEX, lambda index: index["weight_map"].update({f"{Q0}.weight": name}))
    refused(inputs, "refused", INDEX, f"{Q0}.weight")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\x00", "[" * 100_000])
def test_malformed_index(inputs, content):
    (inputs.base / INDEX).write_text(content)
    refused(inputs, "index", INDEX)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "truncated or not a safetensors"),
    "length beyond the file": (struct.pack("<Q", 1000) + b"{}", "truncated or not a safetensors"),
    "not JSON": (b"{" * 8, "not valid JSON"),
    "deep JSON": (b"[" * 100_000, "not valid JSON"),
    "long number": (b'{"a":' + b"9" * 10_000 + b"}", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', "not valid JSON"),
    "an array": ([], "expected an object"),
    "entry without dtype": ({"w": {"shape": [1], "data_offsets": [0, 4]}}, "lacks dtype"),
    "entry of another type": ({"w": 3}, "lacks dtype"),
    "unknown dtype": ({"w": {**ENTRY, "dtype": "Q4"}}, "unknown dtype"),
    "negative dimension": ({"w": {**ENTRY, "shape": [-2, -2]}}, "impossible dimension"),
    "fractional dimension": ({"w": {**ENTRY, "shape": [2.0, 2]}}, "impossible dimension"),
    "huge dimension": ({"w": {**ENTRY, "shape": [2**63, 2]}}, "impossible dimension"),
    "overflowing product": ({"w": {**ENTRY, "shape": [2**62, 2**62, 2]}}, "needs"),
    "product beyond any number": ({"w": {**ENTRY, "shape": [2**62] * 64}}, "needs more than"),
    "name with terminal codes": ({"w\x1b[2J": ENTRY}, "expected printable names"),
    "endless name": ({"w" * 5000: ENTRY}, "5000 characters long"),
    "too many dimensions": ({"w": {**ENTRY, "shape": [1] * 100}}, "dimensions"),
    "size and shape disagree": ({"w": {**ENTRY, "shape": [2, 3]}}, "needs 24 bytes"),
    "negative offset": ({"w": {**ENTRY, "data_offsets": [-16, 0]}}, "data_offsets"),
    "reversed offsets": ({"w": {**ENTRY, "data_offsets": [16, 0]}}, "data_offsets"),
    "outside the file": ({"w": {**ENTRY, "data_offsets": [2**40, 2**40 + 16]}}, "hole"),
    "overlap": ({"w": ENTRY, "v": {**ENTRY, "data_offsets": [8, 24]}}, "overlaps"),
    "hole": ({"w": {**ENTRY, "data_offsets": [4, 20]}}, "hole"),
    "metadata not strings": ({"__metadata__": {"a": 1}, "w": ENTRY}, "__metadata__"),
}


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("where", ["base", "adapter"])
def test_malicious_header(inputs, tmp_path, case, where):
    header, message = HEADERS[case]
    root = tmp_path / "single"
    root.mkdir()
    path = {"base": root / "model.safetensors", "adapter": inputs.adapter / "adapter_model.safetensors"}[where]
    if isinstance(header, bytes) and header[:8] in (HEADERS["huge length"][0][:8], struct.pack("<Q", 1000)):
        path.write_bytes(header)
    else:
        write_raw(path, header, b"\0" * 16)
    if where == "base":
        inputs.base = root
    refused(inputs, message, path.name)


@pytest.mark.usefixtures("no_reading")
def test_a_directory_in_place_of_a_file(inputs):
    (inputs.base / SHARD).unlink()
    (inputs.base / SHARD).mkdir()
    refused(inputs, "not a regular file", SHARD)


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (["pytorch_model.bin"], "save_pretrained"),
        (["consolidated.00.pth"], "convert"),
        (["model.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        ([], "model.safetensors.index.json"),
    ],
)
def test_directories_without_usable_weights(inputs, tmp_path, files, hint):
    inputs.base = tmp_path / "other"
    inputs.base.mkdir()
    for name in files:
        (inputs.base / name).write_text("{}")
    refused(inputs, hint, str(inputs.base))


def test_several_files_without_an_index(inputs, tmp_path):
    """All *.safetensors are taken together, duplicates of Mistral's kind left out; a tensor in two files is refused."""
    (inputs.base / INDEX).unlink()
    shutil.copy(inputs.base / SHARD, inputs.base / "consolidated.safetensors")
    report = project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    assert len(report.projected) == 4
    shutil.rmtree(inputs.out)
    shutil.copy(inputs.base / SHARD, inputs.base / "copy.safetensors")
    refused(inputs, r"is in .* and ", "copy.safetensors")


@pytest.mark.usefixtures("no_reading")
def test_other_shapes(inputs, tmp_path):
    wide = llama_tensors(d=32)
    inputs.aligned = write_checkpoint(tmp_path / "wide", wide)
    refused(inputs, "has shape", "[32, 32]", "[24, 24]", str(inputs.aligned))


@pytest.mark.usefixtures("no_reading")
def test_missing_and_ambiguous_modules(inputs, tmp_path):
    given = factors({"model.layers.9.self_attn.q_proj": (24, 24)})
    inputs.adapter = write_adapter(tmp_path / "far", given)
    refused(inputs, "no tensor for module model.layers.9", str(inputs.base))
    twice = {f"{stem}.layers.0.self_attn.q_proj.weight": torch.randn(24, 24) for stem in ("left", "right")}
    inputs.adapter = write_adapter(tmp_path / "two", factors({"layers.0.self_attn.q_proj": (24, 24)}))
    inputs.base = write_checkpoint(tmp_path / "towers", twice)
    refused(inputs, "several tensors", "left.layers.0.self_attn.q_proj.weight", "right.layers.0")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("count", [10**7, 10**400], ids=["many", "more than a float holds"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_configuration_of_endless_layers(inputs, tmp_path, count, nested):
    """Where names alone find nothing, the model would be built from its configuration."""
    inputs.adapter = write_adapter(tmp_path / "far", factors({"model.layers.9.self_attn.q_proj": (24, 24)}))
    layers = {"num_hidden_layers": count}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    edit_json(inputs.base / "config.json", lambda c: c.update(model, **({"text_config": layers} if nested else layers)))
    refused(inputs, "num_hidden_layers", str(inputs.base), "refused")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("side", ["base", "aligned"])
def test_quantised_checkpoints(inputs, tmp_path, side):
    root = getattr(inputs, side)
    edit_json(root / "config.json", lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}))
    refused(inputs, "quantised", "bitsandbytes", "original", str(root))


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors(inputs, tmp_path, dtype):
    tensors = llama_tensors()
    tensors[f"{V1}.weight"] = tensors[f"{V1}.weight"].to(dtype)
    inputs.base = write_checkpoint(tmp_path / "quantised", tensors)
    refused(inputs, "quantised", f"{V1}.weight")


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("path", ["itself", "relative", "link"])
def test_base_given_as_aligned(inputs, monkeypatch, path):
    """By whatever path, before a weight is read."""
    monkeypatch.chdir(inputs.base.parent)
    (inputs.base.parent / "link").symlink_to(inputs.base)
    inputs.aligned = {"itself": inputs.base, "relative": Path(inputs.base.name), "link": Path("link")}[path]
    refused(inputs, "same checkpoint")


def test_equal_weights_in_two_places(inputs, tmp_path):
    inputs.aligned = tmp_path / "copy"
    shutil.copytree(inputs.base, inputs.aligned)
    refused(inputs, "V = 0", str(inputs.base), str(inputs.aligned))


@pytest.mark.parametrize("side", ["base", "aligned"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_weight(inputs, tmp_path, side, value):
    tensors = shifted(llama_tensors(), seed=7)
    tensors[f"{V1}.weight"][3, 2] = value
    setattr(inputs, side, write_checkpoint(tmp_path / "bad", tensors))
    refused(inputs, "NaN or infinite", f"{V1}.weight", str(tmp_path / "bad" / "model.safetensors"))


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_non_finite_factor(inputs, tmp_path, factor, pickled, frozen):
    """Also where V = 0, which hides the factors from the projection."""
    given = factors(llama_modules())
    name = f"base_model.model.{V1}.{factor}.weight"
    given[name][1, 1] = torch.nan
    inputs.adapter = write_adapter(tmp_path / "bad", given, pickled)
    if frozen:
        tensors = shifted(llama_tensors())
        tensors[f"{V1}.weight"] = llama_tensors()[f"{V1}.weight"]
        inputs.aligned = write_checkpoint(tmp_path / "frozen", tensors)
    refused(inputs, "NaN or infinite", name, str(tmp_path / "bad" / "adapter_model."))


def test_result_that_does_not_fit_its_dtype(inputs, tmp_path):
    tensors = llama_tensors()
    inputs.aligned = write_checkpoint(tmp_path / "huge", {name: tensor + 1e6 for name, tensor in tensors.items()})
    inputs.adapter = write_adapter(tmp_path / "half", factors(llama_modules(), dtype=torch.float16))
    refused(inputs, "does not fit its dtype F16", "lora_B")


# Adapters


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"kasa_config": {}, "use_bdlora": {"a": 1}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"target_parameters": "experts.gate_up_proj"}, "expected a list of names"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        *(
            ({"init_lora_weights": init}, "path_initial_model_for_weight_conversion")
            for init in ("pissa", "olora", "corda", "lora_ga", "loftq")
        ),
        ({"peft_type": "LOHA"}, "only LORA"),
        ({"peft_type": None}, "only LORA"),
        ({"layer_replication": [[0, 1]]}, "outside layer_replication"),
        ({"layer_replication": "all"}, "list of"),
    ],
)
def test_refused_configurations(inputs, tmp_path, config, message):
    inputs.adapter = write_adapter(tmp_path / "odd", factors(llama_modules()), **config)
    refused(inputs, message)


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_model_alone_are_accepted(inputs, tmp_path, init):
    from safelora import Adapter

    Adapter.open(write_adapter(tmp_path / "init", factors(llama_modules()), init_lora_weights=init))


Q0_STEM = f"base_model.model.{Q0}"


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q0_STEM}.lora_magnitude_vector": torch.ones(24)}, "DoRA"),
        ({f"{Q0_STEM}.lora_diag": torch.ones(4)}, "KaSA"),
        ({f"{Q0_STEM}.lora_E": torch.ones(4)}, "AdaLoRA"),
        ({f"{Q0_STEM}.lora_A.default.weight": torch.ones(4, 24)}, "no known LoRA layout"),
        ({f"{Q0_STEM}.lora_B.weight": None}, "has no lora_B beside it"),
        ({f"{Q0_STEM}.lora_A.weight": None}, "has no lora_A beside it"),
        ({f"{Q0_STEM}.lora_B.weight": torch.ones(24, 5)}, "do not fit"),
        ({f"{Q0_STEM}.lora_A.weight": torch.ones(24)}, "do not fit"),
        ({f"{Q0_STEM}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)}, "dtype I8"),
        ({f"{Q0}.lora_A.weight": torch.ones(4, 24)}, "same factor"),
    ],
)
@pytest.mark.parametrize("pickled", [False, True])
def test_refused_tensors(inputs, tmp_path, changes, message, pickled):
    given = {**factors(llama_modules()), **changes}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    inputs.adapter = write_adapter(tmp_path / "odd", given, pickled)
    refused(inputs, message)


@pytest.mark.usefixtures("no_reading")
def test_incomplete_adapters(inputs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    inputs.adapter = empty
    refused(inputs, "no adapter_config.json")
    inputs.adapter = tmp_path
    refused(inputs, "sub-directories are adapters", "adapter")
    (empty / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    inputs.adapter = empty
    refused(inputs, "neither adapter_model.safetensors nor adapter_model.bin")
    inputs.adapter = write_adapter(tmp_path / "nothing", {"base_model.model.score.weight": torch.ones(2)})
    refused(inputs, "nothing to project")
    inputs.adapter = tmp_path / "absent"
    refused(inputs, "does not exist")


class Payload:
    """Pickles to a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize("content", ["code", "garbage", "list", "sparse", "nested", "terminal codes"])
def test_bin_files_are_read_as_plain_tensors_only(inputs, tmp_path, content):
    root = write_adapter(tmp_path / "pickled", factors(llama_modules()), pickled=True)
    path = root / "adapter_model.bin"
    if content == "garbage":
        path.write_bytes(b"\x80garbage")
    else:
        torch.save(
            {
                "code": {"w": Payload(tmp_path / "ran")},
                "list": [torch.ones(2)],
                "sparse": {"w": torch.eye(3).to_sparse()},
                "nested": {"state": {"w": torch.ones(2)}},
                "terminal codes": {"w\x1b[2J": torch.ones(2)},
            }[content],
            path,
        )
    inputs.adapter = root
    refused(inputs, "plain tensors|state dict|dense tensor|printable names", "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


# Options and output


@pytest.mark.usefixtures("no_reading")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": None}, "exactly one"),
        ({"threshold": 0.3, "num_layers": 3}, "exactly one"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.3"}, "threshold is '0.3'"),
        ({"threshold": None, "num_layers": -1}, "num_layers is -1"),
        ({"threshold": None, "num_layers": 2.0}, "num_layers is 2.0"),
        ({"rule": "loose"}, "rule is 'loose'"),
        ({"modules_to_save": "drop"}, "modules_to_save is 'drop'"),
        ({"normalize": "exact"}, "normalize is 'exact'"),
    ],
)
def test_options(inputs, options, message):
    refused(inputs, message, **options)


@pytest.mark.usefixtures("no_reading")
def test_unusable_outputs(inputs, tmp_path, monkeypatch):
    good = inputs.out
    inputs.out = None
    with pytest.raises(SafeLoraError, match="give an output directory"):
        project_adapter(inputs.adapter, inputs.base, inputs.aligned, threshold=1)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("precious")
    for out, message, options in (
        (taken, "not empty", {}),
        (taken, "not an earlier output", {"overwrite": True}),
        (taken / "mine", "not a directory", {}),
        (taken / "mine" / "deeper", "not a writable directory", {}),
        (inputs.adapter, "inputs are never changed", {"overwrite": True}),
        (inputs.adapter / "safe", "inputs are never changed", {}),
        (tmp_path, "inputs are never changed", {"overwrite": True}),
    ):
        inputs.out = out
        refused(inputs, message, str(out), **options)
    inputs.out = good
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        refused(inputs, "not a writable directory")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        refused(inputs, "are free")


def test_overwrite_replaces_an_earlier_output(inputs):
    given = load_file(inputs.adapter / "adapter_model.safetensors")
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    (inputs.out / "stale.txt").write_text("from before")
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=0, overwrite=True)
    assert not (inputs.out / "stale.txt").exists()
    for name, tensor in read_output(inputs.out).items():
        assert torch.equal(tensor, given[name])
    assert sorted(path.name for path in inputs.out.parent.iterdir()) == ["adapter", "aligned", "base", "out"]


def test_an_earlier_output_survives_a_failing_replacement(inputs, monkeypatch):
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    before = snapshot(inputs.out.parent)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if target == inputs.out and not source.name.startswith(".out.safelora-old"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=0, overwrite=True)
    assert snapshot(inputs.out.parent) == before


def test_everything_is_on_disk_before_it_gets_its_name(inputs, monkeypatch):
    """A power cut after the rename finds whole files: each was synced before it, the directory after."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(safelora.output.os, "replace", renamed)
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    at = events.index("renamed")
    assert {path.name for path in inputs.out.iterdir()} <= set(events[:at])
    assert events[at - 1].startswith(".out.safelora-")
    assert events[at + 1 :] == [inputs.out.parent.name]


@pytest.mark.parametrize("writes", range(10))
def test_disk_full_leaves_nothing(inputs, monkeypatch, writes):
    """The n-th write fails with ENOSPC, for every n: one copy, four projected and four restored factors, the header."""
    place = inputs.out.parent
    before = snapshot(place)
    real, count = safelora.output.write_all, 0

    def full(file: Any, data: memoryview) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(28, "No space left on device")
        real(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(safelora.output, "write_all", full)
        with pytest.raises(OSError, match="No output was left") as caught:
            project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=0)
    assert caught.value.errno == 28
    assert str(inputs.out) in caught.value.strerror
    assert snapshot(place) == before
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)


def test_a_file_size_limit_is_an_ordinary_error(inputs, tmp_path):
    """The same on a real limit of the operating system."""
    code = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from safelora.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", code, "project", str(inputs.adapter), "--base", str(inputs.base),
               "--aligned", str(inputs.aligned), "--out", str(inputs.out), "--threshold", "1"]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


def environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SAFELORA_DEBUG": "0"}


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_killed_run_leaves_no_output_and_can_be_repeated(inputs, tmp_path, stop, status):
    """The run is stopped while its output is half written: it waits there for a file that never comes."""
    code = (  # a background job's children ignore SIGINT unless told otherwise
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time, safelora.output as o; real = o.StagedAdapter.replace\n"
        "def replace(self, name, tensor):\n"
        "    real(self, name, tensor); print('half', flush=True); time.sleep(100)\n"
        "o.StagedAdapter.replace = replace\n"
        "from safelora.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    before = snapshot(tmp_path)
    command = [sys.executable, "-c", code, "project", str(inputs.adapter), "--base", str(inputs.base),
               "--aligned", str(inputs.aligned), "--out", str(inputs.out), "--threshold", "1"]  # fmt: skip
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("adapter", "base", "aligned")]
    if stop == signal.SIGKILL:
        assert len(left) == 1
        assert left[0].startswith(".out.safelora-")
    else:
        assert left == []
        assert "interrupted" in errors
        assert "Traceback" not in errors
    assert {path: data for path, data in snapshot(tmp_path).items() if ".out.safelora-" not in path} == before
    report = project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    assert len(report.projected) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "aligned", "base", "out"]


def test_a_running_neighbour_is_left_alone(inputs, tmp_path):
    """Only unlocked directories of dead runs are removed."""
    from safelora import Adapter
    from safelora.output import StagedAdapter

    with StagedAdapter(inputs.out, Adapter.open(inputs.adapter)) as running:
        project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
        assert running.path.exists()


def test_a_shard_that_shrinks_while_it_is_read(inputs):
    from safelora import Checkpoint
    from safelora.stream import map_range

    info = Checkpoint.open(inputs.base).tensors[f"{Q0}.weight"]
    os.truncate(info.file, info.begin + 4)
    with pytest.raises(SafeLoraError, match="shrank"):
        map_range(info)


def test_reading_errors_reach_the_caller(inputs, monkeypatch):
    """An error in the read-ahead thread is raised by the call, which ends."""

    def fail(info: Any) -> None:
        raise SafeLoraError(f"{info.file}: reading {info.name} failed: Input/output error.")

    monkeypatch.setattr(safelora.stream, "map_range", fail)
    start = time.monotonic()
    refused(inputs, "Input/output error")
    assert time.monotonic() - start < 30


def test_unaligned_tensors_are_read_right(inputs, tmp_path):
    """Offsets that are no multiple of the element size are legal."""
    tensors = llama_tensors()
    root = tmp_path / "unaligned"
    root.mkdir()
    header: dict[str, Any] = {"pad": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    data = b"pad"
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    write_raw(root / "model.safetensors", header, data)
    report = project_adapter(inputs.adapter, root, inputs.aligned, inputs.out, threshold=1)
    expected = project_adapter(inputs.adapter, inputs.base, inputs.aligned, threshold=1, dry_run=True)
    assert report.modules == expected.modules


def test_save_file_is_not_needed_for_reading_back(inputs):
    """The written file is what safetensors itself accepts and writes."""
    project_adapter(inputs.adapter, inputs.base, inputs.aligned, inputs.out, threshold=1)
    tensors = read_output(inputs.out)
    save_file(tensors, inputs.out.parent / "again.safetensors")
    assert set(load_file(inputs.out.parent / "again.safetensors")) == set(tensors)
