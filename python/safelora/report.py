"""What a projection did: the numbers per module, the options and inputs, as JSON, a table, a page or a picture."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .adapter import PROJECTED, Mark, natural_key
from .card import Mention, write_mention
from .checkpoint import read_json
from .errors import SafeLoraError

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure
    from typing_extensions import Self

_T = TypeVar("_T")
SUFFIXES = (".json", ".html", ".png")
COSINE_ERROR = 1e-5
_LAYER_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module, one expert of a mixture, or one tensor that was tuned in full.

    kind: "linear", "conv", "embedding", "expert" or "part" (of a fused module) for an update B·A; "full", "bias" or
        "tokens" for a full update ΔW = W_ft − W_aligned, which then stands for B·A in what follows ("expert" too in a
        report of a whole model).
    cosine: between the update B·A and its projection C·B·A, in [0, 1]; None where V = 0.
    margin: signed distance of the cosine from the decision boundary (negative: projected, positive: kept). With
        num_layers it is taken to the nearest cosine on the other side of the cut. None without such a boundary.
    near_threshold: the margin is within the numerical error of the cosine, so the decision could go either way.
    shrinkage: ‖C·B‖_F / ‖B‖_F. v_norm: ‖V‖_F, V = aligned − base.
    decision: "projected", "kept" (measured, left as it is) or "skipped" (not measured); reason says why where it is
        not the cosine that decided.
    """

    name: str
    kind: str
    rank: int
    shape: tuple[int, int]
    base_tensor: str | None
    aligned_tensor: str | None
    matched: str | None
    decision: str
    cosine: float | None = None
    margin: float | None = None
    near_threshold: bool = False
    shrinkage: float | None = None
    v_norm: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Report(ABC):
    """What the reports of all methods have in common: files, and the layers as rows and columns."""

    mark: ClassVar[Mark]
    modules: list[Any]
    options: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    output: str | None = None
    dry_run: bool = False
    passed_through: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def changed(self) -> list[Any]:
        """The modules that were changed (would be, in a dry run)."""
        return [module for module in self.modules if module.decision == self.mark.done]

    @abstractmethod
    def mention(self) -> Mention:
        """What the model card says."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""

    @abstractmethod
    def summary(self) -> str:
        """One or two sentences for a person."""

    @abstractmethod
    def table(self) -> rich.table.Table:
        """A rich table with one row per module."""

    @abstractmethod
    def page(self) -> str:
        """The report as one self-contained HTML page."""

    @abstractmethod
    def plot(self) -> Figure:
        """The per-layer picture as a matplotlib figure. Raises RuntimeError when matplotlib is not installed."""

    @staticmethod
    @abstractmethod
    def _module(entry: dict[str, Any]) -> Any:
        """The module that an entry of the JSON file stands for."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report written by :meth:`save` or beside an output (a file, or the directory that holds it).

        Raises SafeLoraError when the file is not such a report.
        """
        return read_report(cls, path, cls.mark.report, f"the report of {cls.mark.doing.lower()}", cls._module)

    def to_json(self) -> str:
        """The report as indented JSON (strict: no NaN)."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write .json, .html or .png by suffix; into an adapter directory that PEFT has saved, the report and the
        mark in its model card, by which it is known as changed.

        Raises SafeLoraError for any other suffix.
        """
        if Path(path).is_dir():
            self.save_json(Path(path) / self.mark.report)
            if self.changed and not self.dry_run:
                write_mention(Path(path) / "README.md", self.mark.key, self.mention())
            return
        writers = {".json": self.save_json, ".html": self.save_html, ".png": self.save_png}
        suffix = Path(path).suffix.lower()
        if suffix not in writers:
            raise SafeLoraError(f"cannot tell the format of report {os.fspath(path)}: end it in {', '.join(SUFFIXES)}.")
        place = Path(os.path.realpath(path))
        partial = place.with_name(f".{place.name[:100]}.{os.getpid()}{suffix}")
        try:
            writers[suffix](partial)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page: summary, per-layer picture, table, inputs. Needs no other package."""
        Path(path).write_text(self.page(), encoding="utf-8", errors="replace")  # paths may hold any bytes

    def save_png(self, path: str | os.PathLike[str]) -> None:
        """Write the per-layer picture. Needs matplotlib."""
        self.plot().savefig(path, format="png", dpi=150, bbox_inches="tight")

    def heat_map(
        self,
        panels: Sequence[tuple[str, Callable[[Any], float | None]]],
        title: str,
        framed: Callable[[Any], bool] | None = None,
    ) -> Figure:
        """Layers × module kinds, a panel for each (label, value of a module), as a matplotlib figure."""
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise RuntimeError(
                "the picture needs matplotlib, which is not installed: pip install matplotlib, or ask for .html."
            ) from error
        rows, columns, cells = self.grid()
        figure = Figure(figsize=((2.5 + 0.9 * len(columns)) * len(panels), 1.6 + 0.28 * len(rows)))
        FigureCanvasAgg(figure)
        for index, (label, value) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            found = {place: value(module) for place, module in cells.items()}
            numbers = [[found.get((row, column)) for column in columns] for row in rows]
            shown = [[float("nan") if number is None else number for number in line] for line in numbers]
            image = axes.imshow(shown, aspect="auto", cmap="viridis", interpolation="nearest")
            for (row, column), module in cells.items():
                x, y = columns.index(column), rows.index(row)
                if framed is not None and framed(module):
                    frame = Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=1.6)
                    axes.add_patch(frame)
                elif found[row, column] is None:
                    axes.text(x, y, "–", ha="center", va="center")
            axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylabel("layer")
            figure.colorbar(image, ax=axes, label=label)
            if not index:
                axes.set_title(title, fontsize=10)
        return figure

    def grid(self) -> tuple[list[str], list[str], dict[tuple[str, str], Any]]:
        """Rows (layers), columns (module kinds) and the module in each cell.

        The row of a module is its name up to and including the last index ("model.layers.3"), shortened to the index
        where that is unambiguous; the column is the rest of its name.
        """
        places = {}
        for module in self.modules:
            found = list(_LAYER_INDEX.finditer(module.name))
            cut = found[-1].end(1) if found else 0
            places[module.name] = (module.name[:cut], module.name[cut:].lstrip("."))
        stems = {row.rpartition(".")[0] for row, _ in places.values() if row}
        if len(stems) == 1:
            places = {name: (row.rpartition(".")[2], column) for name, (row, column) in places.items()}
        cells = {(places[module.name][0] or "–", places[module.name][1]): module for module in self.modules}
        rows = sorted({row for row, _ in cells}, key=natural_key)
        columns = list(dict.fromkeys(column for _, column in cells))
        return rows, columns, cells


