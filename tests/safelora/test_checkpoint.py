"""Opening checkpoints: single files, shards, the Hugging Face cache, and the pairing of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from safelora import Adapter, Checkpoint, SafeLoraError, plan_modules, project_adapter
from safelora.mapping import find_weight
from tests.safelora.zoo import factors, llama_modules, llama_tensors, shifted, write_adapter, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with org/base (one file) and org/chat (two shards), laid out with blobs and links."""
    root = tmp_path / "hub"
    base = llama_tensors()
    for name, tensors, shards in (("base", base, 1), ("chat", shifted(base), 2)):
        plain = write_checkpoint(tmp_path / f"plain-{name}", tensors, shards)
        repository = root / f"models--org--{name}"
        snapshot = repository / "snapshots" / COMMIT
        for directory in (snapshot, repository / "blobs", repository / "refs"):
            directory.mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for number, file in enumerate(sorted(plain.iterdir())):
            blob = repository / "blobs" / f"{number:040x}"
            file.rename(blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return root


def test_repository_ids_come_from_the_cache(tmp_path, cache):
    adapter = write_adapter(tmp_path / "a", factors(llama_modules()), base_model_name_or_path="org/chat")
    report = project_adapter(adapter, "org/base", threshold=1, dry_run=True, local_files_only=True)
    assert len(report.projected) == 4
    assert report.inputs["base"]["commit"] == report.inputs["aligned"]["commit"] == COMMIT
    assert report.inputs["aligned"]["source"] == "org/chat"
    by_commit = Checkpoint.open("org/base", revision=COMMIT, local_files_only=True)
    assert by_commit.tensors == Checkpoint.open("org/base", local_files_only=True).tensors


def test_revision_of_the_adapter_is_the_aligned_models(tmp_path, cache):
    adapter = write_adapter(tmp_path / "a", factors(llama_modules()), base_model_name_or_path="org/chat", revision="v9")
    with pytest.raises(SafeLoraError, match=r"org/chat .* at revision v9"):
        project_adapter(adapter, "org/base", threshold=1, dry_run=True, local_files_only=True)


@pytest.mark.parametrize("local", [True, False])
def test_what_is_fetched(tmp_path, monkeypatch, local):
    """Of a repository: pickled adapters too, no weights twice (in sub-directories, or consolidated)."""
    from huggingface_hub.utils import filter_repo_objects

    write_adapter(tmp_path / "org/adapter", factors(llama_modules()), pickled=True)
    held = write_checkpoint(tmp_path / "org/model", llama_tensors())
    for name in ("consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin"):
        (held / name).parent.mkdir(exist_ok=True)
        (held / name).write_bytes(b"large")
    asked = []

    def snapshot_download(repository, *, revision, local_files_only, allow_patterns, ignore_patterns):
        asked.append((repository, revision, local_files_only))
        stored, place = tmp_path / repository, tmp_path / f"snapshot{len(asked)}"
        files = (str(path.relative_to(stored)) for path in stored.rglob("*") if path.is_file())
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((stored / name).read_bytes())
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    adapter = Adapter.open("org/adapter", revision="v2", local_files_only=local)
    assert len(adapter.modules) == 4
    model = Checkpoint.open("org/model", local_files_only=local)
    files = sorted(str(path.relative_to(model.root)) for path in model.root.rglob("*"))
    assert files == ["config.json", "model.safetensors"]
    assert asked == [("org/adapter", "v2", local), ("org/model", None, local)]


@pytest.mark.parametrize("name", ["org/absent", "absent", "org/chat"])
def test_absent_and_incomplete_repositories(cache, name):
    snapshot = cache / "models--org--chat" / "snapshots" / COMMIT
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SafeLoraError, match="local Hugging Face cache|incomplete"):
        Checkpoint.open(name, local_files_only=True)


@pytest.mark.parametrize(
    "source",
    ["", "a\0b", "./absent", "/absent/x", "a/b/c", "../absent", "org/name?", "x" * 5000, "~nobody/x", "\ud800"],
)
def test_sources_that_are_neither(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SafeLoraError):
        Checkpoint.open(source, local_files_only=True)


@pytest.mark.parametrize("revision", ["../../../secrets", "a b", ""])
def test_revisions_stay_inside_the_cache(cache, revision):
    with pytest.raises(SafeLoraError, match="not a revision"):
        Checkpoint.open("org/base", revision=revision, local_files_only=True)


def test_single_file_and_directory_agree(tmp_path):
    root = write_checkpoint(tmp_path / "one", llama_tensors())
    assert Checkpoint.open(root / "model.safetensors").tensors == Checkpoint.open(root).tensors


def test_model_file_comes_before_the_index(tmp_path):
    """As transformers resolves it."""
    root = write_checkpoint(tmp_path / "both", llama_tensors(), shards=2)
    other = write_checkpoint(tmp_path / "single", llama_tensors(seed=9))
    (other / "model.safetensors").rename(root / "model.safetensors")
    assert {info.file.name for info in Checkpoint.open(root).tensors.values()} == {"model.safetensors"}


def checkpoint(tmp_path: Path, *names: str, **config: object) -> Checkpoint:
    tensors = {name: torch.zeros(2, 2) for name in names}
    return Checkpoint.open(write_checkpoint(tmp_path / "names", tensors, config=config))


