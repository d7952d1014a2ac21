"""Safe LoRA for full fine-tunes: the same rule with ΔW = W_ft − W_aligned for every linear weight."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .adapter import PROJECTED, REPORT_FILE, natural_key
from .checkpoint import FLOAT_DTYPES, Checkpoint, TensorInfo, read_json
from .decision import check_options
from .distributed import Ranks, Spilled, collective
from .errors import SafeLoraError
from .experts import Stack, find_stack
from .fp8 import check_pair, is_fp8
from .full import FullTensor
from .mapping import PlannedModule, conv1d, locate
from .naming import EMBEDDINGS
from .offline import project_files
from .output import StagedModel, check_target, output_place
from .report import SafeLoraReport
from .stream import map_range, to_tensor
from .weights import WeightMatch

if TYPE_CHECKING:
    import torch

_EMBEDDING = re.compile(r"embed(ding)?s?(_tokens|_positions|_in)?$|^(wte|wpe|shared|relative_attention_bias)$")
_STACKS = re.compile(r"(^|\.)experts\.|(^|\.)(input|output)_linear\.weight$")


class _Model(NamedTuple):
    """A fine-tuned checkpoint as a source of updates."""

    checkpoint: Checkpoint

    def read(self, name: str) -> torch.Tensor:
        info = self.checkpoint.tensors[name]
        return to_tensor(map_range(info), info)

    def file_of(self, info: TensorInfo) -> Path:
        return info.file


@collective
def project_model(
    model: str | os.PathLike[str],
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Literal["strict", "authors"] = "strict",
    normalize: Literal["frobenius", "none"] = "frobenius",
    include: str | None = None,
    exclude: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_projected: bool = False,
    local_files_only: bool = False,
    revision: str | None = None,
    revision_base: str | None = None,
    revision_aligned: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> SafeLoraReport:
    """Apply Safe LoRA's rule to a model that was fine-tuned in full, and write a new checkpoint to `out`.

    For every linear weight, with ΔW = W_ft − W_aligned, V = W_aligned − W_base and C = V Vᵀ/‖V‖_F, the cosine of ΔW
    and C·ΔW is measured; where it is low, the weight becomes W_aligned + C·ΔW. Embeddings, norms and biases keep their
    bits, as do weights that are not selected. Shards, names and dtypes are those of the fine-tuned checkpoint. One
    weight and a few column panels of its update are in memory at a time.

    Args:
        model: the fine-tuned checkpoint (directory, safetensors file or repository id). Never changed.
        base, aligned: the models before and after alignment; the fine-tune started from `aligned`.
        out: directory to create; may be omitted in a dry run.
        threshold, num_layers, rule, normalize: as in :func:`safelora.project_adapter`.
        include, exclude: regular expressions searched for in a tensor's name. What `include` matches (by default every
            linear weight) and `exclude` does not is measured.
        dry_run: measure and decide, write nothing.
        overwrite: replace an earlier output of this function at `out`.
        allow_projected: accept a model that was projected before.
        local_files_only, revision, revision_base, revision_aligned: for inputs given as repository ids.
        progress: called with (bytes done, bytes in all), of this rank.
        ranks: the processes that share the work, as in :func:`safelora.project_adapter`. Until rank 0 has fetched them,
            the others keep what they have projected in a temporary file (beside `out` where that directory exists).

    Returns:
        The report, also written to `out`/safelora_report.json.

    Raises:
        SafeLoraError: for unusable input; names the file or tensor. Nothing has been written then.
        OSError: when writing fails; no output is left behind.

    Source: Safe LoRA, arXiv 2405.16833, with the update of a full fine-tune in the place of B·A.
    """
    ranks = ranks or Ranks()
    options = check_options(threshold, num_layers, rule, normalize)
    options.update({"include": include, "exclude": exclude})
    tuned, base_model, aligned_model = (
        Checkpoint.open(source, revision=version, local_files_only=local_files_only)
        for source, version in ((model, revision), (base, revision_base), (aligned, revision_aligned))
    )
    roots = [checkpoint.root.resolve() for checkpoint in (tuned, base_model, aligned_model)]
    for first, second in ((0, 2), (1, 2), (0, 1)):
        pair = [(tuned, base_model, aligned_model)[index] for index in (first, second)]
        if pair[0].same_files(pair[1]):
            names = ("the fine-tuned model", "base", "aligned")
            raise SafeLoraError(f"{names[first]} and {names[second]} are the same checkpoint ({roots[first]}).")
    if is_fp8(tuned):
        raise SafeLoraError(f"{tuned.source} is fp8; a projected weight cannot be written back to it. Give it in bf16.")
    _check_mark(tuned, allow_projected)
    fp8 = check_pair(base_model, aligned_model)
    warnings = [fp8] if fp8 else []
    plan, left = _plan(tuned, base_model, aligned_model, include, exclude)
    if all(planned.skipped for planned in plan):
        raise SafeLoraError(
            f"no weight of {tuned.root} can be projected: {plan[0].skipped if plan else 'none is chosen'}."
        )
    warnings.append(
        f"{len(left)} tensors (embeddings, norms, biases and what was excluded) keep what fine-tuning made of them."
    )
    target = output_place(out, dry_run)
    if target and ranks.rank == 0:
        check_target(target, roots[0], roots[1:], sum(header.file_size for header in tuned.headers), overwrite)
    source = _Model(tuned)
    headers = [*tuned.headers, *base_model.headers, *aligned_model.headers]
    files = [(header.file_size, header.sha256) for header in headers]
    ranks.same((options, dry_run, files), "the options or the models")
    staged = StagedModel(target, tuned) if target and ranks.rank == 0 else None

    def report_of(outcome: dict[str, Any], _: None) -> SafeLoraReport:
        return SafeLoraReport(
            **outcome,
            inputs={
                "model": tuned.fingerprint(),
                "base": base_model.fingerprint(),
                "aligned": aligned_model.fingerprint(),
            },
            output=str(target) if target else None,
            dry_run=dry_run,
            passed_through=left,
            warnings=warnings,
        )

    writer = staged or (_spilled(source, target.parent) if target else None)
    copy = staged.copy_input if staged else lambda: None
    return project_files(plan, source, base_model, aligned_model, options, ranks, writer, copy, report_of, progress)


@contextmanager
def _spilled(source: _Model, beside: Path) -> Iterator[Spilled]:
    with TemporaryFile(dir=beside if beside.is_dir() else None, buffering=0) as file:
        yield Spilled(source, file)


def _plan(
    tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint, include: str | None, exclude: str | None
) -> tuple[list[PlannedModule], list[str]]:
    """The chosen weights with their counterparts, and the names of all other tensors."""
    try:
        wanted, unwanted = (re.compile(text) if text is not None else None for text in (include, exclude))
    except re.error as error:
        raise SafeLoraError(f"include and exclude must be regular expressions: {error}.") from error
    plan: list[PlannedModule] = []
    left = []
    for name in sorted(tuned.tensors, key=natural_key):
        info = tuned.tensors[name]
        chosen = wanted.search(name) if wanted else not _is_embedding(name.rpartition(".")[0])
        linear = len(info.shape) >= 2 and 0 not in info.shape and info.dtype in FLOAT_DTYPES
        linear = linear and not name.endswith("bias")
        if not (linear and chosen) or (unwanted and unwanted.search(name)):
            left.append(name)
            continue
        stacked = len(info.shape) == 3 and _STACKS.search(name)
        plan += _plan_stack(info, tuned, base, aligned) if stacked else [_plan_weight(info, tuned, base, aligned)]
    return plan, left


def _plan_weight(info: TensorInfo, tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint) -> PlannedModule:
    module, _, parameter = info.name.rpartition(".")
    full = FullTensor(info.name, "full", info, _is_embedding(module) or bool(conv1d(tuned, module)))
    matches = []
    for checkpoint in (base, aligned):
        located = locate(checkpoint, module, (parameter,))
        if located is None:
            return PlannedModule(full, None, None, f"{checkpoint.source} has no such weight to compare it with")
        match, shape = located
        if shape != info.shape:
            return PlannedModule(
                full, None, None,
                f"{match.info.name} of {checkpoint.source} has shape {list(shape)}, here it is {list(info.shape)}",
            )  # fmt: skip
        matches.append(WeightMatch(match.sources, match.how, full.transposed, match.convert))
    return PlannedModule(full, matches[0], matches[1])


def _is_embedding(module: str) -> bool:
    """Whether a module is an embedding, whose stored weight is vocabulary × d."""
    leaf = module.rpartition(".")[2]
    return leaf in EMBEDDINGS or bool(_EMBEDDING.search(leaf))


def _plan_stack(info: TensorInfo, tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint) -> Sequence[PlannedModule]:
    """Every expert of a 3-D weight by itself."""
    owner, _, parameter = info.name.rpartition(".")
    stacks: list[Stack] = []
    for checkpoint in (tuned, base, aligned):
        stack = find_stack(checkpoint, owner, parameter)
        if stack is None:
            raise SafeLoraError(f"{info.name}: {checkpoint.source} holds no such weight of all experts.")
        stacks.append(stack)
    mine = stacks[0]
    for checkpoint, stack in zip((base, aligned), stacks[1:], strict=True):
        if (stack.d_out, stack.d_in, stack.shape[0]) != (mine.d_out, mine.d_in, mine.shape[0]):
            raise SafeLoraError(
                f"{checkpoint.source}: {stack.name} has shape {list(stack.shape)}, here it is {list(info.shape)}."
            )
    plan = []
    for index in range(info.shape[0]):
        name = f"{owner}.{index}.{parameter}" if parameter != "weight" else f"{owner}.{index}"
        full = FullTensor(name, "expert", info, mine.transposed, (), index)
        plan.append(PlannedModule(full, stacks[1].expert(index), stacks[2].expert(index)))
    return plan


def _check_mark(tuned: Checkpoint, allow_projected: bool) -> None:
    place = tuned.root / REPORT_FILE
    if allow_projected or not place.exists():
        return
    if read_json(place, "the report of projecting")[0].get(PROJECTED.count) != 0:
        what = f"{tuned.root} has been projected already (it has a {REPORT_FILE})"
        raise PROJECTED.refusal(what, "start from the original model")
