"""What an input filter did: the numbers per module, the calibration sets and options, as JSON, a table, a page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..adapter import Mark
from ..card import Mention
from ..errors import SafeLoraError
from ..report import Report, number

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

    from ..changes import Changes

REPORT_FILE = "safelora_filter.json"
FILTERED = Mark("safelora_filter", "filtered", "Filtering", REPORT_FILE, "num_filtered", "_safelora_filtered")


@dataclass(frozen=True)
class FilteredModule:
    """One adapted module.

    decision: "filtered", "kept" (its lora_A is what it was) or "skipped" (not measured); reason says why.
    norm_ratio: ‖A'‖_F/‖A‖_F.
    safety_kept, task_kept: ‖B A' X‖/‖B A X‖ over the calibration tokens of each side, weighted as the filter weights
        them: how much of the update is left there.
    task_change: ‖B (A' − A) X‖/‖B A X‖ over task tokens.
    gammas: smallest, median and largest generalised eigenvalue of (A K_s Aᵀ, A K_t Aᵀ): how strongly the adapter's own
        r directions read safety inputs, relative to task inputs. A direction that K_s and K_t share is kept by the
        factor 1/(1 + λγ).
    solver, iterations, residual, jitter: how A' was found, see :class:`safelora.filter.solve.Solution`.
    held_out: (safety_kept, task_kept, task_change) on examples that a second filter, made for this purpose, did not
        see; of some modules.
    """

    name: str
    kind: str
    rank: int
    shape: tuple[int, int]
    decision: str
    reason: str | None = None
    norm_ratio: float | None = None
    safety_kept: float | None = None
    task_kept: float | None = None
    task_change: float | None = None
    gammas: tuple[float, float, float] | None = None
    solver: str | None = None
    iterations: int | None = None
    residual: float | None = None
    jitter: float | None = None
    held_out: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class FilterReport(Report):
    """The outcome of :func:`safelora.filter_adapter`; also written as safelora_filter.json beside the adapter.

    separability: what is left of the update on held-out safety and task inputs, as medians over a sample of modules,
        and their ratio `selectivity`: 1 where the filter cannot tell the two apart, near 0 where it does.
    seconds: wall and processor time of the parts of the work.
    """

    mark = FILTERED
    modules: list[FilteredModule]
    separability: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dataclasses.InitVar[Changes | None] = None

    def __post_init__(self, changes: Changes | None) -> None:
        object.__setattr__(self, "_changes", changes)

    @property
    def filtered(self) -> list[FilteredModule]:
        """The modules whose lora_A was replaced (would be, in a dry run)."""
        return self.changed

    def undo(self, *, force: bool = False) -> None:
        """Give every changed lora_A of a model in memory its former bits again; nothing happens a second time.

        Raises SafeLoraError for a filter on disk, and when a factor has changed since, by training or loading, unless
        `force`: its later changes would be lost.
        """
        changes: Changes | None = getattr(self, "_changes", None)
        if changes is not None:
            changes.undo(force)
        elif self.output is not None:
            raise SafeLoraError(f"nothing in memory was changed; the input of {self.output} is what it was.")

    def median(self, value: Callable[[FilteredModule], float | None]) -> float | None:
        """The median of `value` over the filtered modules that have it."""
        found = [v for module in self.filtered if (v := value(module)) is not None]
        return statistics.median(found) if found else None

    def summary(self) -> str:
        """One or two sentences for a person."""
        done = "would filter" if self.dry_run else "filtered"
        text = f"The input filter {done} {len(self.filtered)} of {len(self.modules)} modules"
        medians = [
            (label, self.median(value))
            for label, value in (("safety", lambda m: m.safety_kept), ("task", lambda m: m.task_kept))
        ]
        kept = [f"{value:.0%} on {label} inputs" for label, value in medians if value is not None]
        if kept:
            text += f"; of the update it leaves {' and '.join(kept)} (medians)"
        return f"{text}." + (f" Written to {self.output}." if self.output else "")

    def mention(self) -> Mention:
        values = {
            "filtered": len(self.filtered),
            "modules": len(self.modules),
            **{key: self.options[key] for key in ("weight", "strength", "ridge", "jitter", "unseen")},
            **{f"{side}_examples": self.inputs[side]["examples"] for side in ("safety", "task")},
        }
        text = (
            f"`lora_A` of {len(self.filtered)} of {len(self.modules)} modules was filtered (safelora-kernels): the "
            "update is damped on inputs like those of safety prompts, and kept on inputs like the task's. "
            f"`{self.mark.report}` has the details. Do not filter it again."
        )
        return Mention(values, "Input filter", text, self.inputs["model"]["source"])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        content = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        content["modules"] = [dataclasses.asdict(module) for module in self.modules]
        return {"format": "safelora-filter/1", "num_filtered": len(self.filtered), **content}

    @staticmethod
    def _module(entry: dict[str, Any]) -> FilteredModule:
        tuples = {key: tuple(entry[key]) for key in ("shape", "gammas", "held_out") if entry[key] is not None}
        return FilteredModule(**{**entry, **tuples})

    def table(self) -> rich.table.Table:
        """A rich table with one row per module."""
        from rich.table import Table

        table = Table(title=self.summary(), caption="\n".join(self.warnings) or None, title_justify="left")
        for heading in COLUMNS[:2]:
            table.add_column(heading, overflow="fold")
        for heading in COLUMNS[2:-1]:
            table.add_column(heading, justify="right")
        table.add_column(COLUMNS[-1])
        for module in self.modules:
            note = f" ({module.reason})" if module.reason else ""
            table.add_row(module.name, str(module.rank), *cells(module), module.decision + note)
        return table

    def page(self) -> str:
        from .page import render

        return render(self)

    def plot(self) -> Figure:
        """Layers × module kinds, coloured by what is left of the update on safety and on task inputs.

        Raises RuntimeError when matplotlib is not installed.
        """
        return self.heat_map(
            [
                ("left of the update on safety inputs", lambda module: module.safety_kept),
                ("left of the update on task inputs", lambda module: module.task_kept),
            ],
            f"{len(self.filtered)} of {len(self.modules)} modules filtered",
        )


COLUMNS = ("module", "rank", "‖A'‖/‖A‖", "safety kept", "task kept", "task change", "γ median", "solver", "decision")


def cells(module: FilteredModule) -> list[str]:
    """The numbers of a module in the order of the columns."""
    how = "–" if module.solver is None else module.solver + (f", {module.iterations}" if module.iterations else "")
    return [
        number(module.norm_ratio, ".3f"),
        number(module.safety_kept, ".3f"),
        number(module.task_kept, ".3f"),
        number(module.task_change, ".3f"),
        number(module.gammas[1] if module.gammas else None, ".3g"),
        how,
    ]