@dataclass(frozen=True)
class SafeLoraReport(Report):
    """The outcome of :func:`safelora.project_adapter`; also written as safelora_report.json beside the adapter.

    pdst is the authors' diagnostic: the mean over the measured modules of 1/(1 + ‖B_final − C·B‖_F). serving says what
    vLLM and llama.cpp do not take of the adapter as PEFT means it (:func:`safelora.serving_notes`).
    """

    mark = PROJECTED
    modules: list[ModuleReport]
    pdst: float | None = None
    serving: list[str] = field(default_factory=list)

    @property
    def projected(self) -> list[ModuleReport]:
        """The modules whose lora_B was replaced (would be, in a dry run)."""
        return self.changed

    @property
    def near_threshold(self) -> list[ModuleReport]:
        """The modules whose decision lies within the numerical error of the cosine."""
        return [module for module in self.modules if module.near_threshold]

    def summary(self) -> str:
        """One or two sentences for a person."""
        done = "would project" if self.dry_run else "projected"
        text = f"Safe LoRA {done} {len(self.projected)} of {len(self.modules)} modules"
        cosines = [module.cosine for module in self.modules if module.cosine is not None]
        if cosines:
            text += f"; cosines {min(cosines):.5f} to {max(cosines):.5f}"
        if self.near_threshold:
            text += f"; {len(self.near_threshold)} within {COSINE_ERROR:g} of the cut"
        return f"{text}." + (f" Written to {self.output}." if self.output else "")

    def mention(self) -> Mention:
        values = {
            "projected": len(self.projected),
            "modules": len(self.modules),
            "base": self.inputs["base"]["source"],
            "aligned": self.inputs["aligned"]["source"],
            **{key: self.options[key] for key in ("threshold", "num_layers", "rule", "normalize")},
        }
        whole = "model" in self.inputs
        what = "The weight" if whole else "`lora_B`"
        count = f"{len(self.projected)} of {len(self.modules)}"
        text = (
            f"{what} of {count} modules was projected onto the alignment subspace (Safe LoRA, arXiv 2405.16833). "
            f"`{self.mark.report}` has the details. Do not project it again."
        )
        return Mention(values, "Safe LoRA", text, values["aligned"], "finetune" if whole else "adapter")

    def page(self) -> str:
        from .page import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        content = dataclasses.asdict(self)
        return {"format": "safelora-report/1", "num_projected": len(self.projected), **content}

    @staticmethod
    def _module(entry: dict[str, Any]) -> ModuleReport:
        return ModuleReport(**{**entry, "shape": tuple(entry["shape"])})

    def table(self) -> rich.table.Table:
        """A rich table with one row per module."""
        from rich.table import Table

        table = Table(title=self.summary(), caption="\n".join(self.warnings) or None, title_justify="left")
        for heading in ("module", "rank"):
            table.add_column(heading, overflow="fold")
        for heading in ("cosine", "margin", "‖CB‖/‖B‖", "‖V‖"):
            table.add_column(heading, justify="right")
        table.add_column("decision")
        for module in self.modules:
            note = module.reason or ("within the numerical error of the cut" if module.near_threshold else "")
            table.add_row(
                module.name, str(module.rank), number(module.cosine, ".5f"), number(module.margin, "+.5f"),
                number(module.shrinkage, ".3e"), number(module.v_norm, ".4g"),
                module.decision + (f" ({note})" if note else ""),
                style="bold" if module.decision == "projected" else None,
            )  # fmt: skip
        return table

    def plot(self) -> Figure:
        """Layers × module kinds coloured by cosine, projected modules framed, as a matplotlib figure.

        Raises RuntimeError when matplotlib is not installed.
        """
        return self.heat_map(
            [("cosine of the update and its projection", lambda module: module.cosine)],
            f"{len(self.projected)} of {len(self.modules)} modules projected (framed)",
            lambda module: module.decision == "projected",
        )


def read_report(
    kind: type[_T], path: str | os.PathLike[str], file: str, what: str, module: Callable[[dict[str, Any]], Any]
) -> _T:
    """The report, a dataclass, in the JSON file at `path`, or in `file` where that is a directory.

    module: makes a module of an entry of the file. Raises SafeLoraError when it is not such a report.
    """
    place = Path(path)
    content, _ = read_json(place / file if place.is_dir() else place, what)
    names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    try:
        content["modules"] = [module(entry) for entry in content["modules"]]
        return kind(**{key: value for key, value in content.items() if key in names})
    except (KeyError, TypeError) as error:
        raise SafeLoraError(f"{place} is not {what}: {error}.") from error


def number(value: float | None, spec: str) -> str:
    """`value` in a format, a dash for None."""
    return "–" if value is None else format(value, spec)
