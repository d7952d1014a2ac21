"""Running the input filter: on a PeftModel in memory, or from an adapter directory to another."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..adapter import Adapter, LoraModule
from ..errors import SafeLoraError
from ..live import _Changes
from ..loading import load_bare_model
from ..output import StagedAdapter, check_target, copy_and_hash, output_place
from ..peft_model import chosen_adapter, inventory, unwrap, whole
from .calibration import CalibrationSet, calibration_sets
from .moments import SIDES, Collector, InputGroup, Weight, calibrating, plain_layers, probe
from .report import FILTERED, FilteredModule, FilterReport
from .solve import Problem, Solution, Solver, Unseen, choose, solve

if TYPE_CHECKING:
    import torch

GATES = (0.5, 1.0)
_SAMPLE = 8
_INSEPARABLE = 0.6


@dataclass(frozen=True)
class Settings:
    """The options of one filter, checked."""

    weight: Weight
    strength: float
    ridge: float
    jitter: float
    clip: float
    gates: tuple[float, ...]
    unseen: Unseen
    solver: Solver | Literal["auto"]
    memory_budget: int
    tolerance: float
    max_iterations: int

    def describe(self) -> dict[str, Any]:
        """The options as the report has them."""
        return {**self.__dict__, "gates": list(self.gates) if self.weight == "grad" else []}


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
    settings = _checked(
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
            job = _Job(peft_model, "default", settings, True, calibration, progress)
            job.run()
        return _write(job, source, target, dry_run)
    if out is not None:
        raise SafeLoraError("`out` is for adapter directories; a PeftModel is changed in place, then save_pretrained.")
    if model is not None:
        raise SafeLoraError("`model` is for adapter directories; a PeftModel holds its own.")
    _, peft_model = unwrap(adapter)
    name = chosen_adapter(peft_model, adapter_name)
    job = _Job(peft_model, name, settings, allow_filtered, sets(_tokenizer(tokenizer, None, None, True)), progress)
    job.run()
    changes = _Changes(peft_model, name, FILTERED)
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
        self._settings = _checked(weight, 1.0, 0.1, 1e-4, clip, gates, "keep", "auto", 64.0, 1e-4, 500)
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
        self._job = _Job(model, name, self._settings, True, sets, progress, keep=True)
        self._job.run()

    def solve(
        self, strength: float, ridge: float = 0.1, *, unseen: Unseen = "keep", jitter: float = 1e-4
    ) -> dict[str, torch.Tensor]:
        """lora_A (in shape and dtype of the adapter's) of every module that these values change, by module name.

        Raises SafeLoraError as :func:`filter_adapter` does.
        """
        s = self._settings
        settings = _checked(
            s.weight, strength, ridge, jitter, s.clip, s.gates, unseen, s.solver, 64.0, s.tolerance, s.max_iterations
        )
        return self._job.solve_again(settings)


class _Job:
    """One filter of one adapter in a PeftModel, up to the new factors."""

    def __init__(
        self,
        model: Any,
        adapter_name: str,
        settings: Settings,
        allow_filtered: bool,
        calibration: tuple[CalibrationSet, CalibrationSet, list[str]],
        progress: Callable[[int, int], None] | None,
        keep: bool = False,
    ) -> None:
        self.model, self.settings, self.keep = model, settings, keep
        self.collected: list[tuple[list[InputGroup], Solver, Collector]] = []
        self.safety, self.task, warnings = calibration
        self.adapter, self.parameters, layers = inventory(model, adapter_name, allow_filtered, FILTERED)
        self.modules = self.adapter.modules
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise SafeLoraError(
                "the model is sharded (FSDP2, tensor parallel). Save the adapter and filter it from its directory."
            )
        self.warnings = [*self.adapter.warnings, *warnings]
        self.layers = plain_layers(model, adapter_name, self.modules, layers)
        self.skipped = dict(self.layers.skipped)
        self.found: dict[str, torch.Tensor] = {}
        self.seconds: dict[str, float] = {}
        self._measured: dict[str, dict[str, Any]] = {}
        self._held_out: dict[str, tuple[float, float, float]] = {}
        self._progress = progress

    def run(self) -> None:
        """Collect the moments and solve; the model is as it was afterwards."""
        if not self.layers.by_name:
            raise SafeLoraError(
                f"no module of {self.adapter.root} can be filtered: {next(iter(self.skipped.values()))}."
            )
        with calibrating(self.layers), _timed(self.seconds, "collect"):
            groups, skipped = probe(self.layers, self.task.batches[0])
            self.skipped.update(skipped)
            if not groups:
                reason = next(iter(self.skipped.values()))
                raise SafeLoraError(f"no module of {self.adapter.root} can be filtered: {reason}.")
            for index in range(min(_SAMPLE, len(groups))):
                groups[index * len(groups) // min(_SAMPLE, len(groups))].sampled = True
            passes = self._passes(groups)
            per_pass = self._tokens_of_pass()
            done, total = 0, per_pass * len(passes)

            def advance(tokens: int) -> None:
                nonlocal done
                done += tokens
                if self._progress is not None:
                    self._progress(done, total)

            for part, chosen in passes:
                collector = Collector(
                    self.layers, part, self.settings.weight, self.settings.clip, rows=chosen != "cholesky"
                )
                collector.collect(self.safety, self.settings.gates, False, advance)
                collector.collect(self.task, self.settings.gates, True, advance)
                if self.keep:
                    self.collected.append((part, chosen, collector))
                else:
                    self.solve(part, chosen, collector)
        for kind in ("wall", "processor"):
            self.seconds[f"collect_{kind}"] -= self.seconds.get(f"solve_{kind}", 0.0)
        if self._held_out and self.separability["selectivity"] > _INSEPARABLE:
            self.warnings.append(
                f"The safety and task examples are hardly separable: on held-out examples the filter leaves "
                f"{self.separability['safety_kept']:.0%} of the update on safety inputs and "
                f"{self.separability['task_kept']:.0%} on task inputs (medians over {len(self._held_out)} modules), "
                "which is close to scaling the adapter. Give more, and more varied, examples; a task in the domain of "
                "the forbidden requests cannot be told from them."
            )

    @property
    def separability(self) -> dict[str, Any]:
        """Medians over the sampled modules, and their ratio."""
        safety, task, change = (statistics.median(values) for values in zip(*self._held_out.values(), strict=True))
        selectivity = safety / task if task > 0 else 1.0
        return {
            "modules": len(self._held_out),
            "safety_kept": safety,
            "task_kept": task,
            "task_change": change,
            "selectivity": selectivity,
        }

    def report(
        self,
        source: dict[str, Any],
        output: str | None,
        dry_run: bool,
        adapter: Adapter,
        changes: _Changes | None = None,
    ) -> FilterReport:
        return FilterReport(
            modules=[self._module_report(module) for module in self.modules],
            options=self.settings.describe(),
            inputs={
                "adapter": source,
                "model": {"source": adapter.base_model or "the model in memory", "dtype": self._dtype()},
                "safety": self.safety.describe(),
                "task": self.task.describe(),
            },
            versions=_versions(),
            separability=self.separability if self._held_out else None,
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            output=output,
            dry_run=dry_run,
            passed_through=adapter.passed_through,
            warnings=self.warnings,
            changes=changes,
        )

    def _dtype(self) -> str:
        return str(self.model.get_input_embeddings().weight.dtype).removeprefix("torch.")

    def _tokens_of_pass(self) -> int:
        count = sum(int(batch.attention_mask.sum()) for side in (self.safety, self.task) for batch in side.batches)
        return count * (len(self.settings.gates) if self.settings.weight == "grad" else 1)

    def _passes(self, groups: list[InputGroup]) -> list[tuple[list[InputGroup], Solver]]:
        """The groups of each pass over the data, so that what they keep fits in the budget, and their solver."""
        passes: list[tuple[list[InputGroup], Solver]] = []
        room = 0.0
        repeats = len(self.settings.gates) if self.settings.weight == "grad" else 1
        tokens = (self.safety.tokens + self.task.tokens) * repeats
        budget = self.settings.memory_budget
        for group in sorted(groups, key=lambda group: group.dim):
            distinct = group.distinct(self.settings.weight)
            solver = self.settings.solver
            if solver == "auto":
                ranks = [self._rank(name) for name in group.modules]
                solver = choose(group.dim, tokens, distinct, ranks, group.itemsize, budget)
            if solver == "cholesky":
                size = 4.0 * group.dim**2 * distinct * len(SIDES) * (2 if group.sampled else 1)
            else:
                size = float(tokens * (group.dim * group.itemsize + 4 * distinct))
            if not passes or passes[-1][1] != solver or (size > room and not self.keep):
                passes.append(([], solver))
                room = float(budget)
            passes[-1][0].append(group)
            room -= size
        return passes

    def _rank(self, name: str) -> int:
        return int(self.layers.by_name[name].lora_A[self.layers.adapter].weight.shape[0])

    def solve(self, part: list[InputGroup], solver: Solver, collector: Collector) -> None:
        """New factors for the modules of a pass."""
        with _timed(self.seconds, "solve"):
            for group in part:
                self._solve(group, collector, solver)

    def solve_again(self, settings: Settings) -> dict[str, torch.Tensor]:
        """New lora_A by module from the moments that were kept, for another strength and ridge."""
        self.settings = settings
        self.found.clear()
        for collected in self.collected:
            self.solve(*collected)
        return dict(self.found)

    def _solve(self, group: InputGroup, collector: Collector, solver: Solver) -> None:
        """New factors for the modules of a group, and what they do to both sides."""
        import torch

        by_name = {module.name: module for module in self.modules}
        distinct = [[name] for name in group.modules] if self.settings.weight == "grad" else [group.modules]
        for names in distinct:
            factors = {name: self._factors(by_name[name]) for name in names}
            stacked = torch.cat([a for a, _ in factors.values()])
            problem = self._problem(collector, names[0], None)
            try:
                solution = solve(
                    problem,
                    stacked,
                    solver,
                    tolerance=self.settings.tolerance,
                    max_iterations=self.settings.max_iterations,
                )
            except SafeLoraError as error:
                raise SafeLoraError(f"module {names[0]}: {error}.") from error
            images = [moment.apply(torch.cat([stacked, solution.lora_A]).t().contiguous()) for moment in
                      (problem.safety, problem.task)]  # fmt: skip
            sampled = group.sampled and not self.keep
            held_out = self._held(collector, names[0], stacked, solver, factors) if sampled else {}
            self._held_out.update(held_out)
            start, rows = 0, len(stacked)
            for name, (a, b) in factors.items():
                stop = start + len(a)
                new = solution.lora_A[start:stop]
                both = torch.cat([a, new])
                part = [torch.cat([image[:, start:stop], image[:, rows + start : rows + stop]], 1) for image in images]
                energies = [both @ image.double() for image in part]
                self._record(by_name[name], a, new, b, energies, problem, solution, held_out.get(name))
                start = stop

    def _problem(self, collector: Collector, name: str, fold: int | None) -> Problem:
        s = self.settings
        task, safety = (collector.moments(name, side, fold) for side in ("task", "safety"))
        return Problem(task, safety, s.strength, s.ridge, s.jitter, s.unseen)

    def _factors(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A and lora_B in fp64, refused where not finite."""
        import torch

        found = []
        for info in (module.lora_A, module.lora_B):
            tensor = whole(self.parameters[info.name]).to(torch.float64)
            if not bool(tensor.isfinite().all()):
                raise SafeLoraError(f"{info.name} holds NaN or Inf; the adapter is damaged.")
            found.append(tensor)
        return found[0], found[1].to(found[0].device)

    def _held(
        self, collector: Collector, name: str, stacked: torch.Tensor, solver: Solver, factors: dict[str, Any]
    ) -> dict[str, tuple[float, float, float]]:
        """What a filter made from one part of the examples leaves on the other part."""
        seen, unseen = self._problem(collector, name, 0), self._problem(collector, name, 1)
        if not all(
            moment.mean_diagonal() > 0 for problem in (seen, unseen) for moment in (problem.task, problem.safety)
        ):
            return {}
        import torch

        new = solve(seen, stacked, solver, tolerance=self.settings.tolerance).lora_A
        out, start = {}, 0
        for module, (a, b) in factors.items():
            part = new[start : start + len(a)]
            start += len(a)
            both = torch.cat([a, part])
            energies = [both @ moment.apply(both.t().contiguous()).double() for moment in (unseen.safety, unseen.task)]
            safety, task, change = _kept(energies, b, len(a))
            if safety is not None and task is not None and change is not None:
                out[module] = (safety, task, change)
        return out

    def _record(
        self,
        module: LoraModule,
        a: torch.Tensor,
        new: torch.Tensor,
        b: torch.Tensor,
        energies: list[torch.Tensor],
        problem: Problem,
        solution: Solution,
        held_out: tuple[float, float, float] | None,
    ) -> None:
        import torch

        rank = len(a)
        safety, task, change = _kept(energies, b, rank)
        shift = problem.shift
        norm = float(a.norm())
        gram = a @ a.t()
        numbers: dict[str, Any] = {
            "norm_ratio": float(new.norm()) / norm if norm else None,
            "safety_kept": safety,
            "task_kept": task,
            "task_change": change,
            "gammas": _gammas(energies[0][:rank, :rank] + shift[1] * gram, energies[1][:rank, :rank] + shift[0] * gram),
            "solver": solution.solver,
            "iterations": solution.iterations,
            "residual": solution.residual,
            "jitter": solution.jitter,
            "held_out": held_out,
        }
        parameter = self.parameters[module.lora_A.name]
        rounded = new.reshape(parameter.shape).to(parameter.dtype)
        if not bool(rounded.isfinite().all()):
            raise SafeLoraError(f"the filtered {module.lora_A.name} does not fit its dtype {parameter.dtype}.")
        if torch.equal(rounded, whole(parameter).to(rounded.device)):
            numbers["decision"], numbers["reason"] = "kept", self._why_kept(problem, norm)
        else:
            numbers["decision"] = "filtered"
            self.found[module.name] = rounded
        self._measured[module.name] = numbers

    def _why_kept(self, problem: Problem, norm: float) -> str:
        if norm == 0:
            return "its lora_A is zero"
        if self.settings.strength == 0:
            return "strength is 0"
        for side, moment in (("safety", problem.safety), ("task", problem.task)):
            if moment.mean_diagonal() == 0:
                return f"the {side} tokens have no weight here"
        return "the filter changes less than the dtype shows"

    def _module_report(self, module: LoraModule) -> FilteredModule:
        numbers = self._measured.get(module.name)
        if numbers is None:
            numbers = {"decision": "skipped", "reason": self.skipped[module.name]}
        return FilteredModule(module.name, module.kind, module.rank, (module.d_out, module.d_in), **numbers)


def _kept(energies: list[torch.Tensor], b: torch.Tensor, rank: int) -> tuple[float | None, float | None, float | None]:
    """(safety_kept, task_kept, task_change) from E = [A; A'] F [A; A']ᵀ of both sides: ‖B A X‖² = ⟨BᵀB, A F Aᵀ⟩."""
    outer = b.t() @ b
    found: list[float | None] = []
    for energy, change in ((energies[0], False), (energies[1], False), (energies[1], True)):
        old, new = energy[:rank, :rank], energy[rank:, rank:]
        cross = energy[:rank, rank:]
        wanted = new + old - cross - cross.t() if change else new
        before, after = float((outer * old).sum()), float((outer * wanted).sum())
        found.append(math.sqrt(max(after, 0.0) / before) if before > 0 else None)
    return found[0], found[1], found[2]


def _gammas(safety: torch.Tensor, task: torch.Tensor) -> tuple[float, float, float] | None:
    """Smallest, median and largest generalised eigenvalue of two r × r matrices; None where the second is singular."""
    import torch

    factor, failed = torch.linalg.cholesky_ex(task)
    if int(failed):
        return None
    half = torch.linalg.solve_triangular(factor, safety, upper=False)
    pencil = torch.linalg.solve_triangular(factor, half.t(), upper=False)
    values = torch.linalg.eigvalsh((pencil + pencil.t()) / 2).clamp_min(0)
    return float(values[0]), float(values.median()), float(values[-1])


def _checked(
    weight: str,
    strength: float,
    ridge: float,
    jitter: float,
    clip: float,
    gates: Sequence[float],
    unseen: str,
    solver: str,
    memory_budget: float,
    tolerance: float,
    max_iterations: int,
) -> Settings:
    choices = {
        "weight": (weight, ("grad", "none")),
        "unseen": (unseen, ("keep", "drop")),
        "solver": (solver, ("auto", "cholesky", "dual", "cg")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise SafeLoraError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}.")
    numbers = {
        "strength": (strength, 0.0, True), "ridge": (ridge, 0.0, False), "jitter": (jitter, 0.0, True),
        "clip": (clip, 0.0, False), "memory_budget": (memory_budget, 0.0, False), "tolerance": (tolerance, 0.0, False),
        "max_iterations": (max_iterations, 0.0, False), **{f"gates[{i}]": (g, 0.0, False) for i, g in enumerate(gates)},
    }  # fmt: skip
    for name, (number, least, inclusive) in numbers.items():
        right = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        if not right or number < least or (number == least and not inclusive):
            bound = "of at least" if inclusive else "above"
            raise SafeLoraError(f"{name} is {number!r}, expected a finite number {bound} {least:g}.")
    if not gates:
        raise SafeLoraError("gates is empty; give at least one strength of the adapter, such as 1.0.")
    return Settings(
        weight,  # type: ignore[arg-type]
        float(strength),
        float(ridge),
        float(jitter),
        float(clip),
        tuple(float(gate) for gate in gates),
        unseen,  # type: ignore[arg-type]
        solver,  # type: ignore[arg-type]
        int(memory_budget * 2**30),
        float(tolerance),
        int(max_iterations),
    )


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
    training = {module: module.training for module in plain.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in plain.parameters()}
    peft_model = PeftModel.from_pretrained(plain, str(source.root))
    try:
        yield peft_model
    finally:
        if in_memory:
            peft_model.unload()
            if hasattr(plain, "peft_config"):
                del plain.peft_config
            for module, mode in training.items():
                module.training = mode
            for parameter, wanted in trainable.items():
                parameter.requires_grad_(wanted)


def _write(job: _Job, source: Adapter, target: Path | None, dry_run: bool) -> FilterReport:
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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        for kind, value in (("wall", time.perf_counter() - wall), ("processor", time.process_time() - processor)):
            seconds[f"{name}_{kind}"] = seconds.get(f"{name}_{kind}", 0.0) + value


def _versions() -> dict[str, str]:
    import peft
    import torch
    import transformers

    import safelora_kernels as sk

    return {
        "safelora": sk.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
