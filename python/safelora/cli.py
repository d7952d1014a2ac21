"""The `safelora` command. Importing it, and asking for help, imports nothing heavy."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

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
_PROJECT_MODEL = """\
Apply Safe LoRA's rule to a model that was fine-tuned in full, and write a checkpoint of the same shards.

The update of every linear weight is W_ft - W_aligned; where the cosine of the update and its projection is low, the
weight becomes W_aligned plus the projected update. Embeddings, norms and biases stay as fine-tuning left them.
"""
_CONVERT = """\
Write an adapter of MLX-LM (adapters.safetensors) or torchtune (adapter_*.pt) as a PEFT adapter, which can be projected.
"""
_SWEEP = """\
Measure an adapter once and print, for each threshold, how many of its modules `project` would project.
ADAPTER may also be the .json report of an earlier projection or dry run: then no weights are read.
"""
_DOCTOR = """\
Check the kernels on this machine: what is installed, whether every operator is right, how fast it is. The output is
made to be pasted into an issue. Exit status 1 when a check failed.
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
    _add_rule(project, "adapter")
    project.add_argument(
        "--modules-to-save", choices=("keep", "project"), default="keep",
        help="tensors tuned in full: keep (default) copies them, project applies the rule to W_ft - W_aligned",
    )  # fmt: skip
    project.add_argument(
        "--all-adapters", action="store_true", help="ADAPTER is a directory of several; --out gets a directory for each"
    )
    _add_sources(project)

    model = _command(commands, "project-model", "project a full fine-tune", _PROJECT_MODEL, _run_project_model, "model")
    model.add_argument("--base", required=True, metavar="MODEL", help="the model before alignment")
    model.add_argument("--aligned", required=True, metavar="MODEL", help="the aligned model that was fine-tuned")
    _add_rule(model, "model")
    model.add_argument("--include", metavar="REGEX", help="measure only tensors whose name it is found in")
    model.add_argument("--exclude", metavar="REGEX", help="leave tensors whose name it is found in")
    _add_sources(model)

    convert = _command(commands, "convert", "make a PEFT adapter of another's", _CONVERT, _run_convert)
    convert.add_argument("out", metavar="OUT", help="directory to create")
    convert.add_argument("--model", metavar="MODEL", help="the model it was trained on (torchtune: a local directory)")

    sweep = _command(commands, "sweep", "count what each threshold would project", _SWEEP, _run_sweep)
    sweep.add_argument("--base", metavar="MODEL", help="the model before alignment")
    sweep.add_argument(
        "--aligned", metavar="MODEL", help="the aligned model (default: the adapter's base_model_name_or_path)"
    )
    sweep.add_argument("--thresholds", metavar="X,X,…", help="cosines to try (default: 0.05 to 1.00 in steps of 0.05)")
    sweep.add_argument("--rule", choices=("strict", "authors"), default="strict", help="as for project")
    _add_sources(sweep)

    inspect = _command(commands, "inspect", "show an adapter and its pairing", _INSPECT, _run_inspect)
    inspect.add_argument("--base", metavar="MODEL", help="pair the modules with this model")
    inspect.add_argument("--aligned", metavar="MODEL", help="and with this one")
    _add_sources(inspect)

    doctor = _command(commands, "doctor", "check the kernels on this machine", _DOCTOR, _run_doctor, None)
    doctor.add_argument("--no-speed", action="store_true", help="leave out the measurements")
    return parser


