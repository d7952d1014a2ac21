"""The read-ahead: order, bytes, bounded memory, and an end to its thread."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest
import torch

import safelora.measure
import safelora.offline
import safelora.stream
from safelora import Checkpoint, project_adapter
from safelora.stream import MappedRange, ReadAhead, map_range, to_tensor
from tests.safelora.zoo import factors, llama_modules, llama_tensors, shifted, write_adapter, write_checkpoint


class Mapped:
    """Counts the bytes that are mapped at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = self.calls = 0
        monkeypatch.setattr(safelora.stream, "map_range", self)

    def __call__(self, info) -> MappedRange:
        mapped = map_range(info)
        self.calls += 1
        self.now += info.nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(mapped.memory, self.release, info.nbytes)
        return mapped

    def release(self, nbytes: int) -> None:
        self.now -= nbytes


@pytest.fixture
def infos(tmp_path: Path):
    tensors = {f"t{number:02d}": torch.randn(64, 16 + number) for number in range(20)}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "many", tensors))
    return tensors, [checkpoint.tensors[name] for name in tensors]


@pytest.mark.parametrize("budget", [1, 20_000, 10**9])
def test_batches_come_in_order_and_within_the_budget(infos, monkeypatch, budget):
    tensors, places = infos
    mapped = Mapped(monkeypatch)
    batches = [places[start : start + 3] for start in range(0, 20, 3)]
    seen = []
    with ReadAhead(batches, budget) as stream:
        for batch, memory in zip(batches, stream, strict=True):
            for info, part in zip(batch, memory, strict=True):
                assert torch.equal(to_tensor(part, info), tensors[info.name])
                seen.append(info.name)
            del part
    assert seen == list(tensors)
    largest = max(sum(info.nbytes for info in batch) for batch in batches)
    assert mapped.peak <= max(budget, largest)
    assert mapped.now == 0


def test_a_consumer_that_leaves_ends_the_thread(infos):
    _, places = infos
    before = threading.active_count()
    with ReadAhead([[info] for info in places], 1) as stream:
        next(iter(stream))
    assert threading.active_count() == before


def test_memory_of_a_whole_run_is_bounded_by_the_read_ahead(tmp_path, monkeypatch):
    """Twelve layers with room for two: never more mapped at once, however many layers there are."""
    base = llama_tensors(layers=12)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapter = write_adapter(tmp_path / "adapter", factors(llama_modules(layers=12, names=names)))
    models = [write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "aligned", shifted(base))]
    expected = project_adapter(adapter, *models, threshold=1, dry_run=True)
    layer = 2 * 4 * (2 * 24 * 24 + 2 * 8 * 24)
    monkeypatch.setattr(safelora.measure, "BATCH_BYTES", layer)
    monkeypatch.setattr(safelora.offline, "READ_AHEAD_BYTES", 2 * layer)
    mapped = Mapped(monkeypatch)
    report = project_adapter(adapter, *models, threshold=1, dry_run=True)
    weights = 2 * 12 * len(names)
    assert mapped.calls == 2 * weights  # as many factors as weights
    factors_of_a_batch = 4 * 4 * (4 * 24 + 2 * 24 + 2 * 8)
    assert mapped.peak <= 2 * layer + 2 * factors_of_a_batch
    assert mapped.now == 0
    assert report.modules == expected.modules


def test_a_mapped_tensor_may_be_written_and_the_file_stays(tmp_path):
    root = write_checkpoint(tmp_path / "m", {"w": torch.ones(4, 4)})
    before = (root / "model.safetensors").read_bytes()
    info = Checkpoint.open(root).tensors["w"]
    to_tensor(map_range(info), info).zero_()
    assert (root / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool]
)
def test_dtypes(tmp_path, dtype):
    tensor = torch.randn(3, 5).to(dtype)
    info = Checkpoint.open(write_checkpoint(tmp_path / "m", {"w": tensor})).tensors["w"]
    assert torch.equal(to_tensor(map_range(info), info), tensor)
