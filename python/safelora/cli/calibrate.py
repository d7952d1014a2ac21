"""`safelora calibrate`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_local, add_quiet, add_running, chosen, command, print_json, print_table, progress_bar

_CALIBRATE = """\
Find the subspaces that SaLoRA protects while an adapter is trained: for each module the leading directions of its
outputs at the response tokens of harmful prompts with safe answers (--safety), and with --task those of the task, for
the adapter's initialisation. One forward pass over each data set. DATA: .jsonl, .json or .csv of prompts with
responses, or of chats.
"""
_OPTIONS = (
    "safety_rank", "task_rank", "oversample", "seed", "exact", "passes", "rcond", "batch_size", "max_length", "limit",
)  # fmt: skip


def add(commands: Any) -> None:
    parser = command(commands, "calibrate", "find the subspaces that SaLoRA trains around", _CALIBRATE, _run, what=None)
    parser.add_argument(
        "model", metavar="MODEL", help="the aligned model that will be fine-tuned: directory or repository id"
    )
    parser.add_argument("--safety", required=True, metavar="DATA", help="harmful prompts with safe answers")
    parser.add_argument("--task", metavar="DATA", help="examples of the task")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write, or a directory for it")
    parser.add_argument(
        "--target-modules", default="all-linear", metavar="NAMES",
        help="comma-separated module names, or all-linear (default)",
    )  # fmt: skip
    parser.add_argument("--config", metavar="DIR", help="take the target modules of this adapter_config.json instead")
    parser.add_argument("--safety-rank", type=int, default=32, metavar="K", help="directions to protect (default 32)")
    parser.add_argument("--task-rank", type=int, default=32, metavar="K", help="directions of the task (default 32)")
    parser.add_argument("--oversample", type=int, metavar="P", help="further columns of the sketch (default: 3 K)")
    parser.add_argument("--passes", type=int, choices=(1, 2), default=1, help="2: refine with a second pass")
    parser.add_argument("--exact", action="store_true", help="whole Gram matrices instead of sketches, to check them")
    parser.add_argument(
        "--rcond", type=float, default=1e-3, metavar="X", help="drop directions below X times the first"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N examples of each data set")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N")
    add_running(parser)
    parser.add_argument("--revision", metavar="REV", help="revision of the model")
    add_local(parser)
    add_quiet(parser)


def _run(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from ..errors import SafeLoraError

    out = Path(arguments.out)
    if not out.is_dir() and (out.suffix != ".safetensors" or not out.parent.is_dir()):
        raise SafeLoraError(f"--out {out}: give a .safetensors file in a directory that exists, or the directory.")
    for option in ("safety", "task"):
        place = getattr(arguments, option)
        if place is not None and not Path(place).is_file():
            raise SafeLoraError(f"--{option} {place}: there is no such file.")
    from ..loading import load_model
    from ..salora import calibrate

    loading = chosen(arguments, "dtype", "device", "revision", "local_files_only")
    model, tokenizer = load_model(arguments.model, **loading, quiet=True)
    with progress_bar(arguments.quiet, "running the model on", in_bytes=False) as progress:
        subspaces = calibrate(
            model,
            _targets(arguments),
            arguments.safety,
            arguments.task,
            tokenizer=tokenizer,
            progress=progress,
            **chosen(arguments, *_OPTIONS),
        )
    place = subspaces.save(out)
    if arguments.json:
        content = {
            "output": str(place),
            "modules": subspaces.details,
            "skipped": subspaces.skipped,
            "provenance": subspaces.provenance,
        }
        print_json(content)
    elif not arguments.quiet:
        print_table(subspaces.table())
        print(f"Written to {place}.")
    return 0


def _targets(arguments: argparse.Namespace) -> Any:
    if arguments.config is not None:
        from peft import PeftConfig

        from ..errors import SafeLoraError

        try:
            return PeftConfig.from_pretrained(arguments.config)
        except (OSError, ValueError) as error:
            raise SafeLoraError(f"--config {arguments.config}: {error}") from error
    names = [name.strip() for name in arguments.target_modules.split(",") if name.strip()]
    return names[0] if names == ["all-linear"] else names
