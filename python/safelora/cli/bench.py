"""`safelora bench`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import command

_BENCH = """\
Measure the kernels on this machine: every operator and step beside the published formulations, stock torch, PEFT, and
the memory and matrix products of the machine. Results are checked against fp64 first; where one is wrong nothing is
timed, and the exit status is 1. Without --full it takes about three minutes on two cores.
"""


def add(commands: Any) -> None:
    bench = command(commands, "bench", "measure the kernels on this machine", _BENCH, _run_bench, None)
    bench.add_argument("--full", action="store_true", help="every case")
    bench.add_argument("--only", metavar="REGEX", help="the cases, of all, whose `operator/name` it is found in")
    bench.add_argument("--list", action="store_true", help="print the cases and their memory, and run nothing")
    bench.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    bench.add_argument("--threads", type=int, metavar="N", help="threads for every variant (default: torch's)")
    bench.add_argument("--seconds", type=float, default=2.0, metavar="S", help="time to spend on a case (default: 2)")
    bench.add_argument("--memory", type=float, metavar="GB", help="budget (default: half of what is free)")
    bench.add_argument("--no-baselines", action="store_true", help="time ours alone, beside the ceilings")
    bench.add_argument("--out", metavar="DIR", help="write bench.json, bench.csv, bench.md and charts there")
    bench.add_argument("--compare", metavar="JSON", help="set the result beside an earlier bench.json")


def _run_bench(arguments: argparse.Namespace) -> int:
    from safelora_kernels.bench.suite import run_suite

    from ..bench import cases
    from ..errors import SafeLoraError

    try:
        return run_suite(arguments, cases)
    except ValueError as error:
        raise SafeLoraError(str(error)) from None