@pytest.mark.parametrize(
    ("module", "names", "expected", "how"),
    [
        ("model.layers.1.q", ["model.layers.1.q.weight", "layers.1.q.weight"], "model.layers.1.q.weight", "exact"),
        ("attn", ["attn.in_proj_weight", "attn.out_proj.weight"], "attn.in_proj_weight", "exact"),
        ("attn.base_layer.out_proj", ["attn.out_proj.weight"], "attn.out_proj.weight", "exact"),
        ("layers.1.q", ["model.layers.1.q.weight"], "model.layers.1.q.weight", "prefix"),
        ("model.layers.1.q", ["layers.1.q.weight"], "layers.1.q.weight", "prefix"),
        ("transformer.h.0.q", ["h.0.q.weight", "h.10.q.weight"], "h.0.q.weight", "prefix"),
        (
            "model.language_model.layers.0.q",
            ["language_model.model.layers.0.q.weight", "vision_tower.layers.0.q.weight"],
            "language_model.model.layers.0.q.weight",
            "prefix",
        ),
        (
            "model.layers.0.q",
            ["thinker.model.layers.0.q.weight", "thinker.visual.layers.0.q.weight"],
            "thinker.model.layers.0.q.weight",
            "suffix",
        ),
        ("llm.layers.0.q", ["model.layers.0.q.weight"], "model.layers.0.q.weight", "suffix"),
        (
            "model.vision_tower.layers.0.q",
            ["vision_tower.vision_model.layers.0.q.weight", "vision_model.layers.0.q.weight"],
            "vision_tower.vision_model.layers.0.q.weight",
            "prefix",
        ),
    ],
)
def test_names(tmp_path, module, names, expected, how):
    info, found = find_weight(checkpoint(tmp_path, *names), module)
    assert (info.name, found) == (expected, how)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("model.vision_tower.layers.0.q", ["model.layers.0.q.weight"]),
        ("model.layers.0.q", ["vision_tower.layers.0.q.weight"]),
        ("model.layers.0.q", ["model.layers.10.q.weight", "model.layers.0.qq.weight", "model.layers.0.q.bias"]),
        ("q", ["layers.0.q.weight"]),
        ("model.layers.0.q", ["q.weight"]),
    ],
)
def test_names_that_must_not_match(tmp_path, module, names):
    with pytest.raises(SafeLoraError, match="no tensor for module"):
        find_weight(checkpoint(tmp_path, *names), module)


@pytest.mark.parametrize(
    ("module", "names", "expected"),
    [
        ("lm_head", ["model.embed_tokens.weight"], "model.embed_tokens.weight"),
        ("lm_head", ["transformer.wte.weight", "transformer.wpe.weight"], "transformer.wte.weight"),
        ("model.embed_tokens", ["lm_head.weight"], "lm_head.weight"),
    ],
)
def test_tied_weights(tmp_path, module, names, expected):
    assert find_weight(checkpoint(tmp_path, *names), module)[0].name == expected


def test_untied_weights_stay_apart(tmp_path):
    with pytest.raises(SafeLoraError, match="no tensor for module lm_head"):
        find_weight(checkpoint(tmp_path, "model.embed_tokens.weight", tie_word_embeddings=False), "lm_head")


def test_base_and_aligned_are_paired_separately(tmp_path):
    """A text-only base and an aligned model of another class, with other names for the same weights."""
    given = factors(llama_modules(layers=1))
    base = llama_tensors(layers=1)
    aligned = {f"language_{name}" if name.startswith("model.") else name: t for name, t in shifted(base).items()}
    aligned = {name.replace("language_model.", "language_model.model."): tensor for name, tensor in aligned.items()}
    adapter = Adapter.open(write_adapter(tmp_path / "a", given))
    plan = plan_modules(
        adapter,
        Checkpoint.open(write_checkpoint(tmp_path / "b", base)),
        Checkpoint.open(write_checkpoint(tmp_path / "c", aligned)),
    )
    assert [(planned.base.how, planned.aligned.how) for planned in plan] == [("exact", "prefix")] * 2


def test_compiled_and_unprefixed_adapter_names(tmp_path):
    given = {
        name.replace("base_model.model.", "base_model.model._orig_mod."): tensor
        for name, tensor in factors(llama_modules()).items()
    }
    adapter = Adapter.open(write_adapter(tmp_path / "a", given))
    assert [module.name for module in adapter.modules] == sorted(llama_modules())


def test_modules_are_in_natural_order(tmp_path):
    adapter = Adapter.open(write_adapter(tmp_path / "a", factors(llama_modules(layers=12, names=("q_proj",)))))
    assert [int(module.name.split(".")[2]) for module in adapter.modules] == list(range(12))


def test_large_headers_are_read_in_reasonable_time(tmp_path):
    """Fifty thousand tensors, as large mixtures of experts have."""
    import time

    entries = {
        f"model.layers.{n}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]}
        for n in range(50_000)
    }
    raw = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4 * 50_000))
    start = time.process_time()
    assert len(Checkpoint.open(path).tensors) == 50_000
    assert time.process_time() - start < 10
