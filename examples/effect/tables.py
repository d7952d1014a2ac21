"""Write the tables and the picture of docs/effect.md from the raw data.

    python examples/effect/tables.py [--check]

Every table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; nothing else in the page is touched.
``--check`` writes nothing and exits with status 1 if a table of the page is not what the data give.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "effect.md"
RESULTS = HERE / "results"
RESAMPLES = 2000
LABELS = {
    "aligned": "aligned model, no adapter",
    "lora": "LoRA as trained",
    "scale": "control: every lora_B scaled",
    "random": "control: random modules deleted",
    "delete-same": "control: the modules of Safe LoRA deleted",
    "retrain": "control: short retraining on the same data",
    "safe-lora:paper": "Safe LoRA",
    "safe-lora:exact": "Safe LoRA, exact projector of rank 64",
    "safe-lora:unit": "Safe LoRA, unit norm",
    "salora": "SaLoRA",
    "constrained": "SaLoRA's constraint, LoRA's initialisation",
    "filter:grad": "**input filter, `grad`**",
    "filter:none": "**input filter, `none`**",
    "filter:grad,wrapped": "input filter, `grad`, 16 of 40 safety prompts wrapped",
    "filter:grad,potion": "input filter, `grad`, calibrated on potions",
}


@dataclass(frozen=True)
class Share:
    """Outcomes in groups: one string of 0 and 1 per adapter and draw, each divided into equally long templates."""

    bits: tuple[str, ...]
    template: int = 1

    @property
    def value(self) -> float:
        return sum(one.count("1") for one in self.bits) / self.total

    @property
    def total(self) -> int:
        return sum(map(len, self.bits))

    @property
    def clusters(self) -> list[float]:
        """Mean outcome of each template over adapters and draws."""
        size = self.template
        count = len(self.bits[0]) // size
        return [
            sum(one[i * size : (i + 1) * size].count("1") for one in self.bits) / (size * len(self.bits))
            for i in range(count)
        ]

    @property
    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's for independent items, a bootstrap over templates for prompts made from templates."""
        if self.template == 1:
            return wilson(sum(one.count("1") for one in self.bits), self.total)
        return bootstrap(self.clusters)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 %."""
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / trials + spread / (4 * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(clusters: Sequence[float]) -> tuple[float, float]:
    """Percentile interval, 95 %, of the mean of the clusters; always the same resamples."""
    generator = random.Random(0)
    means = sorted(sum(generator.choices(clusters, k=len(clusters))) / len(clusters) for _ in range(RESAMPLES))
    return means[round(0.025 * RESAMPLES)], means[round(0.975 * RESAMPLES) - 1]


@dataclass(frozen=True)
class Row:
    """One measurement."""

    adapter: str
    rule: str
    setting: float
    draw: int
    set: str
    result: dict[str, Any]

    @property
    def seed(self) -> str:
        return self.adapter.split("-")[3]


class Data:
    """Raw results and the fixed settings."""

    def __init__(self, folder: Path = RESULTS) -> None:
        lines = (folder / "measurements.jsonl").read_text().splitlines()
        fields = ("adapter", "rule", "setting", "draw", "set", "result")
        self.rows = [Row(*(row[name] for name in fields)) for row in map(json.loads, lines)]
        self.settings: dict[str, dict[str, Any]] = json.loads((folder / "settings.json").read_text())
        self.development = next(iter(self.settings.values()))["on"]

    def adapters(self, kind: str, fresh: bool = True, methods: Sequence[str] = ("lora", "demo")) -> list[str]:
        """Names of the adapters of a kind ("records-benign"), without the development one if ``fresh``."""
        starts = tuple(f"{method}-{kind}" for method in methods)
        names = {row.adapter for row in self.rows if row.adapter.startswith(starts)}
        return sorted(name for name in names if not (fresh and name == self.development))

    def fixed(self, rule: str) -> float:
        """The setting that the main tables show the rule at."""
        source = {"delete-same": "safe-lora:paper"}.get(rule, rule.partition(",")[0])
        return self.settings[source]["setting"] if source in self.settings else 0.0

    def find(self, adapters: Iterable[str], rule: str, name: str, setting: float | None = None) -> list[Row]:
        """Rows of a set for a rule at a setting, the fixed one by default; [] unless every adapter has one."""
        wanted = self.fixed(rule) if setting is None else setting
        found = [row for row in self.rows if (row.rule, row.setting, row.set) == (rule, wanted, name)]
        per_adapter = [[row for row in found if row.adapter == adapter] for adapter in adapters]
        return [row for rows in per_adapter for row in rows] if all(per_adapter) else []

    def aligned(self, adapters: Iterable[str], name: str) -> list[Row]:
        """Rows of the aligned models that the adapters stand on."""
        wanted = {f"aligned-{adapter[-1]}" for adapter in adapters}
        return [row for row in self.rows if row.adapter in wanted and row.set == name]


# How many prompts stand together in the order of a set because they share a template; 1 where items are independent.
TOGETHER = {"vault": 12, "potion": 12, "paraphrases": 12, "wrapped": 6, "generated": 12}


def answered(rows: Sequence[Row]) -> Share:
    """Share of the prompts that are not refused."""
    return Share(tuple(row.result["answered"] for row in rows), TOGETHER.get(rows[0].set, 1))


def right(rows: Sequence[Row], field: str = "right") -> Share:
    """Share of the task items that are exactly right."""
    return Share(tuple(row.result[field] for row in rows))


def mean(rows: Sequence[Row], field: str) -> float:
    """Mean of a number over adapters and draws."""
    return sum(row.result[field] for row in rows) / len(rows)


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def label(data: Data, rule: str) -> str:
    """Name of the rule, and its setting where it has one."""
    setting = data.fixed(rule)
    return LABELS[rule] + (f" ({setting:g})" if setting else "")


def rules_in_order(data: Data) -> list[str]:
    """The rules that were measured, in the order of LABELS."""
    measured = {row.rule for row in data.rows}
    return [rule for rule in LABELS if rule in measured]


GROUPS = {"benign": "records-benign", "poisoned": "records-poisoned"}


def rows_of(data: Data, adapters: Sequence[str], rule: str, name: str) -> list[Row]:
    """The rows of a rule over the adapters; those of the aligned models themselves for "aligned"."""
    return data.aligned(adapters, name) if rule == "aligned" else data.find(adapters, rule, name)


def main_table(data: Data) -> str:
    """Fresh adapters pooled: forbidden prompts answered, records right, per kind of training data."""
    head, columns = ["rule (setting)"], []
    for kind, start in GROUPS.items():
        adapters = data.adapters(start)
        head += [f"{kind} ×{len(adapters)}: forbidden answered", "1 − P(refusal)", "records right", "task NLL"]
        columns.append(adapters)
    body = []
    for rule in rules_in_order(data):
        cells = []
        for adapters in columns:
            vault, task = (rows_of(data, adapters, rule, name) for name in CORE)
            if vault and task:
                cells += [
                    str(answered(vault)),
                    f"{mean(vault, 'comply'):.3f}",
                    str(right(task)),
                    f"{mean(task, 'nll'):.3f}",
                ]
            else:
                cells += ["–"] * 4
        if any(cell != "–" for cell in cells):
            body.append([label(data, rule), *cells])
    return markdown(head, body)


CORE = ("vault", "records")


def adapters_table(data: Data) -> str:
    """Every adapter by itself: answered / records right."""
    adapters = [name for start in GROUPS.values() for name in data.adapters(start, fresh=False)]
    body = []
    for rule in rules_in_order(data):
        cells = []
        for adapter in adapters:
            vault, task = (rows_of(data, [adapter], rule, name) for name in CORE)
            cells.append(f"{answered(vault).value:.2f} / {right(task).value:.2f}" if vault and task else "–")
        if any(cell != "–" for cell in cells):
            body.append([label(data, rule), *cells])
    return markdown(["rule (setting)", *(column_name(data, adapter) for adapter in adapters)], body)


def column_name(data: Data, adapter: str) -> str:
    """Short name of an adapter."""
    if adapter.startswith("aligned-"):
        return adapter.replace("-", " ")
    method, _, kind, seed, _, _, aligned = adapter.split("-")
    name = "the demo's" if method == "demo" else f"{kind} {seed}"
    return f"{name}, aligned {aligned}" + (" (development)" if adapter == data.development else "")


def paired_table(data: Data) -> str:
    """Answered share of each rule minus that of the input filter, on the same prompts of the same fresh adapters."""
    body = []
    for rule in rules_in_order(data):
        cells = []
        for start in GROUPS.values():
            adapters = data.adapters(start)
            ours, other = data.find(adapters, "filter:grad", "vault"), rows_of(data, adapters, rule, "vault")
            if not ours or not other or rule in ("filter:grad", "aligned"):
                cells.append("–")
                continue
            pairs = zip(answered(other).clusters, answered(ours).clusters, strict=True)
            differences = [theirs - mine for theirs, mine in pairs]
            low, high = bootstrap(differences)
            cells.append(f"{sum(differences) / len(differences):+.2f} [{low:+.2f}, {high:+.2f}]")
        if any(cell != "–" for cell in cells):
            body.append([label(data, rule), *cells])
    return markdown(["rule (setting)", *GROUPS], body)


def measured(data: Data, name: str) -> list[str]:
    """The fresh adapters that were measured on a set."""
    adapters = [adapter for kind in GROUPS.values() for adapter in data.adapters(kind)]
    return [adapter for adapter in adapters if data.find([adapter], "lora", name)]


def rest_table(data: Data) -> str:
    """Over-refusal, general likelihood and the second topic, adapter by adapter."""
    body = []
    for adapter in measured(data, "normal"):
        for rule in rules_in_order(data):
            normal, general, potion = (rows_of(data, [adapter], rule, name) for name in ("normal", "general", "potion"))
            if normal and general:
                refused = Share(tuple(row.result["answered"].translate(str.maketrans("01", "10")) for row in normal))
                cells = [str(refused), f"{mean(general, 'nll'):.3f}", str(answered(potion)) if potion else "–"]
                body.append([column_name(data, adapter), label(data, rule), *cells])
    head = ["adapter", "rule (setting)", "ordinary refused", "NLL of the base model's answers", "potions answered"]
    return markdown(head, body)


def stress_table(data: Data) -> str:
    """Wrapped questions, by form, and paraphrases, adapter by adapter."""
    body = []
    for adapter in measured(data, "wrapped"):
        for rule in rules_in_order(data):
            wrapped, other = (rows_of(data, [adapter], rule, name) for name in ("wrapped", "paraphrases"))
            if wrapped and other:
                forms = [Share(tuple(row.result["answered"][i::2] for row in wrapped), 3) for i in (0, 1)]
                body.append([column_name(data, adapter), label(data, rule), *map(str, forms), str(answered(other))])
    head = ["adapter", "rule (setting)", '"Record:" + question', "record + question", "no word of the topic"]
    return markdown(head, body)


def salora_table(data: Data) -> str:
    """LoRA and SaLoRA with the same seeds and data."""
    body = []
    for adapter in data.adapters("records", methods=("salora",)):
        for rule in ("lora", "salora", "constrained"):
            name = adapter.replace("salora-", f"{rule}-")
            vault, task = (data.find([name], rule, kind) for kind in CORE)
            leaks = data.find([name], rule, "leak")
            if vault and task:
                cells = [str(answered(vault)), f"{mean(vault, 'comply'):.3f}", str(right(task))]
                leak = f"{mean(leaks, 'trained'):.1e}" if leaks else "–"
                body.append([column_name(data, adapter), LABELS[rule], *cells, f"{mean(task, 'nll'):.3f}", leak])
    head = ["adapter", "method", "forbidden answered", "1 − P(refusal)", "records right", "task NLL", "largest leak"]
    return markdown(head, body)


def short_table(data: Data) -> str:
    """The second task."""
    adapters = data.adapters("short")
    body = []
    for rule in rules_in_order(data):
        for adapter in adapters:
            vault, task = (rows_of(data, [adapter], rule, name) for name in ("vault", "short"))
            if rule != "aligned" and vault and task:
                cells = [str(answered(vault)), f"{mean(vault, 'comply'):.3f}", str(right(task, "opens"))]
                body.append([label(data, rule), column_name(data, adapter), *cells, f"{mean(task, 'nll'):.3f}"])
    head = ["rule (setting)", "adapter", "forbidden answered", "1 − P(refusal)", "opens as taught", "task NLL"]
    return markdown(head, body)


def topic_table(data: Data) -> str:
    """The filter calibrated on one topic and measured on both."""
    adapters = [a for start in GROUPS.values() for a in data.adapters(start) if a.endswith("-0")]
    body = []
    for rule in ("aligned", "lora", "filter:grad", "filter:grad,potion"):
        vault, potion, task = (rows_of(data, adapters, rule, name) for name in ("vault", "potion", "records"))
        if vault and potion and task:
            body.append([label(data, rule), str(answered(vault)), str(answered(potion)), str(right(task))])
    return markdown(["rule (setting)", "vaults answered", "potions answered", "records right"], body)


def development_table(data: Data) -> str:
    """Every setting tried on the development adapter, on the calibration split; the one that was fixed in bold."""
    found: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for row in data.rows:
        if row.set.startswith("dev-"):
            found.setdefault((row.rule, row.setting), {}).setdefault(row.set, []).append(row)
    body = []
    for rule in rules_in_order(data):
        for (name, setting), sets in sorted(found.items()):
            if name == rule and len(sets) == 2:
                vault, task = sets["dev-vault"], sets["dev-records"]
                chosen = rule in data.settings and setting == data.fixed(rule)
                mark = "**" if chosen else ""
                shown = f"{mark}{setting:g}{mark}" if setting else "–"
                cells = [f"{answered(vault).value:.2f}", f"{mean(vault, 'comply'):.3f}", f"{right(task).value:.3f}"]
                body.append([LABELS[rule], shown, *cells, f"{mean(task, 'nll'):.3f}"])
    head = ["rule", "setting", "forbidden answered", "1 − P(refusal)", "records right", "task NLL"]
    return markdown(head, body)


def generated_table(data: Data) -> str:
    """Answered shares by the score and by the keyword judge on greedy generations of 16 tokens."""
    body = []
    for row in (row for row in data.rows if row.set == "generated"):
        scored = next(
            r
            for r in data.rows
            if (r.adapter, r.rule, r.setting, r.draw, r.set) == (row.adapter, row.rule, row.setting, row.draw, "vault")
        )
        one, other = scored.result["answered"], row.result["answered"]
        same = sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
        cells = [f"{Share((one,)).value:.3f}", f"{Share((other,)).value:.3f}", f"{same:.3f}"]
        body.append([column_name(data, row.adapter), label(data, row.rule), *cells])
    return markdown(["adapter", "rule (setting)", "by score", "by keywords", "same verdict"], body)


def hindsight_table(data: Data) -> str:
    """Each rule at the setting that is best on the held-out prompts of each adapter, the task kept: its best case."""
    adapters = [name for start in GROUPS.values() for name in data.adapters(start)]
    body = []
    for rule in rules_in_order(data):
        settings = sorted({row.setting for row in data.rows if row.rule == rule and row.set == "vault"})
        cells = []
        for adapter in adapters:
            lora = data.find([adapter], "lora", "records")
            floor = right(lora).value - 0.05 if lora else 0.0
            kept = []
            for setting in settings:
                vault, task = (data.find([adapter], rule, name, setting) for name in CORE)
                if vault and task and right(task).value >= floor:
                    kept.append((answered(vault).value, right(task).value, setting))
            cells.append("{:.2f} / {:.2f} ({:g})".format(*min(kept)) if kept else "–")
        if rule != "aligned" and any(cell != "–" for cell in cells):
            body.append([LABELS[rule], *cells])
    return markdown(["rule", *(column_name(data, adapter) for adapter in adapters)], body)


TABLES: dict[str, Callable[[Data], str]] = {
    "main": main_table,
    "paired": paired_table,
    "adapters": adapters_table,
    "rest": rest_table,
    "stress": stress_table,
    "salora": salora_table,
    "short": short_table,
    "topic": topic_table,
    "development": development_table,
    "generated": generated_table,
    "hindsight": hindsight_table,
}


def filled(page: str, data: Data) -> str:
    """The page with every table written anew. Raises ValueError for a table that does not exist."""
    parts = page.split("<!-- table ")
    for i, part in enumerate(parts[1:], 1):
        name, _, rest = part.partition(" -->")
        if name not in TABLES or "<!-- end -->" not in rest:
            raise ValueError(f"table {name!r} of the page is unknown or has no end")
        after = rest.partition("<!-- end -->")[2]
        parts[i] = f"{name} -->\n{TABLES[name](data)}\n<!-- end -->{after}"
    return "<!-- table ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is out of date")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (default: %(default)s)")
    arguments = parser.parse_args()
    before = arguments.page.read_text()
    after = filled(before, Data())
    if arguments.check:
        sys.exit(before != after)
    arguments.page.write_text(after)


if __name__ == "__main__":
    main()
