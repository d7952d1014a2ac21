"""The `safelora` command. Importing it, and asking for help, imports nothing heavy."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from . import bench, calibrate, convert, doctor, evaluate, export, filter, frontier, inspect, project, push, sweep
from .common import EPILOG

_DESCRIPTION = "Restore the alignment that fine-tuning wore down: from the weights alone, no training."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Without `argv` it is the program itself, and ends the process."""
    if argv is not None:
        return _run(argv)
    # Collecting cycles while torch is imported, and tearing torch down again, take longer than a projection does.
    gc.disable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower().replace("_", "-") != "utf-8":
            stream.reconfigure(errors="replace")  # a terminal that cannot show ‖V‖ gets ?V?, not an error
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
        from ..errors import SafeLoraError

        if isinstance(error, SafeLoraError):
            return _fail(str(error), 2)
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            return _fail(f"{place}{error.strerror or error}", 1)
        return _fail(f"unexpected {type(error).__name__}: {error} (SAFELORA_DEBUG=1 shows where).", 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "safelora", description=_DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (
        project,
        filter,
        convert,
        sweep,
        evaluate,
        frontier,
        inspect,
        calibrate,
        export,
        push,
        bench,
        doctor,
    ):
        module.add(commands)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .. import __version__

        print(f"safelora {__version__}")
        parser.exit()


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
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
    print(f"safelora: error: {shown}", file=sys.stderr)
    return status
