"""The cases of the operators, and what `safelora bench` does with them and with others."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from ..doctor import environment
from . import complement, curves, gram, projection, salora, show
from .case import Case
from .run import Curve, Options, Row, Run, run_cases


def cases(device: str) -> Iterator[Case]:
    """Everything that needs torch alone."""
    yield from projection.cases()
    yield from complement.cases()
    yield from gram.cases()
    yield from salora.cases()
    yield from curves.cases(device)


def run_suite(arguments: argparse.Namespace, extra: Callable[[], Iterable[Case]] | None = None) -> int:
    """Run what the options of `safelora bench` ask for; returns the exit status. ValueError for unusable options."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU (python -m safelora_kernels says what there is)")
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {arguments.seconds}")
    earlier = Run.load(arguments.compare) if arguments.compare else None
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    chosen = list(_chosen(arguments, extra))
    if arguments.list:
        print("\n".join(f"{'*' if c.default else ' '} {c.key}  ({c.memory / 1e9:.2f} GB)" for c in chosen))
        return 0
    if not chosen:
        raise ValueError(f"no case matches --only {arguments.only!r}: --list --full shows their names")
    quiet = bool(getattr(arguments, "json", False))
    memory = None if arguments.memory is None else int(arguments.memory * 1e9)
    options = Options(arguments.device, arguments.seconds, memory, not arguments.no_baselines)
    found = describe(arguments.device)
    if not quiet:
        print(f"{found['device']}, torch {found['torch']}\n", flush=True)
    run = run_cases(chosen, options, found, None if quiet else _show)
    if arguments.out:
        write(run, Path(arguments.out))
    if quiet:
        sys.stdout.write(run.to_json())
    else:
        print(show.curve_table(run.curves) + "\n" if run.curves else "", end="")
        print(show.endings(run))
    if earlier is not None:
        print("\n" + show.comparison(run, earlier), file=sys.stderr if quiet else sys.stdout)
    return 1 if run.failed else 0


def describe(device: str) -> dict[str, str]:
    """What the doctor says of the machine, and what was measured on in one line."""
    found = environment()
    name = torch.cuda.get_device_name() if device == "cuda" else found["processor"].split(",")[0]
    path = found.get("cpu code path", "")
    threads = f", {torch.get_num_threads()} threads" + (f", {path}" if path else "")
    load = f"{os.getloadavg()[0]:.1f} before the run"
    return {"device": name + (threads if device == "cpu" else ""), "load average": load, **found}


def _chosen(arguments: argparse.Namespace, extra: Callable[[], Iterable[Case]] | None) -> Iterator[Case]:
    everything = [*cases(arguments.device), *(extra() if extra is not None and arguments.device == "cpu" else ())]
    try:
        pattern = re.compile(arguments.only) if arguments.only else None
    except re.error as error:
        raise ValueError(f"--only {arguments.only!r} is no regular expression: {error}") from None
    for case in everything:
        if pattern.search(case.key) if pattern else (case.default or arguments.full):
            yield case


def _show(rows: list[Row], curve: Curve | None) -> None:
    if rows:
        print(show.case_table(rows) + "\n", flush=True)


def write(run: Run, folder: Path) -> None:
    """bench.json, bench.csv, bench.md, and the charts where matplotlib is there."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = [show.case_table(rows) for rows in show.by_case(run.rows).values()]
    if run.curves:
        tables.append(show.curve_table(run.curves))
    machine = f"{run.environment['device']}, torch {run.environment['torch']}, {run.started}"
    (folder / "bench.md").write_text("\n\n".join([machine, *tables, show.endings(run)]) + "\n", encoding="utf-8")
    (folder / "bench.csv").write_text(run.to_csv(), encoding="utf-8")
    (folder / "bench.json").write_text(run.to_json(), encoding="utf-8")
    if find_spec("matplotlib") is None:
        print("no charts: they need matplotlib (pip install matplotlib)", file=sys.stderr)
        return
    from . import charts

    charts.save(run, folder)
