"""`safelora evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_local, add_quiet, add_running, chosen, command, progress_bar, write_measured

_EVALUATE = """\
Ask MODEL the same questions without an adapter and with each ADAPTER, greedily, and count what it answers: forbidden
prompts that it answers (ASR), ordinary ones that it refuses, task answers that are right, and the likelihood of the
reference answers; all with 95 % intervals.

Prompt files: .txt, .csv, .tsv, .json or .jsonl in the shapes of AdvBench, HarmBench, JailbreakBench, StrongREJECT,
HEx-PHI, XSTest, Alpaca, Dolly, SAMSum, chats (messages), prompt and response.
"""


def add(commands: Any) -> None:
    parser = command(commands, "evaluate", "count refusals and right answers", _EVALUATE, _run_evaluate, None)
    parser.add_argument("model", metavar="MODEL", help="the (aligned) model: a directory or a repository id")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="*", help="adapter directories (or repository ids)")
    parser.add_argument("--no-bare", action="store_true", help="do not evaluate MODEL without an adapter")
    add_questions(parser, "generate")


def add_questions(parser: argparse.ArgumentParser, metrics: str) -> None:
    """The options that `evaluate` and `frontier` share."""
    questions = parser.add_argument_group("questions")
    questions.add_argument("--safety", metavar="FILE", help="prompts that must not be answered")
    questions.add_argument("--benign", metavar="FILE", help="ordinary prompts, for over-refusal (XSTest's safe ones)")
    questions.add_argument("--utility", metavar="FILE", help="the task: prompts with reference answers")
    questions.add_argument("--general", metavar="FILE", help="prompts with answers, for their likelihood alone")
    questions.add_argument("--limit", type=int, metavar="N", help="the first N examples of each file only")
    judging = parser.add_argument_group("judging")
    judging.add_argument(
        "--judge", default="keywords", metavar="JUDGE",
        help="keywords (default), keywords:FILE (a phrase of refusal a line), or MODULE:NAME of a callable "
        "(prompts, responses) -> list of bool or of 0 to 1",
    )  # fmt: skip
    judging.add_argument("--refusal-judge", metavar="JUDGE", help="the same for --benign (default: keywords)")
    judging.add_argument(
        "--scorer", default="exact", metavar="SCORER",
        help="exact (default), contains, or MODULE:NAME of (prompts, responses, references) -> list",
    )  # fmt: skip
    judging.add_argument(
        "--metrics", choices=("generate", "fast", "both"), default=metrics,
        help="generate: judge greedy answers; fast: likelihood of a refusal and of the reference answers, in one "
        f"forward pass each; both (default: {metrics})",
    )  # fmt: skip
    judging.add_argument(
        "--refusal", default="I'm sorry", metavar="TEXT", help="how this model's refusals begin, for the fast metrics"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (default: 64)")
    running.add_argument("--batch-size", type=int, default=16, metavar="N", help="prompts at once (default: 16)")
    running.add_argument("--chat-template", metavar="FILE", help="Jinja template to use instead of the tokenizer's own")
    add_running(running)
    add_local(running)
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="DIR", help="directory to create, with the figures and all answers")
    output.add_argument("--overwrite", action="store_true", help="replace an earlier output at --out")
    add_quiet(output)


def prepare(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The suite, and the model and tokenizer; everything that can be refused without the model is, before."""
    from ..evaluate import check_out
    from ..loading import load_model
    from ..suite import Suite

    if arguments.out is not None:
        check_out(arguments.out, arguments.overwrite)
    options = ("safety", "benign", "utility", "general", "limit", "judge", "refusal_judge", "scorer", "metrics",
               "refusal", "max_new_tokens", "batch_size", "max_length")  # fmt: skip
    suite = Suite.load(**chosen(arguments, *options))
    loading = chosen(arguments, "dtype", "device", "chat_template", "local_files_only")
    return suite, *load_model(arguments.model, **loading, quiet=True)


def _run_evaluate(arguments: argparse.Namespace) -> int:
    from ..evaluate import evaluate_adapters

    suite, model, tokenizer = prepare(arguments)
    with progress_bar(arguments.quiet, "asking", in_bytes=False) as progress:
        result = evaluate_adapters(
            model,
            arguments.adapters,
            tokenizer=tokenizer,
            bare=not arguments.no_bare,
            suite=suite,
            progress=progress,
            local_files_only=arguments.local_files_only,
        )
    return write_measured(arguments, result)
