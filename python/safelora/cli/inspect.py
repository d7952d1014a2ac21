"""`safelora inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_sources, command, print_json, print_table

_INSPECT = """\
Show what an adapter holds, which checkpoint tensor each of its modules is paired with, and what vLLM and llama.cpp do
not take of it. Reads headers only.
"""


def add(commands: Any) -> None:
    inspect = command(commands, "inspect", "show an adapter and its pairing", _INSPECT, _run_inspect)
    inspect.add_argument("--base", metavar="MODEL", help="pair the modules with this model")
    inspect.add_argument("--aligned", metavar="MODEL", help="and with this one")
    add_sources(inspect)


def _run_inspect(arguments: argparse.Namespace) -> int:
    from ..adapter import Adapter
    from ..checkpoint import Checkpoint
    from ..mapping import plan_modules
    from ..serving import serving_notes

    adapter = Adapter.open(
        arguments.adapter,
        revision=arguments.revision,
        local_files_only=arguments.local_files_only,
        allow_projected=True,
    )
    base, aligned = (
        Checkpoint.open(source, revision=revision, local_files_only=arguments.local_files_only) if source else None
        for source, revision in (
            (arguments.base, arguments.revision_base),
            (arguments.aligned, arguments.revision_aligned),
        )
    )
    rows = []
    for planned in plan_modules(adapter, base, aligned):
        matches = {"base": planned.base, "aligned": planned.aligned}
        rows.append(
            {
                "module": planned.module.name,
                "kind": planned.module.kind,
                "rank": planned.module.rank,
                "shape": [planned.module.d_out, planned.module.d_in],
                "dtype": planned.module.output.dtype,
                **{
                    side: match
                    and {
                        "tensor": match.info.name,
                        "file": match.info.file.name,
                        "dtype": match.info.dtype,
                        "matched": match.how,
                        "transposed": match.transposed,
                    }
                    for side, match in matches.items()
                },
                "skipped": planned.skipped,
            }
        )
    model = aligned or base
    serving = [str(note) for note in serving_notes(adapter, model.config if model else None)]
    if arguments.json:
        content = {
            "adapter": str(adapter.root),
            "base_model_name_or_path": adapter.base_model,
            "modules": rows,
            "passed_through": adapter.passed_through,
            "warnings": adapter.warnings,
            "serving": serving,
        }
        print_json(content)
        return 0
    print_table(_inspection_table(rows, adapter.base_model, [*adapter.warnings, *serving]))
    return 0


def _inspection_table(rows: list[dict[str, Any]], model: str | None, warnings: list[str]) -> Any:
    from rich.table import Table

    title = f"{len(rows)} modules, trained on {model or 'an unnamed model'}"
    table = Table(title=title, caption="\n".join(warnings) or None, title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in ("kind", "rank", "d_out × d_in", "dtype"):
        table.add_column(heading)
    sides = [side for side in ("base", "aligned") if any(row[side] or row["skipped"] for row in rows)]
    for side in sides:
        table.add_column(f"{side} tensor", overflow="fold")
    for row in rows:
        cells = [row["module"], row["kind"], str(row["rank"]), "{} × {}".format(*row["shape"]), row["dtype"]]
        for side in sides:
            match = row[side]
            turned = ", transposed" if match and match["transposed"] else ""
            cells.append(
                f"{match['tensor']} [{match['dtype']}{turned}] {match['matched']}" if match else row["skipped"] or "–"
            )
        table.add_row(*cells)
    return table
