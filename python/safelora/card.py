"""The mark a projection leaves in the model card: a block in the front matter and a section in the text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .adapter import METADATA_KEY

if TYPE_CHECKING:
    from .report import SafeLoraReport

_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_OWN_BLOCK = re.compile(rf"^{METADATA_KEY}:[ \t]*\n(?:[ \t]+.*\n)*", re.MULTILINE)
_TAG_LIST = re.compile(r"^tags:[ \t]*\n((?:[ \t]*- .*\n)*)", re.MULTILINE)


def mark_card(path: Path, report: SafeLoraReport) -> None:
    """Add the mark to the model card at `path`, which is created when missing; the rest stays as it is."""
    text = path.read_bytes().decode("utf-8", "surrogateescape").replace("\r\n", "\n") if path.exists() else ""
    found = _FRONT_MATTER.match(text)
    front, body = (_OWN_BLOCK.sub("", found[1]), text[found.end() :]) if found else ("", text)
    front = _tagged(front) + _block(report)
    what = "The weight" if "model" in report.inputs else "`lora_B`"
    count = f"{len(report.projected)} of {len(report.modules)}"
    body = body.rstrip("\n") + (
        f"\n\n## Safe LoRA\n\n{what} of {count} modules was projected onto the alignment subspace "
        "(Safe LoRA, arXiv 2405.16833). `safelora_report.json` has the details. Do not project it again.\n"
    )
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


def _block(report: SafeLoraReport) -> str:
    values = {
        "projected": len(report.projected),
        "modules": len(report.modules),
        "base": report.inputs["base"]["source"],
        "aligned": report.inputs["aligned"]["source"],
        **{key: report.options[key] for key in ("threshold", "num_layers", "rule", "normalize")},
    }
    return f"{METADATA_KEY}:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in values.items())
