"""Offline Safe LoRA: project the update of an adapter directory onto the alignment subspace of its model."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from . import fused
from .adapter import CONFIG_FILE, Adapter, passed_through_warning
from .checkpoint import Checkpoint
from .decision import check_options
from .distributed import Kept, Ranks, collective
from .errors import SafeLoraError
from .fp8 import check_pair
from .full import plan_full
from .mapping import plan_modules
from .offline import project_files
from .output import StagedAdapter, check_target, copy_and_hash, output_place
from .report import SafeLoraReport
from .serving import serving_notes


@collective
def project_adapter(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    threshold: float | None = None,
    num_layers: int | None = None,
    rule: Literal["strict", "authors"] = "strict",
    normalize: Literal["frobenius", "none"] = "frobenius",
    modules_to_save: Literal["keep", "project"] = "keep",
    split_fused: bool = False,
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
    """Apply Safe LoRA (arXiv 2405.16833) to the adapter on disk and write a plain PEFT adapter to `out`.

    For every adapted weight, with V = W_aligned − W_base and C = V Vᵀ/‖V‖_F, the cosine between B·A and C·B·A is
    measured; where it is low, lora_B is replaced by C·lora_B. lora_A and every other tensor stay bit-identical, and
    lora_B keeps its dtype. Weights are read tensor by tensor, in their stored dtype.

    Args:
        adapter: PEFT LoRA adapter directory or repository id. Never changed.
        base: the model before alignment (directory, safetensors file or repository id).
        aligned: the aligned (chat) model; defaults to the adapter's base_model_name_or_path.
        out: directory to create; may be omitted in a dry run.
        threshold: project where the cosine is at most this. Exactly one of threshold and num_layers is needed.
        num_layers: project this many modules, those with the lowest cosines.
        rule: "strict" compares unrounded cosines and takes exactly num_layers; "authors" rounds to 5 decimals, so
            that ties take more, as the published code does.
        normalize: "frobenius" is the published C; "none" is V Vᵀ.
        modules_to_save: "keep" copies tensors that were tuned in full (modules_to_save, biases, trainable tokens) as
            they are; "project" applies the rule to ΔW = W_ft − W_aligned of each, as one more module.
        split_fused: treat the parts of qkv_proj and gate_up_proj as modules of their own (`safelora.fused`), as if q, k
            and v were separate; by default a fused module is one, as the adapter has it.
        dry_run: measure and decide, write nothing.
        overwrite: replace an earlier output of this function at `out`.
        allow_projected: accept an adapter that was projected before.
        local_files_only, revision, revision_base, revision_aligned: for inputs given as repository ids.
        progress: called with (bytes done, bytes in all), of this rank.
        ranks: the processes that share the work, all of which make this call (`safelora.distributed`). Each reads the
            weights that it owns, rank 0 alone writes, and the output is that of one process.

    Returns:
        The report, also written to `out`/safelora_report.json.

    Raises:
        SafeLoraError: for unusable input, before any weight is read where that is possible; names the file, tensor
            or module. Nothing has been written then.
        OSError: when writing fails; no output is left behind.
    """
    ranks = ranks or Ranks()
    options = check_options(threshold, num_layers, rule, normalize)
    if modules_to_save not in ("keep", "project"):
        raise SafeLoraError(f"modules_to_save is {modules_to_save!r}, expected 'keep' or 'project'.")
    if modules_to_save == "project":
        options["modules_to_save"] = modules_to_save
    if split_fused:
        options["split_fused"] = True
    source = Adapter.open(
        adapter, revision=revision, local_files_only=local_files_only, allow_projected=allow_projected
    )
    if aligned is None:
        if source.base_model is None:
            raise SafeLoraError(f"{source.root} does not name its model (base_model_name_or_path); give `aligned`.")
        aligned, recorded = source.base_model, source.config.get("revision")
        revision_aligned = revision_aligned or (recorded if isinstance(recorded, str) else None)
    base_model = Checkpoint.open(base, revision=revision_base, local_files_only=local_files_only)
    aligned_model = Checkpoint.open(aligned, revision=revision_aligned, local_files_only=local_files_only)
    if base_model.same_files(aligned_model):
        raise SafeLoraError(
            f"base and aligned are the same checkpoint ({base_model.root}): V = 0 everywhere. Give the model before "
            "alignment as base, the aligned one as aligned."
        )
    plan = plan_modules(source, base_model, aligned_model)
    if split_fused:
        plan = fused.split_fused(plan, aligned_model)
    if all(planned.skipped for planned in plan):
        raise SafeLoraError(f"no module of {source.root} can be projected: {plan[0].skipped}.")
    warnings = [*source.warnings, *_model_warnings(source, base_model, aligned_model)]
    passed_through = source.passed_through
    if modules_to_save == "project":
        full = plan_full(source, base_model, aligned_model)
        warnings = [text for text in warnings if text != passed_through_warning(passed_through)]
        warnings += [f"{entry.module.output.name} stays as it is: {entry.skipped}." for entry in full if entry.skipped]
        passed_through = [entry.module.output.name for entry in full if entry.skipped]
        plan += full
    target = output_place(out, dry_run)
    if target and ranks.rank == 0:
        roots = [base_model.root.resolve(), aligned_model.root.resolve()]
        check_target(target, source.root.resolve(), roots, source.header.file_size, overwrite)
    headers = [source.header, *base_model.headers, *aligned_model.headers]
    files = [(header.file_size, header.sha256) for header in headers]
    ranks.same((options, dry_run, files), "the options, the adapter or the models")
    staged = StagedAdapter(target, source) if target and ranks.rank == 0 else None

    def copy() -> str:
        """The adapter's sha256, on rank 0."""
        if ranks.rank:
            return ""
        return staged.copy_input() if staged else copy_and_hash(source, None, 0)

    def report_of(outcome: dict[str, Any], sha256: str) -> SafeLoraReport:
        return SafeLoraReport(
            **outcome,
            inputs={
                "adapter": {
                    "source": source.source,
                    "file": source.weights.name,
                    "sha256": ranks.gather(sha256)[0],
                    "base_model_name_or_path": source.base_model,
                },
                "base": base_model.fingerprint(),
                "aligned": aligned_model.fingerprint(),
            },
            output=str(target) if target else None,
            dry_run=dry_run,
            passed_through=passed_through,
            warnings=warnings,
            serving=[str(note) for note in serving_notes(source, aligned_model.config)],
        )

    writer = staged or (nullcontext(Kept(source)) if target else None)
    return project_files(plan, source, base_model, aligned_model, options, ranks, writer, copy, report_of, progress)


