"""`safelora calibrate`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import command, print_table, progress_bar

_CALIBRATE = """\
Find the subspaces that SaLoRA protects while an adapter is trained: for each module the leading directions of its
outputs at the response tokens of harmful prompts with safe answers (--safety), and with --task those of the task, for
the adapter's initialisation. One forward pass over each data set. DATA: .jsonl, .json or .csv of prompts with
responses, or of chats.
"""


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
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens per example (default 1024)")
    parser.add_argument("--dtype", default="auto", help="auto (as stored, default), float32, bfloat16 or float16")
    parser.add_argument(
        "--device", metavar="DEVICE", help="where to run: cpu, cuda, … (default: a GPU if there is one)"
    )
    parser.add_argument("--revision", metavar="REV", help="revision of the model")
    parser.add_argument("--local-files-only", action="store_true", help="use the local Hugging Face cache, no network")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


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
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from ..salora import calibrate

    logging.disable_progress_bar()
    dtypes = {"auto": "auto", **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}}
    if arguments.dtype not in dtypes:
        raise SafeLoraError(f"--dtype {arguments.dtype} is not one of {', '.join(dtypes)}.")
    where = {"revision": arguments.revision, "local_files_only": arguments.local_files_only}
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, **where)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtypes[arguments.dtype], **where)
    except (OSError, ValueError) as error:
        raise SafeLoraError(f"the model {arguments.model} could not be loaded: {error}") from error
    model.to(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with progress_bar(arguments.quiet, "running the model on", in_bytes=False) as progress:
        subspaces = calibrate(
            model,
            _targets(arguments),
            arguments.safety,
            arguments.task,
            safety_rank=arguments.safety_rank,
            task_rank=arguments.task_rank,
            oversample=arguments.oversample,
            seed=arguments.seed,
            exact=arguments.exact,
            passes=arguments.passes,
            rcond=arguments.rcond,
            tokenizer=tokenizer,
            batch_size=arguments.batch_size,
            max_length=arguments.max_length,
            limit=arguments.limit,
            progress=progress,
        )
    place = subspaces.save(out)
    if arguments.json:
        import json

        content = {
            "output": str(place),
            "modules": subspaces.details,
            "skipped": subspaces.skipped,
            "provenance": subspaces.provenance,
        }
        print(json.dumps(content, indent=1))
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
