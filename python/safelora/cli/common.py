"""What the commands share: their parsers' common options, progress, tables and reports."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..frontier import Frontier
    from ..report import Report

EPILOG = """\
examples:
  see how far each module of an adapter strays from the alignment direction (writes nothing):
    safelora project ./adapter --base meta-llama/Llama-2-7b-hf --threshold 0.35 --dry-run

  project the modules below the threshold, with a page to look at:
    safelora project ./adapter --base ./llama-2-7b --aligned ./llama-2-7b-chat \\
        --out ./adapter-safe --threshold 0.35 --report adapter-safe.html

  check how the adapter's modules pair with the checkpoints' tensors, reading no weights:
    safelora inspect ./adapter --base ./llama-2-7b

  count the forbidden prompts that are answered, with and without the adapter, before and after:
    safelora evaluate ./llama-2-7b-chat ./adapter ./adapter-safe --safety prompts.csv --utility task.jsonl

exit status: 0 done, 2 unusable input or options, 1 unexpected failure, 130 interrupted.
Set SAFELORA_DEBUG=1 for a traceback. Method: Safe LoRA, arXiv 2405.16833.
"""

SOURCES = ("local_files_only", "revision", "revision_base", "revision_aligned")


def command(
    commands: Any,
    name: str,
    short: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
    what: Literal["adapter", "model"] | None = "adapter",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    if what == "adapter":
        parser.add_argument("adapter", metavar="ADAPTER", help="LoRA adapter directory (or repository id)")
    elif what == "model":
        parser.add_argument("model", metavar="MODEL", help="the fine-tuned model")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def add_rule(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", metavar="DIR", help="directory to create (not needed with --dry-run)")
    criterion = parser.add_mutually_exclusive_group(required=True)
    criterion.add_argument(
        "--threshold", type=float, metavar="X", help="project modules whose cosine is at most X (the paper: about 0.35)"
    )
    criterion.add_argument("--num-layers", type=int, metavar="K", help="project the K modules with the lowest cosines")
    parser.add_argument(
        "--rule", choices=("strict", "authors"), default="strict",
        help="strict (default): exact cosines, exactly K; authors: rounded to 5 decimals, ties take more",
    )  # fmt: skip
    parser.add_argument(
        "--normalize", choices=("frobenius", "none"), default="frobenius",
        help="frobenius (default): C = V V^T/|V|, as published; none: V V^T",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help=f"measure, decide and print; write no {what}")
    add_reports(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output at --out")
    parser.add_argument("--allow-projected", action="store_true", help="accept an input that was projected before")
    add_quiet(parser)


def add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "where models come from (MODEL: a directory, a safetensors file or a repository id)"
    )
    add_local(group)
    group.add_argument("--revision", metavar="REV", help="revision of the adapter")
    group.add_argument("--revision-base", metavar="REV", help="revision of --base")
    group.add_argument("--revision-aligned", metavar="REV", help="revision of --aligned")


def rule_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `project` and `project-model` share."""
    names = ("out", "threshold", "num_layers", "rule", "normalize", "dry_run", "overwrite", "allow_projected")
    return chosen(arguments, *names, *SOURCES)


def chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names, as keyword arguments of the function behind the command."""
    return {name: getattr(arguments, name) for name in names}


def add_running(parser: Any) -> None:
    """What every command that runs a model takes."""
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens an example (default: 1024)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="to load the model in (default: as it is stored)",
    )  # fmt: skip
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, auto, … (default: cuda where there is one)")


def add_local(parser: Any) -> None:
    parser.add_argument("--local-files-only", action="store_true", help="use the local Hugging Face cache, no network")


def add_quiet(parser: Any) -> None:
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_reports(parser: Any) -> None:
    parser.add_argument(
        "--report", action="append", default=[], metavar="FILE", help="also write FILE.html, .json or .png (repeatable)"
    )


def check_reports(paths: Sequence[str], inputs: Sequence[str | None]) -> None:
    """Refuse, before any work, reports that could not be written, or would lie in a directory that is read."""
    from importlib.util import find_spec

    from ..errors import SafeLoraError
    from ..report import SUFFIXES

    for path in paths:
        if not path.lower().endswith(SUFFIXES):
            raise SafeLoraError(f"cannot tell the format of --report {path}: end it in {', '.join(SUFFIXES)}.")
        directory = os.path.dirname(path) or "."
        if not os.path.isdir(directory):
            raise SafeLoraError(f"--report {path}: its directory does not exist.")
        if os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
            raise SafeLoraError(f"--report {path} cannot be written there: choose another place.")
        for source in inputs:
            if source and os.path.isdir(source) and os.path.samefile(source, directory):
                raise SafeLoraError(f"--report {path} would lie in the input {source}; inputs are never changed.")
        if path.lower().endswith(".png") and find_spec("matplotlib") is None:
            raise SafeLoraError(f"--report {path} needs matplotlib: pip install matplotlib, or ask for .html.")


def finish(arguments: argparse.Namespace, report: Report) -> int:
    for path in arguments.report:
        report.save(path)
    if arguments.json:
        sys.stdout.write(report.to_json())
    elif not arguments.quiet:
        show(report)
    return 0


def show(report: Report) -> None:
    if report.dry_run:
        print_table(report.table())
        return
    print(report.summary())
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def write_measured(arguments: argparse.Namespace, result: Evaluation | Frontier, sentences: Sequence[str] = ()) -> int:
    """Save and print what was measured of a model; the last step of a command."""
    result.inputs["model"] = arguments.model
    if arguments.out is not None:
        result.save(arguments.out, overwrite=arguments.overwrite)
    if arguments.json:
        sys.stdout.write(result.to_json())
    elif not arguments.quiet:
        print_table(result.table())
        for sentence in sentences:
            print(sentence)
        if arguments.out is not None:
            print(f"Written to {arguments.out}.")
    return 0


def print_json(content: Any) -> None:
    import json

    print(json.dumps(content, indent=1))


def print_table(table: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)


@contextmanager
def progress_bar(
    quiet: bool, doing: str = "reading weights", *, in_bytes: bool = True
) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error when that is a terminal, else nothing; is told how much of how much is done."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(TextColumn(doing), BarColumn(), count, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
