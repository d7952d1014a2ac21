"""Calibration sets of the input filter: token batches, the tokens of them that count, and what makes a set unusable."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SafeLoraError

if TYPE_CHECKING:
    import torch

_FOLDS = 4


@dataclass(frozen=True)
class Batch:
    """Right- or left-padded examples on the CPU.

    labels: −100 outside the responses, and throughout where the data has none.
    keep: (batch, tokens), the tokens that enter the moments. fold: (batch,), the examples that separability is
    measured on, by a hash of their tokens, so that neither order nor batching matters.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    keep: torch.Tensor
    fold: torch.Tensor


@dataclass(frozen=True)
class CalibrationSet:
    """The examples of one side, safety or task."""

    name: str
    batches: list[Batch]
    examples: int
    tokens: int
    dropped: int
    labelled: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        """What the report says about the set."""
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "shared_prefix_tokens": self.dropped,
            "response_tokens": self.labelled,
            "sha256": self.sha256,
        }


def calibration_sets(
    safety: Any,
    task: Any,
    tokenizer: Any,
    *,
    responses: bool,
    refusal: str | None,
    batch_size: int,
    max_length: int,
    drop_shared_prefix: bool,
) -> tuple[CalibrationSet, CalibrationSet, list[str]]:
    """Both sets, and warnings about them. Raises SafeLoraError for sets that are empty, the same, or lack answers."""
    from ..data import load_examples

    if refusal is not None and not _tokenised(safety):
        safety = load_examples(safety, response=refusal)
    raw = {
        name: _read(name, source, tokenizer, responses, batch_size, max_length)
        for name, source in (("safety", safety), ("task", task))
    }
    seen, trained = (_sequences(raw[name]) for name in ("safety", "task"))
    common = seen & trained
    if seen and seen == trained:
        raise SafeLoraError(
            "the safety and the task examples are the same: no filter can tell them apart. Give prompts that must be "
            "refused as safety data, and examples of what the adapter was trained for as task data."
        )
    prefixes = _trie(trained) if drop_shared_prefix else {}
    task_set = _set("task", raw["task"], {}, responses)
    safety_set = _set("safety", raw["safety"], prefixes, responses)
    warnings = []
    if common:
        warnings.append(
            f"{len(common)} of {len(seen)} safety examples are task examples too: the filter works against itself "
            "there. Take them out of one of the sets."
        )
    return safety_set, task_set, warnings


def _tokenised(source: Any) -> bool:
    """Whether `source` holds token batches, by its first row; an iterator is left alone."""
    from torch.utils.data import DataLoader

    if isinstance(source, DataLoader):
        return True
    first = source[0] if isinstance(source, (list, tuple)) and source else None
    return isinstance(first, dict) and "input_ids" in first


def _read(
    name: str, source: Any, tokenizer: Any, responses: bool, batch_size: int, max_length: int
) -> list[dict[str, torch.Tensor]]:
    import torch

    from ..data import batches

    if isinstance(source, (list, tuple)) and not source:
        raise SafeLoraError(f"{name}_data is empty: give at least a few examples; 30 to 50 of them are a good start.")
    try:
        found = batches(
            source, tokenizer, batch_size=batch_size, max_length=max_length, allow_prompts=not responses
        )  # fmt: skip
        rows = [dict(batch) for batch in found]
    except SafeLoraError as error:
        hint = " Or use weight='none', which needs prompts alone." if responses and "answer" in str(error) else ""
        raise SafeLoraError(f"{name}_data: {error}{hint}") from error
    for batch in rows:
        ids = batch.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise SafeLoraError(f"{name}_data: a batch has no two-dimensional input_ids; it has {', '.join(batch)}.")
        if responses and "labels" not in batch:
            raise SafeLoraError(f"{name}_data: a batch has no labels, which weight='grad' needs; or use weight='none'.")
    return rows


def _sequences(batches: list[dict[str, Any]]) -> set[tuple[int, ...]]:
    """The token ids of each example, without padding."""
    return {
        tuple(ids[mask].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"].cpu(), _mask(batch), strict=True)
    }


def _trie(sequences: set[tuple[int, ...]]) -> dict[int, Any]:
    """All prefixes of the examples, as nested dictionaries by token."""
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            node = node.setdefault(token, {})
    return root


def _mask(batch: dict[str, Any]) -> torch.Tensor:
    import torch

    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool().cpu()


def _set(name: str, batches: list[dict[str, Any]], prefixes: dict[int, Any], responses: bool) -> CalibrationSet:
    import torch

    made, dropped, digests, labelled = [], 0, [], 0
    for batch in batches:
        ids, mask = batch["input_ids"].cpu(), _mask(batch)
        labels = batch["labels"].cpu() if "labels" in batch else torch.full_like(ids, -100)
        keep = mask.clone()
        fold = torch.zeros(len(ids), dtype=torch.bool)
        for row in range(len(ids)):
            sequence = ids[row][mask[row]]
            # In a causal model equal prefixes have equal inputs: no filter could treat them differently.
            node, shared = prefixes, 0
            for token in sequence.tolist():
                if token not in node:
                    break
                node, shared = node[token], shared + 1
            keep[row, mask[row].nonzero()[:shared, 0]] = False
            dropped += shared
            content = sequence.numpy().astype("<i8").tobytes()
            fold[row] = zlib.crc32(content) % _FOLDS == 0
            if "labels" in batch:
                content += labels[row][mask[row]].numpy().astype("<i8").tobytes()
            digests.append(hashlib.sha256(content).digest())
        labelled += int((labels[:, 1:] != -100).sum())
        made.append(Batch(ids, mask.long(), labels, keep, fold))
    tokens = sum(int(batch.keep.sum()) for batch in made)
    if not tokens:
        why = f" All of its {dropped} tokens begin task examples as well." if dropped else ""
        raise SafeLoraError(f"{name}_data holds no token to calibrate with.{why} Give other examples.")
    if responses and not labelled:
        raise SafeLoraError(f"{name}_data has no response token (labels are −100 throughout); or use weight='none'.")
    sha256 = hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    return CalibrationSet(name, made, len(digests), tokens, dropped, labelled, sha256)