def project_adapters(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, SafeLoraReport]:
    """Project every adapter of a directory in which PEFT saved several, each by itself.

    Args:
        directory: holds a sub-directory per adapter, and in itself the adapter called "default" if there is one.
        base, aligned: as in :func:`project_adapter`; `aligned` defaults to what each adapter names.
        out: gets a sub-directory per adapter; may be omitted in a dry run.
        **options: those of :func:`project_adapter`.

    Returns:
        The reports by adapter name.

    Raises:
        SafeLoraError: as :func:`project_adapter` does, and when the directory holds no adapter. All adapters are
            checked, and their places in `out`, before the first is projected.
    """
    root = Path(directory).expanduser()
    places = {path.parent.name: path.parent for path in sorted(root.glob(f"*/{CONFIG_FILE}"))}
    if (root / CONFIG_FILE).is_file():
        if "default" in places:
            raise SafeLoraError(f"{root} is an adapter and has a sub-directory default: both would be called default.")
        places = {"default": root, **places}
    if not places:
        raise SafeLoraError(f"{root} holds no adapters (no {CONFIG_FILE} in it or its sub-directories).")
    for name, place in places.items():
        source = Adapter.open(place, allow_projected=bool(options.get("allow_projected")))
        if out is not None and not options.get("dry_run"):
            target = (Path(out).expanduser() / name).resolve()
            check_target(target, place.resolve(), [], source.header.file_size, bool(options.get("overwrite")))
    return {
        name: project_adapter(place, base, aligned, None if out is None else Path(out) / name, **options)
        for name, place in places.items()
    }


def _model_warnings(adapter: Adapter, base: Checkpoint, aligned: Checkpoint) -> list[str]:
    trained_on, before, after = (
        (name or "").rstrip("/").rpartition("/")[2] for name in (adapter.base_model, base.source, aligned.source)
    )
    fp8 = check_pair(base, aligned)
    warnings = [fp8] if fp8 else []
    if trained_on and trained_on == before != after:
        warnings.append(
            f"The adapter says it was trained on {adapter.base_model}, which was given as base, not as aligned."
        )
    return warnings
