"""The mark a projection leaves in the model card: a block in the front matter and a section in the text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter import METADATA_KEY

if TYPE_CHECKING:
    from .report import Report

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_TAG_LIST = re.compile(r"^tags:[ \t]*\n((?:[ \t]*- .*\n)*)", re.MULTILINE)


def mark_card(path: Path, report: Report) -> None:
    """Add a report's mark to the model card at `path`."""
    write_mark(path, report.mark.key, *report.card())


def write_mark(path: Path, key: str, values: dict[str, Any], heading: str, section: str) -> None:
    """Add a mark to the model card at `path`, which is created when missing; the rest stays as it is.

    The mark is the block `key` of `values` in the front matter, a tag, and a section under `heading`.
    """
    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n") if path.exists() else ""
    own_block = re.compile(rf"^{key}:[ \t]*\n(?:[ \t]+.*\n)*", re.MULTILINE)
    found = _FRONT_MATTER.match(text)
    front, body = (own_block.sub("", found[1]), text[found.end() :]) if found else ("", text)
    block = f"{key}:\n" + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in values.items())
    front = _tagged(front) + block
    body = body.rstrip("\n") + f"\n\n## {heading}\n\n{section}\n"
    path.write_bytes(f"---\n{front}---\n{body}".encode("utf-8", "surrogateescape"))


def _tagged(front: str) -> str:
    found = _TAG_LIST.search(front)
    if found is None:
        return front if re.search(r"^tags:", front, re.MULTILINE) else f"{front}tags:\n- {METADATA_KEY}\n"
    items = found[1]
    if re.search(rf"^[ \t]*- {METADATA_KEY}[ \t]*$", items, re.MULTILINE):
        return front
    indent = items[: items.index("-")] if items else ""
    return f"{front[: found.end()]}{indent}- {METADATA_KEY}\n{front[found.end() :]}"
