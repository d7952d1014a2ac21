"""`safelora push`."""

from __future__ import annotations

import argparse
from typing import Any

from .common import chosen, command, print_json

_PUSH = """\
Show what of a projected or filtered adapter, a projected model or a SaLoRA export would be uploaded to the Hugging Face
hub; with --upload, upload it.

A folder without a report of its making, or whose report says that nothing was changed, is refused. Checkpoints,
optimizer states and training arguments beside the adapter are never uploaded, nor are the subspaces of SaLoRA.
"""


def add(commands: Any) -> None:
    push = command(commands, "push", "upload a projected, filtered or exported adapter", _PUSH, _run_push, None)
    push.add_argument("folder", metavar="FOLDER", help="output of project, project-model, filter or export")
    push.add_argument("repo_id", metavar="REPO_ID", help="repository on the hub, owner/name")
    push.add_argument("--upload", action="store_true", help="upload; without it nothing leaves this machine")
    push.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    push.add_argument("--revision", metavar="REV", help="branch to commit to (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--message", metavar="TEXT", help="commit message (default: the summary of the report)")


def _run_push(arguments: argparse.Namespace) -> int:
    import sys

    from ..push import push_to_hub

    push = push_to_hub(
        arguments.folder,
        arguments.repo_id,
        private=not arguments.public,
        commit_message=arguments.message,
        **chosen(arguments, "upload", "revision", "create_pr"),
    )
    if arguments.json:
        import dataclasses

        print_json(dataclasses.asdict(push))
        return 0
    print(push.summary)
    for name, size in push.files.items():
        print(f"  {size:>14,}  {name}")
    if push.left_out:
        print(f"stays here: {', '.join(push.left_out)}")
    for warning in push.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Uploaded: {push.url}" if push.url else f"Nothing was uploaded. To {push.repo_id}: add --upload.")
    return 0
