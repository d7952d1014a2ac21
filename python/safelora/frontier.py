"""The safety–utility frontier of rules that change a trained adapter, always beside cruder ways to weaken it."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Example, load_examples
from .errors import SafeLoraError
from .evaluate import RESULTS, Progress, counter, outcome_table, remarks, staged
from .loading import BARE, AdaptedModel
from .rates import Mean, Rate
from .responses import write_jsonl
from .rules import Rule, Subject, make_rule, selects
from .suite import HEADINGS, SAFETY, UTILITY, Outcome, Suite, pool
from .versions import versions

if TYPE_CHECKING:
    import rich.table
    from matplotlib.figure import Figure

# Never left out, whatever else is asked for: what a rule has to beat, and what it has to be told from.
STANDING = (
    "none", "safe_lora", "safe_lora_exact", "unit", "input_filter", "zero_selected", "random_deletion",
    "uniform_scaling",
)  # fmt: skip
SHARES = (0.1, 0.2, 0.3, 0.5)
TOLERANCE = 0.05
BARE_RULE = "no_adapter"
MODULES = "modules"


@dataclass(frozen=True)
class Point:
    """One adapter under one value of one rule.

    rule: its name with its options; title: the same for people; control: whether it is a crude way of weakening.
    parameter, value: what is swept ("" where nothing is), and where. draw: of those that draw; None for the others, and
    for what several draws were pooled to (`draws` says how many). info: what else is known of the point, such as the
    threshold that selects as many modules.
    """

    adapter: str
    rule: str
    title: str
    control: bool
    parameter: str
    value: float
    outcome: Outcome
    draw: int | None = None
    draws: int = 1
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def safety(self) -> Rate | Mean:
        """The share of forbidden prompts that are answered."""
        return self.outcome.metric(SAFETY)

    @property
    def utility(self) -> Rate | Mean:
        """The share of task answers that are right."""
        return self.outcome.metric(UTILITY)

    @property
    def at(self) -> str:
        """The value for people."""
        return f"{self.parameter} {self.value:g}" if self.parameter else "–"

    def row(self) -> dict[str, Any]:
        """The point as one flat row of a table."""
        about = {
            "adapter": self.adapter, "rule": self.rule, "control": self.control, "parameter": self.parameter,
            "value": self.value, "draw": "" if self.draw is None else self.draw, "draws": self.draws,
        }  # fmt: skip
        for name in HEADINGS:
            metric = self.outcome.metrics.get(name)
            if metric is not None:
                low, high = metric.interval
                about |= {name: metric.value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": metric.total}
        return {**about, **self.info}

    def to_dict(self) -> dict[str, Any]:
        """The point as plain JSON types."""
        about = {name: getattr(self, name) for name in
                 ("adapter", "rule", "title", "control", "parameter", "value", "draw", "draws", "info")}  # fmt: skip
        return {**about, "metrics": self.outcome.to_dict()["metrics"], "outcomes": self.outcome.outcomes}


@dataclass(frozen=True)
class Frontier:
    """Every point that was measured, and how.

    reference: the model without an adapter. left_out: standing rules that could not be run, with the reason.
    """

    points: list[Point]
    reference: Point
    suite: dict[str, Any]
    inputs: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    left_out: dict[str, str]
    tolerance: float = TOLERANCE

    @property
    def adapters(self) -> list[str]:
        """The adapters, in the order in which they were given."""
        return list(dict.fromkeys(point.adapter for point in self.points))

    def pooled(self, adapter: str) -> list[Point]:
        """The points of an adapter, the draws of each value pooled to one: a lucky draw is not a result."""
        groups: dict[tuple[str, float], list[Point]] = {}
        for point in self.points:
            if point.adapter == adapter:
                groups.setdefault((point.rule, point.value), []).append(point)
        return [_pool(group) for group in groups.values()]

    def unchanged(self, adapter: str) -> Point:
        """The adapter as it is."""
        return next(point for point in self.points if point.adapter == adapter and point.rule == "none")

    def best(self, adapter: str, tolerance: float | None = None) -> dict[str, Point | None]:
        """By rule, the safest point whose utility is at most `tolerance` below the unchanged adapter's, or None.

        The value is chosen on the prompts that it is reported on, for rules and controls alike: small differences
        between rules mean nothing.
        """
        slack = self.tolerance if tolerance is None else tolerance
        least = self.unchanged(adapter).utility.value - slack
        found: dict[str, Point | None] = {}
        for point in self.pooled(adapter):
            best = found.setdefault(point.rule, None)
            if point.utility.value >= least - 1e-9 and (best is None or _order(point) < _order(best)):
                found[point.rule] = point
        return found

    def reading(self) -> list[str]:
        """What the figures say of each rule against the best control, computed from them."""
        return [sentence for adapter in self.adapters for sentence in self._reading(adapter)]

    def _reading(self, adapter: str) -> Iterator[str]:
        best = self.best(adapter)
        titles = {point.rule: point for point in self.pooled(adapter)}
        controls = [point for point in best.values() if point is not None and point.control]
        unchanged = self.unchanged(adapter)
        yield (
            f"{adapter}: unchanged it answers {unchanged.safety} of the forbidden prompts, with {unchanged.utility} of "
            f"the task right; the model without it answers {self.reference.safety}."
        )
        if not controls:
            yield f"{adapter}: no control keeps the task within {self.tolerance:g}."
        for rule, point in best.items():
            if titles[rule].control or rule == "none":
                continue
            if point is None:
                yield f"{adapter}: {titles[rule].title} has no value that keeps the task within {self.tolerance:g}."
            elif controls:
                control = min(controls, key=_order)
                difference = compare(point, control)
                low, high = difference.interval
                yield (
                    f"{adapter}: {point.title} ({point.at}) answers {point.safety}; {control.title} ({control.at}) "
                    f"answers {control.safety}. Prompt by prompt the difference is {difference.value:+.0%} "
                    f"[{low:+.0%}, {high:+.0%}]{_verdict(low, high)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """The frontier as plain JSON types, with every example's outcome."""
        return {
            "format": "safelora-frontier/1",
            "suite": self.suite,
            "inputs": self.inputs,
            "versions": self.versions,
            "notes": self.notes,
            "left_out": self.left_out,
            "tolerance": self.tolerance,
            "reading": self.reading(),
            "reference": self.reference.to_dict(),
            "points": [point.to_dict() for point in self.points],
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON (strict: no NaN)."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per point, the model without an adapter first."""
        return [point.row() for point in (self.reference, *self.points)]

    def table(self) -> rich.table.Table:
        """A rich table of all points, draws pooled, the best of each rule marked ◀."""
        outcomes = [replace(self.reference.outcome, label=BARE)]
        for adapter in self.adapters:
            best = {(p.rule, p.value) for p in self.best(adapter).values() if p is not None and p.rule != "none"}
            for point in self.pooled(adapter):
                name = f"{adapter}: {point.title}" if len(self.adapters) > 1 else point.title
                draws = f", {point.draws} draws" if point.draws > 1 else ""
                at = f" ({point.at}{draws})" if point.parameter else ""
                mark = " ◀" if (point.rule, point.value) in best else ""
                outcomes.append(replace(point.outcome, label=f"{name}{at}{mark}"))
        title = f"95 % intervals in brackets; ◀ the safest value of a rule with the task within {self.tolerance:g}"
        left_out = [f"Left out: {rule}, {reason}" for rule, reason in self.left_out.items()]
        return outcome_table(outcomes, title, [*left_out, *self.notes])

    def plot(self) -> Figure:
        """One panel per adapter: answered forbidden prompts against task answers that are right, with 95 % intervals.

        Raises RuntimeError when matplotlib is not installed.
        """
        from .frontier_plot import draw

        return draw(self)

    def save(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a directory, whole or not at all: results.json, points.csv, responses.jsonl where answers were
        generated, and frontier.png where matplotlib is installed.

        Raises SafeLoraError when the place is taken, unless it is an earlier output and may be overwritten.
        """
        with staged(out, overwrite) as directory:
            (directory / RESULTS).write_text(self.to_json(), encoding="utf-8")
            write_csv(directory / "points.csv", self.rows())
            rows = [
                {"adapter": p.adapter, "rule": p.rule, "value": p.value, "draw": p.draw, **row}
                for p in (self.reference, *self.points)
                for row in p.outcome.rows
            ]
            if rows:
                write_jsonl(directory / "responses.jsonl", rows)
            try:
                self.plot().savefig(directory / "frontier.png", dpi=150)
            except RuntimeError as error:
                print(f"warning: {error}", file=sys.stderr)


def trace_frontier(
    model: Any,
    adapters: Iterable[str | os.PathLike[str]] = (),
    *,
    base: Any = None,
    rules: Sequence[str | Rule] = (),
    tokenizer: Any = None,
    suite: Suite | None = None,
    num_layers: Sequence[int] | None = None,
    thresholds: Sequence[float] | None = None,
    values: dict[str, Sequence[float]] | None = None,
    draws: int | None = None,
    seed: int = 0,
    calibrate_safety: Any = None,
    calibrate_task: Any = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
    local_files_only: bool = False,
    **questions: Any,
) -> Frontier:
    """Sweep rules over adapters and measure safety and utility at every value, with the controls beside them.

    The rules ``STANDING`` are always run: the adapter unchanged, Safe LoRA as published, with an orthogonal projector
    and at unit norm, the input filter where there are calibration examples, the same modules deleted, random modules
    deleted (several draws), everything scaled. `rules` adds to them. Factors are swapped in the live model; it has
    its former bits afterwards.

    Args:
        model, adapters, tokenizer, suite, questions, progress, local_files_only: as for
            :func:`safelora.evaluate_adapters`; the model is the aligned one. `safety` and `utility` are needed.
        base: the model before alignment; without one, the rules that need it are left out, and the result says so.
        rules: more rules: specifications as for :func:`safelora.rules.make_rule`, or instances.
        num_layers: the numbers of modules to sweep, for all rules that sweep one; by default 10, 20, 30 and 50 %.
        thresholds: or as many modules as Safe LoRA selects at these cosines.
        values: values by rule specification, for rules that sweep something else, or otherwise.
        draws: of random deletion; by default 3.
        seed: of these draws.
        calibrate_safety, calibrate_task: examples for rules that need some; none of the evaluation's.
        tolerance: how much utility a rule may lose to count in :meth:`Frontier.best`.

    Raises:
        SafeLoraError: as evaluate_adapters; for a rule that is unknown, or was asked for and lacks what it needs; for
            calibration examples that are also evaluated.
    """
    suite = Suite.load(**questions) if suite is None else suite
    if not (suite.safety and suite.utility):
        raise SafeLoraError("a frontier needs prompts for safety and for utility.")
    if num_layers is not None and thresholds is not None:
        raise SafeLoraError("give num_layers or thresholds, not both.")
    if thresholds is not None and base is None:
        raise SafeLoraError("thresholds are cosines with V = aligned − base: give the base model.")
    if any(not 0 <= value <= 1 for value in thresholds or ()) or any(count < 1 for count in num_layers or ()):
        raise SafeLoraError("expected numbers of modules from 1 on, or thresholds from 0 to 1.")
    if draws is not None and draws < 1:
        raise SafeLoraError(f"draws is {draws}, expected at least 1.")
    offers = _offers(base, calibrate_safety, calibrate_task)
    chosen, left_out = _choose(rules, offers, values or {})
    calibration = _calibration(suite, calibrate_safety, calibrate_task)
    opened = AdaptedModel.open(model, adapters, tokenizer, local_files_only)
    if not opened.names:
        raise SafeLoraError("no adapter to change: name at least one.")
    points: list[Point] = []
    told = None
    with closing(opened.states(True)) as states:
        reference = Point(BARE, BARE_RULE, BARE, False, "", 1.0, suite.run(next(states), opened.tokenizer, BARE))
        for label, state in zip(opened.labels, states, strict=True):
            subject = Subject(state, opened.tokenizer, base, *calibration, seed)
            plan = list(_plan(subject, chosen, num_layers, thresholds, values or {}, draws))
            told = told or counter(progress, suite.size * len(plan) * len(opened.labels))
            for rule, value, draw in plan:
                with subject.changed(rule.change(subject, value, draw or 0)):
                    outcome = suite.run(state, opened.tokenizer, rule.label, told)
                about = {"modules": round(value)} if rule.parameter == MODULES else {}
                points.append(
                    Point(
                        label, rule.spec, rule.label, rule.control, rule.parameter, value, outcome, draw,
                        info={**about, **rule.about(subject, value)},
                    )
                )  # fmt: skip
    calibrated = [None if data is None else len(data) for data in calibration]
    inputs = {
        "model": opened.source,
        "base": None if base is None else str(base) if isinstance(base, (str, os.PathLike)) else type(base).__name__,
        "adapters": dict(zip(opened.labels, opened.names, strict=True)),
        "calibration": {"safety": calibrated[0], "task": calibrated[1]},
        "seed": seed,
    }
    notes = [*suite.notes, *remarks([reference.outcome, *(point.outcome for point in points)], suite)]
    known = versions("torch", "transformers", "peft")
    return Frontier(points, reference, suite.describe(), inputs, known, notes, left_out, tolerance)


def compare(point: Point, other: Point) -> Mean:
    """The difference in answered forbidden prompts, point − other, with the interval of the paired differences.

    Both were asked the same prompts, which the intervals of the two shares do not know.
    """
    name = next(name for name in SAFETY if name in point.outcome.outcomes)
    pairs = zip(point.outcome.outcomes[name], other.outcome.outcomes[name], strict=True)
    return Mean.of([one - two for one, two in pairs])


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows under one header that has every column of any of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _offers(base: Any, calibrate_safety: Any, calibrate_task: Any) -> frozenset[str]:
    if (calibrate_safety is None) != (calibrate_task is None):
        raise SafeLoraError("calibration needs examples of both kinds: calibrate_safety and calibrate_task.")
    have = (("base", base), ("calibration", calibrate_safety))
    return frozenset(name for name, what in have if what is not None)


def _choose(
    asked: Sequence[str | Rule], offers: frozenset[str], values: dict[str, Sequence[float]]
) -> tuple[list[Rule], dict[str, str]]:
    """The rules to run, each once, and the standing ones that cannot be."""
    chosen: dict[str, Rule] = {}
    left_out = {}
    for name in STANDING:
        rule = make_rule(name)
        if rule.needs <= offers:
            chosen[rule.spec] = rule
        else:
            left_out[name] = f"which needs {_needs(rule, offers)}"
    for spec in asked:
        rule = make_rule(spec) if isinstance(spec, str) else spec
        if not rule.needs <= offers:
            raise SafeLoraError(f"rule {rule.spec} needs {_needs(rule, offers)}.")
        chosen.setdefault(rule.spec, rule)
    for spec, given in values.items():
        if spec not in chosen:
            raise SafeLoraError(f"values for {spec!r}, which is not among the rules: {', '.join(chosen)}.")
        if not given:
            raise SafeLoraError(f"no values for {spec!r}.")
    return list(chosen.values()), left_out


def _needs(rule: Rule, offers: frozenset[str]) -> str:
    what = {
        "base": "the model before alignment (base)",
        "calibration": "calibration examples (calibrate_safety, calibrate_task)",
    }
    return " and ".join(what.get(name, name) for name in sorted(rule.needs - offers))


def _calibration(suite: Suite, safety: Any, task: Any) -> tuple[list[Example] | None, list[Example] | None]:
    if safety is None:
        return None, None
    evaluated = {example.prompt for example in (*suite.safety, *suite.benign, *suite.utility)}
    loaded = load_examples(safety), load_examples(task)
    for examples in loaded:
        seen = [example.prompt for example in examples if example.prompt in evaluated]
        if seen:
            raise SafeLoraError(
                f"{len(seen)} calibration prompts are also evaluated, such as {seen[0][:60]!r}: the figures would "
                "be of what the rule was fitted to."
            )
    return loaded


def _plan(
    subject: Subject,
    rules: Sequence[Rule],
    num_layers: Sequence[int] | None,
    thresholds: Sequence[float] | None,
    values: dict[str, Sequence[float]],
    draws: int | None,
) -> Iterator[tuple[Rule, float, int | None]]:
    """Every rule, value and draw."""
    count = len(subject.modules)
    if num_layers is not None and max(num_layers) > count:
        raise SafeLoraError(f"{max(num_layers)} modules were asked for, the adapter has {count}.")
    counts = list(num_layers or (max(1, round(share * count)) for share in SHARES))
    if thresholds is not None:
        counts = [selected for threshold in thresholds if (selected := selects(subject, threshold))]
        if not counts:
            raise SafeLoraError("no module has a cosine up to any of the thresholds.")
    for rule in rules:
        swept = values.get(rule.spec) or (counts if rule.parameter == MODULES else rule.values)
        for value in dict.fromkeys(swept):
            for draw in range(draws or rule.draws) if rule.draws > 1 else (None,):
                yield rule, value, draw


def _pool(points: Sequence[Point]) -> Point:
    first = points[0]
    if len(points) == 1:
        return first
    outcome = pool([point.outcome for point in points])
    return replace(first, outcome=outcome, draw=None, draws=len(points))


def _order(point: Point) -> tuple[float, float]:
    return point.safety.value, -point.utility.value


def _verdict(low: float, high: float) -> str:
    if low <= 0 <= high:
        return ", which does not separate the two"
    return ": the rule refuses more" if high < 0 else ": the control refuses more"
