"""Offline Safe LoRA: project the update of an adapter directory onto the alignment subspace of its model."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .adapter import Adapter, LoraModule
from .checkpoint import Checkpoint, TensorInfo
from .errors import SafeLoraError
from .mapping import PlannedModule, WeightMatch, plan_modules
from .output import StagedAdapter, check_target, copy_and_hash
from .report import COSINE_ERROR, ModuleReport, SafeLoraReport
from .stream import MappedRange, ReadAhead, to_tensor

if TYPE_CHECKING:
    import torch

READ_AHEAD_BYTES = 384 << 20
BATCH_BYTES = 64 << 20
_NORM_ELEMENTS = 1 << 20  # widened to fp64 at a time
_ROUNDING = 5e-6  # half a unit of the authors' fifth decimal


@dataclass
class _Pair:
    """One weight pair and the modules that use it."""

    aligned: WeightMatch
    base: WeightMatch
    modules: list[LoraModule]

    @property
    def tensors(self) -> tuple[TensorInfo, TensorInfo]:
        return self.aligned.info, self.base.info

    @property
    def nbytes(self) -> int:
        return self.aligned.info.nbytes + self.base.info.nbytes


@dataclass(frozen=True)
class _Measured:
    cosine: float | None
    v_norm: float
    shrinkage: float | None
    distance: float
    zero_update: bool

    def kept_because(self, rule: str) -> str | None:
        """Why the module takes no part in the selection, or None. The authors' rule does select zero updates."""
        if self.cosine is None:
            return "V = 0: base and aligned are equal here, there is nothing to project onto"
        return "the update is zero" if self.zero_update and rule == "strict" else None


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
    dry_run: bool = False,
    overwrite: bool = False,
    allow_projected: bool = False,
    local_files_only: bool = False,
    revision: str | None = None,
    revision_base: str | None = None,
    revision_aligned: str | None = None,
    progress: Callable[[int, int], None] | None = None,
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
        dry_run: measure and decide, write nothing.
        overwrite: replace an earlier output of this function at `out`.
        allow_projected: accept an adapter that was projected before.
        local_files_only, revision, revision_base, revision_aligned: for inputs given as repository ids.
        progress: called with (bytes done, bytes in all).

    Returns:
        The report, also written to `out`/safelora_report.json.

    Raises:
        SafeLoraError: for unusable input, before any weight is read where that is possible; names the file, tensor
            or module. Nothing has been written then.
        OSError: when writing fails; no output is left behind.
    """
    options = _check_options(threshold, num_layers, rule, normalize)
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
    if base_model.root.resolve() == aligned_model.root.resolve() and base_model.tensors == aligned_model.tensors:
        raise SafeLoraError(f"base and aligned are the same checkpoint ({base_model.root}): V = 0 everywhere.")
    plan = plan_modules(source, base_model, aligned_model)
    if all(planned.skipped for planned in plan):
        raise SafeLoraError(f"no module of {source.root} can be projected: {plan[0].skipped}.")
    warnings = [*source.warnings, *_model_warnings(source, base_model, aligned_model)]
    target = None
    if not dry_run:
        if out is None:
            raise SafeLoraError("give an output directory (out), or ask for a dry run.")
        target = Path(out).expanduser().resolve()
        roots = [base_model.root.resolve(), aligned_model.root.resolve()]
        check_target(target, source.root.resolve(), roots, source.header.file_size, overwrite)

    batches = _batches(_pairs(plan))
    with ExitStack() as stack:
        stream = stack.enter_context(
            ReadAhead([[info for pair in batch for info in pair.tensors] for batch in batches], READ_AHEAD_BYTES)
        )
        staged = stack.enter_context(StagedAdapter(target, source)) if target is not None else None
        pool = stack.enter_context(ThreadPoolExecutor(1, "safelora-copy"))
        digest = pool.submit(staged.copy_input if staged else lambda: copy_and_hash(source, None, 0))
        measured = _measure(source, batches, stream, normalize, staged, digest, progress)
        if all(result.v_norm == 0 for result in measured.values()):
            raise SafeLoraError(
                f"base ({base_model.source}) and aligned ({aligned_model.source}) hold the same weights in every "
                "adapted module: V = 0, there is no alignment to project onto. Is one of them the wrong model?"
            )
        selected = _select(plan, measured, options)
        report = SafeLoraReport(
            modules=_module_reports(plan, measured, selected, options),
            options=options,
            inputs={
                "adapter": {
                    "source": source.source,
                    "file": source.weights.name,
                    "sha256": digest.result(),
                    "base_model_name_or_path": source.base_model,
                },
                "base": base_model.fingerprint(),
                "aligned": aligned_model.fingerprint(),
            },
            versions=_versions(),
            output=str(target) if target else None,
            dry_run=dry_run,
            pdst=_pdst(measured, selected),
            passed_through=source.passed_through,
            warnings=warnings,
        )
        if staged is not None:
            for planned in plan:
                name = planned.module.lora_B.name
                if planned.module.name in measured and planned.module.name not in selected:
                    staged.replace(name, source.read(name))
            staged.commit(report)
    return report


def _check_options(threshold: float | None, num_layers: int | None, rule: str, normalize: str) -> dict[str, Any]:
    if (threshold is None) == (num_layers is None):
        raise SafeLoraError("give exactly one criterion: threshold or num_layers.")
    if threshold is not None and (
        isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold)
    ):
        raise SafeLoraError(f"threshold is {threshold!r}, expected a finite number (cosines lie in [0, 1]).")
    if num_layers is not None and (isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 0):
        raise SafeLoraError(f"num_layers is {num_layers!r}, expected an integer of at least 0.")
    if rule not in ("strict", "authors"):
        raise SafeLoraError(f"rule is {rule!r}, expected 'strict' or 'authors'.")
    if normalize not in ("frobenius", "none"):
        raise SafeLoraError(f"normalize is {normalize!r}, expected 'frobenius' or 'none'.")
    return {"threshold": threshold, "num_layers": num_layers, "rule": rule, "normalize": normalize}


def _model_warnings(adapter: Adapter, base: Checkpoint, aligned: Checkpoint) -> list[str]:
    trained_on, before, after = (
        (name or "").rstrip("/").rpartition("/")[2] for name in (adapter.base_model, base.source, aligned.source)
    )
    if trained_on and trained_on == before != after:
        return [f"The adapter says it was trained on {adapter.base_model}, which was given as base, not as aligned."]
    return []


def _pairs(plan: Sequence[PlannedModule]) -> list[_Pair]:
    """Distinct weight pairs in file order, each with all modules that use it."""
    pairs: dict[tuple[Any, ...], _Pair] = {}
    for planned in plan:
        if planned.base and planned.aligned and not planned.skipped:
            key = (planned.aligned.info, planned.aligned.transposed, planned.base.info, planned.base.transposed)
            pairs.setdefault(key, _Pair(planned.aligned, planned.base, [])).modules.append(planned.module)
    return sorted(pairs.values(), key=lambda pair: (pair.aligned.info.file, pair.aligned.info.begin))


def _batches(pairs: Sequence[_Pair]) -> list[list[_Pair]]:
    """Consecutive pairs of at most BATCH_BYTES together; fixed by the input alone, never by timing."""
    batches: list[list[_Pair]] = []
    room = 0
    for pair in pairs:
        if pair.nbytes > room:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(pair)
        room -= pair.nbytes
    return batches


def _measure(
    adapter: Adapter,
    batches: Sequence[Sequence[_Pair]],
    stream: ReadAhead,
    normalize: Literal["frobenius", "none"],
    staged: StagedAdapter | None,
    copied: Future[str],
    progress: Callable[[int, int], None] | None,
) -> dict[str, _Measured]:
    """Project every module; the projected factors go to `staged`, the numbers are returned by module name."""
    import torch

    import safelora_kernels as sk

    total = sum(pair.nbytes for batch in batches for pair in batch)
    done = 0
    measured: dict[str, _Measured] = {}
    wide = any(module.lora_B.dtype == "F64" for module in adapter.modules)
    for batch, mapped in zip(batches, stream, strict=True):
        layers = [_layer(adapter, pair, mapped[2 * index : 2 * index + 2]) for index, pair in enumerate(batch)]
        results = sk.project_layers(layers, normalize=normalize, out_dtype=torch.float64 if wide else torch.float32)
        copied.result()
        for pair, layer, result in zip(batch, layers, results, strict=True):
            v_norm = float(result.v_norm)
            factors: Any = zip(
                pair.modules, layer.lora_B, layer.lora_A, result.lora_B, result.cosine or (), strict=True
            )
            for module, lora_B, lora_A, projected, cosine in factors:
                _check_finite(adapter, pair, module, layer, lora_B, lora_A, v_norm, float(cosine))
                measured[module.name] = _numbers(lora_B, lora_A, projected, v_norm, float(cosine))
                if staged is not None and v_norm:
                    staged.replace(module.lora_B.name, _rounded(adapter, module, lora_B, projected))
        done += sum(pair.nbytes for pair in batch)
        del layers, results, layer, result, lora_B, lora_A, projected
        if progress is not None:
            progress(done, total)
    return measured


def _layer(adapter: Adapter, pair: _Pair, mapped: Sequence[MappedRange]) -> Any:
    from safelora_kernels import LayerFactors

    weights: list[torch.Tensor] = []
    for match, memory in zip((pair.aligned, pair.base), mapped, strict=True):
        weight = to_tensor(memory, match.info).flatten(1)
        weights.append(weight.t() if match.transposed else weight)
    return LayerFactors(
        weights[0],
        weights[1],
        [adapter.read(module.lora_B.name).flatten(1) for module in pair.modules],
        [adapter.read(module.lora_A.name).flatten(1) for module in pair.modules],
    )


def _check_finite(
    adapter: Adapter,
    pair: _Pair,
    module: LoraModule,
    layer: Any,
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    v_norm: float,
    cosine: float,
) -> None:
    """Find and name the tensor behind a NaN or infinite result."""
    if math.isfinite(v_norm) and v_norm and math.isfinite(cosine):
        return
    suspects = [
        (pair.aligned.info, layer.aligned),
        (pair.base.info, layer.base),
        (module.lora_B, lora_B),
        (module.lora_A, lora_A),
    ]
    for info, tensor in suspects if v_norm else suspects[2:]:
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise SafeLoraError(
                f"{info.file if adapter.loaded is None or info.file != adapter.weights else adapter.weights}: tensor "
                f"{info.name} holds {bad} NaN or infinite value(s). Nothing was written."
            )
    if v_norm:
        raise SafeLoraError(f"module {module.name}: the projection overflows although all its inputs are finite.")


def _numbers(
    lora_B: torch.Tensor, lora_A: torch.Tensor, projected: torch.Tensor, v_norm: float, cosine: float
) -> _Measured:
    import torch

    if not v_norm:
        return _Measured(None, 0.0, None, 0.0, False)
    squares = torch.zeros(3, dtype=torch.float64)
    rows = max(1, _NORM_ELEMENTS // lora_B.shape[1])
    for part, new in zip(lora_B.split(rows), projected.split(rows), strict=True):
        before, after = part.double(), new.double()
        squares += torch.stack([(matrix * matrix).sum() for matrix in (before, after, before - after)])
    norm, norm_after, distance = squares.sqrt().tolist()
    zero_update = False
    if cosine == 0:
        b, a = lora_B.double(), lora_A.double()
        zero_update = not float(((b.T @ b) * (a @ a.T)).sum())
    return _Measured(cosine, v_norm, norm_after / norm if norm else None, distance, zero_update)


def _rounded(adapter: Adapter, module: LoraModule, lora_B: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
    rounded = projected.to(lora_B.dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        raise SafeLoraError(
            f"{adapter.weights}: the projected {module.lora_B.name} does not fit its dtype {module.lora_B.dtype} "
            f"(largest value {float(projected.abs().max()):.3g}). Save the adapter in fp32 first."
        )
    return rounded


def _select(plan: Sequence[PlannedModule], measured: dict[str, _Measured], options: dict[str, Any]) -> set[str]:
    import torch

    import safelora_kernels as sk

    names = [planned.module.name for planned in plan if planned.module.name in measured]
    cosines = [math.nan if measured[name].kept_because(options["rule"]) else measured[name].cosine for name in names]
    chosen = sk.select_layers(
        torch.tensor(cosines, dtype=torch.float64),
        threshold=options["threshold"],
        num_layers=options["num_layers"],
        rule=options["rule"],
    )
    return {name for name, taken in zip(names, chosen.tolist(), strict=True) if taken}


def _module_reports(
    plan: Sequence[PlannedModule], measured: dict[str, _Measured], selected: set[str], options: dict[str, Any]
) -> list[ModuleReport]:
    rule = options["rule"]
    cosines = {
        name: result.cosine
        for name, result in measured.items()
        if result.cosine is not None and not result.kept_because(rule)
    }
    highest_taken = max((cosine for name, cosine in cosines.items() if name in selected), default=None)
    lowest_left = min((cosine for name, cosine in cosines.items() if name not in selected), default=None)
    tolerance = COSINE_ERROR * (1 if options["threshold"] is not None else 2)
    tolerance += _ROUNDING if rule == "authors" else 0.0
    reports = []
    for planned in plan:
        module = planned.module
        result = measured.get(module.name)
        boundary = options["threshold"]
        if boundary is None:
            boundary = lowest_left if module.name in selected else highest_taken
        cosine = cosines.get(module.name)
        margin = None if cosine is None or boundary is None else cosine - boundary
        reports.append(
            ModuleReport(
                name=module.name,
                kind=module.kind,
                rank=module.rank,
                shape=(module.d_out, module.d_in),
                base_tensor=planned.base.info.name if planned.base else None,
                aligned_tensor=planned.aligned.info.name if planned.aligned else None,
                matched=planned.aligned.how if planned.aligned else None,
                decision="skipped" if result is None else "projected" if module.name in selected else "kept",
                cosine=result.cosine if result else None,
                margin=margin,
                near_threshold=margin is not None and abs(margin) <= tolerance,
                shrinkage=result.shrinkage if result else None,
                v_norm=result.v_norm if result else None,
                reason=result.kept_because(rule) if result else planned.skipped,
            )
        )
    return reports


def _pdst(measured: dict[str, _Measured], selected: set[str]) -> float | None:
    values = [
        1.0 if name in selected else 1 / (1 + result.distance)
        for name, result in measured.items()
        if result.cosine is not None
    ]
    return sum(values) / len(values) if values else None


def _versions() -> dict[str, str]:
    import torch

    import safelora_kernels as sk

    return {"safelora": sk.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
