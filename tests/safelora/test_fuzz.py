"""Arbitrary bytes in every file that is parsed: a projection or a SafeLoraError, nothing else, and no stray output."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safelora import SafeLoraError, project_adapter
from tests.safelora.zoo import factors, llama_modules, llama_tensors, shifted, write_adapter, write_checkpoint

SETTINGS = settings(
    max_examples=120,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INDEX = "model.safetensors.index.json"
ADAPTER_KEYS = [
    "peft_type", "use_dora", "fan_in_fan_out", "layer_replication", "init_lora_weights", "base_model_name_or_path",
    "revision", "target_parameters", "kasa_config", "velora_config", "quantization_config",
]  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["LORA", "pissa", ".."])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
NAMES = list(factors(llama_modules())) + list(llama_tensors()) + ["__metadata__"]
DTYPES = ["F64", "F32", "F16", "BF16", "U8", "I8", "BOOL", "F4", "F8_E4M3", "X"]
NUMBERS = st.one_of(st.integers(-2, 200), st.sampled_from([2**31, 2**62, 2**63, 2**64]), st.floats(), st.none())
ENTRIES = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(DTYPES) | SCALARS, "shape": st.lists(NUMBERS, max_size=4) | SCALARS,
                  "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3) | SCALARS}
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    base = llama_tensors(layers=1)
    write_checkpoint(root / "base", base, shards=2)
    write_checkpoint(root / "aligned", shifted(base))
    write_adapter(root / "adapter", factors(llama_modules(layers=1)), base_model_name_or_path=str(root / "aligned"))
    return root


def attempt(sound: Path, file: str, content: bytes) -> bool:
    """Project with `file` replaced; True when that worked."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for part in ("adapter", "base", "aligned"):
            if file.startswith(part):
                shutil.copytree(sound / part, root / part)
            else:
                (root / part).symlink_to(sound / part)
        (root / file).write_bytes(content)
        before = sorted(root.rglob("*"))
        aligned = None if file == "adapter/adapter_config.json" else root / "aligned"
        try:
            project_adapter(root / "adapter", root / "base", aligned, root / "out", local_files_only=True, threshold=1)
        except SafeLoraError:
            assert sorted(root.rglob("*")) == before
            return False
        assert (root / "out" / "safelora_report.json").exists()
        assert sorted(path.name for path in root.iterdir()) == ["adapter", "aligned", "base", "out"]
        return True


def mutated(data: st.DataObject, content: bytes) -> bytes:
    """A few bytes of `content` changed, or its length."""
    raw = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    return bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 1, 9]))])


@SETTINGS
@given(change=st.dictionaries(st.sampled_from(ADAPTER_KEYS), VALUES, max_size=3))
def test_adapter_configuration(sound, change):
    content = json.loads((sound / "adapter" / "adapter_config.json").read_text())
    attempt(sound, "adapter/adapter_config.json", json.dumps({**content, **change}).encode())


@SETTINGS
@given(
    change=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), st.text(max_size=30) | VALUES, max_size=4),
    replace=st.booleans(),
)
def test_index(sound, change, replace):
    weight_map = {} if replace else json.loads((sound / "base" / INDEX).read_text())["weight_map"]
    attempt(sound, f"base/{INDEX}", json.dumps({"weight_map": {**weight_map, **change}}).encode())


@SETTINGS
@given(data=st.data(), file=st.sampled_from(["adapter/adapter_model.safetensors", "aligned/model.safetensors"]))
def test_header_entries(sound, data, file):
    raw = (sound / file).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.update(data.draw(st.dictionaries(st.sampled_from(NAMES), ENTRIES | VALUES, min_size=1, max_size=3)))
    text = json.dumps(header).encode()
    attempt(sound, file, struct.pack("<Q", len(text)) + text + raw[8 + length :])


@SETTINGS
@given(
    data=st.data(),
    file=st.sampled_from(
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", f"base/{INDEX}", "base/config.json",
         "aligned/model.safetensors"]
    ),
)  # fmt: skip
def test_changed_bytes_in_the_front_of_a_file(sound, data, file):
    content = (sound / file).read_bytes()
    front = content[:400]
    attempt(sound, file, mutated(data, front) + content[400:])


@SETTINGS
@given(
    content=st.binary(max_size=200),
    file=st.sampled_from(
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/safelora_report.json",
         "adapter/README.md", f"base/{INDEX}", "base/config.json", "aligned/model.safetensors"]
    ),
)  # fmt: skip
def test_arbitrary_bytes(sound, content, file):
    worked = attempt(sound, file, content)
    assert not worked or file.endswith(("README.md", "config.json"))


@SETTINGS
@given(data=st.data())
def test_changed_pickles(sound, data):
    import torch

    with tempfile.NamedTemporaryFile() as file:
        torch.save(factors(llama_modules(layers=1)), file.name)
        content = Path(file.name).read_bytes()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "adapter"
        root.mkdir()
        shutil.copy(sound / "adapter" / "adapter_config.json", root)
        (root / "adapter_model.bin").write_bytes(mutated(data, content))
        with suppress(SafeLoraError):
            project_adapter(root, sound / "base", threshold=1, dry_run=True)


def test_the_sound_files_work(sound):
    config = (sound / "adapter" / "adapter_config.json").read_bytes()
    assert attempt(sound, "adapter/adapter_config.json", config)
