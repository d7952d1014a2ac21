"""What models answered, as rows, and in the forms that the field's own evaluation scripts read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def to_tuning_safety(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Rows of ``prompt`` and ``answer``: what LLM-Tuning-Safety's keyword_eval.py and gpt4_eval.py read."""
    return [{"prompt": row["prompt"], "answer": row["response"]} for row in _safety(rows)]


def to_harmbench(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """``{BehaviorID: [{test_case, generation}]}``: what HarmBench's evaluate_completions.py reads.

    Rows whose data set gave no behaviour id are left out.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for row in _safety(rows):
        if row.get("behavior_id") is not None:
            entry = {"test_case": row["prompt"], "generation": row["response"]}
            found.setdefault(str(row["behavior_id"]), []).append(entry)
    return found


def to_strongreject(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Rows of ``forbidden_prompt`` and ``response``: what StrongREJECT's evaluate_dataset takes."""
    return [{"forbidden_prompt": row["prompt"], "response": row["response"]} for row in _safety(rows)]


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def write_formats(directory: Path, stem: str, rows: Sequence[Row]) -> list[str]:
    """The three forms of one model's safety rows, as files named after it; returns their names."""
    tables = {"tuning_safety": to_tuning_safety(rows), "strongreject": to_strongreject(rows)}
    names = []
    for kind, table in tables.items():
        if table:
            names.append(f"{stem}.{kind}.jsonl")
            write_jsonl(directory / names[-1], table)
    completions = to_harmbench(rows)
    if completions:
        names.append(f"{stem}.harmbench.json")
        (directory / names[-1]).write_text(
            json.dumps(completions, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    return names


def _safety(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if row["set"] == "safety")
