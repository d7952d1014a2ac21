"""`safelora convert`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import command, print_json

_CONVERT = """\
Write an adapter of MLX-LM (adapters.safetensors) or torchtune (adapter_*.pt) as a PEFT adapter, which can be projected.
"""


def add(commands: Any) -> None:
    convert = command(commands, "convert", "make a PEFT adapter of another's", _CONVERT, _run_convert)
    convert.add_argument("out", metavar="OUT", help="directory to create")
    convert.add_argument("--model", metavar="MODEL", help="the model it was trained on (torchtune: a local directory)")


def _run_convert(arguments: argparse.Namespace) -> int:
    from ..convert import convert_adapter

    kind = convert_adapter(arguments.adapter, arguments.out, model=arguments.model)
    if arguments.json:
        print_json({"format": kind, "output": arguments.out})
    else:
        print(f"Converted a {kind} adapter. Written to {arguments.out}.")
    return 0
