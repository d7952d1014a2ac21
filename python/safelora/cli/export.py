"""`safelora export`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_local, add_quiet, chosen, command, print_table

_EXPORT = """\
Write an adapter that SaLoRA trained (a checkpoint with its salora_subspace.safetensors) for software that knows
nothing of SaLoRA. rank2r: one plain LoRA adapter of the original model, no model read; residual: a model W' and its
adapter; merged: one model. What is written is projected once more, and salora_report.json says how far each module's
update reaches into its subspace.
"""


def add(commands: Any) -> None:
    parser = command(commands, "export", "write a SaLoRA adapter as a plain one, or merged", _EXPORT, _run)
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--form", choices=("rank2r", "residual", "merged"), default="rank2r", help="default: rank2r")
    parser.add_argument("--subspaces", metavar="FILE", help="instead of those in the adapter's directory")
    parser.add_argument("--model", metavar="MODEL", help="the original model (default: the one the adapter names)")
    parser.add_argument("--no-sidecar", action="store_true", help="leave salora_subspace.safetensors out")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    add_local(parser)
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    import sys

    from ..salora import Subspaces, export_checkpoint

    report = export_checkpoint(
        arguments.adapter,
        arguments.out,
        arguments.form,
        subspaces=Subspaces.load(arguments.subspaces) if arguments.subspaces else None,
        sidecar=not arguments.no_sidecar,
        **chosen(arguments, "model", "overwrite", "local_files_only"),
    )
    if arguments.json:
        sys.stdout.write(report.to_json())
    elif not arguments.quiet:
        print_table(report.table())
    return 0
