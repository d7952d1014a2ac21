"""Running the input filter: on a PeftModel in memory, or from an adapter directory to another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapter import Adapter
from ..changes import Changes
from ..errors import SafeLoraError
from ..loading import load_bare_model
from ..output import StagedAdapter, check_target, copy_and_hash, output_place
from ..peft_model import chosen_adapter, flags_kept, unwrap
from .calibration import CalibrationSet, calibration_sets
from .job import FilterJob
from .moments import Weight
from .report import FILTERED, FilterReport
from .settings import checked
from .solve import Solver, Unseen

if TYPE_CHECKING:
    import torch

GATES = (0.5, 1.0)


def filter_adapter(
    adapter: Any,
    safety_data: Any,
    task_data: Any,
    *,
    weight: Weight = "grad",
    strength: float = 100.0,
    ridge: float = 0.1,
    model: Any = None,
    tokenizer: Any = None,
    out: str | os.PathLike[str] | None = None,
    adapter_name: str | None = None,
    refusal: str | None = None,
    unseen: Unseen = "keep",
    jitter: float = 1e-4,
    clip: float = 3.0,
    gates: Sequence[float] = GATES,
    drop_shared_prefix: bool = True,
    solver: Solver | Literal["auto"] = "auto",
    memory_budget: float = 2.0,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
    batch_size: int = 8,
    max_length: int = 1024,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_filtered: bool = False,
    local_files_only: bool = False,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> FilterReport:
    """Filter the input side of an adapter's update: ``A' = A K_t (K_t + λ K_s)⁻¹``, lora_B and the rank as they are.

    With F_s and F_t (d_in × d_in) the second moments Σ wᵢ xᵢ xᵢᵀ of a layer's inputs at safety and at task tokens, e_s
    and e_t the means of their diagonals: K_t = F_t + ridge·e_t·I, K_s = F_s + jitter·e_s·I, λ = strength. Of all A',
    this one minimises ‖(A' − A)X_t‖² + ridge·e_t·‖A' − A‖² + λ(‖A' X_s‖² + jitter·e_s·‖A'‖²). Where K_s v = γ K_t v,
    the input K_t v is damped by 1/(1 + λγ).

    Args:
        adapter: a peft.PeftModel, whose lora_A are changed in place (`report.undo()` takes it back), or a PEFT adapter
            directory or repository id, which stays as it is: a plain PEFT adapter is written to `out`.
        safety_data: prompts that must be refused, with the refusals; whatever :func:`safelora.data.load_examples` or
            :func:`safelora.data.batches` takes. 30 to 50 of many wordings are a good start; see
            :func:`safelora.filter.wrapped_prompts` for forbidden requests inside the task's own context.
        task_data: examples of what the adapter was trained for, likewise.
        weight: "grad" weights each token by wᵢ = ‖s·Bᵀδᵢ‖², δᵢ the gradient of the response's negative log-likelihood
            with respect to the layer's output (one backward pass for each gate); "none" is forward only, wᵢ = 1,
            with safety inputs taken from the model without the adapter.
        strength: λ ≥ 0. 0 changes nothing.
        ridge: μ > 0, the pull towards A (or towards 0, see `unseen`) in directions without task inputs.
        model: for an adapter directory, the model it adapts: directory, repository id, or a transformers model in
            memory (quantised ones too); by default what the adapter names. A model in memory is left as it was.
        tokenizer: a tokenizer, or where to load one from; by default beside the adapter or the model.
        out: directory to create, for an adapter directory.
        adapter_name: the adapter of a PeftModel; by default the active one.
        refusal: the answer to give to safety prompts that come without one.
        unseen: what becomes of the update where neither set has inputs: "keep" leaves it, "drop" takes it away:
            A' = A F_t (K_t + λ K_s)⁻¹, which pulls towards zero even at λ = 0.
        jitter: keeps K_s definite; increased where a factorisation fails, and reported.
        clip: tokens whose norm exceeds `clip` times the median of their example count as if they had that norm:
            attention sinks are tens of times longer than other tokens.
        gates: the adapter's strengths at which gradients are taken, for weight="grad".
        drop_shared_prefix: leave out of the safety tokens those that begin a task example likewise (the template, in
            general): their inputs are the same on both sides.
        solver: "cholesky" (d_in × d_in), "dual" (tokens × tokens), "cg" (neither); "auto" takes the cheapest that fits.
        memory_budget: GiB for moments or tokens and the solver; where they do not fit, the data are read several times.
        tolerance, max_iterations: of "cg": the estimated ‖error of A'‖/‖A‖ to stop at.
        batch_size, max_length: of calibration batches, where text is given.
        dry_run: measure and solve, change and write nothing.
        overwrite: replace an earlier output of this function at `out`.
        allow_filtered: accept an adapter that was filtered before.
        local_files_only, revision: for repository ids; `revision` is the adapter's.
        device, dtype: where and how to load `model`; by default the GPU if there is one, and the checkpoint's dtype.
        progress: called with (tokens done, tokens in all).

    Returns:
        The report, with what is left of the update on both sides, module by module.

    Raises:
        SafeLoraError: for options and data that cannot be used (empty or identical sets, missing answers), adapters
            whose update is not s·B·A, merged, shared, sharded or filtered before, and where no module has plain
            inputs. Nothing has been changed or written then.
        OSError: when writing fails; no output is left behind.
    """
    settings = checked(
        weight, strength, ridge, jitter, clip, gates, unseen, solver, memory_budget, tolerance, max_iterations
    )

    def sets(found: Any) -> tuple[CalibrationSet, CalibrationSet, list[str]]:
        return calibration_sets(
            safety_data,
            task_data,
            found,
            responses=weight == "grad",
            refusal=refusal,
            batch_size=batch_size,
            max_length=max_length,
            drop_shared_prefix=drop_shared_prefix,
        )

    if isinstance(adapter, (str, os.PathLike)):
        source = Adapter.open(
            adapter,
            revision=revision,
            local_files_only=local_files_only,
            allow_projected=allow_filtered,
            mark=FILTERED,
        )
        target = _target(source, out, dry_run, overwrite)
        wanted = model if model is not None else source.base_model
        if wanted is None:
            raise SafeLoraError(f"{source.root} does not name its model (base_model_name_or_path); give `model`.")
        calibration = sets(_tokenizer(tokenizer, source, wanted, local_files_only))
        with _loaded(wanted, source, device, dtype, local_files_only) as peft_model:
            job = FilterJob(peft_model, "default", settings, True, calibration, progress)
            job.run()
        return _write(job, source, target, dry_run)
    if out is not None:
        raise SafeLoraError("`out` is for adapter directories; a PeftModel is changed in place, then save_pretrained.")
    if model is not None:
        raise SafeLoraError("`model` is for adapter directories; a PeftModel holds its own.")
    _, peft_model = unwrap(adapter)
    name = chosen_adapter(peft_model, adapter_name)
    job = FilterJob(peft_model, name, settings, allow_filtered, sets(_tokenizer(tokenizer, None, None, True)), progress)
    job.run()
    changes = Changes(peft_model, name, FILTERED)
    if not dry_run and job.found:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            for module in job.modules:
                if module.name in job.found:
                    key = module.lora_A.name
                    changes.make(key, job.parameters[key], job.found[module.name])
            changes.apply()
    source_of = {
        "source": f"adapter {name!r} of a model in memory",
        "base_model_name_or_path": job.adapter.base_model,
    }
    return job.report(source_of, None, dry_run, job.adapter, changes)


class FilterSweep:
    """Filters of many strengths from moments that are collected once; the model stays as it is.

    Args as for :func:`filter_adapter`. All moments are kept: there is no memory budget.
    """

    def __init__(
        self,
        peft_model: Any,
        safety_data: Any,
        task_data: Any,
        *,
        weight: Weight = "grad",
        adapter_name: str | None = None,
        tokenizer: Any = None,
        refusal: str | None = None,
        clip: float = 3.0,
        gates: Sequence[float] = GATES,
        drop_shared_prefix: bool = True,
        batch_size: int = 8,
        max_length: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._settings = checked(weight, 1.0, 0.1, 1e-4, clip, gates, "keep", "auto", 64.0, 1e-4, 500)
        _, model = unwrap(peft_model)
        sets = calibration_sets(
            safety_data,
            task_data,
            _tokenizer(tokenizer, None, None, True),
            responses=weight == "grad",
            refusal=refusal,
            batch_size=batch_size,
            max_length=max_length,
            drop_shared_prefix=drop_shared_prefix,
        )
        name = chosen_adapter(model, adapter_name)
        self._job = FilterJob(model, name, self._settings, True, sets, progress, keep=True)
        self._job.run()

    def solve(
        self, strength: float, ridge: float = 0.1, *, unseen: Unseen = "keep", jitter: float = 1e-4
    ) -> dict[str, torch.Tensor]:
        """lora_A (in shape and dtype of the adapter's) of every module that these values change, by module name.

        Raises SafeLoraError as :func:`filter_adapter` does.
        """
        s = self._settings
        settings = checked(
            s.weight, strength, ridge, jitter, s.clip, s.gates, unseen, s.solver, 64.0, s.tolerance, s.max_iterations
        )
        return self._job.solve_again(settings)


def _target(source: Adapter, out: Any, dry_run: bool, overwrite: bool) -> Path | None:
    target = output_place(out, dry_run)
    if target:
        check_target(target, source.root.resolve(), [], source.header.file_size, overwrite, FILTERED.report)
    return target


def _tokenizer(tokenizer: Any, source: Adapter | None, model: Any, local_files_only: bool) -> Any:
    """A tokenizer, where one can be found."""
    places: list[Any] = [tokenizer] if tokenizer is not None else []
    if tokenizer is not None and not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    if tokenizer is None and source is not None:
        if any((source.root / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            places.append(source.root)
        named = model if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", None)
        places += [named] if named else []
    if not places:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(places[0], local_files_only=local_files_only)
    except (OSError, ValueError) as error:
        if tokenizer is None:
            return None  # data may be tokenised; text asks for the tokenizer by name
        raise SafeLoraError(f"no tokenizer can be loaded from {places[0]}: {error}") from error


@contextmanager
def _loaded(model: Any, source: Adapter, device: str | None, dtype: str, local_files_only: bool) -> Iterator[Any]:
    """The model with the adapter on it; a model in memory is given back without."""
    from peft import PeftModel

    if hasattr(model, "peft_config") and getattr(model, "peft_config", None):
        raise SafeLoraError("`model` has adapters already; give the plain model, or pass the PeftModel alone.")
    in_memory = not isinstance(model, (str, os.PathLike))
    if in_memory and not hasattr(model, "named_modules"):
        raise SafeLoraError(f"model is a {type(model).__name__}, expected a path, a repository id or a model.")
    plain = (
        model if in_memory else load_bare_model(model, dtype=dtype, device=device, local_files_only=local_files_only)
    )
    with flags_kept(plain):
        peft_model = PeftModel.from_pretrained(plain, str(source.root))
        try:
            yield peft_model
        finally:
            if in_memory:
                peft_model.unload()
                if hasattr(plain, "peft_config"):
                    del plain.peft_config


def _write(job: FilterJob, source: Adapter, target: Path | None, dry_run: bool) -> FilterReport:
    described = {"source": source.source, "file": source.weights.name, "base_model_name_or_path": source.base_model}
    adapter = replace(source, warnings=[])
    job.warnings = [*source.warnings, *(text for text in job.warnings if text not in job.adapter.warnings)]
    if target is None:
        described["sha256"] = copy_and_hash(source, None, 0)
        return job.report(described, None, dry_run, adapter)
    with StagedAdapter(target, source, FILTERED) as staged:
        described["sha256"] = staged.copy_input()
        report = job.report(described, str(target), dry_run, adapter)
        stored = {module.name: module.lora_A for module in source.modules}
        for name, tensor in job.found.items():
            info = stored[name]
            staged.replace(info.name, tensor.reshape(info.shape).to(source.read(info.name).dtype).cpu().contiguous())
        staged.commit(report)
    return report
