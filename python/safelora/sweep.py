"""How many modules each threshold would project, from the cosines of one measurement."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import SafeLoraError

if TYPE_CHECKING:
    import rich.table

    from .report import SafeLoraReport

DEFAULT_THRESHOLDS = tuple(step / 20 for step in range(1, 21))


@dataclass(frozen=True)
class SweepRow:
    """One threshold: how many modules it selects, and how many lie within the numerical error of it."""

    threshold: float
    selected: int
    undecided: int


@dataclass(frozen=True)
class Sweep:
    """The measured modules by rising cosine, and a row per threshold.

    To project exactly K modules take ``num_layers=K``; ``cosines[K - 1][1]`` is the smallest threshold that selects as
    many.
    """

    rows: list[SweepRow]
    cosines: list[tuple[str, float]]
    rule: str

    def to_dict(self) -> dict[str, Any]:
        """The sweep as plain JSON types."""
        return {"format": "safelora-sweep/1", **asdict(self)}

    def table(self) -> rich.table.Table:
        """A rich table with one line per threshold and a bar for the share of the modules."""
        from rich.table import Table

        table = Table(title=f"{len(self.cosines)} modules measured", title_justify="left")
        for heading in ("threshold", "modules", "share", "undecided"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for row in self.rows:
            share = row.selected / len(self.cosines)
            table.add_row(
                f"{row.threshold:.4g}", str(row.selected), f"{share:.0%}", str(row.undecided or "–"),
                "█" * round(30 * share),
            )  # fmt: skip
        return table


def sweep_thresholds(
    report: SafeLoraReport | str | os.PathLike[str],
    thresholds: Sequence[float] | None = None,
    *,
    rule: Literal["strict", "authors"] = "strict",
) -> Sweep:
    """Count, for every threshold, the modules that :func:`safelora.project_adapter` would project.

    Args:
        report: what a projection or dry run returned, or where it was saved. Its own threshold does not matter.
        thresholds: cosines in [0, 1]; by default 0.05, 0.10, …, 1.00.
        rule: "strict" or "authors", as in project_adapter.

    Raises:
        SafeLoraError: for a threshold outside [0, 1], or a report without a measured module.
    """
    import torch

    import safelora_kernels as sk

    from .report import COSINE_ERROR, SafeLoraReport

    if not isinstance(report, SafeLoraReport):
        report = SafeLoraReport.load(report)
    chosen = sorted(set(DEFAULT_THRESHOLDS if thresholds is None else thresholds))
    for threshold in chosen:
        if not (math.isfinite(threshold) and 0 <= threshold <= 1):
            raise SafeLoraError(f"threshold {threshold} is no cosine: expected a number from 0 to 1.")
    measured = [(module.name, module.cosine) for module in report.modules if module.cosine is not None]
    if not measured:
        raise SafeLoraError("the report holds no measured module, so there is nothing to sweep.")
    measured.sort(key=lambda entry: entry[1])
    cosines = torch.tensor([cosine for _, cosine in measured], dtype=torch.float64)
    rows = [
        SweepRow(
            threshold,
            int(sk.select_layers(cosines, threshold=threshold, rule=rule).sum()),
            int(((cosines - threshold).abs() <= COSINE_ERROR).sum()),
        )
        for threshold in chosen
    ]
    return Sweep(rows, measured, rule)
