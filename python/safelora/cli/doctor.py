"""`safelora doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import command

_DOCTOR = """\
Check the kernels on this machine: what is installed, whether every operator is right, how fast it is. The output is
made to be pasted into an issue. Exit status 1 when a check failed.
"""


def add(commands: Any) -> None:
    doctor = command(commands, "doctor", "check the kernels on this machine", _DOCTOR, _run_doctor, None)
    doctor.add_argument("--no-speed", action="store_true", help="leave out the measurements")


def _run_doctor(arguments: argparse.Namespace) -> int:
    from safelora_kernels.doctor import main as examine

    return examine(["--json"] * arguments.json + ["--no-speed"] * arguments.no_speed)
