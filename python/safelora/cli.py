"""The `safelora` command. Importing it, and asking for help, imports nothing heavy."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import SafeLoraReport

_DESCRIPTION = "Restore the alignment that fine-tuning wore down: from the weights alone, no training."
_EPILOG = """\
examples:
  see how far each module of an adapter strays from the alignment direction (writes nothing):
    safelora project ./adapter --base meta-llama/Llama-2-7b-hf --threshold 0.35 --dry-run

  project the modules below the threshold, with a page to look at:
    safelora project ./adapter --base ./llama-2-7b --aligned ./llama-2-7b-chat \\
        --out ./adapter-safe --threshold 0.35 --report adapter-safe.html

  check how the adapter's modules pair with the checkpoints' tensors, reading no weights:
    safelora inspect ./adapter --base ./llama-2-7b

exit status: 0 done, 2 unusable input or options, 1 unexpected failure, 130 interrupted.
Set SAFELORA_DEBUG=1 for a traceback. Method: Safe LoRA, arXiv 2405.16833.
"""
_PROJECT = """\
Apply Safe LoRA to a PEFT adapter directory and write a plain PEFT adapter that loads anywhere.

With V = W_aligned - W_base and C = V V^T / |V|, a module's cosine compares its update B A with C B A. A low cosine
means that the update points away from what alignment changed; lora_B of those modules is replaced by C lora_B. All
else stays bit-identical. Start with --dry-run: it prints the cosines, from which to choose --threshold or --num-layers.
"""
_INSPECT = """\
Show what an adapter holds and which checkpoint tensor each of its modules is paired with. Reads headers only.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Without `argv` it is the program itself, and ends the process."""
    if argv is not None:
        return _run(argv)
    # Collecting cycles while torch is imported, and tearing torch down again, take longer than a projection does.
    gc.disable()
    status = _run(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)


def _run(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    try:
        with _termination_unwinds():
            status = int(arguments.run(arguments))
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind.", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output is gone
        return 0
    except Exception as error:
        if os.environ.get("SAFELORA_DEBUG", "").lower() in ("1", "true", "yes", "on"):
            raise
        from .errors import SafeLoraError

        if isinstance(error, SafeLoraError):
            return _fail(str(error), 2)
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            return _fail(f"{place}{error.strerror or error}", 1)
        return _fail(f"unexpected {type(error).__name__}: {error} (SAFELORA_DEBUG=1 shows where).", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "safelora", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    project = _command(commands, "project", "project an adapter (Safe LoRA)", _PROJECT, _run_project)
    project.add_argument("--base", required=True, metavar="MODEL", help="the model before alignment")
    project.add_argument(
        "--aligned", metavar="MODEL", help="the aligned model (default: the adapter's base_model_name_or_path)"
    )
    project.add_argument("--out", metavar="DIR", help="directory to create (not needed with --dry-run)")
    criterion = project.add_mutually_exclusive_group(required=True)
    criterion.add_argument(
        "--threshold", type=float, metavar="X", help="project modules whose cosine is at most X (the paper: about 0.35)"
    )
    criterion.add_argument("--num-layers", type=int, metavar="K", help="project the K modules with the lowest cosines")
    project.add_argument(
        "--rule", choices=("strict", "authors"), default="strict",
        help="strict (default): exact cosines, exactly K; authors: rounded to 5 decimals, ties take more",
    )  # fmt: skip
    project.add_argument(
        "--normalize", choices=("frobenius", "none"), default="frobenius",
        help="frobenius (default): C = V V^T/|V|, as published; none: V V^T",
    )  # fmt: skip
    project.add_argument("--dry-run", action="store_true", help="measure, decide and print; write no adapter")
    project.add_argument(
        "--report", action="append", default=[], metavar="FILE", help="also write FILE.html, .json or .png (repeatable)"
    )
    project.add_argument("--overwrite", action="store_true", help="replace an earlier output at --out")
    project.add_argument("--allow-projected", action="store_true", help="accept an adapter that was projected before")
    project.add_argument("--quiet", action="store_true", help="print nothing but errors")
    _add_sources(project)

    inspect = _command(commands, "inspect", "show an adapter and its pairing", _INSPECT, _run_inspect)
    inspect.add_argument("--base", metavar="MODEL", help="pair the modules with this model")
    inspect.add_argument("--aligned", metavar="MODEL", help="and with this one")
    _add_sources(inspect)
    return parser


def _command(
    commands: Any, name: str, short: str, description: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=description, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT LoRA adapter directory (or repository id)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "where models come from (MODEL: a directory, a safetensors file or a repository id)"
    )
    group.add_argument("--local-files-only", action="store_true", help="use the local Hugging Face cache, no network")
    group.add_argument("--revision", metavar="REV", help="revision of the adapter")
    group.add_argument("--revision-base", metavar="REV", help="revision of --base")
    group.add_argument("--revision-aligned", metavar="REV", help="revision of --aligned")


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from . import __version__

        print(f"safelora {__version__}")
        parser.exit()


def _run_project(arguments: argparse.Namespace) -> int:
    from importlib.util import find_spec

    from .errors import SafeLoraError
    from .project import project_adapter
    from .report import SUFFIXES

    for path in arguments.report:
        if not path.lower().endswith(SUFFIXES):
            raise SafeLoraError(f"cannot tell the format of --report {path}: end it in {', '.join(SUFFIXES)}.")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise SafeLoraError(f"--report {path}: its directory does not exist.")
        if path.lower().endswith(".png") and find_spec("matplotlib") is None:
            raise SafeLoraError(f"--report {path} needs matplotlib: pip install matplotlib, or ask for .html.")
    with _progress(arguments.quiet) as progress:
        report = project_adapter(
            arguments.adapter,
            arguments.base,
            arguments.aligned,
            arguments.out,
            threshold=arguments.threshold,
            num_layers=arguments.num_layers,
            rule=arguments.rule,
            normalize=arguments.normalize,
            dry_run=arguments.dry_run,
            overwrite=arguments.overwrite,
            allow_projected=arguments.allow_projected,
            local_files_only=arguments.local_files_only,
            revision=arguments.revision,
            revision_base=arguments.revision_base,
            revision_aligned=arguments.revision_aligned,
            progress=progress,
        )
    for path in arguments.report:
        report.save(path)
    if arguments.json:
        sys.stdout.write(report.to_json())
    elif not arguments.quiet:
        _show(report)
    return 0


def _show(report: SafeLoraReport) -> None:
    if report.dry_run:
        _print_table(report.table())
        return
    print(report.summary())
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _run_inspect(arguments: argparse.Namespace) -> int:
    from .adapter import Adapter
    from .checkpoint import Checkpoint
    from .mapping import plan_modules

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
                "dtype": planned.module.lora_B.dtype,
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
    if arguments.json:
        import json

        content = {
            "adapter": str(adapter.root),
            "base_model_name_or_path": adapter.base_model,
            "modules": rows,
            "passed_through": adapter.passed_through,
            "warnings": adapter.warnings,
        }
        print(json.dumps(content, indent=1))
        return 0
    _print_table(_inspection_table(rows, adapter.base_model, adapter.warnings))
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


def _print_table(table: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    console.print(table)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error when that is a terminal, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("reading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Let SIGTERM unwind the stack like an interrupt, so that a half-written output is removed."""
    import signal

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(message: str, status: int) -> int:
    print(f"safelora: error: {message}", file=sys.stderr)
    return status
