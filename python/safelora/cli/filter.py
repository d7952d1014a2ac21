"""`safelora filter`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import (
    add_local,
    add_quiet,
    add_reports,
    add_running,
    check_reports,
    chosen,
    command,
    finish,
    progress_bar,
)

_FILTER = """\
Damp an adapter's update on inputs like those of safety prompts, keep it on the task's, and write a plain PEFT adapter.

A' = A K_t (K_t + strength K_s)^-1, with K_t and K_s the second moments of each layer's inputs on task and on safety
examples; lora_B and the rank stay as they are. Needs the model itself and a few dozen examples of both kinds, no base
model and no training. DATA is .jsonl, .json, .csv, .tsv or .txt: prompts, with answers for --weight grad. Look at what
is left of the update on both sides (--dry-run), and measure the result: `safelora frontier`.
"""
_OPTIONS = (
    "weight", "strength", "ridge", "model", "tokenizer", "out", "refusal", "unseen", "solver", "memory_budget",
    "batch_size", "max_length", "dry_run", "overwrite", "allow_filtered", "local_files_only", "revision", "device",
    "dtype",
)  # fmt: skip


def add(commands: Any) -> None:
    parser = command(commands, "filter", "filter an adapter's inputs (no base model)", _FILTER, _run_filter)
    parser.add_argument("--safety", required=True, metavar="DATA", help="requests to be refused, with the refusals")
    parser.add_argument("--task", required=True, metavar="DATA", help="examples of what the adapter was trained for")
    parser.add_argument("--out", metavar="DIR", help="directory to create (not needed with --dry-run)")
    parser.add_argument(
        "--model", metavar="MODEL", help="the model it adapts (default: the adapter's base_model_name_or_path)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="where the tokenizer is (default: the adapter, the model)")
    parser.add_argument(
        "--weight", choices=("grad", "none"), default="grad",
        help="grad (default): tokens count by the gradient that reaches the adapter; none: alike, forward passes only",
    )  # fmt: skip
    parser.add_argument("--strength", type=float, default=100.0, metavar="X", help="lambda (default: 100)")
    parser.add_argument("--ridge", type=float, default=0.1, metavar="X", help="mu (default: 0.1)")
    parser.add_argument(
        "--unseen", choices=("keep", "drop"), default="keep",
        help="the update where neither set has inputs: keep (default) or drop",
    )  # fmt: skip
    parser.add_argument("--refusal", metavar="TEXT", help="the answer to safety prompts that come without one")
    parser.add_argument(
        "--wrap", type=int, default=0, metavar="N",
        help="add N requests inside the task's own context to the safety examples (default: 0)",
    )  # fmt: skip
    parser.add_argument("--solver", choices=("auto", "cholesky", "dual", "cg"), default="auto", help="default: auto")
    parser.add_argument("--memory-budget", type=float, default=2.0, metavar="GIB", help="for moments (default: 2)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="examples a batch (default: 8)")
    add_running(parser)
    parser.add_argument("--dry-run", action="store_true", help="measure, solve and print; write no adapter")
    add_reports(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output at --out")
    parser.add_argument("--allow-filtered", action="store_true", help="accept an input that was filtered before")
    add_local(parser)
    parser.add_argument("--revision", metavar="REV", help="revision of the adapter")
    add_quiet(parser)


def _run_filter(arguments: argparse.Namespace) -> int:
    check_reports(arguments.report, (arguments.adapter, arguments.model))
    from ..data import load_examples
    from ..filter import filter_adapter, wrapped_prompts

    safety: Any = arguments.safety
    if arguments.wrap > 0:
        safety = load_examples(safety)
        safety = safety + wrapped_prompts(safety, arguments.task, limit=arguments.wrap)
    with progress_bar(arguments.quiet or arguments.json, "reading calibration data", in_bytes=False) as progress:
        report = filter_adapter(
            arguments.adapter, safety, arguments.task, progress=progress, **chosen(arguments, *_OPTIONS)
        )
    return finish(arguments, report)
