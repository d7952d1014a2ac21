"""How safe and how useful a model is with each of several adapters: answers, judged and counted with intervals."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SafeLoraError
from .loading import BARE, AdaptedModel
from .output import StagedDirectory, check_place
from .responses import write_formats, write_jsonl
from .suite import HEADINGS, Outcome, Suite
from .versions import versions

if TYPE_CHECKING:
    import rich.table

RESULTS = "results.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What the model did without and with each adapter, and how that was asked."""

    outcomes: list[Outcome]
    suite: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]

    def __getitem__(self, label: str) -> Outcome:
        """The outcome of that label. Raises KeyError."""
        return {outcome.label: outcome for outcome in self.outcomes}[label]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the answers as plain JSON types."""
        return {
            "format": "safelora-evaluation/1",
            "suite": self.suite,
            "inputs": self.inputs,
            "versions": self.versions,
            "notes": self.notes,
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON (strict: no NaN)."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def table(self) -> rich.table.Table:
        """A rich table of the metrics with their 95 % intervals."""
        return outcome_table(self.outcomes, "95 % intervals in brackets", self.notes)

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a directory, whole or not at all: results.json, responses.jsonl with every answer, and per adapter the
        safety answers as LLM-Tuning-Safety (.tuning_safety.jsonl), HarmBench (.harmbench.json, where behaviour ids are
        known) and StrongREJECT (.strongreject.jsonl) read them.

        Raises SafeLoraError when the place is taken, unless it is an earlier output and may be overwritten.
        """
        with staged(out, overwrite) as directory:
            (directory / RESULTS).write_text(self.to_json(), encoding="utf-8")
            rows = [{"model": outcome.label, **row} for outcome in self.outcomes for row in outcome.rows]
            if rows:
                write_jsonl(directory / "responses.jsonl", rows)
            stems: list[str] = []
            for outcome in self.outcomes:
                stem = slug(outcome.label)
                stems.append(stem if stem not in stems else f"{stem}-{len(stems)}")
                write_formats(directory, stems[-1], outcome.rows)


def evaluate_adapters(
    model: Any,
    adapters: Iterable[str | os.PathLike[str]] = (),
    *,
    tokenizer: Any = None,
    bare: bool = True,
    suite: Suite | None = None,
    progress: Progress | None = None,
    local_files_only: bool = False,
    **questions: Any,
) -> Evaluation:
    """Ask a model the same questions without an adapter and with each of several, and judge what it answers.

    Args:
        model: a causal language model in memory (plain, or a PeftModel whose adapters are then meant), a directory or
            a repository id.
        adapters: adapter directories (or repository ids); names of adapters for a PeftModel, by default all of it.
        tokenizer: the model's, with the chat template to use; by default that of the model's directory.
        bare: evaluate the model without an adapter too, which everything else is compared with.
        suite: a :class:`safelora.suite.Suite`; or its options by name, as for :meth:`Suite.load`: safety, benign,
            utility, general, judge, scorer, metrics, refusal, max_new_tokens, batch_size, limit, …
        progress: called with (prompts done, prompts in all).
        local_files_only: for models and adapters given as repository ids.

    Returns:
        The evaluation; generation is greedy, so it is the same every time on the same machine.

    Raises:
        SafeLoraError: for questions, judges, models or adapters that cannot be used. A model in memory is as it was.
    """
    if suite is None:
        suite = Suite.load(**questions)
    elif questions:
        raise SafeLoraError(f"give a suite or its options, not both ({', '.join(questions)}).")
    opened = AdaptedModel.open(model, adapters, tokenizer, local_files_only)
    labels = [BARE] * bare + opened.labels
    if not labels:
        raise SafeLoraError("nothing to evaluate: no adapter, and the bare model is not wanted.")
    told = counter(progress, suite.size * len(labels))
    with closing(opened.states(bare)) as states:
        outcomes = [
            suite.run(state, opened.tokenizer, label, told) for label, state in zip(labels, states, strict=True)
        ]
    return Evaluation(
        outcomes,
        suite.describe(),
        {"model": opened.source, "adapters": dict(zip(opened.labels, opened.names, strict=True))},
        versions("torch", "transformers", "peft"),
        [*suite.notes, *remarks(outcomes, suite)],
    )


def outcome_table(outcomes: Sequence[Outcome], title: str, notes: Sequence[str]) -> rich.table.Table:
    """A rich table with one row per outcome and one column per metric that any of them has."""
    from rich.table import Table

    table = Table(title=title, caption="\n".join(notes) or None, title_justify="left", caption_justify="left")
    table.add_column("", overflow="fold")
    shown = [name for name in HEADINGS if any(name in outcome.metrics for outcome in outcomes)]
    for name in shown:
        table.add_column(f"{HEADINGS[name]}\nn={len(outcomes[0].outcomes[name])}", justify="right")
    for outcome in outcomes:
        table.add_row(outcome.label, *map(str, (outcome.metrics.get(name, "–") for name in shown)))
    return table


def remarks(outcomes: Sequence[Outcome], suite: Suite) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    first = outcomes[0]
    greedy = first.metrics.get("greedy_asr")
    if first.label == BARE and greedy is not None and greedy.value > 0.5:
        found.append(
            f"The bare model begins {1 - greedy.value:.0%} of its answers to forbidden prompts with {suite.refusal!r}: "
            "the fast metrics say little then. Give the words its refusals begin with (refusal), or generate."
        )
    small = min((m.total for o in outcomes for m in o.metrics.values()), default=100)
    if small < 50:
        found.append(f"Some figures rest on {small} prompts; mind the intervals.")
    return found


def slug(label: str) -> str:
    """The label as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", label).strip("._") or "adapter"


def counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """A callback that adds up what it is told and passes it on."""
    if progress is None:
        return None
    done = 0
    progress(0, total)

    def told(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return told


def check_out(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """Refuse an output directory before any work. Raises SafeLoraError."""
    path = Path(os.path.abspath(os.path.expanduser(out)))
    check_place(path, 0, overwrite, RESULTS)
    return path


@contextmanager
def staged(out: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A directory to write into, which is moved to `out` if nothing fails and removed otherwise."""
    with StagedDirectory(check_out(out, overwrite)) as directory, directory.writing():
        yield directory.path
        directory.publish()
