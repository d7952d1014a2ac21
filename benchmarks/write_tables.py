"""Writes the figures of a run of `safelora bench` into README.md and docs/benchmarks.md, between their marks.

    safelora bench --out docs/measured && python benchmarks/write_tables.py docs/measured/bench.json

`make figures` does both. The pictures of the run are shown by the same pages from docs/measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from safelora_kernels.bench import Row, Run
from safelora_kernels.bench.case import MOVING, OURS
from safelora_kernels.bench.show import by_case, curve_table, milliseconds
from safelora_kernels.text import markdown_table

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?<=<!-- measured:begin -->\n).*?(?=<!-- measured:end -->)", re.DOTALL)
PUBLISHED = ("published", "both models", "dense C")


def is_published(row: Row) -> bool:
    return any(word in row.variant for word in PUBLISHED)


def ratio(rows: list[Row]) -> str:
    """Over ours, of the fastest."""
    found = min((row.over_ours for row in rows if row.over_ours is not None), default=None)
    return "" if found is None else f"{found:.3g} ×" if found < 100 else f"{found:.0f} ×"


def machine(run: Run) -> str:
    rates = ", ".join(
        f"{name.split(', ')[0]} {value:.3g} {name.split(', ')[1]}" for name, value in run.ceilings.items()
    )
    day = run.started[:10]
    load = run.environment.get("load average", "not recorded")
    return (
        f"{run.environment['device']}, torch {run.environment['torch']}, {day}, load average {load}; "
        f"ceilings of the same run: {rates}."
    )


def summary(run: Run) -> str:
    """One line a case: ours, and the others as multiples of it."""
    head = ("", "ours, ms", "moving the operands", "best of stock torch or PEFT", "published form", "error of ours")
    lines = []
    for (op, case), rows in by_case(run.rows).items():
        ours = next(row for row in rows if row.variant == OURS)
        moving = [row for row in rows if row.variant == MOVING]
        published = [row for row in rows if is_published(row)]
        stock = [row for row in rows if row not in (ours, *moving, *published) and "forward pass" not in row.variant]
        error = "" if ours.error is None else f"{ours.error:.1e}"
        lines.append((f"{op}: {case}", milliseconds(ours.median), ratio(moving), ratio(stock), ratio(published), error))
    return markdown_table(head, lines)


def write(path: Path, text: str) -> None:
    page = path.read_text(encoding="utf-8")
    if len(BLOCK.findall(page)) != 1:
        raise SystemExit(f"{path} must hold one block between <!-- measured:begin --> and <!-- measured:end -->")
    path.write_text(BLOCK.sub(lambda _: text + "\n", page), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="bench.json", type=Path)
    run = Run.load(parser.parse_args().run)
    if run.failed:
        raise SystemExit(f"not written: the run found wrong results: {run.failed}")
    text = f"{machine(run)}\nTimes of others are multiples of ours.\n\n{summary(run)}"
    write(ROOT / "README.md", text)
    write(ROOT / "docs" / "benchmarks.md", f"{text}\n\n{curve_table(run.curves)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
