"""`safelora frontier`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import chosen, command, progress_bar, write_measured
from .evaluate import add_questions, prepare

_FRONTIER = """\
Change each ADAPTER on MODEL by several rules, each at several strengths, and measure at every one what `evaluate`
measures. Always run: Safe LoRA as published, with an orthogonal projector and at unit norm, the input filter (it needs
--calibrate-safety and --calibrate-task), and the controls that tell projecting from shrinking: the same modules
deleted, random modules deleted (several draws), everything scaled.
No file of MODEL or ADAPTER is changed.
"""
_OPTIONS = ("base", "draws", "seed", "calibrate_safety", "calibrate_task", "tolerance", "local_files_only")


def add(commands: Any) -> None:
    parser = command(commands, "frontier", "sweep rules and controls", _FRONTIER, _run_frontier, None)
    parser.add_argument("model", metavar="MODEL", help="the aligned model: a directory or a repository id")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="adapter directories (or repository ids)")
    parser.add_argument("--base", metavar="MODEL", help="the model before alignment; without it, most rules cannot run")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--rule", action="append", default=[], metavar="RULE",
        help="run another rule too: NAME, NAME:option=value,… or MODULE:CLASS (repeatable)",
    )  # fmt: skip
    numbers = sweep.add_mutually_exclusive_group()
    numbers.add_argument(
        "--num-layers", metavar="K,K,…", help="numbers of modules to change (default: 10, 20, 30 and 50 %% of them)"
    )
    numbers.add_argument("--thresholds", metavar="X,X,…", help="as many modules as Safe LoRA selects at these cosines")
    sweep.add_argument(
        "--values", action="append", default=[], metavar="RULE=X,X,…", help="what to sweep for one rule (repeatable)"
    )
    sweep.add_argument("--draws", type=int, metavar="N", help="draws of random deletion (default: 3)")
    sweep.add_argument("--seed", type=int, default=0, metavar="N", help="of these draws (default: 0)")
    sweep.add_argument("--calibrate-safety", metavar="FILE", help="forbidden prompts for rules that are fitted to some")
    sweep.add_argument("--calibrate-task", metavar="FILE", help="task examples for them; none that is evaluated")
    sweep.add_argument(
        "--tolerance", type=float, default=0.05, metavar="X",
        help="how much of the task a rule may lose to be compared (default: 0.05)",
    )  # fmt: skip
    add_questions(parser, "generate")


def _run_frontier(arguments: argparse.Namespace) -> int:
    from ..errors import SafeLoraError
    from ..frontier import trace_frontier

    num_layers = _numbers("--num-layers", arguments.num_layers, int)
    thresholds = _numbers("--thresholds", arguments.thresholds, float)
    values = {}
    for given in arguments.values:
        rule, equals, listed = given.rpartition("=")
        if not equals:
            raise SafeLoraError(f"--values {given}: expected RULE=X,X,….")
        values[rule] = _numbers("--values", listed, float)
    suite, model, tokenizer = prepare(arguments)
    with progress_bar(arguments.quiet, "asking", in_bytes=False) as progress:
        result = trace_frontier(
            model,
            arguments.adapters,
            rules=arguments.rule,
            tokenizer=tokenizer,
            suite=suite,
            num_layers=num_layers,
            thresholds=thresholds,
            values=values,
            progress=progress,
            **chosen(arguments, *_OPTIONS),
        )
    return write_measured(arguments, result, result.reading())


def _numbers(option: str, text: str | None, kind: type) -> Any:
    from ..errors import SafeLoraError

    if text is None:
        return None
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise SafeLoraError(f"{option} {text}: expected numbers with commas between.") from None
