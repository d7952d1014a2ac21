"""`safelora sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import SOURCES, add_sources, chosen, command, print_json, print_table, progress_bar

_SWEEP = """\
Measure an adapter once and print, for each threshold, how many of its modules `project` would project.
ADAPTER may also be the .json report of an earlier projection or dry run: then no weights are read.
"""


def add(commands: Any) -> None:
    sweep = command(commands, "sweep", "count what each threshold would project", _SWEEP, _run_sweep)
    sweep.add_argument("--base", metavar="MODEL", help="the model before alignment")
    sweep.add_argument(
        "--aligned", metavar="MODEL", help="the aligned model (default: the adapter's base_model_name_or_path)"
    )
    sweep.add_argument("--thresholds", metavar="X,X,…", help="cosines to try (default: 0.05 to 1.00 in steps of 0.05)")
    sweep.add_argument("--rule", choices=("strict", "authors"), default="strict", help="as for project")
    add_sources(sweep)


def _run_sweep(arguments: argparse.Namespace) -> int:
    from ..errors import SafeLoraError
    from ..sweep import sweep_thresholds

    thresholds = None
    if arguments.thresholds is not None:
        try:
            thresholds = [float(word) for word in arguments.thresholds.split(",")]
        except ValueError:
            raise SafeLoraError(f"--thresholds {arguments.thresholds}: expected numbers with commas between.") from None
    if arguments.adapter.endswith(".json"):
        result = sweep_thresholds(arguments.adapter, thresholds, rule=arguments.rule)
    elif arguments.base is None:
        raise SafeLoraError("--base is missing: the model before alignment (a saved report needs none).")
    else:
        from ..project import project_adapter

        with progress_bar(arguments.json) as progress:
            report = project_adapter(
                arguments.adapter,
                arguments.base,
                arguments.aligned,
                threshold=0.0,
                dry_run=True,
                allow_projected=True,
                progress=progress,
                **chosen(arguments, *SOURCES),
            )
        result = sweep_thresholds(report, thresholds, rule=arguments.rule)
    if arguments.json:
        print_json(result.to_dict())
    else:
        print_table(result.table())
    return 0