def _command(
    commands: Any,
    name: str,
    short: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
    what: Literal["adapter", "model"] | None = "adapter",
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=description, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    if what == "adapter":
        parser.add_argument("adapter", metavar="ADAPTER", help="LoRA adapter directory (or repository id)")
    elif what == "model":
        parser.add_argument("model", metavar="MODEL", help="the fine-tuned model")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _add_rule(parser: argparse.ArgumentParser, what: str) -> None:
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
    parser.add_argument(
        "--report", action="append", default=[], metavar="FILE", help="also write FILE.html, .json or .png (repeatable)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output at --out")
    parser.add_argument("--allow-projected", action="store_true", help="accept an input that was projected before")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


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
    from .distributed import launched
    from .errors import SafeLoraError
    from .project import project_adapter, project_adapters

    _check_reports(arguments.report)
    if arguments.all_adapters and arguments.report:
        raise SafeLoraError("--report writes one report; with --all-adapters there is one beside each adapter.")
    with launched() as ranks, _progress(arguments.quiet or ranks.rank > 0) as progress:
        run: Callable[..., Any] = project_adapters if arguments.all_adapters else project_adapter
        result = run(
            arguments.adapter,
            arguments.base,
            arguments.aligned,
            arguments.out,
            modules_to_save=arguments.modules_to_save,
            progress=progress,
            ranks=ranks,
            **_rule(arguments),
        )
    if ranks.rank > 0:
        return 0
    if arguments.all_adapters:
        if arguments.json:
            import json

            print(json.dumps({name: report.to_dict() for name, report in result.items()}, indent=1))
        else:
            for name, report in result.items():
                if not arguments.quiet:
                    print(f"{name}: ", end="" if not report.dry_run else "\n", flush=True)
                    _show(report)
        return 0
    return _finish(arguments, result)


def _run_project_model(arguments: argparse.Namespace) -> int:
    from .full_model import project_model

    _check_reports(arguments.report)
    with _progress(arguments.quiet) as progress:
        report = project_model(
            arguments.model,
            arguments.base,
            arguments.aligned,
            arguments.out,
            include=arguments.include,
            exclude=arguments.exclude,
            progress=progress,
            **_rule(arguments),
        )
    return _finish(arguments, report)


def _run_convert(arguments: argparse.Namespace) -> int:
    from .convert import convert_adapter

    kind = convert_adapter(arguments.adapter, arguments.out, model=arguments.model)
    if arguments.json:
        import json

        print(json.dumps({"format": kind, "output": arguments.out}))
    else:
        print(f"Converted a {kind} adapter. Written to {arguments.out}.")
    return 0


def _run_sweep(arguments: argparse.Namespace) -> int:
    from .errors import SafeLoraError
    from .sweep import sweep_thresholds

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
        from .project import project_adapter

        with _progress(arguments.json) as progress:
            report = project_adapter(
                arguments.adapter,
                arguments.base,
                arguments.aligned,
                threshold=0.0,
                dry_run=True,
                allow_projected=True,
                local_files_only=arguments.local_files_only,
                revision=arguments.revision,
                revision_base=arguments.revision_base,
                revision_aligned=arguments.revision_aligned,
                progress=progress,
            )
        result = sweep_thresholds(report, thresholds, rule=arguments.rule)
    if arguments.json:
        import json

        print(json.dumps(result.to_dict(), indent=1))
    else:
        _print_table(result.table())
    return 0


def _run_doctor(arguments: argparse.Namespace) -> int:
    from safelora_kernels.doctor import main as examine

    return examine(["--json"] * arguments.json + ["--no-speed"] * arguments.no_speed)


def _rule(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `project` and `project-model` share."""
    return {
        "threshold": arguments.threshold,
        "num_layers": arguments.num_layers,
        "rule": arguments.rule,
        "normalize": arguments.normalize,
        "dry_run": arguments.dry_run,
        "overwrite": arguments.overwrite,
        "allow_projected": arguments.allow_projected,
        "local_files_only": arguments.local_files_only,
        "revision": arguments.revision,
        "revision_base": arguments.revision_base,
        "revision_aligned": arguments.revision_aligned,
    }


def _check_reports(paths: Sequence[str]) -> None:
    from importlib.util import find_spec

    from .errors import SafeLoraError
    from .report import SUFFIXES

    for path in paths:
        if not path.lower().endswith(SUFFIXES):
            raise SafeLoraError(f"cannot tell the format of --report {path}: end it in {', '.join(SUFFIXES)}.")
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise SafeLoraError(f"--report {path}: its directory does not exist.")
        if path.lower().endswith(".png") and find_spec("matplotlib") is None:
            raise SafeLoraError(f"--report {path} needs matplotlib: pip install matplotlib, or ask for .html.")


def _finish(arguments: argparse.Namespace, report: SafeLoraReport) -> int:
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
