"""One filter of one adapter in a PeftModel: moments collected and solved for, and what the new factors do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, LoraModule
from ..changes import Changes
from ..errors import SafeLoraError
from ..peft_model import inventory, whole
from ..versions import versions
from .calibration import CalibrationSet
from .moments import SIDES, Collector, InputGroup, calibrating, plain_layers, probe
from .report import FILTERED, FilteredModule, FilterReport
from .settings import Settings
from .solve import Problem, Solution, Solver, choose, solve

if TYPE_CHECKING:
    import torch

_SAMPLE = 8
_INSEPARABLE = 0.6


class FilterJob:
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
        changes: Changes | None = None,
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
            versions=versions("torch", "transformers", "peft"),
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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        for kind, value in (("wall", time.perf_counter() - wall), ("processor", time.process_time() - processor)):
            seconds[f"{name}_{kind}"] = seconds.get(f"{name}_{kind}", 0.0) + value
